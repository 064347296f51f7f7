"""The service as a process of its own, as it is started: alone or by the launcher over several ranks."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from launches import ROOT, end, environment, start

READY = re.compile(r"serving (\S+) at (http://\S+) \(process (\d+)\)")
START_LIMIT_S = 300.0


class Launched:
    """A service that is up: its launcher's process, its address, rank 0's process id, and what it printed."""

    def __init__(self, process: subprocess.Popen, scratch: Path):
        self.process, self.scratch = process, scratch
        since_s = time.monotonic()
        while not (found := READY.search(self.out())):
            assert process.poll() is None, f"it ended at the start\n{self.out()}\n{self.err()}"
            assert time.monotonic() - since_s < START_LIMIT_S, "it did not start"
            time.sleep(0.05)
        self.name, self.url, self.rank0 = found[1], found[2], int(found[3])
        self.http = httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    def out(self) -> str:
        return (self.scratch / "out.txt").read_text()

    def err(self) -> str:
        return (self.scratch / "err.txt").read_text()

    def ranks(self) -> dict[int, int]:
        """Rank -> process id, of a service started by the launcher."""
        found = {}
        for each in Path("/proc").iterdir():
            with suppress(OSError):  # it ended while we looked
                if each.name.isdigit() and os.getpgid(int(each.name)) == self.process.pid:
                    words = (each / "cmdline").read_bytes().decode().split("\0")
                    rank = [word.partition("=")[2] for word in words if word.startswith("--local_rank=")]
                    if rank and any(word.endswith("teachers/serve.py") for word in words):
                        found[int(rank[0])] = int(each.name)
        return found


@contextmanager
def launched(config: Path, scratch: Path, *settings: str, ranks: int = 1, port: int = 0) -> Iterator[Launched]:
    arguments = ["--config", str(config)]
    for setting in (f"serve.port={port}", *settings):
        arguments += ["--set", setting]
    if ranks == 1:
        command = [sys.executable, "-m", "teachers.serve", *arguments]
    else:
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
        command = [
            *launcher,
            "--master_port",
            str(29600 + os.getpid() % 300),
            str(ROOT / "teachers/serve.py"),
            *arguments,
        ]
    scratch.mkdir(exist_ok=True)
    process = start(command, scratch, environment(scratch))
    try:
        yield Launched(process, scratch)
    finally:
        end(process, signal.SIGKILL)
        process.wait(30)
