"""Malformed and hostile requests, each kind with the statuses it may get (0: the connection ends without an answer)."""

import json
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass

GONE = frozenset({0})
REFUSED = frozenset({400})


@dataclass(frozen=True)
class Case:
    """make(rng): the bytes to send. leave: the connection is cut after them, without waiting for an answer."""

    name: str
    make: Callable[[random.Random], bytes]
    statuses: frozenset[int]
    leave: bool = False


def request(path: str, body: bytes, method: str = "POST", **headers: str) -> bytes:
    lines = {"Host": "127.0.0.1", "Connection": "close", "Content-Length": str(len(body))} | headers
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


def _json(path: str, content: object) -> Callable[[random.Random], bytes]:
    data = request(path, json.dumps(content).encode())
    return lambda rng: data


def _fixed(data: bytes) -> Callable[[random.Random], bytes]:
    return lambda rng: data


def _mutated(rng: random.Random) -> bytes:
    """A good body with a few bytes changed, so long as it is no longer JSON or no longer right."""
    return request("/v1/completions", b"{" + rng.randbytes(rng.randrange(1, 200)))


def _nested(rng: random.Random) -> bytes:
    depth = rng.randrange(1000, 50_000)
    return request("/v1/completions", b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}")


def _wrong_type(rng: random.Random) -> bytes:
    field = rng.choice(["temperature", "top_p", "n", "max_tokens", "seed", "logprobs", "stream", "capture", "stop"])
    value = rng.choice(["x", [[]], {"a": {}}, -(10**30), 10**30, 1.5, [1], "\u0000", "9" * 1000])
    if field in ("temperature", "top_p") and value == 1.5:
        value = [value]
    if field == "temperature" and isinstance(value, int):
        value = -1
    if field == "stop" and isinstance(value, str):
        value = {"a": 1}
    return request("/v1/completions", json.dumps({"prompt": "x", "max_tokens": 1, field: value}).encode())


def _garbage(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(1, 2000)) + b"\r\n\r\n"


C, CHAT, SCORE = "/v1/completions", "/v1/chat/completions", "/v1/score"
HUGE = 9 << 20  # beyond serve.max_body_bytes

CASES = [
    Case("no JSON", _mutated, REFUSED),
    Case("empty body", _fixed(request(C, b"")), REFUSED),
    Case("array", _json(C, []), REFUSED),
    Case("nested arrays", _nested, REFUSED),
    Case("wrong type", _wrong_type, REFUSED),
    Case("not UTF-8", _fixed(request(C, b'{"prompt": "\xff\xfe"}')), REFUSED),
    Case("lone surrogate", _fixed(request(C, b'{"prompt": "\\ud800"}')), REFUSED),
    Case("NaN", _fixed(request(C, b'{"prompt": "x", "temperature": NaN}')), REFUSED),
    Case("infinite", _fixed(request(C, b'{"prompt": "x", "max_tokens": 1e999}')), REFUSED),
    Case("unknown field", _json(C, {"prompt": "x", "__proto__": {}}), REFUSED),
    Case("no prompt", _json(C, {}), REFUSED),
    Case("empty prompt", _json(C, {"prompt": ""}), REFUSED),
    Case("id out of range", _json(C, {"prompt": [5, 10**12]}), REFUSED),
    Case("negative id", _json(C, {"prompt": [-1]}), REFUSED),
    Case("boolean id", _json(C, {"prompt": [True, False]}), REFUSED),
    Case("many completions", _json(C, {"prompt": "x", "n": 10**9}), REFUSED),
    Case("many prompts", _json(C, {"prompt": ["x"] * 5000}), REFUSED),
    Case("many tokens", _json(C, {"prompt": "x", "max_tokens": 10**9}), REFUSED),
    Case("long prompt", _json(C, {"prompt": [5] * 3000, "max_tokens": 1}), REFUSED),
    Case("long text", _json(C, {"prompt": "x" * 3_000_000}), REFUSED),
    Case("many log-probabilities", _json(C, {"prompt": "x", "logprobs": 1000}), REFUSED),
    Case("many stops", _json(C, {"prompt": "x", "stop": ["a"] * 1000}), REFUSED),
    Case("long stop", _json(C, {"prompt": "x", "stop": "a" * 100_000}), REFUSED),
    Case("empty stop", _json(C, {"prompt": "x", "stop": ""}), REFUSED),
    Case("huge seed", _json(C, {"prompt": "x", "seed": 2**200}), REFUSED),
    Case("other model", _json(C, {"prompt": "x", "model": "../../etc/passwd"}), frozenset({404})),
    Case("special token in a chat", _json(CHAT, {"messages": [{"role": "user", "content": "<|end|>"}]}), REFUSED),
    Case("unknown role", _json(CHAT, {"messages": [{"role": "{{7*7}}", "content": "x"}]}), REFUSED),
    Case("no messages", _json(CHAT, {"messages": []}), REFUSED),
    Case("image", _json(CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), REFUSED),
    Case("tools", _json(CHAT, {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}), REFUSED),
    Case("nothing to score", _json(SCORE, {"sequences": []}), REFUSED),
    Case("empty completion", _json(SCORE, {"sequences": [{"prompt_ids": [5], "completion_ids": []}]}), REFUSED),
    Case(
        "wide capture",
        _json(SCORE, {"sequences": [{"prompt_ids": [5], "completion_ids": [6]}], "capture": {"k_max": 10**6}}),
        REFUSED,
    ),
    Case("body too large", _fixed(request(C, b" " * HUGE)), frozenset({413})),
    Case("declared too large", _fixed(request(C, b"{}", **{"Content-Length": str(10**15)})), frozenset({413})),
    Case("length is no number", _fixed(request(C, b"", **{"Content-Length": "ten"})), REFUSED),
    Case("negative length", _fixed(request(C, b"", **{"Content-Length": "-1"})), REFUSED),
    Case("two lengths", _fixed(request(C, b"{}", **{"content-length": "7"})), REFUSED),
    Case(
        "bad chunk",
        _fixed(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"),
        frozenset({0, 400}),
    ),
    Case("garbage", _garbage, frozenset({0, 400})),
    Case("TLS hello", _fixed(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500), frozenset({0, 400})),
    Case("huge header", _fixed(request("/health", b"", "GET", **{"X-Long": "a" * 200_000})), frozenset({0, 400})),
    Case("huge path", _fixed(request("/" + "a" * 30_000, b"", "GET")), frozenset({404})),
    Case("path tricks", _fixed(request("/v1/models/../../../etc/passwd", b"", "GET")), frozenset({404})),
    Case("encoded path", _fixed(request("/%2e%2e/%00", b"", "GET")), frozenset({404})),
    Case("unknown method", _fixed(request("/health", b"", "BREW")), frozenset({405})),
    Case("wrong method", _fixed(request(C, b"", "GET")), frozenset({405})),
    Case("trace", _fixed(request("/health", b"", "TRACE")), frozenset({405})),
    Case("foreign host", _fixed(request("/v1/models", b"", "GET", Host="evil.example")), frozenset({403})),
    Case(
        "upgrade",
        _fixed(request("/health", b"", "GET", Connection="Upgrade", Upgrade="websocket")),
        frozenset({0, 200, 400, 403, 426}),
    ),
    Case("leaves in the head", _fixed(b"POST /v1/completions HTTP/1.1\r\nHost: 127"), GONE, leave=True),
    Case("leaves in the body", _fixed(request(C, b"{", **{"Content-Length": "1000"})), GONE, leave=True),
    Case(
        "leaves in the answer",
        _json(C, {"prompt": [5], "max_tokens": 1000, "temperature": 3, "stream": True}),
        GONE,
        leave=True,
    ),
    Case("leaves before the answer", _json(C, {"prompt": [5], "max_tokens": 1000, "temperature": 3}), GONE, leave=True),
]


def send(url: str, case: Case, rng: random.Random, wait_s: float = 60.0) -> int:
    """The status that comes back, 0 when the connection ends without one; 999 when nothing happens within wait_s."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait_s) as sock:
        found = b""
        try:
            sock.sendall(case.make(rng))
            if case.leave:
                return 0
            if case.name in ("garbage", "TLS hello"):
                sock.shutdown(socket.SHUT_WR)
            while b"\r\n" not in found and (part := sock.recv(65536)):
                found += part
        except TimeoutError:
            return 999
        except OSError:
            pass  # reset: what came before it counts
        return int(found.split(b" ", 2)[1]) if found.startswith(b"HTTP/1.1 ") else 0
