import random

import pytest

from distill.config import Train
from distill.errors import DataError
from students.packing import TrainPlan, first_fit_decreasing
from students.schedule import learning_rate


def plan(lengths, **changes):
    keys = [f"k{i}" for i in range(len(lengths))]
    settings = dict(row_tokens=10, batch_tokens=20, epochs=2, seed=0) | changes
    return TrainPlan(keys, lengths, [max(1, n // 2) for n in lengths], **settings)


def test_first_fit_decreasing_by_hand():
    # 6 opens row 0, 5 opens row 1, 4 fills row 0 (10), 3 joins row 1 (8), 2 fills row 1 (10)
    assert first_fit_decreasing([2, 5, 4, 6, 3], 10) == [[3, 2], [1, 4, 0]]
    # equal lengths keep their order; the first row with room is taken, not the fullest
    assert first_fit_decreasing([5, 5, 5, 1], 10) == [[0, 1], [2, 3]]
    assert first_fit_decreasing([], 10) == []


def test_first_fit_decreasing_equals_the_plain_search():
    rng = random.Random(1)
    for _ in range(50):
        lengths = [rng.randint(1, 30) for _ in range(rng.randint(1, 60))]
        rows: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            home = next((row for row in rows if sum(lengths[j] for j in row) + lengths[i] <= 30), None)
            if home is None:
                rows.append([i])
            else:
                home.append(i)
        assert first_fit_decreasing(lengths, 30) == rows


def test_an_item_longer_than_a_row_is_refused():
    with pytest.raises(DataError, match="11 tokens"):
        first_fit_decreasing([3, 11], 10)


def test_every_trace_is_trained_once_an_epoch_and_no_row_or_step_is_too_large():
    rng = random.Random(2)
    lengths = [rng.randint(1, 10) for _ in range(53)]
    whole = plan(lengths)
    steps = [whole[i] for i in range(len(whole))]
    for epoch in range(2):
        mine = [step for step in steps if step.epoch == epoch]
        assert sorted(i for step in mine for row in step.rows for i in row) == list(range(53))
        assert all(sum(lengths[i] for i in row) <= 10 for step in mine for row in step.rows)
        assert {len(step.rows) for step in mine} <= {1, 2}
    assert sum(step.tokens for step in steps) == 2 * sum(lengths)
    assert sum(step.trained_tokens for step in steps) == 2 * sum(max(1, n // 2) for n in lengths)
    assert whole.efficiency == pytest.approx(sum(lengths) / (10 * whole.rows_of_epoch[0]))


def test_steps_depend_on_seed_and_epoch_and_nothing_else():
    lengths = [3, 4, 3, 4, 5, 5, 2, 2, 8, 8] * 3
    first = [plan(lengths)[i].rows for i in range(len(plan(lengths)))]
    again = plan(lengths)
    assert [again[i].rows for i in reversed(range(len(again)))][::-1] == first  # any order of asking
    per_epoch = again.first_step[1]
    assert first[:per_epoch] != first[per_epoch:]
    assert plan(lengths, seed=1)[0].rows != first[0]
    assert plan(lengths, seed=1).digest != again.digest == plan(lengths).digest


def test_a_short_last_step_does_not_exist():
    # 5 rows of one trace each, 4 rows fit a step: 3 + 2, not 4 + 1
    whole = plan([10] * 5, batch_tokens=40, epochs=1)
    assert [len(whole[i].rows) for i in range(len(whole))] == [3, 2]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("per_micro", [1, 2, 5])
def test_ranks_share_the_rows_of_a_step_and_run_equally_many_forwards(world, per_micro):
    step = plan([10] * 7, batch_tokens=70)[0]
    shares = [step.micro_batches(rank, world, per_micro) for rank in range(world)]
    assert sorted(map(str, step.rows)) == sorted(str(row) for share in shares for batch in share for row in batch)
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch) <= per_micro for share in shares for batch in share)


def test_learning_rate_by_hand():
    train = Train(lr=0.8, warmup_ratio=0.4, min_lr_ratio=0.25, schedule="cosine")
    rates = [learning_rate(i, 5, train) for i in range(5)]
    # two steps of warm-up; then cos(pi/3) = 1/2, cos(2pi/3) = -1/2, cos(pi) = -1 on 0.8 * (0.25 + 0.75 * (1 + c) / 2)
    assert rates == pytest.approx([0.4, 0.8, 0.65, 0.35, 0.2])
    linear = train.model_copy(update={"schedule": "linear", "warmup_ratio": 0.0, "min_lr_ratio": 0.0})
    assert [learning_rate(i, 4, linear) for i in range(4)] == pytest.approx([0.6, 0.4, 0.2, 0.0])
    constant = train.model_copy(update={"schedule": "constant", "warmup_ratio": 0.0})
    assert [learning_rate(i, 3, constant) for i in range(3)] == pytest.approx([0.8] * 3)
