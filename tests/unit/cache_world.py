"""Distributions, files and writer processes for the tests of the teacher cache."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from distill.cache_levels import LOG_BOUND, LOGSUMEXP_STEP, TAIL_BOUND
from distill.logit_cache import CacheHeader, CacheWriter
from distill.records import TokenDists

VOCAB = 5000
HEADER = CacheHeader("aaaa", "bbbb", "cccc", VOCAB, k_max=64, tail_bound=1e-3, versions={"distill": "0.1.0"})


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


def by_id(dists):
    """(ids, logprobs), each support sorted by id."""
    sizes_T = np.diff(dists.offsets_T1)
    order_S = np.lexsort((dists.ids_S, np.repeat(np.arange(len(sizes_T)), sizes_T)))
    return dists.ids_S[order_S], dists.logprobs_S[order_S].astype(np.float64)


def log_masses(dists):
    """float64 log of stored mass and tail together, per token."""
    return np.log(np.add.reduceat(np.exp(dists.logprobs_S.astype(np.float64)), dists.offsets_T1[:-1]) + dists.tail_T)


def divergence(given, found):
    """KL(given || found) per token on the K + 1 outcomes, nats, float64; `given` as it is, `found` normalised."""
    starts, tail, other = given.offsets_T1[:-1], given.tail_T.astype(np.float64), found.tail_T.astype(np.float64)
    true, stored = by_id(given)[1], by_id(found)[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = np.where(tail > 0, tail * np.log(tail / other), 0.0)
    return np.add.reduceat(np.exp(true) * (true - stored), starts) + rest + log_masses(found) - log_masses(given)


def assert_same(found, given):
    """Ids, sizes and sampled tokens as given; masses within the stated bounds, summing to 1, most likely first."""
    for name in ("offsets_T1", "sampled_T"):
        np.testing.assert_array_equal(getattr(found, name), getattr(given, name))
    for name in ("offsets_T1", "ids_S", "logprobs_S", "tail_T", "logsumexp_T", "sampled_T"):
        assert getattr(found, name).dtype == getattr(given, name).dtype
    (ids, stored), (true_ids, true) = by_id(found), by_id(given)
    np.testing.assert_array_equal(ids, true_ids)
    assert np.abs(log_masses(found)).max() < 1e-5
    # Where rounding errors of a support do not cancel, all are scaled to sum to 1: by a mean of the errors at most.
    assert np.abs(stored - true).max() <= 2 * LOG_BOUND
    np.testing.assert_array_equal(found.tail_T > 0, given.tail_T > 0)
    some = given.tail_T > 0
    ratio = np.log(found.tail_T[some].astype(np.float64) / given.tail_T[some])
    assert np.abs(ratio).max(initial=0) <= TAIL_BOUND + LOG_BOUND
    np.testing.assert_allclose(found.logsumexp_T, given.logsumexp_T, rtol=1e-6, atol=LOGSUMEXP_STEP / 2 + 1e-5)


def write(path, count, close=True, header=HEADER, **options):
    """{key: dists} of `count` random traces, written to `path`; without `close` as a killed writer leaves them."""
    given = {f"{n:04x}/{n % 3}": random_dists(n, **options) for n in range(count)}
    writer = CacheWriter(path, header)
    for key, dists in given.items():
        writer.append(key, dists)
    writer.close() if close else writer._release()
    return given


def run_python(code, **options):
    """A started process with this tree and these tests on its path."""
    here = Path(__file__).resolve()
    paths = f"import sys\nsys.path[:0] = [{str(here.parents[2])!r}, {str(here.parent)!r}]\n"
    return subprocess.Popen([sys.executable, "-c", paths + code], stdout=subprocess.PIPE, text=True, **options)
