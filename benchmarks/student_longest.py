"""The longest trace that an 8B student trains on, logits in the loss: lengths double, then the gap is halved.

Everything that saves memory is on: 8-bit moments and no wider weights, recomputation with what layers keep in host
memory, the MLP in tiles, and on several GPUs ZeRO-3 with each row shared by all of them.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.results_file import row
from benchmarks.student_parts import launched, make_batch, make_engine

GOALS = {"8b-1xh200": ">= 65536", "8b-1xh100": ">= 65536", "8b-2gpu": ">= 131072"}
STEP = 8192  # lengths are multiples of it
TILE = 8192  # tokens of a rank that the MLP takes at a time


def rows(gpus: int, size: str, first: int, limit_s: float) -> list[dict]:
    """The longest length that trained, its speed and its peak; nothing when not even `first` did."""
    until, best, failed, found = time.monotonic() + limit_s, 0, None, {}
    while failed is None or failed - best > max(STEP * gpus, best // 8):
        lengths = [first << n for n in range(8)] if failed is None else [(best + failed) // 2 // STEP * STEP]
        done = launched(
            "benchmarks.student_longest", gpus, "--size", size, "--lengths", *map(str, lengths),
            limit_s=max(until - time.monotonic(), 1),
        )  # fmt: skip
        for each in done:
            print(json.dumps(each), flush=True)
            found[each["tokens"]] = each
        best = max(found, default=0)
        failed = next((length for length in lengths if length > best), failed)
        if best == 0 or failed is None or time.monotonic() > until:
            break
    if not best:
        return []
    chip = torch.cuda.get_device_name().split()[1].lower()  # "NVIDIA H200" is h200
    name = f"{size}-1x{chip}" if gpus == 1 else f"{size}-{gpus}gpu"
    return [
        row(f"longest_tokens/{name}", best, "tokens", goal=GOALS.get(name)),
        row(f"tokens_per_s/longest-{name}", best / found[best]["seconds"], "tokens/s"),
        row(f"peak_gib/longest-{name}", found[best]["peak_gib"], "GiB"),
    ]


def train_lengths(size: str, lengths: list[int]) -> None:
    """Two steps on one trace of each length, shortest first, and what each took: the first compiles."""
    from distill.dist import init_ranks

    ranks = init_ranks("cuda")
    saving = {"optimizer": "adamw8bit", "master_weights": "none", "activation_checkpointing": True}
    saving |= {"activation_offload": True, "mlp_tiles": max(lengths[0] // ranks.world // TILE, 2)}
    shared = {"zero_stage": 3, "sequence_parallel": ranks.world} if ranks.world > 1 else {"zero_stage": 0}
    with tempfile.TemporaryDirectory() as folder:
        engine, _ = make_engine(size, ranks, 1, max(lengths), Path(folder), **saving, **shared)
        for tokens in lengths:
            batch = make_batch(tokens)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            for _ in range(2):
                torch.cuda.synchronize()
                began_s = time.perf_counter()
                engine.accumulate(batch, tokens, last=True)
                engine.step(1e-6)
                torch.cuda.synchronize()
                seconds = time.perf_counter() - began_s
                peak = max(ranks.gather(torch.cuda.max_memory_allocated()))
                ranks.print(json.dumps({"tokens": tokens, "seconds": seconds, "peak_gib": peak / 2**30}))
    ranks.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="8b")
    parser.add_argument("--lengths", type=int, nargs="+", required=True)
    args = parser.parse_args()
    train_lengths(args.size, args.lengths)
