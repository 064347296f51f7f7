"""What the student benchmarks train: Qwen3 geometries with random weights, and rows with cached distributions."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

GEOMETRIES = {
    "1.7b": {"hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288, "num_attention_heads": 32,
           "tie_word_embeddings": False},
}  # fmt: skip
SHARED = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 131_072}
SUPPORT = 16


def make_model(size: str, attention: str):
    """The model in bfloat16 on this process's GPU, in train mode."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**{"tie_word_embeddings": True} | SHARED | GEOMETRIES[size])
    with torch.device("cuda"):
        model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return model.train()


def make_engine(size: str, ranks, rows: int, tokens: int, folder: Path, **settings):
    """(engine, model FLOP a token) of a student under DeepSpeed; `rows` rows of `tokens` tokens a step on each of its
    data-parallel ranks. settings: of the section train."""
    from distill.config import Train
    from students.attention import NAME
    from students.engine import StudentEngine
    from students.step import LossSettings, StudentStep

    model = make_model(size, NAME)
    flops = flops_per_token(model, tokens)
    sizes = {"max_seq_tokens": tokens, "micro_batch_tokens": tokens, "batch_tokens": rows * tokens}
    train = Train(lr=1e-5, **sizes, **settings)
    module = StudentStep(model, LossSettings(alpha=0.9))
    engine = StudentEngine(module, train, ranks, dtype=torch.bfloat16, micro_batches=rows, offload_dir=folder)
    return engine, flops


def flops_per_token(model, tokens: int) -> float:
    """6 a weight (embedding rows are only looked up, unless they are the head too) and causal attention."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters())
    weights -= 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens
    return 6 * weights + attention


def make_batch(tokens: int, vocabulary: int = SHARED["vocab_size"], seed: int = 0, traces: int = 1):
    """A row of `traces` traces of equal length, every token of it trained on 16 cached outcomes and a tail."""
    from distill.losses.sparse import SparseTargets
    from students.data import Batch

    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (tokens,), generator=draw)
    support = torch.randint(vocabulary // SUPPORT, (tokens, SUPPORT), generator=draw) * SUPPORT + torch.arange(SUPPORT)
    mass = torch.softmax(torch.randn(tokens, SUPPORT, generator=draw) * 3, 1) * 0.999
    targets = SparseTargets(support, mass.log(), 1 - mass.sum(1))
    every = torch.arange(tokens)
    each = tokens // traces
    return Batch(ids, every % each, [each] * traces, every, support[:, 0].contiguous(), targets, [])


def launched(module: str, gpus: int, *arguments: str, limit_s: float | None = None) -> list[dict]:
    """The JSON objects, one a line, that the ranks of `python -m MODULE ARGUMENTS` printed on so many GPUs.

    What came before a failure or the limit is returned too; the failure is printed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:  # a pipe of dead ranks stays open
        unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen([*command, "-m", module, *arguments], stdout=out, stderr=errors, env=unbuffered)
        try:
            failed = process.wait(limit_s) != 0
        except subprocess.TimeoutExpired:
            failed = False
            print(f"{gpus} GPUs: ended after {limit_s:.0f} s", flush=True)
            process.terminate()  # the launcher ends its ranks, which have sessions of their own
            process.wait()
        out.seek(0), errors.seek(0)
        lines, told = out.read().splitlines(), errors.read()
    if failed:
        causes = [line for line in told.splitlines() if re.search(r"\w+Error: ", line)]
        print(f"{gpus} GPUs: {causes[0] if causes else told[-500:]}", flush=True)
    return [json.loads(line) for line in lines if line.startswith("{")]
