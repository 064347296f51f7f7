"""Laws of the Triton kernels: the same numbers as float64 autograd, interpreted on a CPU and compiled on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.losses.divergence import DIVERGENCES
from distill.losses.fused import DenseTeacher, distill_loss
from distill.losses.head import round_in_place
from distill.losses.sparse import SparseTargets
from distill.losses.stash import GradStash

TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}  # of the norm; halves round 2^-9, 2^-12


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which has wheels for Linux alone")
@pytest.mark.parametrize("columns", [2, 16])
def test_interpreted_kernels_equal_float64_autograd(columns):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "interpreted.py"), "60", str(columns)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr[-4000:]


@pytest.mark.parametrize("tokens, hidden", [(40, 8), (40, 40), (6, 8)])
def test_the_head_gradient_grows_over_the_stash_that_it_is_made_from(tokens, hidden, monkeypatch):
    monkeypatch.setattr("distill.losses.stash.BLOCK", 4)
    stash = GradStash.empty(tokens, 50, torch.float64, torch.device("cpu"), logits_bytes=0, hidden=hidden)
    grads, states = torch.randn(tokens, 50, dtype=torch.float64), torch.randn(tokens, hidden, dtype=torch.float64)
    for first, part in stash.slices(tokens):
        part.copy_(grads[:, first : first + part.shape[1]])
    assert len(stash.slices(tokens)) == 4
    head = torch.empty(52, hidden, dtype=torch.float64)
    assert stash.holds_head_gradient(head) == (hidden <= tokens)  # else a row is longer than a column: it overtakes
    if hidden <= tokens:
        found = stash.become_head_gradient(states, 52)
        torch.testing.assert_close(found[:50], grads.T @ states)
        assert (found[50:] == 0).all() and found.data_ptr() == stash.room.data_ptr()


def test_rounding_in_place_is_rounding(monkeypatch):
    monkeypatch.setattr("distill.losses.head.ROUND_NUMBERS", 7)
    values = torch.randn(13, 5)
    expected, place = values.bfloat16(), values.data_ptr()
    found = round_in_place(values, torch.bfloat16)
    assert torch.equal(found, expected) and found.data_ptr() == place


def problem(tokens, hidden, vocab, support):
    """States, head, a teacher's states and head, labels with a third ignored, and the teacher's top tokens."""
    normal = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.float64)  # noqa: E731
    states, head = normal(tokens, hidden), normal(vocab, hidden) * (3 / hidden**0.5)
    teacher, teacher_head = normal(tokens, 32).bfloat16().double(), (normal(vocab, 32) * 0.5).bfloat16().double()
    labels = torch.randint(vocab, (tokens,), device="cuda")
    labels[torch.rand(tokens, device="cuda") < 0.3] = -100
    mass, ids = torch.softmax(teacher @ teacher_head.T, 1).topk(support)
    return states, head, teacher, teacher_head, labels, SparseTargets(ids, mass.log(), 1 - mass.sum(1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["sparse", "dense", "none"])
@pytest.mark.parametrize(
    "shape, options",
    [
        ((300, 64, 1000, 8), {}),
        ((700, 128, 50_000, 64), {"chunk_tokens": 128}),
        ((513, 256, 33_001, 5), {"softcap": 20.0, "logit_scale": 0.8, "z_loss": 1e-3, "temperature": 2.0}),
    ],
)
def test_compiled_kernels_equal_float64(shape, options, kind, dtype):
    states, head, teacher, teacher_head, labels, sparse = problem(*shape)
    count = int((labels != -100).sum())
    for divergence in DIVERGENCES if kind != "none" else ("forward_kl",):
        results = []
        for run in (torch.float64, dtype):
            x, w = (a.to(dtype).to(run).requires_grad_() for a in (states, head))
            small = run if run == torch.float64 else torch.float32
            targets = {
                "none": None,
                "dense": DenseTeacher(teacher.to(run), teacher_head.to(run)),
                "sparse": SparseTargets(sparse.ids_NK, sparse.logprobs_NK.to(small), sparse.tail_N.to(small)),
            }[kind]
            loss, metrics = distill_loss(
                x, w, labels, targets=targets, alpha=0.7 if targets else 0.0, divergence=divergence, normalizer=count,
                **options,
            )  # fmt: skip
            loss.backward()
            results.append((loss.detach().double(), metrics.as_tensor(), x.grad.double(), w.grad.double()))
        for name, limit, found, expected in zip(
            ("loss", "metrics", "states", "head"), (1e-4, 1e-3, *[TOLERANCE[dtype]] * 2), results[1], results[0]
        ):
            assert (found - expected).norm() <= limit * expected.norm(), (name, divergence)


@pytest.mark.gpu
def test_compact_sums_of_the_head_gradient_round_once_a_chunk():
    states, head, _, _, labels, sparse = problem(600, 64, 5000, 16)
    errors = []
    for accumulate in (None, torch.bfloat16):
        grads = []
        for run in (torch.float64, torch.bfloat16):
            x, w = (a.bfloat16().to(run).requires_grad_() for a in (states, head))
            more = {"chunk_tokens": 32, "accumulate": accumulate} if run == torch.bfloat16 else {}
            targets = SparseTargets(sparse.ids_NK, sparse.logprobs_NK, sparse.tail_N)
            distill_loss(x, w, labels, targets=targets, alpha=0.9, normalizer=400, **more)[0].backward()
            grads.append(w.grad.double())
        errors.append(((grads[1] - grads[0]).norm() / grads[0].norm()).item())
    assert errors[0] < 3e-3 < errors[1] < 2e-2
