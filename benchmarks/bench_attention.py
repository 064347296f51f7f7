"""Is the attention of a packed row as fast as that of a single trace, and how far from torch's own for packed rows?

    python -m benchmarks.bench_attention

Rows of 8192 tokens with the heads of Qwen3-1.7B and 4B in bfloat16, forward and backward: one trace, several of equal
length, and lengths drawn evenly in their logarithm from 256 to 4096. Ours is what a decoder layer calls, from rotated
query, key and value on. Peer: torch's varlen_attn (flash attention 2) on the same tensors; where it does not know
grouped heads, keys and values are repeated for it, as its callers must. Only FLOP that causal attention needs count,
backward as 2.5 forwards; cuDNN's preparation for new lengths is outside the clock and reported by itself.
"""

import argparse
import inspect
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from benchmarks.results_file import row, write
from benchmarks.student_parts import GEOMETRIES, SHARED
from distill.commit import commit
from students.attention import how_packed, packed_attention

TOKENS, REPEATS = 8192, 10
SIZES = ("1.7b", "4b")
WIDTH, KV_HEADS = SHARED["head_dim"], SHARED["num_key_value_heads"]
QUESTION = "Is the attention of a packed row as fast as that of a single trace?"
GOAL = {"packed-2x4k": ">= 0.85"}


def mixed_lengths(seed: int = 0, shortest: int = 256, longest: int = 4096) -> list[int]:
    """The longest first, as packing lays them; they sum to TOKENS."""
    draw, lengths = torch.Generator().manual_seed(seed), []
    while sum(lengths) < TOKENS:
        drawn = int(shortest * (longest / shortest) ** torch.rand((), generator=draw))
        lengths.append(min(drawn, TOKENS - sum(lengths)))
    return sorted(lengths, reverse=True)


def cases() -> dict[str, list[int]]:
    equal = {f"packed-{n}x{TOKENS // n // 1024}k": [TOKENS // n] * n for n in (2, 4, 8)}
    return {"single-8k": [TOKENS], **equal, "packed-mixed": mixed_lengths()}


def ours(lengths: list[int]) -> Callable[..., Tensor]:
    packed = how_packed(lengths, torch.device("cuda"), torch.bfloat16)
    return lambda *inputs: packed_attention(None, *inputs, None, **packed)[0]


def peer(lengths: list[int]) -> Callable[..., Tensor]:
    ends = torch.tensor([0, *lengths], dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)
    knows_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters
    attend = partial(varlen_attn, **({"enable_gqa": True} if knows_groups else {}), window_size=(-1, 0))

    def run(*inputs_1HND: Tensor) -> Tensor:
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in inputs_1HND)
        if not knows_groups:
            key, value = (x.repeat_interleave(query.shape[1] // KV_HEADS, 1) for x in (key, value))
        return attend(query, key, value, ends, ends, max(lengths), max(lengths))[None]

    return run


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """(of one run on the device, with the launches ahead of it as in a training step; of the first run)."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(300_000_000)  # cycles: the device waits until all is launched
    begin.record()
    for _ in range(REPEATS):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / REPEATS / 1e3, first


def measured(attend: Callable[..., Tensor], heads: int, lengths: list[int]) -> tuple[float, float, float]:
    """(TFLOP/s forward, TFLOP/s of forward and backward, seconds of the first forward and backward)."""
    shapes = [(1, TOKENS, each, WIDTH) for each in (heads, KV_HEADS, KV_HEADS)]
    inputs = [torch.randn(x, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for x in shapes]
    upstream = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)
    flops = sum(2 * tokens**2 for tokens in lengths) * heads * WIDTH / 1e12
    both, first = seconds(lambda: torch.autograd.grad(attend(*inputs), inputs, upstream))
    forward, _ = seconds(lambda: attend(*inputs))
    return flops / forward, 3.5 * flops / both, first


def rows_of(size: str) -> list[dict]:
    heads, rows, single = GEOMETRIES[size]["num_attention_heads"], [], 0.0
    for case, lengths in cases().items():
        name = f"qwen3-{size}/{case}"
        forward, both, first = measured(ours(lengths), heads, lengths)
        single = single or both
        their_forward, their_both, _ = measured(peer(lengths), heads, lengths)
        rows += [
            row(f"attention_tflops/{name}", both, "TFLOP/s"),
            row(f"attention_tflops/{name}/varlen_attn", their_both, "TFLOP/s", peer=True),
            row(f"forward_tflops/{name}", forward, "TFLOP/s"),
            row(f"forward_tflops/{name}/varlen_attn", their_forward, "TFLOP/s", peer=True),
            row(f"share_of_single/{name}", both / single, "x single-8k", goal=GOAL.get(case)),
            row(f"first_run_s/{name}", first, "s"),
        ]
        print(f"{name}: ours {both:.0f}, varlen_attn {their_both:.0f} TFLOP/s", flush=True)
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        sys.exit("it needs a GPU, and there is none here")
    rows = [one for size in SIZES for one in rows_of(size)]
    print(*(f"{one['name']} {one['value']:.4g}" for one in rows), sep="\n", flush=True)
    print(write("attention", QUESTION, rows, device=torch.cuda.get_device_name(), commit=commit()))


if __name__ == "__main__":
    main()
