"""How closely a student follows its teacher, token by token, on completions the teacher wrote for held-out prompts.

The teacher's distributions are sparse (distill.records.TokenDists): true log-probabilities on a support and the exact
mass of everything else, so the divergence is taken over K + 1 outcomes; it never overstates the full one.

Legend: T tokens of one completion, C of them in a chunk, V vocabulary, S stored support entries of a chunk's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from distill.errors import DataError
from distill.evals import stats
from distill.evals.results import load_result
from distill.logit_cache import CacheReader
from distill.records import TokenDists
from distill.store import StageFolder

DIFFERENT_TOKENIZER = "different tokenizer"
POSITION_EDGES = (0, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_CHUNK_TOKENS = 256  # log-probabilities of a 152k vocabulary take 160 MB a chunk in fp32


@dataclass(frozen=True)
class TeacherTrace:
    """A completion the teacher wrote, with its distributions; n_bytes is the length of its text in UTF-8."""

    key: str
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    dists: TokenDists
    n_bytes: int


# [(prompt_ids, completion_ids)] -> for each, in order, logits or log-probabilities [T, V] of the completion's tokens.
StudentScore = Callable[[Sequence[tuple[Sequence[int], Sequence[int]]]], Iterable["torch.Tensor | np.ndarray"]]


def teacher_traces(folder: StageFolder, teacher: str, limit: int | None = None) -> list[TeacherTrace]:
    """Sample 0 of the first `limit` evaluation prompts, with the distributions captured while it was drawn."""
    shards = [s for s in folder.shards() if s.name.endswith(".cache") and s.info.get("name") == teacher]
    readers = [CacheReader(folder.check_shard(shard.name).path) for shard in shards]
    reader_of = {key: reader for reader in readers for key in reader.keys()}  # noqa: SIM118 (a reader is no dict)
    traces = []
    for row in load_result(folder, teacher).rows[:limit]:
        key, ids = f"{row['prompt_key']}/0", row["completion_ids"][0]
        if key not in reader_of:
            raise DataError(
                "no distributions were captured for this sample",
                where=str(folder.path),
                value=key,
                remedy="Pass --restart eval.",
            )
        n_bytes = len(row["generations"][0].encode())
        traces.append(TeacherTrace(key, row["prompt_ids"], ids, reader_of[key][key], n_bytes))
    return [trace for trace in traces if trace.completion_ids]


def dense_scorer(model: torch.nn.Module, batch_tokens: int = 8192) -> StudentScore:
    """A StudentScore of a transformers causal language model, on the device it is on, in evaluation mode meanwhile.

    Sequences are padded on the right to batches of at most batch_tokens: attention is causal, so padding changes
    nothing before it, and no logits but the completions' are kept.
    """

    @torch.no_grad()
    def score(sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[torch.Tensor]:
        device, was_training = next(model.parameters()).device, model.training
        model.eval()
        try:
            for batch in _batches(sequences, batch_tokens):
                rows = [torch.tensor([*prompt_ids, *completion_ids]) for prompt_ids, completion_ids in batch]
                ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
                lengths_B1 = torch.tensor([len(row) for row in rows], device=device)[:, None]
                mask_BL = torch.arange(ids_BL.shape[1], device=device) < lengths_B1
                logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=False).logits
                for (prompt_ids, completion_ids), logits_LV in zip(batch, logits_BLV):
                    first = len(prompt_ids) - 1  # the position that predicts the first completion token
                    yield logits_LV[first : first + len(completion_ids)]
        finally:
            model.train(was_training)

    return score


def _batches(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], batch_tokens: int) -> Iterator[list]:
    """The sequences in order, cut where another would make the padded batch too large."""
    batch: list = []
    longest = 0
    for sequence in sequences:
        length = sum(map(len, sequence))
        if batch and (len(batch) + 1) * max(longest, length) > batch_tokens:
            yield batch
            batch, longest = [], 0
        batch.append(sequence)
        longest = max(longest, length)
    if batch:
        yield batch


def agreement(
    student: str,
    traces: Sequence[TeacherTrace],
    student_score: StudentScore | None,
    *,
    teacher_fingerprint: str,
    student_fingerprint: str,
    confidence: float = 0.95,
) -> dict:
    """The report's row of one student; intervals are clustered by trace, tokens of one trace being dependent.

    kl_per_token and kl_per_byte: mean of KL(teacher || student) over K + 1 outcomes, in nats, at temperature 1. top1:
    share of tokens at which both find the same token most likely. by_position: the same for each range of positions in
    the completion. When the tokenizers differ nothing is scored (student_score may be None), every
    value is None and `reason` says so.
    """
    if teacher_fingerprint != student_fingerprint:
        return {"student": student, "reason": DIFFERENT_TOKENIZER} | dict.fromkeys(_VALUES) | {"by_position": []}
    if not traces:
        raise DataError("there is no teacher trace to measure agreement on", where="5-eval")
    measured = []
    scores = student_score([(trace.prompt_ids, trace.completion_ids) for trace in traces])
    for trace, student_TV in zip(traces, scores, strict=True):
        measured.append(token_agreement(student_TV, trace.dists, trace.key))
    return {"student": student, "reason": None, **_summary(traces, measured, confidence)}


_VALUES = ("kl_per_token", "kl_per_byte", "top1", "traces", "tokens")


def token_agreement(
    student_TV: torch.Tensor | np.ndarray, dists: TokenDists, where: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """(kl_T in nats, same_T: 1.0 where both have the same most likely token), float64, for one completion.

    kl = sum_K t log(t / p) + R log(R / S): t and p the two probabilities of a supported token, R and S the two masses
    outside the support. student_TV holds logits or log-probabilities, V at least the teacher's vocabulary.
    """
    if len(student_TV) != len(dists):
        found = f"{len(student_TV)} rows for {len(dists)} tokens"
        raise DataError("the student scored another number of tokens than the teacher wrote", where=where, value=found)
    if len(dists.ids_S) and int(dists.ids_S.max()) >= student_TV.shape[-1]:
        raise DataError("a teacher token is outside of the student's vocabulary", where=where, value=dists.ids_S.max())
    parts = [
        _chunk_agreement(torch.as_tensor(student_TV[start : start + _CHUNK_TOKENS]), dists, start)
        for start in range(0, len(dists), _CHUNK_TOKENS)
    ]
    kl_T, same_T = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    if not np.isfinite(kl_T).all():
        at = int(np.flatnonzero(~np.isfinite(kl_T))[0])
        raise DataError("the divergence is not finite", where=f"{where} token {at}", value=float(kl_T[at]))
    return kl_T, same_T


def _chunk_agreement(student_CV: torch.Tensor, dists: TokenDists, start: int) -> tuple[np.ndarray, np.ndarray]:
    stop = start + len(student_CV)
    offsets_C1 = dists.offsets_T1[start : stop + 1]
    device = student_CV.device
    counts_C = torch.as_tensor(np.diff(offsets_C1), device=device)
    row_S = torch.repeat_interleave(torch.arange(len(student_CV), device=device), counts_C)
    entries = slice(int(offsets_C1[0]), int(offsets_C1[-1]))
    ids_S = torch.as_tensor(dists.ids_S[entries].astype(np.int64), device=device)
    teacher_S = torch.as_tensor(dists.logprobs_S[entries], device=device).double()
    # Log-probabilities are logits too, so this is right for either; float32 rows, float64 sums over the support.
    student_CV = student_CV.float().log_softmax(-1)
    student_S = student_CV[row_S, ids_S].double()
    kl_C = torch.zeros(len(student_CV), dtype=torch.float64, device=device)
    kl_C.index_add_(0, row_S, teacher_S.exp() * (teacher_S - student_S))
    same_C = student_CV.argmax(-1) == ids_S[torch.as_tensor(offsets_C1[:-1] - offsets_C1[0], device=device)]
    rest_C = torch.as_tensor(dists.tail_T[start:stop], device=device).double()
    # logsumexp over what is off the support, not 1 - sum on it: exact however small the mass is.
    student_CV[row_S, ids_S] = -torch.inf
    log_rest_C = student_CV.logsumexp(-1).double()
    open_C = (rest_C > 0) & (counts_C < student_CV.shape[-1])
    kl_C[open_C] += rest_C[open_C] * (rest_C[open_C].log() - log_rest_C[open_C])
    return kl_C.cpu().numpy(), same_C.double().cpu().numpy()


def _summary(traces: Sequence[TeacherTrace], measured: list[tuple[np.ndarray, np.ndarray]], confidence: float) -> dict:
    kl = [kl_T for kl_T, _ in measured]
    same = [same_T for _, same_T in measured]
    n_bytes = np.array([trace.n_bytes for trace in traces])
    nats = np.array([kl_T.sum() for kl_T in kl])
    per_byte = stats.ratio_of_sums(nats, n_bytes, confidence, lowest=0.0)
    by_position = []
    for low, high in zip(POSITION_EDGES, (*POSITION_EDGES[1:], None)):
        row = _ratios([k[low:high] for k in kl], [s[low:high] for s in same], confidence)
        if row["tokens"]:
            by_position.append({"from": low, "to": high, **row})
    return {"kl_per_byte": _plain(per_byte), **_ratios(kl, same, confidence), "by_position": by_position}


def _ratios(kl: list[np.ndarray], same: list[np.ndarray], confidence: float) -> dict:
    tokens = np.array([len(kl_T) for kl_T in kl])
    per_token = stats.ratio_of_sums(np.array([k.sum() for k in kl]), tokens, confidence, lowest=0.0)
    top1 = stats.ratio_of_sums(np.array([s.sum() for s in same]), tokens, confidence, lowest=0.0, highest=1.0)
    counts = {"traces": per_token.n_problems, "tokens": per_token.n_samples}
    return {"kl_per_token": _plain(per_token), "top1": _plain(top1), **counts}


def _plain(estimate: stats.Estimate) -> dict:
    """JSON has no infinity: an end that is not known is None."""
    ends = [None if not np.isfinite(end) else float(end) for end in (estimate.low, estimate.high)]
    return {"value": float(estimate.value), "ci_low": ends[0], "ci_high": ends[1]}
