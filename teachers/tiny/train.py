"""Train a bundled model from scratch: `python -m teachers.tiny.train teacher` (one GPU, minutes; no download).

Writes safetensors shards, tokenizer, recipe and loss curve to the model's folder; `python -m teachers.tiny.evaluate`
then measures it and writes the model card. Legend: B rows, L positions.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from distill.tokens import load_tokenizer
from teachers.tiny import corpus
from teachers.tiny.recipes import RECIPES, Recipe

HERE = Path(__file__).parent
ARCHITECTURES = {
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def build_model(recipe: Recipe, tokenizer) -> PreTrainedModel:
    """A freshly initialised bf16 model (router bias fp32) that fits the tokenizer, rows padded to a multiple of 64."""
    config_class, model_class = ARCHITECTURES[recipe.architecture]
    config = config_class(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.02,
        **recipe.geometry,
    )
    model = model_class(config).to(torch.bfloat16)
    for router in routers(model):
        router.e_score_correction_bias = router.e_score_correction_bias.float()
    return model


def routers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The router of every MoE layer, first layer first; empty for a dense model."""
    return [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]


class ExpertLoad:
    """Counts the tokens each expert receives: one row of `counts` for every MoE layer, read off the expert modules."""

    def __init__(self, model: PreTrainedModel):
        experts = [m for name, m in model.named_modules() if name.endswith("mlp.experts")]
        self.layers, self.experts = len(experts), getattr(model.config, "n_routed_experts", 0)
        self.counts = torch.zeros(self.layers, self.experts, device=model.device)
        for layer, module in enumerate(experts):
            module.register_forward_pre_hook(self._counter(layer))

    def _counter(self, layer: int):
        def count(_module, args):
            self.counts[layer] += torch.bincount(args[1].flatten(), minlength=self.experts)

        return count

    def share(self) -> torch.Tensor:
        """Load of each expert as a multiple of its fair load, [layers, experts]."""
        return self.counts / self.counts.mean(dim=1, keepdim=True)


class MasterAdamW:
    """AdamW on fp32 copies of bf16 weights: the model computes in what it will be stored in, updates lose no bits."""

    def __init__(self, model: PreTrainedModel, lr: float, weight_decay: float):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.weights]
        decayed = [m for m in self.masters if m.ndim > 1]
        plain = [m for m in self.masters if m.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-10, fused=self.weights[0].is_cuda)

    def step(self, lr: float) -> torch.Tensor:
        """Apply the gradients, clipped to norm 1, and clear them; returns the norm before clipping."""
        for master, weight in zip(self.masters, self.weights):
            master.grad = weight.grad.float()
            weight.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        return norm


def learning_rate(step: int, done: float, recipe: Recipe) -> float:
    """Linear warmup by steps, cosine to 1 % of the peak by `done`, the finished share of the training."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.lr * warmup * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * done)))


def balance(model: PreTrainedModel, load: ExpertLoad, update: float) -> None:
    """Lower the correction bias of overloaded experts, raise that of idle ones (DeepSeek-V3 report, section 2.1.2)."""
    for router, counts in zip(routers(model), load.counts):
        router.e_score_correction_bias += update * torch.sign(counts.mean() - counts)
    load.counts.zero_()


def train(
    recipe: Recipe, data: corpus.Corpus, steps: int, seed: int, device: str, limit_s: float = float("inf")
) -> tuple[PreTrainedModel, list[dict]]:
    """The trained model and its loss curve. `limit_s` ends the schedule early, at a low learning rate all the same."""
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(HERE / recipe.folder)
    model = build_model(recipe, tokenizer).to(device).train()
    optimizer, load = MasterAdamW(model, recipe.lr, recipe.weight_decay), ExpertLoad(model)
    curve, started = [], time.time()
    bar = tqdm(corpus.batches(data, recipe.batch_tokens, steps, seed), total=steps, desc=recipe.folder, mininterval=5)
    for step, (ids, labels) in enumerate(bar):
        elapsed_s = time.time() - started
        if elapsed_s > limit_s:
            break
        ids_BL, labels_BL = torch.from_numpy(ids).to(device), torch.from_numpy(labels).to(device)
        loss = model(input_ids=ids_BL, labels=labels_BL, use_cache=False).loss
        loss.backward()
        norm = optimizer.step(learning_rate(step, max(step / steps, elapsed_s / limit_s), recipe))
        if load.layers:
            worst = load.share().min() if step % 50 == 0 else None
            balance(model, load, recipe.bias_update)
        if step % 50 == 0:
            row = {"step": step, "loss": loss.item(), "grad_norm": norm.item(), "seconds": elapsed_s}
            if load.layers:
                row["least_loaded_expert"] = worst.item()
            curve.append(row)
            bar.set_postfix(loss=f"{row['loss']:.4f}")
    curve.append({"step": step, "loss": loss.item(), "seconds": time.time() - started})
    return model, curve


def save(model: PreTrainedModel, curve: list[dict], recipe: Recipe, facts: dict) -> Path:
    """The model's folder: weights in shards of at most 12 MB, and how they came to be in training.json."""
    folder = HERE / recipe.folder
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    model.save_pretrained(folder, max_shard_size="12MB")
    record = {"recipe": dataclasses.asdict(recipe), **facts, "curve": curve}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--docs", type=int, help="default: the recipe's")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="end the schedule by then")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    recipe = RECIPES[args.name]
    started = time.time()
    docs, steps = args.docs or recipe.docs, args.steps or recipe.steps
    data = corpus.build(recipe.style, HERE / recipe.folder, docs, args.seed, args.workers)
    corpus_s = time.time() - started
    model, curve = train(recipe, data, steps, args.seed, args.device, args.max_minutes * 60)
    facts = {
        "command": " ".join(["python -m teachers.tiny.train", *sys.argv[1:]]),
        "seed": args.seed,
        "steps": curve[-1]["step"] + 1,
        "docs": len(data),
        "corpus_tokens": len(data.tokens_S),
        "corpus_s": round(corpus_s, 1),
        "train_s": round(curve[-1]["seconds"], 1),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(json.dumps(facts), "->", save(model, curve, recipe, facts))


if __name__ == "__main__":
    main()
