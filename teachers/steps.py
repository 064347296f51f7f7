"""Decode steps on the device: the state of the rows, CUDA graphs that replay a step, results on their way to the host.

Everything a step needs lives on the device: last tokens, lengths, seeds, settings, page tables. A step draws, captures,
and moves every row on by one token without the host, which reads a step's result (one small tensor) while the next step
runs. Graphs are recorded for a ladder of batch sizes; rows above the active ones take part in the dense products only.

Shape legend: A active rows, B rows of a graph, S slots, N new rows, V vocabulary, K candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from distill.generate import Row
from distill.sampling import StepLogits, Support, capture_support, draw, uniform
from teachers.mesh import Pass
from teachers.paged import PagePool
from teachers.runner import Runner
from teachers.tail import support_of, with_draws
from teachers.transfer import to_device, to_host

LADDER = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, *range(80, 257, 16), *range(288, 1025, 32))
WHOLE = ("lengths", "drawn", "top_k", "k_max", "tail_draws")  # int32 settings of a row
FLOATS = ("temperature", "top_p", "min_p", "tail_bound")  # fp32 settings of a row


@dataclass
class Drawn:
    """The tokens of a step (or of new rows) and their supports; `read` waits for the device."""

    rows: int
    read: Callable[[], tuple[np.ndarray, Support | None]]


class Steps:
    """The device's side of rows 0..A-1, of up to `slots`, over a page pool."""

    ahead = 1  # tokens of a row that one step writes and draws

    def __init__(self, runner: Runner, pool: PagePool, slots: int):
        self.runner, self.pool = runner, pool
        self.is_cuda = runner.device.type == "cuda"
        rows = _bucket(slots) if self.is_cuda else slots
        zeros = lambda *shape, dtype=torch.int32: torch.zeros(*shape, dtype=dtype, device=runner.device)  # noqa: E731
        self.state = zeros(len(WHOLE) + len(FLOATS), rows)
        self.tokens, self.active, self.seeds = zeros(rows), zeros(1), zeros(rows, dtype=torch.int64)
        self.tables = zeros(rows, pool.pages_for(runner.max_positions))
        self.of = dict(zip(WHOLE, self.state)) | dict(zip(FLOATS, self.state.view(torch.float32)[len(WHOLE) :]))
        self.rows: list[Row] = []
        if runner.mesh:
            runner.mesh.prepare_steps(rows, runner.embed.shape[1], runner.dtype)
        self.graphs: dict[tuple[int, int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.memory = None

    def upload(self, rows: list[Row], order: np.ndarray, lengths: np.ndarray, drawn: np.ndarray, tables: np.ndarray):
        """New rows 0..A-1: the last token of row i is that of the former row order[i]; the rest is as given."""
        self.rows, count = rows, len(rows)
        self.tokens[:count] = self.tokens[self._device(order)]
        self.tables[:count, : tables.shape[1]] = self._device(tables)
        state, seeds = _settings(rows)
        state[0], state[1] = lengths, drawn
        self.state[:, :count] = self._device(state)
        self.seeds[:count] = self._device(seeds)

    def set_tokens(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Last tokens that the host knows: those of rows that resume."""
        self.tokens[self._device(rows)] = self._device(tokens.astype(np.int32))

    def set_pages(self, rows: np.ndarray, columns: np.ndarray, pages: np.ndarray) -> None:
        """Table entries of rows that got a page."""
        index = self._device(np.stack((rows, columns, pages)))
        self.tables[index[0], index[1]] = index[2].int()

    @torch.inference_mode()
    def first(self, logits_NV: Tensor, places: slice) -> Drawn:
        """Draws the first token of new rows from the logits after their prompts."""
        return self._hand_out(self._draw(logits_NV, places), places.stop - places.start)

    @torch.inference_mode()
    def step(self) -> Drawn:
        """One more token for every row."""
        active = len(self.rows)
        rows, *draws = self._agreed(active, *((self._candidates(), self._tail_draws()) if self.is_cuda else (0, 0)))
        self.active.fill_(active)
        if not self.is_cuda:
            return self._hand_out(self._advance(active), self.ahead * active)
        return self._hand_out(self._replay(_bucket(rows), *draws), self.ahead * active)

    def _agreed(self, active: int, candidates: int, tail_draws: int) -> tuple[int, int, int]:
        """The most of each among ranks that share experts and step together, once all their prompts have been run."""
        mesh = self.runner.mesh
        if mesh is None or mesh.shares == 1:
            return active, candidates, tail_draws
        while (now := mesh.meet(rows=active, draws=(abs(candidates), candidates > 0, tail_draws))).is_prefill:
            self.runner.idle()
        return _asked(now)

    @torch.inference_mode()
    def idle(self, now: Pass) -> None:
        """This rank's side of a step of others, in which it has no row."""
        self.active.fill_(0)
        if self.is_cuda:
            rows, *draws = _asked(now)
            self._replay(_bucket(rows), *draws)
        else:
            self.runner.idle()

    def _replay(self, *key: int) -> Tensor:
        """The result of a recorded step over (rows, candidates, draws from tails)."""
        if self.runner.mesh:
            self.runner.mesh.step_over(key[0])
        if key not in self.graphs:
            self._record(*key)
        graph, result = self.graphs[key]
        graph.replay()
        return result

    def _advance(self, rows: int, candidates: int | None = None, tail_draws: int | None = None):
        live_B = torch.arange(rows, device=self.runner.device) < self.active
        # Tables of rows that are not active may name pages that others hold by now: such rows have no tokens.
        lengths_B = torch.where(live_B, self.of["lengths"][:rows], 0)
        logits_BV = self.runner.decode(self.tokens[:rows], lengths_B, self.tables[:rows], self.active, self.pool)
        result = self._draw(logits_BV, slice(0, rows), candidates, tail_draws)
        self.state[:2, :rows] += live_B
        return result

    def _candidates(self, rows: list[Row] | None = None) -> int:
        """How many of the most likely tokens a step on a GPU looks at: positive when a row captures, else negative."""
        from teachers.kernels.draw import width

        rows = self.rows if rows is None else rows
        most = max(max(row.params.top_k, row.capture.k_max if row.capture else 0) for row in rows)
        count = width(most, self.runner.vocab_size)
        return count if any(row.capture for row in rows) else -count

    def _tail_draws(self, rows: list[Row] | None = None) -> int:
        """The most draws that a row asks for from the tail of a distribution, rounded up: few different graphs."""
        most = max((row.capture.tail_draws for row in rows or self.rows if row.capture), default=0)
        return 1 << (most - 1).bit_length() if most else 0

    def _draw(self, logits_AV: Tensor, places: slice, candidates: int | None = None, tail_draws: int | None = None):
        """Draws into the rows' last tokens. On a GPU the packed result, else tokens [A] and supports."""
        return self._drawn(logits_AV, self.tokens[places], self._of(places), self.rows[places], candidates, tail_draws)

    def _of(self, places: slice) -> dict[str, Tensor]:
        """The settings of these rows by name."""
        return {name: setting[places] for name, setting in self.of.items()} | {"seeds": self.seeds[places]}

    def _drawn(
        self, logits_AV: Tensor, tokens_A: Tensor, of: dict[str, Tensor], rows: list[Row],
        candidates: int | None = None, tail_draws: int | None = None,
    ):  # fmt: skip
        """Draws into tokens_A by the settings `of` each row; `rows`: those that are active, if nothing is recorded."""
        if not self.is_cuda:
            return self._draw_plain(logits_AV, tokens_A, of, rows)
        from teachers.kernels import draw as kernels

        how = kernels.HowDrawn(of["seeds"], of["drawn"], of["temperature"], of["top_p"], of["top_k"], of["min_p"])
        candidates = candidates or self._candidates(rows)
        capture = kernels.HowCaptured(of["k_max"], of["tail_bound"]) if candidates > 0 else None
        packed_AW = kernels.step(logits_AV, tokens_A, how, capture, abs(candidates))
        draws = self._tail_draws(rows) if tail_draws is None else tail_draws
        if draws:
            packed_AW = with_draws(packed_AW, logits_AV, draws, of["tail_draws"])
        if self.runner.mesh and self.runner.mesh.tensor > 1:
            tokens_A.copy_(self.runner.mesh.same(packed_AW)[:, 0])
        return packed_AW

    def _draw_plain(
        self, logits_AV: Tensor, tokens_A: Tensor, of: dict[str, Tensor], rows: list[Row]
    ) -> tuple[np.ndarray, Support | None]:
        """The law itself, distill.sampling, for rows of equal settings together."""
        step = StepLogits(logits_AV)
        uniform_A = torch.from_numpy(uniform(of["seeds"].numpy(), of["drawn"].numpy()))
        token_A = torch.empty(len(rows), dtype=torch.int64)
        for params in {replace(row.params, max_new_tokens=0, stop=()) for row in rows}:
            index = [a for a, row in enumerate(rows) if replace(row.params, max_new_tokens=0, stop=()) == params]
            token_A[index] = draw(step.rows(torch.tensor(index)), uniform_A[index], params)
        tokens_A.copy_(token_A)
        parts = []
        for spec in {row.capture for row in rows if row.capture}:
            index = torch.tensor([a for a, row in enumerate(rows) if row.capture == spec])
            parts.append((index, capture_support(step.rows(index), token_A[index], spec)))
        support = _joined(len(rows), parts) if parts else None
        return token_A.numpy(), support

    def _hand_out(self, result, rows: int) -> Drawn:
        if not self.is_cuda:
            return Drawn(rows, lambda: result)
        read = to_host(result[:rows])
        return Drawn(rows, lambda: unpack(read()))

    def _record(self, bucket: int, candidates: int, tail_draws: int) -> None:
        """Records a step over `bucket` rows. The run that warms up has no active row, so it changes nothing."""
        active = int(self.active)
        self.active.fill_(0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            tokens = self.tokens.clone()
            self._advance(bucket, candidates, tail_draws)
            self.tokens.copy_(tokens)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may talk to the device meanwhile: NCCL's watches over its messages.
        with torch.cuda.graph(graph, pool=self.memory, capture_error_mode="thread_local"):
            result = self._advance(bucket, candidates, tail_draws)
        self.memory = graph.pool()
        self.graphs[bucket, candidates, tail_draws] = graph, result
        self.active.fill_(active)

    def _device(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.runner.device)


def _asked(now: Pass) -> tuple[int, int, int]:
    """(rows, candidates, draws from tails) of a step that ranks agreed on."""
    width, captures, tail_draws = now.draws
    return now.most, width if captures else -width, tail_draws


def _settings(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """int32 [settings, A] (floats by their bits; lengths and drawn zero) and seeds int64 [A]."""
    state = np.zeros((len(WHOLE) + len(FLOATS), len(rows)), dtype=np.int32)
    state[2] = [row.params.top_k for row in rows]
    state[3] = [row.capture.k_max if row.capture else 0 for row in rows]
    state[4] = [row.capture.tail_draws if row.capture else 0 for row in rows]
    floats = state.view(np.float32)
    for i, name in enumerate(FLOATS[:3], len(WHOLE)):
        floats[i] = [getattr(row.params, name) for row in rows]
    floats[-1] = [row.capture.tail_bound if row.capture else 0 for row in rows]
    return state, np.array([row.request.seed for row in rows], dtype=np.int64)


def _joined(rows: int, parts: list[tuple[Tensor, Support]]) -> Support:
    """The supports of parts of the rows as one; rows of no part have none."""
    width = max(part.ids_AK.shape[1] for _, part in parts)
    whole = Support(
        torch.zeros(rows, width, dtype=torch.int32), torch.zeros(rows, width), torch.zeros(rows, dtype=torch.int32),
        torch.zeros(rows), torch.zeros(rows),
    )  # fmt: skip
    for index, part in parts:
        for name, column in vars(whole).items():
            found = getattr(part, name)
            if column.dim() == 1:
                column[index] = found
            else:
                column[index, : found.shape[1]] = found
    return whole


def rows_of(support: Support | None, rows: Sequence[int], whole: int) -> Support | None:
    """The supports of some of the `whole` rows."""
    if support is None or len(rows) == whole:
        return support
    return Support(*(part[rows] for part in vars(support).values()))


def unpack(packed_AW: Tensor) -> tuple[np.ndarray, Support | None]:
    """Tokens [A] and supports of the result of teachers.kernels.draw.step."""
    tokens_A = packed_AW[:, 0].numpy()
    if packed_AW.shape[1] == 1:
        return tokens_A, None
    return tokens_A, support_of(packed_AW)


def _bucket(rows: int) -> int:
    return next((size for size in LADDER if size >= rows), -(-rows // 256) * 256)
