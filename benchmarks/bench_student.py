"""How much of a GPU does a student's training step use, with cached logits in the loss?

    python -m benchmarks.bench_student
    python -m benchmarks.bench_student --gpus 2       # also how ZeRO-3 scales: the same rows on each of them

Qwen3 geometries with random weights, rows of 8192 tokens, four rows an optimizer step, bfloat16. Ours: DeepSpeed ZeRO-1
with float32 master weights, the fused K+1 loss on cached distributions, layers compiled, with and without recomputation
of activations. Peer: the plain Hugging Face loop with Liger's kernels, gradient checkpointing and fused AdamW on the
bfloat16 weights alone, cross-entropy alone. Every case runs in a process of its own. MFU counts 6 FLOP a weight and
token and causal attention, no recomputation, against the device's dense bfloat16 peak.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.results_file import row, write
from distill.commit import commit

GEOMETRIES = {
    "1.7b": {"hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288, "num_attention_heads": 32,
           "tie_word_embeddings": False},
}  # fmt: skip
SHARED = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 131_072}
CASES = ["ours-recompute/1.7b", "ours/1.7b", "liger-recompute/1.7b", "ours-recompute/4b", "liger-recompute/4b"]
GOALS = {"1.7b": ">= 0.50", "4b": ">= 0.55"}
TOKENS, ROWS, SUPPORT = 8192, 4, 16
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def make_model(size: str, attention: str):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**{"tie_word_embeddings": True} | SHARED | GEOMETRIES[size])
    with torch.device("cuda"):
        model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return model.train()


def flops_per_token(model, tokens: int) -> float:
    """6 a weight (embedding rows are only looked up, unless they are the head too) and causal attention."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters())
    weights -= 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens
    return 6 * weights + attention


def ours(size: str, recompute: bool, tokens: int, steps: int, stage: int = 1) -> dict:
    """Seconds of each step, peak GiB, model FLOP a token; every rank has ROWS rows a step."""
    from distill.config import Train
    from distill.dist import init_ranks
    from students.attention import NAME
    from students.engine import StudentEngine
    from students.step import LossSettings, StudentStep

    ranks = init_ranks("cuda")
    model = make_model(size, NAME)
    flops = flops_per_token(model, tokens)
    sizes = {"max_seq_tokens": tokens, "micro_batch_tokens": tokens, "batch_tokens": ROWS * tokens}
    train = Train(zero_stage=stage, activation_checkpointing=recompute, lr=1e-5, **sizes)
    module = StudentStep(model, LossSettings(alpha=0.9))
    with tempfile.TemporaryDirectory() as folder:
        engine = StudentEngine(module, train, ranks, dtype=torch.bfloat16, micro_batches=ROWS, offload_dir=Path(folder))
        batch = _batch(tokens)

        def step() -> None:
            for i in range(ROWS):
                engine.accumulate(batch, ranks.world * ROWS * tokens, last=i == ROWS - 1)
            engine.step(1e-5)

        found = _timed(step, steps) | {"flops": flops}
        ranks.close()
        return found


def _batch(tokens: int):
    """One row, one trace, every token of it trained on 16 cached outcomes and a tail."""
    from distill.losses.sparse import SparseTargets
    from students.data import Batch

    ids = torch.randint(SHARED["vocab_size"], (tokens,))
    support = torch.randint(SHARED["vocab_size"] // SUPPORT, (tokens, SUPPORT)) * SUPPORT + torch.arange(SUPPORT)
    mass = torch.softmax(torch.randn(tokens, SUPPORT) * 3, 1) * 0.999
    targets = SparseTargets(support, mass.log(), 1 - mass.sum(1))
    every = torch.arange(tokens)
    return Batch(ids, every, [tokens], every, support[:, 0].contiguous(), targets, [])


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
    label = name if kind == "ours-recompute" else f"{name}/{kind}"
    goal = GOALS.get(size) if kind == "ours-recompute" and tokens == TOKENS else None
    return [
        row(f"mfu/{label}", rate * found["flops"] / peak, "share of peak", goal=goal, peer=peer),
        row(f"tokens_per_s/{label}", rate, "tokens/s", peer=peer),
        row(f"peak_gib/{label}", found["peak_gib"], "GiB", peer=peer),
    ]


def scaling(gpus: int, size: str, tokens: int, steps: int) -> list[dict]:
    """Tokens a second of ZeRO-3 on one and on all GPUs of this host, each with the same rows, and their ratio."""
    rates = []
    for count in (1, gpus):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"]
        command += ["benchmarks.bench_student", "--in-process", "--stage", "3", "--cases", f"ours-recompute/{size}"]
        done = subprocess.run(
            [*command, "--tokens", str(tokens), "--steps", str(steps)], capture_output=True, text=True
        )
        if done.returncode:
            print(f"{count} GPUs: {done.stderr.strip()[-2000:]}", flush=True)
            return []
        seconds = [json.loads(line)["seconds"] for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
        rates.append(count * ROWS * tokens / max(statistics.median(each) for each in seconds))
    name = f"qwen3-{size}-{tokens // 1024}k/zero3"
    return [
        row(f"tokens_per_s/{name}/1gpu", rates[0], "tokens/s"),
        row(f"tokens_per_s/{name}/{gpus}gpu", rates[1], "tokens/s"),
        row(f"scaling/{gpus}gpu", rates[1] / rates[0], "x one GPU", goal=f">= {0.925 * gpus:g}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=CASES, help="ours, ours-recompute or liger-recompute / size")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--gpus", type=int, default=1, help="more than one: also measure how ZeRO-3 scales to so many")
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage of a case run by itself")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        kind, size = args.cases[0].split("/")
        more = {"stage": args.stage} if kind.startswith("ours") else {}
        run = ours if kind.startswith("ours") else liger
        print(json.dumps(run(size, kind.endswith("recompute"), args.tokens, args.steps, **more)))
        return
    rows = []
    for case in args.cases:
        command = [sys.executable, "-m", "benchmarks.bench_student", "--in-process", "--cases", case]
        command += ["--tokens", str(args.tokens), "--steps", str(args.steps)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{case}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", flush=True)
            continue
        found = json.loads(done.stdout.strip().splitlines()[-1])
        rows += rows_of(case, found, args.tokens)
        print(*(f"{one['name']} {one['value']:.4g}" for one in rows[-3:]), sep="  ", flush=True)
    if args.gpus > 1:
        rows += scaling(args.gpus, "1.7b", args.tokens, args.steps)
        print(*(f"{one['name']} {one['value']:.4g}" for one in rows[-3:]), sep="  ", flush=True)
    question = "How much of a GPU does a student's training step use, with cached logits in the loss?"
    what = "student" if args.gpus == 1 else f"student-{args.gpus}gpu"
    print(write(what, question, rows, device=torch.cuda.get_device_name(), commit=commit()))


if __name__ == "__main__":
    main()
