"""What the teacher makes of text that it did not write: 3-logits/NAME, its distributions over the assistant's tokens.

The same cache as that of traces, marked as not sampled. One shard is scored before the next begins; a killed run
repeats at most one a rank. Which turns can be read hangs on tokenizer and file alone: every launch cuts the same
shards.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from distill.checkpoints import check_checkpoint
from distill.config import Config
from distill.config_mixture import TextSet
from distill.conversations import REJECTED, Readable, Row, read_turns, rows_of
from distill.dist import Ranks
from distill.errors import DataError
from distill.logit_cache import CacheWriter, cache_header
from distill.records import CaptureSpec, TokenDists
from distill.split import Split
from distill.store import RunFolder, StageFolder
from distill.tokens import load_tokenizer
from teachers.engine import TeacherEngine


@dataclass(frozen=True)
class Text:
    """One turn of the assistant in the teacher's tokens."""

    key: str
    prompt_ids: list[int]
    completion_ids: list[int]

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def readable_texts(
    each: TextSet, tokenizer: PreTrainedTokenizerFast, max_positions: int | None = None
) -> tuple[list[Text], dict[str, int]]:
    """(the turns of a set that this teacher can read, in the order of the file; counts of what was read and why turns
    were left out). max_positions: the teacher's longest sequence. DataError when none is left."""
    counts = Counter(dict.fromkeys(("read", "turns", *REJECTED), 0))
    readable = _readable(each, tokenizer, max_positions)
    texts = []
    for row in read_turns(each.source, counts):
        found = readable.ids(row)
        if isinstance(found, str):
            counts[found] += 1
        else:
            texts.append(Text(row.key, *found))
    if not texts:
        raise DataError(
            f"the teacher can read none of the texts: {dict(counts)}",
            where=f"train.text_sets {each.name}",
            remedy="Raise its max_tokens where they are too long, or give other conversations.",
        )
    return texts, dict(counts)


def check_texts(config: Config, run: RunFolder) -> None:
    """DataError, as readable_texts, for a set that is not read yet and cannot be, and as rows_of for general data, or
    where no row of it can be asked of a student: told before the hours that traces take, and without cutting all of it
    into tokens."""
    if config.train.general and not run.stage("traces").done:
        sources = config.train.general.sources
        rows = [row for source in sources if source.kind != "bundled" for row in rows_of(source)]
        if all(source.kind != "bundled" for source in sources):
            for path in sorted({student.path for student in config.students}):
                _require_askable(rows, path)
    for each in config.train.text_sets:
        if run.stage("logits", each.name).done:
            continue
        readable = _readable(each, *_of_teacher(config))
        if all(isinstance(readable.ids(row), str) for row in read_turns(each.source, Counter())):
            readable_texts(each, readable.tokenizer, readable.max_tokens)


def _require_askable(rows: list[Row], path: str) -> None:
    """DataError, with the first row's reason, unless the student of this checkpoint can be asked one of the rows."""
    tokenizer, refused = load_tokenizer(path), None
    for row in rows:
        try:
            row.prompt_ids(tokenizer)
            return
        except DataError as error:
            refused = refused or error
    if refused:
        what = f"none of {len(rows)} rows can be asked of {path}; the first: {refused.what}"
        raise DataError(what, where="train.general.sources", value=refused.value, remedy=refused.remedy)


def _readable(each: TextSet, tokenizer: PreTrainedTokenizerFast, max_positions: int | None) -> Readable:
    return Readable(tokenizer, min(each.max_tokens, max_positions or each.max_tokens))


def _of_teacher(config: Config) -> tuple[PreTrainedTokenizerFast, int | None]:
    """(the teacher's tokenizer, its longest sequence where that is known)."""
    teacher = config.teacher
    longest = None if teacher.url else check_checkpoint(teacher.path).get("max_position_embeddings")
    return load_tokenizer(teacher.path), longest


@dataclass
class TextStage:
    """Everything one rank needs to have its share of a set read."""

    config: Config
    each: TextSet
    stage: StageFolder
    ranks: Ranks
    load_teacher: Callable[[], TeacherEngine]  # called only when something is missing
    split: Split  # who holds the teacher, and who works on which share

    def run(self) -> dict[str, int]:
        """Scores every missing shard, each rank its share; the counts of the whole set when all are complete."""
        texts, counts = readable_texts(self.each, *_of_teacher(self.config))
        self._score(texts)
        self.ranks.barrier()
        return counts | {"texts": len(texts), "tokens": sum(len(text.completion_ids) for text in texts)}

    def _score(self, texts: list[Text]) -> None:
        size = self.config.traces.shard_prompts
        shards = {f"{self.each.name}-{i // size:05d}.cache": texts[i : i + size] for i in range(0, len(texts), size)}
        missing = self.ranks.on_main(lambda: [name for name in shards if not self.stage.has_shard(name)])
        turns = self.split.turns(missing)
        if not turns:
            return
        engine = self.load_teacher()
        total, todo = (
            sum(text.tokens for name in names for text in shards[name]) // self.split.shares
            for names in (shards, missing)
        )
        about = {"desc": f"read {self.each.name}", "unit": "tok", "unit_scale": True, "disable": not self.ranks.is_main}
        with tqdm(total=total, initial=total - todo, **about) as bar:
            for name in turns:
                self._make_shard(name, shards.get(name, []), engine, bar)

    def _make_shard(self, name: str | None, texts: Sequence[Text], engine: TeacherEngine, bar: tqdm) -> None:
        started_s, spec = time.monotonic(), self.config.teacher.capture
        capture = CaptureSpec(spec.k_max, spec.tail_bound, spec.tail_draws)
        found = engine.score([(text.prompt_ids, text.completion_ids) for text in texts], capture)
        bar.update(sum(text.tokens for text in texts))
        if name is None or self.split.tensor_rank > 0:
            return  # the first of a tensor-parallel group has the same distributions, and writes them
        wall_s = time.monotonic() - started_s
        self.stage.write_shard(
            name,
            lambda path: write_read(path, dict(zip((text.key for text in texts), found)), engine, capture),
            {"texts": len(texts), "tokens": sum(len(text.completion_ids) for text in texts)},
            wall_s=wall_s,
            device_s=wall_s * self.split.tensor_parallel,
        )


def write_read(path: Path, dists: dict[str, TokenDists], engine: TeacherEngine, capture: CaptureSpec) -> None:
    """One cache file of texts that the teacher read, marked so."""
    header = cache_header(engine.tokenizer, engine.fingerprint, engine.vocab_size, capture, sampled=False)
    with CacheWriter(path, header) as writer:
        for key, each in dists.items():
            writer.append(key, each)
