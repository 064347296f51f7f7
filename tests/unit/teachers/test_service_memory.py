"""Freed memory goes back when work ends, and now and then while it goes on; measured on this process itself."""

import ctypes
import re
import sys
from pathlib import Path

import pytest

from teachers.service_memory import BUSY_S, Trimmer


def test_trims_once_when_work_ends_and_at_intervals_while_it_goes_on():
    now, calls = [0.0], []
    trimmer = Trimmer(lambda pad: calls.append((now[0], pad)) or 1, lambda: now[0])
    for second in range(100):
        now[0] = float(second)
        trimmer.turn(has_worked=second < 70)
    assert calls == [(BUSY_S, 0), (2 * BUSY_S, 0), (70.0, 0)]  # never again while idle
    trimmer.turn(has_worked=True)
    trimmer.turn(has_worked=False)
    assert len(calls) == 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_holes_between_what_is_kept_are_given_back():
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("another C library than glibc keeps its own house")
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size, count = 64 << 10, 3000
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[::2] + blocks[1:-1:2]:  # the last one stays: it keeps the heap from shrinking by itself
        libc.free(block)
    held = resident_bytes()
    trimmer = Trimmer()
    trimmer.turn(has_worked=True)
    trimmer.turn(has_worked=False)
    assert held - resident_bytes() > 0.9 * size * count
    libc.free(blocks[-1])


def resident_bytes() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
