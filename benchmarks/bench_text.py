"""Does a student learn its teacher from text that the teacher did not write?

The text is worked solutions of the demo's problems by somebody who slips and doubts far more often than the teacher: in
the teacher's language, but no sample of it. The teacher reads them; students of three tokenizers are trained on them
with equal texts, order and steps, and are measured on such texts that they have not seen:

    base      before training
    ce        cross-entropy on the text: its writer is learned
    sampled   the loss of traces, as if the teacher had drawn the text (with the teacher's tokenizer the same as read)
    no_chunks the loss of texts, without the likelihood of chunks
    read      the loss of texts

    kl/METHOD/STUDENT       KL(teacher || student) in bits per byte, of what hangs on nothing the text says later
    top1/METHOD/STUDENT     share of positions where both find the same outcome most likely
    chunks/METHOD/STUDENT   divergence of the likelihoods of chunks that outcomes do not tell, in bits per byte

    python -m benchmarks.bench_text
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.results_file import row, write
from distill.align import Aligner
from distill.commit import commit
from distill.config import Train, load_config
from distill.config_mixture import GeneralJsonl, TextSet
from distill.dist import init_ranks
from distill.evals.agreement import dense_scorer
from distill.evals.closeness import divergence
from distill.losses.chunks import chunk_divergence, chunk_logprobs
from distill.records import Prompt
from distill.split import Split
from distill.store import RunFolder, StageFolder
from distill.tasks.compiler import work_out
from distill.tasks.families import make_problem
from distill.tasks.split import is_heldout
from distill.tokens import fingerprint, load_tokenizer
from students.data import TraceData
from students.model import load_student
from students.packing import TrainPlan
from students.schedule import learning_rate
from students.step import LossSettings, StudentStep
from students.texts import load_texts
from teachers.engine import TeacherEngine
from teachers.texts import TextStage

TINY = Path("teachers/tiny")
METHODS = {
    "same": ("base", "ce", "read"),
    "qwen": ("base", "ce", "sampled", "no_chunks", "read"),
    "llama": ("base", "ce", "sampled", "no_chunks", "read"),
}
FAMILIES = (("chain_sum", 1), ("leg_counting", 1), ("products", 1))
SLIP = CONFIRM = 0.3  # of the writer; the teacher's own are 0.04
SETTINGS = Train(lr=3e-3, embedding_lr_ratio=0.1)


@dataclass(frozen=True)
class Texts:
    """A side of the data: its set and what the teacher made of it."""

    each: TextSet
    stage: StageFolder

    def load(self, student: str) -> TraceData:
        tokenizer = load_tokenizer(TINY / f"student-{student}")
        return load_texts(self.each, self.stage, tokenizer, str(TINY / "teacher"), None, max_seq_tokens=512)


def write_texts(path: Path, side: str, count: int, seed: int) -> None:
    """Solutions of problems of that side, "train" or "eval", as conversations."""
    rows = []
    for family, level in FAMILIES:
        found: dict[str, Prompt] = {}
        for index in range(2**20):
            prompt = make_problem(family, level, seed, index)
            if prompt is not None and is_heldout(prompt) == (side == "eval"):
                found.setdefault(prompt.key, prompt)
            if len(found) == count // len(FAMILIES):
                break
        for prompt in found.values():
            worked = work_out(prompt, random.Random(f"{seed}/{prompt.key}"), SLIP, CONFIRM)
            said = f"<think>\n{worked.reasoning}</think>\n\\boxed{{{worked.answer}}}"
            rows.append([{"role": "user", "content": prompt.text}, {"role": "assistant", "content": said}])
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in rows))


def read(folder: Path, side: str, count: int, seed: int, engine: TeacherEngine) -> Texts:
    """The texts of one side, scored."""
    path = folder / f"{side}.jsonl"
    write_texts(path, side, count, seed)
    each = TextSet(name=side, source=GeneralJsonl(path=str(path)))
    stage = RunFolder(folder, "run", commit="").stage("logits", side).open({}, {})
    counts = TextStage(load_config("configs/demo.yaml"), each, stage, init_ranks("cpu"), lambda: engine, Split()).run()
    stage.finish(counts, fingerprints={"tokenizer": fingerprint(engine.tokenizer)})
    print(f"{side}: {counts}")
    return Texts(each, stage)


def train(student: str, method: str, texts: Texts, epochs: int, seed: int) -> torch.nn.Module:
    """The trained student; the order of texts hangs on the seed alone."""
    data = texts.load(student)
    if method == "ce":
        data = TraceData(data.examples, None, data.counts)
    if method == "sampled":
        data.drawn = True
    model, _ = load_student(str(TINY / f"student-{student}"))
    step = StudentStep(model, LossSettings(0.0 if method == "ce" else 1.0))
    embedding = model.get_input_embeddings().weight
    rest = [p for p in model.parameters() if p is not embedding]
    groups = [{"params": rest, "ratio": 1.0}, {"params": [embedding], "ratio": SETTINGS.embedding_lr_ratio}]
    optimizer = torch.optim.AdamW(groups, betas=tuple(SETTINGS.betas), weight_decay=0.0)
    sizes = {"row_tokens": 512, "batch_tokens": 2048, "epochs": epochs, "seed": seed}
    plan = TrainPlan(data.keys, data.lengths, data.trained, **sizes)
    for number in range(len(plan)):
        planned = plan[number]
        batch = data.collate(planned.rows, model.config.vocab_size)
        if method == "no_chunks":
            batch = replace(batch, targets=replace(batch.targets, chunk_N=None, chunk_logprobs_N=None))
        loss, _ = step(batch, planned.trained_tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, len(plan), SETTINGS) * group["ratio"]
        optimizer.step()
        optimizer.zero_grad()
    return model


def measure(model: torch.nn.Module, student: str, texts: Texts) -> dict[str, float]:
    """kl, top1 and chunks on these texts, by outcomes that are the same for every method."""
    data = texts.load(student)
    aligner = Aligner(load_tokenizer(TINY / "teacher"), load_tokenizer(TINY / f"student-{student}"))
    scores = dense_scorer(model)([(e.prompt_ids, e.completion_ids) for e in data.examples])
    totals: Counter = Counter()
    for example, logits_NV in zip(data.examples, scores):
        alignment = aligner.align([example.sampled_ids])
        dists = data.caches[example.shard][example.key]
        targets, chunk_N, teacher_N = aligner.read_targets(alignment, [dists])
        kl_N, same_N = divergence(logits_NV, targets, aligner.tables)
        covered_N = np.diff(targets.offsets_N1) > 0
        own_N = logits_NV.float().log_softmax(-1).gather(1, torch.from_numpy(alignment.ids_N)[:, None]).squeeze(1)
        names, first, chunk_I = np.unique(chunk_N, return_index=True, return_inverse=True)
        chunks_C = chunk_logprobs(own_N, torch.from_numpy(chunk_I), len(names))
        off_C = chunk_divergence(torch.from_numpy(teacher_N[first]), chunks_C)[torch.from_numpy(names >= 0)]
        totals.update(kl=kl_N.sum(), top1=same_N[covered_N].sum(), covered=covered_N.sum(), chunks=off_C.sum().item())
        totals.update(bytes=int(alignment.lens_N.sum()))
    per_byte = math.log(2) * totals["bytes"]
    found = {"kl": float(totals["kl"] / per_byte), "top1": float(totals["top1"] / totals["covered"])}
    return found | {"chunks": totals["chunks"] / per_byte}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_text", description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=int, default=720, help="to train on; a sixth as many are measured on")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--students", nargs="+", default=["same", "qwen"], choices=list(METHODS))
    args = parser.parse_args(argv)
    rows, units = [], {"kl": "bits/byte", "top1": "share", "chunks": "bits/byte"}
    with tempfile.TemporaryDirectory() as name:
        engine = TeacherEngine(TINY / "teacher")
        given = partial(read, Path(name), engine=engine)
        train_on, measure_on = given("train", args.texts, 1 + args.seed), given("eval", args.texts // 6, 2)
        for student in args.students:
            for method in METHODS[student]:
                if method == "base":
                    model, _ = load_student(str(TINY / f"student-{student}"), packed=False)
                else:
                    model = train(student, method, train_on, args.epochs, args.seed)
                found = measure(model, student, measure_on)
                print(
                    f"{student:6s} {method:10s}", {name: round(value, 4) for name, value in found.items()}, flush=True
                )
                rows += [row(f"{name}/{method}/{student}", value, units[name]) for name, value in found.items()]
    question = __doc__.partition("\n")[0]
    print(write("text", question, rows, device=f"cpu{torch.get_num_threads()}", commit=commit()))


if __name__ == "__main__":
    main()
