"""What layers keep for the backward pass, in host memory and in tiles: the same gradients in less of a GPU's memory."""

import pytest
import torch
from launch_sequence import make_batch, make_model

from distill.config import Train
from students.layers import prepare_layers
from students.step import LossSettings, StudentStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOKENS = 256 * 256


@pytest.fixture(scope="module")
def batch():
    return make_batch([256] * (TOKENS // 256), "none").to(torch.device("cuda"))


def gradients(batch, **settings) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of the same model, and the bytes that forward and backward took at most."""
    torch.manual_seed(0)
    model = make_model("qwen3", 8, 4, layers=6).to("cuda", torch.bfloat16)
    prepare_layers(model, Train(**settings), torch.device("cuda"))
    step = StudentStep(model, LossSettings())
    for _ in range(2):  # the first compiles
        step.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, _ = step(batch, float(TOKENS))
        loss.backward()
        torch.cuda.synchronize()
    return {name: p.grad for name, p in step.named_parameters()}, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("compile_", ["on", "off"])
def test_gradients_stay_and_memory_falls(batch, compile_):
    plain, most = gradients(batch, compile=compile_, activation_checkpointing=True)
    host, less = gradients(batch, compile=compile_, activation_checkpointing=True, activation_offload=True)
    tiled, _ = gradients(batch, compile=compile_, activation_checkpointing=True, mlp_tiles=4)
    input_bytes = TOKENS * 64 * 2
    assert less < most - 4 * input_bytes  # of six layers' inputs and more
    for name, want in plain.items():
        assert torch.equal(host[name], want), name
        assert (tiled[name] - want).abs().max() <= 0.02 * want.abs().max(), name


def test_nothing_recomputed_also_waits_in_host_memory(batch):
    plain, most = gradients(batch, compile="on")
    host, less = gradients(batch, compile="on", activation_offload=True)
    assert less < 0.7 * most
    assert all(torch.equal(host[name], want) for name, want in plain.items())
