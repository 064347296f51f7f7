"""The generate loop fed from outside: rows of different settings join, leave and are watched, and none notices."""

import numpy as np
import pytest
import torch
from sampling_models import STOPS, VOCAB, as_table, llama, requests, slot_model
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopPLogitsWarper

from distill.errors import DataError
from distill.generate import Generator, Row
from distill.records import CaptureSpec, SampleRequest, SamplingParams
from distill.row_settings import Settings, StopTexts
from distill.sampling import StepLogits, draw

torch.set_num_threads(1)
BYTES = [bytes([97 + i % 26]) + b"\xc3\xa9" * (i % 3) for i in range(VOCAB)]
WAYS = [
    SamplingParams(0.9, 0.95, 0, 30),
    SamplingParams(0.0, 1.0, 0, 12),
    SamplingParams(1.3, 1.0, 40, 25),
    SamplingParams(1.1, 0.9, 0, 30, min_p=0.05),
]
CAPTURES = [None, CaptureSpec(16, 1e-2), CaptureSpec(3, 0.0)]


@pytest.fixture(scope="module")
def model():
    return llama()


def new_generator(model, slots: int) -> Generator:
    return Generator(slot_model(model), slots, STOPS, lambda: BYTES)


def mixed(count: int, live: bool = False) -> list[Row]:
    asked = requests(count, 1, seed=5)
    return [Row(r, WAYS[i % len(WAYS)], CAPTURES[i % len(CAPTURES)], live and i % 2 == 0) for i, r in enumerate(asked)]


def run(generator: Generator, rows: list[Row], join_every: int = 1) -> dict[str, list]:
    """What was told of each row, by its key, when the rows join a few at a time."""
    told: dict[str, list] = {row.request.key: [] for row in rows}
    left, step = list(rows), 0
    with generator.rows() as loop:
        while left or loop.active:
            if left and loop.free and step % join_every == 0:
                count = min(loop.free, 3)
                loop.admit(left[:count])
                left = left[count:]
            if loop.active:
                loop.step()
            step += 1
            for drawn in loop.news():
                told[drawn.request.key].append(drawn)
    return told


def test_rows_of_mixed_settings_draw_what_each_draws_among_its_own_kind(model):
    rows = mixed(24)
    told = run(new_generator(model, 7), rows, join_every=3)
    for kind in range(len(WAYS)):
        mine = [row for row in rows if row.params == WAYS[kind]]
        alone = as_table(new_generator(model, 64).sample([row.request for row in mine], WAYS[kind]))
        for row in mine:
            (drawn,) = told[row.request.key]
            assert (drawn.token_ids, drawn.finish_reason) == alone[row.request.key, 0]


def test_each_row_gets_the_capture_it_asked_for(model):
    rows = mixed(12)
    told = run(new_generator(model, 12), rows)
    for row in rows:
        (drawn,) = told[row.request.key]
        if row.capture is None:
            assert drawn.dists is None
            continue
        (alone,) = new_generator(model, 1).sample([row.request], row.params, row.capture)
        assert drawn.dists.sampled_T.tolist() == drawn.token_ids
        assert np.array_equal(drawn.dists.ids_S, alone.dists.ids_S)
        assert np.allclose(drawn.dists.logprobs_S, alone.dists.logprobs_S, atol=1e-4)
        assert np.diff(drawn.dists.offsets_T1).max() <= row.capture.k_max


def test_what_is_told_of_a_live_row_adds_up_to_what_is_told_of_it_at_once(model):
    rows, watched = mixed(12), mixed(12, live=True)
    whole, parts = run(new_generator(model, 5), rows), run(new_generator(model, 5), watched)
    for row in watched:
        pieces, (once,) = parts[row.request.key], whole[row.request.key]
        assert [token for piece in pieces for token in piece.token_ids] == once.token_ids
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason == once.finish_reason
        assert len(pieces) == (len(once.token_ids) - 1 if row.live and len(once.token_ids) > 1 else 1)
        if once.dists is not None:
            ids = np.concatenate([piece.dists.ids_S for piece in pieces])
            assert np.array_equal(ids, once.dists.ids_S)


def test_cancelled_rows_free_their_slots_and_leave_the_others_as_they_were(model):
    rows = mixed(9)
    expected = run(new_generator(model, 9), rows)
    with new_generator(model, 9).rows() as loop:
        owners = loop.admit(rows)
        told = {}
        for step in range(40):
            if loop.active:
                loop.step()
            told |= {drawn.owner: drawn for drawn in loop.news()}
            if step == 3:
                before = loop.active
                gone = [owner for owner in owners[::2] if owner not in told]
                loop.cancel([*gone, *told, 10**6])  # rows that have ended, or never were, do not matter
                assert loop.active == before - len(gone) and gone
        assert loop.active == 0
    assert not set(gone) & told.keys()
    for owner, row in zip(owners, rows):
        if owner not in gone:
            assert told[owner].token_ids == expected[row.request.key][0].token_ids


def test_a_stop_text_ends_a_row_with_the_token_that_completes_it(model):
    request = requests(1, 1)[0]
    plain = SamplingParams(0.9, 0.95, 0, 40)
    (whole,) = new_generator(model, 1).sample([request], plain)
    text = b"".join(BYTES[i] for i in whole.completion_ids)
    middle = text[len(text) // 2 :]
    start = next(i for i in range(len(middle)) if middle[i] < 128 and b"\xc3" in middle[i : i + 6])
    stop = middle[start : start + 6].decode(errors="ignore")  # begins inside one token, ends inside another
    params = SamplingParams(0.9, 0.95, 0, 40, stop=("never this", stop))
    (cut,) = new_generator(model, 1).sample([request], params)
    assert cut.finish_reason == "stop" and whole.completion_ids[: len(cut.completion_ids)] == cut.completion_ids
    ended = b"".join(BYTES[i] for i in cut.completion_ids)
    assert stop.encode() in ended and stop.encode() not in ended[: -len(BYTES[cut.completion_ids[-1]])]
    ((told,),) = run(new_generator(model, 1), [Row(request, params)]).values()
    assert told.stop == stop and told.token_ids == cut.completion_ids


def test_stop_texts_are_found_across_any_number_of_tokens_and_the_first_to_begin_counts():
    watch = StopTexts(("bcd", "abcd", "zz"), [b"a", b"b", b"cd", b"x", b"zzz"])
    assert [watch.add(i) for i in (3, 0, 1)] == [None] * 3
    assert watch.add(2) == "abcd"
    assert StopTexts(("z",), [b"zz"]).add(0) == "z"


def test_stop_texts_without_token_bytes_are_refused_before_anything_runs(model):
    generator = Generator(slot_model(model), 1, STOPS)
    row = Row(SampleRequest("p", 0, (20,), 1), SamplingParams(max_new_tokens=9, stop=("x",)))
    with pytest.raises(DataError, match="stop"):
        generator.check(row, "prompt")
    with pytest.raises(DataError, match="positions"):
        generator.check(Row(row.request, SamplingParams(max_new_tokens=10**6)), "prompt")


def test_settings_find_equal_rows_and_forget_those_that_no_slot_has():
    settings = Settings(4)
    for round_ in range(50):
        for slot in range(4):
            settings.set(slot, (round_, slot % 2), slot % 2)
    assert [(value, index.tolist()) for value, index in settings.groups(slice(0, 4))] == [(0, [0, 2]), (1, [1, 3])]
    assert settings.groups(slice(1, 2)) == [(1, None)]
    assert len(settings._known) < 12


@pytest.mark.parametrize(
    "params", [SamplingParams(0.7, 1.0, 0, 1, min_p=0.1), SamplingParams(1.4, 0.8, 0, 1, min_p=0.02)]
)
@pytest.mark.parametrize("vocab", [7, 1500])
def test_min_p_keeps_what_transformers_keeps(params, vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits_AV = torch.randn(64, vocab, generator=generator) * 3
    scores_AV = TemperatureLogitsWarper(params.temperature)(None, logits_AV.double())
    if params.top_p < 1:
        scores_AV = TopPLogitsWarper(params.top_p)(None, scores_AV)
    kept_AV = MinPLogitsWarper(params.min_p)(None, scores_AV).softmax(-1)
    uniform_A = torch.rand(64, dtype=torch.float64, generator=generator)
    wanted = [int(np.argmax(np.cumsum(row) > u)) for row, u in zip(kept_AV.numpy(), uniform_A.tolist())]
    assert draw(StepLogits(logits_AV), uniform_A, params).tolist() == wanted
