"""Continuous batching over pages: which rows run, which prompts wait, who gets a page, who gives way.

Requests join whenever a row and enough pages are free, and leave with their last token. Samples of one prompt share its
computation and its full pages. Prompts are prefilled in chunks of a ragged token list, between decode steps. When the
pool runs out, the row that came last gives its pages back and waits: its drawn tokens and their distributions stay, and
prompt and tokens are prefilled again when there is room. The result is the same Sample either way.

Bookkeeping is a step behind the device: while step t + 1 runs, the host reads step t. A row whose stop token is read
late has drawn one token too many, which is dropped.

Shape legend: A active rows, N new rows, B prompts of a prefill, T tokens, V vocabulary.
"""

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from distill.errors import CapacityError
from distill.generate import FLUSH_STEPS, REFILL_SHARE, Generator, Row
from distill.row_settings import StopTexts
from distill.sampling import Support
from distill.step_log import Drawn as Told
from distill.step_log import StepLog
from teachers.paged import PagePool
from teachers.runner import Segment
from teachers.running import Prompt, Running, keep
from teachers.steps import Drawn, Steps, rows_of
from teachers.transfer import to_device

PREFILL_TOKENS = 8192  # of one forward pass
TOKENS_BETWEEN_STEPS = 32768  # prefilled at most while rows wait for their next step


class PagedRows:
    """The rows of a generate loop, with the interface of distill.generate.RowLoop.

    `steps` holds their state on the device, which is `lag` steps ahead of what the host has read.
    """

    def __init__(self, generator: Generator, pool: PagePool, steps: Steps, lag: int):
        self.generator, self.runner, self.slots = generator, generator.model, generator.slots
        self.pool, self.steps, self.lag, self.log = pool, steps, lag, StepLog()
        self.rows: list[Running] = []
        self.waiting: deque[Prompt] = deque()
        self.prefilling: deque[Prompt] = deque()
        self.pending: deque[tuple[list[Running], Drawn]] = deque()
        self.order: list[int] | None = None  # former places of the rows, when they changed
        self.preempted = 0

    @property
    def active(self) -> int:
        """Rows that are running or about to, and one for tokens that were not read yet."""
        return self.slots - self.free + bool(self.pending)

    @property
    def free(self) -> int:
        return self.slots - self._taken() - sum(len(prompt.rows) for prompt in self.waiting)

    @property
    def wants_rows(self) -> bool:
        """Whether enough rows are free for a prefill to be worth it."""
        return self.free >= (max(1, self.slots // REFILL_SHARE) if self.rows else 1)

    def admit(self, rows: Sequence[Row]) -> list[int]:
        """Puts rows, at most `free`, in line; the owner of each, in order. They join in the next steps."""
        for row in rows:
            self.generator.check(row, f"prompt {row.request.key}")
            self._check_fits(row)
        by_ids: dict[tuple[int, ...], list[Running]] = {}
        owners = []
        for row in rows:
            running = Running(row, self.log.open(row.request, row.live))
            if row.params.stop:
                running.stop = StopTexts(row.params.stop, self.generator.token_bytes)
            by_ids.setdefault(tuple(row.request.prompt_ids), []).append(running)
            owners.append(running.owner)
        self.waiting += [Prompt(ids, group) for ids, group in sorted(by_ids.items(), key=lambda item: len(item[0]))]
        return owners

    def step(self) -> None:
        """Prefills what may join, then draws one more token for every active row."""
        self._place_waiting()
        self._prefill()
        self._step()
        while len(self.pending) > (self.lag if self.rows else 0):
            self._read()

    def news(self) -> list[Told]:
        """What became of the rows, as soon as there is something to tell; call it after every step."""
        return self.log.told() if self.log.has_news or self.log.pending_steps >= FLUSH_STEPS else []

    def cancel(self, owners: Iterable[int]) -> None:
        """Frees the pages of these rows; they are not told of any more."""
        gone = set(owners)
        for owner in gone:
            self.log.drop(owner)
        for queue in (self.waiting, self.prefilling):
            for prompt in list(queue):
                self._cancel_in(queue, prompt, gone)
        for running in self.rows:
            running.closed |= running.owner in gone
        for drawing, _ in self.pending:
            for running in drawing:
                running.closed |= running.owner in gone
        self._drop_finished()

    def _cancel_in(self, queue: deque[Prompt], prompt: Prompt, gone: set[int]) -> None:
        kept = [running for running in prompt.rows if running.owner not in gone]
        if len(kept) == len(prompt.rows):
            return
        if queue is self.prefilling:
            for running in prompt.rows:
                self._release(running)
            if kept:  # the first row's pages were being filled: those left begin again
                self.waiting.appendleft(Prompt(prompt.ids, kept))
            queue.remove(prompt)
        elif kept:
            prompt.rows = kept
        else:
            queue.remove(prompt)

    def close(self) -> None:
        """Gives every page back: at the end, and when the consumer stops early."""
        for running in [*self.rows, *(one for prompt in self.prefilling for one in prompt.rows)]:
            self._release(running)
        self.rows, self.waiting, self.prefilling, self.order = [], deque(), deque(), None
        self.pending.clear()

    # ---- joining ---------------------------------------------------------------------------------------------------

    def _taken(self) -> int:
        return len(self.rows) + sum(len(prompt.rows) for prompt in self.prefilling)

    def _check_fits(self, row: Row) -> None:
        tokens = len(row.request.prompt_ids) + row.params.max_new_tokens
        if self.pool.pages_for(tokens) > self.pool.capacity:
            raise CapacityError(
                f"one completion of {tokens} tokens exceeds the cache",
                where=f"prompt {row.request.key}",
                value=f"room for {self.pool.capacity * self.pool.page_tokens} tokens",
                remedy="Lower max_new_tokens, drop the prompt, or use a GPU with more memory.",
            )

    def _place_waiting(self) -> None:
        """Rows and pages for waiting prompts, in their order, while there are enough."""
        while self.waiting and (free := self.slots - self._taken()) > 0:
            if not self._place(self.waiting[0], free):
                return

    def _place(self, prompt: Prompt, free_rows: int) -> bool:
        """Takes the prompt, or as many of its rows as fit, from `waiting` into `prefilling`; whether all of it."""
        full = self._shared_pages(prompt)
        each = self.pool.pages_for(len(prompt.ids) + 1) - full
        # Every running row may need a page soon; a newcomer must not take the last ones.
        spare = self.pool.free - full - self._taken() * bool(self.rows or self.prefilling)
        fitting = min(free_rows, len(prompt.rows), max(0, spare // each))
        if fitting == 0:
            return False
        now, later = prompt.rows[:fitting], prompt.rows[fitting:]
        shared = self.pool.take(full)
        for i, row in enumerate(now):
            row.pages = (self.pool.share(shared) if i else shared) + self.pool.take(each)
        self.waiting.popleft()
        self.prefilling.append(Prompt(prompt.ids, now))
        if later:
            self.waiting.appendleft(Prompt(prompt.ids, later))
        return not later

    def _prefill(self) -> None:
        """Chunks of the prompts that were admitted, within the budget between two steps."""
        budget = TOKENS_BETWEEN_STEPS
        while self.prefilling and budget > 0:
            chunk = self._chunk(min(budget, PREFILL_TOKENS))
            budget -= sum(stop - prompt.done for prompt, stop in chunk)
            self._forward(chunk)

    def _chunk(self, room: int) -> list[tuple[Prompt, int]]:
        """Prompts with the place up to which each is prefilled now."""
        chunk = []
        for prompt in self.prefilling:
            stop = min(len(prompt.ids), prompt.done + room)
            if stop < len(prompt.ids) and chunk:
                break  # a prompt that must be cut begins its own chunk
            chunk.append((prompt, stop))
            room -= stop - prompt.done
            if room <= 0:
                break
        return chunk

    def _forward(self, chunk: list[tuple[Prompt, int]]) -> None:
        chunk.sort(key=lambda part: (part[1] - part[0].done, part[0].done))
        ids, positions, slots, segments, device = [], [], [], [], self.runner.device
        for prompt, stop in chunk:
            pages, start = prompt.rows[0].pages, prompt.done
            past = to_device(self.pool.slots(pages, 0, start), device) if start else None
            segments.append(Segment(len(ids), stop - start, past))
            ids += prompt.ids[start:stop]
            positions += range(start, stop)
            slots.append(self.pool.slots(pages, start, stop))
        parts = self._run(
            chunk,
            to_device(np.array(ids, dtype=np.int32), device),
            to_device(np.array(positions, dtype=np.int32), device),
            segments,
            to_device(np.concatenate(slots), device),
        )
        last = [segment.start + segment.count - 1 for segment in segments]
        finished = []
        for (prompt, stop), at in zip(chunk, last):
            prompt.done = stop
            if stop == len(prompt.ids):
                self.prefilling.remove(prompt)
                finished.append((prompt, at))
        if finished:
            self._join(finished, parts)

    def _run(self, chunk: list[tuple[Prompt, int]], ids_T: Tensor, positions_T: Tensor, segments, slots_T: Tensor):
        """Prefills; what `_hidden` asks for the final hidden states of some of these tokens."""
        return self.runner.prefill(ids_T, positions_T, segments, self.pool, slots_T)

    def _hidden(self, prefilled, rows_N: Tensor) -> Tensor:
        return self.runner.finish(prefilled, rows_N)

    def _join(self, finished: list[tuple[Prompt, int]], prefilled) -> None:
        """The rows of prefilled prompts become active; new ones draw their first token."""
        self._copy_last_pages([prompt for prompt, _ in finished])
        finished.sort(key=lambda part: part[0].resumes)  # new rows first
        new = [(prompt, at) for prompt, at in finished if not prompt.resumes]
        first = len(self.rows)
        for prompt, _ in finished:
            for row in prompt.rows:
                row.cached = len(prompt.ids)
                self._changed().append(0)
                self.rows.append(row)
        self._upload()
        if new:
            at_B = to_device(np.array([at for _, at in new]), self.runner.device)
            source = np.repeat(np.arange(len(new)), [len(prompt.rows) for prompt, _ in new])
            logits_BV = self.runner.logits(self._hidden(prefilled, at_B))
            self._first(first, logits_BV[to_device(source, self.runner.device)])
        resumed = [i for i in range(first, len(self.rows)) if self.rows[i].tokens]
        if resumed:
            self.steps.set_tokens(np.array(resumed), np.array([self.rows[i].tokens[-1] for i in resumed]))
        self._joined(first, finished, prefilled)
        self._drop_finished()

    def _joined(self, first: int, finished: list[tuple[Prompt, int]], prefilled) -> None:
        """What else there is to do for rows from `first` on, which have their last tokens now."""

    def _first(self, start: int, logits_NV: Tensor) -> None:
        """Rows from `start` on draw their first token."""
        places = slice(start, start + len(logits_NV))
        self.pending.append((self.rows[places], self.steps.first(logits_NV, places)))
        for running in self.rows[places]:
            running.drawn = 1
        self._changed()  # the device has counted no token yet

    def _shared_pages(self, prompt: Prompt) -> int:
        """Pages that all samples of a prompt read and none writes."""
        return len(prompt.ids) // self.pool.page_tokens

    def _copy_last_pages(self, prompts: list[Prompt]) -> None:
        """A prompt's last page, partly filled, was written by its first row; the others go on in copies."""
        sources, targets = [], []
        for prompt in prompts:
            full = self._shared_pages(prompt)
            if full * self.pool.page_tokens < len(prompt.ids):
                sources += [prompt.rows[0].pages[full]] * (len(prompt.rows) - 1)
                targets += [row.pages[full] for row in prompt.rows[1:]]
        if sources:
            self.pool.copy(sources, targets)

    # ---- steps -----------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """One more token for every active row."""
        self._reserve()
        if not self.rows:
            return
        self._upload()
        self.pending.append((self.rows.copy(), self.steps.step()))
        for running in self.rows:
            running.cached += 1
            running.drawn += 1
        self._drop_finished()

    def _reserve(self) -> None:
        """A page for every row whose next token begins one; rows that came last give way when there is none."""
        grown_rows, columns, pages = [], [], []
        i = 0
        while i < len(self.rows):
            row = self.rows[i]
            column = (row.cached + self.steps.ahead - 1) // self.pool.page_tokens
            if column < len(row.pages):
                i += 1
                continue
            if self.pool.free == 0:
                while self.pending:
                    self._read()  # a stop token that was not read yet may free what is missing
                if self.pool.free == 0:
                    self._preempt()
                i, grown_rows, columns, pages = 0, [], [], []  # places have changed: `_upload` writes the tables
                self._changed()
                continue
            row.pages += self.pool.take(1)
            grown_rows.append(i)
            columns.append(column)
            pages.append(row.pages[-1])
            i += 1
        if grown_rows and self.order is None:
            self.steps.set_pages(np.array(grown_rows), np.array(columns), np.array(pages))

    def _preempt(self) -> None:
        row = self.rows[-1]
        if len(self.rows) == 1 and not self.prefilling:
            raise RuntimeError("a single row cannot exceed the pool: _check_fits admits none that would")
        if self.prefilling:  # not drawn from yet: it waits again as it was
            victim = self.prefilling.pop()
            for running in victim.rows:
                self._release(running)
            self.waiting.appendleft(Prompt(victim.ids, victim.rows))
            return
        self._remove(len(self.rows) - 1)
        self._release(row)
        row.drawn = len(row.tokens)
        self.waiting.appendleft(Prompt((*row.row.request.prompt_ids, *row.tokens[:-1]), [row]))
        self.preempted += 1

    def _read(self) -> None:
        """Takes in the oldest step that was not read."""
        drawing, drawn = self.pending.popleft()
        self._take_in(drawing, *drawn.read())

    def _take_in(self, drawing: list[Running], token_A: np.ndarray, support: Support | None) -> None:
        """Logs one token of each of these rows, and closes the rows that ended with it."""
        alive = [a for a, running in enumerate(drawing) if not running.closed]
        if not alive:  # all of them drew a token after their last one, or were cancelled
            return
        keep(self.log, [drawing[a] for a in alive], token_A[alive], rows_of(support, alive, len(drawing)))
        ended = [self._ended(drawing[a], int(token_A[a])) for a in alive]
        if any(ended):
            self._drop_finished()

    def _ended(self, running: Running, token: int) -> bool:
        """Takes in one token that was read; whether the row ends with it."""
        running.tokens.append(token)
        stopped = bool(self.generator.is_stop_V[token])
        text = running.stop.add(token) if running.stop and not stopped else None
        if not (stopped or text is not None or len(running.tokens) >= running.budget):
            return False
        running.closed = True
        self.log.finish(running.owner, "stop" if stopped or text is not None else "length", text)
        return True

    # ---- leaving ---------------------------------------------------------------------------------------------------

    def _drop_finished(self) -> None:
        """Rows that ended, or whose last token is on its way, leave; rows from the end take their places."""
        for place in range(len(self.rows) - 1, -1, -1):
            row = self.rows[place]
            if row.closed or row.drawn >= row.budget:
                self._remove(place)
                self._release(row)

    def _remove(self, place: int) -> None:
        order = self._changed()
        self.rows[place], order[place] = self.rows[-1], order[-1]
        self.rows.pop()
        order.pop()

    def _release(self, row: Running) -> None:
        self.pool.give_back(row.pages)
        row.pages, row.cached = [], 0

    def _changed(self) -> list[int]:
        if self.order is None:
            self.order = list(range(len(self.rows)))
        return self.order

    def _upload(self) -> None:
        """Brings the device's state of the rows up to date after rows joined, left or moved."""
        if self.order is None:
            return
        width = max((len(row.pages) for row in self.rows), default=0)
        tables = np.zeros((len(self.rows), width), dtype=np.int32)
        for i, row in enumerate(self.rows):
            tables[i, : len(row.pages)] = row.pages
        column = lambda name: np.array([getattr(row, name) for row in self.rows], dtype=np.int32)  # noqa: E731
        order = np.array(self.order, dtype=np.int64)
        self.steps.upload([running.row for running in self.rows], order, column("cached"), column("drawn"), tables)
        self.order = None
