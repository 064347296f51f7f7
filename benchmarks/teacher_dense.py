"""The dense rows of bench_teacher: a model with the sizes of Qwen3-8B (36 layers, hidden 4096, 32 query heads on 8
key-value heads of 128, vocabulary 151,936) and random weights, on the same prompts and by the same clock."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from benchmarks import bench_teacher as teacher
from benchmarks.results_file import row
from teachers.dense import DenseRunner
from teachers.sampler import PagedGenerator

SIZES = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
KEY_VALUE_BYTES = SIZES["num_hidden_layers"] * 2 * SIZES["num_key_value_heads"] * SIZES["head_dim"] * 2  # of a token


def build(device: str) -> Qwen3ForCausalLM:
    """The model with random weights, made on the device."""
    return teacher.random_model(Qwen3ForCausalLM, Qwen3Config(**SIZES), Qwen3RMSNorm, device)


def limit_tokens_per_s(model: Qwen3ForCausalLM, batch: int, bytes_per_s: float) -> float:
    """Tokens a second if a step only read its weights and the keys and values of its rows."""
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    cached = batch * (teacher.PROMPT + teacher.NEW / 2) * KEY_VALUE_BYTES
    return batch / ((weights + cached) / bytes_per_s)


def measure(quick: bool) -> list[dict]:
    """The rows of the result."""
    new, device = 96 if quick else teacher.NEW, "cuda"
    bytes_per_s = teacher.copy_bytes_per_s(device)
    model = build(device)
    rows = [row("copy_bandwidth", bytes_per_s / 1e12, "TB/s")]

    def add(name: str, value: float, unit: str, **how) -> None:
        what, slash, batch = name.partition("/")
        rows.append(row(f"{what}/dense-8b{slash}{batch}", value, unit, **how))
        print(rows[-1]["name"], f"{rows[-1]['value']:.5g}", rows[-1]["unit"], flush=True)

    if not quick:
        for batch in teacher.BATCHES[:3]:
            rate = teacher.transformers_rate(model, batch)
            add(f"transformers_generate_tokens_per_s/b{batch}", rate, "tokens/s", peer=True)
            torch.cuda.empty_cache()
    runner = DenseRunner(model)
    add("cache_bytes_per_token_per_layer", runner.entry_size * runner.embed.element_size(), "bytes")
    for batch in teacher.BATCHES:
        torch.cuda.empty_cache()
        generator = PagedGenerator(runner, batch, [], cache_tokens=batch * (teacher.PROMPT + teacher.NEW + 128))
        both = teacher.decode_rate(generator, batch, new, teacher.CAPTURE, teacher.DRAW)
        add(f"decode_tokens_per_s/b{batch}", both, "tokens/s")
        add(f"decode_share_of_limit/b{batch}", both / limit_tokens_per_s(model, batch, bytes_per_s), "share")
        if batch >= 64:
            traces = teacher.decode_rate(generator, batch, new, None, teacher.DRAW)
            add(f"decode_no_capture_tokens_per_s/b{batch}", traces, "tokens/s")
            add(f"capture_share_of_step/b{batch}", 1 - both / traces, "share", goal="<= 0.05")
        del generator
    torch.cuda.empty_cache()
    generator = PagedGenerator(runner, 16, [])
    add("score_tokens_per_s", teacher.score_rate(generator, 2 if quick else 6), "tokens/s")
    tokens, rate = teacher.longest_context(generator, 16, 16)
    add("longest_context_tokens/b16", tokens, "tokens")
    add("decode_longest_context_tokens_per_s/b16", rate, "tokens/s")
    return rows
