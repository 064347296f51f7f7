"""Faults the run folder must survive: kills, a second launch, a full disk, a read-only disk."""

import contextlib
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill import files
from distill.errors import StoreError
from distill.store import RunFolder, StageFolder

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path):
    with RunFolder(tmp_path, "demo", commit="c0ffee") as folder:
        yield folder


def opened(run: RunFolder) -> StageFolder:
    return run.stage("traces").open({"n": 4}, {})


def put(stage: StageFolder, name: str, data: bytes):
    return stage.write_shard(name, lambda path: path.write_bytes(data), {"rows": len(data)})


def hidden(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("."))


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    folder.mkdir(exist_ok=True)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip(f"mount is not permitted: {mount.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_temporary_files_of_dead_processes_are_removed_and_of_living_ones_kept(run):
    stage = opened(run)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (stage.path / f".a.bin.tmp-{child.pid}").write_bytes(b"x")
    (stage.path / f".b.bin.tmp-{os.getppid()}").write_bytes(b"x")
    opened(run)
    assert hidden(stage.path) == [f".b.bin.tmp-{os.getppid()}"]


WORKER = """
import sys
from pathlib import Path
from distill.store import RunFolder
stage = RunFolder(Path(sys.argv[1]), "demo", commit="c").stage("traces").open({"n": 1}, {})
for i in range(int(sys.argv[2])):
    name, data = f"shard-{i:05d}.bin", bytes([i % 251]) * 60_000
    if not stage.has_shard(name):
        def write(path):
            with path.open("wb") as file:
                for start in range(0, len(data), 10_000):
                    file.write(data[start : start + 10_000]); file.flush()
        stage.write_shard(name, write, {"i": i})
        print(name, flush=True)
stage.finish({"shards": len(stage.shards())})
print("finished", flush=True)
"""


def launch(root: Path, shards: int, body: str = WORKER) -> subprocess.Popen:
    arguments = [sys.executable, "-c", body, str(root), str(shards)]
    return subprocess.Popen(arguments, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_twenty_kills_lose_nothing_that_was_finished(tmp_path):
    rng, total, reported, killed_midway = random.Random(), 4000, set(), 0
    for _ in range(20):
        process = launch(tmp_path, total)
        first = process.stdout.readline().strip()
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL and first, errors
        # A last line without its newline was cut by the kill.
        reported |= {first, *(line.strip() for line in rest.splitlines(keepends=True) if line.endswith("\n"))}
        stage = RunFolder(tmp_path, "demo", commit="c").stage("traces")
        killed_midway += bool(hidden(stage.path)) or len(list(stage.path.glob("*.bin"))) > len(stage.shards())
        assert reported <= {shard.name for shard in stage.shards()}
        for shard in stage.shards():
            data = stage.check_shard(shard.name).path.read_bytes()
            assert data == bytes([shard.info["i"] % 251]) * 60_000
        with RunFolder(tmp_path, "demo", commit="c") as run:
            assert hidden(run.stage("traces").open({"n": 1}, {}).path) == []
    assert killed_midway > 0, "no kill fell between the start and the end of a shard: the test proves nothing"
    done_before = len(stage.shards())
    process = launch(tmp_path, done_before + 3)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert len(output.splitlines()) == 3 + 1, "only the missing shards are made, then the manifest"
    assert stage.manifest["counts"] == {"shards": done_before + 3} and stage.manifest["launches"] == 41


def test_a_kill_between_a_rewritten_data_file_and_its_sidecar_never_pairs_new_bytes_with_the_old_sidecar(
    run, monkeypatch
):
    stage = opened(run)
    put(stage, "a.bin", b"old")
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(files, "write_json", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        put(stage, "a.bin", b"new")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (stage.path / "a.bin").read_bytes() == b"new" and not stage.has_shard("a.bin")


HOLDER = """
import multiprocessing, os, sys, time
from distill.store import RunFolder
run = RunFolder(sys.argv[1], "demo", commit="c")
run.lock()
def work():
    print(os.getpid(), flush=True)
    time.sleep(60)
multiprocessing.get_context("fork").Process(target=work).start()
time.sleep(60)
"""


def test_a_second_launch_is_refused_with_the_pid_until_the_first_dies_even_if_its_workers_live_on(tmp_path):
    holder = launch(tmp_path, 0, HOLDER)
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(StoreError, match=f"pid {holder.pid} on "):
            opened(RunFolder(tmp_path, "demo", commit="c"))
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # the forked worker is still there
        with RunFolder(tmp_path, "demo", commit="c") as run:
            opened(run)
    finally:
        os.kill(worker, signal.SIGKILL)
        holder.kill()
        holder.communicate()


def _try_to_open(root: Path, answers) -> None:
    try:
        opened(RunFolder(root, "demo", commit="c"))
        answers.put("opened")
    except StoreError as error:
        answers.put(str(error))


def test_the_lock_is_one_a_process_and_is_given_back_by_release(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    run = RunFolder(tmp_path, "demo", commit="c")
    opened(run)
    opened(RunFolder(tmp_path, "demo", commit="c"))  # the same process may open it again
    for expected in (f"pid {os.getpid()}", "opened"):
        process = spawn.Process(target=_try_to_open, args=(tmp_path, answers))
        process.start()
        assert expected in answers.get(timeout=30)
        process.join()
        run.release()


def test_a_full_disk_is_an_error_with_the_free_bytes_and_keeps_every_finished_shard(tmp_path):
    disk = tmp_path / "disk"
    with mounted(disk, "size=1m"):
        run = RunFolder(disk, "demo", commit="c")
        stage = opened(run)
        written = []
        with pytest.raises(StoreError) as caught:
            for number in range(100):
                put(stage, f"{number:03d}.bin", bytes(100_000))
                written.append(f"{number:03d}.bin")
        message = str(caught.value)
        free = int(re.search(r"the disk is full: (\d+) bytes are free", message).group(1))
        assert str(stage.path) in message and free < 110_000 and "every finished shard is kept" in message
        assert len(written) >= 8 and hidden(stage.path) == []
        assert [shard.name for shard in stage.shards()] == written
        for name in written:
            stage.check_shard(name)
        (stage.path / written.pop(0)).unlink()  # make room, go on
        put(opened(run), "last.bin", bytes(100_000))
        run.release()


def test_a_disk_too_full_for_the_sidecar_leaves_no_orphan(tmp_path):
    disk = tmp_path / "disk"
    with mounted(disk, "size=1m"):
        run = RunFolder(disk, "demo", commit="c")
        stage = opened(run)
        room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        with pytest.raises(StoreError, match="the disk is full"):
            put(stage, "exact.bin", bytes(room))  # the data fits to the last byte, its sidecar does not
        assert sorted(entry.name for entry in stage.path.iterdir()) == ["stage.json"]
        run.release()


@pytest.mark.parametrize("text", ["I/O error: No space left on device (os error 28)"])
def test_a_full_disk_is_recognised_from_libraries_that_raise_their_own_error(tmp_path, text):
    with pytest.raises(StoreError, match="the disk is full"), files.disk_errors(tmp_path):
        raise RuntimeError(text)


def test_a_read_only_disk_is_found_before_any_work(tmp_path):
    disk = tmp_path / "disk"
    with mounted(disk, "size=1m"):
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(StoreError, match=rf"{disk}/demo: cannot be written: Read-only.*run\.dir"):
            RunFolder(disk, "demo", commit="c").check_writable()


def test_a_path_below_a_file_is_found_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    for root, name in ((tmp_path / "file", "demo"), (tmp_path, "file")):
        with pytest.raises(StoreError, match="cannot be written"):
            RunFolder(root, name, commit="c").check_writable()


def test_a_writable_folder_passes_and_nothing_is_left_in_it(tmp_path):
    run = RunFolder(tmp_path / "new", "demo", commit="c")
    run.check_writable()
    assert list(run.path.iterdir()) == []
