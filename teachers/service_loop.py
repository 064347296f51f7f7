"""The thread that draws: it alone touches the model, and between two steps takes what the service asks and tells.

Commands come in through a queue, news go out through a callable, both of any thread. Rows that join while others run
are prefilled a bounded number of tokens at a time, and sequences to score take turns with steps, so that neither stalls
the rows that are being drawn.
"""

import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from distill.errors import CapacityError
from distill.generate import Row, RowLoop
from distill.records import CaptureSpec, TokenDists
from distill.step_log import Drawn
from teachers.engine import TeacherEngine
from teachers.service_memory import Trimmer

ADMIT_TOKENS = 8192  # distinct prompt tokens prefilled between two steps; one prompt may be longer
SCORE_TOKENS = 4096  # tokens scored between two steps; one sequence may be longer
IDLE_S = 1.0  # an idle loop shows this often that it is alive


@dataclass(frozen=True)
class Draw:
    job: int
    row: Row


@dataclass(frozen=True)
class Cancel:
    jobs: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """pairs: (prompt_ids, completion_ids) of sequences that are scored in one go."""

    job: int
    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    capture: CaptureSpec


@dataclass(frozen=True)
class Stop:
    """Ends the loop; whatever runs is dropped."""


Command = Draw | Cancel | Score | Stop


@dataclass
class News:
    """What became of one job: tokens of a row, perhaps its end, the distributions that were asked for, or why the row
    cannot be drawn."""

    job: int
    drawn: Drawn | None = None
    scored: list[TokenDists] | None = None
    refused: str | None = None

    @property
    def is_last(self) -> bool:
        return self.drawn is None or self.drawn.finish_reason is not None


class Pace(Protocol):
    """What makes the loops of ranks that hold one copy of a model take the same commands at the same turn."""

    leads: bool

    def agree(self, has_work: bool, received: int) -> tuple[bool, int]:
        """(whether any rank has work, how many commands the leader has received); called by all ranks, each turn."""

    def finish_turn(self) -> None:
        """Returns when all these ranks have made their forward passes of this turn."""


class EngineLoop:
    """Draws and scores for a service until told to stop; see `run`.

    share: which rows are this loop's, of those of a copy that several ranks hold; emit: gets the news.
    """

    def __init__(
        self, engine: TeacherEngine, emit: Callable[[list[News]], None], pace: Pace | None = None, share: int = 0
    ):
        self.engine, self._emit, self._pace, self.share = engine, emit, pace, share
        self.inbox: queue.SimpleQueue[tuple[int, Command]] = queue.SimpleQueue()
        self._arrived: deque[tuple[int, Command]] = deque()
        self._received = self._applied = 0
        self._idle = True
        self._waiting: deque[Draw] = deque()
        self._scores: deque[Score] = deque()
        self._owner_of: dict[int, int] = {}
        self._job_of: dict[int, int] = {}
        self._trimmer = Trimmer()

    def run(self) -> None:
        """Takes commands and steps until Stop, in the thread of the caller. What it raises ends the service."""
        with self.engine.rows() as rows:
            while self._turn(rows):
                pass

    def _turn(self, rows: RowLoop) -> bool:
        commands = self._commands(bool(rows.active or self._waiting or self._scores))
        if any(isinstance(command, Stop) for command in commands):
            return False
        self._take(commands, rows)
        self._trimmer.turn(has_worked=not self._idle)
        if self._idle:
            return True
        news = self._admit(rows) if self._waiting and rows.wants_rows else []
        if rows.active:
            rows.step()
        news += [self._news(drawn) for drawn in rows.news()]
        if self._scores:
            score = self._scores.popleft()
            news.append(News(score.job, scored=self.engine.score(score.pairs, score.capture)))
        if self._pace:
            self._pace.finish_turn()
        if news:
            self._emit(news)
        return True

    def _commands(self, has_work: bool) -> list[Command]:
        """What has come for this loop; waits for something while nobody has work."""
        leads = self._pace is None or self._pace.leads
        self._receive(wait=leads and self._idle and not has_work)
        upto = self._received
        if self._pace:
            has_work, upto = self._pace.agree(has_work, self._received)
            while self._received < upto:
                self._receive(wait=True)
        fresh = [self._arrived.popleft() for _ in range(upto - self._applied)]
        self._applied = upto
        self._idle = not (has_work or fresh)
        return [command for share, command in fresh if share == self.share or isinstance(command, Stop)]

    def _receive(self, wait: bool) -> None:
        try:
            found = self.inbox.get(timeout=IDLE_S) if wait else self.inbox.get_nowait()
            while True:
                self._arrived.append(found)
                self._received += 1
                found = self.inbox.get_nowait()
        except queue.Empty:
            pass

    def _take(self, commands: list[Command], rows: RowLoop) -> None:
        cancelled = {job for command in commands if isinstance(command, Cancel) for job in command.jobs}
        self._waiting.extend(command for command in commands if isinstance(command, Draw))
        self._scores.extend(command for command in commands if isinstance(command, Score))
        if not cancelled:
            return
        self._waiting = deque(draw for draw in self._waiting if draw.job not in cancelled)
        self._scores = deque(score for score in self._scores if score.job not in cancelled)
        owners = [self._owner_of.pop(job) for job in cancelled if job in self._owner_of]
        for owner in owners:
            del self._job_of[owner]
        if owners:
            rows.cancel(owners)

    def _admit(self, rows: RowLoop) -> list[News]:
        """Lets waiting rows join; news of those that the engine has no room for even when it is empty."""
        batch: list[Draw] = []
        prompts: set[tuple[int, ...]] = set()
        tokens = 0
        while self._waiting and len(batch) < rows.free:
            prompt = self._waiting[0].row.request.prompt_ids
            tokens += 0 if prompt in prompts else len(prompt)
            if batch and tokens > ADMIT_TOKENS:
                break
            prompts.add(prompt)
            batch.append(self._waiting.popleft())
        refused = []
        for part in self._joined(rows, batch):
            if isinstance(part, News):
                refused.append(part)
            else:
                draw, owner = part
                self._owner_of[draw.job], self._job_of[owner] = owner, draw.job
        return refused

    def _joined(self, rows: RowLoop, batch: list[Draw]) -> list[tuple[Draw, int] | News]:
        try:
            return list(zip(batch, rows.admit([draw.row for draw in batch])))
        except CapacityError as error:  # raised before any of them has joined
            if len(batch) == 1:
                return [News(batch[0].job, refused=str(error))]
            return [each for draw in batch for each in self._joined(rows, [draw])]

    def _news(self, drawn: Drawn) -> News:
        job = self._job_of[drawn.owner]
        if drawn.finish_reason is not None:
            del self._job_of[drawn.owner], self._owner_of[job]
        return News(job, drawn)


class ShareEngine:
    """A share of the rows, as the desk sees it: `slots` run at once; commands go to every rank that must know them."""

    def __init__(self, name: str, share: int, slots: int, outlets: Sequence[Callable[[tuple[int, Command]], None]]):
        self.name, self.share, self.slots, self._outlets = name, share, slots, outlets

    def send(self, command: Command) -> None:
        for outlet in self._outlets:
            outlet((self.share, command))


class EngineThread(threading.Thread):
    """Runs a loop; when it raises, `died` gets the traceback, in this thread."""

    def __init__(self, loop: EngineLoop, died: Callable[[str], None]):
        super().__init__(name="engine", daemon=True)
        self.loop, self._died = loop, died

    def run(self) -> None:
        try:
            self.loop.run()
        except BaseException:
            self._died(traceback.format_exc())
