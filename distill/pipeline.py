"""The wiring of the stages: which model is loaded when, what each stage reads, and the ledger of what it cost.

    1-prompts -> 2-traces + 3-logits -> 4-student/NAME -> 5-eval -> 6-publish

Each method is one stage. A stage whose manifest matches its settings and inputs is skipped; models are loaded only when
something is missing and freed before the next stage.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch import Tensor

from distill import dist, files, prompts, publish, traceset
from distill.checkpoints import fingerprint_checkpoint, resolve_checkpoint
from distill.client import ServiceTeacher
from distill.commit import commit
from distill.config import Config, Student, stage_spec
from distill.config_mixture import TextSet
from distill.errors import ServiceError, StoreError
from distill.evals.agreement import dense_scorer
from distill.evals.report import write_report
from distill.evals.results import Candidate, base_name, candidate
from distill.evals.retention import general_prompts
from distill.evals.suite import Entrant, Opened, Suite, run_suite
from distill.evals.table import render_table
from distill.grade import Grader
from distill.model_card import Made
from distill.plan import student_split, teacher_split
from distill.records import CaptureSpec, Prompt, SamplingParams
from distill.rounds import Rounds
from distill.split import Split
from distill.store import RunFolder, StageFolder
from distill.tokens import fingerprint, load_tokenizer
from distill.tracking import Tracker
from students.model import check_students, load_student, train_dtype
from students.prepare import run_of
from students.rollout import Rollout
from students.train import MODEL
from teachers.engine import TeacherEngine
from teachers.runners import paged_loop
from teachers.texts import TextStage, check_texts
from teachers.traces import TracesStage, summary

RETENTION_PER_KIND = 60


class Pipeline:
    """One launch of one run. Use as a context manager: it releases the run's lock and closes the tracker."""

    def __init__(self, config: Config, *, command: str, restart: str | None = None):
        publish.check_publish(config)
        self.config, self.command = config, command
        self.ranks = dist.init_ranks(config.hardware.device)
        self.folder = RunFolder(config.run.dir, config.run.name, commit=commit(), rank=self.ranks.rank)
        try:
            self.split = teacher_split(config, self.ranks.rank, self.ranks.world)
            self.ranks.on_main(self._prepare(restart))
            self.tracker = Tracker(config, self.folder.path, is_main=self.ranks.is_main)
        except BaseException:
            self._leave(failed=True)
            raise

    def _prepare(self, restart: str | None) -> Callable[[], None]:
        def prepare() -> None:
            self.folder.check_writable()
            self.folder.lock()
            if restart:
                print("deleted:", ", ".join(self.folder.restart(restart)) or "nothing was there")

        return prepare

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.tracker.finish(failed=kind is not None)
        self._leave(failed=kind is not None)

    def _leave(self, failed: bool) -> None:
        """Gives back the lock and the process group; a failed rank of several does not wait for the others."""
        self.folder.release()
        if not failed or self.ranks.world == 1:
            self.ranks.close()

    def prompts(self) -> None:
        """1-prompts: the problems, deduplicated, training and evaluation disjoint by content."""
        stage = self._open("prompts", prompts.source_hashes(self.config.prompts))
        if self._skip(stage):
            return
        models = (self.config.teacher.path, *(student.path for student in self.config.students))
        self.ranks.on_main(lambda: prompts.make_prompts(self.config, stage, prompts.special_of(models)) and None)
        self.ranks.print(f"{stage.title}: {json.dumps(stage.manifest['counts'])}")

    def traces(self) -> None:
        """2-traces, 3-logits: what the teacher says and might have said; 3-logits/NAME: where somebody else wrote."""
        self.ranks.on_main(lambda: check_texts(self.config, self.folder))
        with self._teacher() as engine:
            self._sampled(engine)
            for each in self.config.train.text_sets:
                self._read(each, engine)

    def _sampled(self, engine: Callable[[], TeacherEngine | ServiceTeacher]) -> None:
        inputs = {"prompts": self._input("prompts"), "teacher": self._teacher_fingerprint()}
        traces, logits = self._open("traces", inputs), self._open("logits", inputs)
        if self._skip(traces) and self._skip(logits, quiet=True):
            return
        self.ranks.on_main(lambda: check_students(self.config))
        train = prompts.load_prompts(self.folder.stage("prompts"), "train")
        TracesStage(self.config, traces, logits, self.ranks, engine, self.split).run(train)
        record = self._service_record(engine)
        self.ranks.barrier()
        counts = self.ranks.on_main(lambda: summary(list(traceset.iter_traces(traces))))
        prints = {"teacher": inputs["teacher"], "tokenizer": fingerprint(load_tokenizer(self.config.teacher.path))}
        shards = logits.shards()
        logits.finish({"shards": len(shards), "bytes": sum(s.bytes for s in shards)}, fingerprints=prints, **record)
        traces.finish(counts, fingerprints=prints, **record)
        self.ranks.barrier()
        dropped = ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items()) or "none"
        self.ranks.print(f"{traces.title}: kept {counts['kept']} of {counts['samples']} traces; dropped: {dropped}")

    def _read(self, each: TextSet, engine: Callable[[], TeacherEngine | ServiceTeacher]) -> None:
        """3-logits/NAME: the teacher's distributions over text that it did not write."""
        prints = {"teacher": self._teacher_fingerprint()}
        stage = self.folder.stage("logits", each.name)
        self._bind(stage, stage_spec(self.config, "text", each.name), prints | prompts.file_hashes([each.source]))
        if self._skip(stage):
            return
        counts = TextStage(self.config, each, stage, self.ranks, engine, self.split).run()
        prints["tokenizer"] = fingerprint(load_tokenizer(self.config.teacher.path))
        stage.finish(counts, fingerprints=prints, **self._service_record(engine))
        self.ranks.barrier()
        self.ranks.print(f"{stage.title}: {json.dumps(counts)}")

    def train(self) -> None:
        """4-student/NAME for every student: the traces, learnt."""
        traces, logits = self.folder.stage("traces"), self.folder.stage("logits")
        opened = []
        for student in self.config.students:
            inputs = {name: self._input(name) for name in ("traces", "logits")} | self._mixed_in(student)
            inputs["base"] = fingerprint_checkpoint(student.path)
            opened.append((student, self._open("train", inputs, part=student.name)))
        todo = [(student, stage) for student, stage in opened if not self._skip(stage)]
        read = [traces, logits] if any(student.loss.kind == "logits" for student, _ in todo) else [traces]
        self._verify(read if todo else [])
        train = self.config.train
        asked = self._asked() if todo and (train.general or train.trace_sets or train.text_sets) else []
        for student, stage in todo:
            given = (traces, logits, stage, self.ranks, self.tracker, self.split, asked)
            counts = dict(Rounds(self.config, student, *given, self._student, self._teacher).run())
            wall_s = counts.pop("wall_s")
            prints = self.ranks.on_main(lambda stage=stage: {"model": fingerprint_checkpoint(stage.path / MODEL)})
            stage.finish(counts, fingerprints=prints, wall_s=wall_s, device_s=wall_s * self.ranks.world)
            self.ranks.barrier()

    def eval(self) -> None:
        """5-eval: teacher, bases and students on the same held-out prompts, and the report."""
        inputs = {"prompts": self._input("prompts"), "teacher": self._teacher_fingerprint()}
        inputs |= {f"train/{each.name}": self._input("train", each.name) for each in self.config.students}
        stage = self._open("eval", inputs)
        if not self._skip(stage):
            with Grader() as grader:
                run_suite(self._suite(), self._entrants(), stage, grader, self.ranks)
            stage.finish({"shards": len(stage.shards())}, fingerprints={"teacher": inputs["teacher"]})
        self.ranks.barrier()
        self.ranks.on_main(lambda: self._report(stage))

    def publish(self) -> None:
        """6-publish: the chosen student as a Hugging Face folder with its card, uploaded if the config says so."""
        stage = self._open("publish", {"eval": self._input("eval")})
        if self.config.publish.student is None or self._skip(stage):
            return
        self.ranks.on_main(lambda: self._publish(stage))

    def close(self, seconds: float) -> None:
        """The last lines of a run: how long this launch took and where to look."""
        self.ranks.print(f"\ndone in {seconds / 60:.1f} minutes")
        for what, path in (("report", "5-eval/report.html"), ("student", "6-publish")):
            if (self.folder.path / path).exists():
                self.ranks.print(f"  {what:8s} {self.folder.path / path}")
        if self.tracker.url:
            self.ranks.print(f"  {'W&B':8s} {self.tracker.url}")

    def _mixed_in(self, student: Student) -> dict[str, str]:
        """What else a student is trained on: hashes of other runs' stages, of texts the teacher read, and of files."""
        train = self.config.train
        stages = ("traces", "logits") if student.loss.kind == "logits" else ("traces",)
        hashes = {f"{s.name}/{name}": run_of(s).stage(name).manifest_hash for s in train.trace_sets for name in stages}
        if student.loss.kind == "logits":
            hashes |= {f"text/{each.name}": self._input("logits", each.name) for each in train.text_sets}
        return hashes | (prompts.file_hashes(train.general.sources) if train.general else {})

    def _asked(self) -> list[Prompt]:
        """All that the evaluation asks of students."""
        return [*prompts.load_prompts(self.folder.stage("prompts"), "eval"), *general_prompts(RETENTION_PER_KIND)]

    def _suite(self) -> Suite:
        settings, capture = self.config.eval, self.config.teacher.capture
        return Suite(
            prompts=prompts.load_prompts(self.folder.stage("prompts"), "eval"),
            params=SamplingParams(settings.temperature, settings.top_p, 0, settings.max_new_tokens),
            k=settings.k,
            run_seed=self.config.run.seed,
            capture=capture and CaptureSpec(capture.k_max, capture.tail_bound),
            retention=general_prompts(RETENTION_PER_KIND) if settings.retention else (),
            confidence=settings.confidence,
            shard_prompts=self.config.traces.shard_prompts,
        )

    def _entrants(self) -> list[Entrant]:
        teacher = self.config.teacher.path
        who = Candidate("teacher", "teacher", fingerprint=self._teacher_fingerprint())
        found = [Entrant(who, load_tokenizer(teacher), self._open_teacher)]
        bases = {student.path: base_name(student, self.config.students) for student in self.config.students}
        for path, name in bases.items():
            found.append(Entrant(candidate(name, "base", path), load_tokenizer(path), partial(self._student, path)))
        for student in self.config.students:
            path = str(self.folder.stage("train", student.name).path / MODEL)
            who = candidate(student.name, "student", path, base=bases[student.path], loss=student.loss.kind)
            found.append(Entrant(who, load_tokenizer(path), partial(self._student, path)))
        return found

    def _teacher_fingerprint(self) -> str:
        """What identifies the teacher: its weights, or what its service says of them. A service that cannot be reached
        is no obstacle when its traces are finished."""
        if not self.config.teacher.url:
            return fingerprint_checkpoint(self.config.teacher.path)
        traces = self.folder.stage("traces")

        def ask() -> str:
            try:
                return connect(self.config).fingerprint
            except ServiceError as error:
                try:
                    found = traces.manifest["fingerprints"]["teacher"]
                except StoreError:
                    raise error from None
                print(f"{traces.title}: finished before; the teacher's service is not reached ({error.what})")
                return found

        return self.ranks.on_main(ask)

    def _service_record(self, load: Callable[[], ServiceTeacher]) -> dict:
        """For the manifests: where the teacher answered, and what it could not give."""
        if not self.config.teacher.url:
            return {}
        service, capture = load(), self.config.teacher.capture
        lacking = service.limitations(capture and CaptureSpec(capture.k_max, capture.tail_bound, capture.tail_draws))
        for each in lacking:
            self.ranks.print(f"the teacher's service: {each}")
        return {"service": {"url": service.url, "limitations": lacking}}

    @contextmanager
    def _teacher(self) -> Iterator[Callable[[], TeacherEngine | ServiceTeacher]]:
        """A function that loads the teacher, or meets its service, the first time it is called; freed at the end of
        the block."""
        loaded: list[TeacherEngine | ServiceTeacher] = []

        def load() -> TeacherEngine | ServiceTeacher:
            if not loaded and self.config.teacher.url:
                loaded.append(connect(self.config))
            if not loaded:
                settings = self.config.teacher
                loaded.append(
                    TeacherEngine(
                        settings.path,
                        dtype=settings.dtype,
                        device=self.ranks.device,
                        batch_size=settings.batch_size,
                        split=self.split,
                        speculative=settings.speculative,
                    )
                )
                if self.split.size > 1:
                    self.ranks.print(f"teacher: {self.split}; on rank 0: {loaded[0].loaded.report}")
            return loaded[0]

        yield load
        for engine in loaded:  # not after an error: ranks that share a model close it together, and then the run ends
            engine.close()

    @contextmanager
    def _open_teacher(self) -> Iterator[Opened]:
        with self._teacher() as load:
            yield Opened(load(), split=self.split)

    @contextmanager
    def _student(self, path: str) -> Iterator[Opened]:
        dtype = train_dtype(self.config.train.dtype, self.ranks.device)
        if self.ranks.device.type == "cuda":
            name, place = str(dtype).removeprefix("torch."), (self.ranks.rank, self.ranks.world)
            split = student_split(self.config, resolve_checkpoint(path), name, *place)
            if split.size > 1:
                yield from self._cut_student(path, name, split)
                return
        model, tokenizer = load_student(path, dtype, packed=False)
        rollout = Rollout(model, tokenizer, self.ranks.device, self.config.eval.batch_size, faster=paged_loop)

        def score(sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Tensor]:
            rollout.release()  # its pages fill the GPU
            yield from dense_scorer(model)(sequences)

        yield Opened(rollout, score)

    def _cut_student(self, path: str, dtype: str, split: Split) -> Iterator[Opened]:
        """A student that ranks hold together: one GPU has no room for it, or is slower."""
        rows, device = self.config.eval.batch_size, self.ranks.device
        engine = TeacherEngine(path, dtype=dtype, device=device, batch_size=rows, split=split)

        def score(sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Tensor]:
            engine.release()
            yield from dense_scorer(engine.model)(sequences)

        yield Opened(engine, score, split)
        engine.close()  # not after an error: ranks that share a model close it together

    def _report(self, stage: StageFolder) -> None:
        report = write_report(self.folder.path, self.config.model_dump(mode="json"))
        print("\n" + render_table(report))
        self.tracker.table(
            "models", [{k: v for k, v in row.items() if not isinstance(v, list | dict)} for row in report["models"]]
        )
        self.tracker.table("examples", report["examples"])
        for name in ("report.html", "report.json"):
            self.tracker.artifact(f"{self.config.run.name}-{Path(name).suffix[1:]}", stage.path / name)

    def _publish(self, stage: StageFolder) -> None:
        started_s = time.monotonic()
        report = files.read_json(self.folder.stage("eval").path / "report.json", "Run --stages eval again.")
        name = publish.choose_student(self.config, report)
        traces, trained = self.folder.stage("traces").manifest, self.folder.stage("train", name)
        made = Made(
            command=self.command,
            commit=self.folder.commit,
            config_hash=files.digest(self.config.model_dump(mode="json"))[:16],
            teacher_fingerprint=traces["fingerprints"]["teacher"],
            tokenizer_fingerprint=traces["fingerprints"]["tokenizer"],
        )
        result = publish.publish_student(
            self.config, name, trained.path / MODEL, stage.path / name, report=report, made=made
        )
        for warning in publish.warnings(name, report, result):
            print(f"{stage.title}: {warning}")
        stage.finish(
            {"student": name, "bytes": result["bytes"], "url": result["url"]}, wall_s=time.monotonic() - started_s
        )

    def _open(self, name: str, inputs: dict[str, str], part: str | None = None) -> StageFolder:
        stage = self.folder.stage(name, part)
        self._bind(stage, stage_spec(self.config, name, part), inputs)
        return stage

    def _bind(self, stage: StageFolder, spec: dict, inputs: dict[str, str]) -> None:
        self.ranks.main_first(lambda: stage.open(spec, inputs) and None)

    def _input(self, name: str, part: str | None = None) -> str:
        """The hash of a finished earlier stage; an error that names it when it has not finished."""
        return self.folder.stage(name, part).manifest_hash

    def _verify(self, stages: list[StageFolder]) -> None:
        """Compares every shard with its checksum, each rank a share: damage is found before the work, not in it."""
        shards = [(stage, shard.name) for stage in stages for shard in stage.shards()]
        self.ranks.share(shards, lambda each: each[0].check_shard(each[1]))

    def _skip(self, stage: StageFolder, quiet: bool = False) -> bool:
        if (done := self.ranks.on_main(lambda: stage.done)) and not quiet:
            self.ranks.print(f"{stage.title}: finished before, skipped (took {stage.manifest['wall_s']:.0f} s)")
        return done


def connect(config: Config) -> ServiceTeacher:
    """The teacher's service; ServiceError when it cannot be reached or computes in another dtype than the config says.

    The samples in flight are those of one device: the service has its own limits.
    """
    teacher = config.teacher
    token = os.environ.get(teacher.token_env) if teacher.token_env else None
    service = ServiceTeacher(teacher.url, teacher.path, token=token, concurrency=teacher.batch_size)
    if teacher.dtype != "auto" and service.dtype not in (None, teacher.dtype):
        raise ServiceError(
            f"the service computes in {service.dtype}",
            where="teacher.dtype",
            value=teacher.dtype,
            remedy=f"Use {service.dtype} or auto, or start the service with teacher.dtype: {teacher.dtype}.",
        )
    return service
