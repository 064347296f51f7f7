"""Optimizers and their state under ZeRO: close to AdamW, the same after a resume, the same wherever it lies."""

import signal

import pytest
import torch
from student_world import make_model, settings
from test_checkpoint import equal, exported, launch, log, train

from distill.config import Train
from students import checkpoint, optim
from students.data import Batch, load_traces
from students.ema import MovingAverage
from students.engine import StudentEngine
from students.model import load_student
from students.sliced_adamw import SlicedAdamW
from students.step import LossSettings, StudentStep


@pytest.fixture(scope="module")
def data(world):
    from distill.store import RunFolder

    run = RunFolder(world, "run", commit="test")
    _, tokenizer = load_student(world / "model")
    return load_traces(run.stage("traces"), run.stage("logits"), tokenizer, 96)


def learn(world, ranks, data, folder, steps, dtype=torch.float32, **changes):
    """(losses, whole weights in float32) of a student that learned from the same two micro-batches every step."""
    model, _ = load_student(world / "model", dtype)
    config = settings(world / "model", **changes).train
    module = StudentStep(model, LossSettings(alpha=0.5))
    engine = StudentEngine(module, config, ranks, dtype=dtype, micro_batches=2, offload_dir=folder / "offload")
    batches = [data.collate([[0, 1]], 400), data.collate([[2, 3]], 400)]
    tokens = float(sum(len(batch.labels_M) for batch in batches))
    losses = []
    for _ in range(steps):
        parts = [engine.accumulate(batch, tokens, last=i == 1) for i, batch in enumerate(batches)]
        losses.append(float(sum(part[0] for part in parts)))
        engine.step(3e-3)
    weights = dict(engine.whole_weights(torch.float32))
    engine.close()
    return losses, weights


@pytest.fixture(scope="module")
def reference(world, ranks, data, tmp_path_factory):
    return learn(world, ranks, data, tmp_path_factory.mktemp("reference"), 30, zero_stage=0)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 3])
def test_8_bit_moments_follow_float32_adamw_for_30_steps(world, ranks, data, reference, tmp_path, stage):
    """Losses within 3 %. They fall from 6 to under 3 meanwhile, so a wrong step would show."""
    losses, _ = learn(world, ranks, data, tmp_path, 30, zero_stage=stage, optimizer="adamw8bit")
    assert reference[0][-1] < reference[0][0] / 2
    assert losses == pytest.approx(reference[0], rel=0.03)
    assert losses != reference[0]


@pytest.mark.parametrize(
    ("stage", "optimizer"),
    [
        (0, "adamw"),
        pytest.param(1, "adamw8bit", marks=SLOW),
        pytest.param(2, "adamw", marks=SLOW),
        pytest.param(3, "adamw8bit", marks=SLOW),
    ],
)
def test_bfloat16_without_masters_follows_float32(world, ranks, data, reference, tmp_path, stage, optimizer):
    changes = {"zero_stage": stage, "optimizer": optimizer, "master_weights": "none"}
    losses, _ = learn(world, ranks, data, tmp_path, 30, torch.bfloat16, **changes)
    assert losses == pytest.approx(reference[0], rel=0.06)


@pytest.mark.parametrize(
    "places",
    [
        pytest.param({"zero_stage": 1, "offload": "cpu"}, marks=SLOW),
        pytest.param({"zero_stage": 2, "offload": "cpu"}, marks=SLOW),
        pytest.param({"zero_stage": 3, "offload": "cpu"}, marks=SLOW),
        {"zero_stage": 3, "offload": "cpu", "offload_params": "cpu"},
    ],
)
def test_where_state_and_weights_lie_changes_no_loss(world, ranks, data, reference, tmp_path, places):
    losses, weights = learn(world, ranks, data, tmp_path, 5, **places)
    assert losses == pytest.approx(reference[0][:5], abs=1e-5)
    _, expected = learn(world, ranks, data, tmp_path, 5, zero_stage=places["zero_stage"])
    assert max((weights[name] - expected[name]).abs().max() for name in weights) < 1e-6


def random_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(0, 300, (96,), generator=generator) for _ in range(2))
    every = torch.arange(96)
    return Batch(ids, every, [96], every, labels, None, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("places", "optimizer"),
    [
        (("nvme", "none"), "adamw"),
        (("nvme", "cpu"), "adamw"),
        (("none", "nvme"), "adamw"),
        (("none", "nvme"), "adamw8bit"),
        (("nvme", "nvme"), "adamw"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "hidden"), [(torch.float32, 512), (torch.bfloat16, 1024)], ids=str)
def test_state_and_weights_in_files_change_no_loss(ranks, aio, tmp_path, places, optimizer, dtype, hidden):
    """Tensors of a MB and more, as DeepSpeed leaves smaller ones in memory; evaluation reads weights in between.

    Where the optimizer's state lies changes the order of sums, which bfloat16 makes more of. Nor does it change the
    moving average, whose export leaves weights and state as they were."""
    make_model(tmp_path / "model", hidden=hidden, layers=4)
    losses, weights, averages = [], [], []
    for offload, params in (("none", "none"), places):
        model, _ = load_student(tmp_path / "model", dtype)
        changes = {"zero_stage": 3, "offload": offload, "offload_params": params}
        changes |= {"ema_decay": 0.6, "optimizer": optimizer}
        config = settings(tmp_path / "model", **changes).train
        folder = tmp_path / "offload"
        module = StudentStep(model, LossSettings())
        engine = StudentEngine(module, config, ranks, dtype=dtype, micro_batches=1, offload_dir=folder)
        losses.append([])
        for step in range(4):
            losses[-1].append(float(engine.accumulate(random_batch(step), 96.0, last=True)[0]))
            engine.step(3e-3)
            losses[-1].append(float(engine.evaluate(random_batch(9), 96.0)[0]))
            if step == 2:
                averages.append(dict(engine.whole_weights(torch.float32)))
        engine.forget_average()
        weights.append(dict(engine.whole_weights(torch.float32)))
        kinds = {path.relative_to(folder).parts[1] for path in folder.rglob("*.swp") if path.stat().st_size > 1 << 20}
        assert ("optimizer" in kinds) == (offload == "nvme")
        assert (f"{str(dtype)[6:]}params" in kinds) == (params == "nvme")
        engine.close()
        assert not list(folder.rglob("*.swp"))
    assert max((averages[0][name] - weights[0][name]).abs().max() for name in weights[0]) > 1e-3
    if places[0] == "none":
        assert losses[1] == losses[0]
        for kept in (weights, averages):
            assert all(torch.equal(kept[1][name], kept[0][name]) for name in kept[0])
    else:
        for kept in (weights, averages):
            gaps = [(kept[1][name] - kept[0][name]).abs().mean() for name in kept[0]]
            assert max(gaps) < (1e-5 if dtype == torch.float32 else 1e-3)
        assert losses[1] == pytest.approx(losses[0], abs=1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW)])
def test_8_bit_state_killed_and_resumed_equals_uninterrupted_bit_for_bit(world, ranks, tmp_path, stage):
    changes = {"zero_stage": stage, "optimizer": "adamw8bit", "ema_decay": 0.7}
    train(world, tmp_path / "whole", ranks, **changes)
    killed = launch(world, tmp_path / "again", "--kill-at", "5", changes=changes)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    _, state = checkpoint.newest_checkpoint(tmp_path / "again" / "checkpoints")
    assert 2 <= state["step"] <= 4
    train(world, tmp_path / "again", ranks, **changes)
    assert log(tmp_path / "again") == log(tmp_path / "whole")
    assert equal(exported(tmp_path / "again"), exported(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (0, "float32"),
        pytest.param(1, "bfloat16", marks=SLOW),
        pytest.param(2, "float32", marks=SLOW),
        pytest.param(3, "float32", marks=SLOW),
    ],
)
def test_the_exported_average_by_hand(world, ranks, data, tmp_path, stage, dtype):
    """average = 0.6 average + 0.4 weights after each step, beginning at the base; training goes on from the weights."""
    averaged, expected = {"zero_stage": stage, "ema_decay": 0.6}, None
    width = getattr(torch, dtype)
    for steps in range(5):
        _, weights = learn(world, ranks, data, tmp_path, steps, width, zero_stage=stage)
        expected = expected or weights
        if steps:
            expected = {name: 0.6 * average + 0.4 * weights[name] for name, average in expected.items()}
    _, found = learn(world, ranks, data, tmp_path, 4, width, **averaged)
    assert max((found[name] - expected[name]).abs().max() for name in found) < 1e-6
    assert max((found[name] - weights[name]).abs().max() for name in found) > 1e-4


def test_an_export_leaves_the_weights_as_they_were():
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    average = MovingAverage(weights.items(), 0.75)
    average.update([("a", torch.tensor([5.0, 2.0])), ("b", torch.tensor([-1.0]))])
    with average.in_place_of(weights.items):
        assert weights["a"].tolist() == [2.0, 2.0] and weights["b"].tolist() == [2.0]
    assert weights["a"].tolist() == [1.0, 2.0] and weights["b"].tolist() == [3.0]


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(50, 8)
        self.proj = torch.nn.Linear(8, 8)
        self.frozen = torch.nn.Linear(8, 8).requires_grad_(False)


def test_the_embedding_and_vectors_keep_wide_moments_and_frozen_weights_have_none():
    module = Small()
    optimizer = optim.make_optimizer(module, Train(optimizer="adamw8bit"), torch.float32, torch.device("cpu"))
    assert isinstance(optimizer, SlicedAdamW)
    bits = {id(p): group["moment_bits"] for group in optimizer.param_groups for p in group["params"]}
    assert bits == {id(module.embed_tokens.weight): 32, id(module.proj.weight): 8, id(module.proj.bias): 32}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(module.proj.bias)] == 0.0


def test_a_part_of_a_matrix_still_counts_as_a_matrix():
    """ZeRO-3 leaves a flat part where the matrix was; its own attribute tells the shape."""
    module = Small()
    module.proj.weight.data = module.proj.weight.data.flatten()[:16]
    module.proj.weight.ds_shape = torch.Size((8, 8))
    groups = optim.parameter_groups(module, Train(weight_decay=0.1))
    assert [len(group["params"]) for group in groups if group["weight_decay"]] == [2]
