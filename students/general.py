"""General data for a student: read, kept apart from what the evaluation asks, answered by the base where it is held
to its base.

The base answers before training and is then freed: its distributions come from a cache file, like the teacher's, in
4-student/NAME/general. Shards are captured in the order of a hash until they hold what training will use.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from distill import prompts
from distill.config_mixture import BundledQuestions, General, GeneralSource
from distill.conversations import Row, rows_of
from distill.dist import Ranks
from distill.errors import DataError
from distill.logit_cache import CacheReader, CacheWriter, cache_header
from distill.records import CaptureSpec, Prompt, SampleRequest, SamplingParams, TokenDists, sample_seed
from distill.store import StageFolder
from distill.tokens import fingerprint
from students.data import Example, TraceData, fit
from students.rollout import Rollout

NAME = "general"
SHARD_ROWS = 256
_MAX_DRAWS = 50  # draws per wanted question before a kind counts as exhausted


def read_rows(sources: Sequence[GeneralSource], held_out: Iterable[Prompt], counts: Counter) -> list[Row]:
    """The rows of all sources in the order of a hash, without repeats and without what is asked in `held_out`.

    counts: read, duplicate and overlapping are added. DataError when nothing is left or a row cannot be used.
    """
    asked = {prompts.normalised(prompt.text) for prompt in held_out}
    rows: dict[str, Row] = {}
    for source in sources:
        for row in _bundled(source) if source.kind == "bundled" else rows_of(source):
            counts["read"] += 1
            if any(prompts.normalised(question) in asked for question in row.questions):
                counts["overlapping"] += 1
            elif rows.setdefault(row.key, row) is not row:
                counts["duplicate"] += 1
    if not rows:
        raise DataError(
            f"no general data is left: {counts['overlapping']} of {counts['read']} rows are asked in the evaluation",
            where="train.general.sources",
            remedy="Add other sources, or set train.general: null.",
        )
    return [rows[key] for key in sorted(rows, key=lambda key: hashlib.sha256(key.encode()).digest())]


def _bundled(source: BundledQuestions) -> Iterator[Row]:
    from distill.tasks.general import KINDS, general_item  # its words take a second to load
    from distill.tasks.split import is_heldout

    for kind in KINDS:
        rng, seen = random.Random(f"general/{source.seed}/{kind}"), set()
        for _ in range(source.per_kind * _MAX_DRAWS):
            if len(seen) == source.per_kind:
                break
            prompt = general_item(kind, rng)
            if prompt.key not in seen and not is_heldout(prompt):
                seen.add(prompt.key)
                yield Row((("user", prompt.text), ("assistant", f"\\boxed{{{prompt.answer}}}")))


class GeneralRows:
    """The rows of a config's general data for one tokenizer, and the examples that they become.

    counts: read, duplicate, overlapping; refused, for a special token in a message, a tool call or a text of one token;
    too_long.
    """

    def __init__(
        self,
        settings: General,
        tokenizer: PreTrainedTokenizerFast,
        asked: Iterable[Prompt],
        *,
        max_seq_tokens: int,
        too_long: str = "drop",
    ):
        self.tokenizer, self.counts = tokenizer, Counter(refused=0, too_long=0, overlapping=0, duplicate=0)
        self.max_seq_tokens, self.too_long = max_seq_tokens, too_long
        self.rows = read_rows(settings.sources, asked, self.counts)

    @property
    def digest(self) -> str:
        """16 hex digits over the rows in their order."""
        return hashlib.sha256("/".join(row.key for row in self.rows).encode()).hexdigest()[:16]

    def prompt_ids(self, row: Row) -> list[int] | None:
        """None of a row that cannot be used: with a special token or a tool call in a message, or a prompt that fills a
        whole row."""
        try:
            ids = row.prompt_ids(self.tokenizer)
        except DataError:
            return None
        return ids if len(ids) < self.max_seq_tokens else None

    def completion_ids(self, row: Row) -> list[int]:
        """The data's own answer; empty where plain text is too short to predict anything, or too long for a row."""
        ids = row.completion_ids(self.tokenizer)
        return [] if not row.messages and len(ids) > self.max_seq_tokens and self.too_long == "drop" else ids

    def load(self, needed_tokens: float, caches: dict[str, CacheReader] | None) -> TraceData:
        """Rows that hold needed_tokens input tokens, or all there are: with the base's answers where `caches` has them
        (Base.capture), with the data's own where it is None. DataError when none can be used."""
        found = self._own_answers(needed_tokens) if caches is None else self._base_answers(caches)
        examples = fit(found, self.max_seq_tokens, self.too_long, self.counts)
        if not examples:
            raise DataError(
                f"no row of general data can be used: {dict(self.counts)}",
                where="train.general",
                remedy="Raise train.max_seq_tokens where they are too long, or give other sources.",
            )
        data = TraceData(examples, caches, self.counts)
        self.counts.update(rows=len(found), trained_tokens=sum(data.trained), input_tokens=sum(data.lengths))
        return data

    def _own_answers(self, needed_tokens: float) -> list[Example]:
        examples, tokens = [], 0
        for row in self.rows:
            prompt_ids, completion_ids = self.prompt_ids(row), self.completion_ids(row)
            if prompt_ids is None or not completion_ids:
                self.counts["refused"] += 1
                continue
            examples.append(Example(row.key, prompt_ids, completion_ids, NAME, completion_ids))
            tokens += examples[-1].whole_tokens
            if tokens >= needed_tokens:
                break
        return examples

    def _base_answers(self, caches: dict[str, CacheReader]) -> list[Example]:
        shard_of = {key: shard for shard, reader in caches.items() for key in reader.keys()}  # noqa: SIM118
        examples, asked = [], self.rows[: len(caches) * SHARD_ROWS]
        for row in asked:
            if (shard := shard_of.get(row.key)) is not None:
                ids = caches[shard][row.key].sampled_T.tolist()
                examples.append(Example(row.key, row.prompt_ids(self.tokenizer), ids, shard, ids))
        self.counts["refused"] = len(asked) - len(examples)
        return examples


@dataclass
class Base:
    """The base, asked. load: gives it in memory, called when a shard is missing."""

    fingerprint: str
    load: Callable[[], Rollout]
    settings: General
    spec: CaptureSpec
    run_seed: int

    def capture(
        self, stage: StageFolder, rows: GeneralRows, needed_tokens: float, ranks: Ranks
    ) -> dict[str, CacheReader]:
        """Shard -> its answers and distributions on the first rows that hold needed_tokens, in the opened stage.

        All ranks call this; each makes one shard of a round.
        """
        each, rollout = SHARD_ROWS, None
        shards = [(f"{NAME}-{i // each:05d}.cache", rows.rows[i : i + each]) for i in range(0, len(rows.rows), each)]
        used, tokens = [], 0
        while shards[len(used) :] and tokens < needed_tokens:
            group = shards[len(used) : len(used) + ranks.world]
            for name, some in group[ranks.rank : ranks.rank + 1]:
                if not stage.has_shard(name):
                    rollout = rollout or self.load()
                    self._make_shard(stage, name, some, rollout, rows)
            ranks.barrier()
            used += [name for name, _ in group]
            tokens += sum(stage.check_shard(name).info["tokens"] for name, _ in group)
        caches = {name.removesuffix(".cache"): CacheReader(stage.path / name) for name in used}
        for reader in caches.values():
            reader.require(tokenizer_fingerprint=fingerprint(rows.tokenizer), complete=True)
        return caches

    def _make_shard(
        self, stage: StageFolder, name: str, some: Sequence[Row], rollout: Rollout, rows: GeneralRows
    ) -> None:
        prompt_ids = {row.key: ids for row in some if (ids := rows.prompt_ids(row)) is not None}
        asked = [row for row in some if row.key in prompt_ids]
        found = self._answers(asked, prompt_ids, rollout) | self._texts(asked, prompt_ids, rollout, rows)
        tokens = sum(len(prompt_ids[key]) + len(dists) - 1 for key, dists in found.items())
        header = cache_header(rows.tokenizer, self.fingerprint, rollout.vocab_size, self.spec)

        def write(path: Path) -> None:
            with CacheWriter(path, header) as writer:
                for key, dists in found.items():
                    writer.append(key, dists)

        stage.write_shard(name, write, {"rows": len(found), "tokens": tokens})

    def _answers(
        self, rows: Sequence[Row], prompt_ids: dict[str, list[int]], rollout: Rollout
    ) -> dict[str, TokenDists]:
        """What it answers to each conversation."""
        asked = [row.key for row in rows if row.messages]
        requests = [SampleRequest(k, 0, tuple(prompt_ids[k]), sample_seed(self.run_seed, k, 0)) for k in asked]
        params = SamplingParams(self.settings.temperature, 1.0, 0, self.settings.max_new_tokens)
        found = {sample.key: sample.dists for sample in rollout.sample(requests, params, self.spec)}
        return {key: found[key] for key in asked}

    def _texts(
        self, asked: Sequence[Row], prompt_ids: dict[str, list[int]], rollout: Rollout, rows: GeneralRows
    ) -> dict[str, TokenDists]:
        """What it would say at every token of each plain text."""
        pairs = {row.key: (prompt_ids[row.key], rows.completion_ids(row)) for row in asked if not row.messages}
        pairs = {key: pair for key, pair in pairs.items() if pair[1]}
        return dict(zip(pairs, rollout.score(list(pairs.values()), self.spec))) if pairs else {}
