"""A checkpoint in DeepSeek-V3's block-scaled FP8, made from one in bfloat16."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK = (128, 128)
LARGEST = 448.0  # of e4m3
MATRICES = re.compile(r"\.(self_attn|mlp)\..*proj(_with_mqa)?\.weight$")


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 weights, float32 scales): in every block of 128 x 128 the largest magnitude becomes 448."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    quantised = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1])
            block = weight[place].float()
            scales[i, j] = block.abs().max().clamp(min=1e-12) / LARGEST
            quantised[place] = (block / scales[i, j]).to(torch.float8_e4m3fn)
    return quantised, scales


def quantised_copy(source: Path, folder: Path) -> Path:
    """`folder`, filled with the checkpoint in FP8: same files and index, a scale beside every matrix of the layers."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    weight_map = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(file).items():
            tensors[name] = tensor
            if MATRICES.search(name):
                tensors[name], tensors[name + "_scale_inv"] = quantise(tensor)
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    scheme = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(BLOCK)}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    return folder
