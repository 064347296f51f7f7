"""Sparse distributions between a teacher service and its client: lossless bytes, read without a loop over tokens.

    frame   = head (magic "DDS1", tokens, entries, CRC-32 of the columns; little-endian), columns
    columns = support sizes uint32 [T], ids int32 [S], log-probabilities float32 [S] (nats),
              tail masses float32 [T], logsumexps float32 [T], sampled ids int32 [T]

A body of several sequences is their frames one after the other. 8 bytes an entry and 16 a token, where JSON takes about
74 bytes an entry. The cache on disk is smaller, but rounds; what is rounded twice is not what was rounded once.

Shape legend: T tokens, S support entries of all tokens together.
"""

import struct
import zlib
from collections.abc import Iterable

import numpy as np

from distill.errors import DataError
from distill.records import TokenDists

MEDIA_TYPE = "application/vnd.distill.dists"
_HEAD = struct.Struct("<4sIII")
_MAGIC = b"DDS1"


def pack(dists: TokenDists) -> bytes:
    """One frame."""
    columns = b"".join(
        np.ascontiguousarray(column, kind).tobytes()
        for column, kind in (
            (np.diff(dists.offsets_T1), "<u4"),
            (dists.ids_S, "<i4"),
            (dists.logprobs_S, "<f4"),
            (dists.tail_T, "<f4"),
            (dists.logsumexp_T, "<f4"),
            (dists.sampled_T, "<i4"),
        )
    )
    return _HEAD.pack(_MAGIC, len(dists.tail_T), len(dists.ids_S), zlib.crc32(columns)) + columns


def pack_all(many: Iterable[TokenDists]) -> bytes:
    return b"".join(map(pack, many))


def unpack_all(data: bytes, where: str) -> list[TokenDists]:
    """The distributions of every frame; DataError, naming `where`, for bytes that are not whole frames."""
    found, at = [], 0
    while at < len(data):
        dists, at = _unpack(data, at, where)
        found.append(dists)
    return found


def _unpack(data: bytes, at: int, where: str) -> tuple[TokenDists, int]:
    if len(data) < at + _HEAD.size:
        raise _damaged("ends inside the head of a frame", where, len(data))
    magic, tokens, entries, crc = _HEAD.unpack_from(data, at)
    start, end = at + _HEAD.size, at + _HEAD.size + 16 * tokens + 8 * entries
    if magic != _MAGIC:
        raise _damaged("is not in this format", where, magic)
    if end > len(data) or zlib.crc32(memoryview(data)[start:end]) != crc:
        raise _damaged("is cut short or damaged", where, len(data))
    offsets_T1 = np.zeros(tokens + 1, np.int64)
    sizes_T, start = _column(data, "<u4", tokens, start)
    np.cumsum(sizes_T, out=offsets_T1[1:])
    if offsets_T1[-1] != entries:
        raise _damaged("contradicts itself", where, entries)
    ids_S, start = _column(data, "<i4", entries, start)
    logprobs_S, start = _column(data, "<f4", entries, start)
    tail_T, start = _column(data, "<f4", tokens, start)
    logsumexp_T, start = _column(data, "<f4", tokens, start)
    sampled_T, start = _column(data, "<i4", tokens, start)
    return TokenDists(offsets_T1, ids_S, logprobs_S, tail_T, logsumexp_T, sampled_T), end


def _column(data: bytes, kind: str, count: int, start: int) -> tuple[np.ndarray, int]:
    return np.frombuffer(data, kind, count, start), start + 4 * count


def _damaged(what: str, where: str, value: object) -> DataError:
    return DataError(
        f"the body with distributions {what}", where=where, value=value, remedy="Ask again; compare the versions."
    )
