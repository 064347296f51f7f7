"""A checkpoint is accepted only when whole; every refusal names the file and what to do."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.checkpoints import check_checkpoint, fingerprint_checkpoint, read_header
from distill.errors import ModelError

INDEX = "model.safetensors.index.json"
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    """Two shards of two and one tensors, with their index."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8}))
    generator = torch.Generator().manual_seed(0)
    save_file(
        {name: torch.randn(8, 4, generator=generator) for name in ("embed", "head")},
        path / A,
        metadata={"format": "pt"},
    )
    save_file({"norm": torch.ones(4, dtype=torch.bfloat16)}, path / B)
    (path / INDEX).write_text(json.dumps({"weight_map": {"embed": A, "head": A, "norm": B}}))
    return path


def refusal(path) -> str:
    with pytest.raises(ModelError) as error:
        check_checkpoint(path)
    assert error.value.remedy
    return str(error.value)


def test_a_whole_checkpoint_gives_its_config(folder):
    assert check_checkpoint(folder) == {"model_type": "llama", "vocab_size": 8}


def test_one_file_needs_no_index(folder):
    (folder / INDEX).unlink()
    (folder / A).rename(folder / "model.safetensors")
    assert check_checkpoint(folder)["vocab_size"] == 8


@pytest.mark.parametrize("kept_bytes", [0, 5, 60, -1])
def test_a_cut_shard_is_named_with_its_size(folder, kept_bytes):
    data = (folder / A).read_bytes()
    (folder / A).write_bytes(data[:kept_bytes])
    message = refusal(folder)
    assert str(folder / A) in message and f"{len(data[:kept_bytes])} bytes" in message


def test_trailing_bytes_are_refused(folder):
    with (folder / B).open("ab") as stream:
        stream.write(b"\0")
    assert str(folder / B) in refusal(folder)


@pytest.mark.parametrize(
    "header", [b"{not json", b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', b"[1]"]
)
def test_a_header_that_makes_no_sense_is_refused(folder, header):
    (folder / B).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert str(folder / B) in refusal(folder)


def test_missing_shard_and_missing_tensor_are_named(folder):
    index = {"weight_map": {"embed": A, "head": A, "norm": B, "bias": A}}
    (folder / INDEX).write_text(json.dumps(index))
    assert "'bias'" in refusal(folder) and str(folder / A) in refusal(folder)
    (folder / A).unlink()
    assert str(folder / A) in refusal(folder)


def test_an_index_cannot_point_outside_the_folder(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"embed": "../elsewhere.safetensors"}}))
    assert INDEX in refusal(folder)


def test_pickled_weights_are_refused_with_the_way_out(folder):
    for file in (A, B, INDEX):
        (folder / file).unlink()
    assert "neither" in refusal(folder)
    torch.save({"embed": torch.zeros(2)}, folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin" in message and "Convert them to safetensors" in message


@pytest.mark.parametrize("content", [None, "{", "[]", '{"vocab_size": 8}'])
def test_a_bad_config_is_named(folder, content):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    assert "config.json" in refusal(folder)


def test_no_folder(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_header_gives_each_tensor(folder):
    assert {name: tensor["shape"] for name, tensor in read_header(folder / A).items()} == {
        "embed": [8, 4],
        "head": [8, 4],
    }


@pytest.mark.parametrize("whole_file_bytes", [1 << 30, 0], ids=["small", "large"])
def test_fingerprint_is_of_the_weights_not_of_the_place(folder, tmp_path, monkeypatch, whole_file_bytes):
    monkeypatch.setattr("distill.checkpoints.WHOLE_FILE_BYTES", whole_file_bytes)
    first = fingerprint_checkpoint(folder)
    assert len(first) == 16 and int(first, 16) >= 0
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint_checkpoint(tmp_path / "copy") == first
    weights = load_file(folder / A)
    weights["head"][3, 1] += 1e-3
    save_file(weights, folder / A, metadata={"format": "pt"})
    assert fingerprint_checkpoint(folder) != first


def test_torch_is_not_needed():
    import subprocess
    import sys

    code = "import sys, distill.checkpoints; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
