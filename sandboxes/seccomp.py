"""Which system calls a sandbox's programs may make: one list, for Docker as JSON and for bubblewrap as a BPF program.

An allow-list: what is not named fails with EPERM, as if the right were missing, and new calls of future kernels are
shut until somebody adds them. Stricter than Docker's default: no io_uring, no user or other namespaces, no ptrace and
no reading of other processes, no bpf, perf, keyrings, userfaultfd or modules, no System V memory (it would outlive a
reset), limits and priorities of the caller alone (the supervisor has the same uid), and sockets of three families only.
`clone3` fails with ENOSYS, for its flags cannot be looked at: libc then uses `clone`, whose flags can.
"""

from __future__ import annotations

import errno
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from agentrl.errors import UsageError

ALLOWED = """
accept accept4 access alarm arch_prctl bind brk cachestat capget capset chdir chmod chown clock_getres clock_gettime
clock_nanosleep close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl
epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64
fallocate fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fork
fremovexattr fsetxattr fstat fstatfs fsync ftruncate futex futex_requeue futex_wait futex_waitv futex_wake futimesat
get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer
getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid
getsockname getsockopt gettid gettimeofday getuid getxattr inotify_add_watch inotify_init inotify_init1
inotify_rm_watch ioctl ioprio_get kill lchown lgetxattr link linkat listen listxattr llistxattr lremovexattr lseek
lsetxattr lstat madvise membarrier memfd_create mincore mkdir mkdirat mlock mlock2 mlockall mmap mprotect mremap msync
munlock munlockall munmap nanosleep newfstatat open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2
pkey_alloc pkey_free pkey_mprotect poll ppoll prctl pread64 preadv preadv2 pselect6 pwrite64 pwritev pwritev2 read
readahead readlink readlinkat readv recvfrom recvmmsg recvmsg removexattr rename renameat renameat2 restart_syscall
rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam
sched_getscheduler sched_rr_get_interval sched_yield select sendfile sendmmsg sendmsg sendto set_robust_list
set_thread_area set_tid_address setfsgid setfsuid setgid setgroups setitimer setpgid setregid setresgid setresuid
setreuid setrlimit setsid setsockopt setuid setxattr shutdown sigaltstack signalfd signalfd4 splice stat statfs statx
symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun
timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill truncate umask uname unlink
unlinkat utime utimensat utimes vfork vmsplice wait4 waitid waitpid write writev
""".split()  # noqa: SIM905

OWN = ("prlimit64", "sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler")  # of oneself: 0
FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
NETLINK = 16  # "not supported" instead of "not permitted": zmq then does without a list of interfaces
NAMESPACES = 0x7E020000  # every CLONE_NEW* flag
PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
FILES = (0o010000, 0o100000, 0o140000)  # mknod makes pipes, files and sockets, never devices
FILE_TYPE = 0o170000
_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}


def docker_profile() -> str:
    """The list as Docker's `security_opt: seccomp=` takes it."""

    def rule(names: list[str], action: str = "SCMP_ACT_ALLOW", **more: Any) -> dict[str, Any]:
        return {"names": names, "action": action, **more}

    def first(value: int, op: str = "SCMP_CMP_EQ", two: int = 0, index: int = 0) -> list[dict[str, Any]]:
        return [{"index": index, "value": value, "valueTwo": two, "op": op}]

    rules = [rule(ALLOWED), rule(["clone3"], "SCMP_ACT_ERRNO", errnoRet=errno.ENOSYS)]
    rules += [rule(["socket", "socketpair"], args=first(family)) for family in FAMILIES]
    rules.append(rule(["socket"], "SCMP_ACT_ERRNO", args=first(NETLINK), errnoRet=errno.EOPNOTSUPP))
    rules += [rule(["personality"], args=first(value)) for value in PERSONALITIES]
    rules.append(rule(list(OWN), args=first(0)))
    rules.append(rule(["sched_setscheduler"], args=first(0, index=1)))  # of any thread, back to the ordinary one
    rules.append(rule(["setpriority"], args=[*first(0), *first(0, index=1)]))
    rules.append(rule(["clone"], args=first(NAMESPACES, "SCMP_CMP_MASKED_EQ")))
    for name, index in (("mknod", 1), ("mknodat", 2)):
        rules += [rule([name], args=first(FILE_TYPE, "SCMP_CMP_MASKED_EQ", kind, index)) for kind in FILES]
    machine = _ARCHITECTURES.get(os.uname().machine)
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": errno.EPERM, "syscalls": rules}
    return json.dumps(profile | ({"architectures": [machine]} if machine else {}))


@cache
def bpf() -> bytes:
    """The list as a BPF program for this machine. Raises `UsageError` where libseccomp is missing."""
    try:
        import pyseccomp as seccomp
    except ImportError as error:
        raise UsageError('the system-call filter needs: pip install "agentrl-framework[sandbox]"') from error
    except (RuntimeError, OSError) as error:
        raise UsageError("the system-call filter needs libseccomp; on Debian: apt-get install libseccomp2") from error
    made = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    for name in ALLOWED:
        if _known(seccomp, name):
            made.add_rule(seccomp.ALLOW, name)
    for name in ("socket", "socketpair"):
        for family in FAMILIES:
            made.add_rule(seccomp.ALLOW, name, seccomp.Arg(0, seccomp.EQ, family))
    made.add_rule(seccomp.ERRNO(errno.EOPNOTSUPP), "socket", seccomp.Arg(0, seccomp.EQ, NETLINK))
    for value in PERSONALITIES:
        made.add_rule(seccomp.ALLOW, "personality", seccomp.Arg(0, seccomp.EQ, value))
    for name, index in (("mknod", 1), ("mknodat", 2)):
        for kind in FILES:
            made.add_rule(seccomp.ALLOW, name, seccomp.Arg(index, seccomp.MASKED_EQ, FILE_TYPE, kind))
    for name in OWN:
        made.add_rule(seccomp.ALLOW, name, seccomp.Arg(0, seccomp.EQ, 0))
    made.add_rule(seccomp.ALLOW, "sched_setscheduler", seccomp.Arg(1, seccomp.EQ, 0))
    made.add_rule(seccomp.ALLOW, "setpriority", seccomp.Arg(0, seccomp.EQ, 0), seccomp.Arg(1, seccomp.EQ, 0))
    made.add_rule(seccomp.ALLOW, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, NAMESPACES, 0))
    made.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    with open(os.memfd_create("seccomp"), "r+b") as file:  # noqa: PTH123
        made.export_bpf(file)
        return Path(f"/proc/self/fd/{file.fileno()}").read_bytes()


def _known(seccomp: Any, name: str) -> bool:
    """Whether this machine and libseccomp have the call (waitpid and many others exist on some machines only)."""
    try:
        return int(seccomp.resolve_syscall(seccomp.Arch.NATIVE, name)) >= 0
    except (OSError, ValueError, RuntimeError):
        return False
