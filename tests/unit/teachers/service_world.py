"""A real service on loopback over the bundled teacher, and ways to talk to it, politely and not."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch

from distill.config import Serve
from teachers.engine import TeacherEngine
from teachers.service_server import ServiceProcess, address_of, listen

torch.set_num_threads(1)
TEACHER = Path(__file__).parents[3] / "teachers" / "tiny" / "teacher"
TOKEN = "a-token-of-the-tests-0123456789"
LIMIT_S = 120.0


class World:
    """A running service: its process object, its address, and a client that knows its token."""

    def __init__(self, process: ServiceProcess, url: str, token: str | None):
        self.process, self.url, self.token = process, url, token
        self.desk, self.engine = process.desk, process.service.engine
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=LIMIT_S, trust_env=False)
        self.status: int | None = None

    def post(self, path: str, **content) -> httpx.Response:
        return self.http.post(path, json=content)

    def good(self, path: str, **content) -> dict:
        answer = self.post(path, **content)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, path: str, **content) -> list[dict]:
        """The events of a stream, which must end with [DONE]."""
        with self.http.stream("POST", path, json={**content, "stream": True}) as answer:
            assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in answer.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def raw(self, data: bytes, *, wait_s: float = 10.0, half_close: bool = False) -> bytes:
        """All that comes back on a fresh connection after these bytes."""
        with self.connect(wait_s) as sock:
            found = b""
            try:
                sock.sendall(data)
                if half_close:
                    sock.shutdown(socket.SHUT_WR)
                while part := sock.recv(65536):
                    found += part
            except OSError:
                pass  # too slow, or reset
            return found

    def connect(self, wait_s: float = 10.0) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=wait_s)


@contextmanager
def serving(engine: TeacherEngine, token: str | None = None, **limits) -> Iterator[World]:
    listener = listen("127.0.0.1", 0)
    limits = {"token_env": "TEST_SERVICE_TOKEN"} | limits if token else limits
    process = ServiceProcess(engine, Serve(**limits), "teacher", token)
    world, ready = World(process, address_of(listener), token), threading.Event()

    def run() -> None:
        world.status = process.run(listener, ready.set)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(LIMIT_S)
    try:
        yield world
    finally:
        world.http.close()
        process.stop(at_once=True)
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "the service did not end"


def until(reached: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    since_s = time.monotonic()
    while not reached():
        assert time.monotonic() - since_s < limit_s, f"never: {what}"
        time.sleep(0.01)


def request_bytes(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """A whole HTTP/1.1 request, after which the connection is closed."""
    lines = {"Host": "127.0.0.1", "Connection": "close", "Content-Length": str(len(body))}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0
