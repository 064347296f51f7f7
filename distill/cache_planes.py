"""Columns of small integers <-> bytes: planes of one byte of every value, each entropy-coded on its own by zstd.

A column is cut into as many planes as its largest value has bytes; a plane is stored as it is, as one value, or
compressed, whichever is shortest. Compression is zstd's Huffman coding in the main: the columns of the teacher cache
hold few repetitions, and skewed values.

    column = number of planes, planes
    plane = mode, then one value, or the bytes, or length (7 bits a byte) and compressed bytes

Shape legend: N values of a column.
"""

import numpy as np
import zstandard

_LEVEL = 19
_RAW, _CONSTANT, _ZSTD = 0, 1, 2


def compressor() -> zstandard.ZstdCompressor:
    """Of frames without magic number, content size and checksum: the cache's blocks have their own."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=False, write_checksum=False
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


def write_column(values_N: np.ndarray, coder: zstandard.ZstdCompressor) -> bytes:
    """The bytes of integers in [0, 2^32)."""
    if len(values_N) == 0:
        return b""
    planes_BN = np.ascontiguousarray(values_N, "<u4").view(np.uint8).reshape(-1, 4).T
    count = (int(values_N.max()).bit_length() + 7) // 8
    return bytes((count,)) + b"".join(_write_plane(plane_N.tobytes(), coder) for plane_N in planes_BN[:count])


def _write_plane(plane: bytes, coder: zstandard.ZstdCompressor) -> bytes:
    if plane == plane[:1] * len(plane):
        return bytes((_CONSTANT, plane[0]))
    coded = coder.compress(plane)
    coded = _length(len(coded)) + coded
    return bytes((_ZSTD,)) + coded if len(coded) < len(plane) else bytes((_RAW,)) + plane


def _length(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the last byte is the one below 128."""
    low, high = number & 127, number >> 7
    return bytes((low,)) if high == 0 else bytes((low | 128,)) + _length(high)


class ColumnReader:
    """Reads columns in the order in which they were written; the bytes must have passed a checksum."""

    def __init__(self, data: memoryview | bytes, at: int = 0):
        self._data, self._at = memoryview(data), at
        self._decompressor = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)

    def read(self, count: int) -> np.ndarray:
        """The next column's `count` values, uint8, uint16 or uint32 as its largest value needs."""
        planes = self._byte() if count else 0
        if planes < 2:
            return np.array(self._plane(count)) if planes else np.zeros(count, np.uint8)
        width = 2 if planes == 2 else 4
        values_NB = np.zeros((count, width), np.uint8)
        for place in range(planes):
            values_NB[:, place] = self._plane(count)
        return values_NB.view(f"<u{width}").reshape(count)

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _plane(self, count: int) -> np.ndarray:
        mode = self._byte()
        if mode == _CONSTANT:
            return np.full(count, self._byte(), np.uint8)
        size = count if mode == _RAW else self._size()
        plane = self._data[self._at : self._at + size]
        self._at += size
        if mode == _ZSTD:
            plane = self._decompressor.decompress(plane, max_output_size=count)
        return np.frombuffer(plane, np.uint8)

    def _size(self) -> int:
        byte = self._byte()
        return byte if byte < 128 else byte - 128 + (self._size() << 7)
