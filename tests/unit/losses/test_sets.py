"""The loss taken apart by set: each entry is the loss of that set's tokens alone, and together they are the loss."""

import pytest
import torch

from distill.losses.fused import DenseTeacher, distill_loss
from distill.losses.sparse import SparseTargets

TOKENS, HIDDEN, VOCABULARY, SETS = 37, 8, 50, 3
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])


def make_case(kind: str, device: str) -> tuple[tuple, dict]:
    hidden = torch.randn(TOKENS, HIDDEN, device=device, requires_grad=True)
    head = torch.randn(VOCABULARY, HIDDEN, device=device, requires_grad=True)
    labels = torch.randint(VOCABULARY, (TOKENS,), device=device)
    labels[::7] = -100
    settings = {"normalizer": 31.0, "weights_N": torch.rand(TOKENS, device=device), "z_loss": 1e-3}
    if kind != "text":
        settings["alpha"] = torch.rand(TOKENS)
    if kind in ("sparse", "reverse"):
        mass = torch.softmax(torch.randn(TOKENS, 5, device=device), 1) * 0.9
        ids = torch.stack([torch.randperm(VOCABULARY, device=device)[:5] for _ in range(TOKENS)])
        settings |= {"targets": SparseTargets(ids, mass.log(), 1 - mass.sum(1))}
        settings["divergence"] = "reverse_kl" if kind == "reverse" else "forward_kl"
    if kind == "dense":
        more = (torch.randn(n, 6, device=device) for n in (TOKENS, VOCABULARY))
        settings |= {"targets": DenseTeacher(*more)}
    return (hidden, head, labels), settings


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("chunk_tokens", [None, 5])
@pytest.mark.parametrize("kind", ["text", "sparse", "reverse", "dense"])
def test_each_set_has_the_loss_of_its_tokens_alone(kind, chunk_tokens, device):
    (hidden, head, labels), settings = make_case(kind, device)
    set_N = torch.randint(SETS, (TOKENS,), device=device)
    sums_S = torch.zeros(SETS, dtype=torch.float64, device=device)
    plain, _ = distill_loss(hidden, head, labels, **settings, chunk_tokens=chunk_tokens)
    expected_grads = torch.autograd.grad(plain, (hidden, head))
    loss, _ = distill_loss(
        hidden, head, labels, **settings, chunk_tokens=chunk_tokens, set_N=set_N, set_losses_S=sums_S
    )
    for found, expected in zip(torch.autograd.grad(loss, (hidden, head)), expected_grads):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)  # taking it apart changes nothing
    assert sums_S.sum().item() == pytest.approx(loss.item(), rel=1e-5)
    for number in range(SETS):
        alone = torch.where(set_N == number, labels, -100)
        own, _ = distill_loss(hidden, head, alone, **settings)
        assert sums_S[number].item() == pytest.approx(own.item(), rel=1e-4, abs=1e-6)
