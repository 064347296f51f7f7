"""Kernels of grouped-query attention against float64 on fresh random inputs; what is written in place is all of it.

Runs where there is a CUDA device; with TRITON_INTERPRET=1 and Triton installed also on a CPU, in float32.
"""

import math
import os

import pytest
import torch

from teachers import plain

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from teachers.dense import Ragged  # noqa: E402
from teachers.kernels import gqa  # noqa: E402
from teachers.runner import Segment  # noqa: E402

HEADS = [(4, 2, 16), (6, 2, 48), (32, 8, 128), (14, 2, 64), (28, 4, 128), (40, 1, 32)]  # query heads, key heads, size


def randn(*shape, dtype=torch.float32, scale=1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative distance; a NaN never passes."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    distance = ((found - wanted).norm() / wanted.norm()).item()
    return distance if math.isfinite(distance) else math.inf


def attention(query_nHD, key_tKD, value_tKD, scale):
    """Causal attention of the last n of t tokens in float64, head by head."""
    new, whole = len(query_nHD), len(key_tKD)
    group = query_nHD.shape[1] // key_tKD.shape[1]
    hidden = torch.ones(new, whole, dtype=torch.bool).triu(whole - new + 1).to(query_nHD.device)
    heads = []
    for h in range(query_nHD.shape[1]):
        scores = query_nHD[:, h].double() @ key_tKD[:, h // group].double().t() * scale
        heads.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ value_tKD[:, h // group].double())
    return torch.stack(heads, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [1, 10_000])
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("sizes", HEADS)
def test_gqa_decode_is_softmax_attention_over_the_pages(dtype, programs, page, sizes, monkeypatch):
    heads, kv_heads, size = sizes
    monkeypatch.setattr(gqa.TILES, "programs", programs)
    lengths = [0, 1, page - 1, page, 3 * page + 5, 900] if not INTERPRETED else [0, page - 1, 2 * page + 5]
    most = max(lengths) // page + 1
    pool = randn(len(lengths) * most + 1, page, 2 * kv_heads * size, dtype=dtype)
    tables = (1 + torch.randperm(len(lengths) * most)).view(len(lengths), most).int().to(DEVICE)
    projected = randn(len(lengths), heads + 2 * kv_heads, size, dtype=dtype)
    query = projected[:, :heads]  # rows lie further apart than their queries are long
    lengths_A = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    found = gqa.gqa_decode(query, pool, tables, lengths_A, kv_heads, size**-0.5)
    in_torch = plain.gqa_decode(query.float(), pool.float(), tables, lengths_A, kv_heads, size**-0.5)
    for row, length in enumerate(lengths):
        entries = pool[tables[row].long()].flatten(0, 1)[: length + 1].unflatten(1, (2, kv_heads, size))
        wanted = attention(query[row : row + 1], entries[:, 0], entries[:, 1], size**-0.5)[0]
        assert error(found[row], wanted) < TOLERANCE[dtype]
        assert error(in_torch[row], wanted) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("sizes", HEADS)
def test_rotate_heads_writes_queries_keys_and_the_pages(dtype, normed, sizes):
    heads, kv_heads, size = sizes
    tokens, page = 9, 4
    projected, norms = randn(tokens, heads + 2 * kv_heads, size, dtype=dtype), randn(2, size, dtype=dtype)
    angles = torch.rand(50, size // 2, device=DEVICE) * 6
    tables, positions = (angles.cos(), angles.sin()), torch.randint(0, 50, (tokens,), device=DEVICE).int()
    slots = torch.randperm(5 * page)[:tokens].to(DEVICE)
    wanted = projected.double()
    turned = wanted[:, : heads + kv_heads]
    if normed:
        scale = torch.rsqrt(turned.pow(2).mean(-1, keepdim=True) + 1e-6)
        turned = turned * scale * torch.cat((norms[:1].repeat(heads, 1), norms[1:].repeat(kv_heads, 1))).double()
    first, second = turned.chunk(2, -1)
    cos, sin = (table[positions.long()].double().unsqueeze(1) for table in tables)
    wanted[:, : heads + kv_heads] = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    wanted_pool = torch.full((5, page, 2 * kv_heads * size), 7.0, dtype=torch.float64, device=DEVICE)
    wanted_pool.view(-1, 2 * kv_heads * size)[slots] = wanted[:, heads:].flatten(1)
    for ops in (plain, gqa):
        found, pool = projected.clone(), torch.full_like(wanted_pool, 7.0).to(dtype)
        ops.rotate_heads(found, kv_heads, positions, slots, tables, norms if normed else None, 1e-6, pool)
        assert error(found, wanted) < TOLERANCE[dtype] and error(pool, wanted_pool) < TOLERANCE[dtype]
        alone = projected.clone()
        ops.rotate_heads(alone, kv_heads, positions, None, tables, norms if normed else None, 1e-6, None)
        assert torch.equal(alone, found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", HEADS)
@pytest.mark.parametrize("pasts", [(0, 0, 0, 0, 0), (0, 3, 64, 0, 200)])
def test_attend_ragged_is_causal_attention_of_each_sequence(dtype, sizes, pasts):
    heads, kv_heads, size = sizes
    news = (5, 1, 33, 33, 70)
    segments, start = [], 0
    for new, past in zip(news, pasts):
        segments.append(Segment(start, new, torch.zeros(past, dtype=torch.int64, device=DEVICE) if past else None))
        start += new
    ragged = Ragged.of(segments, torch.device(DEVICE))
    assert (ragged.past is None) == (not any(pasts))
    projected = randn(sum(news), heads + 2 * kv_heads, size, dtype=dtype)
    entries = randn(sum(news) + sum(pasts), 2, kv_heads, size, dtype=dtype)
    query, (key, value) = projected[:, :heads], entries.unbind(1)
    found = gqa.attend_ragged(query, key, value, ragged, size**-0.5).split(news)
    totals = [new + past for new, past in zip(news, pasts)]
    for mine, q, k, v in zip(found, query.split(news), key.split(totals), value.split(totals)):
        assert error(mine, attention(q, k, v, size**-0.5)) < TOLERANCE[dtype]
