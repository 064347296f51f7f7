"""SIGTERM where nothing has to be saved first: the process says so and ends with status 0, whatever it is doing.

Stages keep what is finished as they go, and the next launch clears away the rest. Training alone has more to lose: it
takes the signal itself (students/train.py) and writes a checkpoint. Python runs a handler between two steps of the main
thread, which may wait for other ranks inside a library for an hour; a thread of its own is told at once.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock, Thread

MESSAGE = "\nstopped by SIGTERM; what is finished is kept, run again to go on\n"
_ending = Lock()


@contextmanager
def sigterm_ends() -> Iterator[None]:
    """Within it SIGTERM ends the process with status 0 and a message from rank 0, unless somebody takes the signal."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    handler = signal.signal(signal.SIGTERM, _end)
    told = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    Thread(target=_watch, args=(read,), name="sigterm", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(told)
        signal.signal(signal.SIGTERM, handler)
        os.close(write)


def _watch(read: int) -> None:
    with open(read, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is _end:
                _end()


def _end(*_: object) -> None:
    if not _ending.acquire(blocking=False):
        return  # the other of handler and thread is at it
    with suppress(Exception):
        sys.stdout.flush()
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(1, MESSAGE.encode())
    os._exit(0)


def _forget_in_a_fork() -> None:
    # A forked worker shares the pipe: told to end, it would end its parent.
    if signal.getsignal(signal.SIGTERM) is _end:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_a_fork)
