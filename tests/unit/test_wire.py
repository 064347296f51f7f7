"""The bytes of distributions on the wire: nothing lost, and damage is noticed."""

import numpy as np
import pytest

from distill import wire
from distill.errors import DataError
from distill.records import TokenDists


def random_dists(tokens: int, seed: int) -> TokenDists:
    rng = np.random.default_rng(seed)
    sizes_T = rng.integers(1, 70, tokens)
    entries = int(sizes_T.sum())
    return TokenDists(
        offsets_T1=np.concatenate(([0], np.cumsum(sizes_T, dtype=np.int64))),
        ids_S=rng.integers(0, 1 << 18, entries).astype(np.int32),
        logprobs_S=-rng.exponential(5, entries).astype(np.float32),
        tail_T=rng.random(tokens).astype(np.float32),
        logsumexp_T=rng.normal(0, 30, tokens).astype(np.float32),
        sampled_T=rng.integers(0, 1 << 18, tokens).astype(np.int32),
    )


def equal(a: TokenDists, b: TokenDists) -> bool:
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(vars(a).values(), vars(b).values()))


def test_everything_comes_back_bit_for_bit_and_in_order():
    many = [random_dists(tokens, seed) for seed, tokens in enumerate((1, 7, 300, 0, 2))]
    data = wire.pack_all(many)
    back = wire.unpack_all(data, "test")
    assert len(back) == 5 and all(equal(a, b) for a, b in zip(many, back))
    entries = sum(len(d.ids_S) for d in many)
    assert len(data) == 5 * 16 + 8 * entries + 16 * 310
    assert wire.unpack_all(b"", "test") == []


def test_any_damaged_byte_and_any_cut_is_noticed():
    data = wire.pack_all([random_dists(3, 0), random_dists(2, 1)])
    whole = wire.unpack_all(data, "test")
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        with pytest.raises(DataError, match="test"):
            wire.unpack_all(bytes(damaged), "test")
    boundary = 16 + 8 * len(whole[0].ids_S) + 16 * 3
    for size in range(1, len(data)):
        if size != boundary:
            with pytest.raises(DataError):
                wire.unpack_all(data[:size], "test")
