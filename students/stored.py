"""The traces of a run in a student's tokens: each shard is read and cut once, by one rank, and kept on disk.

    4-student/NAME/tokens/SHARD.ids    int32, its kept traces one behind the other, mapped into memory where they lie:
                                       the ranks of a node share them
                          SHARD.about  where each begins, and what was counted: an npz behind its CRC; written last

A launch that goes on finds them there; what another tokenizer or another shard made is made again.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from distill import files
from distill.align import TextCounts
from distill.align_keep import KeepCounts
from distill.dist import Ranks
from distill.errors import DataError
from distill.records import Prompt, Trace
from distill.store import Shard, StageFolder
from distill.tokens import PREFILL, encode_completion, end_id, render_prompt
from distill.traceset import read_traces
from students.aligned import AlignedSignal, Learned

FOLDER = "tokens"
HALF = "\ufffd"  # what a text has in place of bytes that are no character


class Ids(Sequence[int]):
    """A run of token ids that lie in an array, perhaps on disk; what is asked of it is copied then."""

    __slots__ = ("_array", "_start", "_stop")

    def __init__(self, array: np.ndarray, start: int, stop: int):
        self._array, self._start, self._stop = array, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, at):
        return self._list()[at]

    def __iter__(self) -> Iterator[int]:
        return iter(self._list())

    def __add__(self, other: Sequence[int]) -> list[int]:
        return self._list() + list(other)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self._array[self._start : self._stop], dtype)

    def _list(self) -> list[int]:
        return self._array[self._start : self._stop].tolist()


@dataclass(frozen=True)
class ShardTokens:
    """The kept traces of one shard. sampled: completions in the teacher's tokens; counts: of load_traces; learned: what
    the aligner learns of them, None without one."""

    keys: list[str]
    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    sampled: Sequence[Sequence[int]]
    counts: dict[str, int]
    learned: Learned | None


@dataclass(frozen=True)
class TraceReader:
    """Reads a stage of traces for one student. tokenizer: the student's where it is not the teacher's, else None."""

    traces: StageFolder
    tokenizer: PreTrainedTokenizerFast | None
    aligned: AlignedSignal | None
    leave_out: Callable[[Prompt], bool] | None

    def shards(self, store: "TokenStore | None", ranks: Ranks | None) -> Iterator[tuple[str, ShardTokens]]:
        """(name, its traces), shard by shard. With a store all ranks call this, and each cuts its share of what the
        store lacks. Errors: DataError, StoreError; of one rank on all."""
        shards = [shard for shard in self.traces.shards() if shard.name.endswith(".parquet")]
        if store is not None:
            self._fill(store, shards, ranks)
        for shard in shards:
            found = store and store.read(shard)
            yield _name(shard), found or self.cut(shard)

    def cut(self, shard: Shard) -> ShardTokens:
        part = read_traces(self.traces.check_shard(shard.name).path)
        kept, own = [trace for trace in part if trace.keep], self.tokenizer is None
        counts = {"traces": len(part)}
        if self.leave_out is not None:
            counts["overlapping"] = len(kept) - len(kept := [t for t in kept if not self.leave_out(t.prompt)])
        if not own and self.aligned is None:
            counts["not_utf8"] = len(kept) - len(kept := [t for t in kept if HALF not in t.text])
        counts |= {"kept": len(kept), "retokenised": 0 if own else len(kept)}
        sampled, learned = [list(trace.completion_ids) for trace in kept], None
        if self.aligned is not None:
            completions, learned = self.aligned.cut(sampled)
        else:
            completions = sampled if own else [self._encode(trace) for trace in kept]
        prompts = [list(t.prompt_ids) if own else render_prompt(self.tokenizer, t.prompt.text) for t in kept]
        for trace, prompt_ids, completion_ids in zip(kept, prompts, completions):
            if not prompt_ids or not completion_ids:
                raise DataError(
                    "the prompt or the completion is empty",
                    where=f"2-traces/{shard.name} trace {trace.sample_key}",
                    remedy="Delete the shard and run again: it is sampled again.",
                )
        return ShardTokens([trace.sample_key for trace in kept], prompts, completions, sampled, counts, learned)

    def _encode(self, trace: Trace) -> list[int]:
        """The trace's text in the student's ids; a completion that stopped gets its stop token."""
        ids = encode_completion(self.tokenizer, trace.text.removeprefix(PREFILL))
        return ids + ([end_id(self.tokenizer)] if trace.finish_reason == "stop" else [])

    def _fill(self, store: "TokenStore", shards: list[Shard], ranks: Ranks) -> None:
        own = len(shards[ranks.rank :: ranks.world])
        with tqdm(total=own, desc="tokens of the traces", unit="shard", disable=not ranks.is_main, delay=2) as bar:

            def make(shard: Shard) -> None:
                if store.has(shard):
                    self.traces.check_shard(shard.name)
                else:
                    store.write(shard, self.cut(shard))
                bar.update()

            ranks.share(shards, make)


@dataclass(frozen=True)
class TokenStore:
    """What was cut of each shard, in `folder`. made_by: what the ids hang on besides the shard's bytes."""

    folder: Path
    made_by: str

    def has(self, shard: Shard) -> bool:
        """Whether it is there, every byte of it as it was written."""
        told = self._told(shard)
        return told is not None and int(told["crc"]) == zlib.crc32(self._ids(shard, told))

    def write(self, shard: Shard, found: ShardTokens) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        columns = [found.prompts, found.completions]
        columns += [] if found.sampled is found.completions else [found.sampled]
        sizes_BC = np.array([[len(column[b]) for column in columns] for b in range(len(found.keys))], np.int64)
        parts = [np.asarray(column[b], np.int32) for b in range(len(found.keys)) for column in columns]
        array = np.concatenate([np.zeros(0, np.int32), *parts])
        told = {"mark": np.array(self._mark(shard)), "crc": np.array(zlib.crc32(array))}
        told |= {"keys": np.array(found.keys, "U"), "sizes_BC": sizes_BC}
        told |= {f"count_{name}": np.array(value) for name, value in found.counts.items()}
        if found.learned is not None:
            keep = found.learned.counts.keep
            told |= {"seen_P": keep.seen_P, "agreed_P": keep.agreed_P, "used_S": found.learned.counts.used_S}
            told["coverage"] = found.learned.coverage
        np.savez_compressed(about := BytesIO(), **told)
        with files.disk_errors(self.folder):
            with files.replacing(self._path(shard, "ids")) as path:
                array.tofile(path)
            with files.replacing(self._path(shard, "about")) as path:
                path.write_bytes(zlib.crc32(about.getbuffer()).to_bytes(4) + about.getbuffer())

    def read(self, shard: Shard) -> ShardTokens | None:
        """None where it is not there, was cut short, or is of another shard or tokenizer. The ids' bytes are checked by
        `has` alone."""
        if (told := self._told(shard)) is None:
            return None
        array, sizes_BC = self._ids(shard, told), told["sizes_BC"]
        ends = np.cumsum(sizes_BC.reshape(-1)).tolist()
        runs = [Ids(array, start, stop) for start, stop in zip([0, *ends], ends)]
        columns = sizes_BC.shape[1] if len(sizes_BC) else 2
        counts = {name.removeprefix("count_"): int(value) for name, value in told.items() if name.startswith("count_")}
        learned = None
        if "coverage" in told:
            keep = KeepCounts(told["seen_P"], told["agreed_P"])
            learned = Learned(TextCounts(keep, told["used_S"]), told["coverage"])
        sampled = runs[columns - 1 :: columns]
        return ShardTokens(told["keys"].tolist(), runs[::columns], runs[1::columns], sampled, counts, learned)

    def _told(self, shard: Shard) -> dict[str, np.ndarray] | None:
        try:
            data, size = self._path(shard, "about").read_bytes(), self._path(shard, "ids").stat().st_size
        except OSError:
            return None
        if zlib.crc32(data[4:]).to_bytes(4) != data[:4]:
            return None
        with np.load(BytesIO(data[4:])) as told:
            found = dict(told)
        return found if str(found["mark"]) == self._mark(shard) and size == 4 * found["sizes_BC"].sum() else None

    def _ids(self, shard: Shard, told: dict[str, np.ndarray]) -> np.ndarray:
        # Nothing cannot be mapped.
        return np.memmap(self._path(shard, "ids"), np.int32, "r") if told["sizes_BC"].size else np.zeros(0, np.int32)

    def _mark(self, shard: Shard) -> str:
        return f"{shard.sha256}/{self.made_by}"

    def _path(self, shard: Shard, what: str) -> Path:
        return self.folder / f"{_name(shard)}.{what}"


def _name(shard: Shard) -> str:
    return shard.name.removesuffix(".parquet")
