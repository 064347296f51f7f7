"""The outer wall of the service: who may come in, how much they may send, and what is counted.

It stands before the routes, so no route can be forgotten: an unknown path asks for the token like any other. Nothing of
a request is logged: neither its token nor its text.
"""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable

from teachers.service_metrics import Metrics, route_of
from teachers.service_refusals import Refused, foreign_host, too_large, too_slow, unauthorised

BODY_S = 60.0  # a body must be here this soon after its head
DISCARDED_BYTES = 16 << 20  # read and thrown away of a body that is too large, so that its sender hears why
DISCARDED_UNKNOWN_BYTES = 1 << 20  # the same for a sender without the token
DISCARD_S = 5.0
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}


class Guard:
    """An ASGI application around another one.

    token: what every request must carry, None for none; then only requests whose Host header names the loopback
    interface are taken, so that a page in a browser cannot reach the service through a name of its own.
    is_ending: whether answers should be the last of their connections.
    """

    def __init__(
        self,
        app,
        metrics: Metrics,
        *,
        token: str | None,
        variable: str | None,
        max_body_bytes: int,
        is_ending: Callable[[], bool] = lambda: False,
    ):
        self.app, self.metrics, self.is_ending = app, metrics, is_ending
        self.token = None if token is None else token.encode()
        self.variable, self.max_body_bytes = variable, max_body_bytes

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        started_s, status, route = time.monotonic(), 0, route_of(scope["path"])

        async def counted(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.is_ending():
                    message = message | {"headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        try:
            await self._admit(scope, receive, counted)
        finally:
            self.metrics.requests.labels(route, status or 499).inc()
            self.metrics.request_s.labels(route).observe(time.monotonic() - started_s)

    async def _admit(self, scope, receive, send) -> None:
        headers = dict(scope["headers"])
        try:
            self._check_sender(headers)
        except Refused as refused:
            await refuse(refused, receive, send, DISCARDED_UNKNOWN_BYTES)
            return
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.max_body_bytes:
            within = declared.isdigit() and int(declared) <= DISCARDED_BYTES
            await refuse(too_large(self.max_body_bytes), receive, send, DISCARDED_BYTES if within else 0)
            return
        scope["body_limit"] = self.max_body_bytes
        await self.app(scope, receive, send)

    def _check_sender(self, headers: dict[bytes, bytes]) -> None:
        if self.token is None:
            if _host_name(headers.get(b"host", b"")) not in LOOPBACK_NAMES:
                raise foreign_host()
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # Compared whatever the scheme, so that the time says nothing about either.
        matches = hmac.compare_digest(given.strip(), self.token)
        if not (matches and scheme.lower() == b"bearer"):
            raise unauthorised(self.variable or "")


def _host_name(host: bytes) -> str:
    text = host.decode("latin-1").lower()
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]


async def refuse(refused: Refused, receive, send, discard_bytes: int = 0) -> None:
    """Sends a refusal, after reading up to discard_bytes of the body: closed over unread bytes it would not arrive."""
    try:
        async with asyncio.timeout(DISCARD_S):
            left = discard_bytes
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    break
    except TimeoutError:
        pass
    body = json.dumps(refused.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in refused.headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_body(request) -> bytes:
    """The whole body of a request; Refused when it grows beyond the limit or does not come."""
    limit, parts, size = request.scope["body_limit"], [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in _parts(request.receive):
                size += len(part)
                if size > limit:
                    raise too_large(limit)
                parts.append(part)
    except TimeoutError:
        raise too_slow(BODY_S) from None
    return b"".join(parts)


class Gone(Exception):
    """The client has left."""


async def _parts(receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def until_gone(receive) -> None:
    """Returns when the client leaves; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
