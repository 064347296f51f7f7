"""Micro-batches made ahead of the device, in threads, in the order of the plan.

Making one is numpy and torch on memory-mapped files, which lets go of the interpreter for most of its time; a thread
needs no copy of the data and no way back for the tensors, as a process would. What a micro-batch holds does not depend
on who made it or when.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from students.data import Batch
from students.packing import StepPlan, TrainPlan

AHEAD = 2  # micro-batches a thread may be ahead, beside the one it makes


class Loader:
    """The steps of a plan from `first` on, each with this rank's micro-batches. Use as a context manager.

    collate: makes the micro-batch of some rows.
    """

    def __init__(
        self,
        plan: TrainPlan,
        collate: Callable[[list[list[int]]], Batch],
        share: Callable[[StepPlan], list[list[list[int]]]],
        *,
        first: int,
        workers: int,
    ):
        """share: the rows of this rank's micro-batches of a step. workers: 0 makes each when it is asked for."""
        self.plan, self.collate, self.share, self.first = plan, collate, share, first
        self.waited_s = 0.0
        self._ahead = workers * (1 + AHEAD)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader") if workers else None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[int, StepPlan, int, Iterator[Batch]]]:
        """(number of the step, the step, how many micro-batches, the micro-batches). Those of a step are to be taken
        before the next step is asked for. What making one raises is raised where it is taken."""
        steps = ((number, self.plan[number]) for number in range(self.first, len(self.plan)))
        shares = ((number, step, self.share(step)) for number, step in steps)
        waiting: deque[tuple[int, StepPlan, list]] = deque()
        started: deque[Future] = deque()
        while True:
            while len(started) <= self._ahead and (more := next(shares, None)):
                number, step, batches = more
                waiting.append((number, step, len(batches)))
                started.extend(map(self._start, batches))
            if not waiting:
                return
            number, step, count = waiting.popleft()
            yield number, step, count, (self._take(started.popleft()) for _ in range(count))

    def take_wait_s(self) -> float:
        """How long the loop has waited for micro-batches since this was last asked."""
        waited_s, self.waited_s = self.waited_s, 0.0
        return waited_s

    def _start(self, rows: list[list[int]]):
        return self._pool.submit(self.collate, rows) if self._pool else lambda: self.collate(rows)

    def _take(self, started) -> Batch:
        began_s = time.monotonic()
        batch = started.result() if self._pool else started()
        self.waited_s += time.monotonic() - began_s
        return batch
