"""A student loaded in parts: the same numbers, and no rank ever has the memory of a whole model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from student_world import make_model, settings
from transformers import AutoConfig, AutoModelForCausalLM

from distill.errors import ModelError
from students.sharded import load_parts, shards_at_load

LAUNCH = Path(__file__).with_name("launch_sharded_load.py")


def launch(folder: Path, ranks: int) -> dict:
    files = [str(folder / name) for name in ("large", "small", "found.json")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(LAUNCH)]
    done = subprocess.run([*command, *files], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_parts_are_the_numbers_of_the_files_and_no_rank_holds_the_model(ranks, tmp_path):
    """20 layers of 5 MB: beside its part a rank may have one matrix, and what the allocator has not given back."""
    make_model(tmp_path / "large", tie=False, layers=20, hidden=512)
    make_model(tmp_path / "small")
    whole = sum(tensor.nbytes for tensor in load_file(tmp_path / "large" / "model.safetensors").values())
    found = launch(tmp_path, ranks)
    assert found["equal"] and found["buffers"]
    assert max(found["bytes"]) < 0.85 * whole < 0.95 * whole < min(found["whole_bytes"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_in_files_are_the_numbers_of_the_weights(ranks, aio, tmp_path, dtype):
    """Matrices of a MB and more; the embedding, larger than any of a layer, stays in memory."""
    from deepspeed.runtime.zero import GatheredParameters

    config = AutoConfig.from_pretrained(make_model(tmp_path / "model", tie=False, hidden=1024))
    config.vocab_size = 1600  # by 1024; a layer's largest is 1536 x 1024
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    train = settings(tmp_path, zero_stage=3, offload_params="nvme").train
    model = load_parts(tmp_path / "model", dtype, train, tmp_path / "files")
    expected = load_file(tmp_path / "model" / "model.safetensors")
    large = {n: value for n, value in expected.items() if "layers" in n and value.numel() * dtype.itemsize >= 1 << 20}
    assert large.keys() == {n for n, each in model.named_parameters() if each.ds_tensor.final_location == "nvme"}
    for name, parameter in model.named_parameters():
        with GatheredParameters([parameter]):
            assert torch.equal(parameter, expected[name].to(dtype))
    sizes = [path.stat().st_size for path in (tmp_path / "files").rglob("*.swp")]
    assert sorted(sizes) == sorted(value.numel() * dtype.itemsize for value in large.values())


def test_a_tied_head_is_one_parameter(ranks, tmp_path):
    make_model(tmp_path, tie=True)
    model = load_parts(tmp_path, torch.float32, settings(tmp_path, zero_stage=3).train)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("change, message", [("drop", "lack a parameter"), ("shape", "the config says")])
def test_files_that_do_not_fit_are_refused(ranks, tmp_path, change, message):
    make_model(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    tensor = tensors.pop(name)
    if change == "shape":
        tensors[name] = tensor.T.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message) as error:
        load_parts(tmp_path, torch.float32, settings(tmp_path, zero_stage=3).train)
    assert name in str(error.value)


def test_what_is_loaded_in_parts(tmp_path):
    def decided(adapter=None, **train) -> bool:
        config = settings(tmp_path, **train)
        return shards_at_load(config.train, config.students[0].model_copy(update={"adapter": adapter}))

    assert decided(zero_stage=3) and decided(zero_stage=3, offload_params="cpu")
    assert not decided(zero_stage=2)
    assert not decided(zero_stage=3, adapter="any")
