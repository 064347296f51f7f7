"""Many at once, those who leave, those who are told to come back, and the ways a service ends."""

import asyncio
import http.client
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from service_world import LIMIT_S, request_bytes, serving, status_of, until

from distill.records import SampleRequest, SamplingParams
from teachers import service_desk, service_server
from teachers.service_requests import choice_seed

LONG = {"prompt": [5, 6, 7], "max_tokens": 1500, "temperature": 3.0}  # hot: no stop token for a long time


def test_requests_of_every_kind_at_once_are_each_answered_as_if_alone(bundled):
    rng = random.Random(1)
    asked = []
    for i in range(96):
        ids = [rng.randrange(10, 1600) for _ in range(rng.randrange(1, 60))]
        sampling = {"temperature": rng.choice([0, 0.6, 1.0]), "top_p": rng.choice([0.9, 1.0]), "seed": i}
        asked.append({"prompt": ids, "max_tokens": rng.choice([1, 9, 20]), **sampling})
    expected = {}
    for way in {(a["temperature"], a["top_p"], a["max_tokens"]) for a in asked}:
        mine = [i for i, a in enumerate(asked) if (a["temperature"], a["top_p"], a["max_tokens"]) == way]
        requests = [SampleRequest(str(i), 0, tuple(asked[i]["prompt"]), choice_seed(i, 0)) for i in mine]
        for sample in bundled.sample(requests, SamplingParams(way[0], way[1], 0, way[2])):
            expected[int(sample.key)] = sample.completion_ids
    with serving(bundled) as world:

        async def one(client: httpx.AsyncClient, number: int) -> list[int]:
            content = asked[number] | {"return_token_ids": True, "stream": number % 3 == 0}
            content |= {"logprobs": number % 4} if number % 2 else {}
            answer = await client.post("/v1/completions", json=content)
            assert answer.status_code == 200, answer.text
            if number % 3:
                return answer.json()["choices"][0]["token_ids"]
            events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
            return [token for each in events[:-1] for token in json.loads(each)["choices"][0]["token_ids"]]

        async def all_of_them() -> list[list[int]]:
            limits = httpx.Limits(max_connections=64)
            async with httpx.AsyncClient(base_url=world.url, timeout=LIMIT_S, trust_env=False, limits=limits) as client:
                return await asyncio.gather(*(one(client, i) for i in range(len(asked))))

        found = asyncio.run(all_of_them())
        assert world.desk.outstanding == 0
    assert found == [expected[i] for i in range(len(asked))]


def test_clients_that_leave_free_their_rows(bundled):
    with serving(bundled) as world:
        body = json.dumps(LONG | {"n": 4}).encode()
        streamed = json.dumps(LONG | {"n": 4, "stream": True}).encode()
        socks = [world.connect() for _ in range(4)]
        for sock, content in zip(socks, (body, streamed, body, streamed)):
            sock.sendall(request_bytes("POST", "/v1/completions", content))
        until(lambda: world.desk.outstanding == 16, "all rows run")
        assert socks[1].recv(100)  # the stream has begun
        other = threading.Thread(target=lambda: world.good("/v1/completions", prompt="1", max_tokens=2))
        other.start()  # it has to wait for a place
        for sock in socks:
            sock.close()
        until(lambda: world.desk.outstanding == 0, "the rows are free")
        other.join(LIMIT_S)
        assert world.desk.cancelled == 16
        assert world.process.loop._owner_of == {} and world.process.loop._job_of == {}


def test_a_client_that_leaves_before_its_row_has_a_place_leaves_the_line(bundled):
    with serving(bundled) as world:
        front, back = world.connect(), world.connect()
        front.sendall(request_bytes("POST", "/v1/completions", json.dumps(LONG | {"n": 16}).encode()))
        until(lambda: world.desk.outstanding == 16, "all places are taken")
        back.sendall(request_bytes("POST", "/v1/completions", json.dumps(LONG | {"n": 100}).encode()))
        until(lambda: world.desk.waiting == 100, "the rest waits")
        back.close()
        until(lambda: world.desk.waiting == 0, "nobody waits")
        assert world.desk.outstanding == 16
        front.close()
        until(lambda: world.desk.outstanding == 0, "all places are free")


def test_too_many_are_told_when_to_come_back_and_memory_does_not_grow(bundled):
    with serving(bundled, max_waiting=4) as world:
        front = world.connect()
        front.sendall(request_bytes("POST", "/v1/completions", json.dumps(LONG | {"n": 18}).encode()))
        until(lambda: world.desk.outstanding == 18, "two wait")
        for content in (LONG | {"n": 3}, LONG | {"n": 3, "stream": True}):
            answer = world.post("/v1/completions", **content)
            assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 60
            assert answer.json()["error"]["code"] == "too_many_waiting"
        pairs = [{"prompt_ids": [5], "completion_ids": [6] * 1500}] * 12  # more stretches than may wait
        assert world.post("/v1/score", sequences=pairs).status_code == 429
        assert world.desk.outstanding == 18
        front.close()
        until(lambda: world.desk.outstanding == 0, "the places are free")
        assert world.good("/v1/completions", prompt="1", max_tokens=1)


def test_a_request_that_alone_exceeds_the_line_is_taken_when_nobody_waits(bundled):
    with serving(bundled, max_waiting=1) as world:
        answer = world.good("/v1/completions", prompt=[5, 6], n=40, max_tokens=2, temperature=0)
        assert len(answer["choices"]) == 40


def test_retry_after_follows_the_rate_at_which_rows_end():
    desk = service_desk.Desk([type("E", (), {"slots": 2, "name": "", "send": lambda *_: None})()], 100)
    assert desk.retry_after_s() == 1
    desk._tickets = dict.fromkeys(range(62))
    desk._ended_at_s.extend([time.monotonic()] * 30)  # one a second, 60 wait
    assert desk.retry_after_s() == 30
    desk._ended_at_s.extend([time.monotonic() - 100] * 900)
    assert desk.retry_after_s() == 30


def test_told_to_stop_it_finishes_what_runs_and_takes_nothing_new(bundled):
    with serving(bundled) as world, ThreadPoolExecutor(8) as pool:
        running = [
            pool.submit(world.good, "/v1/completions", prompt=[5, 6 + i], max_tokens=150, temperature=3.0, seed=i)
            for i in range(8)
        ]
        late = world.connect()
        late.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n")  # its head is not whole yet
        until(lambda: world.desk.outstanding == 8, "they run")
        world.process.stop()
        until(lambda: world.desk.is_stopping, "it stops")
        answers = [each.result(LIMIT_S) for each in running]
        assert all(answer["usage"]["completion_tokens"] > 0 for answer in answers)
        late.close()
        until(lambda: world.status is not None, "it has ended")
        assert world.status == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{world.url}/health", trust_env=False)


@pytest.mark.parametrize("ending", ["asked", "asked by nobody"])
def test_a_connection_that_misses_the_end_does_not_keep_the_service_alive(spare, monkeypatch, ending):
    # uvicorn closes idle connections as it stops, and tells busy ones to close: one whose answer has begun misses both.
    monkeypatch.setattr(service_server._PatientProtocol, "shutdown", lambda self: None)
    monkeypatch.setattr(service_server, "LAST_WORDS_S", 1.0)
    with serving(spare, drain_s=1) as world:
        connection = http.client.HTTPConnection(*world.url.removeprefix("http://").split(":"))
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        world.process.stop()
        until(lambda: world.desk.is_stopping, "it stops")
        if ending == "asked":
            connection.request("POST", "/v1/completions", b'{"prompt": "1"}')
            answer = connection.getresponse()
            assert answer.status == 503 and answer.headers["Connection"] == "close" and answer.read()
        until(lambda: world.status is not None, "it has ended", 30)
        assert world.status == 0
        connection.close()


def test_what_does_not_finish_while_it_stops_is_told_so(bundled):
    with serving(bundled, drain_s=1) as world, ThreadPoolExecutor(1) as pool:
        running = pool.submit(world.post, "/v1/completions", **LONG | {"n": 16})
        until(lambda: world.desk.outstanding == 16, "it runs")
        since_s = time.monotonic()
        world.process.stop()
        answer = running.result(LIMIT_S)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "stopping"
        until(lambda: world.status is not None, "it has ended")
        assert world.status == 0 and 1 <= time.monotonic() - since_s < 20


def test_an_engine_that_dies_is_named_and_nobody_waits_for_it(spare, capfd, monkeypatch):
    monkeypatch.setattr(service_server.threading, "Timer", _NoTimer)  # it would end the tests' process
    with serving(spare) as world, ThreadPoolExecutor(4) as pool:
        plain = [pool.submit(world.post, "/v1/completions", **LONG) for _ in range(3)]
        streamed = pool.submit(world.post, "/v1/completions", **LONG | {"stream": True})
        until(lambda: world.desk.outstanding == 4, "they run")
        time.sleep(0.3)
        real = spare.model.base_model.layers[2].mlp
        spare.model.base_model.layers[2].mlp = None  # the next step fails as a broken kernel would
        try:
            answers = [each.result(60) for each in plain]
            last = streamed.result(60).text.strip().splitlines()[-1]
        finally:
            spare.model.base_model.layers[2].mlp = real
        for answer in answers:
            assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_died"
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "engine_died" and "rank 0" in error["message"] and "NoneType" in error["message"]
        until(lambda: world.status is not None, "it has ended")
        assert world.status == 1
    told = capfd.readouterr().err
    assert "the engine of rank 0 has died" in told and "Traceback" in told and "service_loop.py" in told


class _NoTimer:
    def __init__(self, *_):
        self.daemon = True

    def start(self):
        pass


def test_an_engine_that_is_gone_refuses_at_once(spare, capfd, monkeypatch):
    monkeypatch.setattr(service_server.threading, "Timer", _NoTimer)
    monkeypatch.setattr(
        service_server._Server, "should_exit", property(lambda _: False, lambda *_: None), raising=False
    )
    with serving(spare) as world:
        world.process.engine_died("rank 3", "it was killed")
        until(lambda: world.desk.failure is not None, "it is noticed")
        assert world.http.get("/health").status_code == 503
        answer = world.post("/v1/completions", prompt="1")
        assert answer.status_code == 500 and "rank 3" in answer.json()["error"]["message"]
        monkeypatch.undo()
        world.process.server.should_exit = True
    assert "rank 3 has died" in capfd.readouterr().err


def test_a_stalled_reader_of_a_stream_is_given_up(spare, monkeypatch):
    monkeypatch.setattr("teachers.service_work.STALLED_S", 0.5)
    with serving(spare) as world:
        sock = world.connect()
        sock.setsockopt(1, 8, 2048)  # SO_RCVBUF: little fits on its way
        sock.sendall(
            request_bytes(
                "POST", "/v1/completions", json.dumps(LONG | {"n": 16, "stream": True, "logprobs": 64}).encode()
            )
        )
        until(lambda: world.desk.outstanding == 16, "it runs")
        until(lambda: world.desk.outstanding == 0, "it is given up", 60)
        assert world.desk.cancelled > 0
        assert status_of(sock.recv(200)) == 200
        sock.close()
