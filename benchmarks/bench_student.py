"""How much of a GPU does a student's training step use, with cached logits in the loss?

    python -m benchmarks.bench_student
    python -m benchmarks.bench_student --gpus 2       # also how ZeRO-3 scales: the same rows on each of them
    python -m benchmarks.bench_student --curve 2      # do two GPUs, by ZeRO-3 and by Ulysses, follow the curve of one?
    python -m benchmarks.bench_student --longest 1    # the longest trace that an 8B student trains on

Qwen3 geometries with random weights, rows of 8192 tokens, eight rows an optimizer step, bfloat16. Ours: DeepSpeed
ZeRO-1 with float32 master weights, the fused K+1 loss on cached distributions, layers compiled; activations recomputed
except those of matrix products (selective), except attention (recompute), or kept; 4B and 8B have 8-bit moments to fit
(bitsandbytes), 8B no master weights. Peer: the plain Hugging Face loop with Liger's kernels, gradient checkpointing and
fused AdamW on the bfloat16 weights alone, cross-entropy alone. Every case runs in a process of its own. MFU counts 6
FLOP a weight and token and causal attention, no recomputation, against the device's dense bfloat16 peak.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import torch

from benchmarks import student_curve, student_longest
from benchmarks.results_file import row, write
from benchmarks.student_parts import SHARED, flops_per_token, launched, make_batch, make_engine, make_model
from distill.commit import commit

KEPT = {"ours-selective": "products", "ours-recompute": "attention", "ours": "all"}
CASES = ["ours-selective/1.7b", "ours-recompute/1.7b", "ours/1.7b", "liger-recompute/1.7b", "ours-selective/4b",
         "ours-recompute/4b", "liger-recompute/4b"]  # fmt: skip
FITTING = {"4b": {"optimizer": "adamw8bit"}, "8b": {"optimizer": "adamw8bit", "master_weights": "none"}}
GOALS = {"1.7b": ">= 0.50", "4b": ">= 0.55"}
TOKENS, ROWS = 8192, 8
QUESTION = "How much of a GPU does a student's training step use, with cached logits in the loss?"
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def ours(size: str, kept: str, tokens: int, steps: int, stage: int = 1) -> dict:
    """Seconds of each step, peak GiB, model FLOP a token; every rank has ROWS rows a step. kept: of activations."""
    from distill.dist import init_ranks

    ranks = init_ranks("cuda")
    settings = {"zero_stage": stage, "activation_checkpointing": kept != "all"} | FITTING.get(size, {})
    settings |= {} if kept == "all" else {"kept_activations": kept}
    with tempfile.TemporaryDirectory() as folder:
        engine, flops = make_engine(size, ranks, ROWS, tokens, Path(folder), **settings)
        batch = make_batch(tokens)

        def step() -> None:
            for i in range(ROWS):
                engine.accumulate(batch, ranks.world * ROWS * tokens, last=i == ROWS - 1)
            engine.step(1e-5)

        found = _timed(step, steps) | {"flops": flops}
        ranks.close()
        return found


def liger(size: str, recompute: bool, tokens: int, steps: int) -> dict:
    """The same figures of the loop that trainers with Liger run."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3

    apply_liger_kernel_to_qwen3()
    model = make_model(size, "sdpa")
    flops = flops_per_token(model, tokens)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(SHARED["vocab_size"], (1, tokens), device="cuda")

    def step() -> None:
        for _ in range(ROWS):
            (model(input_ids=ids, labels=ids, use_cache=False).loss / ROWS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return _timed(step, steps) | {"flops": flops}


def _timed(step, steps: int) -> dict:
    for _ in range(2):
        step()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def rows_of(case: str, found: dict, tokens: int) -> list[dict]:
    kind, size = case.split("/")
    name, peer = f"qwen3-{size}-{tokens // 1024}k", kind.startswith("liger")
    rate = ROWS * tokens / statistics.median(found["seconds"])
    peak = next(flops for chip, flops in PEAK_FLOPS.items() if chip in torch.cuda.get_device_name())
    label = name if kind == "ours-selective" else f"{name}/{kind}"
    goal = GOALS.get(size) if kind == "ours-selective" and tokens == TOKENS else None
    return [
        row(f"mfu/{label}", rate * found["flops"] / peak, "share of peak", goal=goal, peer=peer),
        row(f"tokens_per_s/{label}", rate, "tokens/s", peer=peer),
        row(f"peak_gib/{label}", found["peak_gib"], "GiB", peer=peer),
    ]


def side_by_side(cases: list[str], tokens: int, steps: int, gpus: int) -> list[dict]:
    """The rows of all cases, `gpus` of which run at a time, each on a GPU of its own."""
    free: Queue[str] = Queue()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    for gpu in visible[:gpus]:
        free.put(gpu)

    def on_free(case: str) -> list[dict]:
        gpu = free.get()
        try:
            return measured(case, tokens, steps, gpu)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(gpus) as pool:
        return [one for rows in pool.map(on_free, cases) for one in rows]


def measured(case: str, tokens: int, steps: int, gpu: str) -> list[dict]:
    """The rows of a case that ran in a process of its own; none, and a line that says why, when it failed."""
    command = [sys.executable, "-m", "benchmarks.bench_student", "--in-process", "--cases", case]
    command += ["--tokens", str(tokens), "--steps", str(steps)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(f"{case}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", flush=True)
        return []
    rows = rows_of(case, json.loads(done.stdout.strip().splitlines()[-1]), tokens)
    print(*(f"{one['name']} {one['value']:.4g}" for one in rows), sep="  ", flush=True)
    return rows


def scaling(gpus: int, size: str, tokens: int, steps: int) -> list[dict]:
    """Tokens a second of ZeRO-3 on one and on all GPUs of this host, each with the same rows, and their ratio."""
    rates = []
    for count in (1, gpus):
        case = ["--in-process", "--stage", "3", "--cases", f"ours-recompute/{size}"]
        found = launched("benchmarks.bench_student", count, *case, "--tokens", str(tokens), "--steps", str(steps))
        if len(found) < count:
            return []
        rates.append(count * ROWS * tokens / max(statistics.median(each["seconds"]) for each in found))
    name = f"qwen3-{size}-{tokens // 1024}k/zero3"
    return [
        row(f"tokens_per_s/{name}/1gpu", rates[0], "tokens/s"),
        row(f"tokens_per_s/{name}/{gpus}gpu", rates[1], "tokens/s"),
        row(f"scaling/{gpus}gpu", rates[1] / rates[0], "x one GPU", goal=f">= {0.925 * gpus:g}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=CASES, help="kind / size, as these are by default")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=1, help="cases that run side by side, each on its own GPU")
    parser.add_argument("--gpus", type=int, default=1, help="more than one: also measure how ZeRO-3 scales to so many")
    parser.add_argument("--curve", type=int, metavar="GPUS", help="measure how far their loss curves are from one's")
    parser.add_argument("--longest", type=int, metavar="GPUS", help="search the longest trace that they train on")
    parser.add_argument("--first", type=int, default=32_768, help="with --longest: tokens to begin with")
    parser.add_argument("--limit-s", type=float, default=1800, help="with --longest: the search ends after this")
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage of a case run by itself")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        kind, size = args.cases[0].split("/")
        if kind in KEPT:
            found = ours(size, KEPT[kind], args.tokens, args.steps, args.stage)
        else:
            found = liger(size, kind == "liger-recompute", args.tokens, args.steps)
        print(json.dumps(found))
        return
    if args.curve:
        what, rows = f"student-curve-{args.curve}gpu", student_curve.rows(args.curve)
    elif args.longest:
        what = f"student-longest-{args.longest}gpu"
        rows = student_longest.rows(args.longest, "8b", args.first, args.limit_s)
    else:
        what = "student" if args.gpus == 1 else f"student-{args.gpus}gpu"
        rows = side_by_side(args.cases, args.tokens, args.steps, args.at_once) if args.cases else []
        rows += scaling(args.gpus, "1.7b", args.tokens, args.steps) if args.gpus > 1 else []
    if not rows:
        sys.exit("nothing was measured")
    print(*(f"{one['name']} {one['value']:.4g}" for one in rows), sep="\n", flush=True)
    print(write(what, QUESTION, rows, device=torch.cuda.get_device_name(), commit=commit()))


if __name__ == "__main__":
    main()
