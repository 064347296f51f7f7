"""What share of a DeepSeek-R1 teacher's signal reaches Qwen3, Llama-3.1 and Gemma-3 students, how fast, how exactly?

    python -m benchmarks.bench_align

Tokenizers and texts: align_texts. Coverage is of the texts in the teacher's own tokenization; speed and bias are of
traces sampled from a 4-gram model over the teacher's tokens (align_chain), whose probabilities are known. Seconds are
those of one process on one core (CPU time), the pair mask empty at the start. Rows:

    tables_s/STUDENT                 reading both tokenizers not included
    covered_share/STUDENT/CLASS      positions that have a distribution
    positions_per_s_core/STUDENT     teacher ids and cached distributions to targets, at most 64 tokens, tail 0.001
    bias/STUDENT/aligned/PART/kK     cross-entropy of a fixed student to the targets, minus that to the text itself
                                     (classes of tokens by bucket), over the aligned positions, K stored tokens each

PART: exact = only strings that both hold; buckets; mask = and impossible neighbours ruled out; keep = and weighed by
how often the text agrees; whole_tail = keep, but the whole tail counted as other tokens; draws = keep, with DRAWS draws
in the place of the tail.
"""

import os

# One core: read by numpy and by the tokenizers when they are loaded.
os.environ |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}

import argparse
import platform
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.align_chain import StudentChain, TeacherChain
from benchmarks.align_texts import fetch_tokenizers, make_texts
from benchmarks.results_file import row, write
from distill.align import Aligner
from distill.align_bytes import ByteTokenizer
from distill.align_pairs import PairMask
from distill.align_report import coverage_rows as by_class
from distill.align_report import coverage_text, covered_share
from distill.align_spans import ALIGNED, INNER, KINDS, Alignment, align
from distill.align_tables import PairTables, build_tables
from distill.align_targets import BucketTargets, concatenate, make_targets
from distill.commit import commit
from distill.records import CaptureSpec, TokenDists
from distill.tokens import load_tokenizer

STUDENTS = ("qwen3", "llama3", "gemma3")
SUPPORTS = (8, 16, 64)
DRAWS = 4
CAPTURE = CaptureSpec(k_max=64, tail_bound=1e-3)
TRACES_PER_CALL = 200
GOAL_BIAS, GOAL_SPEED, GOAL_TABLES = "<= 0.0105", ">= 50000", "< 30"


def coverage_rows(name: str, aligner: Aligner, texts: dict[str, list[np.ndarray]]) -> list[dict]:
    """Shares of the positions with a distribution, by class of text, and of each kind."""
    by_kind = {kind: aligner.coverage(aligner.align(traces)) for kind, traces in texts.items()}
    counts = sum(by_kind.values())
    print(f"\nDeepSeek-R1 -> {name}\n{coverage_text(by_class(counts))}")
    rows = [row(f"covered_share/{name}/{c}", share, "share of positions") for c, share in covered_share(counts).items()]
    for kind, each in by_kind.items():
        rows.append(row(f"covered_share/{name}/text/{kind}", covered_share(each)["all"], "share of positions"))
    total = counts.sum()
    return rows + [row(f"kind_share/{name}/{KINDS[k]}", counts[k].sum() / total, "share of positions") for k in KINDS]


def speed_rows(name: str, aligner: Aligner, chain: TeacherChain, traces: list[np.ndarray]) -> list[dict]:
    """Positions per second of one core, and how large what comes out is."""
    dists = [chain.dists(ids, CAPTURE.k_max, CAPTURE.tail_bound) for ids in traces]
    support = sum(len(each.ids_S) for each in dists) / sum(map(len, dists))
    aligner.pairs = PairMask(aligner.student)
    made, positions, started = [], 0, time.process_time()
    for first in range(0, len(traces), TRACES_PER_CALL):
        alignment = aligner.align(traces[first : first + TRACES_PER_CALL])
        made.append(aligner.targets(alignment, dists[first : first + TRACES_PER_CALL], CAPTURE))
        positions += len(alignment)
    seconds = time.process_time() - started
    outcomes = sum(len(each.roots_E) for each in made)
    members = sum(int(aligner.tables.bucket_sizes_S[each.roots_E].sum()) for each in made)
    asked, not_by_rule, unremembered = (aligner.pairs.counts / positions).tolist()
    print(f"{name}: {positions} positions in {seconds:.1f} s; a position asks for {asked:.1f} neighbours, of which "
          f"{not_by_rule:.2f} not answered by the word rule, {unremembered:.2f} not remembered")  # fmt: skip
    return [
        row(f"positions_per_s_core/{name}", positions / seconds, "positions per s of CPU", goal=GOAL_SPEED),
        row(f"support/{name}", support, "teacher tokens per teacher position"),
        row(f"outcomes/{name}", outcomes / positions, "buckets per position"),
        row(f"members/{name}", members / positions, "student tokens in the buckets of a position"),
        row(f"target_bytes/{name}", 8 * outcomes / positions + 4 + 1 + 8 + 8, "bytes per position in memory"),
    ]


def contexts(alignment: Alignment) -> tuple[np.ndarray, np.ndarray]:
    """The student tokens one and two before each position of its trace, -1 for none."""
    place = np.arange(len(alignment)) - np.repeat(
        alignment.student_offsets_B1[:-1], np.diff(alignment.student_offsets_B1)
    )
    shifted = lambda by: np.where(place >= by, alignment.ids_N[np.arange(len(place)) - by], -1)  # noqa: E731
    return shifted(1), shifted(2)


def beyond_support(tables: PairTables, alignment: Alignment, dists: list[TokenDists], k: int) -> np.ndarray:
    """bool [N]: the teacher token was not among the k most likely, and none of those begins in the label's bucket.

    It is stored because it was drawn, so it would make the measurement compare a fine outcome with the coarse rest.
    """
    joined = concatenate(dists)
    sizes_T = np.diff(joined.offsets_T1)
    row_S = np.repeat(np.arange(len(sizes_T)), sizes_T)
    known_S = tables.piece_counts_T[joined.ids_S] > 0
    first_S = tables.root_S[tables.pieces_P[np.where(known_S, tables.offsets_T1[joined.ids_S], 0)]]
    label_T = np.zeros(len(sizes_T), np.int64)
    starts = alignment.depth_N == 0
    label_T[alignment.teacher_N[starts]] = tables.root_S[alignment.ids_N[starts]]
    shown_T = np.bincount(row_S, known_S & (first_S == label_T[row_S]), minlength=len(sizes_T))
    return ((sizes_T > k) & (shown_T == 1))[alignment.teacher_N] & starts


def bias(
    student: StudentChain, tables: PairTables, alignment: Alignment, targets: BucketTargets, wanted_N, to_rest_N
) -> tuple[float, float]:
    """(mean, its standard error) in nats over the wanted positions: cross-entropy to the target minus that to the text,
    both of the student's probabilities of buckets. to_rest_N: where the label counts as one of the rest."""
    before, before_two = contexts(alignment)
    row_E = np.repeat(np.arange(len(targets)), np.diff(targets.offsets_N1))
    label_E = targets.roots_E == tables.root_S[targets.label_N][row_E]
    used_E = wanted_N[row_E] & ~(label_E & to_rest_N[row_E])
    row_E, roots_E, label_E = row_E[used_E], targets.roots_E[used_E], label_E[used_E]
    q_E = np.exp(targets.logq_E[used_E].astype(np.float64))
    p_E = student.probability(before_two[row_E], before[row_E], roots_E)
    total = lambda values_E: np.bincount(row_E, values_E, minlength=len(targets))  # noqa: E731
    log_rest_N = np.log(np.maximum(1 - total(p_E), 1e-9))
    tail_N = np.where(to_rest_N, 1 - total(q_E), targets.tail_N)
    to_target_N = total(-q_E * np.log(p_E)) - tail_N * log_rest_N
    to_text_N = np.where(to_rest_N, -log_rest_N, total(-np.log(p_E) * label_E))
    difference = (to_target_N - to_text_N)[wanted_N]
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


def exact_tables(tables: PairTables, teacher: ByteTokenizer, student: ByteTokenizer) -> PairTables:
    """Tables that know only strings which both vocabularies hold: no buckets, no pieces."""
    whole_T = tables.piece_counts_T == 1
    piece_T = tables.pieces_P[np.where(whole_T, tables.offsets_T1[:-1], 0)]
    whole_T &= [student.bytes_V[p] == teacher.bytes_V[t] or m for t, (p, m) in enumerate(zip(piece_T, tables.marker_T))]
    return replace(
        tables,
        offsets_T1=np.concatenate([[0], np.cumsum(whole_T)]),
        pieces_P=piece_T[whole_T],
        nodes_P=np.arange(int(whole_T.sum()), dtype=np.int32),
        root_S=np.arange(len(student), dtype=np.int32),
    )


def capture(chain: TeacherChain, traces: list[np.ndarray]) -> dict[int, tuple[list[TokenDists], list[TokenDists]]]:
    """By support: what is stored of the traces, without and with draws."""
    found = {}
    for k in SUPPORTS:
        plain = [chain.dists(ids, k, 0.0) for ids in traces]
        found[k] = plain, [chain.dists(ids, k, 0.0, DRAWS, seed) for seed, ids in enumerate(traces)]
    return found


def bias_rows(name, aligner: Aligner, traces: list[np.ndarray], captured: dict, texts) -> list[dict]:
    """The parts of the method one by one, for several sizes of the stored support. captured: of the second half."""
    teacher, student, tables = aligner.teacher, aligner.student, aligner.tables
    seen = [ids for each in texts.values() for ids in each]
    own_texts = aligner.align(seen)
    corpus = [own_texts.trace(i) for i in range(len(seen))]
    by_bucket, by_token = StudentChain(corpus, tables.root_S), StudentChain(corpus, np.arange(len(student)))
    half = len(traces) // 2
    aligner.keep_P = aligner.count(aligner.align(traces[:half])).keep.shares()
    exact = exact_tables(tables, teacher, student)
    alignment, exact_alignment = aligner.align(traces[half:]), align(teacher, student, exact, traces[half:])
    rows = []
    for k, (dists, drawn) in captured.items():
        known = {"dists": dists, "capture": CaptureSpec(k_max=k, tail_bound=0.0)}
        parts = {"exact": make_targets(exact, exact_alignment, **known)}
        parts["buckets"] = make_targets(tables, alignment, **known)
        parts["mask"] = make_targets(tables, alignment, **known, pairs=aligner.pairs)
        parts["keep"] = make_targets(tables, alignment, **known, pairs=aligner.pairs, keep_P=aligner.keep_P)
        parts["whole_tail"] = replace(parts["keep"], **whole_tail(parts["keep"], alignment, dists))
        known = {"dists": drawn, "capture": CaptureSpec(k, 0.0, DRAWS), "pairs": aligner.pairs}
        parts["draws"] = make_targets(tables, alignment, **known, keep_P=aligner.keep_P)
        for part, targets in parts.items():
            fixed = (by_token, exact, exact_alignment) if part == "exact" else (by_bucket, tables, alignment)
            # Draws make up for what a support lacks, so there nothing has to be counted as one of the rest.
            rest_N = beyond_support(*fixed[1:], dists, k) & (part != "draws")
            mean, error = bias(*fixed, targets, targets.kind_N == ALIGNED, rest_N)
            goal = GOAL_BIAS if (part == "keep" and k == 64) or part == "draws" else None
            rows += bias_row(f"{name}/aligned/{part}/k{k}", mean, error, goal)
        inner_N = parts["keep"].kind_N == INNER
        rows += bias_row(
            f"{name}/inner/k{k}", *bias(by_bucket, tables, alignment, parts["keep"], inner_N, inner_N & False)
        )
    return rows


def whole_tail(targets: BucketTargets, alignment: Alignment, dists: list[TokenDists]) -> dict[str, np.ndarray]:
    """The fields of these targets that change when all of the tail is the rest's."""
    tail_N = np.where(targets.kind_N == ALIGNED, concatenate(dists).tail_T[alignment.teacher_N], targets.tail_N)
    factor_N = np.log(np.maximum(1 - tail_N, 1e-12)) - np.log(np.maximum(1 - targets.tail_N, 1e-12))
    return {"tail_N": tail_N, "logq_E": targets.logq_E + np.repeat(factor_N, np.diff(targets.offsets_N1))}


def bias_row(name: str, mean: float, error: float, goal: str | None = None) -> list[dict]:
    print(f"  bias {name:32s} {mean:+.4f} +- {error:.4f}")
    rows = [row(f"bias/{name}", mean, "nats", goal=goal)]
    return [*rows, row(f"bias_error/{name}", error, "nats, one standard error")]


def student_rows(
    name: str, teacher, path: Path, texts, chain: TeacherChain, traces: list, captured: dict
) -> list[dict]:
    """All rows of one student."""
    own = load_tokenizer(path)
    pair = ByteTokenizer(teacher), ByteTokenizer(own)
    started = time.process_time()
    build_tables(*pair)
    seconds = time.process_time() - started
    aligner = Aligner(teacher, own)
    shared = len(set(pair[0].id_of_bytes) & set(pair[1].id_of_bytes))
    rows = [
        row(f"tables_s/{name}", seconds, "s of CPU", goal=GOAL_TABLES),
        row(f"shared_strings/{name}", shared, "strings"),
    ]
    rows += coverage_rows(name, aligner, texts)
    rows += speed_rows(name, aligner, chain, traces)
    return rows + bias_rows(name, aligner, traces, captured, {k: v for k, v in texts.items() if k != "cjk_emoji"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/distill/bench_align").expanduser())
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=STUDENTS)
    parser.add_argument("--megabytes", type=float, default=0.6, help="of each of the five kinds of text")
    parser.add_argument("--tokens", type=int, default=300_000, help="sampled from the n-gram teacher")
    args = parser.parse_args()
    paths = fetch_tokenizers(args.folder)
    teacher = load_tokenizer(paths["deepseek"])
    own = ByteTokenizer(teacher)
    made = make_texts(args.folder, args.megabytes)
    texts = {kind: own.encode([text.encode() for text in each]) for kind, each in made.items()}
    chain = TeacherChain([ids for kind, each in texts.items() if kind != "cjk_emoji" for ids in each], own.stop_ids[0])
    traces = list(chain.sample(np.random.default_rng(0), args.tokens))
    captured = capture(chain, traces[len(traces) // 2 :])
    rows = [row("text_bytes", sum(len(t.encode()) for each in made.values() for t in each), "bytes")]
    for name in args.students:
        rows += student_rows(name, teacher, paths[name], texts, chain, traces, captured)
    question = "What share of a DeepSeek-R1 teacher's distributions reaches a student with another tokenizer, how fast "
    question += "and how exactly?"
    device = f"cpu{os.cpu_count()}, {platform.machine()}"
    print(write("align", question, rows, device=device, commit=commit()))


if __name__ == "__main__":
    main()
