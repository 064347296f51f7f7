"""Adapters: nothing changes when they are put in, only they are trained and kept, and the export has them merged."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from student_world import Folder, make_model, make_stages, make_traces, settings
from transformers import AutoModelForCausalLM

from distill.config_students import Adapter
from distill.errors import ModelError
from distill.store import RunFolder
from distill.tokens import load_tokenizer
from distill.tracking import Tracker
from students import adapters, checkpoint
from students.engine import StudentEngine
from students.model import load_student
from students.step import LossSettings, StudentStep
from students.train import train_student

CPU = torch.device("cpu")
LAUNCH = Path(__file__).with_name("launch_training.py")
KINDS = ["lora", "qlora"]
SLOW = pytest.mark.slow
WIDTH = 128  # a CPU wants rows of whole 4-bit blocks


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """As the other tests' world, with a wider model."""
    root = tmp_path_factory.mktemp("wide")
    make_model(root / "model", hidden=WIDTH)
    tokenizer = load_tokenizer(root / "model")
    make_stages(root, tokenizer, make_traces(tokenizer, 24))
    return root


def adapted(folder, kind="lora", seed=0, dtype=torch.float32, **changes):
    model, tokenizer = load_student(folder, dtype)
    return adapters.attach(model, Adapter(kind=kind, **changes), dtype, CPU, seed), tokenizer


def fill(model, seed=1):
    """B is zero at first; other values show what a scale or an order would do."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1


def logits(model, ids, **more):
    with torch.no_grad():
        return model(ids, **more).logits


@pytest.mark.parametrize("family, tie", [("qwen3", True), ("llama", False), ("qwen2", True)])
def test_a_new_adapter_changes_nothing_and_trains_its_matrices_alone(tmp_path, family, tie):
    make_model(tmp_path, family=family, tie=tie, hidden=WIDTH)
    plain, _ = load_student(tmp_path)
    model, _ = adapted(tmp_path, rank=4, targets=["q_proj", "down_proj"])
    ids = torch.randint(0, 300, (1, 30))
    assert torch.equal(logits(model, ids, seq_lens=[30]), logits(plain, ids, seq_lens=[30]))
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    pairs = {("q_proj", 128, 64 if family == "qwen3" else 128), ("down_proj", 192, 128)}
    assert len(trained) == 2 * 2 * len(pairs)
    for target, inputs, outputs in pairs:
        shapes = {shape for name, shape in trained.items() if f".{target}." in name}
        assert shapes == {(4, inputs), (outputs, 4)}


def test_the_same_seed_gives_the_same_matrices_and_leaves_the_random_state_alone(world):
    torch.manual_seed(7)
    first, again, other = (dict(adapted(world / "model", seed=seed)[0].named_parameters()) for seed in (3, 3, 4))
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))
    names = [name for name in first if ".lora_A." in name]
    assert names and all(torch.equal(first[name], again[name]) for name in names)
    assert not any(torch.equal(first[name], other[name]) for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_weight_by_hand(world, kind):
    model, _ = adapted(world / "model", kind, rank=4, alpha=10.0, targets=["v_proj"])
    fill(model)
    target = model.model.layers[1].self_attn.v_proj
    plain = {weight.name: weight for weight in adapters.plain_weights(model)}
    weight = plain["model.layers.1.self_attn.v_proj.weight"]
    base, a, b = weight.parameters
    unit = torch.eye(WIDTH)  # a linear layer's products with unit vectors are its columns
    merged = weight.merge(base, a, b)
    with torch.no_grad():
        columns = target.base_layer(unit) + 10 / 4 * (unit @ a.T) @ b.T
        assert (merged - columns.T).abs().max() < 1e-6
        assert (merged - target(unit).T).abs().max() < 1e-6
    original = load_file(world / "model" / "model.safetensors")
    assert plain.keys() == original.keys()
    assert {name: found.shape for name, found in plain.items()} == {name: t.shape for name, t in original.items()}
    difference = (merged - 10 / 4 * b @ a - original[weight.name]).abs().max()
    # NF4's widest gap is 0.304 of a block's largest number: nothing moves further than half of it, scales are rounded
    assert (difference < 1e-6) if kind == "lora" else (1e-6 < difference < 0.16 * original[weight.name].abs().max())


def test_full_rank_matrices_can_be_any_update(world):
    """With rank = width, A = 1 and alpha = rank, B is the update itself: the merged weight is W + B."""
    model, _ = adapted(world / "model", rank=WIDTH, alpha=WIDTH, targets=["v_proj"])
    fill(model)
    weight = {weight.name: weight for weight in adapters.plain_weights(model)}["model.layers.0.self_attn.v_proj.weight"]
    base, a, b = weight.parameters
    a.data = torch.eye(WIDTH)
    assert (weight.merge(base, a, b) - (base + b)).abs().max() < 1e-6


def test_a_4_bit_student_computes_the_same_in_evaluation_as_in_training(world):
    model, _ = adapted(world / "model", "qlora")
    fill(model)
    ids = torch.randint(0, 300, (1, 30))
    training = logits(model, ids, seq_lens=[30])
    model.eval()
    for _ in range(2):
        assert (logits(model, ids, seq_lens=[30]) - training).abs().max() < 1e-5
    model.train()
    assert torch.equal(logits(model, ids, seq_lens=[30]), training)


def test_a_cpu_refuses_rows_that_its_4_bit_kernel_misreads(tmp_path):
    make_model(tmp_path, hidden=32)
    with pytest.raises(ModelError, match=r"multiples of 64 .*32.* Use kind: lora"):
        adapted(tmp_path, "qlora")


def engine_of(model, ranks, stage, tmp_path, folder, dtype=torch.float32):
    train = settings(folder, zero_stage=stage, micro_batch_tokens=96).train
    module = StudentStep(model, LossSettings())
    return StudentEngine(module, train, ranks, dtype=dtype, micro_batches=1, offload_dir=tmp_path)


@pytest.mark.parametrize("kind, stage", [("lora", 0), pytest.param("lora", 2, marks=SLOW), ("lora", 3), ("qlora", 1)])
@pytest.mark.parametrize("family, tie", [("qwen3", True), ("llama", False)])
def test_the_export_is_a_plain_model_with_the_adapted_ones_logits(ranks, tmp_path, kind, stage, family, tie):
    source = make_model(tmp_path / "source", family=family, tie=tie, hidden=WIDTH)
    model, tokenizer = adapted(source, kind, rank=4)
    fill(model)
    engine = engine_of(model, ranks, stage, tmp_path, source)
    ids = torch.randint(0, 300, (1, 40))
    expected = logits(engine.module.model, ids, seq_lens=[40])
    checkpoint.export(engine, tokenizer, tmp_path / "model", torch.float32, ranks)
    engine.close()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="sdpa").eval()
    assert (logits(plain, ids) - expected).abs().max() < 2e-5 * expected.abs().max()
    held = load_file(tmp_path / "model" / "model.safetensors")
    assert held.keys() == load_file(source / "model.safetensors").keys()
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())


def train(world, out, ranks, **changes):
    config = settings(world / "model", **changes)
    run = RunFolder(world, "run", commit="test")
    with Tracker(config, out) as tracker:
        stages = run.stage("traces"), run.stage("logits"), Folder(out)
        return train_student(config, config.students[0], *stages, ranks, tracker)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind, stage", [pytest.param("lora", 3, marks=SLOW), ("qlora", 1)])
def test_an_adapter_learns_resumes_exactly_and_merges(world, ranks, tmp_path, kind, stage):
    changes = {"zero_stage": stage, "adapter": {"kind": kind, "rank": 8}, "epochs": 4, "lr": 2e-2}
    train(world, tmp_path / "whole", ranks, **changes)
    whole = losses(tmp_path / "whole")
    assert whole[-1] < whole[0] - 0.5
    command = [sys.executable, str(LAUNCH), str(world), str(tmp_path / "again"), "--kill-at", "5"]
    killed = subprocess.run([*command, "--train", json.dumps([changes])], capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    kept, _ = checkpoint.newest_checkpoint(tmp_path / "again" / "checkpoints")
    held = [torch.load(path, weights_only=False) for path in kept.glob("*model_states.pt")]
    assert held and all(".lora_" in name for part in held for name in part["module"])
    train(world, tmp_path / "again", ranks, **changes)
    assert losses(tmp_path / "again") == whole
    exported = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "again")]
    assert all(torch.equal(tensor, exported[1][name]) for name, tensor in exported[0].items())
    base = load_file(world / "model" / "model.safetensors")
    changed = {name for name, tensor in exported[0].items() if not torch.equal(tensor, base[name])}
    assert changed == {name for name in base if "_proj." in name}


@SLOW
def test_two_ranks_train_the_adapter_and_its_average_of_one(world, ranks, tmp_path):
    common = {"adapter": {"kind": "lora", "rank": 8}, "lr": 2e-2, "micro_batch_tokens": 192, "epochs": 1}
    changes = [common | {"zero_stage": stage, "ema_decay": 0.6} for stage in (0, 2, 3)]
    changes.append(common | {"zero_stage": 2, "adapter": {"kind": "qlora", "rank": 8}})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(LAUNCH)]
    command += [str(world), str(tmp_path / "two"), "--train", json.dumps(changes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    for i, settings_of_two in enumerate(changes):
        one, two = tmp_path / str(i), tmp_path / "two" / str(i)
        train(world, one, ranks, **settings_of_two)
        assert losses(two) == pytest.approx(losses(one), rel=1e-5)
        expected = load_file(one / "model" / "model.safetensors")
        found = load_file(two / "model" / "model.safetensors")
        assert max((found[name] - expected[name]).abs().max() for name in expected) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_weight_is_the_adapted_layer_on_a_gpu(tmp_path, kind):
    make_model(tmp_path, hidden=WIDTH)
    model, _ = load_student(tmp_path, torch.bfloat16)
    device = torch.device("cuda")
    adapters.attach(model.to(device), Adapter(kind=kind, rank=4, targets=["v_proj"]), torch.bfloat16, device, 0)
    fill(model)
    weight = {weight.name: weight for weight in adapters.plain_weights(model)}["model.layers.0.self_attn.v_proj.weight"]
    target = model.model.layers[0].self_attn.v_proj
    with torch.no_grad():
        merged = weight.merge(*[parameter.detach() for parameter in weight.parameters])
        found = target(torch.eye(WIDTH, device=device, dtype=torch.bfloat16)).T
    assert (merged - found).abs().max() < 0.01 * merged.abs().max()
