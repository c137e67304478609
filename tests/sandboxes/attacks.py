"""Hostile programs, each with how it may end. `forbidden`: what its output would hold had it got out.

A program runs in a fresh sandbox. Whatever it does, the call returns with one of `ends`; after it the sandbox either
answers correctly or is dead and can be replaced, and nothing is left on the host.
"""

# ruff: noqa: E501 - programs are quoted whole

from __future__ import annotations

from dataclasses import dataclass, field

OK = frozenset({"ok"})
ERROR = frozenset({"error"})
SAID = OK | ERROR  # tried, was refused, and said so
STOPPED = frozenset({"timeout_interrupted", "timeout_killed"})
DIED = frozenset({"died"})
FLOOD = frozenset({"output_limit"})
ANY = SAID | STOPPED | DIED | FLOOD | {"protocol"}


@dataclass(frozen=True)
class Attack:
    name: str
    code: str
    ends: frozenset[str]
    shell: bool = False
    forbidden: str = ""
    expected: str = ""
    hit: frozenset[str] = field(default_factory=frozenset)


def _tries(*lines: str) -> str:
    """Each line is tried; those that got through are printed as ESCAPED."""
    tried = "\n".join(f"attempt({line!r})" for line in lines)
    return f"""
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(*a):
    r = libc.syscall(*a)
    if r < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return r
def attempt(line):
    try: exec(line)
    except BaseException as e: print('refused', type(e).__name__, str(e)[:80])
    else: print('ESCAPED', line)
{tried}
"""


LISTED = [
    Attack(
        "limits_of_the_supervisor",
        _tries(
            "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))",
            "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_AS, (1, 1))",
            "import resource; resource.prlimit(1, resource.RLIMIT_CPU, (1, 1))",
            "os.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0))",
            "os.sched_setscheduler(1, os.SCHED_BATCH, os.sched_param(0))",
            "os.sched_setaffinity(os.getppid(), {0})",
            "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
            "os.setpriority(os.PRIO_USER, 0, 19)",
            "call(29, 0, 1 << 20, 0o1666)",  # shmget: it would outlive a reset
        ),
        OK,
        forbidden="ESCAPED",
    ),
    Attack("fork_bomb", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", STOPPED | DIED | FLOOD),
    Attack("exponential_bomb", ":(){ :|:& };:", SAID | STOPPED | DIED | FLOOD, shell=True),
    Attack(
        "thread_bomb",
        "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "    except RuntimeError: pass",
        STOPPED | DIED,
    ),
    Attack(
        "zombies",
        "import os\nmade = 0\ntry:\n    while True:\n        if os.fork() == 0: os._exit(0)\n        made += 1\n"
        "except OSError as e: print('refused', made < 1000)",
        OK,
        expected="refused True",
    ),
    Attack(
        "memory_hog",
        "hoard = []\nwhile True:\n    try: hoard.append(bytearray(16 << 20))\n    except MemoryError: pass",
        DIED | STOPPED,
    ),
    Attack("infinite_output", "while True: print('x' * 1000)", FLOOD, hit=frozenset({"output"})),
    Attack(
        "output_without_ctrl_c",
        "while True:\n    try:\n        while True: print('x' * 10000)\n    except KeyboardInterrupt: pass",
        FLOOD,
    ),
    Attack("long_line", "print('x' * (200 << 20))", FLOOD | DIED | ERROR),
    Attack("binary_garbage", "import os\nos.write(1, bytes(range(256)) * 100)", OK),
    Attack("huge_repr", "class R:\n    def __repr__(self): return 'x' * (300 << 20)\nR()", ERROR | DIED),
    Attack(
        "disk_fill",
        "try:\n    with open('big', 'wb') as f:\n        for _ in range(1000): f.write(bytes(1 << 20))\n"
        "except OSError as e: print('refused', e.errno)",
        OK,
        expected="refused 28",
    ),
    Attack(
        "tmp_fill",
        "try:\n    with open('/tmp/big', 'wb') as f:\n        for _ in range(1000): f.write(bytes(1 << 20))\n"
        "except OSError as e: print('refused', e.errno)",
        OK,
        expected="refused 28",
    ),
    Attack(
        "inode_fill",
        "made = 0\ntry:\n    while made < 100000:\n        open(f'f{made}', 'w').close(); made += 1\n"
        "except OSError as e: print('refused', made <= 1000)",
        OK,
        expected="refused True",
    ),
    Attack(
        "host_files",
        "for f in ('/etc/shadow', '/root/.bashrc', '/proc/1/root/etc/shadow', '/var/run/docker.sock', '/run/docker.sock'):\n"
        "    try: print('ESCAPED', f, open(f, 'rb').read(20))\n    except OSError as e: print('refused', f, e.errno)",
        OK,
        forbidden="ESCAPED",
    ),
    Attack(
        "devices",
        "import os\nfor d in ('/dev/sda', '/dev/vda', '/dev/mem', '/dev/kmsg', '/dev/kvm', '/dev/fuse', '/dev/net/tun'):\n"
        "    try: os.open(d, os.O_RDWR); print('ESCAPED', d)\n    except OSError: pass",
        OK,
        forbidden="ESCAPED",
    ),
    Attack(
        "host_environment",
        "import os\nseen = str(dict(os.environ))\nfor p in os.listdir('/proc'):\n    if p.isdigit():\n"
        "        try: seen += open(f'/proc/{p}/environ').read()\n        except OSError: pass\nprint(seen)",
        OK,
        forbidden="AGENTRL_TEST_SECRET",
    ),
    Attack(
        "network",
        "import socket\nfor family, address in ((socket.AF_INET, ('1.1.1.1', 80)), (socket.AF_INET, ('10.0.0.1', 22)),\n"
        "    (socket.AF_INET6, ('2606:4700:4700::1111', 80)), (socket.AF_INET, ('172.17.0.1', 22))):\n"
        "    s = socket.socket(family); s.settimeout(1)\n"
        "    try: s.connect(address); print('ESCAPED', address)\n    except OSError as e: print('refused', e)",
        OK,
        forbidden="ESCAPED",
    ),
    Attack(
        "dns",
        "import socket\ntry: print('ESCAPED', socket.gethostbyname('deb.debian.org'))\nexcept OSError as e: print('refused', e)",
        OK,
        forbidden="ESCAPED",
    ),
    Attack(
        "odd_sockets",
        _tries("socket.socket(40, 1)", "socket.socket(16, 3, 0)", "socket.socket(17, 3)", "socket.socket(2, 3, 1)"),
        OK,
        forbidden="ESCAPED",
    ),
    Attack("io_uring", _tries("call(425, 8, ctypes.create_string_buffer(248))"), OK, forbidden="ESCAPED"),
    Attack(
        "read_the_supervisor",
        "import os\np = os.getppid()\nfor f in ('mem', 'environ', 'maps'):\n"
        "    try:\n        with open(f'/proc/{p}/{f}', 'rb') as x: print('ESCAPED', f, x.read(16))\n"
        "    except OSError as e: print('refused', f, e.errno)\n"
        "try: print('ESCAPED', os.listdir(f'/proc/{p}/fd'))\nexcept OSError as e: print('refused', e.errno)",
        OK,
        forbidden="ESCAPED",
    ),
    Attack(
        "ptrace",
        _tries("call(101, 16, os.getppid(), 0, 0)", "call(310, os.getppid(), 0, 0, 0, 0, 0)"),
        OK,
        forbidden="ESCAPED",
    ),
    Attack(
        "write_outside",
        "for f in ('/etc/x', '/usr/x', '/x', '/run/x', '/run/server.py', '/run/agentrl/server.py', '/dev/x', '/proc/sys/kernel/core_pattern',\n"
        "    '/sys/fs/cgroup/x', '/proc/sysrq-trigger'):\n    try: open(f, 'w').write('x'); print('ESCAPED', f)\n    except OSError: pass",
        OK,
        forbidden="ESCAPED",
    ),
    Attack(
        "rights",
        _tries(
            "os.mknod('disk', 0o60644, os.makedev(8, 0)) or open('disk', 'rb').read(1)",
            "call(272, 0x10000000)",  # unshare(CLONE_NEWUSER)
            "call(272, 0x00020000)",  # unshare(CLONE_NEWNS)
            "call(165, b'none', b'/tmp', b'tmpfs', 0, 0)",  # mount
            "call(155, b'/tmp', b'/tmp')",  # pivot_root
            "call(161, b'/tmp')",  # chroot
            "os.setuid(0)",
            "call(321, 0, 0, 0)",  # bpf
            "call(298, 0, 0, -1, -1, 0)",  # perf_event_open
            "call(250, 0, -3, 0)",  # keyctl
            "call(248, b'user', b'x', b'y', 1, -3)",  # add_key
            "call(323, 0)",  # userfaultfd
            "call(175, 0, 0, 0)",  # init_module
            "call(169, 0xfee1dead, 672274793, 0x1234567, 0)",  # reboot
            "call(304, -100, 0, 0)",  # open_by_handle_at
            "call(56, 0x10000000 | 17, 0, 0, 0, 0)",  # clone(CLONE_NEWUSER)
            "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))",
        ),
        OK,
        forbidden="ESCAPED",
    ),
    Attack("su", "su -c id root < /dev/null; sudo id; newgrp root", SAID, shell=True, forbidden="uid=0(root)"),
    Attack(
        "links_out",
        "import os\nos.symlink('/etc/passwd', 'link'); os.symlink('/', 'top')\n"
        "try: os.link('/etc/passwd', 'hard'); print('linked')\nexcept OSError as e: print('refused', e.errno)",
        OK,
        forbidden="linked",
    ),
    Attack(
        "deaf",
        "import signal, time\nfor s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(s, signal.SIG_IGN)\n"
        "while True: time.sleep(1)",
        frozenset({"timeout_killed"}),
        hit=frozenset({"time"}),
    ),
    Attack("arithmetic", "9 ** 9 ** 9", STOPPED | DIED | ERROR),
    Attack("sleep", "import time; time.sleep(3600)", frozenset({"timeout_interrupted"})),
    Attack("regex_bomb", "import re; re.match(r'(a+)+$', 'a' * 40 + 'b')", STOPPED),
    Attack(
        "repr_bomb",
        "class R:\n    def __repr__(self):\n        while True:\n            try:\n                while True: pass\n"
        "            except BaseException: pass\nR()",
        STOPPED,
    ),
    Attack(
        "background_daemon",
        "import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\n"
        "    time.sleep(.3); os.write(1, b'LATE'); time.sleep(3600)\nprint('started')",
        OK,
        expected="started",
        forbidden="LATE",
    ),
    Attack("exit", "import os; os._exit(0)", DIED),
    Attack("segfault", "import ctypes; ctypes.string_at(0)", DIED),
    Attack("abort", "import os; os.abort()", DIED),
    Attack("recursion", "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()", DIED | ERROR | STOPPED),
    Attack("close_all_fds", "import os\nos.closerange(0, 65536)", DIED | SAID),
    Attack(
        "forged_frames",
        "import os, struct\nfor fd in range(64):\n    try: os.write(fd, struct.pack('!I', 9) + b'{\"id\":\"x\"}')\n    except OSError: pass",
        ANY,
    ),
    Attack(
        "giant_header",
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'\\xff' * 4)\n    except OSError: pass",
        ANY,
    ),
    Attack(
        "forged_result",
        "import gc, json, struct, socket, sys\nframe = sys._getframe()\nwhile frame.f_back: frame = frame.f_back\n"
        "for f in range(3, 64):\n    try:\n        s = socket.socket(fileno=f)\n        body = json.dumps({'id': 'x', 'status': 'ok', 'value': 'FORGED'}).encode()\n"
        "        s.sendall(struct.pack('!I', len(body)) + body); s.detach()\n    except OSError: pass",
        ANY,
    ),
    Attack(
        "monkeypatch",
        "import builtins, json, os\ndef bad(*a, **k): raise RuntimeError('patched')\nbuiltins.len = bad; builtins.isinstance = bad\n"
        "json.dumps = bad; json.loads = bad; os.write = bad; os.dup2 = bad; os.close = bad; os._exit = bad",
        ANY,
    ),
    Attack("read_stdin", "input()", ERROR),
    Attack(
        "kill_the_parent",
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL); import time; time.sleep(5)",
        STOPPED | DIED,
    ),
    Attack(
        "kill_everybody",
        "import os, signal\nos.kill(-1, signal.SIGKILL)\nimport time; time.sleep(5)",
        ERROR | DIED | STOPPED,
    ),
    Attack("kill_process_1", "kill -9 1; echo still here", SAID | DIED, shell=True),
    Attack(
        "many_fds",
        "import os\nfds = []\ntry:\n    while True: fds.append(os.dup(0))\nexcept OSError as e: print('refused', len(fds) < 2000)",
        OK,
        expected="refused True",
    ),
    Attack("surrogates_and_nul", "print('a\\0b\\ud800c')\n'\\udfff\\0'", OK, expected="a\0b"),
    Attack("parser_bomb", "exec('(' * 100000 + ')' * 100000)", ERROR | DIED),
    Attack("parser_bomb_of_the_cell", "-" * 200_000 + "1", ERROR | DIED | STOPPED),
    Attack(
        "cpu_burn",
        "import os\nfor _ in range(8):\n    if os.fork() == 0:\n        while True: pass\nwhile True: pass",
        STOPPED | DIED,
    ),
]

OWN = [
    Attack(
        "stop_the_supervisor",
        "import os, signal, time\nos.kill(os.getppid(), signal.SIGSTOP); time.sleep(60)",
        STOPPED | DIED,
    ),
    Attack(
        "starve_the_supervisor",
        "import os, resource, time\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))\n"
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1)); time.sleep(1)",
        ANY,
    ),
    Attack(
        "setsid_swarm",
        "import os, time\nfor _ in range(20):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork(): os._exit(0)\n"
        "        time.sleep(3600)\nprint('started')",
        OK,
        expected="started",
    ),
    Attack("sparse_file", "f = open('sparse', 'wb'); f.truncate(1 << 40); f.close(); print('made')", SAID),
    Attack(
        "shared_memory_fill",
        "try:\n    with open('/dev/shm/x', 'wb') as f:\n        for _ in range(4000): f.write(bytes(1 << 20))\n"
        "    print('ESCAPED')\nexcept OSError as e: print('refused', e.errno)",
        SAID | DIED,
        forbidden="ESCAPED",
    ),
    Attack(
        "memfd_fill",
        "import os\nfd = os.memfd_create('x')\nwhile True: os.write(fd, bytes(1 << 20))",
        DIED | ERROR | STOPPED,
    ),
    Attack(
        "pipe_fill",
        "import os\nkept = []\nwhile True:\n    r, w = os.pipe(); os.set_blocking(w, False); kept += [r, w]\n"
        "    os.write(w, bytes(65536))",
        ERROR | DIED,
    ),
    Attack(
        "deep_folders",
        "import os\ntry:\n    for _ in range(5000): os.mkdir('d'); os.chdir('d')\nexcept OSError: print('refused')",
        OK,
        expected="refused",
    ),
    Attack("unreadable_folders", "mkdir -p a/b && touch a/b/c && chmod 000 a/b a", OK, shell=True),
    Attack(
        "interrupt_storm",
        "import os, signal, threading\ndef storm():\n    while True: os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=storm, daemon=True).start()\nwhile True:\n    try:\n        while True: pass\n"
        "    except KeyboardInterrupt: pass",
        STOPPED | DIED | ERROR,
    ),
    Attack("fifo_in_the_workspace", "import os\nos.mkfifo('pipe'); os.mkfifo('in.txt')", OK),
    Attack(
        "newline_file_names",
        "open('a\\nb', 'w').close(); open('\\udcff', 'w').close(); open('x' * 255, 'w').close()",
        SAID,
    ),
    Attack("terminal_codes", "print('\\x1b]0;title\\x07\\x1b[2J\\x9b31m')", OK),
    Attack("error_bomb", "class E(Exception):\n    def __str__(self): return 'x' * (100 << 20)\nraise E", ERROR | DIED),
]

ALL = [*LISTED, *OWN]
