"""SIGTERM outside the training: the process ends at once, with status 0 and a word; and who tells an error."""

import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.errors import DataError, StoreError
from distill.preemption import MESSAGE
from distill.run import tell

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "import os, signal, subprocess, sys, time\nfrom distill.preemption import sigterm_ends\n"


def stopped(body: str, rank: str = "0") -> tuple[int, str, float]:
    """(status, output, seconds after the signal) of a process that runs `body` and is sent SIGTERM once it says so."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + body], cwd=ROOT, stdout=subprocess.PIPE, text=True, env={"RANK": rank}
    )
    try:
        said = process.stdout.readline()
        assert said == "now\n"
        process.send_signal(signal.SIGTERM)
        since_s = time.monotonic()
        rest, _ = process.communicate(timeout=30)
        return process.returncode, rest, time.monotonic() - since_s
    finally:
        process.kill()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_it_ends_with_status_0_and_rank_0_says_so_even_in_a_library_that_does_not_return(rank):
    body = """
import hashlib
with sigterm_ends():
    print("last")
    os.write(1, b"now\\n")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)  # minutes, in which no handler runs
"""
    status, said, seconds = stopped(body, rank)
    assert (status, said) == (0, "last\n" + (MESSAGE if rank == "0" else "")) and seconds < 5


def test_whoever_takes_the_signal_has_it_and_may_give_it_back():
    body = """
with sigterm_ends():
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    print("now", flush=True)
    while not came:
        time.sleep(0.01)
    time.sleep(0.2)
    print("mine", flush=True)
    signal.signal(signal.SIGTERM, before)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
"""
    assert stopped(body)[:2] == (0, "mine\n" + MESSAGE)


def test_a_worker_that_is_told_to_end_does_not_end_its_parent_and_after_the_block_all_is_as_before():
    body = """
with sigterm_ends():
    if not (child := os.fork()):
        time.sleep(30)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    time.sleep(0.2)
    started = subprocess.Popen(["sleep", "30"])
    started.terminate()
    assert started.wait() == -signal.SIGTERM
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
print("now", flush=True)
time.sleep(30)
"""
    assert stopped(body)[:2] == (-signal.SIGTERM, "")


def test_what_one_rank_alone_found_is_told_by_it_and_what_all_have_is_told_once(monkeypatch, capsys):
    found = DataError("the shard is damaged", where="x.cache", remedy="Delete it.")
    copy = pickle.loads(pickle.dumps(found))  # what the other ranks raise when one has told them
    assert (str(copy), type(copy), copy.where) == (str(found), DataError, "x.cache") and found.own and not copy.own
    told = {}
    for rank, local in (("0", "0"), ("3", "3"), ("8", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        for error, started in ((found, True), (copy, True), (StoreError("config"), False)):
            tell(error, started=started)
        told[rank] = [line for line in capsys.readouterr().err.splitlines() if line]
    damaged = "x.cache: the shard is damaged. Delete it."
    assert told["0"] == told["8"] == [f"error: {damaged}", f"error: {damaged}", "error: config"]
    assert told["3"] == [f"error on rank 3: {damaged}"]


@pytest.mark.slow
def test_the_program_itself_ends_so_before_it_trains_and_a_later_launch_is_free_to_go_on(tmp_path):
    command = [sys.executable, "-m", "distill.run", "--config", "configs/demo.yaml", "--stages", "prompts"]
    command += ["--set", f"run.dir={tmp_path}", "--set", "tracking.wandb=disabled", "--set", "hardware.device=cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "demo" / "1-prompts" / "stage.json").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    said, wrong = process.communicate(timeout=60)
    assert process.returncode == 0 and said.endswith(MESSAGE), wrong
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=240).returncode == 0
    assert (tmp_path / "demo" / "1-prompts" / "manifest.json").exists()
