"""A student that learns from its own mistakes: after the traces, rounds of writing, being read, and training.

    4-student/NAME/round-0             trained on the traces, as without rounds
                   round-R/said        what the student of the round before answers to training prompts, by seed
                   round-R/read        the teacher's distributions over that (teachers/texts.py)
                   round-R             trained on it and on traces, from the weights of the round before
    4-student/NAME/model, train.json, log.jsonl     the last round's model; all rounds' steps

Only what ended by itself is read: a completion cut short, or one that never closed its reasoning, is counted and left
out; so is one with half a character in it, which no text can hold. A killed launch goes on in the round, and in the
shard, in which it stopped.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from distill import files
from distill.checkpoints import fingerprint_checkpoint
from distill.client import ServiceTeacher
from distill.config import Config, Student
from distill.config_mixture import GeneralJsonl, TextSet
from distill.conversations import Row
from distill.dist import Ranks
from distill.errors import DataError
from distill.evals.run_files import read_log
from distill.evals.suite import Opened
from distill.prompts import load_prompts
from distill.records import Prompt, Sample, SampleRequest, SamplingParams, sample_seed
from distill.split import Split
from distill.store import StageFolder
from distill.tokens import PREFILL, THINK_CLOSE, fingerprint, load_tokenizer, render_prompt, stop_ids, token_bytes
from distill.tracking import Tracker
from students.log import LOG
from students.prepare import OwnText
from students.train import MODEL, SUMMARY, is_trained, train_student
from teachers.engine import TeacherEngine
from teachers.texts import TextStage

SAID, READ = "said", "read"
Load = Callable[[], TeacherEngine | ServiceTeacher]


@dataclass(frozen=True)
class Rounds:
    """One student's training. All ranks call `run`. stage: 4-student/NAME, opened. asked: what the evaluation asks.
    open_student: gives the model of a folder in memory; open_teacher: a function that loads the teacher when called."""

    config: Config
    student: Student
    traces: StageFolder
    logits: StageFolder
    stage: StageFolder
    ranks: Ranks
    tracker: Tracker
    split: Split
    asked: Sequence[Prompt]
    open_student: Callable[[str], AbstractContextManager[Opened]]
    open_teacher: Callable[[], AbstractContextManager[Load]]

    def run(self) -> dict:
        """The counts of all rounds, as train_student gives those of one; of that one alone where none is asked for."""
        folder, policy = self.stage.path, self.config.train.on_policy
        if policy is None or self.student.loss.kind == "response":
            own = (self.stage, self.ranks, self.tracker, self.asked)
            return train_student(self.config, self.student, self.traces, self.logits, *own)
        if not self.ranks.on_main(lambda: is_trained(folder)):
            given = (self.traces, self.logits)
            train_student(self.config, self.student, *given, self._part(0), self.ranks, self.tracker, self.asked)
            for number in range(1, policy.rounds + 1):
                if self.ranks.on_main(lambda n=number: is_trained(self._part(n).path)):
                    continue
                each = self._say(number)
                read = self._read(number, each)
                config, student = self._settings(number)
                said = OwnText(each, read, policy.share, self.config.run.seed + number)
                train_student(config, student, *given, self._part(number), self.ranks, self.tracker, said=said)
        return self.ranks.on_main(self._finish)

    def _part(self, number: int, what: str = "") -> StageFolder:
        return StageFolder(
            self.stage.run, "train", "/".join(filter(None, [self.student.name, f"round-{number}", what]))
        )

    def _model(self, number: int) -> str:
        return str(self._part(number).path / MODEL)

    def _settings(self, number: int) -> tuple[Config, Student]:
        """Config and student of a round: one pass over what was read, a lower learning rate."""
        train = self.config.train
        alone = {"trace_sets": [], "text_sets": [], "general": None, "epochs": 1, "on_policy": None}
        lower = {"lr": train.lr * train.on_policy.lr_ratio, "curriculum": "none"}
        changed = {"name": f"{self.student.name}/round-{number}", "path": self._model(number - 1)}
        student = self.student.model_copy(update=changed)
        return self.config.model_copy(update={"train": train.model_copy(update=alone | lower)}), student

    def _say(self, number: int) -> TextSet:
        """The set of what the student of the round before says."""
        policy, stage = self.config.train.on_policy, self._part(number, SAID)
        sampling = self.config.teacher.sampling.model_dump(mode="json", exclude={"n"})
        spec = {"prompts": policy.prompts, "sampling": sampling, "round": number, "seed": self.config.run.seed}
        inputs = {"model": fingerprint_checkpoint(self._model(number - 1))}
        self.ranks.main_first(lambda: stage.open(spec, inputs) and None)
        path = stage.path.parent / f"{SAID}.jsonl"
        if not self.ranks.on_main(lambda: stage.done and path.exists()):
            self._sample(number, stage)
            counts = self.ranks.on_main(lambda: _join(stage, path))
            stage.finish(counts)
            self.ranks.barrier()
            self.ranks.print(f"{stage.title}: {json.dumps(counts)}")
        return TextSet(name=SAID, source=GeneralJsonl(path=str(path)))

    def _sample(self, number: int, stage: StageFolder) -> None:
        policy, size = self.config.train.on_policy, self.config.traces.shard_prompts
        prompts = load_prompts(self.stage.run.stage("prompts"), "train")
        chosen = choose(prompts, policy.prompts, self.config.run.seed, number)
        shards = {f"{SAID}-{i // size:05d}.jsonl": chosen[i : i + size] for i in range(0, len(chosen), size)}
        missing = self.ranks.on_main(lambda: [name for name in shards if not stage.has_shard(name)])
        about = {"desc": f"{self.student.name} round {number}", "unit": "text", "disable": not self.ranks.is_main}
        if not missing:
            return
        with self.open_student(self._model(number - 1)) as opened:
            split = opened.split or Split(rank=self.ranks.rank, world=self.ranks.world)
            with tqdm(total=len(chosen) // split.shares, **about) as bar:
                for name in split.turns(missing):
                    self._make_shard(stage, number, name, shards.get(name, []), opened, split, bar)
        self.ranks.barrier()

    def _make_shard(self, stage, number: int, name: str | None, prompts, opened: Opened, split: Split, bar) -> None:
        sampling, tokenizer = self.config.teacher.sampling, opened.sampler.tokenizer
        params = SamplingParams(sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens)
        seed = self.config.run.seed
        asked = askable(prompts, tokenizer)
        wanted = [SampleRequest(p.key, number, ids, sample_seed(seed, p.key, -number)) for p, ids in asked]
        samples: dict[str, Sample] = {}
        for sample in opened.sampler.sample(wanted, params):
            samples[sample.key] = sample
            bar.update()
        if name is None or split.tensor_rank > 0:
            return
        counts = Counter(said=len(asked), refused=len(prompts) - len(asked), truncated=0, not_utf8=0, unclosed=0)
        lines, bytes_V, stops = [], token_bytes(tokenizer), stop_ids(tokenizer)
        for prompt, _ in asked:
            row = conversation(prompt, samples[prompt.key], bytes_V, stops)
            if isinstance(row, str):
                counts[row] += 1
            else:
                lines.append(json.dumps({"messages": row}) + "\n")
        stage.write_shard(name, lambda path: path.write_text("".join(lines)), dict(counts))

    def _read(self, number: int, each: TextSet) -> StageFolder:
        """The teacher's distributions over the set."""
        stage, teacher = self._part(number, READ), self.config.teacher
        with self.open_teacher() as load:
            said, prints = self._part(number, SAID).manifest_hash, self.traces.manifest["fingerprints"]
            spec = {"capture": teacher.capture.model_dump(mode="json"), "dtype": teacher.dtype}
            inputs = {"said": said, "teacher": prints["teacher"]}
            self.ranks.main_first(lambda: stage.open(spec, inputs) and None)
            if not self.ranks.on_main(lambda: stage.done):
                counts = TextStage(self.config, each, stage, self.ranks, load, self.split).run()
                stage.finish(counts, fingerprints={"tokenizer": fingerprint(load_tokenizer(teacher.path))})
                self.ranks.barrier()
                self.ranks.print(f"{stage.title}: {json.dumps(counts)}")
        return stage

    def _finish(self) -> dict:
        folder, rounds = self.stage.path, range(self.config.train.on_policy.rounds + 1)
        if is_trained(folder):
            return files.read_json(folder / SUMMARY, f"Delete {folder / SUMMARY} and run again.")
        found = [files.read_json(self._part(n).path / SUMMARY, f"Delete {folder} and run again.") for n in rounds]
        own = {f"round_{n}_{name}": value for n in rounds[1:] for name, value in found[n].items()}
        summed = {name: sum(each[name] for each in found) for name in ("steps", "tokens", "wall_s")}
        lines, done = [], 0
        for n in rounds:
            log = read_log(self._part(n).path / LOG)
            lines += [json.dumps(row | {"step": done + row["step"], "round": n}) + "\n" for row in log]
            done += found[n]["steps"]
        with files.replacing(folder / LOG) as path:
            path.write_text("".join(lines))
        summary = found[0] | own | summed | {"loss": found[-1]["loss"]}
        files.write_json(folder / SUMMARY, summary)
        os.replace(self._model(rounds[-1]), folder / MODEL)  # last: it marks all rounds as finished
        return summary


def choose(prompts: Sequence[Prompt], count: int | None, seed: int, number: int) -> list[Prompt]:
    """The prompts of a round: the first `count` in an order of its own, all for None."""
    order = sorted(prompts, key=lambda p: hashlib.sha256(f"{seed}/round {number}/{p.key}".encode()).digest())
    return order[:count]


def askable(prompts: Sequence[Prompt], tokenizer) -> list[tuple[Prompt, tuple[int, ...]]]:
    """The prompts that the student can be asked, with their ids: none that holds a special token of its tokenizer."""
    found = []
    for prompt in prompts:
        with suppress(DataError):
            found.append((prompt, tuple(render_prompt(tokenizer, prompt.text))))
    return found


def conversation(prompt: Prompt, sample: Sample, bytes_V: Sequence[bytes], stops: Sequence[int]) -> list[dict] | str:
    """The messages of a completion, which read as the very bytes that the student wrote; or why it is left out.

    bytes_V: tokens.token_bytes of the student's tokenizer. stops: the ids that end a completion.
    """
    if sample.finish_reason != "stop":
        return "truncated"
    try:
        text = b"".join(bytes_V[i] for i in sample.completion_ids if i not in stops).decode()
    except UnicodeDecodeError:
        return "not_utf8"
    messages = [("user", prompt.text), ("assistant", PREFILL + text)]
    if THINK_CLOSE not in text or Row(tuple(messages)).answer != text:
        return "unclosed"
    return [{"role": role, "content": content} for role, content in messages]


def _join(stage: StageFolder, path: Path) -> dict[str, int]:
    """All shards as one file, and their counts added up; DataError when nothing is in them."""
    counts, texts = Counter(), []
    for shard in stage.shards():
        counts.update(shard.info)
        texts.append(stage.check_shard(shard.name).path.read_text())
    if not any(texts):
        raise DataError(
            f"nothing that the student says can be read: {dict(counts)}",
            where=stage.title,
            remedy="Train longer on the traces first (train.epochs), or raise teacher.sampling.max_new_tokens.",
        )
    with files.replacing(path) as temporary:
        temporary.write_text("".join(texts))
    return dict(counts)
