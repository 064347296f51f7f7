"""Whatever is wrong is said before work starts: status 2, one message, its remedy, no traceback, nothing lost.

A case says how to break the config, the command, the environment or the run folder, and what the message must hold. The
run folder is then compared with what it was; where the remedy is a file to delete, it is followed.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from launches import ROOT, Launch, contents, copy_run, distill, environment, run, sha256, small_config, write_config

from distill import files

TINY = ROOT / "teachers" / "tiny"


@dataclass
class Scene:
    """Where a case plays: edit `config`, `env` and `arguments`, or the run folder, before the launch."""

    scratch: Path
    reference: Callable
    config: dict
    env: dict[str, str]
    arguments: list[str] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.scratch / "runs"

    @property
    def folder(self) -> Path:
        return self.run_dir / "small"

    def write(self, name: str, text: str) -> str:
        (self.scratch / name).write_text(text)
        return str(self.scratch / name)

    def jsonl(self, name: str, rows: list[tuple[str, str]]) -> dict:
        lines = [json.dumps({"problem": problem, "answer": answer}) + "\n" for problem, answer in rows]
        return {"kind": "jsonl", "path": self.write(name, "".join(lines)), "grader": "integer"}

    def sampled(self) -> None:
        """The run folder of a launch that was stopped before training."""
        copy_run(self.reference().folder, self.run_dir, "4-student")
        self.arguments = ["--stages", "train"]


def unknown_key(scene: Scene) -> None:
    scene.config["train"]["warmup_ration"] = 0.1
    scene.config["teacher"]["batch_sise"] = scene.config["teacher"].pop("batch_size")


def several_errors(scene: Scene) -> None:
    scene.config["train"] |= {"lr": -1.0, "epochs": "three", "zero_stage": 9}
    scene.config["eval"]["top_p"] = 1.5
    scene.config["students"][0]["loss"]["kind"] = "respnse"
    scene.config["traces"]["verfy"] = True


def wrong_type(scene: Scene) -> None:
    scene.config["teacher"]["batch_size"] = "many"


def contradiction(scene: Scene) -> None:
    scene.config["teacher"]["sampling"]["max_new_tokens"] = 256


def bad_override(scene: Scene) -> None:
    scene.arguments = ["--set", "train.epoch=2"]


def not_yaml(scene: Scene) -> None:
    scene.arguments = ["--config", scene.write("broken.yaml", "run: {name: x\nprompts: [")]


def missing_config(scene: Scene) -> None:
    scene.arguments = ["--config", str(scene.scratch / "nowhere.yaml")]


def missing_checkpoint(scene: Scene) -> None:
    scene.config["teacher"]["path"] = str(scene.scratch / "no-such-model")


def pickle_only(scene: Scene) -> None:
    folder = scene.scratch / "pickled"
    shutil.copytree(TINY / "student-same", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    scene.config["students"][0]["path"] = str(folder)


def cut_checkpoint(scene: Scene) -> None:
    folder = scene.scratch / "cut"
    shutil.copytree(TINY / "student-same", folder)
    os.truncate(folder / "model.safetensors", 100_000)
    scene.config["students"][1]["path"] = str(folder)


def no_gpu(scene: Scene) -> None:
    scene.config["hardware"]["device"] = "cuda"
    scene.env["CUDA_VISIBLE_DEVICES"] = ""


def wandb_without_key(scene: Scene) -> None:
    scene.config["tracking"]["wandb"] = "online"


def hub_without_token(scene: Scene) -> None:
    scene.config["publish"]["repo"] = "someone/small-r1"
    del scene.env["HF_HUB_OFFLINE"]


def third_tokenizer(scene: Scene) -> None:
    """Traces of one tokenizer, a teacher.path with another by now, a student with a third."""
    scene.sampled()
    scene.config["teacher"]["path"] = str(TINY / "student-llama")
    scene.config["students"] = [scene.config["students"][1] | {"path": str(TINY / "student-qwen")}]


def tokenizer_without_bytes(scene: Scene) -> None:
    """Of a student that learns from text alone; the evaluation would meet it behind all the work."""
    copy_run(scene.reference().folder, scene.run_dir, "2-traces")
    folder = scene.scratch / "no-bytes"
    shutil.copytree(TINY / "student-qwen", folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(state | {"decoder": {"type": "Fuse"}}))
    scene.config["students"][0]["path"] = str(folder)
    scene.arguments = ["--stages", "traces"]


def run_dir_below_a_file(scene: Scene) -> None:
    scene.config["run"]["dir"] = scene.write("file", "not a folder") + "/runs"


def another_launch(scene: Scene) -> None:
    scene.folder.mkdir(parents=True)
    assert files.take_lock(scene.folder / ".lock")  # held by this process while the launch tries


def made_by_another_config(scene: Scene) -> None:
    scene.sampled()
    scene.config["teacher"]["sampling"] |= {"temperature": 0.7, "top_p": 0.9}
    scene.arguments = []


def something_else(scene: Scene) -> None:
    (scene.folder / "1-prompts").mkdir(parents=True)
    (scene.folder / "1-prompts" / "thesis.txt").write_text("the only copy")


def empty_prompts(scene: Scene) -> None:
    scene.config["prompts"]["train"] = [scene.jsonl("empty.jsonl", [])]


def broken_prompts(scene: Scene) -> None:
    scene.config["prompts"]["train"] = [scene.jsonl("broken.jsonl", [("What is 1 + 1?", "2")])]
    with (scene.scratch / "broken.jsonl").open("a") as file:
        file.write('{"problem": "What is 2 + 2?"\n')


def overlapping(scene: Scene) -> None:
    rows = [(f"What is {i} + {i + 1}?", str(2 * i + 1)) for i in range(6)]
    scene.config["prompts"]["eval"] = [scene.jsonl("eval.jsonl", rows)]
    scene.config["prompts"]["train"] = [scene.jsonl("train.jsonl", [(f"  {q.upper()} ", a) for q, a in rows])]


def missing_prompts(scene: Scene) -> None:
    scene.config["prompts"]["eval"] = [
        {"kind": "jsonl", "path": str(scene.scratch / "gone.jsonl"), "grader": "integer"}
    ]


def nothing_survives(scene: Scene) -> None:
    copy_run(scene.reference().folder, scene.run_dir, "2-traces")
    scene.config["teacher"]["sampling"]["max_new_tokens"] = 1
    scene.arguments = ["--stages", "traces,train"]


def train_before_traces(scene: Scene) -> None:
    copy_run(scene.reference().folder, scene.run_dir, "2-traces")
    scene.arguments = ["--stages", "train"]


def cut(name: str) -> Callable[[Scene], None]:
    def break_it(scene: Scene) -> None:
        scene.sampled()
        os.truncate(scene.folder / name, (scene.folder / name).stat().st_size // 2)

    return break_it


def flipped(name: str) -> Callable[[Scene], None]:
    def break_it(scene: Scene) -> None:
        scene.sampled()
        data = bytearray((scene.folder / name).read_bytes())
        data[len(data) // 2] ^= 0x10
        (scene.folder / name).write_bytes(data)

    return break_it


def gone(name: str) -> Callable[[Scene], None]:
    def break_it(scene: Scene) -> None:
        scene.sampled()
        (scene.folder / name).unlink()

    return break_it


TRACES, LOGITS = "2-traces/traces-00001.parquet", "3-logits/traces-00001.cache"

# case: (what is broken, what the message must hold)
CASES: dict[str, tuple[Callable[[Scene], None], list[str]]] = {
    "unknown key": (
        unknown_key,
        ["2 errors", "train.warmup_ration", "mean warmup_ratio?", "teacher.batch_sise", "mean batch_size?"],
    ),
    "several errors": (
        several_errors,
        [
            "6 errors",
            "train.lr",
            "-1",
            "train.epochs",
            "three",
            "train.zero_stage",
            "eval.top_p",
            "1.5",
            "respnse",
            "verfy",
            "verify",
        ],
    ),
    "wrong type": (wrong_type, ["teacher.batch_size", "many", "small.yaml"]),
    "contradiction": (contradiction, ["teacher.sampling.max_new_tokens", "256", "train.max_seq_tokens"]),
    "bad override": (bad_override, ["--set train.epoch", "epochs"]),
    "not YAML": (not_yaml, ["broken.yaml", "line"]),
    "missing config": (missing_config, ["nowhere.yaml"]),
    "missing checkpoint": (missing_checkpoint, ["teacher.path", "no-such-model", "Hub id"]),
    "pickle only": (pickle_only, ["students.0.path", "pytorch_model.bin", "pickle", "safetensors"]),
    "cut checkpoint": (cut_checkpoint, ["students.1.path", "model.safetensors", "100000 bytes", "again"]),
    "no GPU": (no_gpu, ["hardware.device", "cuda", "hardware.device=cpu"]),
    "W&B without key": (wandb_without_key, ["tracking.wandb", "online", "WANDB_API_KEY", "offline"]),
    "Hub without token": (hub_without_token, ["publish.repo", "someone/small-r1", "HF_TOKEN"]),
    "third tokenizer": (
        third_tokenizer,
        ["teacher.path", "student-llama", "sampled with tokenizer", "--restart traces"],
    ),
    "tokenizer without bytes": (tokenizer_without_bytes, ["no-bytes", "neither byte-level", "Qwen, Llama-3"]),
    "run dir below a file": (run_dir_below_a_file, ["file/runs", "Not a directory", "run.dir"]),
    "another launch": (another_launch, ["another launch", f"pid {os.getpid()}", "run.name"]),
    "made by another config": (
        made_by_another_config,
        ["2-traces", "teacher.sampling.temperature", "0.6 there, 0.7 now", "0.95 there, 0.9 now", "--restart traces"],
    ),
    "something else in the folder": (something_else, ["1-prompts", "stage.json", "--restart prompts"]),
    "empty prompts": (empty_prompts, ["training set is empty", "prompts.train"]),
    "broken prompts": (broken_prompts, ["broken.jsonl line 2", "JSON"]),
    "missing prompts": (missing_prompts, ["gone.jsonl", "no such file"]),
    "training is the evaluation": (overlapping, ["all 6 training prompts", "evaluation set", "prompts.train"]),
    "no trace survives": (nothing_survives, ["no trace survived", "24", "'truncated': 24", "max_new_tokens"]),
    "train before traces": (train_before_traces, ["2-traces", "has not finished", "--stages traces"]),
    "cut traces": (cut(TRACES), [TRACES, "bytes", "Delete"]),
    "flipped traces": (flipped(TRACES), [TRACES, "sha256", "Delete"]),
    "cut logits": (cut(LOGITS), [LOGITS, "bytes", "Delete"]),
    "flipped logits": (flipped(LOGITS), [LOGITS, "sha256", "Delete"]),
    "lost traces": (gone(TRACES), [TRACES, "is gone", "--stages traces;"]),
    "lost logits": (gone(LOGITS), [LOGITS, "is gone", "--stages traces;"]),
}
# What a launch writes before it reads any data: its lock, its tracking folder, and what a stage was opened with.
BEFORE_DATA = (".lock", "tracking", "stage.json")
CORRECTED = ["empty prompts", "training is the evaluation"]
WORKS_FIRST = {"no trace survives"}  # the teacher must be asked before one can know


@dataclass
class Outcome:
    scene: Scene
    launch: Launch
    before: dict[str, str]
    after: dict[str, str]
    corrected: Launch | None


def play(case: str, reference: Callable, scratch: Path) -> Outcome:
    """The launch of a case; for some also a second one, with the config put right."""
    scene = Scene(scratch, reference, small_config(scratch / "runs"), environment(scratch))
    CASES[case][0](scene)
    before = contents(scratch / "runs") if scene.run_dir.is_dir() else {}
    config = write_config(scratch / "small.yaml", scene.config)
    launch = run(distill(config, *scene.arguments), scratch, scene.env)
    files.release_lock(scene.folder / ".lock")
    after = contents(scene.run_dir) if scene.run_dir.is_dir() else {}
    corrected = None
    if case in CORRECTED:
        config = write_config(scratch / "small.yaml", small_config(scratch / "runs"))
        corrected = run(distill(config, "--stages", "prompts"), scratch, scene.env)
    return Outcome(scene, launch, before, after, corrected)


@pytest.mark.ahead(outcome=play)
@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_message_and_costs_nothing(case, outcome):
    launch, wanted = outcome.launch, CASES[case][1]
    everything = launch.out + launch.err
    assert launch.status == 2, everything
    assert "Traceback" not in everything and "Warning" not in everything
    message = launch.err[launch.err.index("error: ") :]
    assert message.count("error: ") == 1
    assert [part for part in wanted if part not in message] == [], message
    assert message.rstrip().endswith((".", "?", ")")) or "\n  " in message, message
    lost = {name for name in outcome.before if name not in outcome.after}
    changed = {name for name in outcome.before if name not in lost and outcome.after[name] != outcome.before[name]}
    assert not lost and not {name for name in changed if not name.endswith((".lock", "stage.json"))}
    new = {name for name in outcome.after if name not in outcome.before}
    if case not in WORKS_FIRST:
        assert not {name for name in new if not any(part in name for part in BEFORE_DATA)}, new


def repair(case: None, reference: Callable, scratch: Path) -> tuple[Scene, dict[str, str]]:
    """A run with a damaged shard of traces and one of logits, after what the messages say; what it had before."""
    scene = Scene(scratch, reference, small_config(scratch / "runs"), environment(scratch))
    scene.sampled()
    before = contents(scene.folder)
    for name in (TRACES, LOGITS):
        os.truncate(scene.folder / name, 1000)
        (scene.folder / name).unlink()
    config = write_config(scratch / "small.yaml", scene.config)
    run(distill(config, "--stages", "traces"), scratch, scene.env).ok()
    return scene, before


@pytest.mark.ahead(outcome=repair)
def test_a_damaged_shard_is_made_again_as_it_was_when_the_remedy_is_followed(outcome):
    scene, before = outcome
    after = contents(scene.folder)
    data = [name for name in before if name.endswith((".parquet", ".cache"))]
    assert (
        TRACES in data and LOGITS in data and {name: after.get(name) for name in data} == {n: before[n] for n in data}
    )
    for stage in ("2-traces", "3-logits"):  # what later stages were made from has not changed either
        ours, theirs = (
            json.loads((run_folder / stage / "manifest.json").read_text())["content_hash"]
            for run_folder in (scene.folder, scene.reference().folder)
        )
        assert ours == theirs


@pytest.mark.ahead(outcome=play)
@pytest.mark.parametrize("case", CORRECTED)
def test_a_corrected_config_runs_in_the_same_folder_when_nothing_had_been_made(case, outcome, reference):
    assert outcome.launch.status == 2 and outcome.corrected.ok()
    for name in ("train.parquet", "eval.parquet"):
        assert sha256(outcome.scene.folder / "1-prompts" / name) == sha256(reference.folder / "1-prompts" / name)


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """`folder` as a file system of 3 MB; False where mounting one is not permitted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@dataclass
class FullDisk:
    """A launch on a full disk, what the run folder held before and after it, and what it held after a second launch
    with room; `left` are temporary files."""

    folder: Path
    launch: Launch
    before: dict[str, str]
    after: dict[str, str]
    left: list[Path]
    again: Launch
    in_the_end: dict[str, str]


def fill(case: str, reference: Callable, scratch: Path) -> FullDisk | None:
    """The stage `case` with 40 kB to write to, then again with enough; None where no small disk can be had."""
    disk = scratch / "disk"
    with small_disk(disk) as mounted:
        if not mounted:
            return None
        folder = copy_run(reference().folder, disk, {"traces": "2-traces", "train": "4-student"}[case])
        (ballast := disk / "ballast").write_bytes(bytes(free_bytes(disk) - 40_000))
        command = distill(write_config(scratch / "small.yaml", small_config(disk)), "--stages", case)
        before = contents(folder)
        launch = run(command, scratch)
        after, left = contents(folder), list(folder.rglob(".*.tmp-*"))
        ballast.unlink()
        subprocess.run(["mount", "-o", "remount,size=600m", str(disk)], check=True, capture_output=True)
        return FullDisk(folder, launch, before, after, left, run(command, scratch), contents(folder))


@pytest.mark.ahead(outcome=fill)
@pytest.mark.parametrize("case", ["traces", "train"])
def test_a_full_disk_loses_nothing_and_the_run_goes_on_when_there_is_room(case, outcome, reference):
    if outcome is None:
        pytest.skip("mounting a small file system is not permitted here")
    full = outcome.launch
    assert full.status == 2 and "Traceback" not in full.err, full.err
    message = full.err[full.err.index("error: ") :]
    assert (
        re.search("the disk is full|could not be written to its end", message)
        and "run again" in message
        and str(outcome.folder) in message
    )
    assert {name: outcome.after.get(name) for name in outcome.before} == outcome.before
    assert not outcome.left  # they would keep the disk full
    outcome.again.ok()
    whole = contents(reference.folder)
    product = ".safetensors" if case == "train" else (".parquet", ".cache")
    made = [
        name for name in whole if name.endswith(product) and name.startswith(("2", "3") if case == "traces" else "4")
    ]
    assert made and {name: outcome.in_the_end.get(name) for name in made} == {name: whole[name] for name in made}


def free_bytes(folder: Path) -> int:
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_the_plan_of_every_config_needs_no_network_and_no_machine(config, tmp_path):
    planned = run(distill(ROOT / "configs" / config, "--plan", "--json"), tmp_path)
    assert planned.status == 0, planned.err
    assert json.loads(planned.out)["fits"] is True
    assert not (tmp_path / "network.log").exists(), (tmp_path / "network.log").read_text()


def test_a_plan_that_does_not_fit_says_so_with_its_status(tmp_path):
    planned = run(distill(ROOT / "configs" / "llama70b.yaml", "--plan", "--gpus", "8", "--gpu", "h100"), tmp_path)
    assert planned.status == 2 and "Traceback" not in planned.err
    said = r"llama70b: training needs \d+ GB per GPU .* has 80\. Use train\.offload=cpu or \d+ GPUs"
    assert re.search(said, planned.out), planned.out
