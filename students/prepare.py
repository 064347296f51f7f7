"""All that one student is trained on, from a config: the run's traces, other runs' traces, texts, general data.

Some of the run's own traces may be held out, to evaluate on while it trains.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from distill import files
from distill.checkpoints import fingerprint_checkpoint
from distill.config import Capture, Config, Student
from distill.config_mixture import General, TextSet, TraceSet
from distill.dist import Ranks
from distill.logit_cache import CacheReader
from distill.prompts import normalised
from distill.records import CaptureSpec, Prompt
from distill.store import RunFolder, StageFolder
from students import general, stored
from students.data import TraceData, load_traces
from students.mixture import Mixture, Part, hold_out
from students.model import load_student
from students.packing import Passes, TrainPlan
from students.rollout import Rollout
from students.texts import load_texts

TRACES = "traces"


@dataclass(frozen=True)
class Prepared:
    """data and its plan; held_out: examples to evaluate on, None without; notes: lines for the user."""

    data: Mixture
    plan: TrainPlan
    held_out: TraceData | None
    notes: list[str]


@dataclass(frozen=True)
class OwnText:
    """What a student said in a round, and what the teacher made of it. share: of the round's tokens; the others are of
    traces. seed: of their order, and of which traces where not all are taken."""

    each: TextSet
    read: StageFolder
    share: float
    seed: int


@dataclass(frozen=True)
class Preparation:
    """What the sets of one student are made of. asked: what the evaluation asks, which no other set may hold."""

    config: Config
    student: Student
    tokenizer: PreTrainedTokenizerFast
    stage: StageFolder
    ranks: Ranks
    dtype: torch.dtype
    asked: Sequence[Prompt] = ()

    def run(self, traces: StageFolder, logits: StageFolder | None) -> Prepared:
        """Reads every set; all ranks call it. Errors: DataError as load_traces and students.general."""
        train, loss = self.config.train, self.student.loss
        alpha = loss.alpha if loss.kind == "logits" else 0.0
        own, held_out = hold_out(
            self._traces(traces, logits, self.config.teacher.path), train.eval_traces, self.config.run.seed
        )
        parts = [Part(TRACES, own, 1.0, alpha)]
        for each in train.trace_sets:
            parts.append(Part(each.name, self._of_run(each, held_out), each.weight, alpha))
        if loss.kind == "logits":
            read = [(each, self.stage.run.stage("logits", each.name)) for each in train.text_sets]
            parts += [Part(each.name, self._texts(each, stage, own), each.weight, each.alpha) for each, stage in read]
        if train.general is not None:
            parts.append(self._general(train.general, sum(sum(p.data.lengths) * p.weight for p in parts)))
        return self._planned(parts, held_out, self.config.run.seed)

    def run_on(self, said: OwnText, traces: StageFolder, logits: StageFolder) -> Prepared:
        """What the student said, once, and so many of the run's traces that it makes up its share."""
        train = self.config.train
        own = self._traces(traces, logits, self.config.teacher.path)
        own, held_out = hold_out(own, train.eval_traces, self.config.run.seed)
        texts = self._texts(said.each, said.read, own)
        weight = sum(texts.lengths) * (1 / said.share - 1) / sum(own.lengths)
        parts = [Part(TRACES, own, weight, self.student.loss.alpha), Part(said.each.name, texts, 1.0, said.each.alpha)]
        return self._planned(parts, held_out, said.seed)

    def _planned(self, parts: list[Part], held_out: TraceData | None, seed: int) -> Prepared:
        train, data = self.config.train, Mixture(parts)
        plan = TrainPlan(
            data.keys,
            data.lengths,
            data.trained,
            row_tokens=train.max_seq_tokens,
            batch_tokens=train.batch_tokens,
            epochs=train.epochs,
            seed=seed,
            passes=Passes([len(part.data.examples) for part in parts], [part.weight for part in parts]),
            curriculum=train.curriculum,
        )
        return Prepared(data, plan, held_out, list(self._notes(parts, plan)))

    def _traces(
        self,
        traces: StageFolder,
        logits: StageFolder | None,
        teacher_path: str | None,
        name: str = TRACES,
        leave_out: Callable[[Prompt], bool] | None = None,
        left_out: str = "",
    ) -> TraceData:
        logits = logits if self.student.loss.kind == "logits" else None
        train = self.config.train
        return load_traces(
            traces,
            logits,
            self.tokenizer,
            train.max_seq_tokens,
            teacher_path,
            too_long=train.too_long,
            target=self.student.loss.target,
            leave_out=leave_out,
            keep_in=self.stage.path / stored.FOLDER / name,
            made_with=left_out,
            ranks=self.ranks,
        )

    def _of_run(self, each: TraceSet, held_out: TraceData | None) -> TraceData:
        """That run's kept traces, without those of prompts that are evaluated on here, at the end or on the way."""
        run = run_of(each)
        traces = run.stage("traces")
        teacher = traces.manifest["spec"].get("teacher", {})
        texts = {normalised(prompt.text) for prompt in self.asked}
        keys = {example.key.split("/")[0] for example in held_out.examples} if held_out else set()

        def asked(prompt: Prompt) -> bool:
            return prompt.key in keys or normalised(prompt.text) in texts

        left_out = files.digest([sorted(texts), sorted(keys)])
        return self._traces(traces, run.stage("logits"), teacher.get("path"), each.name, asked, left_out)

    def _texts(self, each: TextSet, read: StageFolder, traces: TraceData) -> TraceData:
        """What the teacher read of that set; without what the evaluation asks."""
        train = self.config.train
        return load_texts(
            each,
            read,
            self.tokenizer,
            self.config.teacher.path,
            traces,
            max_seq_tokens=train.max_seq_tokens,
            too_long=train.too_long,
            asked={normalised(prompt.text) for prompt in self.asked},
        )

    def _general(self, settings: General, trace_tokens: float) -> Part:
        """So many passes over the general data in an epoch that it makes up its share of the tokens."""
        wanted = settings.share / (1 - settings.share) * trace_tokens
        train = self.config.train
        fitting = {"max_seq_tokens": train.max_seq_tokens, "too_long": train.too_long}
        rows = general.GeneralRows(settings, self.tokenizer, self.asked, **fitting)
        needed, base = wanted * train.epochs, settings.loss == "kl_to_base"
        caches = self._captured(settings, rows, needed) if base else None
        data = rows.load(needed, caches)
        return Part(general.NAME, data, wanted / sum(data.lengths), 1.0 if base else 0.0, settings.weight)

    def _captured(self, settings: General, rows: general.GeneralRows, needed: float) -> dict[str, CacheReader]:
        seed, base = self.config.run.seed, fingerprint_checkpoint(self.student.path)
        capture = self.config.teacher.capture or Capture()
        spec = CaptureSpec(capture.k_max, capture.tail_bound)
        folder = StageFolder(self.stage.run, "train", f"{self.student.name}/{general.NAME}")
        spec_of_stage = {
            "general": settings.model_dump(mode="json", exclude={"share", "loss", "weight"}),
            "capture": [spec.k_max, spec.tail_bound],
            "train": {"max_seq_tokens": rows.max_seq_tokens, "too_long": rows.too_long},
            "seed": seed,
        }
        inputs = {"base": base, "rows": rows.digest}
        self.ranks.main_first(lambda: folder.open(spec_of_stage, inputs) and None)

        def load() -> Rollout:
            model, tokenizer = load_student(self.student.path, self.dtype, packed=False)
            return Rollout(model, tokenizer, self.ranks.device, self.config.eval.batch_size)

        caches = general.Base(base, load, settings, spec, seed).capture(folder, rows, needed, self.ranks)
        gc.collect()  # the base makes room for the student
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        return caches

    def _notes(self, parts: list[Part], plan: TrainPlan):
        train = self.config.train
        for part in parts:
            if part.data.aligned is not None and part.data.drawn:
                yield f"{self.student.name}, {part.name}: {part.data.aligned.describe()}"
            if halves := part.data.counts["not_utf8"]:
                yield f"{self.student.name}: {halves} of {part.name} hold half a character and are left out"
            if long := part.data.counts["too_long"]:
                fate = {"drop": "left out", "split": "cut into rows that do not see one another"}[train.too_long]
                most = f"longer than {train.max_seq_tokens} tokens"
                yield f"{self.student.name}: {long} of {part.name} are {most}: {fate} (train.too_long)"
        if train.text_sets and self.student.loss.kind == "response":
            yield f"{self.student.name}: kind response learns nothing from train.text_sets, which it leaves out"
        if len(parts) > 1:
            tokens = [sum(part.data.lengths) * part.weight for part in parts]
            shares = [
                f"{part.name} {t / sum(tokens):.0%} ({len(part.data.examples)} examples, {part.weight:.2g} passes)"
                for part, t in zip(parts, tokens)
            ]
            yield f"{self.student.name}: an epoch's tokens are {', '.join(shares)}"


def run_of(each: TraceSet) -> RunFolder:
    """The run that a set of traces comes from."""
    path = Path(each.run)
    return RunFolder(path.parent, path.name, commit="")
