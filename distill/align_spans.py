"""Which teacher token each student token of the same bytes begins in, and what may be said about it.

    aligned     it begins where a teacher token begins
    inner       it begins inside a teacher token, d pieces behind that token's beginning, and the pieces are the table's
    otherwise   cross-entropy, by reason (KINDS)

Shape legend: B traces, T teacher tokens of all traces, N student tokens of all traces.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from distill.align_bytes import ByteTokenizer
from distill.align_tables import PairTables
from distill.errors import DataError

ALIGNED, INNER, INSIDE, RECUT, CONTRADICTED, UNCOVERED = range(6)
KINDS = {
    ALIGNED: "aligned",
    INNER: "inner",
    INSIDE: "inside",  # begins in a teacher token whose own beginning is no boundary of the student's
    RECUT: "recut",  # behind the beginning of its teacher token stand other pieces than the table's
    CONTRADICTED: "contradicted",  # it is outside the bucket of its teacher token's piece
    UNCOVERED: "uncovered",  # no candidate is left that agrees with it
}
COVERED = INNER  # kinds up to this have a distribution


@dataclass(frozen=True)
class Alignment:
    """Student tokens of B traces against the teacher's.

    teacher_offsets_B1, student_offsets_B1: int64 [B+1], where each trace begins in T and N. teacher_ids_T, ids_N: int64
    tokens. lens_N: bytes of each. teacher_N: index in T of the teacher token that holds its first byte. depth_N: pieces
    behind that token's beginning (0 where aligned; unset where kind is inside). before_N: the student token that it
    must not merge with, -1 where none is (after a marker or at a beginning). kind_N: uint8, a key of KINDS.
    """

    teacher_offsets_B1: np.ndarray
    student_offsets_B1: np.ndarray
    teacher_ids_T: np.ndarray
    ids_N: np.ndarray
    lens_N: np.ndarray
    teacher_N: np.ndarray
    depth_N: np.ndarray
    before_N: np.ndarray
    kind_N: np.ndarray

    def __len__(self) -> int:
        return len(self.ids_N)

    def trace(self, index: int) -> np.ndarray:
        """int64: the student's ids of one trace."""
        return self.ids_N[self.student_offsets_B1[index] : self.student_offsets_B1[index + 1]]


def retokenise(
    teacher: ByteTokenizer, student: ByteTokenizer, tables: PairTables, traces: list[np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """(ids, bytes of each, whether each is of a marker) of every trace of teacher ids, in the student's tokens.

    Text between markers is encoded on its own, and so is each marker. Errors: DataError for an id without bytes.
    """
    if tables.identical:
        return traces, [teacher.lens_V[ids] for ids in traces], [np.zeros(len(ids), bool) for ids in traces]
    texts, plans = [], []
    for ids in traces:
        if len(ids) and (ids.min() < 0 or ids.max() >= len(teacher) or teacher.lens_V[ids].min() == 0):
            raise _no_bytes(teacher, ids)
        cuts = np.flatnonzero(tables.marker_T[ids]).tolist()
        plan = []
        for first, last in pairwise([-1, *cuts, len(ids)]):
            if last > first + 1:
                plan.append(None)
                texts.append(teacher.join(ids[first + 1 : last]).tobytes())
            if last < len(ids):
                plan.append(int(ids[last]))
        plans.append(plan)
    encoded = iter(student.encode(texts))
    return tuple(zip(*[_assemble(teacher, student, tables, plan, encoded) for plan in plans])) or ((), (), ())


def _assemble(teacher, student, tables, plan, encoded):
    ids, lens, marked = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, bool)]
    for marker in plan:
        if marker is None:
            ids.append(next(encoded))
            lens.append(student.lens_V[ids[-1]])
        else:
            start, end = tables.offsets_T1[marker : marker + 2]
            ids.append(tables.pieces_P[start:end].astype(np.int64))
            lens.append(_marker_lens(student.lens_V[ids[-1]], int(teacher.lens_V[marker])))
        marked.append(np.full(len(ids[-1]), marker is not None))
    return np.concatenate(ids), np.concatenate(lens), np.concatenate(marked)


def _marker_lens(own_lens: np.ndarray, length: int) -> np.ndarray:
    """The teacher's marker is as long as its written form; a student's token that means the same takes all of it."""
    return own_lens if own_lens.sum() == length else np.array([length], np.int64)


def align(teacher: ByteTokenizer, student: ByteTokenizer, tables: PairTables, traces: list[np.ndarray]) -> Alignment:
    """The alignment of these traces (int64 teacher ids of each completion, the stop id included where there is one).

    Errors: DataError for an id without bytes, or a byte that the student cannot write.
    """
    ids, lens, marked = retokenise(teacher, student, tables, traces)
    ids_T, teacher_offsets_B1 = _flat(traces)
    ids_N, student_offsets_B1 = _flat(ids)
    lens_N, marked_N = _flat(lens)[0], _flat(marked)[0].astype(bool)
    if int(lens_N.sum()) != int(teacher.lens_V[ids_T].sum()):
        raise AssertionError("the two tokenizations are not of the same bytes")
    starts_T, starts_N = _starts(teacher.lens_V[ids_T]), _starts(lens_N)
    teacher_N = np.searchsorted(starts_T, starts_N, side="right") - 1
    first_T = np.searchsorted(starts_N, starts_T)  # the first student token that begins at or behind its beginning
    boundary_T = starts_N[np.minimum(first_T, max(len(ids_N) - 1, 0))] == starts_T if len(ids_N) else first_T > 0
    depth_N = np.arange(len(ids_N)) - first_T[teacher_N]
    before_N = np.concatenate([[-1], ids_N[:-1]]) if len(ids_N) else ids_N
    before_N[np.concatenate([[False], marked_N[:-1]]) if len(ids_N) else marked_N] = -1
    before_N[student_offsets_B1[:-1][np.diff(student_offsets_B1) > 0]] = -1
    kind_N = _kinds(tables, ids_T[teacher_N], ids_N, depth_N, boundary_T[teacher_N])
    return Alignment(teacher_offsets_B1, student_offsets_B1, ids_T, ids_N, lens_N, teacher_N, depth_N, before_N, kind_N)


def _kinds(
    tables: PairTables, token_N: np.ndarray, ids_N: np.ndarray, depth_N: np.ndarray, boundary_N: np.ndarray
) -> np.ndarray:
    known_N = boundary_N & (depth_N < tables.piece_counts_T[token_N])
    piece_N = tables.pieces_P[np.where(known_N, tables.offsets_T1[token_N] + depth_N, 0)]
    differs = np.cumsum(~known_N | (piece_N != ids_N))
    # How many pieces differ from the table's between the teacher token's beginning and this one.
    wrong_before_N = np.concatenate([[0], differs[:-1]]) if len(ids_N) else differs
    first_N = np.arange(len(ids_N)) - np.where(boundary_N, depth_N, 0)
    same_N = known_N & (wrong_before_N == wrong_before_N[first_N])
    agrees_N = same_N & (tables.root_S[piece_N] == tables.root_S[ids_N])
    reasons = [~boundary_N, ~same_N, ~agrees_N, depth_N == 0]
    return np.select(reasons, [INSIDE, RECUT, CONTRADICTED, ALIGNED], INNER).astype(np.uint8)


def _flat(parts) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *map(len, parts)])
    return np.concatenate([*parts, np.zeros(0, np.int64)]).astype(np.int64), offsets


def _starts(lens: np.ndarray) -> np.ndarray:
    return np.cumsum(lens) - lens


def _no_bytes(teacher: ByteTokenizer, ids: np.ndarray) -> DataError:
    inside = (ids >= 0) & (ids < len(teacher))
    bad = [int(i) for i, ok in zip(ids, inside) if not ok or teacher.lens_V[i] == 0]
    return DataError(
        "a trace holds an id that the teacher's tokenizer has no bytes for",
        where=teacher.where,
        value=bad[:5],
        remedy="Drop the trace, or point teacher.path to the tokenizer it was sampled with.",
    )
