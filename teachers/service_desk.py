"""Between requests and engines: who waits for what, how much may wait, and what everybody is told when an engine dies.

All of it runs in the event loop. A request gets a Ticket with one job a row; leaving the ticket's block cancels what is
unfinished, so a client that goes away frees its rows whatever the reason.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence

from distill.generate import Row
from distill.records import CaptureSpec
from teachers.service_loop import SCORE_TOKENS, Cancel, Draw, News, Score, ShareEngine
from teachers.service_refusals import Refused, busy, no_room, stopping

RATE_WINDOW_S = 30.0
LONGEST_RETRY_S = 60


class Ticket:
    """The jobs of one request, numbered from 0 in the order given. Use as a context manager."""

    def __init__(self, desk: "Desk", jobs: range):
        self._desk, self.jobs = desk, jobs
        self.news: asyncio.Queue[News | Refused] = asyncio.Queue()
        self.open_jobs = set(jobs)

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, *_: object) -> None:
        self._desk.leave(self)

    async def __aiter__(self) -> AsyncIterator[tuple[int, News]]:
        """(number, news) until every job has ended; raises what ended the service, or why a row cannot be drawn."""
        while self.open_jobs or not self.news.empty():
            news = await self.news.get()
            if isinstance(news, Refused):
                raise news
            if news.refused is not None:
                raise no_room(news.refused)
            yield news.job - self.jobs.start, news


class Desk:
    """Deals rows out to engines, the least busy first, and their news to tickets."""

    def __init__(self, engines: Sequence[ShareEngine], max_waiting: int):
        self.engines, self.max_waiting = engines, max_waiting
        self.slots = sum(engine.slots for engine in engines)
        self.load = [0] * len(engines)
        self.failure: Refused | None = None
        self.is_stopping = False
        self.cancelled = 0
        self._tickets: dict[int, tuple[Ticket, int]] = {}  # job -> its ticket and engine
        self._next_job = 0
        self._ended_at_s: deque[float] = deque(maxlen=1024)

    @property
    def outstanding(self) -> int:
        """Jobs that wait or run."""
        return len(self._tickets)

    @property
    def waiting(self) -> int:
        return max(0, self.outstanding - self.slots)

    def draw(self, rows: Sequence[Row]) -> Ticket:
        """A ticket for these rows. Raises Refused when too many wait, or when the service stops or has failed."""
        ticket = self._ticket(len(rows))
        for job, row in zip(ticket.jobs, rows):
            self._send(ticket, Draw(job, row))
        return ticket

    def score(self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], capture: CaptureSpec) -> Ticket:
        """A ticket whose jobs are stretches of the pairs, in order; refused as `draw` is."""
        stretches = _stretches(pairs)
        ticket = self._ticket(len(stretches))
        for job, stretch in zip(ticket.jobs, stretches):
            self._send(ticket, Score(job, stretch, capture))
        return ticket

    def deliver(self, news: Sequence[News]) -> None:
        """Hands news of an engine to those who wait; news of jobs that were cancelled meanwhile are dropped."""
        for each in news:
            if each.job not in self._tickets:
                continue
            ticket, engine = self._tickets[each.job]
            if each.is_last:
                self._end(each.job, ticket, engine)
                self._ended_at_s.append(time.monotonic())
            ticket.news.put_nowait(each)

    def fail(self, error: Refused) -> None:
        """Tells everybody who waits, and refuses all who come."""
        self.failure = self.failure or error
        for ticket in {id(ticket): ticket for ticket, _ in self._tickets.values()}.values():
            ticket.news.put_nowait(error)

    def leave(self, ticket: Ticket) -> None:
        """Cancels what is left of a ticket."""
        by_engine: dict[int, list[int]] = {}
        for job in list(ticket.open_jobs):
            engine = self._tickets[job][1]
            by_engine.setdefault(engine, []).append(job)
            self._end(job, ticket, engine)
        for engine, jobs in by_engine.items():
            self.cancelled += len(jobs)
            self.engines[engine].send(Cancel(tuple(jobs)))

    def retry_after_s(self) -> int:
        """When to come back: the time the waiting jobs need at the rate of the last half minute."""
        now_s = time.monotonic()
        recent = sum(1 for at_s in self._ended_at_s if now_s - at_s < RATE_WINDOW_S)
        if not recent:
            return 1
        return min(LONGEST_RETRY_S, max(1, math.ceil(self.waiting * RATE_WINDOW_S / recent / 2)))

    def _ticket(self, jobs: int) -> Ticket:
        if self.failure is not None:
            raise self.failure
        if self.is_stopping:
            raise stopping()
        if self.outstanding and self.outstanding + jobs > self.slots + self.max_waiting:
            raise busy(self.waiting, self.max_waiting, self.retry_after_s())
        first, self._next_job = self._next_job, self._next_job + jobs
        return Ticket(self, range(first, self._next_job))

    def _send(self, ticket: Ticket, command: Draw | Score) -> None:
        engine = min(range(len(self.engines)), key=lambda i: self.load[i] / self.engines[i].slots)
        self.load[engine] += 1
        self._tickets[command.job] = (ticket, engine)
        self.engines[engine].send(command)

    def _end(self, job: int, ticket: Ticket, engine: int) -> None:
        del self._tickets[job]
        ticket.open_jobs.discard(job)
        self.load[engine] -= 1


def _stretches(pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[tuple]:
    """The pairs in runs that are scored in one go."""
    found: list[list] = []
    longest = 0
    for pair in pairs:
        tokens = len(pair[0]) + len(pair[1])
        longest = max(longest, tokens) if found else tokens
        if not found or longest * (len(found[-1]) + 1) > SCORE_TOKENS:
            found.append([])
            longest = tokens
        found[-1].append(pair)
    return [tuple(each) for each in found]
