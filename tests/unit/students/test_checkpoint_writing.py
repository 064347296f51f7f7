"""Checkpoints are written while the training goes on, whole or not at all; the last and the best are kept."""

import threading

import pytest
import torch
from student_world import files_of_at_most, settings

from distill.errors import StoreError
from distill.store import RunFolder
from students import snapshot
from students.checkpoint import Checkpoints, best_checkpoint, newest_checkpoint
from students.data import load_traces
from students.engine import StudentEngine
from students.model import load_student
from students.step import LossSettings, StudentStep


@pytest.fixture
def engines(world, ranks, tmp_path):
    """Makes engines of the world's model with a ZeRO stage; closes them."""
    made = []

    def make(stage: int = 0) -> StudentEngine:
        model, _ = load_student(world / "model")
        train = settings(world / "model", zero_stage=stage).train
        options = {"dtype": torch.float32, "micro_batches": 1, "offload_dir": tmp_path}
        made.append(StudentEngine(StudentStep(model, LossSettings()), train, ranks, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="module")
def data(world):
    _, tokenizer = load_student(world / "model")
    return load_traces(RunFolder(world, "run", commit="test").stage("traces"), None, tokenizer, 96)


def step(engine, data):
    engine.accumulate(data.collate([[0, 1]], 400), 50.0, last=True)
    engine.step(1e-2)


def weights(engine):
    return {name: tensor.clone() for name, tensor in engine.whole_weights(torch.float32)}


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(
    engines, data, ranks, tmp_path, monkeypatch, stage
):
    disk = threading.Event()  # a disk that takes its time
    sync = snapshot.files.sync
    monkeypatch.setattr(snapshot.files, "sync", lambda path: (disk.wait(60), sync(path)))
    engine, checkpoints = engines(stage), Checkpoints(tmp_path / "c", ranks, 2)
    step(engine, data)
    saved = weights(engine)
    checkpoints.save(engine, 1, {"identity": {}})
    step(engine, data)
    step(engine, data)
    assert newest_checkpoint(tmp_path / "c") is None and not equal(weights(engine), saved)
    disk.set()
    checkpoints.wait()
    later = weights(engine)
    again = engines(stage)
    assert Checkpoints(tmp_path / "c", ranks, 2).resume(again, {})["step"] == 1
    assert equal(weights(again), saved)
    step(again, data)
    step(again, data)
    assert equal(weights(again), later)  # the optimizer's state is that of then, too


def test_the_next_save_waits_for_the_one_before(engines, data, ranks, tmp_path, monkeypatch):
    began, disk = threading.Event(), threading.Event()
    sync = snapshot.files.sync

    def slow(path):
        began.set()
        assert disk.wait(60)
        sync(path)

    monkeypatch.setattr(snapshot.files, "sync", slow)
    engine, checkpoints = engines(), Checkpoints(tmp_path / "c", ranks, 2)
    checkpoints.save(engine, 1, {"identity": {}})
    assert began.wait(60)
    threading.Timer(0.2, disk.set).start()
    checkpoints.save(engine, 2, {"identity": {}})
    assert (tmp_path / "c" / "step-000001").is_dir() and disk.is_set()
    checkpoints.wait()
    assert (tmp_path / "c" / "latest").read_text() == "step-000002\n"


def test_a_checkpoint_that_cannot_be_written_is_told_and_leaves_the_one_before(engines, ranks, tmp_path):
    engine, checkpoints = engines(), Checkpoints(tmp_path / "c", ranks, 2)
    checkpoints.save(engine, 1, {"identity": {}})
    checkpoints.wait()
    with files_of_at_most(10_000):
        checkpoints.save(engine, 2, {"identity": {}})  # returns: the training does not wait for the disk
        with pytest.raises(StoreError, match="could not be written to its end") as error:
            checkpoints.wait()
    assert str(tmp_path / "c") in str(error.value)
    assert newest_checkpoint(tmp_path / "c")[1]["step"] == 1
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["latest", "step-000001"]
    checkpoints.save(engine, 3, {"identity": {}})
    checkpoints.wait()
    assert newest_checkpoint(tmp_path / "c")[1]["step"] == 3


def test_the_last_and_the_best_are_kept(engines, ranks, tmp_path):
    engine, folder = engines(), tmp_path / "c"
    checkpoints = Checkpoints(folder, ranks, 2, keep_best=True)
    left = []
    for number, score in enumerate([3.0, 1.0, 2.0, 1.0, 5.0, 0.5], 1):
        checkpoints.save(engine, number, {"identity": {}, "score": score})
        checkpoints.wait()
        left.append(sorted(int(path.name[5:]) for path in folder.glob("step-*")))
    assert left == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6]]  # of equal scores the earlier
    assert (folder / "best").read_text() == "step-000006\n" and best_checkpoint(folder).name == "step-000006"


def test_a_checkpoint_of_the_step_that_was_resumed_is_not_replaced(engines, ranks, tmp_path):
    """Between removing the old and naming the new there would be none."""
    engine, places = engines(), set()
    for _ in range(2):
        checkpoints = Checkpoints(tmp_path, ranks, 1)
        checkpoints.save(engine, 4, {"identity": {}})
        checkpoints.wait()
        places.add((tmp_path / "step-000004").stat().st_ino)
    assert len(places) == 1


def test_a_damaged_later_checkpoint_does_not_push_out_a_whole_one(engines, ranks, tmp_path):
    engine, checkpoints = engines(), Checkpoints(tmp_path, ranks, 1)
    checkpoints.save(engine, 6, {"identity": {}})
    checkpoints.wait()
    (tmp_path / "step-000006" / "state.json").write_text("{")
    checkpoints.save(engine, 5, {"identity": {}})
    checkpoints.wait()
    assert newest_checkpoint(tmp_path, lambda _: None)[1]["step"] == 5
    checkpoints.save(engine, 6, {"identity": {}})  # the damaged one is replaced when the training comes there again
    checkpoints.wait()
    assert newest_checkpoint(tmp_path)[1]["step"] == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000006"]


def test_a_checkpoint_without_a_score_is_never_the_best(engines, ranks, tmp_path):
    engine, checkpoints = engines(), Checkpoints(tmp_path, ranks, 1, keep_best=True)
    for number in (1, 2):
        checkpoints.save(engine, number, {"identity": {}})
    checkpoints.wait()
    assert best_checkpoint(tmp_path) is None and [path.name for path in tmp_path.glob("step-*")] == ["step-000002"]


def test_a_copy_shares_nothing_with_what_it_was_made_of_and_keeps_what_is_shared():
    whole = torch.arange(6.0)
    value = {"a": [whole, whole.view(2, 3), whole[2:4]], "b": (whole, 7), "c": {"d": whole.bfloat16()}}
    copy = snapshot.copied(value)
    whole.zero_()
    assert torch.equal(copy["a"][0], torch.arange(6.0)) and copy["a"][0] is copy["b"][0]
    assert copy["a"][1].shape == (2, 3) and copy["a"][2].tolist() == [2, 3] and copy["b"][1] == 7
    assert copy["c"]["d"].dtype == torch.bfloat16 and copy["c"]["d"].tolist() == [0, 1, 2, 3, 4, 5]
    assert copy["a"][2].untyped_storage().nbytes() == 8  # a view's copy is no longer than the view
