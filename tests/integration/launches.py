"""The whole pipeline on a handful of prompts, as real processes: the small config, and the ways to start, watch, kill
and compare launches.
"""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
STAGE_FOLDERS = ["1-prompts", "2-traces", "3-logits", "4-student", "5-eval", "6-publish"]
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345",
}
LAUNCH_LIMIT_S = 240.0

# Loaded by every Python process of a launch: an attempt to leave the machine is written down, then refused. Writing it
# down matters, since libraries swallow the refusal.
_NO_NETWORK = """
import os, socket
def _note(what):
    with open(os.environ["DISTILL_TEST_NETWORK_LOG"], "a") as log:
        log.write(f"{what}\\n")
def _guard(real):
    def call(self, address):
        host = address[0] if self.family in (socket.AF_INET, socket.AF_INET6) else "127.0.0.1"
        if not (host.startswith("127.") or host in ("localhost", "::1")):
            _note(f"connect {address}")
            raise ConnectionRefusedError("no network in this test")
        return real(self, address)
    return call
socket.socket.connect = _guard(socket.socket.connect)
socket.socket.connect_ex = _guard(socket.socket.connect_ex)
_resolve = socket.getaddrinfo
def _getaddrinfo(host, *args, **kwargs):
    if host not in (None, "", b"", "localhost", socket.gethostname()) and not str(host).startswith(("127.", "::1")):
        _note(f"look up {host}")
        raise socket.gaierror("no network in this test")
    return _resolve(host, *args, **kwargs)
socket.getaddrinfo = _getaddrinfo
"""


@dataclass(frozen=True)
class Launch:
    """What a finished launch said, and how long it took."""

    status: int
    out: str
    err: str
    wall_s: float

    def ok(self) -> "Launch":
        assert self.status == 0, f"status {self.status}\n{self.out}\n{self.err}"
        return self


def small_config(run_dir: Path) -> dict:
    """configs/demo.yaml with few prompts, short texts and small steps; tracking off."""
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    config["run"] = {"name": "small", "dir": str(run_dir), "seed": 0}
    config["hardware"]["device"] = "cpu"
    families = ["chain_sum", "count_bits"]
    train, held_out = (config["prompts"][split][0] for split in ("train", "eval"))
    config["prompts"]["train"] = [train | {"families": families, "per_family": 12, "levels": [1]}]
    config["prompts"]["eval"] = [held_out | {"families": families, "per_family": 6, "levels": [1]}]
    config["teacher"] |= {"batch_size": 16}
    config["teacher"]["sampling"]["max_new_tokens"] = 120
    config["traces"]["shard_prompts"] = 8
    config["train"] |= {"epochs": 3, "max_seq_tokens": 256, "batch_tokens": 512, "micro_batch_tokens": 256}
    config["train"] |= {"lr": 3e-4, "checkpoint_steps": 2}
    config["eval"] |= {"k": 2, "max_new_tokens": 120, "batch_size": 48, "permutations": 400}
    config["tracking"]["wandb"] = "disabled"
    return config


def write_config(path: Path, config: dict) -> Path:
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def environment(scratch: Path, **more: str) -> dict[str, str]:
    """The variables of a launch: one thread, no account of whoever runs the tests, no network for Python processes."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "WANDB_", "HUGGING", "DISTILL_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    guard = scratch / "guard"
    guard.mkdir(exist_ok=True)
    (guard / "sitecustomize.py").write_text(_NO_NETWORK)
    paths = os.pathsep.join([str(guard), *filter(None, [kept.get("PYTHONPATH")])])
    offline = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "DISTILL_TEST_NETWORK_LOG": str(scratch / "network.log")}
    own |= {
        "HF_HOME": str(scratch / "hf"),
        "NETRC": str(scratch / "netrc"),
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": "localhost",
    }
    own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, **offline, **own, **more}


def start(command: list[str], scratch: Path, env: dict[str, str] | None = None) -> subprocess.Popen:
    """The command in the repository's root and in a process group of its own; output goes to files in `scratch`."""
    with (scratch / "out.txt").open("w") as out, (scratch / "err.txt").open("w") as err:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=err, env=env or environment(scratch), start_new_session=True
        )


def finish(process: subprocess.Popen, scratch: Path, since_s: float, limit_s: float = LAUNCH_LIMIT_S) -> Launch:
    try:
        status = process.wait(limit_s)
    finally:
        end(process)
    out, err = (scratch / "out.txt").read_text(), (scratch / "err.txt").read_text()
    return Launch(status, out, err, time.monotonic() - since_s)


def end(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    """Signals the launch's whole process group, if there is anything left of it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def distill(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "distill.run", "--config", str(config), *arguments]


def run(
    command: list[str], scratch: Path, env: dict[str, str] | None = None, limit_s: float = LAUNCH_LIMIT_S
) -> Launch:
    """The finished launch."""
    since_s = time.monotonic()
    return finish(start(command, scratch, env), scratch, since_s, limit_s)


def run_until(
    command: list[str], scratch: Path, reached: Callable[[], bool], number: int, env: dict[str, str] | None = None
) -> Launch:
    """The launch, signalled as soon as `reached()`: with SIGKILL the whole group, with another signal its leader."""
    since_s = time.monotonic()
    process = start(command, scratch, env)
    try:
        while not reached():
            assert process.poll() is None, f"ended before it was to be stopped\n{(scratch / 'err.txt').read_text()}"
            assert time.monotonic() - since_s < LAUNCH_LIMIT_S, "the state to stop at never came"
            time.sleep(0.001)
        end(process) if number == signal.SIGKILL else os.kill(process.pid, number)
        return finish(process, scratch, since_s)
    finally:
        end(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def copy_run(source: Path, run_dir: Path, upto: str) -> Path:
    """run_dir/small with the stages of `source` before the folder `upto`."""
    kept = STAGE_FOLDERS[: STAGE_FOLDERS.index(upto)]
    for name in kept:
        shutil.copytree(source / name, run_dir / "small" / name)
    return run_dir / "small"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file below the folder."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


_TIMES = {"wall_s", "device_s", "cost", "tokens_per_s", "step_s", "data_wait_s", "date", "commit", "dir"}


def numbers(report: object) -> object:
    """A report without what may differ between two launches of one config: times, dates, the folder's place."""
    if isinstance(report, dict):
        return {key: numbers(value) for key, value in report.items() if key not in _TIMES and key != "ledger"}
    return [numbers(each) for each in report] if isinstance(report, list) else report
