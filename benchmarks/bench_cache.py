"""How many bytes does a teacher token cost in the cache, and what does the student's loss lose by it?

    python -m benchmarks.bench_cache

On the distributions of a real 270M model over a real vocabulary of 262,144 tokens, for three kinds of text
(cache_texts.py). Rows of the text `traces` (what the model sampled itself, as traces are) carry no prefix; those of
`open` and `human` do. Peers are DistillKit's two recommended layouts on the same distributions (cache_peer.py).

- bytes_per_token: size of the closed file, everything in it, over its tokens. A peer's: its packed ids and values.
- mean_tail_mass: teacher mass outside the support as it lies in the file. quantisation_kl_nats: KL(given || read back)
  on the K + 1 outcomes of that support; a peer's: on its k, scaled to sum to 1.
- loss_gap_nats: |mean loss on the cache - mean dense forward KL| of a student, which is the same model with noise on
  its matrices. A peer's loss is its own: the stored masses scaled to sum to 1, over k outcomes.
- curve/...: bytes and tail mass of the same text at other tail bounds.
- write_tokens_per_s, read_tokens_per_s: CacheWriter.append of all traces to a file, closed and synced; CacheReader of
  all traces in random order; one thread, best of three.

What the models say is kept in --folder (cache_capture.py): a second run measures the cache alone. Delete it to repeat.
"""

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import cache_peer
from benchmarks.cache_capture import TEXTS, WIDE, Captured, captures
from benchmarks.results_file import row, write
from distill.cache_codec import prune
from distill.commit import commit
from distill.logit_cache import CacheHeader, CacheReader, CacheWriter, to_sparse_targets
from distill.losses.divergence import LOG_ZERO, dense_divergence
from distill.losses.sparse import SparseTargets, teacher_logits
from distill.records import CaptureSpec, TokenDists

CURVE = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
PREFIX = {"traces": "", "open": "open/", "human": "human/"}
GOALS = {
    "bytes_per_token": "<= 24", "mean_tail_mass": "< 5e-4", "quantisation_kl_nats": "< 1e-4",
    "loss_gap_nats": "<= 2e-3", "write_tokens_per_s": ">= 20000", "read_tokens_per_s": ">= 500000",
}  # fmt: skip
UNITS = {
    "bytes_per_token": "bytes/token", "mean_tail_mass": "probability", "quantisation_kl_nats": "nats",
    "loss_gap_nats": "nats", "write_tokens_per_s": "tokens/s", "read_tokens_per_s": "tokens/s",
    "support_tokens": "tokens", "support_tokens_median": "tokens", "entropy_nats": "nats", "dense_loss_nats": "nats",
    "tokens": "tokens",
}  # fmt: skip


def header_of(spec: CaptureSpec, vocab_size: int) -> CacheHeader:
    return CacheHeader("0" * 16, "0" * 16, "0" * 16, vocab_size, spec.k_max, spec.tail_bound, min_mass=spec.min_mass)


def narrow(wide: TokenDists, spec: CaptureSpec) -> TokenDists:
    """What capture_support would have kept under a smaller `spec`."""
    sizes_T, starts_T = np.diff(wide.offsets_T1), wide.offsets_T1[:-1]
    token_S, masses_S = np.repeat(np.arange(len(wide)), sizes_T), np.exp(wide.logprobs_S.astype(np.float64))
    left_S = np.cumsum(masses_S[::-1])[::-1] - masses_S  # after this entry, and of all later tokens
    ends_T = np.append(left_S[starts_T[1:]] + masses_S[starts_T[1:]], 0)
    left_S += wide.tail_T.astype(np.float64)[token_S] - ends_T[token_S]
    place_S = np.arange(len(token_S)) - starts_T[token_S]
    count_T = np.minimum(np.add.reduceat(left_S > spec.tail_bound, starts_T, dtype=np.int64) + 1, spec.k_max)
    sampled_S = wide.ids_S == wide.sampled_T[token_S]
    missing_T = np.add.reduceat(sampled_S & (place_S < count_T[token_S]), starts_T, dtype=np.int64) == 0
    others_T = np.where(missing_T, np.minimum(count_T, spec.k_max - 1), count_T)
    keep_S = (place_S < others_T[token_S]) | sampled_S
    tail_T = wide.tail_T + np.add.reduceat(np.where(keep_S, 0, masses_S), starts_T)
    offsets_T1 = np.append(0, np.cumsum(np.add.reduceat(keep_S, starts_T, dtype=np.int64)))
    return TokenDists(
        offsets_T1, wide.ids_S[keep_S], wide.logprobs_S[keep_S], tail_T.astype(np.float32), wide.logsumexp_T,
        wide.sampled_T,
    )  # fmt: skip


def keys_of(dists: TokenDists) -> np.ndarray:
    """int64 [S]: token and id in one number."""
    return np.repeat(np.arange(len(dists)), np.diff(dists.offsets_T1)) << 32 | dists.ids_S


def divergence(given: TokenDists, found: TokenDists) -> np.ndarray:
    """KL(given || found) [T] on the K + 1 outcomes, both scaled to sum to 1; nats, float64."""
    outcomes = []
    for dists in (given, found):
        order_S = np.argsort(keys_of(dists))
        masses_S = np.exp(dists.logprobs_S[order_S].astype(np.float64))
        tail_T = np.maximum(dists.tail_T.astype(np.float64), 1e-30)
        total_T = np.add.reduceat(masses_S, dists.offsets_T1[:-1]) + tail_T
        outcomes.append((masses_S / np.repeat(total_T, np.diff(dists.offsets_T1)), tail_T / total_T))
    (true_S, rest_T), (stored_S, stored_rest_T) = outcomes
    inside_T = np.add.reduceat(true_S * np.log(true_S / stored_S), given.offsets_T1[:-1])
    return inside_T + rest_T * np.log(rest_T / stored_rest_T)


def cached_loss(found: TokenDists, one: Captured) -> np.ndarray:
    """Forward KL [T] of the student on the K + 1 outcomes of what was read back; nats, float64."""
    wide_S = keys_of(one.wide)
    order_S = np.argsort(wide_S)
    student_S = one.student_S[order_S[np.searchsorted(wide_S[order_S], keys_of(found))]]
    ids_TK, logprobs_TK, tail_T = to_sparse_targets(found)
    student_TK = np.full(ids_TK.shape, LOG_ZERO)
    student_TK[logprobs_TK > -np.inf] = student_S
    student_rest_T1 = np.log(np.maximum(1 - np.exp(student_TK).sum(1, keepdims=True), 1e-12))
    teacher_TK1 = teacher_logits(SparseTargets(*map(torch.from_numpy, (ids_TK, logprobs_TK, tail_T))), torch.float64)
    outcomes_TK1 = torch.from_numpy(np.concatenate([student_TK, student_rest_T1], 1))
    return dense_divergence("forward_kl", outcomes_TK1, teacher_TK1).numpy()


def file_figures(traces: dict[str, TokenDists], header: CacheHeader, times: int) -> tuple[dict, dict[str, TokenDists]]:
    """Bytes a token of a closed file of all traces, tokens/s of writing and of reading it; and what was read."""
    tokens, write_s, read_s = sum(map(len, traces.values())), [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(times):
            path, start = Path(folder) / f"{turn}.cache", time.perf_counter()
            with CacheWriter(path, header) as writer:
                for key, dists in traces.items():
                    writer.append(key, dists)
            write_s.append(time.perf_counter() - start)
            order, start = np.random.default_rng(turn).permutation(list(traces)), time.perf_counter()
            with CacheReader(path) as reader:
                found = {key: reader[key] for key in order}
            read_s.append(time.perf_counter() - start)
        size = path.stat().st_size
    figures = {
        "bytes_per_token": size / tokens,
        "write_tokens_per_s": tokens / min(write_s),
        "read_tokens_per_s": tokens / min(read_s),
    }
    return figures, found


def own_rows(prefix: str, text: dict[str, Captured], spec: CaptureSpec, vocab_size: int) -> list[dict]:
    """The cache's figures on one kind of text, and the curve of bytes against tail mass."""
    header = header_of(spec, vocab_size)
    given = {key: narrow(one.wide, spec) for key, one in text.items()}
    figures, found = file_figures(given, header, times=3)
    stored = {key: prune(dists, header.min_mass) for key, dists in given.items()}
    dense_T = np.concatenate([one.dense_T for one in text.values()])
    support_T = np.concatenate([np.diff(dists.offsets_T1) for dists in stored.values()])
    loss_T = np.concatenate([cached_loss(found[key], one) for key, one in text.items()])
    figures |= {
        "mean_tail_mass": np.concatenate([dists.tail_T for dists in stored.values()]).mean(dtype=np.float64),
        "quantisation_kl_nats": np.concatenate([divergence(stored[key], found[key]) for key in text]).mean(),
        "loss_gap_nats": abs(loss_T.mean() - dense_T.mean()),
        "support_tokens": support_T.mean(),
        "support_tokens_median": np.median(support_T),
        "entropy_nats": np.concatenate([one.entropy_T for one in text.values()]).mean(),
        "dense_loss_nats": dense_T.mean(),
        "tokens": len(dense_T),
    }
    goals = GOALS if prefix == "" else {}
    rows = [row(prefix + name, float(value), UNITS[name], goal=goals.get(name)) for name, value in figures.items()]
    for bound in CURVE:
        other = CaptureSpec(WIDE.k_max, bound)
        cut = {key: narrow(one.wide, other) for key, one in text.items()}
        size, found = file_figures(cut, header_of(other, vocab_size), times=1)
        tail = float(np.concatenate([dists.tail_T for dists in found.values()]).mean(dtype=np.float64))
        name = f"{prefix}curve/tail_bound={bound:g}"
        rows.append(row(f"{name}/bytes_per_token", size["bytes_per_token"], "bytes/token"))
        rows.append(row(f"{name}/mean_tail_mass", tail, "probability"))
    return rows


def peer_rows(prefix: str, text: dict[str, Captured], vocab_size: int) -> list[dict]:
    rows, dense = [], np.concatenate([one.dense_T for one in text.values()]).mean()
    for name, layout in cache_peer.LAYOUTS.items():
        true_Nk, student_Nk = (
            torch.from_numpy(np.concatenate([getattr(one, part)[:, : layout.k] for one in text.values()]))
            for part in ("top_Tk", "student_top_Tk")
        )
        stored_Nk = layout.stored(true_Nk)
        figures = {
            "bytes_per_token": layout.bytes_per_token(vocab_size),
            "mean_tail_mass": float(1 - true_Nk.double().exp().sum(1).mean()),
            "quantisation_kl_nats": float(cache_peer.divergence_on_support(true_Nk, stored_Nk).mean()),
            "loss_gap_nats": abs(float(cache_peer.loss(stored_Nk, student_Nk).mean()) - float(dense)),
        }
        rows += [row(f"{prefix}{key}/{name}", value, UNITS[key], peer=True) for key, value in figures.items()]
        if prefix == "":
            size = layout.bytes_per_token(129_280)
            rows.append(row(f"bytes_per_token/{name}/vocabulary=129280", size, "bytes/token", peer=True))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS)
    parser.add_argument("--k-max", type=int, default=1024)
    parser.add_argument("--tail-bound", type=float, default=1.2e-4)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-cache"), help="keeps the model and its samples")
    args = parser.parse_args()
    rows = []
    for name, text, vocab_size in captures(args.folder, args.texts):
        torch.set_num_threads(1)
        new = own_rows(PREFIX[name], text, CaptureSpec(args.k_max, args.tail_bound), vocab_size)
        new += peer_rows(PREFIX[name], text, vocab_size)
        print(*(f"{found['name']}: {found['value']:.4g} {found['unit']}" for found in new), sep="\n", flush=True)
        rows += new
    question = "How many bytes does a teacher token cost in the cache, and what does the student's loss lose by it?"
    print(write("cache", question, rows, device=f"cpu{os.cpu_count()}, {platform.machine()}", commit=commit()))


if __name__ == "__main__":
    main()
