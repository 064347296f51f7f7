"""The corruption matrix of the teacher cache, and what a killed writer or a full disk leaves behind.

A flipped bit, a lost page, exchanged blocks: a DataError with file and remedy. A cut file: the blocks before the cut,
and a DataError for whoever asks for a complete one. A killed writer: everything that append had returned from.
"""

import os
import signal
import subprocess
from itertools import combinations

import numpy as np
import pytest
from cache_world import HEADER, assert_same, random_dists, run_python, write

from distill.cache_format import pack_closing_mark, pack_header
from distill.errors import DataError
from distill.logit_cache import CacheHeader, CacheReader, CacheWriter


def assert_detected(path, data):
    """Opening the file, asking for a complete one or verifying it names the file and says what to do."""
    path.write_bytes(data)
    with pytest.raises(DataError, match=path.name) as error:
        reader = CacheReader(path)
        reader.verify()
        reader.require(complete=True)
    assert error.value.remedy


def test_every_flipped_byte_is_detected(tmp_path):
    """One bit of every byte of a closed and of an unclosed file, which verify finds even when it is not closed."""
    for close in (True, False):
        path = tmp_path / f"{close}.cache"
        write(path, 3, tokens=6, close=close)
        whole = path.read_bytes()
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << (place % 8)
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=path.name) as error:
                CacheReader(path).verify()
            assert error.value.remedy


@pytest.mark.slow
def test_every_flipped_bit_and_every_inverted_byte_is_detected(tmp_path):
    """Header, heads and bodies of blocks, index, closing mark."""
    path = tmp_path / "a.cache"
    write(path, 2, tokens=5)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for change in (*(1 << bit for bit in range(8)), 255):
            damaged = bytearray(whole)
            damaged[place] ^= change
            assert_detected(path, damaged)


def test_lost_pages_and_exchanged_repeated_or_missing_blocks_are_detected(tmp_path):
    path = tmp_path / "a.cache"
    given = write(path, 4)
    whole = path.read_bytes()
    for start in range(0, len(whole), 512):  # a sector that never reached the disk
        page = whole[start : start + 512]
        assert_detected(path, whole[:start] + bytes(len(page)) + whole[start + len(page) :])
        assert_detected(path, whole[:start] + whole[start + len(page) :])
    path.write_bytes(whole)
    blocks = [whole[entry.offset : entry.end] for entry in map(CacheReader(path)._entries.get, given)]
    before, after = whole[: whole.index(blocks[0])], whole[whole.index(blocks[-1]) + len(blocks[-1]) :]
    for one, other in combinations(range(4), 2):
        mixed = list(blocks)
        mixed[one], mixed[other] = mixed[other], mixed[one]
        assert_detected(path, before + b"".join(mixed) + after)
        mixed[one] = mixed[other]
        assert_detected(path, before + b"".join(mixed) + after)
    for one in range(4):
        assert_detected(path, before + b"".join(blocks[:one] + blocks[one + 1 :]) + after)
        assert_detected(path, before + b"".join(blocks[: one + 1] + blocks[one:]) + after)
    assert_detected(path, whole + whole)
    assert_detected(path, b"")


def test_damage_of_one_block_of_a_closed_file_leaves_the_others_readable(tmp_path):
    path = tmp_path / "a.cache"
    given = write(path, 3)
    whole = bytearray(path.read_bytes())
    middle = CacheReader(path)._entries["0001/1"]
    whole[(middle.offset + middle.end) // 2] ^= 4
    path.write_bytes(whole)
    reader = CacheReader(path)
    assert_same(reader["0002/2"], given["0002/2"])
    with pytest.raises(DataError, match=r"a\.cache.*trace 0001/1.*block 1.*Cut to"):
        reader["0001/1"]


def test_file_cut_at_any_length_is_refused_or_opens_with_the_blocks_before_the_cut(tmp_path):
    path = tmp_path / "a.cache"
    given = write(path, 3, tokens=6)
    whole = path.read_bytes()
    ends = [CacheReader(path)._entries[key].end for key in given]
    first_block = CacheReader(path)._entries["0000/0"].offset
    for length in range(len(whole)):
        assert_detected(path, whole[:length])
        if length < first_block:
            with pytest.raises(DataError, match="header"):
                CacheReader(path)
            continue
        reader = CacheReader(path)
        assert not reader.complete
        assert reader.keys() == list(given)[: sum(end <= length for end in ends)]
        reader.verify()


def test_writer_goes_on_from_a_file_cut_at_any_length(tmp_path):
    path = tmp_path / "a.cache"
    given = write(path, 2, tokens=4)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with CacheWriter(path, HEADER) as writer:
            for key, dists in given.items():
                if key not in writer:
                    writer.append(key, dists)
        assert path.read_bytes() == whole


def test_garbage_after_the_last_block_is_damage_not_a_torn_tail(tmp_path):
    path = tmp_path / "a.cache"
    write(path, 2, close=False)
    whole = path.read_bytes()
    for tail in (b"\0", b"\0" * 100, b"DBLx", b"DBLK" + b"\0" * 30):
        path.write_bytes(whole + tail)
        with pytest.raises(DataError, match=f"block 2, byte {len(whole)}"):
            CacheReader(path)
        with pytest.raises(DataError):
            CacheWriter(path, HEADER)
        assert path.read_bytes() == whole + tail  # a writer repairs nothing that it did not understand


def test_a_file_of_an_older_schema_says_so(tmp_path):
    path = tmp_path / "a.cache"
    header = pack_header(CacheHeader("aaaa", "bbbb", "cccc", 5000, 64, 1e-3, schema=1))
    path.write_bytes(header + pack_closing_mark(len(header)))
    for opened in (lambda: CacheReader(path), lambda: CacheWriter(path, HEADER)):
        with pytest.raises(DataError, match=r"schema.*a\.cache.*1.*capture the traces again"):
            opened()


WRITER = """
from cache_world import HEADER, random_dists
from distill.logit_cache import CacheWriter
writer = CacheWriter({path!r}, HEADER)
dists = [random_dists(seed, tokens=300) for seed in range(8)]
number = len(writer.keys())
while True:
    writer.append(f"{{number}}/0", dists[number % 8])
    sys.stdout.write(f"{{number}}\\n")
    sys.stdout.flush()
    number += 1
"""


def kill_writer(path, after_blocks):
    """Number of blocks that a real writer process had reported as appended when it got SIGKILL."""
    process = run_python(WRITER.format(path=str(path)))
    last = -1
    for _ in range(after_blocks):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split("\n")[:-1]  # the last piece may be half a number
    process.wait()
    return max([last, *map(int, rest)]) + 1


def check_kills(path, times):
    expected = [random_dists(seed, tokens=300) for seed in range(8)]
    for turn in range(times):
        reported = kill_writer(path, after_blocks=3 + turn % 7)
        reader = CacheReader(path)
        assert len(reader) in (reported, reported + 1)  # the block in hand may have made it
        assert reader.keys() == [f"{n}/0" for n in range(len(reader))]
        assert reader.verify() == len(reader)
        assert_same(reader[f"{reported - 1}/0"], expected[(reported - 1) % 8])


def test_writer_killed_five_times_loses_nothing_that_append_returned_from(tmp_path):
    check_kills(tmp_path / "a.cache", 5)


@pytest.mark.slow
def test_writer_killed_a_hundred_times_loses_nothing_that_append_returned_from(tmp_path):
    check_kills(tmp_path / "a.cache", 100)


FULL_DISK = """
import resource, signal
from cache_world import HEADER, random_dists
from distill.errors import StoreError
from distill.logit_cache import CacheWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
writer, number = CacheWriter({path!r}, HEADER), 0
try:
    while True:
        writer.append(f"{{number}}/0", random_dists(number))
        number += 1
except StoreError as error:
    print(number, error.remedy)
"""


def test_full_disk_is_a_store_error(tmp_path):
    """A limit on the file's size stops the write half-way, as a full disk does."""
    path = tmp_path / "a.cache"
    process = run_python(FULL_DISK.format(path=str(path)), stderr=subprocess.PIPE)
    out, problem = process.communicate()
    assert process.returncode == 0, problem
    number = int(out.split()[0])
    assert number >= 1 and "Free disk space" in out
    reader = CacheReader(path)
    assert len(reader) == number == reader.verify()
    assert os.path.getsize(path) == reader._end  # no half block is left
    np.testing.assert_array_equal(reader["0/0"].sampled_T, random_dists(0).sampled_T)
