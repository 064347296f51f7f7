"""How fast does one GPU score, with and without common prompts, and what does drawing two tokens a step cost and bring?

The rows of bench_teacher that its --score asks for, on the model of bench_teacher. score_tokens_per_s: 4 sequences of
4,096 tokens a pass, top 64 of every position. score_tokens_per_s/shared_prompt: 16 completions of 512 tokens to one
prompt of 2,048, all tokens of all sequences counted; .../other_prompts: the same with prompts that differ.

speculative/...: with a multi-token prediction module of random weights, which knows nothing: accepted_share says how
often its guess was what the model drew, by chance. A step draws from two tokens of every row in the place of one;
step_cost is its time over that of a plain step, so a module that is right more often than step_cost - 1 saves time.
"""

import time

import torch
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from benchmarks import bench_teacher as teacher
from benchmarks.results_file import row
from teachers.mtp import MtpRunner
from teachers.runner import Runner
from teachers.sampler import PagedGenerator
from teachers.speculative import SpeculativeGenerator

PROMPT, COMPLETION, SEQUENCES = 2048, 512, 16
NEW = 192
UNFILTERED = {"temperature": 1.0, "top_p": 1.0}


def module(model: nn.Module) -> nn.Module:
    """A multi-token prediction module with random weights."""
    config, device = model.config, model.device
    size = config.hidden_size
    with torch.device("meta"):
        layer = DeepseekV3DecoderLayer(config, config.num_hidden_layers)
        layer.enorm, layer.hnorm = DeepseekV3RMSNorm(size), DeepseekV3RMSNorm(size)
        layer.eh_proj = nn.Linear(2 * size, size, bias=False)
        layer.shared_head = nn.ModuleDict({"norm": DeepseekV3RMSNorm(size)})
    layer.to(model.dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(2)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.02, generator=generator) if parameter.dim() > 1 else parameter.data.fill_(1)
    layer.mlp.gate.e_score_correction_bias = torch.zeros(config.n_routed_experts, device=device)
    return layer.eval().requires_grad_(False)


def shared_rate(generator: PagedGenerator, is_shared: bool) -> float:
    """Tokens a second of sequences to one prompt, or to prompts that differ in their first token."""
    draw = torch.Generator().manual_seed(3)
    ids = lambda n: tuple(torch.randint(teacher.SIZES["vocab_size"], (n,), generator=draw).tolist())  # noqa: E731
    prompt, completions = ids(PROMPT), [ids(COMPLETION) for _ in range(SEQUENCES)]
    pairs = [(prompt if is_shared else (i, *prompt[1:]), completion) for i, completion in enumerate(completions)]
    generator.score(pairs, teacher.CAPTURE)
    start = time.perf_counter()
    for _ in range(2):
        generator.score(pairs, teacher.CAPTURE)
    return 2 * SEQUENCES * (PROMPT + COMPLETION) / (time.perf_counter() - start)


def measure(quick: bool) -> list[dict]:
    """The rows of the result."""
    model, rows = teacher.build("cuda"), []

    def add(*args, **kwargs) -> None:
        rows.append(row(*args, **kwargs))
        print(rows[-1]["name"], f"{rows[-1]['value']:.5g}", rows[-1]["unit"], flush=True)

    runner = Runner(model)
    generator = PagedGenerator(runner, 16, [])
    add("score_tokens_per_s", teacher.score_rate(generator, 2 if quick else 6), "tokens/s", goal=">= 90000")
    add("score_tokens_per_s/shared_prompt", shared_rate(generator, True), "tokens/s")
    add("score_tokens_per_s/other_prompts", shared_rate(generator, False), "tokens/s")
    del generator
    guessing, new = MtpRunner(model, module(model)), 48 if quick else NEW
    for batch in (8, 64):
        how = {"cache_tokens": batch * (teacher.PROMPT + new + 128)}
        torch.cuda.empty_cache()
        plain = teacher.decode_rate(PagedGenerator(runner, batch, [], **how), batch, new, teacher.CAPTURE, UNFILTERED)
        torch.cuda.empty_cache()
        generator = SpeculativeGenerator(guessing, batch, [], **how)
        rate = teacher.decode_rate(generator, batch, new, teacher.CAPTURE, UNFILTERED)
        accepted = generator.right / generator.guessed
        add(f"speculative/decode_tokens_per_s/b{batch}", rate, "tokens/s")
        add(f"speculative/plain_decode_tokens_per_s/b{batch}", plain, "tokens/s")
        add(f"speculative/accepted_share/b{batch}", accepted, "share")
        add(f"speculative/step_cost/b{batch}", plain * (1 + accepted) / rate, "plain steps")
    return rows
