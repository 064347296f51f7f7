"""Symbolic comparison of answers in worker processes that can be killed.

math-verify uses SIGALRM (it raises in threads), can hang in C code where no signal is seen, and takes seconds for a
tower of powers. So it runs in a child process with its own timeouts off; the parent waits with a deadline, kills, and
tries once more. The child is a plain `python -m distill.grade_pool`: it inherits nothing of the parent (torch, CUDA,
the launcher's main module).
"""

import contextlib
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from distill.errors import GradeError

START_TIMEOUT_S = 120.0
MEMORY_BYTES = 4 << 30


class _Lost(Exception):
    """The worker died or did not answer in time."""


class _Worker:
    """One child process. Not for two threads at once."""

    def __init__(self, timeout_s: float):
        path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.timeout_s, self._pending = timeout_s, b""
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "distill.grade_pool", str(int(timeout_s) + 30)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the parent to handle
        )
        try:
            self._read(START_TIMEOUT_S)  # the line that says it is ready
        except BaseException:
            self.kill()
            raise

    def ask(self, gold: str, pred: str) -> dict:
        try:
            self.process.stdin.write(json.dumps([gold, pred]).encode() + b"\n")
        except OSError as error:
            raise _Lost("it died") from error
        return self._read(self.timeout_s)

    def _read(self, timeout_s: float) -> dict:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise _Lost(f"no answer within {timeout_s:g} s")
            chunk = os.read(self.process.stdout.fileno(), 65536)
            if not chunk:
                raise _Lost("it died")
            self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        return json.loads(line)

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class MathPool:
    """Compares (gold, pred) pairs in `workers` processes, each within `timeout_s` seconds, killed and tried once more.

    Workers start at the first use and are killed by close(). GradeError when not even one can be started.
    """

    def __init__(self, workers: int, timeout_s: float):
        if workers < 1 or timeout_s <= 0:
            raise GradeError("a pool needs at least one worker and a positive timeout", value=(workers, timeout_s))
        self.workers, self.timeout_s = workers, timeout_s
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()

    def compare(self, pairs: list[tuple[str, str]]) -> list[dict]:
        """For each pair, in order: {"equal": bool}, {"unreadable": "gold" | "answer"} or {"error": why}."""
        self._start_one()
        results: list[dict | None] = [None] * len(pairs)
        todo: queue.SimpleQueue = queue.SimpleQueue()
        for i in range(len(pairs)):
            todo.put(i)

        def serve() -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    i = todo.get_nowait()
                    results[i] = self._compare_one(*pairs[i])

        threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(self.workers, len(pairs)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [result or {"error": "the grading thread died"} for result in results]

    def _compare_one(self, gold: str, pred: str) -> dict:
        why = ""
        for _ in range(2):
            worker = None
            try:
                worker = self._take()
                result = worker.ask(gold, pred)
            except (_Lost, OSError, ValueError) as error:
                why = str(error)
                if worker:
                    worker.kill()
                continue
            with self._lock:
                self._idle.append(worker)
            return result
        return {"error": f"the grading worker was lost twice: {why}"}

    def _start_one(self) -> None:
        """Fails here, once and aloud, rather than once a pair when workers cannot run at all."""
        try:
            worker = self._take()
        except (_Lost, OSError) as error:
            remedy = "Run `python -c 'import math_verify'` with this interpreter."
            raise GradeError(f"no grading worker starts: {error}", where=sys.executable, remedy=remedy) from error
        with self._lock:
            self._idle.append(worker)

    def _take(self) -> _Worker:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return _Worker(self.timeout_s)

    def close(self) -> None:
        """Kills the workers."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.kill()


def _compare(gold: str, pred: str) -> dict:
    """math-verify on two LaTeX answers. Only its LaTeX parser is used: its plain-text one evaluates Python syntax."""
    from math_verify import LatexExtractionConfig, parse, verify

    parsed = {}
    for name, text in (("gold", gold), ("answer", pred)):
        config = [LatexExtractionConfig(boxed_match_priority=0)]
        parsed[name] = parse(f"\\boxed{{{text}}}", config, parsing_timeout=None, raise_on_error=True)
        if not parsed[name]:
            return {"unreadable": name}
    equal = verify(parsed["gold"], parsed["answer"], timeout_seconds=None, raise_on_error=True)
    return {"equal": bool(equal)}


def _serve(limit_s: int) -> None:
    """The worker: one JSON line in, one out, until the parent closes the pipe."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print must not mix with the replies
    logging.disable(logging.CRITICAL)
    _compare("1", "1")  # imports and caches before the first deadline runs
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a worker whose parent was killed ends itself
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        signal.alarm(limit_s)
        try:
            reply = _compare(*json.loads(line))
        except MemoryError:
            reply = {"error": "out of memory"}
        except Exception as error:  # the library's own failure is an answer too: it is counted as a grader error
            reply = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        signal.alarm(0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
