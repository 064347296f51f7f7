"""A tiny tokenizer, model, trace set and settings, made on the fly; shared by tests and the processes they launch."""

import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from distill.cache_format import CacheHeader
from distill.config import Config
from distill.logit_cache import CacheWriter
from distill.records import Prompt, TokenDists, Trace, Verdict
from distill.store import RunFolder, StageFolder
from distill.tokens import encode_completion, end_id, fingerprint, load_tokenizer, render_prompt
from distill.traceset import write_traces

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}"
    "<|assistant|><think>\n{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
CORPUS = [f"What is {a} + {b}? First {a} and {b} make {a + b}." for a in range(40) for b in range(0, 40, 7)]
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
}


@contextmanager
def files_of_at_most(size_bytes: int):
    """A disk that takes only the first bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def make_tokenizer(folder: Path, vocab_size: int = 330) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the chat tokens and template of the bundled models, saved to `folder` and loaded again."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=vocab_size - 6, initial_alphabet=alphabet, show_progress=False)
    )
    bpe.add_special_tokens(["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"])
    bpe.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return load_tokenizer(folder)


def make_model(
    folder: Path, *, family: str = "qwen3", tie: bool = True, seed: int = 0, vocab_size: int = 330, hidden: int = 32,
    layers: int = 2,
) -> Path:  # fmt: skip
    """A random model with its tokenizer; the head has 8 rows more than the tokenizer has ids."""
    tokenizer = make_tokenizer(folder, vocab_size)
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=len(tokenizer) + 8,
        hidden_size=hidden,
        intermediate_size=hidden * 3 // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        initializer_range=0.3 * (32 / hidden) ** 0.5,
        eos_token_id=end_id(tokenizer),
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        **extra,
    )
    model_class(config).save_pretrained(folder)
    return folder


def make_traces(tokenizer: PreTrainedTokenizerFast, count: int, seed: int = 0) -> list[Trace]:
    """Traces of different lengths; every fifth is dropped as wrong."""
    rng = np.random.default_rng(seed)
    traces = []
    for i in range(count):
        a, b = int(rng.integers(100)), i
        steps = " ".join(f"{a} and {b + j} make {a + b + j}." for j in range(int(rng.integers(1, 5))))
        text = f"{steps}</think>\n\\boxed{{{a + b}}}"
        prompt = Prompt(f"What is {a} + {b}?", str(a + b), "chain_sum")
        completion = [*encode_completion(tokenizer, text), end_id(tokenizer)]
        wrong = i % 5 == 4
        verdict, reason = (Verdict.WRONG, "wrong") if wrong else (Verdict.CORRECT, "")
        ids = render_prompt(tokenizer, prompt.text)
        traces.append(Trace(prompt, 0, i, ids, completion, text, "stop", verdict, not wrong, reason))
    return traces


def make_dists(completion_ids: list[int], vocab_size: int, seed: int) -> TokenDists:
    """Random true distributions on 1 to 6 tokens, the drawn one among them, with the exact rest."""
    rng = np.random.default_rng(seed)
    offsets, ids, logprobs, tails = [0], [], [], []
    for token in completion_ids:
        size = int(rng.integers(1, 7))
        support = [token, *[int(i) for i in rng.permutation(vocab_size) if i != token][: size - 1]]
        mass = rng.dirichlet(np.ones(size + 1))
        order = np.argsort(-mass[:-1])
        ids += [support[i] for i in order]
        logprobs += [float(np.log(mass[i])) for i in order]
        tails.append(mass[-1])
        offsets.append(len(ids))
    return TokenDists(
        np.array(offsets, np.int64),
        np.array(ids, np.int32),
        np.array(logprobs, np.float32),
        np.array(tails, np.float32),
        np.zeros(len(completion_ids), np.float32),
        np.array(completion_ids, np.int32),
    )


def make_stages(
    root: Path,
    tokenizer: PreTrainedTokenizerFast,
    traces: list[Trace],
    *,
    shards: int = 2,
    without: tuple[str, ...] = (),
    sampling: dict | None = None,
) -> tuple[StageFolder, StageFolder]:
    """Finished 2-traces and 3-logits; the sample keys in `without` have no distributions. sampling: as the manifest of
    the traces says that they were drawn."""
    run = RunFolder(root, "run", commit="test")
    spec = {"teacher": {"sampling": sampling}} if sampling else {}
    trace_stage, logit_stage = run.stage("traces").open(spec, {}), run.stage("logits").open({}, {})
    for i in range(shards):
        part, name = traces[i::shards], f"traces-{i:05d}"
        trace_stage.write_shard(f"{name}.parquet", lambda path, part=part: write_traces(path, part))
        logit_stage.write_shard(f"{name}.cache", lambda path, part=part: _write_cache(path, tokenizer, part, without))
    for stage in (trace_stage, logit_stage):
        stage.finish({}, fingerprints={"tokenizer": fingerprint(tokenizer)})
    run.release()
    return trace_stage, logit_stage


def _write_cache(path: Path, tokenizer: PreTrainedTokenizerFast, traces: list[Trace], without: tuple[str, ...]) -> None:
    header = CacheHeader("teacher", fingerprint(tokenizer), "template", len(tokenizer), k_max=6, tail_bound=0.0)
    writer = CacheWriter(path, header)
    for trace in traces:
        if trace.sample_key not in without:
            writer.append(trace.sample_key, make_dists(trace.completion_ids, len(tokenizer), trace.seed))
    writer.close()


def settings(path: Path, kind: str = "logits", adapter: dict | None = None, **train) -> Config:
    """A config with one student, "small". One optimizer step holds four rows of 96 tokens."""
    defaults = dict(epochs=2, max_seq_tokens=96, batch_tokens=384, micro_batch_tokens=384, lr=3e-3, zero_stage=0)
    defaults |= dict(checkpoint_steps=2, weight_decay=0.1, clip_norm=0.5, warmup_ratio=0.2)
    loss = {"kind": "logits", "alpha": 0.7} if kind == "logits" else {"kind": "response"}
    source = [{"kind": "jsonl", "path": "unused.jsonl"}]
    return Config.model_validate(
        {
            "run": {"name": "run", "seed": 3},
            "prompts": {"train": source, "eval": source},
            "teacher": {"path": "unused"},
            "students": [{"name": "small", "path": str(path), "loss": loss, "adapter": adapter}],
            "train": defaults | train,
            "tracking": {"wandb": "disabled"},
        }
    )


class Folder:
    """What train_student needs of its stage folder."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
