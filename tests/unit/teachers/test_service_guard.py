"""Who may come in and how much they may send: every route, and clients that do not speak properly."""

import json
import random
import socket
import time

import pytest
from service_world import TEACHER, TOKEN, request_bytes, serving, status_of, until

from benchmarks.hostile import CASES, send
from distill.config import load_config
from distill.errors import ConfigError
from teachers import service_guard, service_server
from teachers.service_guard import _host_name
from teachers.service_server import listen, read_token

ROUTES = [
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/v1/score"), ("GET", "/v1/models"),
    ("GET", "/v1/models/teacher"), ("GET", "/health"), ("GET", "/metrics"), ("GET", "/"), ("GET", "/docs"),
    ("GET", "/openapi.json"), ("GET", "/no/such/route"), ("PUT", "/v1/completions"), ("DELETE", "/health"),
    ("OPTIONS", "/v1/completions"), ("HEAD", "/health"), ("POST", "/v1/completions/"), ("GET", "//health"),
]  # fmt: skip
WRONG = [None, "", "Bearer", "Bearer ", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN,
         f"Bearer {TOKEN} {TOKEN}", f"Bearer {TOKEN.upper()}", "Bearer \xff\xfe"]  # fmt: skip


@pytest.fixture(scope="module")
def locked(bundled):
    with serving(bundled, TOKEN, max_body_bytes=4096) as world:
        yield world


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_route_answers_without_the_token(locked, method, path):
    body = b'{"prompt": "x"}' if method == "POST" else b""
    for given in WRONG:
        headers = {} if given is None else {"Authorization": given}
        raw = request_bytes(method, path, body, **headers).replace("\xff\xfe".encode(), b"\xff\xfe")
        answer = locked.raw(raw)
        assert status_of(answer) == 401, (given, answer[:200])
        assert b"www-authenticate: Bearer" in answer and TOKEN.encode() not in answer
        if method != "HEAD":
            error = json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            assert "TEST_SERVICE_TOKEN" in error["message"]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_with_the_token_every_route_says_what_it_is(locked, method, path):
    answer = locked.http.request(method, path, content=b'{"prompt": "x", "max_tokens": 1}' if method == "POST" else b"")
    expected = {"GET": 200, "POST": 200}.get(method, 405)
    if path in ("/", "/docs", "/openapi.json", "/no/such/route", "/v1/completions/", "//health"):
        expected = 404
    if path in ("/v1/chat/completions", "/v1/score"):
        expected = 400  # that body is for /v1/completions
    assert answer.status_code == expected, answer.text
    if expected != 200 and method != "HEAD":
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_token_is_never_printed(locked, capfd):
    locked.http.get("/v1/models")
    locked.http.get(f"/{TOKEN}")
    locked.raw(request_bytes("GET", "/health", Authorization=f"Bearer {TOKEN}x"))
    out = capfd.readouterr()
    assert TOKEN not in out.out + out.err


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_beyond_the_limit_is_refused_and_its_sender_hears_so(locked, declared):
    body = b'{"prompt": "' + b"x" * 100_000 + b'"}'
    content = body if declared else iter([body[i : i + 1000] for i in range(0, len(body), 1000)])
    answer = locked.http.post("/v1/completions", content=content)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    assert "serve.max_body_bytes" in answer.json()["error"]["message"]


def test_a_body_of_the_exact_limit_is_read(locked):
    body = json.dumps({"prompt": [5], "max_tokens": 1, "temperature": 0})
    assert locked.http.post("/v1/completions", content=body + " " * (4096 - len(body))).status_code == 200
    assert locked.http.post("/v1/completions", content=body + " " * (4097 - len(body))).status_code == 413


@pytest.fixture(scope="module")
def world(locked):
    """The same service, without its token: what is asked of it here is refused before or at the door."""
    return locked


def test_without_a_token_a_name_that_is_not_loopback_is_refused(open_door):
    for host in ("evil.example", "127.0.0.1.evil.example", "x", "localhost.evil.example:80", "[::2]:80"):
        answer = open_door.raw(request_bytes("GET", "/v1/models", Host=host))
        assert status_of(answer) == 403 and b"foreign_host" in answer
    for host in ("127.0.0.1:1", "localhost", "LOCALHOST:80", "[::1]:8000"):
        assert status_of(open_door.raw(request_bytes("GET", "/v1/models", Host=host))) == 200
    assert _host_name(b"[::1]:80") == "::1"


HOSTILE = [
    b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 100,
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes(range(256)) * 8,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 300,
]  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE, ids=lambda data: repr(data[:40]))
def test_bytes_that_are_no_http_get_a_client_error_or_nothing(world, data):
    answer = world.raw(data, half_close=True)
    assert answer == b"" or 400 <= status_of(answer) < 500, answer[:100]
    assert world.http.get("/health").status_code == 200


@pytest.fixture(scope="module")
def open_door(spare):
    with serving(spare) as world:
        yield world


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_request_gets_the_status_it_deserves(open_door, case):
    for seed in range(3):
        assert send(open_door.url, case, random.Random(seed), wait_s=20) in case.statuses
    until(lambda: open_door.desk.outstanding == 0, "all rows are free again")
    assert open_door.desk.failure is None


def test_random_bytes_and_cut_requests_leave_the_service_as_it_was(world):
    rng = random.Random(0)
    whole = request_bytes(
        "POST", "/v1/completions", b'{"prompt": [5], "max_tokens": 2}', Authorization=f"Bearer {TOKEN}"
    )
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        answer = world.raw(bytes(data[: rng.randrange(1, len(data) + 1)]), half_close=True, wait_s=5)
        assert answer == b"" or status_of(answer) in (200, 400, 401, 404, 405, 413, 501), answer[:100]
    until(lambda: world.desk.outstanding == 0, "all rows are free again")
    assert world.http.get("/health").status_code == 200


def test_a_connection_that_never_sends_a_head_is_closed(extra, monkeypatch):
    monkeypatch.setattr(service_server, "HEAD_S", 0.5)
    with serving(extra) as world:
        for begun in (b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "):
            with world.connect() as sock:
                sock.sendall(begun)
                since_s = time.monotonic()
                assert sock.recv(100) == b"" and 0.3 < time.monotonic() - since_s < 8
        with world.connect() as sock:  # also between two requests of one connection
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert _whole(sock).startswith(b"HTTP/1.1 200")
            sock.sendall(b"GET /hea")
            assert sock.recv(100) == b""


def _whole(sock: socket.socket) -> bytes:
    """An answer to its last byte."""
    found = b""
    while b"}" not in found:
        found += sock.recv(4000)
    return found


def test_a_body_that_does_not_come_is_given_up(extra, monkeypatch):
    monkeypatch.setattr(service_guard, "BODY_S", 0.5)
    with serving(extra) as world, world.connect() as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n\r\n{")
        assert sock.recv(4000).startswith(b"HTTP/1.1 408")


def test_an_address_in_use_and_a_token_that_is_none_are_named(monkeypatch):
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match=r"serve\.port") as error:
        taken.listen()
        listen("127.0.0.1", taken.getsockname()[1])
    assert "cannot listen" in str(error.value)
    for value in ("", "short", "é" * 20):
        monkeypatch.setenv("A_TOKEN", value)
        with pytest.raises(ConfigError, match="A_TOKEN"):
            read_token("A_TOKEN")
    monkeypatch.setenv("A_TOKEN", TOKEN)
    assert read_token("A_TOKEN") == TOKEN and read_token(None) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "myhost"])
def test_an_address_that_others_reach_needs_a_token_in_the_config(host):
    demo = TEACHER.parents[2] / "configs" / "demo.yaml"
    with pytest.raises(ConfigError, match=r"serve\.token_env"):
        load_config(demo, [f"serve.host='{host}'"])
    load_config(demo, [f"serve.host='{host}'", "serve.token_env=MY_TOKEN"])
    for own in ("127.0.0.1", "localhost", "::1", "127.8.9.1"):
        load_config(demo, [f"serve.host='{own}'"])


def test_loopback_of_both_families_can_be_listened_on():
    with listen("localhost", 0) as one:
        assert one.getsockname()[1] > 0
    if socket.has_ipv6:
        with listen("::1", 0) as other:
            assert service_server.address_of(other).startswith("http://[::1]:")
