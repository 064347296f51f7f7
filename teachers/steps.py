"""Decode steps on the device: the state of the rows, CUDA graphs that replay a step, results on their way to the host.

Everything a step needs lives on the device: last tokens, lengths, seeds, settings, page tables. A step draws, captures,
and moves every row on by one token without the host, which reads a step's result (one small tensor) while the next step
runs. Graphs are recorded for a ladder of batch sizes; rows above the active ones take part in the dense products only.

Shape legend: A active rows, B rows of a graph, S slots, N new rows, V vocabulary, K candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from distill.generate import Row
from distill.sampling import StepLogits, Support, capture_support, draw, uniform
from teachers.paged import PagePool
from teachers.runner import Runner
from teachers.transfer import to_device, to_host

LADDER = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, *range(80, 257, 16), *range(288, 1025, 32))
WHOLE = ("lengths", "drawn", "top_k", "k_max")  # int32 settings of a row
FLOATS = ("temperature", "top_p", "min_p", "tail_bound")  # fp32 settings of a row


@dataclass
class Drawn:
    """The tokens of a step (or of new rows) and their supports; `read` waits for the device."""

    rows: int
    read: Callable[[], tuple[np.ndarray, Support | None]]


class Steps:
    """The device's side of rows 0..A-1, of up to `slots`, over a page pool."""

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
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
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
        self.active.fill_(active)
        if not self.is_cuda:
            return self._hand_out(self._advance(active), active)
        key = _bucket(active), self._candidates()
        if key not in self.graphs:
            self._record(*key)
        graph, result = self.graphs[key]
        graph.replay()
        return self._hand_out(result, active)

    def _advance(self, rows: int, candidates: int | None = None):
        live_B = torch.arange(rows, device=self.runner.device) < self.active
        # Tables of rows that are not active may name pages that others hold by now: such rows have no tokens.
        lengths_B = torch.where(live_B, self.of["lengths"][:rows], 0)
        logits_BV = self.runner.decode(self.tokens[:rows], lengths_B, self.tables[:rows], self.active, self.pool)
        result = self._draw(logits_BV, slice(0, rows), candidates)
        self.state[:2, :rows] += live_B
        return result

    def _candidates(self, rows: list[Row] | None = None) -> int:
        """How many of the most likely tokens a step on a GPU looks at: positive when a row captures, else negative."""
        from teachers.kernels.draw import width

        rows = self.rows if rows is None else rows
        most = max(max(row.params.top_k, row.capture.k_max if row.capture else 0) for row in rows)
        count = width(most, self.runner.vocab_size)
        return count if any(row.capture for row in rows) else -count

    def _draw(self, logits_AV: Tensor, places: slice, candidates: int | None = None):
        """Draws into the rows' last tokens. On a GPU the packed result, else tokens [A] and supports."""
        if not self.is_cuda:
            return self._draw_plain(logits_AV, places)
        from teachers.kernels import draw as kernels

        of = {name: setting[places] for name, setting in self.of.items()}
        how = kernels.HowDrawn(
            self.seeds[places], of["drawn"], of["temperature"], of["top_p"], of["top_k"], of["min_p"]
        )
        candidates = candidates or self._candidates(self.rows[places])
        capture = kernels.HowCaptured(of["k_max"], of["tail_bound"]) if candidates > 0 else None
        return kernels.step(logits_AV, self.tokens[places], how, capture, abs(candidates))

    def _draw_plain(self, logits_AV: Tensor, places: slice) -> tuple[np.ndarray, Support | None]:
        """The law itself, distill.sampling, for rows of equal settings together."""
        step, rows = StepLogits(logits_AV), self.rows[places]
        uniform_A = torch.from_numpy(uniform(self.seeds[places].numpy(), self.of["drawn"][places].numpy()))
        token_A = torch.empty(len(rows), dtype=torch.int64)
        for params in {replace(row.params, max_new_tokens=0, stop=()) for row in rows}:
            index = [a for a, row in enumerate(rows) if replace(row.params, max_new_tokens=0, stop=()) == params]
            token_A[index] = draw(step.rows(torch.tensor(index)), uniform_A[index], params)
        self.tokens[places] = token_A.int()
        k_max = max((row.capture.k_max for row in rows if row.capture), default=0)
        if k_max == 0:
            return token_A.numpy(), None
        support = _no_support(len(rows), min(k_max, logits_AV.shape[1]))
        for spec in {row.capture for row in rows if row.capture}:
            index = torch.tensor([a for a, row in enumerate(rows) if row.capture == spec])
            part = capture_support(step.rows(index), token_A[index], spec)
            for name, whole in vars(support).items():
                found = getattr(part, name)
                if whole.dim() == 1:
                    whole[index] = found
                else:
                    whole[index, : found.shape[1]] = found[:, : whole.shape[1]]
        return token_A.numpy(), support

    def _hand_out(self, result, rows: int) -> Drawn:
        if not self.is_cuda:
            return Drawn(rows, lambda: result)
        read = to_host(result[:rows])
        return Drawn(rows, lambda: unpack(read()))

    def _record(self, bucket: int, candidates: int) -> None:
        """Records a step over `bucket` rows. The run that warms up has no active row, so it changes nothing."""
        active = int(self.active)
        self.active.fill_(0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            tokens = self.tokens.clone()
            self._advance(bucket, candidates)
            self.tokens.copy_(tokens)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory):
            result = self._advance(bucket, candidates)
        self.memory = graph.pool()
        self.graphs[bucket, candidates] = graph, result
        self.active.fill_(active)

    def _device(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.runner.device)


def _settings(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """int32 [settings, A] (floats by their bits; lengths and drawn zero) and seeds int64 [A]."""
    state = np.zeros((len(WHOLE) + len(FLOATS), len(rows)), dtype=np.int32)
    state[2] = [row.params.top_k for row in rows]
    state[3] = [row.capture.k_max if row.capture else 0 for row in rows]
    floats = state.view(np.float32)
    for i, name in enumerate(FLOATS[:3], len(WHOLE)):
        floats[i] = [getattr(row.params, name) for row in rows]
    floats[-1] = [row.capture.tail_bound if row.capture else 0 for row in rows]
    return state, np.array([row.request.seed for row in rows], dtype=np.int64)


def _no_support(rows: int, k: int) -> Support:
    whole, real = torch.int32, torch.float32
    return Support(
        torch.zeros(rows, k, dtype=whole), torch.zeros(rows, k, dtype=real), torch.zeros(rows, dtype=whole),
        torch.zeros(rows, dtype=real), torch.zeros(rows, dtype=real),
    )  # fmt: skip


def unpack(packed_AW: Tensor) -> tuple[np.ndarray, Support | None]:
    """Tokens [A] and supports of the result of teachers.kernels.draw.step."""
    tokens_A = packed_AW[:, 0].numpy()
    if packed_AW.shape[1] == 1:
        return tokens_A, None
    k = (packed_AW.shape[1] - 4) // 2
    floats_AW = packed_AW.view(torch.float32)
    support = Support(packed_AW[:, 4 : 4 + k], floats_AW[:, 4 + k :], packed_AW[:, 1], floats_AW[:, 2], floats_AW[:, 3])
    return tokens_A, support


def _bucket(rows: int) -> int:
    return next((size for size in LADDER if size >= rows), -(-rows // 256) * 256)
