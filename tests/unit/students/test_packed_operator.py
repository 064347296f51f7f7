"""The attention operator of packed rows: each trace by itself, whatever lies behind it, however the row is divided."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from launch_sequence import make_batch, make_model
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from distill.config import Train
from students import attention, packed_operator
from students.attention import LONG, how_packed, packed_attention, running_ends
from students.layers import CONTEXTS, prepare_layers
from students.packed_operator import NEVER, packed_scaled_dot_product, packed_scaled_dot_product_backward
from students.step import LossSettings, StudentStep

ROWS = [[5, 200, 3, 130, 1], [300, 129], [4, 5, 6], [128, 256, 7], [1, 400]]
THRESHOLDS = [1, 100, NEVER]  # every trace by itself, the long ones, none
SCALE = 0.3
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def drawn(lengths: list[int], heads=(4, 2), width=8, dtype=torch.float64, device="cpu") -> list[torch.Tensor]:
    """Query, key, value [N, heads, width] that want gradients, and the gradient of an output."""
    query, key, value, upstream = (
        torch.randn(sum(lengths), heads[kind], width, dtype=dtype, device=device) for kind in (0, 1, 1, 0)
    )
    return [*(x.requires_grad_() for x in (query, key, value)), upstream]


def by_operator(inputs: list[torch.Tensor], lengths: list[int], alone_from: int) -> list[torch.Tensor]:
    """Output and gradients."""
    ends = running_ends(lengths)
    out, _ = packed_scaled_dot_product(*inputs[:3], ends, ends.to(inputs[0].device), alone_from, SCALE)
    return [out, *torch.autograd.grad(out, inputs[:3], inputs[3])]


def trace_by_trace(inputs: list[torch.Tensor], lengths: list[int]) -> list[torch.Tensor]:
    """The same of torch's attention on each trace, in float64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    traces = zip(*(x[None].transpose(1, 2).split(lengths, 2) for x in wide[:3]))
    outs = [F.scaled_dot_product_attention(*each, is_causal=True, scale=SCALE, enable_gqa=True) for each in traces]
    out = torch.cat(outs, 2)[0].transpose(0, 1)
    return [out, *torch.autograd.grad(out, wide[:3], wide[3])]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("alone_from", THRESHOLDS)
@pytest.mark.parametrize("lengths", ROWS, ids=str)
def test_output_and_gradients_are_those_of_each_trace_alone(lengths, alone_from, heads):
    inputs = drawn(lengths, heads)
    for found, want in zip(by_operator(inputs, lengths, alone_from), trace_by_trace(inputs, lengths)):
        assert found.shape == want.shape and torch.allclose(found, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("alone_from", THRESHOLDS)
def test_no_trace_sees_another_however_large_its_numbers(alone_from):
    lengths = [200, 150, 90, 130]
    inputs = drawn(lengths)
    quiet = by_operator(inputs, lengths, alone_from)
    for trace, (first, last) in enumerate([(0, 200), (200, 350), (350, 440), (440, 570)]):
        loud = [1e4 * x.detach() for x in inputs]
        for x, own in zip(loud, inputs):
            x[first:last] = own[first:last].detach()
        found = by_operator([*(x.requires_grad_() for x in loud[:3]), loud[3]], lengths, alone_from)
        for one, want in zip(found, quiet):
            assert torch.allclose(one[first:last], want[first:last], rtol=1e-12, atol=1e-12), trace


def test_it_does_not_matter_how_the_inputs_lie_in_memory():
    lengths = [130, 200, 3]
    inputs = drawn(lengths)
    turned = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    found = by_operator([*(x.requires_grad_() for x in turned[:3]), turned[3]], lengths, 100)
    for one, want in zip(found, by_operator(inputs, lengths, 100)):
        assert torch.allclose(one, want, rtol=1e-12, atol=1e-14)


def test_gradients_are_the_slopes():
    lengths = [3, 1, 4]
    *inputs, _ = drawn(lengths, width=2)
    ends = running_ends(lengths)
    assert torch.autograd.gradcheck(
        lambda *x: packed_scaled_dot_product(*x, ends, ends, 3, SCALE)[0], inputs, fast_mode=True
    )


def test_the_operators_keep_torchs_rules():
    """Their shapes are known without running them, they change no input, and a compiler may place them."""
    lengths = [3, 140, 2, 2]
    *inputs, upstream = drawn(lengths)
    ends = running_ends(lengths)
    rest = (ends, ends, 100, SCALE)
    torch.library.opcheck(packed_scaled_dot_product, (*inputs, *rest))
    out, sums = packed_scaled_dot_product(*inputs, *rest)
    given = [x.detach() for x in (upstream, *inputs, out, sums)]
    torch.library.opcheck(packed_scaled_dot_product_backward, (*given, *rest))


def layer(weights: list[torch.Tensor], x_NH: torch.Tensor, **packed) -> torch.Tensor:
    query, key, value = ((x_NH @ weight).unflatten(1, (-1, 8)).transpose(0, 1)[None] for weight in weights)
    out_1NAD, _ = packed_attention(None, query, key, value, None, **packed, scaling=SCALE)
    return torch.tanh(out_1NAD[0].flatten(1))


@pytest.mark.parametrize("kept", list(CONTEXTS))
def test_recomputed_or_compiled_it_runs_once_and_is_not_compiled_for_every_row(kept, monkeypatch):
    runs = []
    one_trace = packed_operator._attention
    monkeypatch.setattr(packed_operator, "_attention", lambda *given: runs.append(1) or one_trace(*given))
    weights = [torch.randn(16, 8 * heads, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    plain = partial(layer, weights)
    recomputed = partial(checkpoint, plain, use_reentrant=False, context_fn=CONTEXTS[kept])
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(recomputed, backend="aot_eager_decomp_partition")
    for lengths in ([3, 150], [40, 2, 130, 9], [7, 7, 7], [200, 5], [1] * 9, [102, 101, 100]):
        ends = running_ends(lengths)
        x_NH = torch.randn(sum(lengths), 16, dtype=torch.float64)
        expected = None
        for run in (plain, recomputed, compiled):
            runs.clear()
            out = run(x_NH, seq_ends=ends, device_ends=ends, alone_from=100)
            found = [out, *torch.autograd.grad(out.square().sum(), weights)]
            assert len(runs) == len(lengths)
            expected = expected or found
            assert all(torch.allclose(one, want, rtol=1e-9, atol=1e-9) for one, want in zip(found, expected))
    assert counters["stats"]["unique_graphs"] == 2  # one of the first row, one of every other


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("heads", [(16, 8), (28, 4), (8, 8)], ids=str)
@pytest.mark.parametrize("lengths", [[2500, 1700, 900, 77, 1025], [1024, 1024], [1, 3000], [64, 1300, 64]], ids=str)
def test_in_bfloat16_every_way_of_dividing_a_row_errs_alike(lengths, heads):
    inputs = drawn(lengths, heads, 128, torch.bfloat16, "cuda")
    want = trace_by_trace(inputs, lengths)
    errors = {}
    for alone_from in (1, LONG, NEVER):
        found = by_operator(inputs, lengths, alone_from)
        errors[alone_from] = [float((one - other).norm() / other.norm()) for one, other in zip(found, want)]
    flash = errors.pop(NEVER)
    for found in errors.values():
        assert all(error < 1.2 * usual + 1e-4 and usual < 0.01 for error, usual in zip(found, flash)), (found, flash)


@pytest.mark.gpu
@needs_gpu
def test_parts_side_by_side_never_share_memory():
    """Rows one after the other, with other work between that takes and frees memory: always the same numbers."""
    lengths = [1500, 1100, 1030, 2000, 1300, 40, 300]
    inputs = drawn(lengths, (16, 8), 128, torch.bfloat16, "cuda")
    first = by_operator(inputs, lengths, LONG)
    for _ in range(30):
        noise = torch.full((sum(lengths), 16, 128), float("nan"), dtype=torch.bfloat16, device="cuda")
        found = by_operator(inputs, lengths, LONG)
        del noise
        for number in (0, 2, 3):  # the kernels add up the gradient of queries in any order
            assert torch.equal(found[number], first[number])
        assert (found[1] - first[1]).norm() < 1e-3 * first[1].norm()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("width", [8, 64, 128, 256])
def test_a_row_on_the_gpu_is_told_of_its_traces_on_both_sides(width):
    lengths = [1500, 30]
    packed = how_packed(lengths, torch.device("cuda"), torch.bfloat16)
    assert packed["seq_ends"].device.type == "cpu" and packed["device_ends"].device.type == "cuda"
    assert packed["alone_from"] == (LONG if torch.cuda.get_device_capability()[0] == 9 else NEVER)
    inputs = drawn(lengths, (4, 2), width, torch.bfloat16, "cuda")
    rows = [x[None].transpose(1, 2) for x in inputs[:3]]
    out, _ = packed_attention(None, *rows, None, **packed, scaling=SCALE)
    found = [out[0], *torch.autograd.grad(out[0], inputs[:3], inputs[3])]
    for one, want in zip(found, trace_by_trace(inputs, lengths)):
        assert (one - want).norm() < 0.01 * want.norm()


@pytest.mark.gpu
@needs_gpu
def test_compiled_and_recomputed_layers_on_long_traces_err_as_plain_ones(monkeypatch):
    """Over rows of other lengths, against float32 steps on the same weights."""

    def gradients(dtype: torch.dtype, long: int, **settings) -> list[torch.Tensor]:
        monkeypatch.setattr(attention, "LONG", long)
        attention._alone_from.cache_clear()
        torch.manual_seed(0)
        model = make_model("qwen3", 8, 4).to("cuda", dtype)
        prepare_layers(model, Train(**settings), torch.device("cuda"))
        step, found = StudentStep(model, LossSettings()), []
        for lengths in ([1500, 1100, 30], [1300, 1300, 1025, 5], [600, 3]):
            step.zero_grad()
            batch = make_batch(lengths, "none").to(torch.device("cuda"))
            step(batch, float(sum(lengths)))[0].backward()
            found += [p.grad.float() for p in step.parameters()]
        attention._alone_from.cache_clear()
        return found

    want = gradients(torch.float32, NEVER, compile="off")
    plain = gradients(torch.bfloat16, NEVER, compile="off")
    for kept in CONTEXTS:
        settings = {"compile": "on", "activation_checkpointing": True, "kept_activations": kept}
        for one, usual, right in zip(gradients(torch.bfloat16, 1024, **settings), plain, want):
            assert (one - right).norm() < 1.5 * (usual - right).norm() + 0.01 * right.norm()
