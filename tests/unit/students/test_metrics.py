"""What a training tells of itself: spikes, speed, held-out traces, and a refused step that can be run again."""

import json
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from student_world import Folder, make_model, make_stages, make_traces, settings
from transformers import AutoModelForCausalLM

from distill.config_geometry import Geometry
from distill.errors import DataError, ModelError
from distill.geometry import train_flops
from distill.losses.metrics import LossMetrics
from distill.metrics import METRICS, known
from distill.store import RunFolder
from distill.tokens import load_tokenizer
from distill.tracking import Tracker, read_history
from students import metrics, replay
from students.data import Example, TraceData, load_traces
from students.mixture import Mixture, Part, hold_out
from students.packing import StepPlan, TrainPlan
from students.train import train_student


def train(world, out, ranks, kind="logits", **changes):
    run = RunFolder(world, "run", commit="test")
    config = settings(world / "model", kind, **changes)
    with Tracker(config, out) as tracker:
        stages = run.stage("traces"), run.stage("logits"), Folder(out)
        counts = train_student(config, config.students[0], *stages, ranks, tracker)
    return counts, [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# --- spikes ----------------------------------------------------------------------------------------------------------


def test_a_spike_by_hand():
    spikes = metrics.Spikes()
    before = [1.0, 2.0, 3.0, 4.0] * 4
    assert [spikes.z(loss) for loss in before] == [None] * 16
    # median 2.5, absolute deviations 1.5 and 0.5, their median 1
    assert spikes.z(10.0) == pytest.approx(7.5 / 1.4826)
    # one outlier moves neither median nor spread by much
    assert spikes.z(10.0) == pytest.approx(7.0 / 1.4826)


def test_a_spike_is_judged_by_the_last_steps_alone_and_the_same_after_a_resume():
    losses = [5 - i * 0.01 + 0.02 * math.sin(i) for i in range(200)]
    whole, resumed = metrics.Spikes(), metrics.Spikes(losses[:120])
    found = [whole.z(loss) for loss in losses]
    assert [resumed.z(loss) for loss in losses[120:]] == found[120:]
    assert max(abs(z) for z in found if z is not None) < metrics.SPIKE_Z


def test_a_constant_loss_is_no_spike_and_a_jump_from_it_is():
    spikes = metrics.Spikes([2.0] * 30)
    assert spikes.z(2.0) == 0 and spikes.z(2.001) < metrics.SPIKE_Z < spikes.z(2.5)


def test_a_loss_that_stands_out_is_logged_with_its_traces(world, ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "FEWEST_STEPS", 2)
    monkeypatch.setattr("students.log.SPIKE_Z", -math.inf)
    _, rows = train(world, tmp_path, ranks, epochs=1)
    spikes = [json.loads(line) for line in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    judged = [row["step"] for row in rows if "loss_z" in row]
    assert [spike["step"] for spike in spikes] == judged and len(judged) >= 1
    keys = {f"{trace.prompt.key}/0" for trace in make_traces(load_tokenizer(world / "model"), 24) if trace.keep}
    assert all({key for row in spike["traces"] for key in row} <= keys for spike in spikes)


# --- figures of a step -----------------------------------------------------------------------------------------------


def test_every_figure_of_a_row_is_a_known_metric_and_steps_wait_for_data(world, ranks, tmp_path):
    counts, rows = train(world, tmp_path, ranks, eval_traces=3, eval_steps=1)
    for row in rows:
        assert all(known(f"train/{name}") for name in row if name != "step")
        assert 0 <= row["data_wait_s"] <= row["step_s"] and 0 < row["packing_efficiency"] <= 1
        assert row["support_mass"] + row["student_tail"] == pytest.approx(1, abs=1e-5)
    assert rows[-1]["epoch"] == 2 and counts["packing_efficiency"] <= 1
    sent = {record.pop("step"): record for record in read_history(tmp_path)}  # what the tracker was told of each step
    assert sent == {row["step"]: {"scope": "small", **prefixed(row)} for row in rows}
    asked = {"ce", "kd", "kl", "top1", "entropy", "tail", "student_tail", "grad_norm", "lr", "tokens_per_s"}
    assert asked | {"packing_efficiency", "data_wait_s", "eval_loss"} <= rows[-1].keys()
    assert known("train/loss/any-set") and not known("train/los/any") and "train/loss/any-set" not in METRICS


def prefixed(row: dict) -> dict:
    return {f"train/{name}": value for name, value in row.items() if name != "step"}


def test_loss_of_each_set_is_per_token_of_that_set():
    # two sets share a step of 30 trained tokens; their sums were divided by 30
    step = StepPlan(0, [[0, 2], [1]], 50, 30)
    a, b, c = ([Example(f"{n}/0", [1], [2] * n, "s", [2] * n) for n in sizes] for sizes in ([12, 8], [10], [7]))
    parts = [
        Part(n, TraceData(d, None, Counter()), loss_weight=w) for n, d, w in (("a", a, 1), ("b", b, 2), ("c", c, 1))
    ]
    sums = metrics.Sums(LossMetrics.zeros(), [0.5, 0.25, 0.0])
    found = metrics.by_set(sums, Mixture(parts), step)
    assert found == {"loss/a": pytest.approx(0.5 * 30 / 20), "loss/b": pytest.approx(0.25 * 30 / (2 * 10))}


def test_tokens_that_were_not_trained_are_noticed():
    sums = metrics.Sums(LossMetrics.zeros(), [])
    with pytest.raises(DataError, match="5 were planned"):
        metrics.means(sums, 5, has_teacher=False)


def test_model_flops_over_the_peak(monkeypatch):
    sizes = {"hidden_size": 64, "layers": 2, "heads": 4, "intermediate_size": 128, "vocab_size": 100}
    geometry = Geometry(family="llama", **sizes)
    plan = TrainPlan(["a", "b"], [10, 30], [5, 5], row_tokens=40, batch_tokens=40, epochs=1, seed=0)
    monkeypatch.setattr(metrics, "peak_flops", lambda device, dtype: 1e9)
    speed = metrics.Speed(plan, geometry, torch.bfloat16, torch.device("cpu"), 4)
    row = speed.row(1000, 0.5, 0.1)
    # a token sees half of its own trace: the mean over tokens of the length is (10 * 10 + 30 * 30) / 40 = 25
    assert row["mfu"] == pytest.approx(1000 / 0.5 * train_flops(geometry, 25) / 4e9)
    assert (row["tokens_per_s"], row["step_s"], row["data_wait_s"]) == (2000, 0.5, 0.1) and "memory_gib" not in row
    # an adapter's base has no gradient of its weights: two products of each a token in place of three
    adapted = metrics.Speed(plan, geometry, torch.bfloat16, torch.device("cpu"), 4, frozen=True).row(1000, 0.5, 0.1)
    attention = train_flops(geometry, 25) - train_flops(geometry, 0)
    assert adapted["mfu"] == pytest.approx(2000 * (train_flops(geometry, 0) * 2 / 3 + attention) / 4e9)


# --- held-out traces -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"micro_batch_tokens": 96, "zero_stage": 1}, {"zero_stage": 3}], ids=str)
def test_the_held_out_loss_is_that_of_the_exported_student(world, ranks, tmp_path, changes):
    counts, rows = train(world, tmp_path, ranks, eval_traces=5, eval_steps=2, **changes)
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4, *([] if len(rows) == 4 else [len(rows)])]
    run = RunFolder(world, "run", commit="test")
    data = load_traces(run.stage("traces"), run.stage("logits"), load_tokenizer(world / "model"), 96)
    _, held_out = hold_out(data, 5, seed=3)
    assert counts["held_out"] == len(held_out.examples)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager").double()
    ce, tokens = 0.0, 0
    for example in held_out.examples:
        ids = torch.tensor(example.prompt_ids + example.completion_ids)[None]
        logp = model(ids).logits[0, len(example.prompt_ids) - 1 : -1].log_softmax(1)
        ce += F.nll_loss(logp, torch.tensor(example.completion_ids), reduction="sum").item()
        tokens += len(example.completion_ids)
    assert rows[-1]["eval_ce"] == pytest.approx(ce / tokens, rel=3e-5)
    assert rows[-1]["eval_loss"] == pytest.approx(0.7 * rows[-1]["eval_kl"] + 0.3 * rows[-1]["eval_ce"], rel=1e-5)
    assert 0 <= rows[-1]["eval_top1"] <= 1


def test_evaluating_changes_no_weight_and_no_loss(world, ranks, tmp_path):
    weights, logs = [], []
    for name, steps in (("often", 1), ("once", 1000)):
        _, rows = train(world, tmp_path / name, ranks, eval_traces=4, eval_steps=steps)
        weights.append(load_file(tmp_path / name / "model" / "model.safetensors"))
        logs.append([(row["loss"], row["grad_norm"]) for row in rows])
    assert logs[0] == logs[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# --- a refused step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["response", "logits"])
def test_a_refused_step_can_be_run_again_row_by_row(ranks, tmp_path, kind, capsys):
    make_model(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    traces = make_traces(tokenizer, 8)
    make_stages(tmp_path, tokenizer, traces)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    fed = {trace.sample_key: trace.prompt_ids + trace.completion_ids[:-1] for trace in traces if trace.keep}
    token = min({i for ids in fed.values() for i in ids}, key=lambda i: sum(i in ids for ids in fed.values()))
    bad_keys = {key for key, ids in fed.items() if token in ids}
    assert len(bad_keys) == 1  # the row of one trace fails, the others are fine
    tensors["model.embed_tokens.weight"][token] = math.nan
    tensors["lm_head.weight"] = load_file(path)["model.embed_tokens.weight"]
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="is not finite"):
        train(tmp_path, tmp_path / "out", ranks, kind, max_seq_tokens=96, batch_tokens=96 * 8, micro_batch_tokens=96)
    folder = tmp_path / "out" / "nan-step-1"
    rows = list(replay.replay(folder, torch.device("cpu"), torch.float32))
    report = json.loads((folder / "report.json").read_text())
    assert [row["keys"] for row in rows] == report["rows"] and len(rows) > 1
    for row in rows:
        bad = not bad_keys.isdisjoint(row["keys"])
        assert math.isfinite(row["loss"]) != bad and math.isfinite(row["grad_norm"]) != bad
        assert row["first_bad"] == ("model.model.embed_tokens" if bad else None)
    assert replay.main([str(folder), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n! row") + said.startswith("! row") == 1 and bad_keys.pop() in said
    assert replay.main([str(tmp_path), "--device", "cpu"]) == 2


def test_a_replayed_row_has_the_loss_that_it_had(world, ranks, tmp_path):
    from students.step import LossSettings, StudentStep

    run = RunFolder(world, "run", commit="test")
    data = load_traces(run.stage("traces"), run.stage("logits"), load_tokenizer(world / "model"), 96)
    batches = [data.collate([[0, 1]], 400), data.collate([[2]], 400)]
    tokens = sum(len(batch.labels_M) for batch in batches)
    chosen = LossSettings(0.7, "reverse_kl", 0.5, 2.0)
    replay.save_rows(tmp_path / replay.ROWS, batches, chosen, tokens, 1)
    (tmp_path / "model").symlink_to(world / "model")
    model = AutoModelForCausalLM.from_pretrained(world / "model", attn_implementation="packed_causal")
    step = StudentStep(model, chosen)
    for row, batch in zip(replay.replay(tmp_path, torch.device("cpu"), torch.float32), batches, strict=True):
        assert row["loss"] == pytest.approx(step(batch, tokens)[0].item(), rel=1e-6)
