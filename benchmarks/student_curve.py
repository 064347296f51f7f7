"""Do more GPUs train the same student? Fifty steps of the bundled student in bfloat16, from the same weights on the
same rows: ZeRO-3 on one GPU and on N, and each row shared by N (Ulysses).

Two curves never agree to the last bit. What rounding alone does is measured beside them: the same run on one GPU with
its micro-batches in another order, whose gap, doubled, is what the others may have; and the same run in float32, which
strays further, for it rounds nothing.
"""

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.results_file import row
from benchmarks.student_parts import launched, make_batch

STEPS, ROWS, LENGTHS, LR = 50, 8, (512, 768), 1e-3
MODEL = "teachers/tiny/student-same"


def rows(gpus: int) -> list[dict]:
    """The largest gap in loss over the steps between one GPU and each way to use N, and what rounding alone does."""
    module = "benchmarks.student_curve"
    launches = [(1, ("plain", "reordered", "float32")), (gpus, ("plain", "ulysses"))]
    with ThreadPoolExecutor(2) as pool:  # side by side: nothing is timed here
        done = pool.map(lambda launch: launched(module, launch[0], "--runs", *launch[1]), launches)
    one, many = ({each["name"]: each["losses"] for each in found} for found in done)
    if len(one) < 3 or len(many) < 2:
        return []

    def gap(losses: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(losses, one["plain"], strict=True))

    noise = {name: gap(one[name]) for name in ("reordered", "float32")}
    goal = f"<= {2 * noise['reordered']:.4g}"
    print(f"loss {one['plain'][0]:.4f} -> {one['plain'][-1]:.4f}", flush=True)
    return [
        *(row(f"curve/1gpu-{name}", value, "nats") for name, value in noise.items()),
        row(f"curve/zero3-{gpus}gpu", gap(many["plain"]), "nats", goal=goal),
        row(f"curve/ulysses-{gpus}gpu", gap(many["ulysses"]), "nats", goal=goal),
    ]


def train(name: str, ranks) -> list[float]:
    """The loss of every step."""
    from transformers import AutoModelForCausalLM

    from distill.config import Train
    from students.attention import NAME
    from students.engine import StudentEngine
    from students.step import LossSettings, StudentStep

    dtype = torch.float32 if name == "float32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype, attn_implementation=NAME).train()
    # As they are multiplied: a float32 run whose weights had more digits would start elsewhere.
    model.load_state_dict({key: value.bfloat16().to(dtype) for key, value in model.state_dict().items()})
    size = ranks.world if name == "ulysses" else 1
    settings = {"max_seq_tokens": max(LENGTHS), "micro_batch_tokens": max(LENGTHS), "batch_tokens": ROWS * max(LENGTHS)}
    settings |= {"zero_stage": 3, "sequence_parallel": size, "lr": LR, "compile": "off"}
    vocabulary = model.config.vocab_size
    batches = [make_batch(LENGTHS[i % 2], vocabulary, seed=i, traces=1 + i % 3 % 2) for i in range(4 * ROWS)]
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        module = StudentStep(model, LossSettings(alpha=0.9))
        micro_batches = ROWS * size // ranks.world
        engine = StudentEngine(module, Train(**settings), ranks, dtype=dtype, micro_batches=micro_batches,
                               offload_dir=Path(folder))  # fmt: skip
        for step in range(STEPS):
            chosen = [batches[(step * ROWS + i) % len(batches)] for i in range(ROWS)]
            tokens = sum(len(batch.labels_M) for batch in chosen)
            mine = chosen[engine.data_rank :: engine.data_ranks]
            if name == "reordered":
                mine.reverse()
            parts = [engine.accumulate(batch, tokens, last=i + 1 == len(mine)) for i, batch in enumerate(mine)]
            loss, *_ = engine.add_up(0.0, torch.stack(parts).sum(0))
            engine.step(LR)
            losses.append(loss)
        engine.close()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="+", required=True, help="plain, reordered, float32, ulysses")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    from distill.dist import init_ranks

    ranks = init_ranks(args.device)
    for name in args.runs:
        losses = train(name, ranks)
        ranks.print(json.dumps({"name": name, "losses": losses}))
    ranks.close()


if __name__ == "__main__":
    main()
