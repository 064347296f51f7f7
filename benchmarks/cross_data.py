"""What bench_cross_tokenizer trains and measures on: the teacher's verified traces of the demo's problems.

A set is two files of the benchmark's folder: NAME.json, problems and sampled ids, and NAME.cache, the distributions.

Shape legend: P problems, K samples of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from distill.grade import Grader
from distill.logit_cache import CacheReader, CacheWriter, cache_header
from distill.records import CaptureSpec, Prompt, Sample, SamplingParams, TokenDists, Verdict
from distill.tasks.families import make_problem
from distill.tasks.split import is_heldout
from distill.tokens import sample_requests
from teachers.engine import TeacherEngine

TEACHER = "teachers/tiny/teacher"
SAMPLING = SamplingParams(temperature=0.6, top_p=0.95, max_new_tokens=320)
CAPTURE = CaptureSpec(k_max=64, tail_bound=1e-3)
# (family, level): problems for training, problems for evaluation
PROBLEMS = {
    ("leg_counting", 1): (1200, 120),
    ("leg_counting", 2): (1200, 120),
    ("chain_sum", 1): (2400, 160),
    ("chain_sum", 2): (1200, 100),
    ("products", 1): (1000, 100),
}
TRAIN_SEED, EVAL_SEED = 1, 2


@dataclass(frozen=True)
class TeacherText:
    """A completion of the teacher, in its ids, with its distributions."""

    key: str
    prompt: Prompt
    completion_ids: list[int]
    dists: TokenDists


def problems(side: str, share: float = 1.0) -> list[Prompt]:
    """Distinct problems for "train" or "eval", disjoint by content; share: of the numbers in PROBLEMS."""
    found = []
    for (family, level), counts in PROBLEMS.items():
        wanted = max(1, round(counts[side == "eval"] * share))
        found += [prompt for prompt, _ in zip(_stream(family, level, side), range(wanted))]
    return found


def _stream(family: str, level: int, side: str) -> Iterator[Prompt]:
    seen: set[str] = set()
    for index in range(2**20):
        prompt = make_problem(family, level, EVAL_SEED if side == "eval" else TRAIN_SEED, index)
        if is_heldout(prompt) == (side == "eval") and prompt.key not in seen:
            seen.add(prompt.key)
            yield prompt


def grade_all(tokenizer, stop_ids, prompts: list[Prompt], samples: list[Sample], k: int) -> np.ndarray:
    """float64 [P, K]: 1 where correct."""
    row_of = {prompt.key: row for row, prompt in enumerate(prompts)}
    items = [(prompts[row_of[s.key]], _text(tokenizer, stop_ids, s), s.finish_reason) for s in samples]
    right_PK = np.zeros((len(prompts), k))
    with Grader(workers=1) as grader:
        for sample, graded in zip(samples, grader.grade(items)):
            right_PK[row_of[sample.key], sample.sample_index] = graded.verdict == Verdict.CORRECT
    return right_PK


def _text(tokenizer, stop_ids, sample: Sample) -> str:
    ids = list(sample.completion_ids)
    if sample.finish_reason == "stop" and ids[-1] in stop_ids:
        ids.pop()
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def sample_teacher(path: Path, prompts: list[Prompt], *, k: int, seed: int, device: str, keep_wrong: bool) -> dict:
    """Writes the set `path` (a file name without suffix): sample 0 of every problem, the correct ones alone unless
    keep_wrong. Returns {"right_PK", "sampled"}."""
    engine = TeacherEngine(TEACHER, device=device, batch_size=1024 if device != "cpu" else 128)
    requests = list(sample_requests(engine.tokenizer, prompts, k, seed))
    samples = list(engine.sample(requests, SAMPLING, CAPTURE))
    right_PK = grade_all(engine.tokenizer, engine.stop_ids, prompts, samples, k)
    row_of = {prompt.key: row for row, prompt in enumerate(prompts)}
    first = {s.key: s for s in samples if s.sample_index == 0 and (keep_wrong or right_PK[row_of[s.key], 0])}
    header = cache_header(engine.tokenizer, engine.fingerprint, engine.vocab_size, CAPTURE)
    path.with_suffix(".cache").unlink(missing_ok=True)
    with CacheWriter(path.with_suffix(".cache"), header) as cache:
        for key, sample in first.items():
            cache.append(key, sample.dists)
    kept = [{"prompt": asdict(p), "completion_ids": first[p.key].completion_ids} for p in prompts if p.key in first]
    path.with_suffix(".json").write_text(json.dumps(kept))
    engine.close()
    return {"right_PK": right_PK.tolist(), "sampled": len(requests)}


def read_texts(path: Path) -> list[TeacherText]:
    """The set that sample_teacher wrote."""
    found = []
    with CacheReader(path.with_suffix(".cache")) as cache:
        for row in json.loads(path.with_suffix(".json").read_text()):
            prompt = Prompt(**row["prompt"])
            found.append(TeacherText(prompt.key, prompt, row["completion_ids"], cache[prompt.key]))
    return found


@torch.no_grad()
def dense_teacher(texts: list[TeacherText], prompt_ids: list[list[int]], device: str) -> list[torch.Tensor]:
    """Log-probabilities [T, W] of every completion's tokens over the whole vocabulary: what peers ask a live teacher
    for, computed once."""
    from teachers.engine import load_model

    model = load_model(Path(TEACHER), torch.float32, torch.device(device))
    rows = [torch.tensor([*prompt, *text.completion_ids]) for prompt, text in zip(prompt_ids, texts)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        ids_BL = torch.nn.utils.rnn.pad_sequence([rows[i] for i in chosen], batch_first=True).to(device)
        logits_BLW = model(input_ids=ids_BL, use_cache=False).logits
        for i, logits_LW in zip(chosen, logits_BLW):
            found[i] = logits_LW[len(prompt_ids[i]) - 1 : len(rows[i]) - 1].float().log_softmax(-1)
    return found
