"""A training that goes on with other ranks or another ZeRO stage has the losses of one that was left alone."""

import signal

import pytest
from forked_trainings import Stop
from training_worlds import same_losses

pytestmark = pytest.mark.timeout(900)

LONG = {"epochs": 4, "checkpoint_steps": 100}

# launches: (ranks, ZeRO stage), one after the other
QUICK = [[(2, 1), (1, 3)]]
ALL = [
    [(2, 1), (4, 3), (1, 2)],
    [(2, 3), (4, 1), (1, 0), (2, 2)],
    [(1, 0), (2, 3), (1, 1), (4, 2)],
    [(2, 2), (4, 2), (1, 2)],
]


@pytest.fixture(scope="module")
def expected(trainings, world, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    trainings(world, out, train={**LONG, "zero_stage": 0}).ok()
    return out


@pytest.mark.parametrize("launches", [*QUICK, *(pytest.param(each, marks=pytest.mark.slow) for each in ALL)], ids=str)
def test_losses_are_those_of_one_launch(trainings, world, expected, tmp_path, launches):
    for number, (ranks, stage) in enumerate(launches):
        last = number + 1 == len(launches)
        stop = None if last else Stop(signal.SIGTERM, steps=2)
        changes = {**LONG, "zero_stage": stage, "micro_batch_tokens": 96}
        ended = trainings(world, tmp_path, ranks=ranks, train=changes, stop=stop).ok()
        assert ended.stopped is not last and (tmp_path / "model").exists() is last
        assert ("converting it for this launch" in ended.said) is (number > 0)
        assert not [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]
    same_losses(tmp_path, expected)
