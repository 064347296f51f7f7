"""The teacher's sparse distributions on disk: append by trace, random access by trace, safe against a killed writer.

Each rank writes its own file, and there is no merge. Layout and checksums: cache_format.py; coding: cache_codec.py.

Shape legend: N tokens of all traces together, K support entries (padded).
"""

import fcntl
import hashlib
import mmap
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from distill.cache_codec import decode, encode
from distill.cache_format import (
    DATA,
    INDEX,
    CacheHeader,
    Damage,
    Entry,
    Torn,
    damaged,
    pack_block,
    pack_closing_mark,
    pack_header,
    pack_index,
    parse_block,
    parse_header,
    read_contents,
)
from distill.errors import DataError, StoreError
from distill.records import CaptureSpec, TokenDists
from distill.tokens import fingerprint

__all__ = ["CacheHeader", "CacheReader", "CacheWriter", "cache_header", "to_sparse_targets"]


def cache_header(
    tokenizer, teacher_fingerprint: str, vocab_size: int, capture: CaptureSpec, *, sampled: bool = True
) -> CacheHeader:
    """Provenance of a cache: whose distributions, over which vocabulary, cut where; sampled: of tokens drawn from
    them."""
    return CacheHeader(
        teacher_fingerprint=teacher_fingerprint,
        tokenizer_fingerprint=fingerprint(tokenizer),
        template_hash=hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()[:16],
        vocab_size=vocab_size,
        k_max=capture.k_max,
        tail_bound=capture.tail_bound,
        tail_draws=capture.tail_draws,
        min_mass=capture.min_mass,
        sampled=sampled,
    )


class CacheWriter:
    """Appends distributions to a cache file; an existing file goes on after its last whole block.

    After `append` returns the block survives a kill of this process; after `flush` also a crash of the machine.
    Raises DataError when the file holds other provenance or is damaged, StoreError when it cannot be written.
    """

    def __init__(self, path: str | Path, header: CacheHeader):
        self.path, self.header = Path(path), header
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            remedy = "Create the folder, or make it writable."
            raise StoreError(
                "cannot write the teacher cache", where=str(path), value=error.strerror, remedy=remedy
            ) from None
        try:
            self._lock()
            self._entries, self._end = self._resume()
        except BaseException:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "Give each rank its own file, or stop the other run."
            raise StoreError(
                "another process is writing this teacher cache", where=str(self.path), remedy=remedy
            ) from None
        except OSError:
            pass  # some network file systems have no locks

    def _resume(self) -> tuple[dict[str, Entry], int]:
        size = os.fstat(self._file).st_size
        fresh = pack_header(self.header)
        if size < len(fresh) and fresh.startswith(os.pread(self._file, size, 0)):  # new, or killed inside its header
            os.ftruncate(self._file, 0)
            self._write_at(0, fresh)
            return {}, len(fresh)
        contents = read_contents(memoryview(mmap.mmap(self._file, size, access=mmap.ACCESS_READ)), self.path)
        wanted, found = asdict(self.header), asdict(contents.header)
        differing = {
            name: (found[name], wanted[name]) for name in wanted if name != "versions" and found[name] != wanted[name]
        }
        if differing:
            raise DataError(
                "this teacher cache holds distributions of another origin (found, wanted)",
                where=str(self.path),
                value=differing,
                remedy="Use another run.name, or delete the file.",
            )
        os.ftruncate(self._file, contents.end)
        return {entry.key: entry for entry in contents.entries}, contents.end

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def keys(self) -> list[str]:
        """Keys of all blocks in the file, in the order of writing."""
        return list(self._entries)

    def append(self, key: str, dists: TokenDists) -> int:
        """Bytes written for one trace. Raises DataError for a key that is there already or distributions out of
        bounds."""
        where = f"{self.path}, trace {key}"
        if key in self._entries:
            raise DataError(
                "this trace is in the cache already", where=where, remedy="Skip traces that `key in writer` finds."
            )
        header = self.header
        payload = encode(dists, where, header.vocab_size, header.sqrt_step, header.log_bound, header.min_mass)
        block = pack_block(DATA, key, len(dists), payload)
        self._write_at(self._end, block)
        self._entries[key] = Entry(key, self._end, self._end + len(block), len(dists))
        self._end += len(block)
        return len(block)

    def _write_at(self, offset: int, data: bytes) -> None:
        """All of `data`, or StoreError with the file as it was before."""
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._file, data[written:], offset + written)
        except OSError as error:
            os.ftruncate(self._file, offset)
            raise StoreError(
                f"cannot write {len(data)} bytes: {error.strerror}",
                where=str(self.path),
                remedy="Free disk space and start again: nothing written before is lost.",
            ) from None

    def flush(self) -> None:
        """Wait until everything appended is on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Write the index and the closing mark, and wait for the disk. A second call does nothing."""
        if self._file < 0:
            return
        try:
            index = pack_block(INDEX, "", len(self._entries), pack_index(self._entries.values()))
            self._write_at(self._end, index + pack_closing_mark(self._end))
            self.flush()
        finally:
            self._release()

    def _release(self) -> None:
        os.close(self._file)
        self._file = -1

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        """Closes with an index; after an error without one, so that the file reads as unfinished."""
        if error_type is None:
            self.close()
        elif self._file >= 0:
            self._release()


class CacheReader:
    """Random access to a cache file by trace key; memory-mapped, safe to pickle into worker processes.

    header: CacheHeader. complete: whether the writer closed it; if not, it holds the whole blocks written so far.
    Raises DataError, naming file and block, for anything that does not check.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            remedy = "Check that the traces stage has written it."
            raise DataError(
                "cannot read the teacher cache", where=str(path), value=error.strerror, remedy=remedy
            ) from None
        self._data = memoryview(self._map)
        contents = read_contents(self._data, self.path)
        self.header, self.complete, self._end = contents.header, contents.complete, contents.end
        self._entries = {entry.key: entry for entry in contents.entries}

    def __reduce__(self):
        return CacheReader, (self.path,)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def keys(self) -> list[str]:
        """Keys of all traces, in the order of writing."""
        return list(self._entries)

    def tokens(self, key: str) -> int:
        """Number of tokens of a trace, without decoding it."""
        return self._entry(key).tokens

    def __getitem__(self, key: str) -> TokenDists:
        """The distributions of a trace: sampled tokens as written, and of each support the entries of at least the
        header's min_mass, masses and tail rounded as cache_levels.py says and summing to 1, most likely first."""
        entry = self._entry(key)
        return decode(self._payload(entry), entry.tokens, self.header.sqrt_step, self.header.log_bound)

    def _entry(self, key: str) -> Entry:
        if key not in self._entries:
            remedy = "Capture the trace again, or drop it from the training set."
            raise DataError(f"no distributions of trace {key}", where=str(self.path), remedy=remedy)
        return self._entries[key]

    def _payload(self, entry: Entry) -> memoryview:
        try:
            kind, found, payload = parse_block(self._data, entry.offset)
            if kind != DATA or found != entry:
                raise Damage("the index points to another block")
        except (Damage, Torn) as problem:
            number = list(self._entries).index(entry.key)
            raise damaged(self.path, entry.offset, number, f"trace {entry.key}: {problem}") from None
        return payload

    def verify(self) -> int:
        """Number of blocks, after every checksum matched and the blocks fill the file without a gap."""
        _, offset = parse_header(self._data, self.path)
        for number, entry in enumerate(self._entries.values()):
            self._payload(entry)
            if entry.offset != offset:
                raise damaged(self.path, offset, number, "bytes that belong to no block")
            offset = entry.end
        if offset != self._end:
            raise damaged(self.path, offset, len(self._entries), "bytes that belong to no block")
        return len(self._entries)

    def require(
        self,
        *,
        tokenizer_fingerprint: str | None = None,
        vocab_size: int | None = None,
        complete: bool = False,
        sampled: bool | None = None,
    ) -> None:
        """Raise DataError unless the cache is of this tokenizer and vocabulary and, where asked, closed by its writer,
        and of tokens that were sampled from it, or were not."""
        if sampled not in (None, self.header.sampled):
            has = "was sampled by the teacher" if self.header.sampled else "the teacher only read"
            raise DataError(
                f"this teacher cache is of text that {has}",
                where=str(self.path),
                remedy="Put it back where it was: samples and other texts are learned in different ways.",
            )
        for name, wanted in (("tokenizer_fingerprint", tokenizer_fingerprint), ("vocab_size", vocab_size)):
            found = getattr(self.header, name)
            if wanted is not None and found != wanted:
                raise DataError(f"{name} of this teacher cache is not {wanted!r}", where=str(self.path), value=found,
                                remedy="Use traces captured with this tokenizer, or align them to it.")  # fmt: skip
        if complete and not self.complete:
            raise DataError(
                "the writer of this teacher cache did not finish",
                where=str(self.path),
                value=f"{len(self)} traces",
                remedy="Run the traces stage again: it goes on at the first missing trace.",
            )

    def close(self) -> None:
        self._data.release()
        if isinstance(self._map, mmap.mmap):
            self._map.close()

    def __enter__(self) -> "CacheReader":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def to_sparse_targets(
    dists: TokenDists | list[TokenDists], width: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids [N, K] int64, logprobs [N, K] float32, tail [N] float32) of all tokens, one trace after the other.

    K is `width`, or the largest support; padding has id 0 and log-probability -inf. Raises DataError when `width` is
    too small.
    """
    parts = [dists] if isinstance(dists, TokenDists) else dists
    sizes_N = np.concatenate([np.diff(part.offsets_T1) for part in parts] or [np.zeros(0, np.int64)])
    needed = int(sizes_N.max(initial=0))
    if width is not None and width < needed:
        raise DataError("a support has more entries than fit", where="to_sparse_targets", value=(needed, width),
                        remedy="Use the k_max of the capture plus 1 (the sampled token) as width.")  # fmt: skip
    filled_NK = np.arange(needed if width is None else width) < sizes_N[:, None]
    ids_NK = np.zeros(filled_NK.shape, np.int64)
    logprobs_NK = np.full(filled_NK.shape, -np.inf, np.float32)
    if parts:
        ids_NK[filled_NK] = np.concatenate([part.ids_S for part in parts])
        logprobs_NK[filled_NK] = np.concatenate([part.logprobs_S for part in parts])
    return ids_NK, logprobs_NK, np.concatenate([part.tail_T for part in parts] or [np.zeros(0)]).astype(np.float32)
