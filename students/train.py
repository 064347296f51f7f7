"""The training loop of one student: 4-student/NAME/ with log.jsonl, checkpoints/, model/ and train.json.

A launch that was killed goes on at the last checkpoint and ends in the same weights; log.jsonl is cut back to it, so
that no step stands there twice.
"""

import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

from distill import files
from distill.checkpoints import resolve_checkpoint
from distill.config import Config, Student, Train
from distill.dist import Ranks
from distill.errors import ModelError
from distill.geometry import read_geometry
from distill.records import Prompt
from distill.store import StageFolder
from distill.tokens import load_tokenizer
from distill.tracking import Tracker
from students import checkpoint, failures, metrics, replay, stored
from students.adapters import attach
from students.checkpoint import Checkpoints
from students.data import Batch, TraceData
from students.engine import StudentEngine
from students.evaluation import HeldOut
from students.loader import Loader
from students.log import TrainLog
from students.mixture import Mixture
from students.model import load_student, train_dtype
from students.packing import StepPlan, TrainPlan
from students.prepare import OwnText, Preparation
from students.schedule import learning_rate
from students.sharded import load_parts, shards_at_load
from students.step import LossSettings, StudentStep

MODEL, SUMMARY, CHECKPOINTS, OFFLOAD = "model", "train.json", "checkpoints", "offload"


def train_student(
    config: Config,
    student: Student,
    traces: StageFolder,
    logits: StageFolder | None,
    stage: StageFolder,
    ranks: Ranks,
    tracker: Tracker,
    asked: Sequence[Prompt] = (),
    said: OwnText | None = None,
) -> dict:
    """Counts of the finished training: steps, tokens, trained_tokens, traces read and dropped, last loss, wall_s.

    The student is stage.path/model, a Hugging Face folder. logits is read when student.loss.kind is "logits" alone.
    asked: what the evaluation asks; general data and other runs' traces that ask it too are left out. said: what the
    student said in a round, to train on beside the run's traces and in place of all else.
    Already finished: the counts of then. SIGTERM: a checkpoint is written and the process exits with status 0.
    Errors: DataError for traces that do not fit, CapacityError for too little memory, ModelError when loss or gradient
    is not finite; the step's traces are then kept in nan-step-N (students/replay.py) and no weight has changed.
    """
    folder = stage.path
    if ranks.on_main(lambda: is_trained(folder)):
        return ranks.on_main(lambda: files.read_json(folder / SUMMARY, f"Delete {folder / SUMMARY} and run again."))
    started_s = time.monotonic()
    dtype = train_dtype(config.train.dtype, ranks.device)
    tokenizer = load_tokenizer(resolve_checkpoint(student.path))
    preparation = Preparation(config, student, tokenizer, stage, ranks, dtype, asked)
    prepared = preparation.run(traces, logits) if said is None else preparation.run_on(said, traces, logits)
    for note in prepared.notes:
        ranks.print(note)
    run = StudentRun(config.train, student, folder, ranks, tracker, prepared.data, prepared.plan, started_s)
    run.held_out = prepared.held_out
    with failures.in_words(student.name, config.train, ranks):
        if shards_at_load(config.train, student):
            model = load_parts(student.path, dtype, config.train, folder / OFFLOAD)
        else:
            model, _ = load_student(student.path, dtype)
        if student.adapter is not None:
            attach(model, student.adapter, dtype, ranks.device, config.run.seed)
        engine = run.make_engine(model, dtype)
        run.loop(engine)
        checkpoint.export(engine, tokenizer, folder / MODEL, dtype, ranks)
        engine.close()
    return ranks.on_main(run.finish)


def is_trained(folder: Path) -> bool:
    """Whether a training has ended there."""
    return (folder / MODEL).is_dir() and (folder / SUMMARY).is_file()


@dataclass
class StudentRun:
    """One training of one student on one rank; `before_s` is what earlier launches took up to their checkpoint."""

    train: Train
    student: Student
    folder: Path
    ranks: Ranks
    tracker: Tracker
    data: Mixture
    plan: TrainPlan
    started_s: float
    before_s: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0
    last_loss: float = float("nan")
    losses: list[float] = field(default_factory=list)
    evaluated: tuple[int, float] | None = None  # (step, loss on held-out traces after it)
    held_out: TraceData | None = None

    def make_engine(self, model, dtype: torch.dtype) -> StudentEngine:
        """The student under DeepSpeed. Its rows per micro-batch are those that fit train.micro_batch_tokens."""
        self.rows = self.train.micro_batch_tokens // self.train.max_seq_tokens
        self.keys = self.data.keys
        self.vocab_rows = model.config.vocab_size
        loss = self.student.loss
        alpha = loss.alpha if loss.kind == "logits" else 0.0
        settings = LossSettings(alpha, loss.divergence, loss.beta, loss.temperature)
        module = StudentStep(model, settings, len(self.data.parts))
        most = -(-self.plan.rows_per_step * self.train.sequence_parallel // (self.ranks.world * self.rows))
        geometry = self.student.geometry or read_geometry(resolve_checkpoint(self.student.path), "students.N.path")
        frozen = self.student.adapter is not None
        self.speed = metrics.Speed(self.plan, geometry, dtype, self.ranks.device, self.ranks.world, frozen)
        offload_dir = self.folder / OFFLOAD
        return StudentEngine(module, self.train, self.ranks, dtype=dtype, micro_batches=most, offload_dir=offload_dir)

    def loop(self, engine: StudentEngine) -> None:
        """Train from the newest checkpoint to the end of the plan."""
        identity = {"data": self.plan.digest, "zero_stage": engine.stage}
        if engine.stage > 0:
            identity["ranks"] = self.ranks.world  # each holds a part of the optimizer's state
        keep, keep_best = self.train.keep_checkpoints, self.train.keep_best
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, self.ranks, keep, keep_best=keep_best)
        state = self.checkpoints.resume(engine, identity) or {}
        first = state.get("step", 0)
        self.before_s = state.get("wall_s", 0.0)
        self.tokens, self.trained_tokens = state.get("tokens", 0), state.get("trained_tokens", 0)
        self.last_loss = state.get("loss", self.last_loss)
        log, evaluation = TrainLog(self.folder, self.ranks, self.tracker, self.student.name), self._evaluation()
        log.go_on_after(first)
        with self._bar(self.plan.tokens) as bar, self._loader(engine, first) as loader, _terminated() as stop:
            began_s = time.monotonic()
            for number, step, count, batches in loader:
                ending = bool(stop) or self.checkpoints.failed  # then _stop tells why
                row, stopping = self._step(engine, number, step, count, batches, ending)
                row |= self.speed.row(step.tokens, time.monotonic() - began_s, loader.take_wait_s())
                if evaluation and self._evaluates(number + 1):
                    row |= evaluation.measure(engine)
                    self.evaluated = number + 1, row["eval_loss"]
                log.write(row, self._traces(step))
                bar.update(step.tokens)
                bar.set_postfix_str(f"step {number + 1}/{len(self.plan)} loss {self.last_loss:.3f}", refresh=False)
                done = number + 1
                if stopping:
                    self._stop(engine, done, identity)
                if done % self.train.checkpoint_steps == 0 and done < len(self.plan):
                    self._save(engine, done, identity)
                began_s = time.monotonic()
            self._save(engine, len(self.plan), identity)  # an export that fails or is killed costs no step
            if any(self.ranks.gather(bool(stop))):  # it came after the last step had begun
                self._stop(engine, len(self.plan), identity)
            self.checkpoints.wait()

    def _evaluates(self, done: int) -> bool:
        """Whether the held-out traces are due after so many steps: also where the best checkpoint is to be known."""
        judged = self.train.keep_best and done % self.train.checkpoint_steps == 0
        return done % self.train.eval_steps == 0 or judged or done == len(self.plan)

    def _evaluation(self) -> HeldOut | None:
        sizes = {"row_tokens": self.plan.row_tokens, "rows_per_micro_batch": self.rows, "vocab_rows": self.vocab_rows}
        return self.held_out and HeldOut(self.held_out, **sizes)

    def _loader(self, engine: StudentEngine, first: int) -> Loader:
        def share(step: StepPlan) -> list[list[list[int]]]:
            return step.micro_batches(engine.data_rank, engine.data_ranks, self.rows)

        collate = partial(self.data.collate, vocab_rows=self.vocab_rows)
        return Loader(self.plan, collate, share, first=first, workers=self.train.loader_workers)

    def _step(
        self, engine: StudentEngine, number: int, step: StepPlan, count: int, batches: Iterator[Batch], stop: bool
    ) -> tuple[dict[str, float], bool]:
        """One optimizer step: its row of the log, and whether any rank was told to stop."""
        # What dropout leaves out hangs on the step alone, so that a resumed training leaves out the same.
        torch.manual_seed((self.plan.seed << 32) + (number << 12) + self.ranks.rank)
        parts = [engine.accumulate(batch, step.trained_tokens, last=i + 1 == count) for i, batch in enumerate(batches)]
        loss, stops, *values = engine.add_up(float(stop), torch.stack(parts).sum(0))
        if not math.isfinite(loss):
            self._refuse(engine, number, step, "loss", loss)
        lr = learning_rate(number, len(self.plan), self.train)
        norm = engine.step(lr)
        if not math.isfinite(norm):
            self._refuse(engine, number, step, "gradient norm", norm)
        self.tokens, self.trained_tokens = self.tokens + step.tokens, self.trained_tokens + step.trained_tokens
        self.last_loss = loss
        self.losses.append(loss)
        sums = metrics.Sums.of(values)
        row = {
            "step": number + 1,
            "epoch": self.plan.epochs_done(number + 1),
            "loss": loss,
            **metrics.means(sums, step.trained_tokens, self.data.has_teacher),
            **metrics.by_set(sums, self.data, step),
            "lr": lr,
            "grad_norm": norm,
            "tokens": self.trained_tokens,
            "packing_efficiency": step.tokens / (len(step.rows) * self.plan.row_tokens),
        }
        return row, stops > 0

    def _traces(self, step: StepPlan) -> list[list[str]]:
        """The keys of a step's traces, row by row."""
        return [[self.keys[i] for i in row] for row in step.rows]

    def _save(self, engine: StudentEngine, done: int, identity: dict) -> None:
        state = {"identity": identity, "tokens": self.tokens, "trained_tokens": self.trained_tokens}
        state |= {"loss": self.last_loss, "wall_s": self._wall_s(), "score": self._score(done)}
        self.checkpoints.save(engine, done, state)

    def _stop(self, engine: StudentEngine, done: int, identity: dict) -> NoReturn:
        self._save(engine, done, identity)
        self.checkpoints.wait()
        self.ranks.print(f"\nstopped by SIGTERM; a checkpoint of step {done} is saved, run again to go on")
        self.ranks.barrier()
        sys.exit(0)

    def _score(self, done: int) -> float | None:
        """What the best checkpoint has least of: the loss on held-out traces, None where a stop left no time for it;
        without any, the mean loss of the steps since the checkpoint before."""
        losses, self.losses = self.losses, []
        if self.held_out is not None:
            return self.evaluated[1] if self.evaluated and self.evaluated[0] == done else None
        return sum(losses) / len(losses) if losses else self.last_loss

    def _refuse(self, engine: StudentEngine, number: int, step: StepPlan, what: str, value: float) -> NoReturn:
        """Keeps the step for students.replay: its rows, and the weights, which are those of before it."""
        path = self.folder / f"nan-step-{number + 1}"
        report = {"step": number + 1, "epoch": step.epoch, what: str(value), "rows": self._traces(step)}
        batches = [self.data.collate([row], self.vocab_rows) for row in step.rows] if self.ranks.is_main else []
        settings, sets = engine.module.settings, engine.module.sets

        def save() -> None:
            path.mkdir(exist_ok=True)
            replay.save_rows(path / replay.ROWS, batches, settings, step.trained_tokens, sets)
            files.write_json(path / replay.REPORT, report)

        self.ranks.on_main(save)
        engine.forget_average()
        tokenizer = load_tokenizer(resolve_checkpoint(self.student.path))
        checkpoint.export(engine, tokenizer, path / replay.MODEL, engine.dtype, self.ranks)
        raise ModelError(
            f"the {what} of step {number + 1} is not finite, so no weight was changed",
            where=f"student {self.student.name}",
            value=value,
            remedy=f"Run python -m students.replay {path} to see which traces it comes from. Lower train.lr or "
            "train.clip_norm, or drop them; run again to go on at the last checkpoint.",
        )

    def _bar(self, total: int) -> tqdm:
        name = f"train {self.student.name}"
        off = not self.ranks.is_main
        return tqdm(
            total=total, initial=self.tokens, desc=name, unit="tok", unit_scale=True, disable=off, mininterval=1
        )

    def _wall_s(self) -> float:
        return self.before_s + time.monotonic() - self.started_s

    def finish(self) -> dict:
        """Writes train.json, which marks the training as finished, and returns it."""
        summary = {
            "steps": len(self.plan),
            "tokens": self.tokens,
            "loss": self.last_loss,
            "packing_efficiency": self.plan.efficiency,
            **self.data.counts,
            "wall_s": self._wall_s(),
        }
        with files.disk_errors(self.folder):
            files.write_json(self.folder / SUMMARY, summary)
        files.remove_stale(self.folder)
        shutil.rmtree(self.folder / stored.FOLDER, ignore_errors=True)
        return summary


@contextmanager
def _terminated():
    """A list that is no longer empty once SIGTERM came; the old handler is put back afterwards.

    One that nobody looked at any more is sent again to that handler.
    """
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)
    if came:
        os.kill(os.getpid(), signal.SIGTERM)
