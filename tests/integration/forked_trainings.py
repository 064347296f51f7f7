"""Trainings in forked processes: dozens of launches, of one rank or several, for the price of one import.

Run as a program it reads one request a line and answers each with one line, both JSON; `Trainings` is its client.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

LIMIT_S = 180.0
GRACE_S = 20.0  # for the ranks that are left when one of them was killed


@dataclass(frozen=True)
class Stop:
    """A signal `delay_s` after the log has grown by `steps` rows, to one rank or, with None, to all."""

    signal: int
    steps: int
    delay_s: float = 0.0
    rank: int | None = None


@dataclass(frozen=True)
class Request:
    """One launch: `ranks` processes that train the student of `world` into `out`, its export cut at `shard_bytes`.

    small_disk: a rank for which a file ends after 60,000 bytes.
    """

    world: str
    out: str
    ranks: int = 1
    train: dict = field(default_factory=dict)
    kind: str = "logits"
    shard_bytes: int | None = None
    small_disk: int | None = None
    stop: Stop | None = None


@dataclass(frozen=True)
class Ended:
    """statuses: how each rank ended, as subprocess tells it; said: what rank 0 printed; stopped: if the signal came."""

    statuses: list[int]
    said: str
    stopped: bool
    wall_s: float

    def ok(self) -> "Ended":
        assert set(self.statuses) == {0}, f"{self.statuses}\n{self.said[-4000:]}"
        return self


class Trainings:
    """The client: one server process; requests are served one after the other."""

    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, __file__]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, start_new_session=True
        )

    def __call__(self, world: Path, out: Path, **options) -> Ended:
        request = Request(str(world), str(out), **options)
        self._server.stdin.write(json.dumps(asdict(request)) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the server of trainings ended"
        return Ended(**json.loads(answer))

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(10)


def rows_of(out: Path) -> int:
    log = out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def serve(request: Request) -> Ended:
    began_s = time.monotonic()
    out = Path(request.out)
    out.mkdir(parents=True, exist_ok=True)
    before = min(rows_of(out), last_step(out))  # rows after the last checkpoint are cut off
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    pids = [fork(request, rank, port) for rank in range(request.ranks)]
    statuses: dict[int, int] = {}
    stopped = wait(pids, statuses, out, before, request.stop)
    said = (out / "said-0.txt").read_text()
    return Ended([statuses[pid] for pid in pids], said, stopped, time.monotonic() - began_s)


def last_step(out: Path) -> int:
    return max((int(path.name[5:]) for path in out.glob("checkpoints/step-*")), default=0)


def wait(pids: list[int], statuses: dict[int, int], out: Path, before: int, stop: Stop | None) -> bool:
    """Until every process has ended; sends the signal when it is time. Returns whether it was sent."""
    until_s, sent = time.monotonic() + LIMIT_S, False
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses and (found := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[pid] = os.waitstatus_to_exitcode(found[1])
        alive = [pid for pid in pids if pid not in statuses]
        if stop is not None and not sent and alive and rows_of(out) >= before + stop.steps:
            time.sleep(stop.delay_s)
            for pid in pids if stop.rank is None else [pids[stop.rank]]:
                if pid in alive:
                    os.kill(pid, stop.signal)
            sent, until_s = True, time.monotonic() + GRACE_S
        if time.monotonic() > until_s:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    return sent


def fork(request: Request, rank: int, port: str) -> int:
    if pid := os.fork():
        return pid
    status = 1
    try:
        said = os.open(Path(request.out) / f"said-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request.ranks, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
        if rank == request.small_disk:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        train(request)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def train(request: Request) -> None:
    checkpoint.SHARD_BYTES = request.shard_bytes or checkpoint.SHARD_BYTES
    ranks = init_ranks("cpu", timeout_s=60)
    run = RunFolder(Path(request.world), "run", commit="test", rank=ranks.rank)
    config = settings(Path(request.world) / "model", request.kind, **request.train)
    folder = Folder(Path(request.out))
    with Tracker(config, folder.path, is_main=ranks.is_main) as tracker:
        stages = run.stage("traces"), run.stage("logits"), folder
        train_student(config, config.students[0], *stages, ranks, tracker)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1] / "unit" / "students"))
    import deepspeed  # noqa: F401  (once here instead of in every fork)
    import torch
    from student_world import Folder, settings

    from distill.dist import init_ranks
    from distill.store import RunFolder
    from distill.tracking import Tracker
    from students import checkpoint
    from students.train import train_student

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        asked["stop"] = asked["stop"] and Stop(**asked["stop"])
        answers.write(json.dumps(asdict(serve(Request(**asked)))) + "\n")
        answers.flush()
