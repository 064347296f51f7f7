"""The bytes of a cache file: header, blocks, index, and how a torn tail is told from damage.

    file  = head (magic, header length), header (JSON), CRC-32; blocks; on close an index block and the closing mark
    block = head (magic, kind, sizes, CRC-32 of key and payload, CRC-32 of the head itself), key, payload

A block is appended in one write, so a killed writer leaves whole blocks and at most one that stops short. Such a tail
is told from damage by its head: a block whose head checks and whose end lies past the end of the file was being
written. Anything else that does not check is damage and raises. Every byte is under a checksum.
"""

import json
import struct
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill.cache_levels import LOG_BOUND, SQRT_STEP
from distill.errors import DataError

SCHEMA_VERSION = 2
_FILE_MAGIC, _BLOCK_MAGIC, _CLOSE_MAGIC = b"DSTLGTS1", b"DBLK", b"DEND"
_FILE_HEAD = struct.Struct("<8sI")
# magic, kind, key bytes, tokens, payload bytes, CRC of key and payload, CRC of all before
_BLOCK_HEAD = struct.Struct("<4sHHIIII")
_CLOSE = struct.Struct("<QI4s")  # where the index block starts, CRC of that number, magic
_CRC = struct.Struct("<I")
DATA, INDEX = 1, 2


@dataclass(frozen=True)
class CacheHeader:
    """Where the distributions come from; caches whose headers agree (versions aside) may be mixed.

    Fingerprints are hex strings. sampled: whether the tokens were drawn from these distributions; False where the
    teacher only read them. tail_bound and min_mass, below which an entry counts into the tail, are probability
    masses; sqrt_step and log_bound: cache_levels.py.
    """

    teacher_fingerprint: str
    tokenizer_fingerprint: str
    template_hash: str
    vocab_size: int
    k_max: int
    tail_bound: float
    tail_draws: int = 0
    min_mass: float = 0.0
    temperature: float = 1.0
    sqrt_step: float = SQRT_STEP
    log_bound: float = LOG_BOUND
    schema: int = SCHEMA_VERSION
    sampled: bool = True
    versions: dict[str, str] = field(default_factory=dict)


class Entry(NamedTuple):
    key: str
    offset: int
    end: int
    tokens: int


class Contents(NamedTuple):
    """What is in a file: its header, its blocks, where the last of them ends, and whether it was closed."""

    header: CacheHeader
    entries: list[Entry]
    end: int
    complete: bool


class Damage(Exception):
    """Bytes that do not check; the message says which."""


class Torn(Exception):
    """A block that was being written when its writer ended."""


def pack_block(kind: int, key: str, tokens: int, payload: bytes) -> bytes:
    key_bytes = key.encode()
    body_crc = zlib.crc32(payload, zlib.crc32(key_bytes))
    head = _BLOCK_HEAD.pack(_BLOCK_MAGIC, kind, len(key_bytes), tokens, len(payload), body_crc, 0)[: -_CRC.size]
    return head + _CRC.pack(zlib.crc32(head)) + key_bytes + payload


def parse_block(data: memoryview, offset: int) -> tuple[int, Entry, memoryview]:
    """(kind, entry, payload) of the block at `offset`, head and body checked; raises Torn or Damage."""
    head = bytes(data[offset : offset + _BLOCK_HEAD.size])
    if len(head) < _BLOCK_HEAD.size:
        if _BLOCK_MAGIC.startswith(head[:4]):
            raise Torn
        raise Damage("bytes that begin no block")
    magic, kind, key_bytes, tokens, payload_bytes, body_crc, head_crc = _BLOCK_HEAD.unpack(head)
    if magic != _BLOCK_MAGIC or zlib.crc32(head[: -_CRC.size]) != head_crc:
        raise Damage("the head of a block does not match its checksum")
    start = offset + len(head)
    end = start + key_bytes + payload_bytes
    if end > len(data):
        raise Torn
    if zlib.crc32(data[start:end]) != body_crc:
        raise Damage("the contents of a block do not match its checksum")
    key = bytes(data[start : start + key_bytes]).decode()
    return kind, Entry(key, offset, end, tokens), data[start + key_bytes : end]


def pack_header(header: CacheHeader) -> bytes:
    text = json.dumps(asdict(header), sort_keys=True).encode()
    head = _FILE_HEAD.pack(_FILE_MAGIC, len(text)) + text
    return head + _CRC.pack(zlib.crc32(head))


def parse_header(data: memoryview, path: Path) -> tuple[CacheHeader, int]:
    """(header, where the first block starts); DataError when it is short, damaged or of another schema."""
    remedy = "Delete this file: its traces are sampled again."
    if len(data) < _FILE_HEAD.size:
        what = "this teacher cache ends inside its header"
        raise DataError(what, where=str(path), value=f"{len(data)} bytes", remedy=remedy)
    magic, text_bytes = _FILE_HEAD.unpack_from(data)
    text_end = _FILE_HEAD.size + text_bytes
    end = text_end + _CRC.size
    if magic != _FILE_MAGIC:
        raise DataError("not a teacher cache, or its first bytes are damaged", where=str(path), remedy=remedy)
    if end > len(data) or data[text_end:end] != _CRC.pack(zlib.crc32(data[:text_end])):
        raise DataError("the header of this teacher cache is cut or damaged", where=str(path), remedy=remedy)
    values = json.loads(bytes(data[_FILE_HEAD.size : text_end]))
    if values.get("schema") != SCHEMA_VERSION:
        remedy = f"This version reads schema {SCHEMA_VERSION}: capture the traces again."
        raise DataError("unknown schema of a teacher cache", where=str(path), value=values.get("schema"), remedy=remedy)
    return CacheHeader(**values), end


def pack_index(entries: Iterable[Entry]) -> bytes:
    entries = list(entries)
    keys = [entry.key.encode() for entry in entries]
    columns = (("<u8", [e.offset for e in entries]), ("<u8", [e.end for e in entries]),
               ("<u4", [e.tokens for e in entries]), ("<u2", [len(key) for key in keys]))  # fmt: skip
    return b"".join(np.array(values, kind).tobytes() for kind, values in columns) + b"".join(keys)


def _parse_index(payload: memoryview, count: int) -> list[Entry]:
    offsets, ends = np.frombuffer(payload, "<u8", 2 * count).reshape(2, count).tolist()
    tokens = np.frombuffer(payload, "<u4", count, 16 * count).tolist()
    key_ends = np.cumsum(np.frombuffer(payload, "<u2", count, 20 * count), dtype=np.int64).tolist()
    keys = bytes(payload[22 * count :])
    starts = [0, *key_ends[:-1]]
    return [Entry(keys[a:b].decode(), *rest) for a, b, *rest in zip(starts, key_ends, offsets, ends, tokens)]


def damaged(path: Path, offset: int, number: int, reason: str) -> DataError:
    return DataError(
        f"{reason} (block {number}, byte {offset})",
        where=str(path),
        remedy=f"Delete this file: its traces are sampled again. Cut to {offset} bytes it opens with {number} blocks.",
    )


def read_contents(data: memoryview, path: Path) -> Contents:
    """By the index of a closed file; else by walking over the blocks and checking each."""
    header, start = parse_header(data, path)
    if len(data) >= start + _CLOSE.size:
        offset, offset_crc, magic = _CLOSE.unpack_from(data, len(data) - _CLOSE.size)
        if magic == _CLOSE_MAGIC and offset_crc == zlib.crc32(data[-_CLOSE.size :][:8]):
            return Contents(header, _index_at(data, offset, path), offset, True)
    return _walk(data, header, start, path)


def pack_closing_mark(offset: int) -> bytes:
    """The last bytes of a closed file; `offset` is where its index block starts."""
    return _CLOSE.pack(offset, zlib.crc32(struct.pack("<Q", offset)), _CLOSE_MAGIC)


def _index_at(data: memoryview, offset: int, path: Path) -> list[Entry]:
    try:
        kind, entry, payload = parse_block(data[: -_CLOSE.size], offset)
        if kind != INDEX or entry.end != len(data) - _CLOSE.size:
            raise Damage("the closing mark points to no index")
    except (Damage, Torn) as problem:
        raise DataError(
            f"the index of this teacher cache is damaged: {problem}",
            where=str(path),
            remedy=f"Cut the file to {offset} bytes: it opens with all its blocks, and the index is written anew.",
        ) from None
    return _parse_index(payload, entry.tokens)


def _walk(data: memoryview, header: CacheHeader, start: int, path: Path) -> Contents:
    entries, offset = [], start
    while offset < len(data):
        try:
            kind, entry, _ = parse_block(data, offset)
            if kind == INDEX:
                if not pack_closing_mark(offset).startswith(data[entry.end :]):
                    raise Damage("the closing mark is damaged")
                break
        except Torn:
            break
        except Damage as problem:
            raise damaged(path, offset, len(entries), str(problem)) from None
        entries.append(entry)
        offset = entry.end
    return Contents(header, entries, offset, False)
