"""Students learn from what the teacher makes of text that somebody else wrote, through the whole pipeline."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from launches import ROOT, Launch, contents, copy_run, distill, environment, free_port, run, small_config, write_config

from benchmarks.compare_losses import compare, read_log
from distill.logit_cache import CacheReader

pytestmark = pytest.mark.slow
STUDENTS = ("qwen", "same")


@dataclass
class Trained:
    folder: Path
    config: Path
    scratch: Path
    launch: Launch


def conversations() -> list[dict]:
    """Sums done by somebody who says it otherwise than the teacher and is wrong now and then."""
    rows = []
    for i in range(48):
        a, b = 3 + i * 7 % 90, 5 + i * 11 % 80
        said = f"<think>\n{a} and {b}, that makes {a + b + (i % 5 == 0)}, I think.</think>\nIt is {a + b}."
        rows.append([{"role": "user", "content": f"What is {a} + {b}?"}, {"role": "assistant", "content": said}])
    return [{"messages": row} for row in rows]


def train_on_texts(case: None, reference: Callable, scratch: Path) -> Trained:
    config = small_config(scratch / "runs")
    logits = config["students"][1]
    tiny = ROOT / "teachers" / "tiny"
    config["students"] = [logits | {"name": name, "path": str(tiny / f"student-{name}")} for name in STUDENTS]
    path = scratch / "people.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in conversations()))
    config["train"]["text_sets"] = [{"name": "people", "source": {"kind": "jsonl", "path": str(path)}}]
    folder = copy_run(reference().folder, scratch / "runs", "4-student")
    file = write_config(scratch / "small.yaml", config)
    launch = run(distill(file, "--stages", "traces,train"), scratch, environment(scratch)).ok()
    return Trained(folder, file, scratch, launch)


@pytest.mark.ahead(outcome=train_on_texts)
def test_the_teacher_reads_the_set_and_its_traces_stay(outcome):
    assert "2-traces: finished before" in outcome.launch.out and "3-logits/people" in outcome.launch.out
    stage = outcome.folder / "3-logits" / "people"
    manifest = json.loads((stage / "manifest.json").read_text())
    assert manifest["counts"]["texts"] == 48
    shards = sorted(stage.glob("*.cache"))
    assert sum(len(CacheReader(shard)) for shard in shards) == 48
    assert not any(CacheReader(shard).header.sampled for shard in shards)


@pytest.mark.ahead(outcome=train_on_texts)
@pytest.mark.parametrize("name", STUDENTS)
def test_every_student_learns_the_teachers_word_on_it(name, outcome):
    train = outcome.folder / "4-student" / name
    counts = json.loads((train / "train.json").read_text())
    assert counts["people_texts"] == 48 and counts["people_trained_tokens"] > 1000
    log = [json.loads(line) for line in (train / "log.jsonl").read_text().splitlines()]
    losses = [row["loss/people"] for row in log if "loss/people" in row]
    assert len(losses) > 8 and sum(losses[-4:]) < 0.7 * sum(losses[:4])
    if name == "qwen":
        assert counts["people_positions_inner"] > 0 < counts["people_positions_aligned"]


@pytest.mark.ahead(outcome=train_on_texts)
def test_a_second_launch_does_nothing_and_a_lost_shard_is_read_again_to_the_same_bytes(outcome):
    stage = outcome.folder / "3-logits" / "people"
    before = contents(outcome.folder / "4-student")
    again = run(distill(outcome.config, "--stages", "traces,train"), outcome.scratch, environment(outcome.scratch)).ok()
    assert "3-logits/people: finished before" in again.out and contents(outcome.folder / "4-student") == before
    shard = stage / "people-00001.cache"
    bytes_before = shard.read_bytes()
    shard.unlink()
    run(distill(outcome.config, "--stages", "traces"), outcome.scratch, environment(outcome.scratch)).ok()
    assert shard.read_bytes() == bytes_before


def share_rows(case: None, reference: Callable, scratch: Path) -> list[Path]:
    """One training by one rank and by two that share rows, of a student that cuts numbers digit by digit where the
    teacher takes three at a time: the folders of the student."""
    config = small_config(scratch / "runs")
    config["students"] = config["students"][1:2]
    config["train"]["epochs"] = 1
    numbers = [" ".join(str(10**9 + 7919**3 * (16 * i + j) % 10**9) for j in range(12)) for i in range(48)]
    asked = [{"role": "user", "content": "Say some numbers."}]
    rows = [[*asked, {"role": "assistant", "content": f"<think>\n{said}</think>\nDone."}] for said in numbers]
    path = scratch / "numbers.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    config["train"]["text_sets"] = [{"name": "numbers", "source": {"kind": "jsonl", "path": str(path)}}]
    alone = copy_run(reference().folder, scratch / "runs", "4-student")
    file = write_config(scratch / "alone.yaml", config)
    run(distill(file, "--stages", "traces,train"), scratch, environment(scratch)).ok()
    config["run"]["dir"] = str(scratch / "shared")
    config["hardware"]["gpus"] = config["train"]["sequence_parallel"] = 2
    shared = copy_run(alone, scratch / "shared", "4-student")
    file = write_config(scratch / "shared.yaml", config)
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), "distill/run.py"]
    run([*launcher, "--config", str(file), "--stages", "train"], scratch, environment(scratch)).ok()
    return [folder / "4-student" / config["students"][0]["name"] for folder in (shared, alone)]


@pytest.mark.ahead(outcome=share_rows)
def test_ranks_that_share_rows_have_the_losses_of_one(outcome):
    """Also where a share ends within a number, as some do here: it has one likelihood, over both ranks."""
    verdict = compare(*(read_log(folder / "log.jsonl") for folder in outcome), metrics=("loss", "grad_norm", "kl"))
    assert verdict.same and verdict.steps > 8, verdict
