"""The process around the routes: the socket, signals, the engine's thread, and how it ends.

It ends in three ways. SIGTERM or SIGINT: no new requests, those that run get serve.drain_s to finish, exit status 0. An
engine that dies: its name and traceback are printed, all who wait are told, exit status 1. And whatever else may hang:
a timer ends the process soon after an engine has died.
"""

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from distill.config import Serve
from distill.errors import ConfigError
from distill.redact import redact_text
from teachers.engine import TeacherEngine
from teachers.service_app import build_app
from teachers.service_desk import Desk
from teachers.service_guard import Guard
from teachers.service_loop import EngineLoop, EngineThread, News, Pace, ShareEngine, Stop
from teachers.service_metrics import COUNTS, Metrics
from teachers.service_refusals import died, stopping
from teachers.service_work import Service

HEAD_S = 20.0  # a connection must send a whole request head within this time
HEAD_BYTES = 64 << 10
KEEP_ALIVE_S = 75
LAST_WORDS_S = 10.0  # answers are given this long after an engine has died, or after the time to drain
SMALLEST_TOKEN = 16


class Team(Protocol):
    """The engines of several ranks (teachers.service_ranks); without one, there is the engine of this process."""

    pace: Pace | None

    def engines(
        self, loop: EngineLoop, deliver: Callable[[list[News]], None], died: Callable[[str, str], None]
    ) -> Sequence[ShareEngine]: ...


class ServiceProcess:
    """One service: its engines, its desk, its server. `run` serves until it is told to stop."""

    def __init__(
        self,
        engine: TeacherEngine,
        limits: Serve,
        name: str,
        token: str | None = None,
        team: Team | None = None,
    ):
        self.failed = False
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self.drain_s = limits.drain_s
        self.loop = EngineLoop(engine, self._deliver, team and team.pace)
        self.thread = EngineThread(self.loop, lambda told: self.engine_died("the engine of rank 0", told))
        alone = [ShareEngine("rank 0", 0, engine.batch_size, [self.loop.inbox.put])]
        engines = team.engines(self.loop, self._deliver, self.engine_died) if team else alone
        self.desk, self.metrics = Desk(engines, limits.max_waiting), Metrics()
        self.metrics.watch("running", "Sequences in a slot.", lambda: self.desk.outstanding - self.desk.waiting)
        self.metrics.watch("waiting", "Sequences that wait for a slot.", lambda: self.desk.waiting)
        self.metrics.watch("cancelled", "Sequences freed before their end.", lambda: self.desk.cancelled)
        self.metrics.watch("slots", "Sequences that run at once.", lambda: self.desk.slots)
        for count in engine.counts:
            self.metrics.watch(count, COUNTS[count], lambda count=count: engine.counts.get(count, 0))
        self.service = Service(engine, name, limits, self.desk, self.metrics)
        app = Guard(
            build_app(self.service),
            self.metrics,
            token=token,
            variable=limits.token_env,
            max_body_bytes=limits.max_body_bytes,
            is_ending=lambda: self.desk.is_stopping or self.desk.failure is not None,
        )
        self.server = _Server(app, self.stop)

    def run(self, listener: socket.socket, ready: Callable[[], None] = lambda: None) -> int:
        """Serves on a bound socket; the exit status of the process."""
        asyncio.run(self._serve(listener, ready))
        return 1 if self.failed else 0

    async def _serve(self, listener: socket.socket, ready: Callable[[], None]) -> None:
        self._asyncio = asyncio.get_running_loop()
        self.thread.start()
        self._asyncio.call_soon(self._when_started, ready)
        try:
            await self.server.serve(sockets=[listener])
        finally:
            for engine in self.desk.engines:
                engine.send(Stop())
            await asyncio.to_thread(self.thread.join, LAST_WORDS_S)
            self.service.encoder.shutdown(wait=False)

    def _when_started(self, ready: Callable[[], None]) -> None:
        if self.server.started:
            ready()
        else:
            self._asyncio.call_later(0.01, self._when_started, ready)

    def stop(self, at_once: bool = False) -> None:
        """Takes no more requests, lets those that run finish, and ends. Safe from any thread and signal handler."""
        self._in_loop(self._stop, at_once)

    def _stop(self, at_once: bool) -> None:
        first, self.desk.is_stopping = not self.desk.is_stopping, True
        if at_once:
            self.desk.fail(stopping())
        elif first:
            self._asyncio.call_later(self.drain_s, self.desk.fail, stopping())
            self._asyncio.call_later(self.drain_s + LAST_WORDS_S, self.server.hang_up)
        self.server.should_exit = True

    def engine_died(self, name: str, told: str) -> None:
        """Ends the service because an engine has died; `told`: its traceback, or how it was noticed. Any thread."""
        self.failed = True
        print(f"\nerror: {name} has died:\n{redact_text(told).rstrip()}", file=sys.stderr, flush=True)
        timer = threading.Timer(LAST_WORDS_S, os._exit, (1,))
        timer.daemon = True
        timer.start()
        self._in_loop(self._end, name, told.strip().splitlines()[-1])

    def _end(self, name: str, why: str) -> None:
        self.desk.fail(died(name, redact_text(why)[:200]))
        self.server.should_exit = True

    def _deliver(self, news: list[News]) -> None:
        self._in_loop(self.desk.deliver, news)

    def _in_loop(self, work: Callable, *args: object) -> None:
        with suppress(AttributeError, RuntimeError):  # the loop has not begun or has ended: nobody waits
            self._asyncio.call_soon_threadsafe(work, *args)


class _Server(uvicorn.Server):
    """uvicorn with our way to stop and our patience."""

    def __init__(self, app: Guard, stop: Callable[..., None]):
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # malformed requests are the senders' affair
        super().__init__(
            uvicorn.Config(
                app,
                http=_PatientProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=4096,
                timeout_keep_alive=KEEP_ALIVE_S,
                h11_max_incomplete_event_size=HEAD_BYTES,
            )
        )
        self._stop = stop

    def hang_up(self) -> None:
        """Waits for nobody any more."""
        self.force_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop the service gracefully; a second SIGINT ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def told(number: int, _: object) -> None:
            self._stop(at_once=number == signal.SIGINT and self.should_exit)

        before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _PatientProtocol(H11Protocol):
    """A connection that is closed when it dawdles over the head of a request; uvicorn itself would wait forever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_S, self._too_late)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address; ConfigError when it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen there: {error.strerror or error}",
            where="serve.host, serve.port",
            value=f"{host}:{port}",
            remedy="Use another serve.port (0 takes any free one), or stop what holds it.",
        ) from None
    return listener


def read_token(variable: str | None) -> str | None:
    """The token in that environment variable; ConfigError when there is none or it can be guessed."""
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if len(token) < SMALLEST_TOKEN or not token.isascii():
        raise ConfigError(
            f"the environment variable {variable} must hold the token to ask for, {SMALLEST_TOKEN} characters or more",
            where="serve.token_env",
            remedy=f"export {variable}=$(python -c 'import secrets; print(secrets.token_urlsafe(32))')",
        )
    return token


def raise_file_limit() -> None:
    """As many open connections as the system allows this user."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
