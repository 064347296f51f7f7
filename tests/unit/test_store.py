"""Laws of the run folder: nothing finished is lost, nothing damaged is read, nothing of another config is mixed in."""

import errno
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.errors import StoreError
from distill.records import SCHEMA_VERSION
from distill.store import STAGES, RunFolder, StageFolder

REPO = Path(__file__).resolve().parents[2]
SPEC = {"teacher": {"sampling": {"n": 4, "top_p": 0.95}}, "families": ["gcd", "lcm"]}
INPUTS = {"prompts": "aa11"}


@pytest.fixture
def run(tmp_path):
    with RunFolder(tmp_path, "demo", commit="c0ffee") as folder:
        yield folder


def opened(run: RunFolder, name: str = "traces") -> StageFolder:
    return run.stage(name).open(SPEC, INPUTS)


def put(stage: StageFolder, name: str, data: bytes, **costs):
    return stage.write_shard(name, lambda path: path.write_bytes(data), {"rows": len(data)}, **costs)


def hidden(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("."))


def test_a_shard_comes_back_as_written_with_its_sha256_size_and_info(run):
    stage = opened(run)
    put(stage, "b.bin", b"abc")
    put(stage, "a.bin", b"")
    assert [shard.name for shard in stage.shards()] == ["a.bin", "b.bin"]
    shard = stage.check_shard("b.bin")
    assert shard.path.read_bytes() == b"abc" and shard.bytes == 3 and shard.info == {"rows": 3}
    # FIPS 180-2, appendix B.1: SHA-256("abc")
    assert shard.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert stage.path == run.path / "2-traces" and hidden(stage.path) == []


def test_stages_are_numbered_in_the_order_in_which_data_flows():
    assert list(STAGES.values()) == ["1-prompts", "2-traces", "3-logits", "4-student", "5-eval", "6-publish"]


def test_a_stage_is_done_only_with_its_manifest_and_every_listed_shard(run):
    stage = opened(run)
    put(stage, "a.bin", b"abc")
    assert not stage.done
    stage.finish({"traces": 1})
    assert stage.done and opened(run).done
    (stage.path / "a.bin").unlink()  # what the remedy of a damaged shard asks for
    again = opened(run)
    assert not again.done and not again.has_shard("a.bin")
    put(again, "a.bin", b"abc")
    assert again.done


def test_a_data_file_without_sidecar_counts_as_missing_and_is_rewritten(run):
    stage = opened(run)
    put(stage, "a.bin", b"old")
    (stage.path / "a.bin.json").unlink()
    assert not stage.has_shard("a.bin") and stage.shards() == []
    with pytest.raises(StoreError, match="not there or not finished"):
        stage.check_shard("a.bin")
    put(stage, "a.bin", b"new!")
    assert stage.check_shard("a.bin").path.read_bytes() == b"new!"


def test_every_flipped_bit_of_every_shard_is_detected(run):
    stage = opened(run)
    for name in ("a.bin", "b.bin"):
        put(stage, name, random.Random(name).randbytes(40))
    for shard in stage.shards():
        good = shard.path.read_bytes()
        for bit in range(len(good) * 8):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            shard.path.write_bytes(bad)
            with pytest.raises(StoreError) as caught:
                stage.check_shard(shard.name)
            message = str(caught.value)
            assert str(shard.path) in message and shard.sha256 in message and hashlib.sha256(bad).hexdigest() in message
            assert f"Delete {shard.path} and run again: only this shard is made again." in message
        shard.path.write_bytes(good)
        stage.check_shard(shard.name)


@pytest.mark.parametrize("size", [0, 1, 39, 41])
def test_a_shard_of_another_size_is_detected_and_both_sizes_named(run, size):
    stage = opened(run)
    shard = put(stage, "a.bin", bytes(40))
    os.truncate(shard.path, size)
    with pytest.raises(StoreError, match=f"40 bytes were written, {size} are there"):
        stage.check_shard("a.bin")


@pytest.mark.parametrize("text", ["", "{", '{"sha256": "x"}', "[]"])
def test_a_damaged_sidecar_is_an_error_that_names_it(run, text):
    stage = opened(run)
    put(stage, "a.bin", b"abc")
    sidecar = stage.path / "a.bin.json"
    sidecar.write_text(text)
    for read in (stage.shards, lambda: stage.check_shard("a.bin")):
        with pytest.raises(StoreError, match=re.escape(str(sidecar))):
            read()


def test_a_writer_that_fails_leaves_the_old_shard_and_no_temporary_file(run):
    stage = opened(run)
    put(stage, "a.bin", b"old")

    def half(path: Path) -> None:
        path.write_bytes(b"half")
        raise ConnectionResetError(errno.ECONNRESET, "the teacher is gone")

    with pytest.raises(ConnectionResetError):  # not the disk's fault: passes through as it is
        stage.write_shard("a.bin", half, {})
    assert stage.check_shard("a.bin").path.read_bytes() == b"old" and hidden(stage.path) == []


def test_a_writer_that_writes_elsewhere_is_refused(run):
    stage = opened(run)
    with pytest.raises(StoreError, match="made no file"):
        stage.write_shard("a.bin", lambda path: None)
    assert not stage.has_shard("a.bin")


def test_names_that_leave_the_folder_or_belong_to_the_store_are_refused(run):
    stage = opened(run)
    for name in ("", "../a.bin", "sub/a.bin", ".a.bin", "stage.json"):
        with pytest.raises(StoreError):
            put(stage, name, b"x")
    put(stage, "a.bin", b"abc")
    for name in ("stage.json", "manifest.json", "a.bin.json", "report.txt"):
        with pytest.raises(StoreError):
            stage.write_json(name, {})
    for name in ("", "..", "a/b"):
        with pytest.raises(StoreError, match=r"run\.name"):
            RunFolder(run.path, name, commit="c")


def test_writing_before_open_is_refused(run):
    with pytest.raises(StoreError, match="before it was opened"):
        put(run.stage("traces"), "a.bin", b"x")
    with pytest.raises(StoreError, match="before it was opened"):
        run.stage("traces").finish({})


def test_a_folder_of_another_config_names_each_differing_key_both_values_and_the_remedy(run):
    put(opened(run), "a.bin", b"x")
    other = {"teacher": {"sampling": {"n": 8, "top_p": 0.95}, "dtype": "bfloat16"}, "families": ["gcd"]}
    with pytest.raises(StoreError) as caught:
        run.stage("traces").open(other, {"prompts": "bb22"})
    message = str(caught.value)
    assert "teacher.sampling.n is 4 there, 8 now" in message
    assert 'teacher.dtype is absent there, "bfloat16" now' in message
    assert 'families is ["gcd", "lcm"] there, ["gcd"] now' in message
    assert 'inputs.prompts is "aa11" there, "bb22" now' in message
    assert "top_p" not in message and "schema" not in message
    assert "--restart traces" in message and "logits, train, eval, publish" in message and "run.name" in message


def test_another_config_of_one_student_need_not_cost_the_others(run):
    put(run.stage("train", "small").open({"alpha": 0.5}, {}), "a.bin", b"x")
    with pytest.raises(StoreError, match=r"Delete .*4-student/small and pass --restart eval: .* alone") as caught:
        run.stage("train", "small").open({"alpha": 0.9}, {})
    assert "--restart train: it deletes every student, eval and publish" in str(caught.value)


def test_texts_of_which_the_file_changed_cost_no_trace(run):
    put(run.stage("logits", "people").open({}, {"people.jsonl": "aa"}), "people-00000.cache", b"x")
    with pytest.raises(StoreError, match=r"people\.jsonl is .*Delete .*3-logits/people and run again") as caught:
        run.stage("logits", "people").open({}, {"people.jsonl": "bb"})
    assert "--restart" not in str(caught.value)


def test_lists_of_sections_differ_by_index(run):
    put(run.stage("prompts").open({"train": [{"seed": 1}, {"seed": 2}]}, {}), "a.bin", b"x")
    with pytest.raises(StoreError, match=r"train\[1\]\.seed is 2 there, 3 now"):
        run.stage("prompts").open({"train": [{"seed": 1}, {"seed": 3}]}, {})


def test_the_same_config_in_other_python_types_is_the_same_stage(run):
    run.stage("eval").open({"dir": Path("x/y"), "betas": (0.9, 0.95), "b": 1, "a": 2}, {}).finish({})
    assert run.stage("eval").open({"a": 2, "b": 1, "betas": [0.9, 0.95], "dir": "x/y"}, {}).done


def test_each_part_of_a_stage_has_its_own_state_and_is_deleted_with_the_stage(run):
    small, large = (run.stage("train", name).open({"lr": lr}, INPUTS) for name, lr in (("small", 1), ("large", 2)))
    small.finish({"steps": 3}, fingerprints={"model": "m"})
    assert small.done and not large.done and small.title == "4-student/small" == small.manifest["stage"]
    assert small.path == run.path / "4-student/small"
    put(large, "a.bin", b"x")
    with pytest.raises(StoreError, match="lr is 2 there, 1 now"):
        run.stage("train", "large").open({"lr": 1}, INPUTS)
    with pytest.raises(StoreError, match="is not a folder name"):
        run.stage("train", "../small")
    assert run.restart("train") == ["train"] and not small.path.exists()


def test_a_stage_in_which_nothing_was_made_takes_a_corrected_config(run):
    opened(run)
    corrected = run.stage("traces").open({"n": 2}, INPUTS)
    assert corrected.hash == run.stage("traces").open({"n": 2}, INPUTS).hash
    put(corrected, "a.bin", b"x")
    with pytest.raises(StoreError, match="n is 2 there, 3 now"):
        run.stage("traces").open({"n": 3}, INPUTS)


def test_a_finished_stage_that_lost_a_shard_is_no_input_and_names_the_command_that_makes_it(run):
    for name in ("traces", "logits"):
        stage = opened(run, name)
        put(stage, "a.bin", b"x")
        put(stage, "b.bin", b"x")
        stage.finish({})
        (stage.path / "b.bin").unlink()
        with pytest.raises(StoreError, match=r"b\.bin: the shard is gone \(1 of 2 are\).*--stages traces;"):
            _ = run.stage(name).manifest_hash


def test_overwrite_deletes_this_stage_and_later_ones_only(run):
    for name in ("prompts", "traces", "logits"):
        put(opened(run, name), "a.bin", b"abc")
    overwriting = RunFolder(run.path.parent, "demo", commit="c0ffee", overwrite=True)
    stage = overwriting.stage("traces").open({"new": 1}, INPUTS)
    assert stage.shards() == [] and not (run.path / "3-logits").exists()
    assert run.stage("prompts").has_shard("a.bin")


def test_restart_deletes_the_stage_and_all_later_ones_and_no_earlier_one(run):
    for name in ("prompts", "traces", "train", "eval"):
        put(opened(run, name), "a.bin", b"abc")
    assert run.restart("train") == ["train", "eval"]
    assert sorted(p.name for p in run.path.iterdir() if p.is_dir()) == ["1-prompts", "2-traces"]
    assert run.restart("train") == []
    with pytest.raises(StoreError, match="prompts, traces, logits, train, eval, publish"):
        run.restart("trian")


def test_a_folder_made_by_something_else_is_refused(run):
    folder = run.path / "2-traces"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"no stage\.json"):
        opened(run)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_torn_state_file_is_an_error_that_names_it(run):
    stage = opened(run)
    (stage.path / "stage.json").write_text('{"spec": {')
    with pytest.raises(StoreError, match=r"2-traces/stage\.json.*--restart traces"):
        opened(run)


def test_the_manifest_holds_what_a_later_reader_needs(run):
    stage = opened(run)
    put(stage, "a.bin", b"abc", wall_s=2.0, device_s=16.0)
    stage.finish({"traces": 1}, fingerprints={"teacher": "t1"}, wall_s=0.5, device_s=4.0, note="x")
    manifest = json.loads((stage.path / "manifest.json").read_text())
    assert manifest["spec"] == SPEC and manifest["inputs"] == INPUTS and manifest["schema"] == SCHEMA_VERSION
    assert manifest["commit"] == "c0ffee" and manifest["counts"] == {"traces": 1} and manifest["note"] == "x"
    assert manifest["wall_s"] == 2.5 and manifest["device_s"] == 20.0 and manifest["hash"] == stage.hash
    assert manifest["shards"][0]["name"] == "a.bin" and manifest["fingerprints"] == {"teacher": "t1"}
    assert manifest["versions"].keys() == {"python", "torch", "transformers", "deepspeed"}
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert time.strptime(manifest["date"][:19], "%Y-%m-%dT%H:%M:%S")


def test_wall_time_adds_over_launches_and_takes_the_slowest_of_ranks_that_work_together(tmp_path):
    first = [RunFolder(tmp_path, "demo", commit="c", rank=rank).stage("eval").open(SPEC, INPUTS) for rank in (0, 1)]
    put(first[0], "a.bin", b"a", wall_s=3.0, device_s=3.0)
    put(first[1], "b.bin", b"b", wall_s=5.0, device_s=5.0)
    put(first[1], "c.bin", b"c", wall_s=1.0, device_s=1.0)
    second = opened(RunFolder(tmp_path, "demo", commit="c"), "eval")  # the launch after a kill
    put(second, "d.bin", b"d", wall_s=10.0, device_s=20.0)
    manifest = second.finish({})
    assert manifest["launches"] == 2 and manifest["wall_s"] == (3 + 3) + 10 and manifest["device_s"] == 29
    second.run.release()


def test_later_ranks_wait_for_rank_0_and_write_no_state(tmp_path):
    second = RunFolder(tmp_path, "demo", commit="c", rank=1)
    with pytest.raises(StoreError, match="rank 0 has not opened"):
        opened(second)
    with RunFolder(tmp_path, "demo", commit="c") as run:
        opened(run)
        state = (run.path / "2-traces/stage.json").read_bytes()
        stage = opened(second)
        assert stage.finish({}) == {} and not (stage.path / "manifest.json").exists()
        assert (run.path / "2-traces/stage.json").read_bytes() == state


def test_the_manifest_hash_is_of_the_content_and_not_of_when_or_how_long(tmp_path):
    def hash_of(name: str, data: bytes, spec: dict, fingerprint: str, wall_s: float) -> str:
        with RunFolder(tmp_path, name, commit=name) as run:
            stage = run.stage("traces").open(spec, INPUTS)
            put(stage, "a.bin", data, wall_s=wall_s)
            stage.finish({}, fingerprints={"teacher": fingerprint})
            return stage.manifest_hash

    base = hash_of("a", b"x", SPEC, "t", 1.0)
    assert hash_of("b", b"x", SPEC, "t", 2.0) == base
    others = {hash_of("c", b"y", SPEC, "t", 1.0), hash_of("d", b"x", {}, "t", 1.0), hash_of("e", b"x", SPEC, "u", 1.0)}
    assert len(others | {base}) == 4


def test_reading_an_unfinished_stage_says_how_to_finish_it(run):
    with pytest.raises(StoreError, match="--stages traces"):
        _ = opened(run).manifest_hash


def test_json_is_replaced_whole_and_refuses_what_json_cannot_carry(run):
    stage = opened(run, "eval")
    stage.write_json("report.json", {"pass_at_1": 0.5})
    with pytest.raises(StoreError, match="JSON cannot carry"):
        stage.write_json("report.json", {"pass_at_1": float("nan")})
    assert json.loads((stage.path / "report.json").read_text()) == {"pass_at_1": 0.5} and stage.shards() == []


def test_the_store_imports_no_torch():
    code = "import sys, distill.store; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
