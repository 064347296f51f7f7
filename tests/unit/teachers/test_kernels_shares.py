"""The kernels' side of experts on several ranks: who answers whom, against plain torch and float64.

Runs where there is a CUDA device; with TRITON_INTERPRET=1 and Triton installed also on a CPU, in float32.
"""

import os

import pytest
import torch

from teachers import plain

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from teachers.kernels import elementwise, moe, peers, route  # noqa: E402

ROUTER = {"top_k": 3, "groups": 2, "top_groups": 1, "normed": True, "scale": 1.5}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("here", [range(16), range(4), range(4, 12), range(15, 16)])
def test_only_experts_of_this_rank_and_rows_of_each_share_that_count_are_chosen(dtype, here):
    x, gate = torch.randn(36, 64).to(DEVICE, dtype), torch.randn(16, 64).to(DEVICE, dtype)
    bias, active = torch.randn(16, device=DEVICE) * 0.1, torch.tensor([12, 0, 7], dtype=torch.int32, device=DEVICE)
    ids, weights = route.route(x, gate, bias, active, **ROUTER, here=here)
    everywhere, whole = plain.route(x, gate, bias, torch.tensor([36], device=DEVICE), **ROUTER)
    live = (torch.arange(12).repeat(3) < torch.tensor([12, 0, 7]).repeat_interleave(12)).to(DEVICE)
    for t in range(36):
        found = dict(zip(ids[t].tolist(), weights[t].tolist()))
        found.pop(len(here), None)
        wanted = {e - here.start: w for e, w in zip(everywhere[t].tolist(), whole[t].tolist()) if e in here}
        assert found == (pytest.approx(wanted, rel=1e-5) if live[t] else {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 200, 2048])
def test_combine_adds_up_the_outputs_of_experts_and_nothing_else(dtype, size):
    outputs = torch.randn(9, 6, size).to(DEVICE, dtype)
    chosen = torch.randint(0, 6, (9, 6), dtype=torch.int32, device=DEVICE)
    chosen[3] = 4  # a token that no expert here answers
    outputs[chosen >= 4] = torch.nan  # what the memory held
    wanted = outputs.double().masked_fill((chosen >= 4).unsqueeze(-1), 0).sum(1)
    for combine in (elementwise.combine, plain.combine):
        found = combine(outputs, chosen, 4)
        assert found.dtype == dtype and not found[3].any()
        assert (found.double() - wanted).norm() <= (1e-6 if dtype == torch.float32 else 5e-3) * wanted.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [5, 40] if INTERPRETED else [5, 40, 900])
def test_parts_of_the_experts_add_up_to_all_of_them(dtype, tokens):
    x, gate = torch.randn(tokens, 64).to(DEVICE, dtype), torch.randn(16, 64).to(DEVICE, dtype)
    gate_up, down = (torch.randn(16, *sizes).mul(0.1).to(DEVICE, dtype) for sizes in ((64, 64), (64, 32)))
    bias, everyone = torch.zeros(16, device=DEVICE), torch.tensor([tokens], dtype=torch.int32, device=DEVICE)

    def answers(here: range) -> torch.Tensor:
        ids, weights = route.route(x, gate, bias, everyone, **ROUTER, here=here)
        mine = [part[here.start : here.stop].contiguous() for part in (gate_up, down)]
        out = moe.experts(x, moe.group(ids, mine[0], 16), weights, *mine)
        return elementwise.combine(out, ids, len(here)).double()

    whole, parts = answers(range(16)), [answers(part) for part in (range(6), range(6, 7), range(7, 16))]
    assert (sum(parts) - whole).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * whole.norm()
    assert tokens < 40 or all(part.norm() > 0 for part in parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 2048, 2500])
def test_shares_that_write_into_each_others_memory_find_all_tokens_and_all_answers(dtype, size):
    shares, rows, experts = 3, 5, 4
    x = [torch.randn(rows, size).to(DEVICE, dtype) for _ in range(shares)]
    new = lambda *shape: [torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(shares)]  # noqa: E731
    where = lambda buffers: torch.tensor([b.data_ptr() for b in buffers], dtype=torch.int64, device=DEVICE)  # noqa: E731
    tokens, answers = new(shares * rows, size), new(rows, shares, size)
    for share in range(shares):
        peers.push(x[share], where(tokens), share)
    assert all(torch.equal(each, torch.cat(x)) for each in tokens)

    outputs = [torch.randn(shares * rows, 2, size).to(DEVICE, dtype) for _ in range(shares)]
    chosen = torch.randint(0, experts + 2, (shares, shares * rows, 2), dtype=torch.int32, device=DEVICE)
    for share in range(shares):
        peers.answer(outputs[share], chosen[share], experts, where(answers), share)
    for share in range(shares):
        for other in range(shares):
            mine = slice(share * rows, (share + 1) * rows)
            wanted = plain.combine(outputs[other][mine], chosen[other][mine], experts)
            assert torch.allclose(answers[share][:, other], wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
