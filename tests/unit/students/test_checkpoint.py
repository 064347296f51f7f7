"""What a kill may not break: checkpoints, resume, the log; and what leaves the trainer: the exported folder."""

import json
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from student_world import Folder, make_model, make_stages, make_traces, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from distill.errors import StoreError
from distill.store import RunFolder
from distill.tokens import end_id, fingerprint, load_tokenizer
from distill.tracking import Tracker
from students import checkpoint
from students.engine import StudentEngine
from students.model import load_student
from students.step import LossSettings, StudentStep
from students.train import train_student

LAUNCH = Path(__file__).with_name("launch_training.py")
TIMES = ("tokens_per_s", "step_s", "data_wait_s")


def train(world, out, ranks, **changes):
    config = settings(world / "model", **changes)
    run = RunFolder(world, "run", commit="test")
    with Tracker(config, out) as tracker:
        stages = run.stage("traces"), run.stage("logits"), Folder(out)
        return train_student(config, config.students[0], *stages, ranks, tracker)


def launch(world, out, *arguments, changes=None):
    command = [sys.executable, str(LAUNCH), str(world), str(out), "--train", json.dumps([changes or {}]), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def log(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def exported(out):
    return load_file(out / "model" / "model.safetensors")


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module", params=[0, 1, 2, 3])
def whole(request, world, ranks, tmp_path_factory):
    """(ZeRO stage, folder of a training that nothing interrupted)."""
    out = tmp_path_factory.mktemp("whole")
    train(world, out, ranks, zero_stage=request.param)
    return request.param, out


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(world, ranks, whole, tmp_path):
    stage, expected = whole
    killed = launch(world, tmp_path, "--kill-at", "5", changes={"zero_stage": stage})
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "model").exists()
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 4, 5]
    # that of step 4 may still have been on its way to the disk
    assert (tmp_path / "checkpoints" / "latest").read_text() in ("step-000004\n", "step-000002\n")
    train(world, tmp_path, ranks, zero_stage=stage)
    assert log(tmp_path) == log(expected)  # step 5 stands there once
    assert equal(exported(tmp_path), exported(expected))


@pytest.mark.parametrize("whole", [0], indirect=True)
def test_sigterm_saves_and_exits_with_status_zero(world, ranks, whole, tmp_path):
    _, expected = whole
    stopped = launch(world, tmp_path, "--terminate-at", "3")
    assert stopped.returncode == 0, stopped.stderr[-2000:]
    assert "stopped by SIGTERM; a checkpoint of step 4 is saved" in stopped.stdout
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000004\n"
    assert not (tmp_path / "model").exists()
    train(world, tmp_path, ranks)
    assert log(tmp_path) == log(expected)
    assert equal(exported(tmp_path), exported(expected))


def test_a_damaged_checkpoint_is_passed_over(world, ranks, tmp_path, capsys):
    train(world, tmp_path / "whole", ranks, keep_checkpoints=2, checkpoint_steps=1)
    train(world, tmp_path / "again", ranks, keep_checkpoints=2, checkpoint_steps=1)
    folder = tmp_path / "again" / "checkpoints"
    newest, before = (folder / name for name in ("step-000006", "step-000005"))
    assert sorted(path.name for path in folder.iterdir()) == ["latest", before.name, newest.name]
    state = checkpoint.newest_checkpoint(folder)
    assert state[0] == newest and state[1]["step"] == 6
    weights = next(path for path in newest.iterdir() if path.suffix == ".pt")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert checkpoint.newest_checkpoint(folder)[0] == before
    assert f"{newest} is damaged ({weights.name})" in capsys.readouterr().out
    (before / "state.json").unlink()
    assert checkpoint.newest_checkpoint(folder) is None
    # all are damaged and the export is gone: it starts anew and ends in the same weights
    expected = exported(tmp_path / "whole")
    (tmp_path / "again" / "train.json").unlink()
    train(world, tmp_path / "again", ranks, keep_checkpoints=2, checkpoint_steps=1)
    assert equal(exported(tmp_path / "again"), expected)


@pytest.mark.parametrize("held_out", [0, 4])
def test_the_best_checkpoint_is_that_of_the_lowest_loss(world, ranks, tmp_path, held_out):
    """On held-out traces where there are any, else in training; a high rate makes losses that go up and down."""
    rough = {"lr": 0.9, "schedule": "constant", "epochs": 4, "eval_traces": held_out, "eval_steps": 5}
    train(world, tmp_path, ranks, keep_best=True, keep_checkpoints=1, checkpoint_steps=1, **rough)
    losses = {row["step"]: row["eval_loss" if held_out else "loss"] for row in log(tmp_path)}
    best = min(losses, key=losses.__getitem__)
    folder = tmp_path / "checkpoints"
    assert (folder / "best").read_text() == f"step-{best:06d}\n" and best < max(losses)
    assert {int(path.name[5:]) for path in folder.glob("step-*")} == {best, max(losses)}


def test_an_unfinished_checkpoint_of_a_dead_process_is_removed(world, ranks, tmp_path):
    stale = tmp_path / "checkpoints" / ".step-000002.tmp-999999999"
    stale.mkdir(parents=True)
    (stale / "mp_rank_00_model_states.pt").write_bytes(b"half")
    train(world, tmp_path, ranks)
    assert not stale.exists()


def test_a_checkpoint_of_other_data_is_refused(world, ranks, tmp_path):
    train(world, tmp_path, ranks)
    (tmp_path / "train.json").unlink()
    with pytest.raises(StoreError, match="written with data") as error:
        train(world, tmp_path, ranks, batch_tokens=192, micro_batch_tokens=192)
    assert f"delete {tmp_path / 'checkpoints'}" in str(error.value)


def engine_of(folder, ranks, stage, tmp_path, dtype=torch.float32):
    model, tokenizer = load_student(folder, dtype)
    module = StudentStep(model, LossSettings())
    config = settings(folder, zero_stage=stage).train
    return StudentEngine(module, config, ranks, dtype=dtype, micro_batches=1, offload_dir=tmp_path), tokenizer


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("family, tie", [("qwen3", True), ("llama", False), ("qwen2", True)])
def test_an_export_loads_and_gives_the_engines_logits(ranks, tmp_path, monkeypatch, stage, family, tie):
    source, out = make_model(tmp_path / "source", family=family, tie=tie), tmp_path / "model"
    engine, tokenizer = engine_of(source, ranks, stage, tmp_path)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    checkpoint.export(engine, tokenizer, out, torch.float32, ranks)
    ids = torch.randint(0, 300, (1, 40))
    with torch.no_grad():
        expected = engine.module.model(ids, seq_lens=[40]).logits
        model = AutoModelForCausalLM.from_pretrained(out, attn_implementation="sdpa").eval()
        assert (model(ids).logits - expected).abs().max() < 1e-5
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2 and {path.name for path in shards} == set(index["weight_map"].values())
    held = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in held.values())
    assert ("lm_head.weight" in held) is not tie
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__] and config["dtype"] == "float32"
    assert "_attn_implementation" not in config and not list(tmp_path.glob(".model*"))
    engine.close()


@pytest.mark.parametrize("stage", [0, 3])
def test_an_export_holds_one_shard_of_weights_at_a_time(world, ranks, tmp_path, monkeypatch, stage):
    engine, tokenizer = engine_of(world / "model", ranks, stage, tmp_path)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    alive, most, whole_weights = weakref.WeakSet(), [], engine.whole_weights

    def watched(dtype):
        for name, tensor in whole_weights(dtype):
            alive.add(tensor)
            most.append(sum(each.nbytes for each in alive))
            yield name, tensor
            del tensor

    monkeypatch.setattr(engine, "whole_weights", watched)
    checkpoint.export(engine, tokenizer, tmp_path / "model", torch.float32, ranks)
    sizes = [shape.numel() * 4 for shape in engine.shapes().values()]
    assert sum(sizes) > 4 * 20_000  # there is something to hold back
    assert max(most) <= max(20_000, max(sizes)) + max(sizes)
    engine.close()


def test_an_export_carries_tokenizer_template_and_stop_token(world, ranks, tmp_path):
    train(world, tmp_path, ranks, epochs=1)
    own, found = load_tokenizer(world / "model"), load_tokenizer(tmp_path / "model")
    assert fingerprint(found) == fingerprint(own)
    text = AutoTokenizer.from_pretrained(tmp_path / "model").apply_chat_template(
        [{"role": "user", "content": "q"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|user|>q<|assistant|><think>\n"
    generation = GenerationConfig.from_pretrained(tmp_path / "model")
    assert generation.eos_token_id == [end_id(own)]
    assert generation.do_sample and (generation.temperature, generation.top_p) == (0.6, 0.95)
    reloaded, _ = load_student(tmp_path / "model")  # a student can be the base of another
    assert reloaded.lm_head.weight is reloaded.get_input_embeddings().weight


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_training_keeps_and_exports_float32_masters(world, ranks, tmp_path, stage):
    engine, tokenizer = engine_of(world / "model", ranks, stage, tmp_path, torch.bfloat16)
    before = {name: tensor for name, tensor in engine.whole_weights(torch.float32)}
    from students.data import load_traces

    data = load_traces(RunFolder(world, "run", commit="test").stage("traces"), None, tokenizer, 96)
    for _ in range(2):
        engine.accumulate(data.collate([[0, 1]], 400), 50.0, last=True)
        engine.step(1e-4)
    masters = dict(engine.whole_weights(torch.float32))
    rounded = dict(engine.whole_weights(torch.bfloat16))
    moved = [(masters[name] - before[name]).abs().max() for name in masters]
    assert 0 < max(moved) < 3e-4  # smaller than a bfloat16 step of weights around 0.3: only the masters can hold it
    assert all(torch.equal(masters[name].bfloat16(), rounded[name]) for name in masters)
    checkpoint.export(engine, tokenizer, tmp_path / "model", torch.bfloat16, ranks)
    assert equal(load_file(tmp_path / "model" / "model.safetensors"), rounded)
    engine.close()


def test_shards_by_hand():
    shapes = {name: torch.Size(shape) for name, shape in {"a": (2, 3), "b": (4,), "c": (30,), "d": (1,)}.items()}
    # bytes of float32: 24, 16, 120, 4; a shard of 40 holds a and b; c is too large for any and gets its own
    assert list(checkpoint.plan_shards(shapes, 4, 40)) == [["a", "b"], ["c"], ["d"]]


def test_traces_with_two_tokenizers_train_a_student_by_response(ranks, tmp_path):
    make_model(tmp_path / "teacher")
    tokenizer = load_tokenizer(tmp_path / "teacher")
    make_stages(tmp_path, tokenizer, make_traces(tokenizer, 6))
    make_model(tmp_path / "model", family="llama", tie=False, vocab_size=290)
    config = settings(tmp_path / "model", "response", epochs=1, max_seq_tokens=160)
    run = RunFolder(tmp_path, "run", commit="test")
    out = Folder(tmp_path / "out")
    with Tracker(config, out.path) as tracker:
        counts = train_student(
            config, config.students[0], run.stage("traces"), run.stage("logits"), out, ranks, tracker
        )
    assert counts["retokenised"] == counts["kept"] == 5 and counts["steps"] >= 1
