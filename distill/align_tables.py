"""What two tokenizers have in common, once per pair: pieces, roots, buckets.

    pieces(t)   the student tokens that teacher token t's bytes are cut into, encoded on their own
    root(x)     a string that both vocabularies hold stands for itself; another is replaced by the first token of its
                encoding in the other vocabulary, again and again, until a shared string is reached
    bucket(c)   the student tokens whose root is c: what the student may write where the teacher's token begins with c

Both sides of a position are compared by root: the teacher's token by that of its first piece, the student's by its own.
Prefixes of piece sequences are numbered (nodes of a trie), so that "begins with the same d pieces" is one comparison.

Shape legend: T teacher ids, S student ids, P pieces of all teacher ids one behind the other.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from distill.align_bytes import ByteTokenizer, gather_runs
from distill.align_markers import match_markers
from distill.errors import DataError
from distill.files import replacing

VERSION = 1


@dataclass(frozen=True)
class PairTables:
    """Tables of one pair of tokenizers.

    identical: both tokenizers are one; nothing has to be aligned. offsets_T1: int64 [T+1]; teacher id t owns the pieces
    offsets_T1[t]:offsets_T1[t+1] of pieces_P (int32 student ids; none for an id that nothing owns). nodes_P: int32, the
    number of the prefix that ends with this piece, equal for equal prefixes. marker_T: bool, t is no text. root_S:
    int32, the student id that stands for each id's bucket.
    """

    identical: np.ndarray
    offsets_T1: np.ndarray
    pieces_P: np.ndarray
    nodes_P: np.ndarray
    marker_T: np.ndarray
    root_S: np.ndarray

    def with_buckets_of(self, used_S: np.ndarray) -> PairTables:
        """The same with only these student tokens (bool [S]) in other tokens' buckets; each other stands for itself.

        Most of a large bucket are tokens that a set of texts never holds, and every member costs work in the loss.
        """
        return replace(self, root_S=np.where(used_S, self.root_S, np.arange(len(self.root_S))).astype(np.int32))

    @cached_property
    def piece_counts_T(self) -> np.ndarray:
        """int64 [T]: the number of pieces of each teacher id."""
        return np.diff(self.offsets_T1)

    @cached_property
    def bucket_sizes_S(self) -> np.ndarray:
        """int64 [S]: the number of members of the bucket that this id stands for; 0 for an id that stands for none."""
        return np.bincount(self.root_S, minlength=len(self.root_S))

    @cached_property
    def bucket_starts_S(self) -> np.ndarray:
        """int64 [S]: where the bucket of this root begins in members_S."""
        return np.cumsum(self.bucket_sizes_S) - self.bucket_sizes_S

    @cached_property
    def members_S(self) -> np.ndarray:
        """int32 [S]: all student ids, bucket by bucket, ascending in each."""
        return np.argsort(self.root_S, kind="stable").astype(np.int32)

    def members_of(self, roots_E: np.ndarray) -> np.ndarray:
        """int32: the student ids of these buckets, one behind the other."""
        return gather_runs(self.members_S, self.bucket_starts_S[roots_E], self.bucket_sizes_S[roots_E])


def load_tables(teacher: ByteTokenizer, student: ByteTokenizer, cache_dir: Path | None = None) -> PairTables:
    """The tables of this pair: from cache_dir if they are there, else built (seconds) and kept there.

    The file is named by the fingerprints of both tokenizers. A folder that cannot be written is warned of: the tables
    are then made at every start. Errors: DataError for a file that cannot be read.
    """
    if cache_dir is None:
        return build_tables(teacher, student)
    path = Path(cache_dir) / f"tables-{teacher.fingerprint}-{student.fingerprint}-v{VERSION}.npz"
    if os.path.exists(path):
        return _read(path)
    tables = build_tables(teacher, student)
    try:
        _write(tables, path)
    except OSError as error:
        if not os.path.exists(path):  # else another process was faster, perhaps one on another machine
            warnings.warn(
                f"{path.parent}: the alignment tables cannot be kept here ({error}), so every start makes them again. "
                "Set XDG_CACHE_HOME to a folder that you may write to.",
                stacklevel=2,
            )
    return tables


def _write(tables: PairTables, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **{field.name: getattr(tables, field.name) for field in fields(PairTables)})


def _read(path: Path) -> PairTables:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return PairTables(**{field.name: arrays[field.name] for field in fields(PairTables)})
    except Exception as error:  # damaged bytes meet zip, zlib and the parser of numpy's headers, each with its own
        raise DataError(
            f"the alignment tables cannot be read: {error}",
            where=str(path),
            remedy="Delete the file: it is made again.",
        ) from error


def default_cache_dir() -> Path:
    """Where tables are kept unless told otherwise: they depend on the two tokenizers alone, not on a run."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "distill" / "align"


def build_tables(teacher: ByteTokenizer, student: ByteTokenizer) -> PairTables:
    """The tables of this pair, computed."""
    if teacher.fingerprint == student.fingerprint:
        return _identity(teacher)
    pieces = _pieces(teacher, student)
    counts_T = np.array([len(each) for each in pieces], np.int64)
    offsets_T1 = np.concatenate([[0], np.cumsum(counts_T)])
    pieces_P = np.concatenate([*pieces, np.zeros(0, np.int64)]).astype(np.int32)
    marker_T = np.zeros(len(teacher), bool)
    marker_T[list(teacher.markers)] = True
    return PairTables(
        identical=np.array(False),
        offsets_T1=offsets_T1,
        pieces_P=pieces_P,
        nodes_P=_nodes(pieces_P, offsets_T1),
        marker_T=marker_T,
        root_S=_roots(teacher, student, pieces),
    )


def _identity(tokenizer: ByteTokenizer) -> PairTables:
    """One tokenizer on both sides: every id stands for itself, whether or not its bytes would be encoded to it."""
    ids = np.arange(len(tokenizer), dtype=np.int32)
    return PairTables(np.array(True), np.arange(len(tokenizer) + 1), ids, ids, np.zeros(len(ids), bool), ids)


def _pieces(teacher: ByteTokenizer, student: ByteTokenizer) -> list[np.ndarray]:
    """The pieces of every teacher id, as int64 arrays."""
    text = [index for index, each in enumerate(teacher.bytes_V) if each and index not in teacher.markers]
    encoded = dict(zip(text, student.encode_pieces([teacher.bytes_V[index] for index in text])))
    encoded |= {index: np.array(ids, np.int64) for index, ids in match_markers(teacher, student).items()}
    nothing = np.zeros(0, np.int64)
    return [encoded.get(index, nothing) for index in range(len(teacher))]


def _nodes(pieces_P: np.ndarray, offsets_T1: np.ndarray) -> np.ndarray:
    """int32 [P]: depth by depth, each distinct (node of the prefix before, piece) gets a number."""
    nodes_P = np.full(len(pieces_P), -1, np.int32)
    counts_T = np.diff(offsets_T1)
    width, used = int(pieces_P.max(initial=0)) + 1, 0
    for depth in range(int(counts_T.max(initial=0))):
        at = offsets_T1[:-1][counts_T > depth] + depth
        before = nodes_P[at - 1].astype(np.int64) + 1 if depth else np.zeros(len(at), np.int64)
        _, number = np.unique(before * width + pieces_P[at], return_inverse=True)
        nodes_P[at] = number + used
        used += int(number.max()) + 1
    return nodes_P


def _roots(teacher: ByteTokenizer, student: ByteTokenizer, pieces: list[np.ndarray]) -> np.ndarray:
    """int32 [S]: every id follows "first token of the encoding in the other vocabulary" until a shared string."""
    shared = student.id_of_bytes
    # One step for a student id: the teacher token that its bytes begin with, then what that one begins with.
    texts = [index for index, each in enumerate(student.bytes_V) if each and index not in student.markers]
    step_S = np.arange(len(student))
    alone = [index for index in texts if student.bytes_V[index] not in teacher.id_of_bytes]
    alone = [index for index in alone if teacher.can_write(student.bytes_V[index])]  # others stand for themselves
    for index, ids in zip(alone, teacher.encode_pieces([student.bytes_V[index] for index in alone])):
        first = teacher.bytes_V[ids[0]]
        step_S[index] = shared[first] if first in shared else pieces[ids[0]][0]
    for index in set(texts) - set(alone):
        step_S[index] = shared[student.bytes_V[index]]
    while True:
        further_S = step_S[step_S]
        if np.array_equal(further_S, step_S):
            return step_S.astype(np.int32)
        step_S = further_S
