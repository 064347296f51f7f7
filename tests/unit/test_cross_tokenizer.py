"""The losses of others in bench_cross_tokenizer against loops over their definitions, and the benchmark on a few
problems."""

import json
import sys

import numpy as np
import pytest
import torch
from align_world import byte_level

from benchmarks import bench_cross_tokenizer, cross_losses, results_file
from benchmarks.cross_losses import PairBatch, groups_of, shared_ids
from distill.align import Aligner

TEACHER = byte_level([(b"a", b"b"), (b"ab", b"c"), (b"1", b"2")])
STUDENT = byte_level([(b"b", b"c"), (b"a", b"b")], think=False, end="<eot>")


@pytest.fixture(scope="module")
def aligner():
    return Aligner(TEACHER, STUDENT)


def encode(text):
    return [*TEACHER.encode(text, add_special_tokens=False), TEACHER.convert_tokens_to_ids("<|end|>")]


def make_batch(aligner, texts, seed=0):
    """(batch, alignments): random distributions of both sides, float64."""
    rng, cut = torch.Generator().manual_seed(seed), [aligner.align([encode(text)]) for text in texts]
    sizes = [(len(each), len(each.teacher_ids_T)) for each in cut]
    parts = [groups_of(aligner, each) for each in cut]
    starts = np.cumsum([(0, 0), *sizes], 0)
    moved = [part.shifted(*map(int, start)) for part, start in zip(parts, starts)]

    def random(side):
        shape = (int(starts[-1][side]), len((aligner.student, aligner.teacher)[side]))
        return (3 * torch.randn(*shape, generator=rng, dtype=torch.float64)).log_softmax(1)

    def places(side):
        counts = [size[side] for size in sizes]
        return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), torch.cat(
            [*map(torch.arange, counts)]
        )

    batch = PairBatch(
        random(0), torch.tensor(np.concatenate([each.ids_N for each in cut])), *places(0),
        random(1), torch.tensor(np.concatenate([each.teacher_ids_T for each in cut])), *places(1),
        *(torch.tensor(np.concatenate([getattr(g, name) for g in moved])) for name in type(parts[0]).__annotations__),
        shared_ids(aligner),
    )  # fmt: skip
    return batch, cut


TEXTS = ["abc12", "bcab", "1a2b12abcab"]


def groups_by_hand(aligner, cut):
    """(student indices, teacher indices) of each group of a batch."""
    found, first_n, first_t = [], 0, 0
    for alignment in cut:
        lens_n, lens_t = alignment.lens_N.tolist(), aligner.teacher.lens_V[alignment.teacher_ids_T].tolist()
        i = j = 0
        while i < len(lens_n):
            own, theirs = [i], [j]
            while (a := sum(lens_n[: i + 1])) != (b := sum(lens_t[: j + 1])):
                if a < b:
                    i += 1
                    own.append(i)
                else:
                    j += 1
                    theirs.append(j)
            found.append(([first_n + n for n in own], [first_t + t for t in theirs]))
            i, j = i + 1, j + 1
        first_n, first_t = first_n + len(lens_n), first_t + len(lens_t)
    return found


def test_groups_end_where_both_tokenizations_do(aligner):
    batch, cut = make_batch(aligner, TEXTS)
    expected = groups_by_hand(aligner, cut)
    assert len(expected) == len(batch.student_first_R) and any(len(own) > 1 for own, _ in expected)
    for n, (own, theirs) in enumerate(expected):
        assert (own[0], own[-1]) == (batch.student_first_R[n], batch.student_last_R[n])
        assert (theirs[0], theirs[-1]) == (batch.teacher_first_R[n], batch.teacher_last_R[n])


def test_shared_strings_are_the_same_bytes_or_mean_the_same(aligner):
    own, theirs = shared_ids(aligner)
    for s, t in zip(own.tolist(), theirs.tolist()):
        if t in aligner.teacher.markers:
            assert (STUDENT.convert_ids_to_tokens(s), TEACHER.convert_ids_to_tokens(t)) in {
                ("<eot>", "<|end|>"), ("<|user|>", "<|user|>"), ("<|assistant|>", "<|assistant|>"),
            }  # fmt: skip
        else:
            assert aligner.student.bytes_V[s] == aligner.teacher.bytes_V[t]
    assert len(set(own.tolist())) == len(set(theirs.tolist())) == len(own) > 250


def sorted_difference(p, q):
    p, q = sorted(p.tolist(), reverse=True), sorted(q.tolist(), reverse=True)
    width = max(len(p), len(q))
    return sum(abs(a - b) for a, b in zip(p + [0] * (width - len(p)), q + [0] * (width - len(q))))


def test_uld_compares_the_tth_tokens_sorted(aligner):
    batch, cut = make_batch(aligner, TEXTS)
    expected, n, t = float(batch.ce_N.sum()), 0, 0
    for alignment in cut:
        for i in range(min(len(alignment), len(alignment.teacher_ids_T))):
            expected += 1.5 * sorted_difference(batch.logp_NV[n + i].exp(), batch.logp_TW[t + i].exp())
        n, t = n + len(alignment), t + len(alignment.teacher_ids_T)
    assert float(cross_losses.uld(batch)) == pytest.approx(expected, rel=1e-9)


def test_gold_merges_groups_by_the_chain_rule(aligner):
    batch, cut = make_batch(aligner, TEXTS)
    own_U, theirs_U = shared_ids(aligner)
    weight, expected = len(own_U) / len(aligner.teacher), 0.0
    for own, theirs in groups_by_hand(aligner, cut):
        p = batch.logp_NV[own[-1]].exp() * np.prod([float(batch.logp_NV[i, batch.labels_N[i]].exp()) for i in own[:-1]])
        q = batch.logp_TW[theirs[-1]].exp()
        q = q * np.prod([float(batch.logp_TW[i, batch.labels_T[i]].exp()) for i in theirs[:-1]])
        for a, b in zip(p[own_U].tolist(), q[theirs_U].tolist()):
            m = (a + b) / 2
            expected += weight * 0.5 * (b * np.log(b / m) + a * np.log(a / m))
        mine = [i for i in range(len(p)) if i not in own_U.tolist()]
        other = [i for i in range(len(q)) if i not in theirs_U.tolist()]
        expected += (1 - weight) * sorted_difference(p[mine], q[other])
    assert float(cross_losses.gold(batch)) == pytest.approx(expected, rel=1e-9)
    both = float(cross_losses.gold(batch) + batch.ce_N.sum())
    assert float(cross_losses.gold_ce(batch)) == pytest.approx(both, rel=1e-12)


def test_alm_asks_of_every_group_whether_it_comes_next(aligner):
    batch, cut = make_batch(aligner, TEXTS)
    expected = float(batch.ce_N.sum())
    for own, theirs in groups_by_hand(aligner, cut):
        p = np.exp(sum(float(batch.logp_NV[i, batch.labels_N[i]]) for i in own))
        q = np.exp(sum(float(batch.logp_TW[i, batch.labels_T[i]]) for i in theirs))
        expected += q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    assert float(cross_losses.alm(batch)) == pytest.approx(expected, rel=1e-9)


def test_shared_is_a_renormalised_divergence_where_one_token_stands_against_one(aligner):
    batch, cut = make_batch(aligner, TEXTS)
    own_U, theirs_U = shared_ids(aligner)
    expected = float(batch.ce_N.sum())
    for own, theirs in groups_by_hand(aligner, cut):
        if len(own) == len(theirs) == 1:
            p, q = batch.logp_NV[own[0]].exp()[own_U], batch.logp_TW[theirs[0]].exp()[theirs_U]
            p, q = p / p.sum(), q / q.sum()
            expected += 0.9 * (float((q * (q / p).log()).sum()) - float(batch.ce_N[own[0]]))
    assert float(cross_losses.shared(batch)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", cross_losses.PEERS)
def test_a_batch_is_the_sum_of_its_completions(aligner, name):
    batch, cut = make_batch(aligner, TEXTS)
    total, n, t = 0.0, 0, 0
    for text, alignment in zip(TEXTS, cut):
        one, _ = make_batch(aligner, [text])
        rows_n, rows_t = slice(n, n + len(alignment)), slice(t, t + len(alignment.teacher_ids_T))
        fields = one.__dict__ | {"logp_NV": batch.logp_NV[rows_n], "logp_TW": batch.logp_TW[rows_t]}
        total += float(cross_losses.PEERS[name](PairBatch(**fields)))
        n, t = rows_n.stop, rows_t.stop
    assert float(cross_losses.PEERS[name](batch)) == pytest.approx(total, rel=1e-9)


@pytest.mark.slow
def test_the_benchmark_on_a_few_problems(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results_file, "RESULTS", tmp_path / "results")
    command = "bench --share 0.01 --seeds 0 --students same qwen same_llama --methods ours gold --epochs 1 --texts 8"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--gpus", "0", "--folder", str(tmp_path / "work")])
    bench_cross_tokenizer.main()
    result = json.loads(next((tmp_path / "results").glob("*.json")).read_text())
    value = {row["name"]: row for row in result["rows"]}
    for name in ("ours/same", "ours/qwen", "gold/qwen", "ours/same_llama"):
        assert value[f"bits_per_byte/{name}"]["value"] > 0 and 0 <= value[f"pass_at_1/{name}"]["value"] <= 1
        assert value[f"steps/{name}"]["value"] == value["steps/ours/same"]["value"] > 2
    assert value["bits_per_byte/ours/qwen"]["value"] < value["bits_per_byte/base/qwen"]["value"]
    assert "gap_recovered/ours/qwen" in value and "goal" in value["gap_recovered/ours/qwen"]
    assert "ours/qwen" in capsys.readouterr().out
