"""What the bundled models learn from: worked solutions (teacher), direct answers and general skills (bases).

Documents are made by seed and chunk number alone, so the same command gives the same corpus on any number of processes.
"""

import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from distill.tasks import compiler, families, general
from distill.tasks.split import is_heldout
from distill.tokens import load_tokenizer, render_example

CHUNK_DOCS = 1000
# Share of general items (copying, sorting, spelling, single facts); the rest are problems of the reasoning families.
GENERAL_SHARE = {"worked": 0.2, "direct": 0.9}


@dataclass
class Corpus:
    """tokens_S: uint16, all documents end to end; starts_D1: int64 [D+1]; prompt_D: int32, tokens of each prompt."""

    tokens_S: np.ndarray
    starts_D1: np.ndarray
    prompt_D: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt_D)


@cache
def _tokenizer(path: str):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return load_tokenizer(path)


def document(style: str, rng: random.Random, seed: int) -> tuple[str, str, str] | None:
    """(prompt, reasoning, answer) of one training document, or None when the draw belongs to the held-out split."""
    if rng.random() < GENERAL_SHARE[style]:
        prompt = general.general_item(rng.choice(general.KINDS), rng)
        worked = compiler.Worked("", prompt.answer)
    else:
        family, level = rng.choice(families.FAMILIES), rng.choice((1, 2, 3))
        prompt = families.make_problem(family, level, seed, rng.randrange(families.MAX_INDEX))
        if prompt is None:
            return None
        worked = compiler.work_out(prompt, rng) if style == "worked" else compiler.Worked("", prompt.answer)
    if is_heldout(prompt):
        return None
    return prompt.text, worked.reasoning and f"{worked.reasoning}\n", f"\\boxed{{{worked.answer}}}"


def _chunk(chunk: int, *, style: str, tokenizer_path: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokenizer, rng = _tokenizer(tokenizer_path), random.Random(f"{seed}/{style}/{chunk}")
    tokens, lengths, prompts = [], [], []
    while len(lengths) < CHUNK_DOCS:
        doc = document(style, rng, seed)
        if doc is None:
            continue
        prompt_ids, completion_ids = render_example(tokenizer, *doc)
        tokens += prompt_ids + completion_ids
        lengths.append(len(prompt_ids) + len(completion_ids))
        prompts.append(len(prompt_ids))
    return np.array(tokens, np.uint16), np.array(lengths), np.array(prompts, np.int32)


def build(style: str, tokenizer_path: str | Path, docs: int, seed: int, workers: int) -> Corpus:
    """`docs` documents (rounded up to whole chunks) in the given style, "worked" or "direct"."""
    make = partial(_chunk, style=style, tokenizer_path=str(tokenizer_path), seed=seed)
    chunks = range(-(-docs // CHUNK_DOCS))
    with ProcessPoolExecutor(workers) as pool:
        parts = list(tqdm(pool.map(make, chunks), total=len(chunks), desc=f"corpus {style}", unit="k docs"))
    lengths = np.concatenate([p[1] for p in parts])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Corpus(np.concatenate([p[0] for p in parts]), starts, np.concatenate([p[2] for p in parts]))


def batches(corpus: Corpus, batch_tokens: int, steps: int, seed: int, multiple: int = 16):
    """Yield `steps` pairs (ids_BL, labels_BL) of int64 numpy arrays of about `batch_tokens` tokens.

    Documents of similar length share a batch (padded to a multiple): little is wasted. Prompts and padding are -100.
    """
    rng = np.random.default_rng(seed)
    lengths = np.diff(corpus.starts_D1)
    width_D = -(-lengths // multiple) * multiple
    plan: list[np.ndarray] = []
    while len(plan) < steps:
        order = rng.permutation(len(corpus))
        epoch = []
        for width in np.unique(width_D):
            members = order[width_D[order] == width]
            rows = max(1, batch_tokens // int(width))
            epoch += [members[i : i + rows] for i in range(0, len(members), rows) if len(members) - i >= rows // 2]
        rng.shuffle(epoch)
        plan += epoch
    for members in plan[:steps]:
        place_BL = np.arange(width_D[members[0]])[None, :]
        length_B1 = lengths[members, None]
        source_BL = np.minimum(corpus.starts_D1[members, None] + place_BL, len(corpus.tokens_S) - 1)
        ids_BL = np.where(place_BL < length_B1, corpus.tokens_S[source_BL], 0).astype(np.int64)
        trained_BL = (place_BL >= corpus.prompt_D[members, None]) & (place_BL < length_B1)
        yield ids_BL, np.where(trained_BL, ids_BL, -100)
