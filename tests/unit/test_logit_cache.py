"""Laws of the teacher cache: what comes back, what damage does, and what a killed writer leaves behind."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import DataError, DistillError, StoreError
from distill.logit_cache import CacheHeader, CacheReader, CacheWriter, to_sparse_targets
from distill.records import TokenDists

VOCAB = 5000
HEADER = CacheHeader("aaaa", "bbbb", "cccc", VOCAB, k_max=64, tail_bound=1e-3, versions={"distill": "0.1.0"})
STEP = HEADER.logprob_step


def random_dists(seed, tokens=40, k_max=20, spread=4.0, vocab=VOCAB):
    """Supports of true softmax distributions: the most likely tokens until the tail is small, the sampled one
    always."""
    draw = np.random.default_rng(seed)
    offsets, ids, logprobs, tail, lse, sampled = [0], [], [], [], [], []
    for _ in range(tokens):
        logits = draw.normal(size=min(vocab, 50)) * spread * draw.random()
        names = draw.choice(vocab, len(logits), replace=False)
        total = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
        logp = logits - total
        order = np.argsort(-logp)
        size = min(int((1 - np.cumsum(np.exp(logp[order])) > 1e-3).sum()) + 1, k_max)
        keep = order[:size]
        drawn = draw.choice(len(logits), p=np.exp(logp))
        if drawn not in keep:
            keep = np.append(keep, drawn)
        outside = np.ones(len(logits), bool)
        outside[keep] = False
        offsets.append(offsets[-1] + len(keep))
        ids.append(names[keep])
        logprobs.append(logp[keep])
        tail.append(np.exp(logp[outside]).sum())
        lse.append(total)
        sampled.append(names[drawn])
    return TokenDists(
        np.array(offsets, np.int64), np.concatenate(ids).astype(np.int32), np.concatenate(logprobs).astype(np.float32),
        np.array(tail, np.float32), np.array(lse, np.float32), np.array(sampled, np.int32),
    )  # fmt: skip


def assert_same(found, given):
    for name in ("offsets_T1", "ids_S", "tail_T", "sampled_T"):
        np.testing.assert_array_equal(getattr(found, name), getattr(given, name))
        assert getattr(found, name).dtype == getattr(given, name).dtype
    assert found.logprobs_S.dtype == found.logsumexp_T.dtype == np.float32
    assert np.abs(found.logprobs_S - given.logprobs_S).max() <= STEP / 2 + 2e-5
    np.testing.assert_allclose(found.logsumexp_T, given.logsumexp_T, rtol=1e-3, atol=1e-6)


def write(path, count, close=True, **options):
    given = {f"{n:04x}/{n % 3}": random_dists(n, **options) for n in range(count)}
    writer = CacheWriter(path, HEADER)
    for key, dists in given.items():
        writer.append(key, dists)
    if close:
        writer.close()
    else:
        writer._release()
    return given


def test_everything_comes_back_by_key_in_any_order(tmp_path):
    given = write(tmp_path / "a.cache", 20)
    with CacheReader(tmp_path / "a.cache") as reader:
        assert reader.keys() == list(given) and len(reader) == 20 and reader.complete
        assert reader.header == HEADER
        for key in reversed(given):
            assert key in reader and reader.tokens(key) == len(given[key])
            assert_same(reader[key], given[key])
        assert reader.verify() == 20
        assert "nobody/0" not in reader
        with pytest.raises(DataError, match="no distributions of trace nobody/0"):
            reader["nobody/0"]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 30),
    st.integers(1, 45),
    st.floats(0.01, 30),
    st.sampled_from([51, 300, 262_144]),
)
def test_any_distributions_come_back_within_half_a_step(tmp_path_factory, seed, tokens, k_max, spread, vocab):
    given_dists = random_dists(seed, tokens, k_max, spread, vocab)
    path = tmp_path_factory.mktemp("cache") / "a.cache"
    header = CacheHeader("a", "b", "c", vocab, k_max, 1e-3)
    with CacheWriter(path, header) as writer:
        writer.append("x/0", given_dists)
    assert_same(CacheReader(path)["x/0"], given_dists)


def test_rounding_costs_less_than_a_ten_thousandth_of_a_nat_and_keeps_the_mass(tmp_path):
    """KL(true || stored) on the K+1 outcomes: flat distributions are the worst case, step^2 / 24 = 7.2e-5 on
    average."""
    for spread in (0.3, 2.0, 8.0):
        given = write(tmp_path / f"{spread}.cache", 30, spread=spread, k_max=50)
        reader = CacheReader(tmp_path / f"{spread}.cache")
        divergence, mass = [], []
        for key, dists in given.items():
            true, stored = dists.logprobs_S.astype(np.float64), reader[key].logprobs_S.astype(np.float64)
            starts = dists.offsets_T1[:-1]
            total = np.add.reduceat(np.exp(stored), starts) + dists.tail_T
            divergence.append(np.add.reduceat(np.exp(true) * (true - stored), starts) + np.log(total))
            mass.append(total)
        assert np.concatenate(divergence).mean() < 1e-4
        assert np.abs(np.concatenate(mass) - 1).mean() < 5e-3


def test_supports_come_back_most_likely_first_whatever_order_they_were_given_in(tmp_path):
    sorted_dists, mixed = random_dists(1), random_dists(1)
    for start, end in zip(mixed.offsets_T1[:-1], mixed.offsets_T1[1:]):
        mixed.ids_S[start:end], mixed.logprobs_S[start:end] = (
            mixed.ids_S[start:end][::-1],
            mixed.logprobs_S[start:end][::-1],
        )
    with CacheWriter(tmp_path / "a.cache", HEADER) as writer:
        writer.append("x/0", mixed)
    assert_same(CacheReader(tmp_path / "a.cache")["x/0"], sorted_dists)


def test_hand_made_trace_with_certain_impossible_and_flat_tokens(tmp_path):
    """Masses 1; 3/4 + tail 1/4; four quarters, the third sampled; a sampled token of mass e^-50."""
    logprobs = np.log([1.0, 0.75, 0.25, 0.25, 0.25, 0.25, 1.0, np.exp(-50.0)])
    dists = TokenDists(
        np.array([0, 1, 2, 6, 8]), np.array([7, 0, 4, 3, 2, 1, 4999, 7], np.int32), logprobs.astype(np.float32),
        np.array([0.0, 0.25, 0.0, 0.0], np.float32), np.array([0, -3.5, 1e4, 20], np.float32),
        np.array([7, 0, 2, 7], np.int32),
    )  # fmt: skip
    with CacheWriter(tmp_path / "a.cache", HEADER) as writer:
        writer.append("x/0", dists)
    found = CacheReader(tmp_path / "a.cache")["x/0"]
    assert_same(found, dists)
    assert found.logprobs_S[[0, 1, 6]].tolist() == pytest.approx(
        [0.0, np.log(0.75), 0.0], abs=1e-6
    )  # top: by the mass left


def test_unclosed_file_opens_with_all_blocks_and_goes_on(tmp_path):
    path = tmp_path / "a.cache"
    given = write(path, 5, close=False)
    reader = CacheReader(path)
    assert reader.keys() == list(given) and not reader.complete
    with pytest.raises(DataError, match="did not finish"):
        reader.require(complete=True)
    for _ in range(2):  # from an unclosed file, then from a closed one, whose index goes
        writer = CacheWriter(path, HEADER)
        assert writer.keys() == list(given)
        key = f"more/{len(given)}"
        given[key] = random_dists(len(given))
        writer.append(key, given[key])
        writer.close()
        reader = CacheReader(path)
        assert reader.complete and reader.verify() == len(given)
        for name, dists in given.items():
            assert_same(reader[name], dists)


def test_every_flipped_byte_is_detected(tmp_path):
    """One bit of every byte of a closed and of an unclosed file: opening, or verify, raises a DataError with a
    remedy."""
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
        path.write_bytes(whole[:length])
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


WRITER = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from test_logit_cache import HEADER, random_dists
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
    here = Path(__file__).resolve()
    code = WRITER.format(root=str(here.parents[2]), tests=str(here.parent), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
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


def test_killed_writer_loses_nothing_that_append_returned_from(tmp_path):
    check_kills(tmp_path / "a.cache", 4)


@pytest.mark.slow
def test_writer_killed_a_hundred_times_loses_nothing_that_append_returned_from(tmp_path):
    check_kills(tmp_path / "a.cache", 100)


def test_caches_of_another_origin_are_not_mixed(tmp_path):
    path = tmp_path / "a.cache"
    write(path, 1)
    other = CacheHeader("aaaa", "zzzz", "cccc", VOCAB, 64, 1e-3)
    with pytest.raises(DataError, match=r"another origin.*tokenizer_fingerprint.*bbbb.*zzzz"):
        CacheWriter(path, other)
    CacheWriter(path, CacheHeader("aaaa", "bbbb", "cccc", VOCAB, 64, 1e-3, versions={"distill": "9"})).close()
    reader = CacheReader(path)
    reader.require(tokenizer_fingerprint="bbbb", vocab_size=VOCAB, complete=True)
    with pytest.raises(DataError, match="tokenizer_fingerprint"):
        reader.require(tokenizer_fingerprint="zzzz")
    with pytest.raises(DataError, match="vocab_size"):
        reader.require(vocab_size=VOCAB + 1)


def test_distributions_that_no_reader_could_use_are_refused_and_leave_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.cache"
    writer = CacheWriter(path, HEADER)
    writer.append("good/0", random_dists(0))
    size = path.stat().st_size

    def broken(**change):
        dists = random_dists(1)
        for name, (place, value) in change.items():
            getattr(dists, name)[place] = value
        return dists

    unsampled = broken(sampled_T=(5, -7))
    twice = random_dists(1, spread=0.5)
    twice.ids_S[1] = twice.ids_S[0] = twice.sampled_T[0]
    empty = TokenDists(*(np.zeros(n) for n in (1, 0, 0, 0, 0, 0)))
    cases = [
        (broken(ids_S=(3, VOCAB)), "outside the 5000"),
        (broken(logprobs_S=(3, -np.inf)), "token 0"),
        (broken(logprobs_S=(3, 0.5)), "mass"),
        (broken(tail_T=(7, np.nan)), "token 7"),
        (broken(tail_T=(7, -0.1)), "token 7"),
        (broken(logsumexp_T=(7, np.nan)), "logsumexp"),
        (unsampled, "position 5 is not in its support"),
        (twice, "twice"),
        (broken(offsets_T1=(1, 0)), "no support"),
        (empty, "no support"),
    ]
    for dists, message in cases:
        with pytest.raises(DataError, match=message) as error:
            writer.append("bad/0", dists)
        assert "bad/0" in str(error.value)
    with pytest.raises(DataError, match="already"):
        writer.append("good/0", random_dists(0))
    assert path.stat().st_size == size and "bad/0" not in writer


def test_two_writers_of_one_file_and_unwritable_or_missing_paths_are_refused(tmp_path):
    writer = CacheWriter(tmp_path / "a.cache", HEADER)
    with pytest.raises(StoreError, match="another process"):
        CacheWriter(tmp_path / "a.cache", HEADER)
    writer.close()
    writer.close()
    with pytest.raises(StoreError, match="cannot write"):
        CacheWriter(tmp_path / "missing" / "a.cache", HEADER)
    with pytest.raises(DataError, match="cannot read"):
        CacheReader(tmp_path / "b.cache")
    (tmp_path / "text.cache").write_text("not a cache, but long enough to hold a header")
    with pytest.raises(DataError, match="not a teacher cache"):
        CacheReader(tmp_path / "text.cache")


def test_full_disk_is_a_store_error(tmp_path):
    """A limit on the file's size stops the write half-way, as a full disk does."""
    here = Path(__file__).resolve()
    code = f"""
import resource, signal, sys
sys.path[:0] = [{str(here.parents[2])!r}, {str(here.parent)!r}]
from test_logit_cache import HEADER, random_dists
from distill.errors import StoreError
from distill.logit_cache import CacheWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
writer, number = CacheWriter({str(tmp_path / "a.cache")!r}, HEADER), 0
try:
    while True:
        writer.append(f"{{number}}/0", random_dists(number))
        number += 1
except StoreError as error:
    print(number, error.remedy)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    number = int(out.split()[0])
    assert number >= 1 and "Free disk space" in out
    reader = CacheReader(tmp_path / "a.cache")
    assert len(reader) == number == reader.verify()
    assert os.path.getsize(tmp_path / "a.cache") == reader._end  # no half block is left


def test_reader_survives_pickling_into_a_worker(tmp_path):
    given = write(tmp_path / "a.cache", 2)
    reader = pickle.loads(pickle.dumps(CacheReader(tmp_path / "a.cache")))
    assert_same(reader["0001/1"], given["0001/1"])


def test_an_error_while_writing_leaves_the_file_unfinished(tmp_path):
    with pytest.raises(DistillError), CacheWriter(tmp_path / "a.cache", HEADER) as writer:
        writer.append("a/0", random_dists(0))
        writer.append("a/0", random_dists(0))
    reader = CacheReader(tmp_path / "a.cache")
    assert reader.keys() == ["a/0"] and not reader.complete


def test_sparse_targets_are_padded_rows_of_all_traces():
    one = TokenDists(
        np.array([0, 1, 3]), np.array([5, 6, 7], np.int32), np.array([-0.1, -0.2, -2.0], np.float32),
        np.array([0.1, 0.2], np.float32), np.zeros(2, np.float32), np.array([5, 6], np.int32),
    )  # fmt: skip
    ids, logprobs, tail = to_sparse_targets([one, one])
    assert ids.dtype == np.int64 and logprobs.dtype == tail.dtype == np.float32
    assert ids.tolist() == [[5, 0], [6, 7], [5, 0], [6, 7]]
    assert logprobs[:2].tolist() == [[np.float32(-0.1), -np.inf], [np.float32(-0.2), -2.0]]
    assert tail.tolist() == np.array([0.1, 0.2, 0.1, 0.2], np.float32).tolist()
    assert to_sparse_targets(one, width=4)[0].shape == (2, 4)
    assert to_sparse_targets([])[0].shape == (0, 0)
    with pytest.raises(DataError, match="more entries than fit"):
        to_sparse_targets(one, width=1)
