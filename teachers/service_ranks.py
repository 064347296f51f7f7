"""A service over several ranks: rank 0 takes the requests, every rank draws its share.

Rank 0 has one connection to each other rank: commands go out on it, news come back, and both sides say now and then
that they are alive. A connection that ends, or falls silent, is a rank that has died. The connections are authenticated
with a key that only the ranks of this launch know.

Ranks that hold one copy of a model together (distill.split) get the same commands and take them at the same turn:
before each turn they agree, over a process group of their own, how many of them that is.
"""

import os
import queue
import secrets
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

import torch
import torch.distributed as dist

from distill.dist import Ranks
from distill.split import Split
from teachers.engine import TeacherEngine
from teachers.service_loop import Command, EngineLoop, News, ShareEngine, Stop
from teachers.service_messages import pack, pack_command, pack_news, unpack, unpack_command, unpack_news

BEAT_S = 5.0
SILENT_S = 40.0  # a rank that says nothing for so long has died
TURN_S = 50.0  # a turn that some rank of a copy does not join within this time has lost that rank
LAST_WORDS_S = 10.0


class Link:
    """One end of a connection: messages are sent by a thread of its own, so that nobody waits for a slow reader."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, daemon=True, name="link")
        self._sender.start()

    def send(self, message: bytes) -> None:
        self._outbox.put(message)

    def receive(self) -> tuple[dict, bytes]:
        """The next message that is no sign of life; EOFError when the other side is gone, TimeoutError when silent."""
        while True:
            if not self._connection.poll(SILENT_S):
                raise TimeoutError(f"no sign of life for {SILENT_S:.0f} s")
            head, blob = unpack(self._connection.recv_bytes())
            if head["is"] != "Alive":
                return head, blob

    def send_last(self, message: bytes) -> None:
        """Sends a message and waits until it is out; the link sends no more."""
        self._outbox.put(message)
        self._outbox.put(b"")
        self._sender.join(LAST_WORDS_S)

    def _send(self) -> None:
        with suppress(OSError):  # whoever receives will notice
            while message := self._next():
                self._connection.send_bytes(message)

    def _next(self) -> bytes:
        try:
            return self._outbox.get(timeout=BEAT_S)
        except queue.Empty:
            return pack({"is": "Alive"})


# --- Rank 0 -----------------------------------------------------------------------------------------------------------


class Team:
    """Rank 0's view of the ranks. Made when all ranks have their engines, while the others are in `follow`."""

    def __init__(self, engine: TeacherEngine, ranks: Ranks, split: Split):
        self.split, self.slots = split, engine.batch_size
        self.pace = make_pace(engine, ranks, split)
        self.links, self.names = _accept(ranks) if ranks.world > 1 else ({}, {})
        self.names[0] = "rank 0"

    def engines(
        self, loop: EngineLoop, deliver: Callable[[list[News]], None], died: Callable[[str, str], None]
    ) -> list[ShareEngine]:
        """One engine a share. Its commands go to every rank of the copy; news and last words of the others come in."""
        for rank, link in self.links.items():
            args = (link, self.names[rank], deliver, died)
            threading.Thread(target=_hear, args=args, daemon=True, name=f"from rank {rank}").start()
        outlets = {rank: _outlet(link) for rank, link in self.links.items()} | {0: loop.inbox.put}
        speakers = [share * self.split.tensor_parallel for share in range(self.split.shares)]
        blocks = [next(block for block in self.split.blocks if rank in block) for rank in speakers]
        return [
            ShareEngine(self.names[rank], share, self.slots, [outlets[each] for each in block])
            for share, (rank, block) in enumerate(zip(speakers, blocks))
        ]


def _outlet(link: Link) -> Callable[[tuple[int, Command]], None]:
    return lambda told: link.send(pack_command(*told))


def _hear(link: Link, name: str, deliver: Callable, died: Callable) -> None:
    try:
        while True:
            head, blob = link.receive()
            if head["is"] == "News":
                deliver(unpack_news(head, blob))
            elif head["is"] == "Died":
                died(name, head["told"])
                return
            else:
                return  # it has stopped, as it was told
    except (EOFError, OSError):  # TimeoutError is one
        died(name, f"{traceback.format_exc()}its connection ended: it was killed, or its machine was lost")


def _accept(ranks: Ranks) -> tuple[dict[int, Link], dict[int, str]]:
    """A link to every other rank, and what to call it."""
    host, key = os.environ.get("MASTER_ADDR", "127.0.0.1"), secrets.token_bytes(32)
    links, names = {}, {}
    with Listener((host, 0), backlog=ranks.world, authkey=key) as listener:
        ranks.broadcast((listener.address, key))
        while len(links) < ranks.world - 1:
            try:
                connection = listener.accept()
            except (AuthenticationError, OSError):
                continue  # whoever it was, it was none of us
            hello, _ = unpack(connection.recv_bytes())
            links[hello["rank"]] = Link(connection)
            names[hello["rank"]] = f"rank {hello['rank']} (process {hello['pid']} on {hello['host']})"
    return links, names


# --- The other ranks --------------------------------------------------------------------------------------------------


def follow(engine: TeacherEngine, ranks: Ranks, split: Split) -> int:
    """Draws what rank 0 asks for until it says stop; the exit status. Signals are rank 0's affair."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    pace = make_pace(engine, ranks, split)
    address, key = ranks.broadcast(None)
    connection = Client(tuple(address), authkey=key)
    connection.send_bytes(pack({"is": "Hello", "rank": ranks.rank, "pid": os.getpid(), "host": socket.gethostname()}))
    link, lost = Link(connection), threading.Event()
    speaks = split.tensor_rank == 0
    loop = EngineLoop(engine, lambda news: link.send(pack_news(news)) if speaks else None, pace, split.share)
    threading.Thread(target=_obey, args=(link, loop, lost), daemon=True, name="from rank 0").start()
    try:
        loop.run()
        link.send_last(pack({"is": "Stopped"}))
    except BaseException:
        told = traceback.format_exc()
        print(f"\nerror: rank {ranks.rank} has died:\n{told}", file=sys.stderr, flush=True)
        link.send_last(pack({"is": "Died", "told": told}))
        return 1
    return 1 if lost.is_set() else 0


def _obey(link: Link, loop: EngineLoop, lost: threading.Event) -> None:
    try:
        while True:
            told = unpack_command(link.receive()[0])
            loop.inbox.put(told)
            if isinstance(told[1], Stop):
                return
    except (EOFError, OSError):
        lost.set()
        print("\nerror: rank 0 has died: its connection ended", file=sys.stderr, flush=True)
        timer = threading.Timer(LAST_WORDS_S, os._exit, (1,))
        timer.daemon = True
        timer.start()
        loop.inbox.put((loop.share, Stop()))


# --- Ranks of one copy ------------------------------------------------------------------------------------------------


class CopyPace:
    """The turns of the ranks of one copy; the first of them leads. Over gloo: a rank that is lost is an error here."""

    def __init__(self, group: dist.ProcessGroup, leads: bool, finish_turn: Callable[[], None]):
        self.leads, self._group, self.finish_turn = leads, group, finish_turn
        self._told_2 = torch.zeros(2, dtype=torch.int64)

    def agree(self, has_work: bool, received: int) -> tuple[bool, int]:
        self._told_2[0], self._told_2[1] = int(has_work), received if self.leads else 0
        dist.all_reduce(self._told_2, group=self._group)
        return bool(self._told_2[0]), int(self._told_2[1])


def make_pace(engine: TeacherEngine, ranks: Ranks, split: Split) -> CopyPace | None:
    """The pace of this rank's copy, None where each rank has a whole model; called by all ranks at the same time."""
    if split.size == 1:
        return None
    timeout = timedelta(seconds=TURN_S)
    groups = [dist.new_group(list(block), timeout=timeout, backend="gloo") for block in split.blocks]
    return CopyPace(groups[split.blocks.index(split.block)], ranks.rank == split.block[0], engine.finish_turn)
