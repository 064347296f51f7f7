"""What do several GPUs of one host make of bench_teacher's model: the same numbers, and how much faster?

    python -m benchmarks.bench_teacher --gpus 2        # any number that divides 16 heads and 64 experts

One GPU first, with the whole model, then every way to split it over all of them: ep N deals the routed experts out to
N ranks; tp M cuts heads, dense layers and vocabulary M ways, so that N / M groups of ranks work on different rows.
Weights come from a generator by name, so that every rank makes exactly its slices of one and the same model.

Rows. decode_tokens_per_s/b256/2gpu-ep2-tp1: 256 rows in all, traces and distributions; speed_up/b256/2gpu-...: against
one GPU with as many rows. logits_gap_fp32: the largest difference to one GPU in float32; greedy_equal_fp32: of greedy
completions; logits_noise_bf16: distance from float32, as a multiple of one GPU's in bfloat16.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import DeepseekV3Config

from benchmarks.bench_teacher import CAPTURE, DRAW, NEW, PROMPT, SIZES, decode_rate, score_rate
from benchmarks.results_file import row
from distill.dist import Ranks, init_ranks
from distill.records import SampleRequest, SamplingParams
from distill.split import Split
from teachers.runner import Segment
from teachers.runners import runner_of
from teachers.sampler import PagedGenerator
from teachers.shard import load
from teachers.slices import Piece

BATCHES = (256,)
SEQUENCES, TOKENS = 4, 64  # whose logits are compared
SAMPLES, DRAWN = 16, 24  # whose tokens are: greedy, since every draw of these flat distributions is a close call
SPEED_UP = 0.85  # of the number of GPUs, at the largest batch


class RandomWeights:
    """In the place of a checkpoint's reader: tensors of standard deviation 0.02, bfloat16 numbers, by their names."""

    folder, bytes_read = Path("random"), 0

    def __contains__(self, name: str) -> bool:
        return True

    def position(self, name: str) -> tuple[str, int]:
        return name, 0

    def chunks(self, piece: Piece) -> Iterator[Tensor]:
        parts, device = piece.parts, piece.target.device
        whole = torch.empty([part.total for part in parts], device=device)
        if piece.name.endswith("norm.weight"):
            whole.fill_(1)
        elif piece.name.endswith("bias"):
            whole.zero_()
        else:
            whole.normal_(0, 0.02, generator=torch.Generator(device).manual_seed(zlib.crc32(piece.name.encode())))
        piece.target.copy_(whole.bfloat16()[tuple(slice(part.lo, part.hi) for part in parts)])
        yield piece.target


class Model:
    """This rank's part of the model, dropped at the end of a `with`."""

    def __init__(self, split: Split, dtype: torch.dtype, device: torch.device):
        with tempfile.TemporaryDirectory() as folder:
            config = DeepseekV3Config(**SIZES)
            config.save_pretrained(folder)
            self.loaded = load(config.to_dict(), Path(folder), dtype, device, split, reader=RandomWeights())
        self.runner = runner_of(self.loaded.model, SIZES["vocab_size"], split)
        self.last: PagedGenerator | None = None

    def loop(self, rows: int) -> PagedGenerator:
        """The token loop for so many rows on this rank, in place of the one before."""
        if self.last:
            self.last.release()
        torch.cuda.empty_cache()
        self.last = PagedGenerator(self.runner, rows, [], cache_tokens=rows * (PROMPT + NEW + 128))
        return self.last

    def __enter__(self) -> Callable[[int], PagedGenerator]:
        return self.loop

    def __exit__(self, *error) -> None:
        self.loaded.groups += self.last.let_go() if self.last else []
        self.runner = self.last = None
        gc.collect()
        if error == (None, None, None):
            self.loaded.close()
            gc.collect()
            torch.cuda.empty_cache()


# ---- the same numbers ------------------------------------------------------------------------------------------------


def logits(loop: PagedGenerator, split: Split) -> list[Tensor]:
    """Of every position of this share's sequences, on the CPU."""
    ids = torch.randint(SIZES["vocab_size"], (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(2))
    runner, found = loop.runner, []
    positions = torch.arange(TOKENS, dtype=torch.int32, device=runner.device)
    for each in ids[split.share :: split.shares]:
        parts = runner.prefill(each.int().to(runner.device), positions, [Segment(0, TOKENS)], None, None)
        found.append(runner.logits(runner.finish(parts)).cpu())
    loop.finish()
    return found


def samples(loop: PagedGenerator, split: Split) -> dict[str, list[int]]:
    ids = torch.randint(SIZES["vocab_size"], (SAMPLES, 40), generator=torch.Generator().manual_seed(3)).tolist()
    asked = [SampleRequest(str(i), 0, tuple(each), i) for i, each in enumerate(ids)][split.share :: split.shares]
    greedy = SamplingParams(temperature=0.0, max_new_tokens=DRAWN)
    return {s.key: s.completion_ids for s in loop.sample(asked, greedy, CAPTURE)}


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Root of the mean squared difference of a logit, over the median position: a choice of experts that rounding turns
    moves a few positions by far more than the rest."""
    gaps = [(f - w).square().mean(1) for f, w in zip(found, wanted, strict=True)]
    return torch.cat(gaps).median().sqrt().item()


# ---- the run ---------------------------------------------------------------------------------------------------------


class Bench:
    """One rank's run. Rank 0 gathers and prints the rows."""

    def __init__(self, ranks: Ranks, new: int, scored: int):
        self.ranks, self.new, self.scored = ranks, new, scored
        self.rows: list[dict] = []
        self.whole: dict = {}  # one GPU's numbers, on all ranks

    def add(self, name: str, value: float, unit: str, goal: str | None = None) -> None:
        self.rows.append(row(name, value, unit, goal=goal))
        self.ranks.print(name, f"{value:.5g}", unit)

    def say(self, what: str) -> None:
        free, total = torch.cuda.mem_get_info()
        self.ranks.print(f"[{time.strftime('%T')}] {what}; {(total - free) / 2**30:.1f} GiB in use")

    def one(self) -> None:
        """The whole model on one GPU: rank 0 says how fast it is, the last rank what it says in float32."""
        found, split = {}, Split()
        if self.ranks.is_main:
            with Model(split, torch.bfloat16, self.ranks.device) as loop:
                self.say("one GPU, bfloat16")
                found["bf16"] = logits(loop(4), split)
                for batch in BATCHES:
                    found[batch] = decode_rate(loop(batch), batch, self.new, CAPTURE, DRAW)
                found["score"] = score_rate(loop(16), self.scored)
        elif self.ranks.rank == self.ranks.world - 1:
            with Model(split, torch.float32, self.ranks.device) as loop:
                found["fp32"], found["samples"] = logits(loop(SAMPLES), split), samples(loop(SAMPLES), split)
        for part in self.ranks.gather(found):
            self.whole |= part
        for batch in BATCHES:
            self.add(f"decode_tokens_per_s/b{batch}/1gpu", self.whole[batch], "tokens/s")
        self.add("score_tokens_per_s/1gpu", self.whole["score"], "tokens/s")

    def speed(self, split: Split, name: str) -> dict[int, float]:
        """Tokens a second of every batch; adds the rows of a split in bfloat16, with its distance from float32."""
        rates = {}
        with Model(split, torch.bfloat16, self.ranks.device) as loop:
            self.say(f"{name}, bfloat16")
            mine = slice(split.share, None, split.shares)
            found = logits(loop(4), split)
            noise = [distance(each, self.whole["fp32"][mine]) for each in (found, self.whole["bf16"][mine])]
            for batch in BATCHES:
                rows = batch // split.shares
                rate = decode_rate(loop(rows), rows, self.new, CAPTURE, DRAW, seed=split.share)
                rates[batch] = split.shares * min(self.ranks.gather(rate))
                self.add(f"decode_tokens_per_s/b{batch}/{name}", rates[batch], "tokens/s")
                self.add(f"speed_up/b{batch}/{name}", rates[batch] / self.whole[batch], "x one GPU")
            score = split.shares * min(self.ranks.gather(score_rate(loop(16), self.scored)))
        self.add(f"score_tokens_per_s/{name}", score, "tokens/s")
        self.add(f"score_speed_up/{name}", score / self.whole["score"], "x one GPU")
        ratio = max(ours / theirs for ours, theirs in self.ranks.gather(noise))
        self.add(f"logits_noise_bf16/{name}", ratio, "x one GPU's", "<= 1.25")
        return rates

    def equal(self, split: Split, name: str) -> None:
        with Model(split, torch.float32, self.ranks.device) as loop:
            self.say(f"{name}, float32")
            mine = self.whole["fp32"][split.share :: split.shares]
            gap = max((f - w).abs().max().item() for f, w in zip(logits(loop(SAMPLES), split), mine, strict=True))
            drawn = samples(loop(SAMPLES), split)
        all_drawn = {key: ids for each in self.ranks.gather(drawn) for key, ids in each.items()}
        same = sum(all_drawn[key] == ids for key, ids in self.whole["samples"].items())
        self.add(f"logits_gap_fp32/{name}", max(self.ranks.gather(gap)), "largest difference", "<= 1e-4")
        self.add(f"greedy_equal_fp32/{name}", same / SAMPLES, "share of samples", ">= 1")

    def run(self, splits: list[tuple[int, int]]) -> list[dict]:
        gpus, best = self.ranks.world, 0.0
        self.one()
        for tensor, expert in splits:
            split = Split(tensor, expert, self.ranks.rank, gpus)
            name = f"{gpus}gpu-ep{expert}-tp{tensor}"
            best = max(best, self.speed(split, name)[max(BATCHES)])
            self.equal(split, name)
        rate = best / self.whole[max(BATCHES)]
        self.add(f"speed_up/b{max(BATCHES)}/{gpus}gpu", rate, "x one GPU", f">= {SPEED_UP * gpus:g}")
        return self.rows


def measure(gpus: int, quick: bool, ways: str | None = None) -> list[dict]:
    """The rows of a launch of so many ranks on this host; ways: as --ways."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
        command += ["-m", "benchmarks.teacher_ranks", "--out", str(out)] + ["--quick"] * quick
        command += ["--ways", ways] if ways else []
        subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "4"} | os.environ)
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="128 new tokens")
    parser.add_argument("--ways", help="only these splits: 1x2,2x2 for tensor parallel 1 and 2, expert parallel 2")
    args = parser.parse_args()
    ranks = init_ranks("cuda")
    splits = [(tensor, ranks.world) for tensor in sorted({1, 2, ranks.world})]
    if args.ways:
        splits = [tuple(map(int, each.split("x"))) for each in args.ways.split(",")]
    rows = Bench(ranks, 128 if args.quick else NEW, 2 if args.quick else 6).run(splits)
    if ranks.is_main:
        args.out.write_text(json.dumps(rows))
    ranks.barrier()
    ranks.close()


if __name__ == "__main__":
    main()
