"""Laws of the teacher cache: what comes back, and what is refused. Damage: test_logit_cache_damage.py."""

import pickle

import numpy as np
import pytest
from cache_world import HEADER, VOCAB, assert_same, divergence, log_masses, random_dists, write
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.cache_codec import prune
from distill.cache_levels import SQRT_STEP
from distill.errors import DataError, DistillError, StoreError
from distill.logit_cache import CacheHeader, CacheReader, CacheWriter, to_sparse_targets
from distill.records import TokenDists


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
def test_any_distributions_come_back_within_the_bounds(tmp_path_factory, seed, tokens, k_max, spread, vocab):
    given_dists = random_dists(seed, tokens, k_max, spread, vocab)
    path = tmp_path_factory.mktemp("cache") / "a.cache"
    header = CacheHeader("a", "b", "c", vocab, k_max, 1e-3)
    with CacheWriter(path, header) as writer:
        writer.append("x/0", given_dists)
    assert_same(CacheReader(path)["x/0"], given_dists)


def test_rounding_costs_a_sixth_of_the_squared_step_an_entry_and_keeps_the_mass(tmp_path):
    """KL(true || stored) on the K + 1 outcomes: the worst case is flat, where every entry pays in full; a distribution
    as a trained model's, with 5 tokens of any weight, costs less than 1e-4 nats."""
    for spread, k_max in ((0.3, 50), (2.0, 50), (8.0, 50), (8.0, 5)):
        given = write(tmp_path / f"{spread}-{k_max}.cache", 30, spread=spread, k_max=k_max)
        reader = CacheReader(tmp_path / f"{spread}-{k_max}.cache")
        costs = np.concatenate([divergence(dists, reader[key]) for key, dists in given.items()])
        entries = np.concatenate([np.diff(dists.offsets_T1) for dists in given.values()])
        assert costs.min() > -1e-6
        assert costs.mean() < 1.2 * entries.mean() * SQRT_STEP**2 / 6
        assert k_max > 5 or costs.mean() < 1e-4
        assert max(np.abs(log_masses(reader[key])).max() for key in given) < 1e-6


def test_supports_come_back_most_likely_first_whatever_order_they_were_given_in(tmp_path):
    sorted_dists, mixed = random_dists(1), random_dists(1)
    for start, end in zip(mixed.offsets_T1[:-1], mixed.offsets_T1[1:]):
        mixed.ids_S[start:end], mixed.logprobs_S[start:end] = (
            mixed.ids_S[start:end][::-1],
            mixed.logprobs_S[start:end][::-1],
        )
    with CacheWriter(tmp_path / "a.cache", HEADER) as writer:
        writer.append("x/0", mixed)
        writer.append("y/0", sorted_dists)
    found, other = CacheReader(tmp_path / "a.cache")["x/0"], CacheReader(tmp_path / "a.cache")["y/0"]
    assert_same(found, sorted_dists)
    np.testing.assert_array_equal(found.ids_S, other.ids_S)
    np.testing.assert_array_equal(found.logprobs_S, other.logprobs_S)
    rises_S = np.diff(found.logprobs_S, prepend=0)
    rises_S[found.offsets_T1[:-1]] = 0
    seconds = np.setdiff1d(found.offsets_T1[:-1] + 1, found.offsets_T1)
    assert rises_S[seconds].max() < 0.25  # the first is what is left, not a level: a tie with it may go either way
    rises_S[seconds] = 0
    assert rises_S.max() <= 0


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
    assert found.logprobs_S[[0, 6]].tolist() == pytest.approx([0, 0], abs=1e-6)  # the top is the mass that is left
    assert np.exp(found.logprobs_S[1]) + found.tail_T[1] == pytest.approx(1, abs=1e-6)
    assert np.exp(found.logprobs_S[2:6]) == pytest.approx([0.25] * 4, abs=1e-6)  # sqrt(1/4) is a level
    assert found.logprobs_S[7] == pytest.approx(-50, abs=0.25)


def test_light_entries_count_into_the_tail(tmp_path):
    """By hand: of masses 0.9, 0.06, 0.02, 0.01 with tail 0.01 a bound of 0.03 leaves two and a tail of 0.04; the most
    likely entry and the sampled one stay however light they are."""
    logprobs = np.log([0.9, 0.06, 0.02, 0.01, 0.02, 0.01]).astype(np.float32)
    dists = TokenDists(
        np.array([0, 4, 6]), np.array([5, 6, 7, 8, 9, 5], np.int32), logprobs, np.array([0.01, 0.97], np.float32),
        np.zeros(2, np.float32), np.array([8, 5], np.int32),
    )  # fmt: skip
    pruned = prune(dists, 0.03)
    assert pruned.offsets_T1.tolist() == [0, 3, 5]
    assert pruned.ids_S.tolist() == [5, 6, 8, 9, 5]
    assert pruned.tail_T.tolist() == pytest.approx([0.03, 0.97])
    header = CacheHeader("aaaa", "bbbb", "cccc", VOCAB, k_max=64, tail_bound=1e-3, min_mass=0.03)
    with CacheWriter(tmp_path / "a.cache", header) as writer:
        writer.append("x/0", dists)
    assert_same(CacheReader(tmp_path / "a.cache")["x/0"], pruned)
    assert dists.offsets_T1.tolist() == [0, 4, 6]  # what was given is as it was


@pytest.mark.parametrize("min_mass", [1e-4, 1e-2, 0.2])
def test_no_choice_of_as_many_entries_leaves_a_smaller_tail(min_mass):
    dists = random_dists(3, tokens=200)
    pruned = prune(dists, min_mass)
    masses = np.exp(dists.logprobs_S.astype(np.float64))
    sampled = dists.ids_S == np.repeat(dists.sampled_T, np.diff(dists.offsets_T1))
    first = np.zeros(len(masses), bool)
    first[dists.offsets_T1[:-1]] = True
    free = len(pruned.ids_S) - np.count_nonzero(sampled | first)
    best = masses[sampled | first].sum() + np.sort(masses[~(sampled | first)])[::-1][:free].sum()
    assert np.exp(pruned.logprobs_S.astype(np.float64)).sum() == pytest.approx(best, rel=1e-9)
    np.testing.assert_allclose(log_masses(pruned), log_masses(dists), atol=1e-6)  # no mass is lost


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
    repeated = random_dists(1, spread=0.5)
    start, end = repeated.offsets_T1[3:5]
    repeated.ids_S[[n for n in range(start, end) if repeated.ids_S[n] != repeated.sampled_T[3]][:2]] = 17
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
        (repeated, "twice"),
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
