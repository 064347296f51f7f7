"""A launch killed in the middle of any stage goes on where it was, repeats little, and ends in the same result."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import (
    STAGE_FOLDERS,
    contents,
    copy_run,
    distill,
    numbers,
    run,
    run_until,
    sha256,
    small_config,
    write_config,
)

from distill.traceset import read_traces

STUDENTS = ("response", "logits")


def first_shard(folder: Path) -> bool:
    return any(folder.glob("*.parquet.json"))


# stage folder: (the stages of the launch, whether the stage is in its middle, the file that would mark it as finished)
MIDDLE = {
    "1-prompts": ("prompts", lambda run: (run / "1-prompts/stage.json").exists(), "manifest.json"),
    "2-traces": ("prompts,traces", lambda run: first_shard(run / "2-traces"), "manifest.json"),
    "4-student": ("train", lambda run: (run / "4-student/logits/checkpoints/latest").exists(), "logits/train.json"),
    "5-eval": ("eval", lambda run: any((run / "5-eval").glob("eval-response-*.json")), "manifest.json"),
    "6-publish": ("publish", lambda run: (run / "6-publish/stage.json").exists(), "manifest.json"),
}


def kill_and_go_on(stage: str, reference: Callable, scratch: Path) -> Path:
    """The run folder after one launch killed in the middle of the stage and one that was left alone."""
    run_dir = scratch / "runs"
    folder = copy_run(reference().folder, run_dir, stage)
    config = write_config(scratch / "small.yaml", small_config(run_dir))
    stages, middle, finished = MIDDLE[stage]
    killed = run_until(distill(config, "--stages", stages), scratch, lambda: middle(folder), signal.SIGKILL)
    assert killed.status == -signal.SIGKILL
    assert not (folder / stage / finished).exists(), "it was killed too late: the stage was finished"
    survivors = times(folder)
    run(distill(config, "--stages", stages), scratch).ok()
    (scratch / "survivors.json").write_text(json.dumps(survivors))
    return folder


def times(folder: Path) -> dict[str, int]:
    """Shard -> when it was put in place (ns): a shard that a later launch makes again has another time."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.parquet") if shard_is_whole(p)}


def shard_is_whole(path: Path) -> bool:
    return path.with_name(path.name + ".json").exists()


@pytest.mark.ahead(outcome=kill_and_go_on)
@pytest.mark.parametrize("case", MIDDLE)
def test_a_run_killed_in_a_stage_ends_like_one_that_was_not(case, outcome, reference):
    stage, folder, whole = case, outcome, reference.folder
    survivors = json.loads((folder.parent.parent / "survivors.json").read_text())
    assert {name: times(folder).get(name) for name in survivors} == survivors, "a finished shard was made again"
    assert not [path for path in folder.rglob("*.tmp-*")], "left-overs of the killed launch"
    upto = STAGE_FOLDERS.index("3-logits" if stage == "2-traces" else stage)
    for name in STAGE_FOLDERS[: upto + 1]:
        compare(name, folder / name, whole / name)


def compare(stage: str, ours: Path, theirs: Path) -> None:
    """Every stage's product, to the bit; manifests hold times and are compared by their content hash."""
    manifests = [path.relative_to(theirs) for path in theirs.glob("**/manifest.json")]
    for name in manifests:
        found, wanted = (json.loads((place / name).read_text()) for place in (ours, theirs))
        assert found["content_hash"] == wanted["content_hash"]
        assert found["counts"] == wanted["counts"] or stage == "6-publish"  # the card names the command
    data = {n: h for n, h in contents(theirs).items() if n.endswith((".parquet", ".cache", ".safetensors"))}
    assert data or stage == "6-publish"
    assert {name: sha256(ours / name) for name in data} == data
    if stage == "2-traces":
        for path in sorted(theirs.glob("*.parquet")):
            assert read_traces(ours / path.name) == read_traces(path)
    if stage == "4-student":
        for name in STUDENTS:
            assert curve(ours / name) == curve(theirs / name)
    if stage == "5-eval":
        assert report(ours) == report(theirs)


def curve(folder: Path) -> list:
    """The rows of the log without times, each step once."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return numbers(rows)


def report(folder: Path) -> object:
    found = numbers(json.loads((folder / "report.json").read_text()))
    found["config"].pop("tracking")  # the uninterrupted run was tracked
    return found


def test_sigterm_while_training_saves_a_checkpoint_says_so_and_the_run_goes_on(reference, tmp_path):
    run_dir = tmp_path / "runs"
    folder = copy_run(reference.folder, run_dir, "4-student")
    command = distill(write_config(tmp_path / "small.yaml", small_config(run_dir)), "--stages", "train")
    log = folder / "4-student/response/log.jsonl"
    stopped = run_until(command, tmp_path, lambda: log.exists() and log.read_text().count("\n") >= 1, signal.SIGTERM)
    assert stopped.status == 0, stopped.err
    done = len(log.read_text().splitlines())
    assert f"stopped by SIGTERM; a checkpoint of step {done} is saved, run again to go on" in stopped.out
    checkpoint = folder / "4-student/response/checkpoints" / f"step-{done:06d}"
    assert (checkpoint.parent / "latest").read_text().strip() == checkpoint.name
    assert (
        not (folder / "4-student/response/train.json").exists() and not (folder / "4-student/logits/log.jsonl").exists()
    )
    before = log.read_text().splitlines()
    run(command, tmp_path).ok()
    assert log.read_text().splitlines()[:done] == before  # not one step was repeated
    compare("4-student", folder / "4-student", reference.folder / "4-student")
