"""The training loop of one student: 4-student/NAME/ with log.jsonl, checkpoints/, model/ and train.json.

A launch that was killed goes on at the last checkpoint and ends in the same weights; log.jsonl is cut back to it, so
that no step stands there twice.
"""

import json
import math
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from distill import files
from distill.config import Config, Student, Train
from distill.dist import Ranks
from distill.errors import DataError, ModelError
from distill.losses.metrics import LossMetrics
from distill.store import StageFolder
from distill.tracking import Tracker
from students import checkpoint
from students.data import TraceData, load_traces
from students.engine import StudentEngine
from students.model import load_student, train_dtype
from students.packing import StepPlan, TrainPlan
from students.schedule import learning_rate
from students.step import LossSettings, StudentStep

MODEL, LOG, SUMMARY, CHECKPOINTS = "model", "log.jsonl", "train.json", "checkpoints"


def train_student(
    config: Config,
    student: Student,
    traces: StageFolder,
    logits: StageFolder | None,
    stage: StageFolder,
    ranks: Ranks,
    tracker: Tracker,
) -> dict:
    """Counts of the finished training: steps, tokens, trained_tokens, traces read and dropped, last loss, wall_s.

    The student is stage.path/model, a Hugging Face folder. logits is read when student.loss.kind is "logits" alone.
    Already finished: the counts of then. SIGTERM: a checkpoint is written and the process exits with status 0.
    Errors: DataError for traces that do not fit, ModelError when loss or gradient is not finite; the step's traces are
    then named in nan-step-N.json and no weight has changed.
    """
    folder = stage.path
    if done := ranks.on_main(lambda: _finished(folder)):
        return done
    started_s = time.monotonic()
    dtype = train_dtype(config.train.dtype, ranks.device)
    model, tokenizer = load_student(student.path, dtype)
    use_logits = student.loss.kind == "logits"
    data = load_traces(
        traces, logits if use_logits else None, tokenizer, config.train.max_seq_tokens, config.teacher.path
    )
    if data.aligned is not None:
        ranks.print(data.aligned.describe())
    plan = TrainPlan(
        data.keys,
        data.lengths,
        data.trained,
        row_tokens=config.train.max_seq_tokens,
        batch_tokens=config.train.batch_tokens,
        epochs=config.train.epochs,
        seed=config.run.seed,
    )
    run = StudentRun(config.train, student, folder, ranks, tracker, data, plan, started_s)
    engine = run.make_engine(model, dtype)
    run.loop(engine)
    checkpoint.export(engine, tokenizer, folder / MODEL, dtype, ranks)
    engine.close()
    return ranks.on_main(run.finish)


def _finished(folder: Path) -> dict | None:
    if (folder / MODEL).is_dir() and (folder / SUMMARY).is_file():
        return files.read_json(folder / SUMMARY, f"Delete {folder / SUMMARY} and run again.")
    return None


@dataclass
class StudentRun:
    """One training of one student on one rank; `before_s` is what earlier launches took up to their checkpoint."""

    train: Train
    student: Student
    folder: Path
    ranks: Ranks
    tracker: Tracker
    data: TraceData
    plan: TrainPlan
    started_s: float
    before_s: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0
    last_loss: float = float("nan")

    def make_engine(self, model, dtype: torch.dtype) -> StudentEngine:
        """The student under DeepSpeed. Its rows per micro-batch are those that fit train.micro_batch_tokens."""
        self.rows = self.train.micro_batch_tokens // self.train.max_seq_tokens
        self.vocab_rows = model.get_input_embeddings().weight.shape[0]
        loss = self.student.loss
        alpha = loss.alpha if loss.kind == "logits" else 0.0
        module = StudentStep(model, LossSettings(alpha, loss.divergence, loss.beta, loss.temperature))
        most = -(-self.plan.rows_per_step // (self.ranks.world * self.rows))
        offload_dir = self.folder / "offload"
        return StudentEngine(module, self.train, self.ranks, dtype=dtype, micro_batches=most, offload_dir=offload_dir)

    def loop(self, engine: StudentEngine) -> None:
        """Train from the newest checkpoint to the end of the plan."""
        identity = {"data": self.plan.digest, "zero_stage": engine.stage}
        if engine.stage > 0:
            identity["ranks"] = self.ranks.world  # each holds a part of the optimizer's state
        state = checkpoint.resume(engine, self.folder / CHECKPOINTS, identity, self.ranks) or {}
        first = state.get("step", 0)
        self.before_s = state.get("wall_s", 0.0)
        self.tokens, self.trained_tokens = state.get("tokens", 0), state.get("trained_tokens", 0)
        self.last_loss = state.get("loss", self.last_loss)
        self.ranks.on_main(lambda: cut_log(self.folder / LOG, first))
        total = self.train.epochs * sum(self.data.lengths)
        with self._bar(total) as bar, _terminated() as stop:
            for number in range(first, len(self.plan)):
                began_s = time.monotonic()
                step = self.plan[number]
                stopping = self._step(engine, number, step, bool(stop), began_s)
                bar.update(step.tokens)
                bar.set_postfix_str(f"step {number + 1}/{len(self.plan)} loss {self.last_loss:.3f}", refresh=False)
                done = number + 1
                if stopping or (done % self.train.checkpoint_steps == 0 and done < len(self.plan)):
                    self._save(engine, done, identity)
                if stopping:
                    self.ranks.print(f"\nstopped by SIGTERM; a checkpoint of step {done} is saved, run again to go on")
                    self.ranks.barrier()
                    sys.exit(0)

    def _step(self, engine: StudentEngine, number: int, step: StepPlan, stop: bool, began_s: float) -> bool:
        """One optimizer step; returns whether any rank was told to stop."""
        batches = step.micro_batches(self.ranks.rank, self.ranks.world, self.rows)
        parts = [
            engine.accumulate(self.data.collate(rows, self.vocab_rows), step.trained_tokens, last=i + 1 == len(batches))
            for i, rows in enumerate(batches)
        ]
        loss, stops, *sums = engine.add_up(float(stop), torch.stack(parts).sum(0))
        if not math.isfinite(loss):
            self._refuse(number, step, "loss", loss)
        lr = learning_rate(number, len(self.plan), self.train)
        norm = engine.step(lr)
        if not math.isfinite(norm):
            self._refuse(number, step, "gradient norm", norm)
        self.tokens, self.trained_tokens = self.tokens + step.tokens, self.trained_tokens + step.trained_tokens
        self.last_loss = loss
        wall_s = time.monotonic() - began_s
        row = {
            "step": number + 1,
            "epoch": (number + 1) / self.plan.steps_per_epoch,
            "loss": loss,
            **self._means(LossMetrics.from_tensor(torch.tensor(sums)).means(), step),
            "lr": lr,
            "grad_norm": norm,
            "tokens": self.trained_tokens,
            "tokens_per_s": step.tokens / wall_s,
            "step_s": wall_s,
        }
        self._log(row)
        return stops > 0

    def _means(self, means: dict[str, float], step: StepPlan) -> dict[str, float]:
        """The metrics of a row. top1: agreement with the teacher where distributions are given, else with the text."""
        if means["tokens"] != step.trained_tokens:
            raise DataError(f"{means['tokens']} tokens were trained, {step.trained_tokens} were planned", where="step")
        common = {"ce": means["ce"], "entropy": means["entropy"]}
        if self.data.caches is None:
            return {**common, "top1": means["label_top1"]}
        share = means["teacher_tokens"] / means["tokens"]
        teacher = {"kl": means["kl"], "top1": means["top1"], "support_mass": means["support_mass"]}
        return {**common, **teacher, "tail": means["teacher_tail"], "teacher_share": share}

    def _log(self, row: dict[str, float]) -> None:
        if self.ranks.is_main:
            with open(self.folder / LOG, "a") as log:
                log.write(json.dumps(row) + "\n")
        metrics = {f"train/{name}": value for name, value in row.items() if name != "step"}
        self.tracker.log(metrics, row["step"], scope=self.student.name)

    def _save(self, engine: StudentEngine, done: int, identity: dict) -> None:
        state = {"identity": identity, "tokens": self.tokens, "trained_tokens": self.trained_tokens}
        state |= {"loss": self.last_loss, "wall_s": self._wall_s()}
        folder = self.folder / CHECKPOINTS
        checkpoint.save_checkpoint(engine, folder, done, state, self.ranks, self.train.keep_checkpoints)

    def _refuse(self, number: int, step: StepPlan, what: str, value: float) -> None:
        path = self.folder / f"nan-step-{number + 1}.json"
        keys = [[self.data.examples[i].key for i in row] for row in step.rows]
        report = {"step": number + 1, "epoch": step.epoch, what: str(value), "rows": keys}
        self.ranks.on_main(lambda: files.write_json(path, report))
        raise ModelError(
            f"the {what} of step {number + 1} is not finite, so no weight was changed",
            where=f"student {self.student.name}",
            value=value,
            remedy=f"The traces of this step are named in {path}. Lower train.lr or train.clip_norm, or look at them; "
            "run again to go on at the last checkpoint.",
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
        files.write_json(self.folder / SUMMARY, summary)
        files.remove_stale(self.folder)
        return summary


def cut_log(path: Path, steps: int) -> None:
    """Keeps the rows of the first `steps` steps: a killed launch may have logged some after its last checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines()[:steps] if path.exists() else []
    with files.replacing(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines))


@contextmanager
def _terminated():
    """A list that is no longer empty once SIGTERM came; the old handler is put back afterwards."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)
