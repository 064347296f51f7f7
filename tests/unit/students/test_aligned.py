"""Laws of the data of a student with another tokenizer than the teacher's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from student_world import make_stages, make_tokenizer, make_traces

from distill.errors import DataError
from distill.losses.buckets import BucketedTargets
from distill.losses.fused import distill_loss
from distill.tokens import end_id, token_bytes
from students.data import load_traces


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(stages, traces, folder of the teacher's tokenizer, the teacher's and the student's tokenizer)"""
    root = tmp_path_factory.mktemp("aligned")
    teacher, student = make_tokenizer(root / "teacher", 330), make_tokenizer(root / "student", 285)
    traces = make_traces(teacher, 9)
    return make_stages(root, teacher, traces), traces, str(root / "teacher"), teacher, student


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_students_tokens_have_the_bytes_of_the_teachers_and_positions_are_counted(world, cache):
    stages, traces, path, teacher, student = world
    data = load_traces(*stages, student, 200, teacher_path=path)
    tables = (token_bytes(teacher), token_bytes(student))
    sampled = {trace.sample_key: trace.completion_ids for trace in traces}
    assert data.counts["retokenised"] == data.counts["kept"] == len(data.examples) == 8
    for example in data.examples:
        spelled = [
            b"".join(table[i] for i in ids)
            for table, ids in zip(tables, (sampled[example.key], example.completion_ids))
        ]
        assert spelled[0] == spelled[1]
        assert example.completion_ids[-1] == end_id(student) and example.sampled_ids == sampled[example.key]
    kinds = {name: count for name, count in data.counts.items() if name.startswith("positions_")}
    assert sum(kinds.values()) == data.counts["trained_tokens"] and kinds["positions_aligned"] > 0
    assert kinds["positions_inner"] > 0
    title, _, table = data.aligned.describe().split("\n", 2)
    assert str(student.name_or_path) in title and path in title and "digits" in table
    assert len(list(cache.rglob("tables-*.npz"))) == 1


def test_a_micro_batch_holds_a_target_for_every_trained_token(world):
    stages, _, path, _, student = world
    data = load_traces(*stages, student, 200, teacher_path=path)
    batch = data.collate([[0, 1], [2]], 400)
    assert isinstance(batch.targets, BucketedTargets)
    targets, rows = batch.targets, len(batch.labels_M)
    assert len(targets.ids_NK) == rows == sum(len(e.completion_ids) for e in data.examples[:3])
    mass_N = targets.logprobs_NG.double().exp().sum(1) + targets.tail_N
    np.testing.assert_allclose(mass_N, 1, atol=1e-5)
    covered = (targets.logprobs_NG > -torch.inf).any(1)
    holds_label = ((targets.ids_NK == batch.labels_M[:, None]) & (targets.group_NK >= 0)).any(1)
    assert torch.equal(covered, holds_label) and covered.float().mean() > 0.8


def test_the_loss_of_a_batch_is_the_definition_in_float64(world):
    stages, _, path, _, student = world
    data = load_traces(*stages, student, 200, teacher_path=path)
    batch = data.collate([[3, 4]], 400)
    torch.manual_seed(0)
    hidden_MH = torch.randn(len(batch.labels_M), 16, dtype=torch.float64)
    head_VH = torch.randn(len(student), 16, dtype=torch.float64)
    value, _ = distill_loss(hidden_MH, head_VH, batch.labels_M, targets=batch.targets, alpha=1.0, normalizer=1.0)
    p_MV = (hidden_MH @ head_VH.T).softmax(1)
    expected = 0.0
    for p_V, label, ids, group, logq, tail in zip(
        p_MV,
        batch.labels_M,
        batch.targets.ids_NK,
        batch.targets.group_NK,
        batch.targets.logprobs_NG,
        batch.targets.tail_N,
    ):
        outcomes = int(group.max()) + 1 if len(group) else 0
        mass = torch.stack([p_V[ids[group == g]].sum() for g in range(outcomes)] + [p_V.new_zeros(())])[:outcomes]
        rest, q = 1 - mass.sum(), logq[:outcomes].double().exp()
        expected += (q * (q / mass).log()).sum() + (tail * (tail.double() / rest).log() if tail > 0 else 0)
        home = [int(g) for i, g in zip(ids, group) if i == label and g >= 0]
        expected -= (p_V[label] / (mass[home[0]] if home else rest)).log()
    assert float(value) == pytest.approx(float(expected), rel=1e-6)


def test_an_empty_share_is_one_token_without_loss(world):
    stages, _, path, _, student = world
    batch = load_traces(*stages, student, 200, teacher_path=path).collate([], 400)
    assert batch.labels_M.tolist() == [-100] and isinstance(batch.targets, BucketedTargets)
    batch.targets.check(400)


def test_another_teachers_tokenizer_than_the_one_that_sampled_raises(world, tmp_path):
    stages, _, _, _, student = world
    make_tokenizer(tmp_path / "third", 300)
    with pytest.raises(DataError, match="were sampled with tokenizer") as error:
        load_traces(*stages, student, 200, teacher_path=str(tmp_path / "third"))
    assert "third" in str(error.value)


def test_distributions_of_another_text_raise(world, tmp_path):
    (traces_stage, _), traces, path, teacher, student = world
    others = [replace(t, completion_ids=[*t.completion_ids[:-2], 70, t.completion_ids[-1]]) for t in traces]
    other = make_stages(tmp_path, teacher, others)
    data = load_traces(traces_stage, other[1], student, 200, teacher_path=path)
    with pytest.raises(DataError, match="of another text"):
        data.collate([[0]], 400)
