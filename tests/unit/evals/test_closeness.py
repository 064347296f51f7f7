"""Laws of the measure over buckets, against sums over tokens in float64."""

import numpy as np
import pytest
import torch

from distill.align_spans import ALIGNED, UNCOVERED
from distill.align_tables import PairTables
from distill.align_targets import BucketTargets
from distill.evals.closeness import Closeness, divergence

VOCAB, ROOTS = 60, 25


@pytest.fixture(params=range(4))
def world(request):
    """(tables with random buckets, targets of 300 positions over some of them, logits of a student)."""
    rng = np.random.default_rng(request.param)
    root_S = np.arange(VOCAB, dtype=np.int32)
    root_S[ROOTS:] = rng.integers(0, ROOTS, VOCAB - ROOTS)
    nothing = np.zeros(VOCAB + 1, np.int64)
    tables = PairTables(np.array(False), nothing, root_S[:0], root_S[:0], np.zeros(VOCAB, bool), root_S)
    roots, logq, tails, sizes = [], [], [], []
    for n in range(300):
        size = 0 if n % 50 == 49 else int(rng.integers(1, 9))
        mass = rng.dirichlet(np.ones(size + 1) * 0.4) if size else np.ones(1)
        if size and n % 3 == 0:
            mass = np.append(mass[:-1] / mass[:-1].sum(), 0)  # no tail
        roots.append(rng.permutation(ROOTS)[:size])
        logq.append(np.log(mass[:-1]))
        tails.append(mass[-1])
        sizes.append(size)
    kinds = np.where(np.array(sizes) > 0, ALIGNED, UNCOVERED).astype(np.uint8)
    targets = BucketTargets(
        np.cumsum([0, *sizes]), np.concatenate(roots).astype(np.int32), np.concatenate(logq).astype(np.float32),
        np.array(tails, np.float32), kinds, np.zeros(300, np.int64),
    )  # fmt: skip
    return tables, targets, 2 * rng.normal(size=(300, VOCAB))


def reference(tables, targets, logits_NV):
    """Position by position: masses of buckets by summing their tokens."""
    kl, same = [], []
    for n, logits_V in enumerate(logits_NV):
        p_V = np.exp(logits_V - np.logaddexp.reduce(logits_V))
        own = slice(targets.offsets_N1[n], targets.offsets_N1[n + 1])
        roots, q = targets.roots_E[own], np.exp(targets.logq_E[own].astype(np.float64))
        masses = np.array([p_V[tables.root_S == root].sum() for root in roots])
        outside_V = ~np.isin(tables.root_S, roots)
        tail = float(targets.tail_N[n])
        value = (q * np.log(q / masses)).sum() + (tail * np.log(tail / p_V[outside_V].sum()) if tail > 0 else 0)
        kl.append(value)
        best = max([*masses, p_V[outside_V].max()])
        same.append(float(len(q) > 0 and masses[q.argmax()] == best))
    return np.array(kl), np.array(same)


def test_it_is_the_divergence_of_summed_masses(world):
    tables, targets, logits_NV = world
    kl_N, same_N = divergence(logits_NV, targets, tables)
    expected_kl_N, expected_same_N = reference(tables, targets, logits_NV)
    np.testing.assert_allclose(kl_N, expected_kl_N, atol=2e-6)
    np.testing.assert_array_equal(same_N, expected_same_N)
    assert 0.02 < same_N.mean() < 0.98


def test_a_student_with_the_teachers_masses_is_at_distance_0_and_no_bucketing_overstates(world):
    tables, targets, logits_NV = world
    student_NV = logits_NV.copy()
    for n in range(300):  # the teacher's mass of every bucket, spread at random inside
        own = slice(targets.offsets_N1[n], targets.offsets_N1[n + 1])
        outside_V = ~np.isin(tables.root_S, targets.roots_E[own])
        for inside_V, mass in [
            *((tables.root_S == root, q) for root, q in zip(targets.roots_E[own], targets.logq_E[own])),
            (outside_V, np.log(max(targets.tail_N[n], 1e-30))),
        ]:
            student_NV[n, inside_V] += mass - np.logaddexp.reduce(student_NV[n, inside_V])
    kl_N, same_N = divergence(student_NV, targets, tables)
    assert np.abs(kl_N).max() < 1e-5
    covered_N = targets.kind_N == ALIGNED
    assert (same_N[covered_N] == 1).mean() > 0.6  # the rest may hold the likeliest token


def test_chunks_and_the_students_scores_do_not_matter(world):
    tables, targets, logits_NV = world
    scores = torch.tensor(logits_NV, dtype=torch.float32)
    before = scores.clone()
    kl_N, same_N = divergence(scores, targets, tables)
    assert torch.equal(scores, before)
    parts = [divergence(scores[i : i + 7], targets.part(i, i + 7), tables) for i in range(0, 300, 7)]
    np.testing.assert_allclose(kl_N, np.concatenate([part[0] for part in parts]), atol=1e-9)
    np.testing.assert_array_equal(same_N, np.concatenate([part[1] for part in parts]))


def test_ranges_of_bytes_share_out_the_positions():
    one = Closeness(np.arange(5.0), np.ones(5), np.array([0, 3, 4, 9, 9]), np.array([3, 1, 5, 1, 0]))
    parts = [one.between(0, 4), one.between(4, 9), one.between(9, None)]
    assert [part.kl_N.tolist() for part in parts] == [[0, 1], [2], [3, 4]]
    assert sum(int(part.bytes_N.sum()) for part in parts) == 10
