"""Multi-token prediction modules with random weights, as checkpoints keep them, and models of DeepSeek-V3 for them."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sampling_models import deepseek
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

WIDE = {"qk_rope_head_dim": 16, "kv_lora_rank": 32, "v_head_dim": 16, "qk_nope_head_dim": 16}  # sizes of a GPU's tiles


def module(model: nn.Module, seed: int = 1) -> nn.Module:
    """The next layer after the model's last, with random weights; its head is spread as the model's is."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    size, eps = config.hidden_size, config.rms_norm_eps
    layer = DeepseekV3DecoderLayer(config, config.num_hidden_layers)
    layer.enorm, layer.hnorm = DeepseekV3RMSNorm(size, eps), DeepseekV3RMSNorm(size, eps)
    layer.eh_proj = nn.Linear(2 * size, size, bias=False)
    layer.shared_head = nn.ModuleDict({"norm": DeepseekV3RMSNorm(size, eps)})
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.08, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
        layer.shared_head["norm"].weight.copy_(model.base_model.norm.weight)
    return layer.eval().requires_grad_(False)


def spread(width: float, **changes) -> nn.Module:
    """A model whose final norm is `width`: 12 makes entropies like a trained model's, 0.1 nearly uniform distributions,
    of which two models draw the same token most of the time when they share the random number."""
    model = deepseek(**WIDE, **changes)
    model.base_model.norm.weight.data.fill_(width)
    return model


def add_to(folder: Path, layer: nn.Module, number: int) -> Path:
    """Writes the module into a saved checkpoint as layer `number`, under the names of DeepSeek-R1's files."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in layer.state_dict().items():
        stem = f"model.layers.{number}.{name}"
        if name == "mlp.experts.gate_up_proj":
            for i, expert in enumerate(tensor):
                for part, half in zip(("gate_proj", "up_proj"), expert.chunk(2)):
                    tensors[f"model.layers.{number}.mlp.experts.{i}.{part}.weight"] = half.contiguous()
        elif name == "mlp.experts.down_proj":
            for i, expert in enumerate(tensor):
                tensors[f"model.layers.{number}.mlp.experts.{i}.down_proj.weight"] = expert.contiguous()
        else:
            tensors[stem] = tensor
    tensors[f"model.layers.{number}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    tensors[f"model.layers.{number}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder
