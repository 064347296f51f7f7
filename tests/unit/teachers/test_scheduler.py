"""The paged loop: who shares, who waits, who gives way, who is told; and that no sample depends on it."""

import numpy as np
import pytest
from sampling_models import STOPS, VOCAB, as_table, deepseek, generator, requests

from distill.errors import CapacityError, DataError
from distill.generate import Row
from distill.records import CaptureSpec, SampleRequest, SamplingParams
from teachers.runner import Runner
from teachers.sampler import PagedGenerator

PARAMS, SPEC = SamplingParams(0.9, 0.95, 0, 24), CaptureSpec(16, 1e-2)


@pytest.fixture(scope="module")
def model():
    return deepseek()


@pytest.fixture(scope="module")
def runner(model):
    return Runner(model)


def paged(runner, slots=8, **how) -> PagedGenerator:
    return PagedGenerator(runner, slots, STOPS, lambda: [b"%d " % i for i in range(VOCAB)], **how)


def prompt(tokens: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(20, VOCAB, tokens).tolist())


def drive(rows, waiting: list[Row], steps: int = 10_000) -> dict[int, list]:
    """Feeds rows as they fit and collects what is told, by owner."""
    told, waiting = {}, list(waiting)
    for _ in range(steps):
        if waiting and rows.wants_rows:
            now, waiting = waiting[: rows.free], waiting[rows.free :]
            rows.admit(now)
        if not rows.active:
            break
        rows.step()
        for drawn in rows.news():
            told.setdefault(drawn.owner, []).append(drawn)
    return told


def test_samples_of_one_prompt_share_its_full_pages(runner):
    generator = paged(runner, page_tokens=4)
    rows = [Row(SampleRequest("p", i, prompt(10), i), PARAMS) for i in range(5)]
    with generator.rows() as loop:
        loop.admit(rows)
        loop.step()
        pages = [running.pages for running in loop.rows]
        assert len(pages) >= 4  # one may have stopped already
        assert len({tuple(own[:2]) for own in pages}) == 1  # 10 tokens: two full pages, shared
        assert len({own[2] for own in pages}) == len(pages)  # and a third that each continues alone
        assert (generator.pool.holders[pages[0][:2]] == len(pages)).all()
    assert generator.pool.free == generator.pool.capacity


def test_shared_prompts_give_the_samples_of_prompts_computed_alone(model, runner):
    asked = [SampleRequest("p", i, prompt(tokens), i) for tokens in (8, 9, 11) for i in range(6)]
    asked = [SampleRequest(f"{len(r.prompt_ids)}", r.sample_index, r.prompt_ids, r.seed) for r in asked]
    together = as_table(paged(runner, 18, page_tokens=4).sample(asked, PARAMS))
    alone = {}
    for request in asked:
        alone |= as_table(paged(runner, 1, page_tokens=4).sample([request], PARAMS))
    assert together == alone


def test_a_row_that_gave_way_keeps_its_tokens_and_distributions(runner):
    asked = requests(8, 2)
    wanted = {(s.key, s.sample_index): s for s in paged(runner, 16).sample(asked, PARAMS, SPEC)}
    tight = paged(runner, 16, cache_tokens=120, page_tokens=4)
    found = {(s.key, s.sample_index): s for s in tight.sample(asked, PARAMS, SPEC)}
    assert tight.preempted > 3
    for cell, sample in wanted.items():
        assert found[cell].completion_ids == sample.completion_ids
        for name in ("offsets_T1", "ids_S", "sampled_T"):
            assert np.array_equal(getattr(found[cell].dists, name), getattr(sample.dists, name))
        assert np.allclose(found[cell].dists.logprobs_S, sample.dists.logprobs_S, atol=1e-4)
        assert np.allclose(found[cell].dists.tail_T, sample.dists.tail_T, atol=1e-5)


def test_reading_a_step_late_changes_no_sample(runner, monkeypatch):
    # On a GPU the host reads a step while the next one runs, so rows go on for a token after their stop token.
    asked = requests(10, 2)
    wanted = {(s.key, s.sample_index): s for s in paged(runner, 6).sample(asked, PARAMS, SPEC)}
    import teachers.sampler

    late = lambda *args, lag, real=teachers.sampler.PagedRows: real(*args, lag=2)  # noqa: E731
    monkeypatch.setattr(teachers.sampler, "PagedRows", late)
    for tokens in (None, 200):
        generator = paged(runner, 6, cache_tokens=tokens, page_tokens=4)
        found = {(s.key, s.sample_index): s for s in generator.sample(asked, PARAMS, SPEC)}
        assert as_table(found.values()) == as_table(wanted.values())
        assert all(np.array_equal(found[c].dists.ids_S, wanted[c].dists.ids_S) for c in wanted)
        assert generator.pool.free == generator.pool.capacity


def test_a_long_prompt_is_prefilled_in_chunks_between_steps(runner, monkeypatch):
    asked = [SampleRequest("long", 0, prompt(200), 1), SampleRequest("short", 0, prompt(5), 2)]
    wanted = as_table(paged(runner, 4).sample(asked, PARAMS))
    monkeypatch.setattr("teachers.scheduler.PREFILL_TOKENS", 24)
    monkeypatch.setattr("teachers.scheduler.TOKENS_BETWEEN_STEPS", 48)
    generator = paged(runner, 4, page_tokens=8)
    with generator.rows() as loop:
        loop.admit([Row(request, PARAMS) for request in asked])
        loop.step()
        assert [running.row.request.key for running in loop.rows] == ["short"]
        assert loop.prefilling[0].done == 43  # 5 + 43 tokens: the budget between two steps
    assert as_table(generator.sample(asked, PARAMS)) == wanted


def test_rows_of_different_settings_draw_what_they_draw_alone(model, runner):
    settings = [
        (SamplingParams(0.0, 1.0, 0, 9), None),
        (SamplingParams(0.7, 0.9, 0, 12), SPEC),
        (SamplingParams(1.2, 1.0, 30, 15), CaptureSpec(5, 0.1)),
        (SamplingParams(1.0, 1.0, 0, 20, min_p=0.1), SPEC),
    ]
    asked = requests(8, 1)
    rows = [Row(request, *settings[i % 4]) for i, request in enumerate(asked)]
    with paged(runner).rows() as loop:
        owners = loop.admit(rows)
        told = drive(loop, [])
    for owner, row in zip(owners, rows):
        (wanted,) = generator(model, 1).sample([row.request], row.params, row.capture)
        (drawn,) = told[owner]
        assert drawn.token_ids == wanted.completion_ids and drawn.finish_reason == wanted.finish_reason
        if row.capture:
            assert np.array_equal(drawn.dists.ids_S, wanted.dists.ids_S)
        else:
            assert drawn.dists is None


def test_stop_texts_and_live_rows(runner):
    request = requests(1, 1)[0]
    (free,) = paged(runner).sample([request], SamplingParams(0.9, 0.95, 0, 12))
    at = 4
    stop = f" {free.completion_ids[at]} "  # tokens read "17 ": the text begins inside the token before
    params = SamplingParams(0.9, 0.95, 0, 12, stop=("no such text", stop))
    with paged(runner).rows() as loop:
        (owner,) = loop.admit([Row(request, params, live=True)])
        told = drive(loop, [])[owner]
    assert [token for drawn in told for token in drawn.token_ids] == free.completion_ids[: at + 1]
    assert [drawn.finish_reason for drawn in told] == [None] * (len(told) - 1) + ["stop"] and len(told) > 2
    assert told[-1].stop == stop


def test_cancelled_rows_free_their_pages_and_leave_the_others_alone(runner):
    asked = requests(6, 2)
    wanted = as_table(paged(runner, 12).sample(asked, PARAMS))
    generator = paged(runner, 8, page_tokens=4)
    with generator.rows() as loop:
        owners = loop.admit([Row(request, PARAMS) for request in asked[:8]])
        loop.step()
        loop.cancel(owners[1:8:2])  # running, one of each prompt
        loop.admit([Row(request, PARAMS) for request in asked[8:]])
        waiting = loop.admit([])
        assert waiting == []
        told = drive(loop, [])
        assert loop.active == 0 and generator.pool.free == generator.pool.capacity
    for owner, request in zip(range(12), asked):
        if owner in owners[1:8:2]:
            assert owner not in told
        else:
            (drawn,) = told[owner]
            assert (drawn.token_ids, drawn.finish_reason) == wanted[request.key, request.sample_index]


def test_prompts_that_cancelled_rows_were_waiting_with_still_run(runner, monkeypatch):
    monkeypatch.setattr("teachers.scheduler.PREFILL_TOKENS", 16)
    monkeypatch.setattr("teachers.scheduler.TOKENS_BETWEEN_STEPS", 16)
    asked = [SampleRequest("p", i, prompt(60), i) for i in range(3)]
    wanted = as_table(paged(runner).sample(asked, PARAMS))
    generator = paged(runner, page_tokens=4)
    with generator.rows() as loop:
        owners = loop.admit([Row(request, PARAMS) for request in asked])
        loop.step()  # the prompt is half-way through its prefill
        loop.cancel(owners[:1])
        told = drive(loop, [])
        assert generator.pool.free == generator.pool.capacity
    for owner, request in zip(owners[1:], asked[1:]):
        assert told[owner][0].token_ids == wanted["p", request.sample_index][0]


def test_an_abandoned_call_gives_everything_back(runner):
    generator = paged(runner, 4, page_tokens=4)
    running = generator.sample(requests(20, 2), PARAMS)
    next(running)
    with pytest.raises(RuntimeError, match="still open"):
        next(generator.sample(requests(1, 1), PARAMS))
    running.close()
    assert generator.pool.free == generator.pool.capacity
    assert len(list(generator.sample(requests(2, 2), PARAMS))) == 4


def test_requests_are_taken_as_rows_free_up(runner):
    taken = []

    def stream():
        for request in requests(40, 1):
            taken.append(request.key)
            yield request

    running = paged(runner, 4).sample(stream(), PARAMS)
    next(running)
    assert len(taken) < 40
    running.close()


def test_what_cannot_run_is_named_before_anything_runs(runner):
    generator = paged(runner, 4, cache_tokens=64, page_tokens=8)
    with pytest.raises(CapacityError, match="64 tokens"):
        list(generator.sample([SampleRequest("p", 0, prompt(60), 0)], PARAMS))
    with pytest.raises(DataError, match="no tokens"):
        list(generator.sample([SampleRequest("p", 0, (), 0)], PARAMS))
    assert generator.pool.free == generator.pool.capacity
