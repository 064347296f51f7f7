"""A training that is killed or stopped, at any moment and any number of times, ends in the same bits."""

import random
import signal
from functools import cache

import pytest
from forked_trainings import Stop
from training_worlds import same_bits

pytestmark = pytest.mark.timeout(1800)

FEW, MANY = 3, 20
STAGES = {1: 0, 2: 2}  # ranks: ZeRO stage


def settings_for(ranks: int, times: int) -> dict:
    """So many steps, three an epoch, that the training is not finished after as many interruptions."""
    return {"zero_stage": STAGES[ranks], "epochs": 2 * times + 2, "checkpoint_steps": 1, "micro_batch_tokens": 192}


@pytest.fixture(scope="module")
def whole(trainings, world, tmp_path_factory):
    """The folder of a training that nothing interrupted, made when it is first asked for."""

    @cache
    def of(ranks: int, times: int):
        out = tmp_path_factory.mktemp("whole")
        trainings(world, out, ranks=ranks, train=settings_for(ranks, times)).ok()
        return out

    return of


def cases(*numbers):
    for ranks in (1, 2):
        for number in numbers:
            for times in (FEW, MANY):
                slow = times == MANY or ranks == 2
                marks = [pytest.mark.slow] if slow else []
                yield pytest.param(
                    ranks, number, times, marks=marks, id=f"{ranks}-{signal.Signals(number).name}-{times}"
                )


@pytest.mark.parametrize(("ranks", "number", "times"), cases(signal.SIGKILL, signal.SIGTERM))
def test_stopped_again_and_again_it_ends_in_the_same_bits(trainings, world, whole, tmp_path, ranks, number, times):
    settings, draw = settings_for(ranks, times), random.Random(f"{ranks}/{number}/{times}")
    stopped = 0
    for _ in range(times):
        # Not before the first step: until then there is nothing to lose. Then at any moment, in the middle of a step
        # or of the writing of a checkpoint.
        stop = Stop(number, steps=draw.randrange(1, 3), delay_s=draw.uniform(0, 0.05))
        ended = trainings(world, tmp_path, ranks=ranks, train=settings, stop=stop)
        if not ended.stopped:
            break
        stopped += 1
        if number == signal.SIGTERM:
            assert ended.ok() and "stopped by SIGTERM; a checkpoint of step" in ended.said
        else:
            assert set(ended.statuses) <= {-signal.SIGKILL, 1}, ended.said[-3000:]
    assert stopped == times, "it was finished before it had been stopped so often"
    assert not (tmp_path / "model").exists()
    trainings(world, tmp_path, ranks=ranks, train=settings).ok()
    same_bits(tmp_path, whole(ranks, times))
    assert not [path for path in tmp_path.rglob("*.tmp-*")]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_its_part_ends_all_with_the_reason(trainings, world, whole, tmp_path, rank):
    settings = settings_for(2, FEW)
    ended = trainings(world, tmp_path, ranks=2, train=settings, small_disk=rank)
    assert 0 not in ended.statuses and -signal.SIGKILL not in ended.statuses
    assert "a file could not be written to its end" in ended.said, ended.said[-3000:]
    assert ended.wall_s < 120
    assert not list(tmp_path.glob("checkpoints/step-*")) and not list(tmp_path.rglob("*.tmp-*"))
    trainings(world, tmp_path, ranks=2, train=settings).ok()
    same_bits(tmp_path, whole(2, FEW))


@pytest.mark.slow
def test_one_killed_rank_of_two_ends_the_other_and_loses_nothing(trainings, world, whole, tmp_path):
    stop = Stop(signal.SIGKILL, steps=4, rank=1)
    settings = settings_for(2, FEW) | {"checkpoint_steps": 3}  # none is being written when it dies
    ended = trainings(world, tmp_path, ranks=2, train=settings, stop=stop)
    assert ended.statuses[1] == -signal.SIGKILL and ended.statuses[0] not in (0, -signal.SIGKILL)
    assert "another rank stopped or hangs" in ended.said and "Read the first error of another rank" in ended.said
    trainings(world, tmp_path, ranks=2, train=settings).ok()
    same_bits(tmp_path, whole(2, FEW))
