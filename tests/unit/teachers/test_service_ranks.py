"""What ranks of a service say to each other, and how the loss of one is noticed."""

import threading
from multiprocessing.connection import Pipe

import numpy as np
import pytest
from service_world import until

from distill.generate import Row
from distill.records import CaptureSpec, SampleRequest, SamplingParams, TokenDists
from distill.step_log import Drawn
from teachers import service_ranks
from teachers.service_loop import Cancel, Draw, News, Score, ShareEngine, Stop
from teachers.service_messages import pack, pack_command, pack_news, unpack, unpack_command, unpack_news
from teachers.service_ranks import Link, _hear

REQUEST = SampleRequest("", 0, (5, 6, 7), 2**63 - 1)


def dists(tokens: int) -> TokenDists:
    rng = np.random.default_rng(tokens)
    return TokenDists(
        np.arange(tokens + 1, dtype=np.int64) * 3,
        rng.integers(0, 99, 3 * tokens).astype(np.int32),
        -rng.random(3 * tokens).astype(np.float32),
        rng.random(tokens).astype(np.float32),
        rng.random(tokens).astype(np.float32),
        rng.integers(0, 99, tokens).astype(np.int32),
    )


COMMANDS = [
    Draw(7, Row(REQUEST, SamplingParams(0.3, 0.9, 5, 100, 0.1, ("a", "é\n")), CaptureSpec(9, -1.0, 3), True)),
    Draw(8, Row(REQUEST, SamplingParams())),
    Cancel((1, 2, 3)),
    Score(9, (((1, 2), (3,)), ((4,), (5, 6))), CaptureSpec(4, 0.5)),
    Stop(),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: type(command).__name__)
def test_commands_arrive_as_they_were_sent(command):
    assert unpack_command(unpack(pack_command(3, command))[0]) == (3, command)


def test_news_arrive_with_their_distributions():
    sent = [
        News(1, Drawn(0, SampleRequest("", 0, (), 0), [4, 5], dists(2), None, None)),
        News(2, Drawn(0, SampleRequest("", 0, (), 0), [6], None, "stop", "\n\n")),
        News(3, scored=[dists(3), dists(1)]),
        News(4, refused="no room"),
    ]
    back = unpack_news(*unpack(pack_news(sent)))
    assert [each.job for each in back] == [1, 2, 3, 4]
    assert [each.is_last for each in back] == [False, True, True, True]
    assert (back[0].drawn.token_ids, back[1].drawn.stop, back[3].refused) == ([4, 5], "\n\n", "no room")
    for ours, theirs in zip([back[0].drawn.dists, *back[2].scored], [sent[0].drawn.dists, *sent[2].scored]):
        assert all(np.array_equal(a, b) for a, b in zip(vars(ours).values(), vars(theirs).values()))


def test_a_command_goes_to_every_rank_that_must_know_it():
    boxes: list[list] = [[], []]
    ShareEngine("rank 1", 1, 8, [boxes[0].append, boxes[1].append]).send(Stop())
    assert boxes == [[(1, Stop())]] * 2


def hearing(connection, silent_s: float, monkeypatch) -> tuple[list, list]:
    monkeypatch.setattr(service_ranks, "SILENT_S", silent_s)
    heard, last = [], []
    link = Link(connection)
    threading.Thread(
        target=_hear, args=(link, "rank 4", heard.extend, lambda *told: last.append(told)), daemon=True
    ).start()
    return heard, last


def test_a_rank_whose_connection_ends_has_died(monkeypatch):
    ours, theirs = Pipe()
    heard, last = hearing(ours, 30, monkeypatch)
    theirs.send_bytes(pack_news([News(1, scored=[dists(1)])]))
    until(lambda: heard, "news")
    theirs.close()
    until(lambda: last, "its end")
    assert last[0][0] == "rank 4" and "EOFError" in last[0][1] and "killed" in last[0][1]


def test_a_rank_that_falls_silent_has_died_and_one_that_shows_life_has_not(monkeypatch):
    monkeypatch.setattr(service_ranks, "BEAT_S", 0.05)
    ours, theirs = Pipe()
    _, last = hearing(ours, 0.6, monkeypatch)
    other = Link(theirs)  # says now and then that it is alive
    threading.Event().wait(1.2)
    assert not last
    other.send_last(pack({"is": "Alive"}))  # no more signs of life, and the connection stays open
    until(lambda: last, "its silence is noticed", 10)
    assert "no sign of life" in last[0][1]


def test_the_last_words_of_a_rank_are_passed_on(monkeypatch):
    ours, theirs = Pipe()
    _, last = hearing(ours, 30, monkeypatch)
    Link(theirs).send_last(pack({"is": "Died", "told": "Traceback: out of memory"}))
    until(lambda: last, "its last words")
    assert last == [("rank 4", "Traceback: out of memory")]
