"""JSON over HTTP to one server, with patience: connections that are kept, retries with back-off, errors that say why.

Nothing but the standard library, no proxies and no redirects: a token goes to the host that the config names, and
nowhere else.
"""

import http.client
import json
import random
import socket
import ssl
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from distill.errors import ServiceError
from distill.redact import redact_text

RETRIED = {408, 425, 429, 500, 502, 503, 504}
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
CONNECT_S = 20.0
MEETING_S = 20.0
TELL_S = 30.0


class Closed(Exception):
    """The client was closed while a request was under way."""


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes

    def json(self, where: str) -> dict:
        try:
            found = json.loads(self.body)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ServiceError(
                "the answer is not a JSON object",
                where=where,
                value=self.body[:80],
                remedy="Check that the URL is that of an OpenAI-compatible server.",
            )
        return found


class Http:
    """Requests to one server, of any thread; connections are kept and used again.

    patience_s: how long to go on while nothing at all succeeds; a server that is busy, restarts or cannot be reached
    for a while costs time, not samples. reply_s: how long to wait for one answer.
    """

    def __init__(self, url: str, token: str | None = None, *, patience_s: float = 900.0, reply_s: float = 7200.0):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ServiceError(
                "not the address of a service",
                where="teacher.url",
                value=redact_text(url),
                remedy="Use http://HOST:PORT or https://HOST:PORT.",
            )
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self._parts, self._base = parts, parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.patience_s, self.reply_s = patience_s, reply_s
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._busy: set[http.client.HTTPConnection] = set()
        self._ended, self._is_closed = threading.Event(), False
        self._succeeded_s = self._told_s = 0.0

    def get(self, path: str) -> dict:
        """The first contact: a service that is not there is told of soon."""
        return self.ask("GET", path, None, patience_s=min(self.patience_s, MEETING_S)).json(self.url + path)

    def post(self, path: str, content: dict) -> dict:
        return self.ask("POST", path, content).json(self.url + path)

    def ask(
        self,
        method: str,
        path: str,
        content: dict | None,
        accept: str = "application/json",
        patience_s: float | None = None,
    ) -> Reply:
        """A successful answer. ServiceError when the server refuses for good, or patience ends."""
        body = None if content is None else json.dumps(content).encode()
        since_s, ended, attempt = time.monotonic(), self._ended, 0
        patience_s = self.patience_s if patience_s is None else patience_s
        while True:
            reply, wait_s, problem = self._try(method, path, body, accept, ended)
            if reply is not None and reply.status == 200:
                self._succeeded_s = time.monotonic()
                return reply
            if reply is not None and reply.status not in RETRIED:
                raise self._refused(reply, path)
            quiet_s = time.monotonic() - max(since_s, self._succeeded_s)
            if quiet_s > patience_s:
                raise ServiceError(
                    f"nothing has succeeded for {quiet_s:.0f} s; at last: {problem}",
                    where=self.url + path,
                    remedy="Check that the service is up and can be reached from here, then run again: "
                    "what is finished is kept.",
                )
            self._tell(quiet_s, patience_s, problem)
            backoff_s = max(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(attempt, 10)), wait_s)
            attempt += 1
            # Half of it at random: those who were refused together must not come back together.
            if ended.wait(backoff_s * random.uniform(0.5, 1.0)):
                raise Closed

    def abandon(self) -> None:
        """Requests under way end with Closed, at once."""
        with self._lock:
            ended, self._ended = self._ended, threading.Event()
            ended.set()
            for connection in self._busy:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """As `abandon`, and for good."""
        self._is_closed = True
        self.abandon()
        with self._lock:
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    def _tell(self, quiet_s: float, patience_s: float, problem: str) -> None:
        """A line now and then: a server that is gone must not look like one that is slow."""
        with self._lock:
            if quiet_s < TELL_S or time.monotonic() - self._told_s < TELL_S:
                return
            self._told_s = time.monotonic()
        left = f"trying for {patience_s - quiet_s:.0f} s more"
        print(f"{self.url}: nothing has succeeded for {quiet_s:.0f} s ({problem}); {left}", file=sys.stderr, flush=True)

    def _try(
        self, method: str, path: str, body: bytes | None, accept: str, ended: threading.Event
    ) -> tuple[Reply | None, float, str]:
        """(answer, seconds to wait that it asks for, what went wrong). A kept connection may have ended meanwhile: what
        fails on one is tried on a fresh one before it counts."""
        while True:
            connection = None
            kept = bool(self._idle)
            try:
                connection = self._take()
                reply, wait_s = self._once(connection, method, path, body, accept)
                return reply, wait_s, f"{reply.status}: {_message(reply)}" if reply.status != 200 else ""
            except (OSError, http.client.HTTPException) as error:
                self._give_back(connection, keep=False)
                if ended.is_set() or self._is_closed:
                    raise Closed from None
                if not kept:
                    return None, 0.0, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

    def _once(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None, accept: str
    ) -> tuple[Reply, float]:
        headers = {"Accept": accept, **self._headers}
        if body is not None:
            headers["Content-Type"] = "application/json"
        connection.request(method, self._base + path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        self._give_back(connection, keep=not answer.will_close)
        after = answer.headers.get("Retry-After", "")
        return Reply(answer.status, data), float(after) if after.isdigit() else 0.0

    def _take(self) -> http.client.HTTPConnection:
        with self._lock:
            if self._is_closed:
                raise Closed
            if self._idle:
                connection = self._idle.pop()
                self._busy.add(connection)
                return connection
        host, port = self._parts.hostname, self._parts.port
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(host, port, timeout=CONNECT_S, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=CONNECT_S)
        connection.connect()
        connection.sock.settimeout(self.reply_s)
        _notice_lost_hosts(connection.sock)
        with self._lock:
            self._busy.add(connection)
        return connection

    def _give_back(self, connection: http.client.HTTPConnection | None, keep: bool) -> None:
        if connection is None:
            return
        with self._lock:
            self._busy.discard(connection)
            if keep and not self._is_closed:
                self._idle.append(connection)
                return
        connection.close()

    def _refused(self, reply: Reply, path: str) -> ServiceError:
        remedy = "Change what the message names."
        if reply.status in (401, 403):
            remedy = "Set teacher.token_env to the variable that holds the service's token."
        elif reply.status in (404, 405) or reply.status // 100 == 3:
            remedy = "Check that teacher.url is that of a teacher service or of an OpenAI-compatible server."
        return ServiceError(
            f"the service answers {reply.status}: {_message(reply)}", where=self.url + path, remedy=remedy
        )


def _message(reply: Reply) -> str:
    """What a refusal says, in OpenAI's shape or in any other."""
    try:
        found = json.loads(reply.body)
        error = found.get("error", found)
        text = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = None
    return redact_text(str(text or reply.body[:200].decode(errors="replace") or "no message"))[:600]


def _notice_lost_hosts(sock: socket.socket) -> None:
    """An answer may take an hour, but a host that is gone is noticed within a minute."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
