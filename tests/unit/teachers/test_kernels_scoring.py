"""The search for candidates, and assignments grouped by expert, against plain sorts on fresh random inputs.

Runs where there is a CUDA device; with TRITON_INTERPRET=1 and Triton installed also on a CPU.
"""

import os

import pytest
import torch

from distill.records import CaptureSpec
from distill.sampling import StepLogits, capture_support
from teachers.steps import unpack

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from teachers.kernels import candidates, draw, grouping  # noqa: E402

VOCABS = [(9001, 64)] if INTERPRETED else [(9001, 64), (20_000, 128), (129_280, 64), (129_280, 256)]


def hard_logits(vocab: int) -> torch.Tensor:
    """Rows of all kinds: flat, peaked, a few ties, ties everywhere, sorted, in one column, constant."""
    logits = torch.randn(8, vocab) * 3
    logits[1] *= 8
    logits[2, 100:250] = 7.0
    logits[3] = (torch.arange(vocab) % 3).float()
    logits[4] = torch.arange(vocab) / vocab
    width = candidates.columns_of(vocab, 64)
    logits[5, 7::width] += 50  # the most likely tokens stand in one column
    logits[6] = 2.5
    logits[7, : vocab // 2] = -1e4
    return logits.to(DEVICE)


@pytest.mark.parametrize("few", [0, 256])
@pytest.mark.parametrize(("vocab", "k"), VOCABS)
def test_candidates_are_the_most_likely_and_the_rest_is_all_others(vocab, k, few, monkeypatch):
    monkeypatch.setattr(candidates, "FEW", few)  # how many rows are sorted whole
    logits = hard_logits(vocab)
    values, ids, rest, ties = candidates.search(logits, k, candidates.columns_of(vocab, k), with_rest=True)
    wanted = logits.topk(k).values
    assert torch.equal(values, wanted) and torch.equal(logits.gather(1, ids.long()), wanted)
    assert all(len(set(row)) == k for row in ids.tolist())
    masses = (logits - wanted[:, :1]).double().clamp(min=-87).exp().scatter(1, ids.long(), 0.0).sum(1)
    assert torch.allclose(rest, masses, rtol=2e-6)
    assert torch.equal(ties.long(), (values == values[:, -1:]).sum(1))
    again = candidates.search(logits, k, candidates.columns_of(vocab, k), with_rest=False)
    assert torch.equal(again[0], values) and torch.equal(again[1], ids)


@pytest.mark.parametrize("spec", [CaptureSpec(64, 1e-3), CaptureSpec(5, 1e-2), CaptureSpec(100, 0.3)])
def test_capture_without_a_draw_is_the_law_of_distill_sampling(spec, monkeypatch):
    monkeypatch.setattr(candidates, "FEW", 0)
    logits = hard_logits(9001)[[0, 1, 2, 5, 7]]
    tokens = torch.tensor([5, 17, 150, 7, 9000], dtype=torch.int32, device=DEVICE)
    column = lambda value, dtype: torch.full((5,), value, dtype=dtype, device=DEVICE)  # noqa: E731
    how = draw.HowCaptured(column(spec.k_max, torch.int32), column(spec.tail_bound, torch.float32))
    drawn, found = unpack(draw.step(logits, tokens, None, how, draw.width(spec.k_max, 9001)).cpu())
    wanted = capture_support(StepLogits(logits.cpu()), tokens.cpu().long(), spec)
    assert drawn.tolist() == tokens.tolist() and found.count_A.tolist() == wanted.count_A.tolist()
    assert torch.allclose(found.logsumexp_A, wanted.logsumexp_A, atol=1e-5, rtol=1e-6)
    assert torch.allclose(found.tail_A, wanted.tail_A, rtol=1e-5, atol=1e-37)
    for row, count in enumerate(found.count_A.tolist()):
        ids = found.ids_AK[row, :count].long()
        assert tokens[row] in ids.to(DEVICE)
        exact = logits[row].cpu().double().log_softmax(-1)[ids]
        assert torch.allclose(found.logprobs_AK[row, :count].double(), exact, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(5, 2, 8, 16), (900, 6, 64, 128), (700, 8, 200, 64), (300, 1, 2, 128)])
def test_grouping_is_a_stable_sort_cut_into_blocks(sizes):
    tokens, top_k, experts, block_m = sizes
    chosen = torch.rand(tokens, experts).topk(top_k).indices.int()
    chosen[tokens // 2 : tokens // 2 + 3] = experts  # tokens of nobody
    rows, expert_of, start_of, size_of, count = (
        part.cpu().long() for part in grouping.by_expert(chosen.to(DEVICE), experts, block_m)
    )
    flat = chosen.flatten().long()
    kept = int((flat < experts).sum())
    assert torch.equal(rows[:kept], flat.sort(stable=True).indices[:kept])
    at = 0
    for item in range(int(count)):
        start, size = int(start_of[item]), int(size_of[item])
        assert start == at and 0 < size <= block_m  # stretches follow one another and leave nothing out
        assert (flat[rows[start : start + size]] == expert_of[item]).all()
        at += size
    assert at == kept
