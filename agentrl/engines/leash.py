"""Runs a program for as long as whoever started this lives: `python leash.py WORDS…`, with a pipe as its input.

A server is several processes that would go on, with their memory, where the run that started them is killed. This one
leads their process group and ends it as soon as the pipe breaks. It imports nothing of the project: it starts in
milliseconds, in whatever environment.
"""

import os
import signal
import subprocess
import sys
import threading
import time

PATIENCE_SECONDS = 5.0


def main() -> int:
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    broken = threading.Event()
    ending = threading.Thread(target=end_with_the_pipe, args=[broken], daemon=True)
    ending.start()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is meant for the child, which gets it too
    code = child.wait()
    if broken.is_set():
        ending.join()  # the child's own children may take no notice of a SIGTERM
    return code if code >= 0 else 128 - code


def end_with_the_pipe(broken: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    broken.set()
    os.killpg(0, signal.SIGTERM)
    time.sleep(PATIENCE_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
