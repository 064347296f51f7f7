"""Whole trainings: against a plain float64 loop, for any split and ZeRO stage, and across ranks."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from student_world import Folder, make_model, make_stages, make_traces, settings
from transformers import AutoModelForCausalLM

from distill.errors import ModelError
from distill.store import RunFolder
from distill.tokens import load_tokenizer
from distill.tracking import Tracker, read_history
from students.data import load_traces
from students.engine import StudentEngine
from students.model import load_student
from students.packing import TrainPlan
from students.schedule import learning_rate
from students.step import LossSettings, StudentStep
from students.train import train_student

WEIGHTS = 3e-5  # one update moves a weight by up to 3e-3; Adam divides rounding by gradients that are almost 0
LAUNCH = Path(__file__).with_name("launch_training.py")


def train(world, out, ranks, kind="logits", **changes):
    """(counts, rows of log.jsonl, exported weights) of one training in this process."""
    run = RunFolder(world, "run", commit="test")
    config = settings(world / "model", kind, **changes)
    with Tracker(config, out) as tracker:
        stages = run.stage("traces"), run.stage("logits"), Folder(out)
        counts = train_student(config, config.students[0], *stages, ranks, tracker)
    return counts, log(out), weights(out)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= tolerance, name


@pytest.fixture(scope="module")
def one_batch(world, ranks, tmp_path_factory):
    """The reference: one rank, whole steps, ZeRO off."""
    return train(world, tmp_path_factory.mktemp("reference"), ranks)


def test_training_equals_a_plain_float64_loop(world, one_batch):
    counts, rows, found = one_batch
    config = settings(world / "model").train
    model = AutoModelForCausalLM.from_pretrained(world / "model", attn_implementation="eager").double()
    run = RunFolder(world, "run", commit="test")
    data = load_traces(run.stage("traces"), run.stage("logits"), load_tokenizer(world / "model"), 96)
    plan = TrainPlan(data.keys, data.lengths, data.trained, row_tokens=96, batch_tokens=384, epochs=2, seed=3)
    matrices, others = ([p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    assert len(rows) == len(plan) == counts["steps"] >= 4
    for number, row in enumerate(rows):
        losses, tokens = [], 0
        for i in [i for members in plan[number].rows for i in members]:
            example = data.examples[i]
            batch = data.collate([[i]], 400)
            logp = model(batch.input_ids_N[None]).logits[0, len(example.prompt_ids) - 1 :].log_softmax(1)
            losses.append(0.3 * F.nll_loss(logp, batch.labels_M, reduction="sum"))
            t = batch.targets.logprobs_NK.double().exp()
            p = logp.gather(1, batch.targets.ids_NK)
            rest = 1 - (p.exp() * (t > 0)).sum(1)
            tail = batch.targets.tail_N.double()
            mass = t.sum(1) + tail  # stored masses are rounded
            t, tail = t / mass[:, None], tail / mass
            losses.append(0.7 * (torch.special.xlogy(t, t) - t * p).sum())
            losses.append(0.7 * (tail * (tail.log() - rest.log()))[tail > 0].sum())
            tokens += len(batch.labels_M)
        loss = sum(losses) / tokens
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        for group in adam.param_groups:
            group["lr"] = learning_rate(number, len(plan), config)
        adam.step()
        assert row["loss"] == pytest.approx(loss.item(), rel=2e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=2e-4)
        assert row["lr"] == adam.param_groups[0]["lr"]
    close(found, {name: model.state_dict()[name].float() for name in found}, 2e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_tokens": 96},
        {"micro_batch_tokens": 192},
        {"micro_batch_tokens": 288},  # three rows and one: unequal micro-batches
        {"zero_stage": 1, "micro_batch_tokens": 96},
        {"zero_stage": 2, "micro_batch_tokens": 96},
        {"zero_stage": 3, "micro_batch_tokens": 96},
        {"activation_checkpointing": True},
    ],
    ids=str,
)
def test_weights_are_the_same_for_any_split_and_zero_stage(world, ranks, one_batch, tmp_path, changes):
    _, rows, found = train(world, tmp_path, ranks, **changes)
    _, expected_rows, expected = one_batch
    for row, want in zip(rows, expected_rows, strict=True):
        for name in ("loss", "ce", "kl", "entropy", "top1", "support_mass", "tail", "grad_norm"):
            assert row[name] == pytest.approx(want[name], rel=3e-6), name
        assert (row["tokens"], row["lr"]) == (want["tokens"], want["lr"])
    close(found, expected, WEIGHTS)
    assert any((expected[name] - w).abs().max() > 1e-3 for name, w in weights_before(world).items())


@pytest.mark.parametrize(
    "rows", [[[0, 1], [2, 3]], [[0, 1, 2], [3]], [[0], [1], [2], [3]], [[0, 1, 2, 3], []]], ids=str
)
def test_gradients_are_the_same_for_any_micro_batch_split(world, ranks, tmp_path, rows):
    gradients = []
    for split in ([[0, 1, 2, 3]], rows):
        engine, data = engine_of(world, ranks, tmp_path, micro_batches=len(split))
        tokens = sum(data.trained[:4])
        for i, part in enumerate(split):
            batch = data.collate([[index] for index in part], 400)
            engine.accumulate(batch, tokens, last=i + 1 == len(split))
        gradients.append({name: p.grad.clone() for name, p in engine.module.named_parameters()})
        engine.close()
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).abs().max() <= 1e-6 * expected.abs().max(), name


def engine_of(world, ranks, tmp_path, micro_batches=1, **changes):
    model, tokenizer = load_student(world / "model")
    data = load_traces(RunFolder(world, "run", commit="test").stage("traces"), None, tokenizer, 96)
    module, config = StudentStep(model, LossSettings()), settings(world / "model", **changes).train
    options = {"dtype": torch.float32, "micro_batches": micro_batches, "offload_dir": tmp_path}
    return StudentEngine(module, config, ranks, **options), data


def weights_before(world):
    return load_file(world / "model" / "model.safetensors")


def test_two_ranks_equal_one(world, one_batch, tmp_path):
    changes = [
        {"zero_stage": 0, "micro_batch_tokens": 192},
        {"zero_stage": 0, "micro_batch_tokens": 96},
        {"zero_stage": 1, "micro_batch_tokens": 96},
        {"zero_stage": 2, "micro_batch_tokens": 96},
        {"zero_stage": 3, "micro_batch_tokens": 192},
        {"zero_stage": 1, "micro_batch_tokens": 192, "sequence_parallel": 2},
        {"zero_stage": 3, "micro_batch_tokens": 96, "sequence_parallel": 2},
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(LAUNCH)]
    command += [str(world), str(tmp_path), "--train", json.dumps(changes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    _, expected_rows, expected = one_batch
    for i in range(len(changes)):
        for row, want in zip(log(tmp_path / str(i)), expected_rows, strict=True):
            assert row["loss"] == pytest.approx(want["loss"], rel=3e-6)
            assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=3e-6)
            assert row["kl"] == pytest.approx(want["kl"], rel=3e-6)
        close(weights(tmp_path / str(i)), expected, WEIGHTS)


def test_response_loss_learns_and_logs_what_it_is(world, ranks, tmp_path):
    counts, rows, _ = train(world, tmp_path, ranks, kind="response", epochs=6, lr=1e-2)
    assert [row["step"] for row in rows] == list(range(1, counts["steps"] + 1))
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert all(row["loss"] == pytest.approx(row["ce"]) and "kl" not in row for row in rows)
    assert rows[-1]["tokens"] == 6 * counts["trained_tokens"] and rows[-1]["epoch"] == 6
    assert counts["kept"] == 20 and counts["traces"] == 24 and counts["too_long"] == 0
    history = read_history(tmp_path)
    assert [entry["step"] for entry in history] == [row["step"] for row in rows]
    assert history[-1]["train/loss"] == rows[-1]["loss"] and history[-1]["scope"] == "small"


def test_a_finished_student_is_not_trained_again(world, ranks, tmp_path):
    counts, rows, _ = train(world, tmp_path, ranks, epochs=1)
    stamp = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    again, rows_again, _ = train(world, tmp_path, ranks, epochs=1)
    assert again == counts and rows_again == rows
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_loss_that_is_not_finite_stops_before_any_weight_changes(world, ranks, tmp_path, stage):
    make_model(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    tokenizer = load_tokenizer(tmp_path / "model")
    make_stages(tmp_path, tokenizer, make_traces(tokenizer, 8))
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="the loss of step 1 is not finite") as error:
        train(tmp_path, out, ranks, zero_stage=stage)
    report = json.loads((out / "nan-step-1" / "report.json").read_text())
    assert report["loss"] == "nan" and f"python -m students.replay {out / 'nan-step-1'}" in str(error.value)
    assert all("/" in key for row in report["rows"] for key in row)
    assert (out / "log.jsonl").read_text() == "" and not (out / "model").exists()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_changes_no_weight(world, ranks, tmp_path, stage):
    engine, data = engine_of(world, ranks, tmp_path, zero_stage=stage)

    def step(poison: bool) -> float:
        hook = None
        if poison:
            hook = engine.module.model.model.norm.register_full_backward_hook(
                lambda _, grads, __: (grads[0] * math.inf,)
            )
        engine.accumulate(data.collate([[0, 1]], 400), 50.0, last=True)
        norm = engine.step(1e-2)
        if hook:
            hook.remove()
        return norm

    def current():
        return {name: tensor.clone() for name, tensor in engine.whole_weights(torch.float32)}

    before = current()
    assert not math.isfinite(step(poison=True))
    close(current(), before, 0.0)
    assert math.isfinite(step(poison=False))
    assert any((tensor - before[name]).abs().max() > 1e-3 for name, tensor in current().items())
    engine.close()
