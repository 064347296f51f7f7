"""How fast does one GPU sample traces and distributions from an R1-style mixture of experts, and score sequences?

    python benchmarks/bench_teacher.py            # about five minutes on an H100; --quick: one minute
    python benchmarks/bench_teacher.py --dense    # a dense model of eight billion parameters instead
    python -m benchmarks.bench_teacher --gpus 2   # the model split over the GPUs of this host

The model has the architecture of DeepSeek-V3 at 15.8 billion parameters (hidden 2048, 27 layers, 64 experts of which 6
answer a token, latent rank 512, vocabulary 129,280), with random weights of standard deviation 0.02, so that routing is
balanced; its samples mean nothing, its speed does. Prompts of 512 tokens, 512 new tokens each, no stop token.

Rows. decode_tokens_per_s/bN: N rows, traces and distributions (top 64, exact tail) together; decode_no_capture_...: the
traces alone. Both leave the prefill out: the time of a run with 512 new tokens minus that of a run with one.
decode_share_of_limit/bN: of what reading once per step every weight that is used and every cached latent would allow,
at the bandwidth of a copy on this device. score_tokens_per_s: 4 sequences of 4,096 tokens, top 64 of every position.
.../fp8: the routed experts are kept in block-scaled FP8.
"""

import argparse
import time

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm, DeepseekV3TopkRouter

from benchmarks.results_file import row, write
from benchmarks.teacher_fp8 import to_fp8
from distill.commit import commit
from distill.generate import Row
from distill.records import CaptureSpec, SampleRequest, SamplingParams
from teachers.runner import Runner
from teachers.running import Running
from teachers.sampler import PagedGenerator

BATCHES = (1, 8, 64, 256)
GOALS = {64: ">= 4400", 256: ">= 12000"}
PROMPT, NEW = 512, 512
CAPTURE = CaptureSpec(k_max=64, tail_bound=1e-3)
DRAW = {"temperature": 0.6, "top_p": 0.95}
SIZES = {
    "vocab_size": 129_280,
    "hidden_size": 2048,
    "intermediate_size": 10_944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 163_840,
    "bos_token_id": None,
    "eos_token_id": None,
}


def build(device: str) -> DeepseekV3ForCausalLM:
    """The model with random weights, made on the device."""
    model = random_model(DeepseekV3ForCausalLM, DeepseekV3Config(**SIZES), DeepseekV3RMSNorm, device)
    for module in model.modules():
        if isinstance(module, DeepseekV3TopkRouter):
            module.e_score_correction_bias = torch.zeros(SIZES["n_routed_experts"], device=device)
    return model


def random_model(kind: type[PreTrainedModel], config: PreTrainedConfig, norm: type, device: str) -> PreTrainedModel:
    """A model of that kind in bfloat16: weights of standard deviation 0.02, norms of 1, never on the host."""
    with torch.device("meta"):
        model = kind(config).to(torch.bfloat16)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    for module in model.modules():
        if isinstance(module, norm):
            module.weight.data.fill_(1)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval().requires_grad_(False)


def requests(count: int, seed: int = 0) -> list[SampleRequest]:
    ids = torch.randint(SIZES["vocab_size"], (count, PROMPT), generator=torch.Generator().manual_seed(seed)).tolist()
    return [SampleRequest(f"p{i}", 0, tuple(prompt), seed * 1000 + i) for i, prompt in enumerate(ids)]


def sampling_s(
    generator: PagedGenerator, batch: int, new: int, capture: CaptureSpec | None, draw: dict, seed: int = 0
) -> float:
    """Seconds for `batch` completions of `new` tokens, prefill included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    params = SamplingParams(**draw, max_new_tokens=new)
    samples = list(generator.sample(requests(batch, seed), params, capture))
    seconds = time.perf_counter() - start
    if len(samples) != batch or any(len(sample.completion_ids) != new for sample in samples):
        raise RuntimeError("not every row drew its tokens")
    if capture and any(len(sample.dists) != new for sample in samples):
        raise RuntimeError("not every token has its distribution")
    return seconds


def decode_rate(
    generator: PagedGenerator, batch: int, new: int, capture: CaptureSpec | None, draw: dict, seed: int = 0
) -> float:
    """Tokens a second of the decode steps of `batch` rows."""
    sampling_s(generator, batch, 3, capture, draw, seed)  # records the step
    first = min(sampling_s(generator, batch, 1, capture, draw, seed) for _ in range(2))
    return batch * (new - 1) / (sampling_s(generator, batch, new, capture, draw, seed) - first)


def copy_bytes_per_s(device: str) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 10 * source.nbytes / (start.elapsed_time(end) / 1000)


def limit_tokens_per_s(model: DeepseekV3ForCausalLM, batch: int, bytes_per_s: float) -> float:
    """Tokens a second if a step only read its weights and latents; experts that no token is sent to are not read."""
    routed = sum(p.nbytes for name, p in model.named_parameters() if ".mlp.experts." in name)
    rest = sum(p.nbytes for name, p in model.named_parameters() if ".mlp.experts." not in name)
    rest -= model.get_input_embeddings().weight.nbytes
    share = 1 - (1 - SIZES["num_experts_per_tok"] / SIZES["n_routed_experts"]) ** batch
    latents = batch * (PROMPT + NEW / 2) * SIZES["num_hidden_layers"] * 2 * (SIZES["kv_lora_rank"] + 64)
    return batch / ((rest + share * routed + latents) / bytes_per_s)


def score_rate(generator: PagedGenerator, batches: int) -> float:
    """Tokens a second scored, in batches of 4 x 4,096 tokens."""
    ids = torch.randint(SIZES["vocab_size"], (4 * batches, 4096), generator=torch.Generator().manual_seed(1)).tolist()
    pairs = [(one[:1], one[1:]) for one in ids]
    generator.score(pairs[:4], CAPTURE)
    start = time.perf_counter()
    generator.score(pairs, CAPTURE)
    return 4 * batches * 4096 / (time.perf_counter() - start)


def longest_context(generator: PagedGenerator, rows: int, steps: int) -> tuple[int, float]:
    """Tokens a row when `rows` rows fill the pool, and tokens a second of decode steps then, over random latents."""
    params = SamplingParams(**DRAW, max_new_tokens=1 << 20)
    with generator.rows() as loop:
        pool = loop.pool
        pool.states.normal_()
        tokens = (pool.capacity // rows) * pool.page_tokens - steps - 8
        for request in requests(rows):
            running = Running(Row(request, params, CAPTURE), loop.log.open(request), tokens=[1])
            running.pages, running.cached = pool.take(pool.capacity // rows), tokens
            loop._changed().append(0)
            loop.rows.append(running)
        for _ in range(4):
            loop.step()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            loop.step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    pool.states.zero_()
    return tokens + steps + 8, rows * steps / seconds


def transformers_rate(model: DeepseekV3ForCausalLM, batch: int) -> float:
    """Decode tokens a second of transformers' generate on the same weights."""
    ids = torch.tensor([request.prompt_ids for request in requests(batch)], device=model.device)
    seconds = {}
    for new in (2, 4, 24):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=True,
                       **DRAW, top_k=0, pad_token_id=0)  # fmt: skip
        torch.cuda.synchronize()
        seconds[new] = time.perf_counter() - start
    return batch * 20 / (seconds[24] - seconds[4])


def measure(quick: bool) -> list[dict]:
    """The rows of the result."""
    new, device = 96 if quick else NEW, "cuda"
    bytes_per_s = copy_bytes_per_s(device)
    model = build(device)
    rows = [row("copy_bandwidth", bytes_per_s / 1e12, "TB/s")]

    def add(*args, **kwargs) -> None:
        rows.append(row(*args, **kwargs))
        print(rows[-1]["name"], f"{rows[-1]['value']:.5g}", rows[-1]["unit"], flush=True)

    if not quick:
        add("transformers_generate_tokens_per_s/b64", transformers_rate(model, 64), "tokens/s", peer=True)
    runner = Runner(model)
    add("cache_bytes_per_token_per_layer", runner.latent_size * runner.embed.element_size(), "bytes", goal="<= 1152")
    for batch in BATCHES[2:] if quick else BATCHES:
        torch.cuda.empty_cache()
        generator = PagedGenerator(runner, batch, [], cache_tokens=batch * (PROMPT + NEW + 128))
        traces = decode_rate(generator, batch, new, None, DRAW)
        both = decode_rate(generator, batch, new, CAPTURE, DRAW)
        limit = limit_tokens_per_s(model, batch, bytes_per_s)
        add(f"decode_tokens_per_s/b{batch}", both, "tokens/s", goal=GOALS.get(batch))
        add(f"decode_no_capture_tokens_per_s/b{batch}", traces, "tokens/s")
        add(f"decode_share_of_limit/b{batch}", both / limit, "share")
        add(f"capture_share_of_step/b{batch}", 1 - both / traces, "share", goal="<= 0.05" if batch >= 64 else None)
        if batch >= 64:
            plain = decode_rate(generator, batch, new, CAPTURE, {"temperature": 1.0, "top_p": 1.0})
            add(f"decode_unfiltered_tokens_per_s/b{batch}", plain, "tokens/s")
            whole = batch * new / sampling_s(generator, batch, new, CAPTURE, DRAW)
            add(f"sample_with_prefill_tokens_per_s/b{batch}", whole, "tokens/s")
        del generator
    torch.cuda.empty_cache()
    generator = PagedGenerator(runner, 16, [])
    add("score_tokens_per_s", score_rate(generator, 2 if quick else 6), "tokens/s", goal=">= 90000")
    tokens, rate = longest_context(generator, 16, 16)
    add("longest_context_tokens/b16", tokens, "tokens")
    add("decode_longest_context_tokens_per_s/b16", rate, "tokens/s")
    del generator
    to_fp8(model, runner)
    for batch in BATCHES[2:] if quick else BATCHES:
        torch.cuda.empty_cache()
        generator = PagedGenerator(runner, batch, [], cache_tokens=batch * (PROMPT + NEW + 128))
        add(f"decode_tokens_per_s/fp8/b{batch}", decode_rate(generator, batch, new, CAPTURE, DRAW), "tokens/s")
        del generator
    torch.cuda.empty_cache()
    add("score_tokens_per_s/fp8", score_rate(PagedGenerator(runner, 16, []), 2 if quick else 6), "tokens/s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="96 new tokens, batches 64 and 256, no peer; writes nothing"
    )
    parser.add_argument("--dense", action="store_true", help="a dense model in its place: see teacher_dense.py")
    parser.add_argument("--gpus", type=int, default=1, help="more than one: the model split over them")
    parser.add_argument("--ways", help="of --gpus: only these splits, 1x2: tensor parallel 1, expert parallel 2")
    parser.add_argument("--score", action="store_true", help="scoring and speculative decoding: see teacher_score.py")
    args, question = parser.parse_args(), (__doc__ or "").splitlines()[0]
    if args.gpus > 1:
        from benchmarks import teacher_ranks

        rows, what = teacher_ranks.measure(args.gpus, args.quick, args.ways), f"teacher-{args.gpus}gpu"
        question = (teacher_ranks.__doc__ or "").splitlines()[0]
    elif args.dense:
        from benchmarks import teacher_dense

        rows, what = teacher_dense.measure(args.quick), "teacher-dense"
    elif args.score:
        from benchmarks import teacher_score

        rows, what = teacher_score.measure(args.quick), "teacher-score"
        question = (teacher_score.__doc__ or "").splitlines()[0]
    else:
        rows, what = measure(args.quick), "teacher"
    if not args.quick:
        name = torch.cuda.get_device_name()  # "NVIDIA H100 80GB HBM3": the file is named after the second word
        print(write(what, question, rows, device=f"{name.split()[1].lower()}, {name}", commit=commit()))


if __name__ == "__main__":
    main()
