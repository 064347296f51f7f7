"""Which token comes next, and which part of the teacher's distribution is stored: pure functions of one step's logits.

A token is a function of (logits, sample seed, position) only, never of the batch it was computed in, so any sample can
be drawn again alone. Weights are fp32 exponentials of fp32 logits; sums, cumulative sums and the search are float64.

Shape legend: A active rows, V vocabulary, K candidates of a row, most likely first, B blocks of the vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.records import CaptureSpec, SamplingParams

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
CANDIDATES = 8  # most rows of a trained model put top_p, and all but the capture's tail bound, on this few tokens
MORE = 8  # where they do not reach, this many times as many, until they do
SMALLEST = -87.0  # exp of less is denormal in fp32: ten times slower, and far below what 53 random bits can reach
BLOCK = 32  # vocabulary entries summed together by the unfiltered draw
COLUMN = 4  # vocabulary entries compared together by the search for the most likely


def _splitmix64(state_A: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea, Flood 2014), on uint64 arrays with wrap-around."""
    z = (state_A ^ (state_A >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(seeds_A: np.ndarray, positions_A: np.ndarray) -> np.ndarray:
    """float64 [A] in [0, 1): 53 random bits that depend on (sample seed, position) alone.

    u = splitmix64(splitmix64(seed) + (position + 1) * GOLDEN) / 2^64, cut to 53 bits. The inner hash keeps apart the
    streams of seeds that differ by a multiple of GOLDEN.
    """
    with np.errstate(over="ignore"):
        start = _splitmix64(seeds_A.astype(np.uint64))
        bits = _splitmix64(start + (positions_A.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64_of(z_A: Tensor) -> Tensor:
    """_splitmix64 on int64 tensors, whose products wrap around as those of uint64 do."""
    shifted = lambda bits: (z_A >> bits) & ((1 << (64 - bits)) - 1)  # noqa: E731
    z_A = (z_A ^ shifted(30)) * _signed(0xBF58476D1CE4E5B9)
    z_A = (z_A ^ shifted(27)) * _signed(0x94D049BB133111EB)
    return z_A ^ shifted(31)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant


def uniform_of(seeds_A: Tensor, positions_A: Tensor) -> Tensor:
    """`uniform` of int64 tensors, on their device and without waiting for it: the same numbers."""
    bits_A = _splitmix64_of(_splitmix64_of(seeds_A) + (positions_A + 1) * _signed(int(GOLDEN)))
    return ((bits_A >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def top_candidates(logits_AV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row and their ids, both [A, K], largest first; K = min(k, V).

    On CPU through maxima: cut the ids into columns of COLUMN each; the k largest entries lie in the k columns with the
    largest maxima, so torch.topk runs over V / COLUMN and COLUMN * k entries in place of V: 1.4 to 2.3 times faster.
    """
    rows, vocab = logits_AV.shape
    width = -(-vocab // COLUMN)
    if logits_AV.device.type != "cpu" or width < 2 * k:
        return logits_AV.topk(min(k, vocab))
    whole = vocab // width * width
    maxima_AW = logits_AV[:, :whole].unflatten(1, (-1, width)).amax(1)
    rest = vocab - whole
    maxima_AW[:, :rest] = torch.maximum(maxima_AW[:, :rest], logits_AV[:, whole:])
    columns_AK1 = maxima_AW.topk(k, sorted=False).indices.unsqueeze(-1)
    ids_AX = (columns_AK1 + torch.arange(COLUMN) * width).view(rows, -1)
    inside_AX = logits_AV.gather(1, ids_AX.clamp(max=vocab - 1)).masked_fill_(ids_AX >= vocab, -math.inf)
    values_AK, where_AK = inside_AX.topk(k)
    return values_AK, ids_AX.gather(1, where_AK)


class StepLogits:
    """One step's logits with what sampling and capture share: row maxima, exponentials, the most likely tokens."""

    def __init__(self, logits_AV: Tensor):
        self.logits_AV = logits_AV.float()
        self.max_A1 = self.logits_AV.amax(-1, keepdim=True)
        self._weights: dict[float, Tensor] = {}
        self._totals: dict[float, Tensor] = {}
        self._top: tuple[Tensor, Tensor] | None = None

    def weights(self, temperature: float) -> Tensor:
        """fp32 [A, V]: exp((logit - row maximum) / temperature), no less than exp(SMALLEST)."""
        if temperature not in self._weights:
            scaled_AV = self.logits_AV - self.max_A1
            if temperature != 1.0:
                scaled_AV /= temperature
            self._weights[temperature] = scaled_AV.clamp_(min=SMALLEST).exp_()
        return self._weights[temperature]

    def total(self, temperature: float) -> Tensor:
        """float64 [A, 1]: the sum of the weights, to about 1e-7."""
        if temperature not in self._totals:
            self._totals[temperature] = self.weights(temperature).sum(-1, keepdim=True).double()
        return self._totals[temperature]

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Values and ids [A, K] of at least the k most likely tokens (fewer only when the vocabulary is smaller)."""
        wanted = min(k, self.logits_AV.shape[1])
        if self._top is None or self._top[0].shape[1] < wanted:
            self._top = top_candidates(self.logits_AV, wanted)
        return self._top

    def rows(self, index_R: Tensor) -> "StepLogits":
        return StepLogits(self.logits_AV[index_R])


def draw(step: StepLogits, uniform_A: Tensor, params: SamplingParams) -> Tensor:
    """int64 [A]: the first token, in order of id, whose cumulative filtered probability exceeds uniform_A (float64).

    Filters in transformers' order: temperature, then top_k (ties with the k-th are kept), then top_p over what is
    left: a token stays when the mass of the tokens strictly more likely than it is below top_p; then min_p: it stays
    when it is at least min_p times as likely as the most likely one. Temperature 0: argmax.
    """
    if params.temperature == 0:
        return step.logits_AV.argmax(-1)
    top_k = params.top_k if 0 < params.top_k < step.logits_AV.shape[1] else 0
    if top_k == 0 and params.top_p >= 1 and params.min_p <= 0:
        return _draw_unfiltered(step.weights(params.temperature), uniform_A)
    total_A = step.total(params.temperature).squeeze(1)
    return _draw_filtered(step, uniform_A, total_A, params, top_k, CANDIDATES)


def _draw_unfiltered(weights_AV: Tensor, uniform_A: Tensor) -> Tensor:
    """Inverse CDF in two levels: float64 cumulative sums of block sums, then of the chosen block's entries."""
    vocab = weights_AV.shape[1]
    sums_AB = block_sums(weights_AV)
    ends_AB = sums_AB.cumsum(-1)
    target_A1 = uniform_A.unsqueeze(1) * ends_AB[:, -1:]
    block_A = _first_above(sums_AB, target_A1.squeeze(1))
    before_A1 = F.pad(ends_AB, (1, 0)).gather(1, block_A.unsqueeze(1))
    ids_Ab = block_A.unsqueeze(1) * BLOCK + torch.arange(BLOCK, device=weights_AV.device)
    inside_Ab = weights_AV.gather(1, ids_Ab.clamp(max=vocab - 1)).double().masked_fill_(ids_Ab >= vocab, 0)
    return block_A * BLOCK + _first_above(inside_Ab, (target_A1 - before_A1).squeeze(1))


def block_sums(weights_AV: Tensor) -> Tensor:
    """float64 [A, B] sums over BLOCK consecutive entries; fp32 inside a block, where 32 terms cost 1e-7 at most."""
    whole = weights_AV.shape[1] // BLOCK * BLOCK
    sums_AB = weights_AV[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)
    rest_A1 = weights_AV[:, whole:].sum(-1, keepdim=True)
    return torch.cat((sums_AB, rest_A1), dim=1).double()


def _first_above(weights_AK: Tensor, target_A: Tensor) -> Tensor:
    """Index [A] of the first entry whose cumulative weight exceeds the target; rounding never picks a zero weight."""
    ends_AK = weights_AK.cumsum(-1)
    found_A = torch.searchsorted(ends_AK, target_A.unsqueeze(1), right=True).squeeze(1)
    positions_K = torch.arange(weights_AK.shape[1], device=weights_AK.device)
    last_positive_A = torch.where(weights_AK > 0, positions_K, 0).amax(-1)
    return torch.minimum(found_A, last_positive_A)


def _draw_filtered(
    step: StepLogits, uniform_A: Tensor, total_A: Tensor, params: SamplingParams, top_k: int, candidates: int
) -> Tensor:
    """`draw` with filters, from the most likely tokens; rows whose nucleus is larger ask for more candidates."""
    vocab = step.logits_AV.shape[1]
    values_AK, ids_AK = step.top(min(vocab, max(candidates, top_k + 1)))
    weights_AK = ((values_AK.double() - step.max_A1) / params.temperature).exp_()
    keep_AK, reached_A = _nucleus(values_AK, weights_AK, total_A, params, top_k)
    ids_AK, order_AK = ids_AK.sort(-1)
    kept_AK = (weights_AK * keep_AK).gather(1, order_AK)
    chosen_A = _first_above(kept_AK, uniform_A * kept_AK.sum(-1))
    token_A = ids_AK.gather(1, chosen_A.unsqueeze(1)).squeeze(1)
    if values_AK.shape[1] == vocab or bool(reached_A.all()):
        return token_A
    hard_R = (~reached_A).nonzero().squeeze(1)
    more, hard = MORE * values_AK.shape[1], step.rows(hard_R)
    token_A[hard_R] = _draw_filtered(hard, uniform_A[hard_R], total_A[hard_R], params, top_k, more)
    return token_A


def _nucleus(
    values_AK: Tensor, weights_AK: Tensor, total_A: Tensor, params: SamplingParams, top_k: int
) -> tuple[Tensor, Tensor]:
    """Which candidates stay (bool [A, K]), and in which rows (bool [A]) no token beyond the candidates could stay.

    weights_AK are relative to the most likely token's. A cut keeps every token tied with the least likely one it keeps,
    so the set does not depend on the order of ties.
    """
    keep_AK = torch.ones_like(values_AK, dtype=torch.bool)
    all_A = torch.ones_like(total_A, dtype=torch.bool)
    ties_A, past_A = all_A, ~all_A if params.top_p < 1 or params.min_p > 0 else all_A
    total_A1 = total_A.unsqueeze(1)
    last_A1 = values_AK[:, -1:]
    if top_k:
        threshold_A1 = values_AK[:, top_k - 1 : top_k]
        keep_AK = values_AK >= threshold_A1
        total_A1 = (weights_AK * keep_AK).sum(-1, keepdim=True)
        ties_A = (last_A1 < threshold_A1).squeeze(1)
    if params.top_p < 1:
        kept_AK = weights_AK * keep_AK
        above_AK = kept_AK.cumsum(-1) - kept_AK
        inside_AK = keep_AK & (above_AK < params.top_p * total_A1)
        inside_AK[:, 0] = True  # top_p 0 still leaves the most likely token
        threshold_A1 = values_AK.gather(1, inside_AK.sum(-1, keepdim=True) - 1)
        keep_AK = keep_AK & (values_AK >= threshold_A1)
        past_A = (last_A1 < threshold_A1).squeeze(1)
    if params.min_p > 0:
        keep_AK = keep_AK & (weights_AK >= params.min_p)
        past_A = past_A | (weights_AK[:, -1] < params.min_p)
    return keep_AK, ties_A & past_A


@dataclass
class Support:
    """The stored part of A distributions: entry j < count_A[a] of row a, most likely first; the rest is padding.

    ids_AK int32, logprobs_AK fp32 (nats, temperature 1), count_A int32, tail_A fp32 (mass outside), logsumexp_A fp32.
    """

    ids_AK: Tensor
    logprobs_AK: Tensor
    count_A: Tensor
    tail_A: Tensor
    logsumexp_A: Tensor


def capture_support(step: StepLogits, sampled_A: Tensor, spec: CaptureSpec, uniform_A: Tensor | None = None) -> Support:
    """The adaptive support of each row: most likely tokens until the mass left is <= tail_bound, at most k_max.

    The sampled token is always in; when k_max others are more likely it takes the place of the least likely of them.
    The tail is the sum over the tokens outside, not 1 - the stored mass: its relative error is 1e-7 at any size.
    With spec.tail_draws the tail is drawn from (draw_tail), by uniform_A (float64 [A] in [0, 1)).
    """
    k_max = min(spec.k_max, step.logits_AV.shape[1])
    ids_AK, count_A = _most_likely(step, k_max, spec.tail_bound)
    ids_AK, count_A = _with_sampled(ids_AK, count_A, sampled_A, k_max)
    inside_AK = torch.arange(ids_AK.shape[1], device=ids_AK.device) < count_A.unsqueeze(1)
    ids_AK = torch.where(inside_AK, ids_AK, ids_AK[:, :1])  # padding repeats an entry of the support
    weights_AV = step.weights(1.0)
    kept_AK = weights_AV.gather(1, ids_AK)
    weights_AV.scatter_(1, ids_AK, 0.0)
    outside_A1 = weights_AV.sum(-1, keepdim=True).double()
    weights_AV.scatter_(1, ids_AK, kept_AK)  # in place and back: a copy of [A, V] costs more than the sum
    total_A1 = outside_A1 + (kept_AK.double() * inside_AK).sum(-1, keepdim=True)
    logsumexp_A1 = step.max_A1.double() + total_A1.log()
    logprobs_AK = step.logits_AV.gather(1, ids_AK) - logsumexp_A1
    tail_A1 = outside_A1 / total_A1
    support = Support(
        ids_AK.int(), logprobs_AK.float(), count_A.int(), tail_A1.squeeze(1).float(), logsumexp_A1.squeeze(1).float()
    )
    return draw_tail(step, support, spec.tail_draws, uniform_A) if spec.tail_draws else support


def draw_tail(
    step: StepLogits, support: Support, draws: int, uniform_A: Tensor | None = None, draws_A: Tensor | None = None
) -> Support:
    """The support with `draws` tokens drawn from its tail, which then holds no mass: an unbiased estimate.

    A token of probability p outside the support is drawn c times at the points (u + i) / draws of the tail's cumulative
    distribution in order of id, and stored with mass c * tail / draws: its expected value over u is p. So is then the
    expected gradient of the forward KL to the student's logits, p_student - t, that of the dense loss. Systematic
    sampling (Madow 1949) in the place of the independent draws of Sparse Logit Sampling (Anshumann et al. 2025): no
    more variance, and the likely tokens stay exact. Without uniform_A, u is a hash of the row's logsumexp and support.

    draws_A: as many draws for each row, at most `draws`; a row of 0 keeps its tail. Never waits for a GPU.
    """
    width = support.ids_AK.shape[1]
    stored_AK = torch.arange(width, device=support.ids_AK.device) < support.count_A.unsqueeze(1)
    ids_AK = torch.where(stored_AK, support.ids_AK, support.ids_AK[:, :1]).long()
    if uniform_A is None:
        uniform_A = uniform_of(support.logsumexp_A.double().view(torch.int64), (ids_AK * stored_AK).sum(1))
    draws_A = torch.full_like(support.count_A, draws) if draws_A is None else draws_A
    ends_AV = step.weights(1.0).scatter(1, ids_AK, 0.0).double().cumsum(-1)
    draw_N = torch.arange(draws, device=ids_AK.device)
    each_A1 = draws_A.clamp(min=1).unsqueeze(1)
    points_AN = (uniform_A.unsqueeze(1) + draw_N) / each_A1 * ends_AV[:, -1:]
    drawn_AN = torch.searchsorted(ends_AV, points_AN, right=True).clamp_(max=ends_AV.shape[1] - 1)
    is_draw_AN = (draw_N < draws_A.unsqueeze(1)) & (ends_AV[:, -1:] > 0)
    first_AN = F.pad(drawn_AN[:, 1:] != drawn_AN[:, :-1], (1, 0), value=True)
    group_AN = first_AN.cumsum(1) - 1
    times_AN = torch.zeros_like(points_AN).scatter_add_(1, group_AN, is_draw_AN.double()).gather(1, group_AN)
    masses_AN = times_AN * (support.tail_A.double().unsqueeze(1) / each_A1)
    new_AN = torch.where(first_AN & is_draw_AN, masses_AN.log(), -math.inf).float()
    logprobs_AK = torch.where(stored_AK, support.logprobs_AK, -math.inf)
    logprobs_AK, order_AK = torch.cat([logprobs_AK, new_AN], 1).sort(dim=1, descending=True, stable=True)
    ids_AK = torch.cat([support.ids_AK, drawn_AN.int()], 1).gather(1, order_AK)
    count_A = (logprobs_AK > -math.inf).sum(1).int()
    tail_A = torch.where(is_draw_AN[:, 0], 0.0, support.tail_A)
    return Support(ids_AK, logprobs_AK, count_A, tail_A, support.logsumexp_A)


def _most_likely(step: StepLogits, k_max: int, tail_bound: float) -> tuple[Tensor, Tensor]:
    """Ids, most likely first, and how many of each row the tail bound asks for; on CPU most rows look at few tokens."""
    total_A1 = step.total(1.0)
    few = min(CANDIDATES, k_max) if total_A1.device.type == "cpu" else k_max
    ids_AK = step.top(few)[1][:, :k_max]
    count_A, short_A = _needed(step.weights(1.0), ids_AK, total_A1, tail_bound)
    if ids_AK.shape[1] == k_max:
        return ids_AK, count_A
    if not bool(short_A.any()):
        return F.pad(ids_AK, (0, 1)), count_A  # the spare column is for the sampled token
    hard_R = short_A.nonzero().squeeze(1)
    hard_ids_RK = top_candidates(step.logits_AV[hard_R], k_max)[1]
    ids_AK = F.pad(ids_AK, (0, k_max - ids_AK.shape[1]))
    ids_AK[hard_R] = hard_ids_RK
    count_A[hard_R] = _needed(step.weights(1.0)[hard_R], hard_ids_RK, total_A1[hard_R], tail_bound)[0]
    return ids_AK, count_A


def _needed(weights_AV: Tensor, ids_AK: Tensor, total_A1: Tensor, tail_bound: float) -> tuple[Tensor, Tensor]:
    """How many candidates bring the mass left under the bound (int64 [A], at most K), and where K are too few."""
    left_AK = total_A1 - weights_AV.gather(1, ids_AK).double().cumsum(-1)
    enough_AK = left_AK <= tail_bound * total_A1
    width = ids_AK.shape[1]
    return (width + 1 - enough_AK.sum(-1)).clamp_(max=width), ~enough_AK[:, -1]


def _with_sampled(ids_AK: Tensor, count_A: Tensor, sampled_A: Tensor, k_max: int) -> tuple[Tensor, Tensor]:
    """The support with the sampled token in it; where it was missing it comes last, being less likely than the rest."""
    inside_AK = torch.arange(ids_AK.shape[1], device=ids_AK.device) < count_A.unsqueeze(1)
    present_A = ((ids_AK == sampled_A.unsqueeze(1)) & inside_AK).any(-1)
    count_A = torch.where(present_A, count_A, (count_A + 1).clamp_(max=k_max))
    last_A1 = count_A.unsqueeze(1) - 1
    last_ids_A1 = torch.where(present_A.unsqueeze(1), ids_AK.gather(1, last_A1), sampled_A.unsqueeze(1))
    return ids_AK.scatter(1, last_A1, last_ids_A1), count_A
