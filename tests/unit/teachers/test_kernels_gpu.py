"""Every kernel against float64 on fresh random inputs, at sizes with remainders; outputs are poisoned before.

Runs where there is a CUDA device; with TRITON_INTERPRET=1 and Triton installed also on a CPU, in float32.
"""

import math
import os

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distill.records import CaptureSpec, SamplingParams
from distill.sampling import StepLogits, capture_support, draw, uniform
from teachers import plain
from teachers.scaled import BLOCK, FLOAT8, ScaledWeights
from teachers.steps import unpack

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from teachers.kernels import draw as draw_kernels  # noqa: E402
from teachers.kernels import elementwise, mla, moe, route  # noqa: E402


def randn(*shape, dtype=torch.float32, scale=1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative distance; a NaN never passes."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    distance = ((found - wanted).norm() / wanted.norm()).item()
    return distance if math.isfinite(distance) else math.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 100, 2048])
@pytest.mark.parametrize("parts", [(False, 0), (True, 0), (True, 3), (False, 6)])
def test_add_norm(dtype, size, parts):
    has_delta, k = parts
    residual, weight = randn(5, size, dtype=dtype), randn(size, dtype=dtype)
    delta = randn(5, size, dtype=dtype) if has_delta else None
    routed = randn(5, k, size, dtype=dtype) if k else None
    total = residual.double() + (delta.double() if has_delta else 0)
    if k:
        total[:4] += routed[:4].double().sum(1)
        routed[4] = math.nan  # a row that is not active has no experts
    wanted = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
    active = torch.tensor([4], dtype=torch.int32, device=DEVICE)
    found = elementwise.add_norm(residual, delta, routed, active, weight, 1e-6)
    assert error(found, wanted) < TOLERANCE[dtype] and error(residual, total) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [96, 2816, 5000])
def test_silu_mul(dtype, width):
    gate_up = randn(7, 2 * width, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert error(elementwise.silu_mul(gate_up), F.silu(gate) * up) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("sizes", [(4, 12, 8, 16), (16, 128, 64, 512), (3, 32, 16, 64)])
def test_rope_and_cache_writes_queries_latents_and_the_page(dtype, interleaved, sizes):
    heads, content, rotary, rank = sizes
    tokens, page = 9, 4
    projected = randn(tokens, heads * (content + rotary) + rank + rotary, dtype=dtype)
    query = projected[:, : heads * (content + rotary)].unflatten(1, (heads, -1))
    latent, weight = projected[:, heads * (content + rotary) :], randn(rank, dtype=dtype)
    angles = torch.rand(50, rotary // 2, device=DEVICE) * 6
    tables, positions = (angles.cos(), angles.sin()), torch.randint(0, 50, (tokens,), device=DEVICE).int()
    slots = torch.randperm(5 * page)[:tokens].to(DEVICE)
    wide = (
        query.double(),
        latent.double(),
        positions.long(),
        slots,
        tuple(t.double() for t in tables),
        weight.double(),
    )
    wanted = [torch.full(shape, 7.0, dtype=torch.float64, device=DEVICE) for shape in (
        (tokens, heads, rotary), (tokens, rank + rotary), (5, page, rank + rotary))]  # fmt: skip
    plain.rope_and_cache(*wide, 1e-6, *wanted, interleaved=interleaved)
    pool, entries = torch.full_like(wanted[2], 7.0).to(dtype), torch.full_like(wanted[1], math.nan).to(dtype)
    elementwise.rope_and_cache(
        query, latent, positions, slots, tables, weight, 1e-6, query[..., content:], entries, pool,
        interleaved=interleaved,
    )  # fmt: skip
    for found, expected in zip((query[..., content:], entries, pool), wanted):
        assert error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [1, 10_000])
@pytest.mark.parametrize("sizes", [(4, 16, 16, 16), (16, 64, 512, 64), (40, 64, 64, 16)])
def test_mla_decode_is_softmax_attention_over_the_pages(dtype, programs, sizes, monkeypatch):
    heads, page, rank, rotary = sizes
    monkeypatch.setattr(mla.TILES, "programs", programs)
    lengths = [0, 1, page - 1, page, 3 * page + 5, 200] if not INTERPRETED else [0, page - 1, 2 * page + 5]
    most = max(lengths) // page + 1
    pool = randn(len(lengths) * most + 1, page, rank + rotary, dtype=dtype)
    tables = (1 + torch.randperm(len(lengths) * most)).view(len(lengths), most).int().to(DEVICE)
    query = randn(len(lengths), heads, rank + rotary, dtype=dtype)
    lengths_A = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    found = mla.mla_decode(query, pool, tables, lengths_A, rank, 0.05)
    for row, length in enumerate(lengths):
        latents = pool[tables[row].long()].flatten(0, 1)[: length + 1].double()
        weights = (query[row].double() @ latents.t() * 0.05).softmax(-1)
        assert error(found[row], weights @ latents[:, :rank]) < TOLERANCE[dtype]


ROUTERS = [
    {"top_k": 2, "groups": 2, "top_groups": 1, "normed": True, "scale": 1.0},
    {"top_k": 6, "groups": 1, "top_groups": 1, "normed": True, "scale": 2.5},
    {"top_k": 4, "groups": 4, "top_groups": 2, "normed": False, "scale": 1.5},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("router", ROUTERS)
def test_route_chooses_as_the_fp32_router_of_the_reference(dtype, router):
    x, gate, bias = randn(37, 200, dtype=dtype), randn(16, 200, dtype=dtype, scale=0.1), randn(16, scale=0.1)
    active = torch.tensor([30], dtype=torch.int32, device=DEVICE)
    wanted_ids, wanted_weights = plain.route(x.double().float(), gate, bias, active, **router)
    ids, weights = route.route(x, gate, bias, active, **router)
    assert (ids[30:] == 16).all() and ids[:30].max() < 16
    order, wanted_order = ids.argsort(1), wanted_ids.argsort(1)
    assert torch.equal(ids.gather(1, order), wanted_ids.gather(1, wanted_order))
    assert error(weights.gather(1, order)[:30], wanted_weights.gather(1, wanted_order)[:30]) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 64] if INTERPRETED else [1, 5, 64, 300, 1500])
@pytest.mark.parametrize("sizes", [(8, 2, 64, 32), (16, 6, 200, 104)])
def test_experts_equal_each_choice_alone(dtype, tokens, sizes):
    count, top_k, size, width = sizes
    x, gate_up = randn(tokens, size, dtype=dtype), randn(count, 2 * width, size, dtype=dtype, scale=0.1)
    down = randn(count, size, width, dtype=dtype, scale=0.1)
    chosen = torch.rand(tokens, count - 1).topk(top_k).indices.int().to(DEVICE)  # the last expert gets no token
    weight = torch.rand(tokens, top_k, device=DEVICE)
    found = moe.experts(x, moe.group(chosen, gate_up), weight, gate_up, down)
    gate, up = torch.einsum("te,tkfe->tkf", x.double(), gate_up.double()[chosen.long()]).chunk(2, -1)
    wanted = torch.einsum("tkf,tkef->tke", F.silu(gate) * up, down.double()[chosen.long()]) * weight.unsqueeze(-1)
    assert error(found, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40] if INTERPRETED else [1, 40, 300, 1500])
@pytest.mark.parametrize("sizes", [(8, 2, 256, 128), (16, 6, 200, 144)])
def test_experts_in_fp8_equal_the_widened_ones(dtype, tokens, sizes):
    count, top_k, size, width = sizes
    gate_up, down = scaled(count, 2, width, size), scaled(count, 1, size, width)
    x, weight = randn(tokens, size, dtype=dtype), torch.rand(tokens, top_k, device=DEVICE)
    chosen = torch.rand(tokens, count - 1).topk(top_k).indices.int().to(DEVICE)
    found = moe.experts(x, moe.group(chosen, gate_up), weight, gate_up, down)
    exact = gate_up.widened(torch.float64), down.widened(torch.float64)
    wanted = plain.experts(x.double(), plain.group(chosen, gate_up), weight.double(), *exact)
    assert error(found, wanted) < TOLERANCE[dtype]


def scaled(experts: int, parts: int, rows: int, columns: int) -> ScaledWeights:
    """Random e4m3 weights with a factor of its own for every block."""
    values = randn(experts, parts, rows, columns, scale=100.0).clamp(-448, 448).to(FLOAT8)
    blocks = (experts, parts, -(-rows // BLOCK), -(-columns // BLOCK))
    return ScaledWeights(values, torch.rand(blocks, device=DEVICE) * 2e-3 + 1e-4)


@pytest.mark.parametrize("parts", [1, 2])
def test_widening_is_one_product_a_weight(parts):
    weights = scaled(3, parts, 200, 144)
    dtype = DTYPES[-1]  # an interpreted kernel cuts digits off where a compiled one rounds
    assert torch.equal(moe.widen(weights, dtype), weights.widened(dtype))


@pytest.mark.parametrize("tokens", [3, 900])
def test_work_covers_every_assignment_of_an_expert_once(tokens):
    if INTERPRETED and tokens > 100:
        tokens = 60
    chosen = torch.rand(tokens, 17).topk(6).indices.int().to(DEVICE)  # 16: no expert
    work = moe.group(chosen, torch.empty(16, 2, 2, dtype=DTYPES[-1]))
    seen = {}
    for item in range(int(work.count_1)):
        start, size, expert = (int(part[item]) for part in (work.start_W, work.size_W, work.expert_W))
        assert size > 0
        seen.setdefault(expert, []).extend(work.rows_A[start : start + size].tolist())
    flat = chosen.flatten().cpu()
    for expert in range(16):
        assert sorted(seen.get(expert, [])) == torch.nonzero(flat == expert).flatten().tolist()


PARAMS = [
    SamplingParams(0.0, 1.0, 0),
    SamplingParams(1.0, 1.0, 0),
    SamplingParams(0.7, 0.9, 0),
    SamplingParams(1.3, 1.0, 20),
    SamplingParams(0.9, 0.8, 50),
    SamplingParams(0.9, 0.999, 0),
    SamplingParams(0.8, 1.0, 0, min_p=0.05),
    SamplingParams(1.5, 0.97, 0, min_p=0.001),
    SamplingParams(1.0, 0.0, 0),
    SamplingParams(1.0, 1.0, 64, min_p=0.2),
]


def drawn_by_kernels(logits, params, capture, seeds, positions):
    rows = len(logits)
    column = lambda value, dtype: torch.full((rows,), value, dtype=dtype, device=DEVICE)  # noqa: E731
    how = draw_kernels.HowDrawn(
        seeds, positions, column(params.temperature, torch.float32), column(params.top_p, torch.float32),
        column(params.top_k, torch.int32), column(params.min_p, torch.float32),
    )  # fmt: skip
    spec = capture and draw_kernels.HowCaptured(
        column(capture.k_max, torch.int32), column(capture.tail_bound, torch.float32)
    )
    tokens = column(-1, torch.int32)
    k = draw_kernels.width(max(params.top_k, capture.k_max if capture else 0), logits.shape[1])
    packed = draw_kernels.step(logits, tokens, how, spec, k)
    assert torch.equal(packed[:, 0], tokens)
    return unpack(packed.cpu())


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("scale", [0.9, 3.0, 12.0])
@pytest.mark.parametrize("vocab", [700, 9001] if INTERPRETED else [700, 9001, 129_280])
def test_draw_is_the_law_of_distill_sampling(params, scale, vocab):
    rows = 4 if INTERPRETED else 64
    whole = torch.full((rows, vocab + 5), math.nan, device=DEVICE)  # rows of a head with padding
    logits = whole[:, :vocab]
    logits.copy_(randn(rows, vocab, scale=scale))
    seeds, positions = torch.randint(1 << 62, (rows,)).to(DEVICE), torch.randint(1000, (rows,)).int().to(DEVICE)
    tokens, support = drawn_by_kernels(logits, params, None, seeds, positions)
    assert support is None
    u = torch.from_numpy(uniform(seeds.cpu().numpy(), positions.cpu().numpy()))
    wanted = draw(StepLogits(logits.cpu()), u, params)
    differ = (torch.from_numpy(tokens) != wanted).sum().item()
    assert differ <= (1 if vocab > 100_000 else 0)  # of 64: ids of 1e-5 each, sums that agree to about 1e-8


@pytest.mark.parametrize("spec", [CaptureSpec(64, 1e-3), CaptureSpec(5, 1e-2), CaptureSpec(100, 0.3)])
@pytest.mark.parametrize("scale", [0.9, 6.0, 40.0])
def test_capture_is_the_law_of_distill_sampling(spec, scale):
    rows, vocab = 4 if INTERPRETED else 64, 9001
    logits = randn(rows, vocab, scale=scale)
    logits[0] = torch.arange(vocab, device=DEVICE) % 3  # a third of the vocabulary is tied with the most likely token
    seeds, positions = torch.randint(1 << 62, (rows,)).to(DEVICE), torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    tokens, found = drawn_by_kernels(logits, SamplingParams(1.5, 1.0, 0), spec, seeds, positions)
    wanted = capture_support(StepLogits(logits.cpu()), torch.from_numpy(tokens).long(), spec)
    exact = logits.cpu().double().log_softmax(-1)
    assert found.count_A.tolist() == wanted.count_A.tolist()
    assert torch.allclose(found.logsumexp_A, wanted.logsumexp_A, atol=1e-5, rtol=1e-6)
    for row, count in enumerate(found.count_A.tolist()):
        ids = found.ids_AK[row, :count].long()
        assert len(set(ids.tolist())) == count and tokens[row] in ids
        if row:  # ties may be ordered either way
            assert ids.tolist() == wanted.ids_AK[row, :count].tolist()
        assert torch.allclose(found.logprobs_AK[row, :count].double(), exact[row, ids], atol=2e-6, rtol=1e-6)
        outside = exact[row].exp()
        outside[ids] = 0
        assert np.isclose(found.tail_A[row], outside.sum().item(), rtol=1e-5, atol=1e-37)


def test_a_tail_far_below_rounding_keeps_its_digits():
    logits = torch.full((1, 5000), -40.0, device=DEVICE)
    logits[0, 17], logits[0, 4000] = 0.0, -1.0
    tokens, found = drawn_by_kernels(
        logits, SamplingParams(0.0), CaptureSpec(2, 0.0), torch.zeros(1, dtype=torch.int64, device=DEVICE),
        torch.zeros(1, dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    assert tokens.tolist() == [17] and found.ids_AK[0, :2].tolist() == [17, 4000]
    assert np.isclose(found.tail_A[0], 4998 * math.exp(-40) / (1 + math.exp(-1)), rtol=1e-5, atol=0)
