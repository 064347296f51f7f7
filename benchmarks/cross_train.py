"""One student of bench_cross_tokenizer: trained by one method on one seed's traces, then evaluated.

Every method and student sees the same traces in the same order in the same steps; a step is a number of traces, because
tokens are not the same from tokenizer to tokenizer. Plain torch: two million weights need no engine.

Shape legend: B traces of a batch, L padded length, N trained tokens, P problems, K samples of each.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.cross_base import STUDENTS, TWIN
from benchmarks.cross_data import CAPTURE, SAMPLING, TeacherText, dense_teacher, grade_all
from benchmarks.cross_losses import PEERS, Groups, PairBatch, groups_of, shared_ids
from distill.align import Aligner
from distill.align_targets import BucketTargets, pad
from distill.config import Train
from distill.evals.agreement import TeacherTrace, agreement, dense_scorer
from distill.losses.buckets import BucketedTargets
from distill.losses.fused import distill_loss
from distill.tokens import load_tokenizer, render_prompt, sample_requests
from students.model import load_student
from students.rollout import Rollout
from students.schedule import learning_rate

SETTINGS = Train(lr=4e-3, embedding_lr_ratio=0.1)
TRACES_PER_STEP = 20  # about 2,048 teacher tokens with their problems
ALPHA = 0.9  # as in configs/demo.yaml
METHODS = {student: ("response", "ours", *(PEERS if student in TWIN else ())) for student in STUDENTS}


@dataclass(frozen=True)
class Run:
    """method: "response" (text alone), "ours", or one of PEERS. base: the student's folder before training."""

    student: str
    base: Path
    method: str
    seed: int
    epochs: int
    device: str


class Data:
    """A trace set in one student's tokens, with what its method needs: trace i has tokens starts_B1[i]:starts_B1[i + 1]
    of all, and so on the teacher's side."""

    def __init__(self, texts: list[TeacherText], teacher, tokenizer, method: str, device: str):
        self.aligner, self.method, self.device = Aligner(teacher, tokenizer), method, device
        self.whole = self.aligner.align([text.completion_ids for text in texts])
        self.starts_B1, self.teacher_starts_B1 = self.whole.student_offsets_B1, self.whole.teacher_offsets_B1
        self.prompts = [render_prompt(tokenizer, text.prompt.text) for text in texts]
        if method == "ours":
            self.aligner.learn(self.aligner.count(self.whole))
            self.targets = self.aligner.targets(self.whole, [text.dists for text in texts], CAPTURE)
        if method in PEERS:
            own_prompts = [render_prompt(teacher, text.prompt.text) for text in texts]
            self.dense = dense_teacher(texts, own_prompts, device)
            self.groups = groups_of(self.aligner, self.whole)
            self.shared = tuple(ids.to(device) for ids in shared_ids(self.aligner))

    def completion(self, i: int) -> list[int]:
        return self.whole.trace(i).tolist()

    def inputs(self, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(ids [B, L], where in it each trained token is predicted [N], labels [N])."""
        members = [(self.prompts[i], self.completion(i)) for i in chosen]
        rows = [torch.tensor((prompt + completion)[:-1]) for prompt, completion in members]
        ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        starts = [b * ids_BL.shape[1] + len(prompt) - 1 for b, (prompt, _) in enumerate(members)]
        where_N = torch.cat([start + torch.arange(len(own)) for start, (_, own) in zip(starts, members)])
        labels_N = torch.tensor([i for _, own in members for i in own])
        return ids_BL.to(self.device), where_N.to(self.device), labels_N.to(self.device)

    def bucketed(self, chosen: list[int]) -> BucketedTargets:
        """Our targets, as students.aligned makes them."""
        parts = [self.targets.part(*map(int, self.starts_B1[i : i + 2])) for i in chosen]
        sizes = np.concatenate([np.diff(part.offsets_N1) for part in parts])
        joined = (np.concatenate([getattr(part, name) for part in parts]) for name in _FIELDS)
        padded = pad(BucketTargets(np.concatenate([[0], np.cumsum(sizes)]), *joined), self.aligner.tables)
        arrays = (padded.ids_NK, padded.group_NK, padded.logq_NG, padded.tail_N)
        return BucketedTargets(*map(torch.from_numpy, arrays)).to(self.device)

    def paired(self, chosen: list[int], logp_NV: Tensor, labels_N: Tensor) -> PairBatch:
        """Student and teacher side by side, for the losses of others."""
        on = partial(torch.as_tensor, device=self.device)
        moved, places, firsts = [], [], np.zeros(2, np.int64)
        for i in chosen:
            span, teacher = (tuple(map(int, each[i : i + 2])) for each in (self.starts_B1, self.teacher_starts_B1))
            moved.append(self.groups.within(*span).shifted(*(firsts - (span[0], teacher[0])).tolist()))
            sizes = np.array([span[1] - span[0], teacher[1] - teacher[0]])
            places.append(sizes)
            firsts = firsts + sizes
        joined = [on(np.concatenate([getattr(g, name) for g in moved])) for name in Groups.__annotations__]
        labels_T = [self.whole.teacher_ids_T[slice(*self.teacher_starts_B1[i : i + 2])] for i in chosen]
        both = []
        for n in np.stack(places, 1):
            both.append((on(np.repeat(np.arange(len(n)), n)), on(np.concatenate([*map(np.arange, n)]))))
        dense_TW = torch.cat([self.dense[i] for i in chosen])
        labels = on(np.concatenate(labels_T))
        return PairBatch(logp_NV, labels_N, *both[0], dense_TW, labels, *both[1], *joined, self.shared)


_FIELDS = ("roots_E", "logq_E", "tail_N", "kind_N", "label_N")


def batch_loss(model, data: Data, chosen: list[int]) -> Tensor:
    """The loss of one step, in nats per trained token of the student."""
    ids_BL, where_N, labels_N = data.inputs(chosen)
    hidden_NH = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state.flatten(0, 1)[where_N]
    head_VH = model.lm_head.weight
    if data.method in PEERS:
        logp_NV = (hidden_NH @ head_VH.T).log_softmax(-1)
        return PEERS[data.method](data.paired(chosen, logp_NV, labels_N)) / len(labels_N)
    targets, alpha = (data.bucketed(chosen), ALPHA) if data.method == "ours" else (None, 0.0)
    loss, _ = distill_loss(hidden_NH, head_VH, labels_N, targets=targets, alpha=alpha, normalizer=len(labels_N))
    return loss


def order(count: int, seed: int, epochs: int) -> list[list[int]]:
    """The traces of every step: each epoch is a shuffle, cut into steps; the last one takes what is left."""
    steps = []
    for epoch in range(epochs):
        shuffled = random.Random(f"{seed}/{epoch}").sample(range(count), count)
        steps += [shuffled[i : i + TRACES_PER_STEP] for i in range(0, count, TRACES_PER_STEP)]
    return steps


def train(run: Run, texts: list[TeacherText], teacher) -> tuple:
    """(model, tokenizer, figures of the training)."""
    model, tokenizer = load_student(str(run.base), packed=False)
    model.to(run.device)
    began_s = time.monotonic()
    data = Data(texts, teacher, tokenizer, run.method, run.device)
    ready_s = time.monotonic()
    embedding = model.get_input_embeddings().weight
    rest = [p for p in model.parameters() if p is not embedding]
    groups = [{"params": rest, "ratio": 1.0}, {"params": [embedding], "ratio": SETTINGS.embedding_lr_ratio}]
    optimizer = torch.optim.AdamW(
        groups,
        betas=tuple(SETTINGS.betas),
        weight_decay=SETTINGS.weight_decay,
        fused=run.device != "cpu",
    )
    steps, losses = order(len(texts), run.seed, run.epochs), []
    for number, chosen in enumerate(steps):
        loss = batch_loss(model, data, chosen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, len(steps), SETTINGS) * group["ratio"]
        optimizer.step()
        losses.append(loss.detach())
    losses = torch.stack(losses).tolist()
    if not np.isfinite(losses).all():
        raise RuntimeError(f"the loss of {run} is not finite")
    wall_s = {"data_s": ready_s - began_s, "train_s": time.monotonic() - ready_s}
    return model.eval(), tokenizer, {"steps": len(steps), "loss": float(np.mean(losses[-20:])), **wall_s}


def evaluate(model, tokenizer, prompts, texts: list[TeacherText], teacher, *, k: int, seed: int, device: str) -> dict:
    """right_PK, and the agreement with the teacher on `texts`."""
    began_s = time.monotonic()
    rollout = Rollout(model, tokenizer, device, batch_size=1024 if device != "cpu" else 128)
    samples = list(rollout.sample(list(sample_requests(tokenizer, prompts, k, seed)), SAMPLING))
    right_PK = grade_all(tokenizer, rollout.stop_ids, prompts, samples, k)
    traces = [TeacherTrace(t.key, t.prompt.text, t.completion_ids, t.dists, CAPTURE) for t in texts]
    close = agreement("", traces, dense_scorer(model), teacher=teacher, own=tokenizer)
    figures = {name: close[name] for name in ("bits_per_byte", "top1", "covered_share")}
    return {"right_PK": right_PK.astype(int).tolist(), **figures, "eval_s": time.monotonic() - began_s}


def run_one(run: Run, train_texts, eval_texts, prompts, k: int, teacher_path: str | Path) -> dict:
    """One training and its evaluation."""
    torch.manual_seed(run.seed)
    teacher = load_tokenizer(teacher_path)
    model, tokenizer, figures = train(run, train_texts, teacher)
    return figures | evaluate(model, tokenizer, prompts, eval_texts, teacher, k=k, seed=run.seed, device=run.device)
