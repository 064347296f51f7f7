"""Scores do not depend on who shares a beginning, what is shared is computed once, and tails are drawn from."""

import itertools

import numpy as np
import pytest
import torch
from sampling_models import STOPS, VOCAB, deepseek, generator, llama, qwen3, requests

from distill.errors import DataError
from distill.records import CaptureSpec, SamplingParams, TokenDists
from distill.sampling import StepLogits, Support, capture_support, draw_tail
from teachers.dense import DenseRunner
from teachers.runner import Runner
from teachers.sampler import PagedGenerator
from teachers.scoring import Family, Scorer, families
from teachers.tail import support_of, with_draws

torch.set_num_threads(1)
SPEC, DRAWN = CaptureSpec(16, 1e-2), CaptureSpec(5, 1e-2, tail_draws=3)


class Counting(Runner):
    """A runner that knows how many tokens it prefilled."""

    tokens = 0

    def prefill(self, ids_T, *args):
        self.tokens += len(ids_T)
        return super().prefill(ids_T, *args)


@pytest.fixture(scope="module")
def runner():
    return Counting(deepseek())


def some(tokens: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(20, VOCAB, tokens).tolist())


def same(one: TokenDists, other: TokenDists) -> bool:
    exact = all(np.array_equal(getattr(one, n), getattr(other, n)) for n in ("offsets_T1", "ids_S", "sampled_T"))
    close = {"logprobs_S": 1e-4, "tail_T": 1e-5, "logsumexp_T": 1e-4}
    return exact and all(np.allclose(getattr(one, n), getattr(other, n), atol=a) for n, a in close.items())


PAIRS = [
    (some(90, 0), some(5, 10)),
    (some(60, 1), some(9, 11)),
    (some(90, 0), some(30, 12)),
    (some(90, 0), some(1, 13)),
    (some(50, 2) + some(7, 3), some(4, 14)),
    (some(50, 2) + some(20, 4), some(3, 15)),
    (some(60, 1), ()),
    ((3,), some(9, 16)),
    (some(90, 0), some(90, 0)[:3]),
    (some(40, 5), some(40, 6)),
]


@pytest.mark.parametrize("tokens", [16384, 100, 10])
def test_scores_are_those_of_sequences_alone_and_of_the_loop_over_slots(runner, tokens, monkeypatch):
    monkeypatch.setattr("teachers.scoring.SCORE_TOKENS", tokens)
    monkeypatch.setattr("teachers.scoring.SCORE_LOGITS_CPU", 4 * VOCAB)
    scorer = Scorer(runner, 8)
    found = scorer.score(PAIRS, SPEC)
    assert scorer.shared_tokens == 3 * 89 + 59 + 50
    wanted = generator(deepseek(), 2).score(PAIRS, SPEC)
    for (_, completion), one, other, pair in zip(PAIRS, found, wanted, PAIRS, strict=True):
        assert len(one) == len(completion) and same(one, other) and same(one, Scorer(runner, 8).score([pair], SPEC)[0])


@pytest.mark.parametrize("make", [qwen3, llama])
def test_dense_models_share_alike(make):
    scorer = Scorer(DenseRunner(make()), 8)
    for one, other in zip(scorer.score(PAIRS, SPEC), generator(make(), 2).score(PAIRS, SPEC), strict=True):
        assert same(one, other)
    assert scorer.shared_tokens == 3 * 89 + 59 + 50


def test_shared_tokens_go_through_the_model_once(runner):
    scorer, before = Scorer(runner, 8), runner.tokens
    scorer.score(PAIRS, SPEC)
    assert runner.tokens - before == sum(map(len, itertools.chain(*PAIRS))) - scorer.shared_tokens
    before = runner.tokens
    scorer.score([PAIRS[0]] * 4, SPEC)
    assert runner.tokens - before == 89 + 4 * (1 + 5)


def test_samples_of_a_prompt_score_as_they_were_captured(runner):
    loop = PagedGenerator(runner, 9, STOPS, page_tokens=8)
    asked = [request for request in requests(3, 3) if len(request.prompt_ids) > 5]
    samples = {(s.key, s.sample_index): s for s in loop.sample(asked, SamplingParams(0.9, 0.95, 0, 24), SPEC)}
    pairs = [(request.prompt_ids, samples[request.key, request.sample_index].completion_ids) for request in asked]
    for request, scored in zip(asked, loop.score(pairs, SPEC), strict=True):
        assert same(scored, samples[request.key, request.sample_index].dists)


def test_families_take_who_saves_more_than_it_costs():
    prompt, system = tuple(range(100)), tuple(range(200, 240))
    ids = [(*prompt, 1), (*prompt, 2), (*prompt[:51], 3, 4), (*system, 5, 6), (*system, 7, 8), (9,) * 60]
    found = families(ids)
    # The third shares half of the prompt: 2 x 51 tokens are no less than 1 x 100, so all three share 51.
    assert sorted((sorted(f.members), f.shared) for f in found) == [([0, 1, 2], 51), ([3, 4], 40), ([5], 0)]
    found = families([*ids[:2], (*prompt[:40], 3, 4)])
    assert sorted((sorted(f.members), f.shared) for f in found) == [([0, 1], 100), ([2], 0)]


def test_the_last_token_of_a_prompt_is_never_shared():
    # What follows it is scored, so every member must compute it.
    prompt = tuple(range(50))
    assert families([prompt, prompt]) == [Family([0, 1], 49)]
    assert families([prompt[:40], prompt]) == [Family([0, 1], 39)]
    assert families([list(prompt[:33]), prompt]) == [Family([0, 1], 32)]
    assert [f.shared for f in families([prompt[:32], prompt])] == [0, 0]  # 31 tokens are not worth a pass


def test_random_families_cover_every_sequence_once_with_a_common_beginning():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = [
            tuple(rng.integers(0, 2, 3).repeat(20).tolist()) + tuple(rng.integers(0, 9, 5).tolist()) for _ in range(12)
        ]
        prompts = [one[: int(rng.integers(1, len(one)))] for one in ids]
        found = families(prompts)
        assert sorted(i for family in found for i in family.members) == list(range(12))
        for family in found:
            assert len({prompts[i][: family.shared] for i in family.members}) == 1
            assert all(family.shared < len(prompts[i]) for i in family.members)
            assert family.shared >= 32 if len(family.members) > 1 else family.shared == 0


def test_bad_sequences_are_named_before_their_pass(runner):
    before = runner.tokens
    with pytest.raises(DataError, match="no tokens"):
        Scorer(runner, 8).score([PAIRS[0], ((), (1,))], SPEC)
    with pytest.raises(DataError, match="outside"):
        Scorer(runner, 8).score([PAIRS[0], ((1,), (VOCAB,))], SPEC)
    with pytest.raises(DataError, match="outside"):
        Scorer(runner, 8).score([((VOCAB,) * 40, (1,))] * 2, SPEC)
    assert runner.tokens == before and Scorer(runner, 8).score([], SPEC) == []


# ---- tails -----------------------------------------------------------------------------------------------------------


def masses(dists: TokenDists) -> np.ndarray:
    """Stored mass of every position."""
    return np.add.reduceat(np.exp(dists.logprobs_S.astype(np.float64)), dists.offsets_T1[:-1])


def test_draws_from_tails_are_scored_and_captured_whole(runner):
    loop = PagedGenerator(runner, 9, STOPS)
    for scored in loop.score([pair for pair in PAIRS if pair[1]], DRAWN):
        assert np.allclose(masses(scored), 1, atol=1e-5) and not scored.tail_T.any()
    asked, params = requests(3, 3), SamplingParams(0.9, 0.95, 0, 24)
    bare = {(s.key, s.sample_index): s for s in loop.sample(asked, params, CaptureSpec(5, 1e-2))}
    longest = 0
    for sample in loop.sample(asked, params, DRAWN):
        plain = bare[sample.key, sample.sample_index]
        assert sample.completion_ids == plain.completion_ids
        assert np.allclose(masses(sample.dists), 1, atol=1e-5) and not sample.dists.tail_T.any()
        assert (masses(plain.dists) < 1 - 1e-3).any()
        counts = np.diff(sample.dists.offsets_T1)
        assert (counts <= 5 + 3).all() and (counts >= np.diff(plain.dists.offsets_T1)).all()
        longest = max(longest, counts.max())
    assert longest == 8  # three draws beside five entries: no row is cut to k_max


def packed_of(support: Support, tokens_A: torch.Tensor) -> torch.Tensor:
    """What the kernel leaves: int32 [A, 4 + 2K], zeros after each support."""
    stored = torch.arange(support.ids_AK.shape[1]) < support.count_A.unsqueeze(1)
    bits = lambda floats: floats.contiguous().view(torch.int32)  # noqa: E731
    columns = [tokens_A.int(), support.count_A, bits(support.tail_A), bits(support.logsumexp_A)]
    parts = [torch.stack(columns, 1), support.ids_AK * stored, bits(support.logprobs_AK * stored)]
    return torch.cat(parts, 1)


def test_draws_on_packed_results_are_those_of_distill_sampling():
    logits, tokens = torch.randn(7, 300) * 2, torch.arange(7)
    support = capture_support(StepLogits(logits), tokens, CaptureSpec(16, 1e-2))
    packed = packed_of(support, tokens)
    draws = torch.tensor([0, 1, 2, 3, 4, 4, 0], dtype=torch.int32)
    found_AW = with_draws(packed, logits, 4, draws)
    assert found_AW.shape == (7, 4 + 2 * (support.ids_AK.shape[1] + 4)) and torch.equal(found_AW[:, 0], tokens.int())
    found = support_of(found_AW)
    for row, count in enumerate(draws.tolist()):
        one = Support(*(part[row : row + 1] for part in vars(support).values()))
        wanted = draw_tail(StepLogits(logits[row : row + 1]), one, count) if count else one
        size = int(wanted.count_A)
        assert int(found.count_A[row]) == size
        assert found.ids_AK[row, :size].tolist() == wanted.ids_AK[0, :size].tolist()
        assert torch.equal(found.logprobs_AK[row, :size], wanted.logprobs_AK[0, :size])
        assert found.tail_A[row] == wanted.tail_A[0] and not found.ids_AK[row, size:].any()
    whole = support_of(with_draws(packed, logits, 4))
    assert not whole.tail_A.any()


def test_rows_with_different_draws_capture_what_they_capture_alone(runner):
    from test_scheduler import drive

    from distill.generate import Row

    specs = [None, DRAWN, CaptureSpec(20, 1e-3), CaptureSpec(3, 0.1, tail_draws=6)]
    params = SamplingParams(0.9, 0.95, 0, 12)
    rows = [Row(request, params, specs[i % 4]) for i, request in enumerate(requests(8, 1))]
    with PagedGenerator(runner, 8, STOPS).rows() as loop:
        owners = loop.admit(rows)
        told = drive(loop, [])
    for owner, row in zip(owners, rows):
        (alone,) = PagedGenerator(runner, 1, STOPS).sample([row.request], params, row.capture)
        (drawn,) = told[owner]
        assert drawn.token_ids == alone.completion_ids
        if row.capture is None:
            assert drawn.dists is None
        else:  # a draw's random number is a hash of the logsumexp, whose last bit may differ: masses do not
            assert np.allclose(masses(drawn.dists) + drawn.dists.tail_T, 1, atol=1e-5)
            assert bool(row.capture.tail_draws) == (not drawn.dists.tail_T.any())
