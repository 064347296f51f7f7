"""Laws of the loader: the order and content of micro-batches depend on nothing but the plan."""

import threading
import time

import pytest

from students.loader import Loader
from students.packing import Passes, TrainPlan


def plan(epochs=3, **more):
    lengths = [3, 4, 5, 6, 7, 8, 9, 10, 2, 2, 1, 5]
    keys = [f"k{i}" for i in range(len(lengths))]
    return TrainPlan(keys, lengths, [1] * len(lengths), row_tokens=10, batch_tokens=20, epochs=epochs, seed=1, **more)


def share(step):
    return step.micro_batches(0, 1, 1)


def taken(loader):
    return [(number, [batch for batch in batches], count) for number, _, count, batches in loader]


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("first", [0, 4])
def test_micro_batches_come_in_the_order_of_the_plan(workers, first):
    whole = plan()

    def collate(rows):
        time.sleep(0.002 * (sum(map(len, rows)) % 3))  # later ones are ready earlier
        return rows

    with Loader(whole, collate, share, first=first, workers=workers) as loader:
        found = taken(loader)
    assert found == [(n, share(whole[n]), len(share(whole[n]))) for n in range(first, len(whole))]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_example_is_made_exactly_once_an_epoch_and_resuming_goes_on_exactly(workers):
    whole = plan(passes=Passes([8, 4], [1.0, 0.5]))
    with Loader(whole, lambda rows: rows, share, first=0, workers=workers) as loader:
        found = taken(loader)
    for epoch in range(3):
        made = [
            i for n, batches, _ in found if whole[n].epoch == epoch for rows in batches for row in rows for i in row
        ]
        assert sorted(i for i in made if i < 8) == list(range(8)) and len([i for i in made if i >= 8]) == 2
    for first in range(len(whole)):
        with Loader(
            plan(passes=Passes([8, 4], [1.0, 0.5])), lambda rows: rows, share, first=first, workers=workers
        ) as l:
            assert taken(l) == found[first:]


def test_threads_make_micro_batches_while_the_loop_works():
    def collate(rows):
        time.sleep(0.02)
        return rows

    waits = {}
    for workers in (0, 2):
        with Loader(plan(), collate, share, first=0, workers=workers) as loader:
            waited = []
            for _, _, _, batches in loader:
                for _ in batches:
                    time.sleep(0.02)  # the device's work
                waited.append(loader.take_wait_s())
            waits[workers] = sum(waited[1:])  # the first one has nothing ahead of it
            assert loader.take_wait_s() == 0.0
    assert waits[2] < 0.5 * waits[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_where_the_micro_batch_is_taken(workers):
    made = []

    def collate(rows):
        made.append(rows)
        if len(made) == 3:
            raise ValueError("damaged")
        return rows

    before = threading.active_count()
    with pytest.raises(ValueError, match="damaged"), Loader(plan(), collate, share, first=0, workers=workers) as loader:
        taken(loader)
    assert threading.active_count() == before


def test_leaving_early_ends_the_threads():
    before = threading.active_count()
    with Loader(plan(epochs=50), lambda rows: rows, share, first=0, workers=3) as loader:
        next(iter(loader))
    assert threading.active_count() == before


# --- curriculum ------------------------------------------------------------------------------------------------------


def test_a_curriculum_goes_from_short_to_long_in_the_first_epoch_alone():
    lengths = [1 + (i * 37) % 40 for i in range(200)]
    keys = [f"k{i}" for i in range(200)]
    made = dict(row_tokens=40, batch_tokens=160, epochs=2, seed=1)
    by_length, plain = (TrainPlan(keys, lengths, lengths, **made, curriculum=c) for c in ("length", "none"))
    assert len(by_length) == len(plain) and by_length.digest != plain.digest
    steps = [by_length[i] for i in range(len(by_length))]
    longest = [max(lengths[row[0]] if len(row) == 1 else max(lengths[i] for i in row) for row in s.rows) for s in steps]
    first = [n for n, step in zip(longest, steps) if step.epoch == 0]
    assert first == sorted(first) and first[0] < first[-1]
    for epoch in (0, 1):
        assert sorted(i for s in steps if s.epoch == epoch for row in s.rows for i in row) == list(range(200))
    assert [s.rows for s in steps if s.epoch == 1] == [plain[i].rows for i in range(len(plain)) if plain[i].epoch == 1]
