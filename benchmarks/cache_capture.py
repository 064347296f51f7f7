"""What bench_cache needs of the models, captured once and kept: wide supports, and the student on the same ids.

Shape legend: T tokens of a trace, C tokens of a chunk, E hidden, V vocabulary, S entries of the wide support, k top.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import cache_texts
from distill.losses.divergence import dense_divergence
from distill.records import CaptureSpec, TokenDists
from distill.sampling import StepLogits, capture_support
from distill.step_log import Tokens

WIDE = CaptureSpec(k_max=1024, tail_bound=1e-5)
TOP = 128  # of the peers
NOISE = 0.1  # of the student, in standard deviations of each matrix
CHUNK_TOKENS = 64
SAMPLED = {  # prompts, tokens of each row, seed
    "traces": lambda: (cache_texts.trace_prompts(5), 512, 0),
    "open": lambda: (cache_texts.open_prompts(), 256, 1),
}


@dataclass
class Captured:
    """One trace: the teacher's distributions under WIDE, the student's log-probabilities of the same entries, both for
    the TOP most likely tokens, and per token the teacher's entropy and the dense forward KL; nats."""

    wide: TokenDists
    student_S: np.ndarray
    top_Tk: np.ndarray
    student_top_Tk: np.ndarray
    entropy_T: np.ndarray
    dense_T: np.ndarray


TEXTS = ("traces", "open", "human")


def captures(folder: Path, names: Sequence[str] = TEXTS) -> Iterator[tuple[str, dict[str, Captured], int]]:
    """(name, traces by key, vocabulary size) of each kind of text; computed where `folder` has them not."""
    folder.mkdir(parents=True, exist_ok=True)
    models = None
    for name in names:
        path = folder / f"{name}.npz"
        if not path.exists():
            models = models or _models(folder)
            _save(path, [_capture(one, *models[:2]) for one in _rows(name, folder, *models[::2])], models[0])
        yield name, *_load(path)


def _models(folder: Path):
    """(teacher, student, tokenizer): the student is the teacher with noise on the matrices of its layers."""
    teacher, tokenizer = cache_texts.load_model(folder)
    student, generator = copy.deepcopy(teacher), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.model.layers.parameters():
            if parameter.ndim == 2:
                parameter += torch.randn(parameter.shape, generator=generator) * (NOISE * parameter.std())
    return teacher, student, tokenizer


def _rows(name: str, folder: Path, model, tokenizer) -> list[dict]:
    """Prompt and completion ids; what the model samples is kept too."""
    if name == "human":
        pieces = cache_texts.human_texts(tokenizer, rows=8, tokens=256)
        return [{"prompt_ids": ids[:1], "completion_ids": ids[1:]} for ids in pieces]
    path = folder / f"{name}.json"
    if not path.exists():
        prompts, tokens, seed = SAMPLED[name]()
        path.write_text(json.dumps(cache_texts.sample_rows(model, tokenizer, prompts, tokens, seed)))
    rows = json.loads(path.read_text())
    return [one | {"completion_ids": cache_texts.until_loop(one["completion_ids"])} for one in rows]


@torch.inference_mode()
def _capture(one: dict, teacher, student) -> Captured:
    prompt, sampled_T = one["prompt_ids"], torch.tensor(one["completion_ids"])
    ids = torch.tensor([prompt + one["completion_ids"]])
    hidden = [
        model.model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1].split(CHUNK_TOKENS)
        for model in (teacher, student)
    ]
    parts = [
        _capture_chunk(teacher.lm_head(teacher_CE), student.lm_head(student_CE), sampled_C)
        for teacher_CE, student_CE, sampled_C in zip(*hidden, sampled_T.split(CHUNK_TOKENS))
    ]
    tokens, *columns = zip(*parts)
    return Captured(Tokens.concatenate(list(tokens)).dists(), *(torch.cat(column).numpy() for column in columns))


def _capture_chunk(teacher_CV: Tensor, student_CV: Tensor, sampled_C: Tensor) -> tuple:
    tokens = Tokens.of(sampled_C.numpy(), capture_support(StepLogits(teacher_CV), sampled_C, WIDE))
    logp_CV, student_logp_CV = teacher_CV.log_softmax(-1), student_CV.log_softmax(-1)
    row_S = torch.repeat_interleave(torch.arange(len(sampled_C)), torch.from_numpy(tokens.support_N).long())
    top_Ck, ids_Ck = logp_CV.topk(TOP)
    return (
        tokens,
        student_logp_CV[row_S, torch.from_numpy(tokens.ids_S).long()],
        top_Ck,
        student_logp_CV.gather(1, ids_Ck),
        -(logp_CV.exp() * logp_CV).sum(-1),
        dense_divergence("forward_kl", student_CV, teacher_CV),
    )


def _save(path: Path, traces: list[Captured], model) -> None:
    arrays = {"vocab_size": np.array(model.config.vocab_size)}
    for number, one in enumerate(traces):
        parts = vars(one.wide) | {f.name: getattr(one, f.name) for f in fields(Captured) if f.name != "wide"}
        arrays |= {f"{number:016x}/0 {name}": values for name, values in parts.items()}
    np.savez(path, **arrays)


def _load(path: Path) -> tuple[dict[str, Captured], int]:
    arrays = np.load(path)
    traces: dict[str, dict] = {}
    for name in arrays.files:
        if " " in name:
            key, part = name.split(" ")
            traces.setdefault(key, {})[part] = arrays[name]
    wide = [f.name for f in fields(TokenDists)]
    found = {key: Captured(TokenDists(*(parts.pop(name) for name in wide)), **parts) for key, parts in traces.items()}
    return found, int(arrays["vocab_size"])
