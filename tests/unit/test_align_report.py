"""The coverage report by hand."""

import numpy as np
from align_world import byte_level, ids_of
from test_align_exact import random_merges
from test_align_targets import CAPTURE, dists_of, one_hot

from distill.align import Aligner
from distill.align_report import CLASSES, classify, coverage_rows, coverage_text, covered_share
from distill.align_spans import ALIGNED, INNER, UNCOVERED


def names(text: str) -> list[str]:
    raw = text.encode()
    at = [len(text[:i].encode()) for i in range(len(text))]
    return [CLASSES[c] for c in classify(raw)[at]]


def test_classes_of_characters():
    assert names("a1 $x+2$ b") == ["other", "digits", "other", *["latex"] * 3, "digits", "latex", "other", "other"]
    assert names("\\frac{a}{b}c") == ["latex"] * 11 + ["other"]
    assert names("`x`y") == ["code"] * 3 + ["other"]
    assert names("```\na\n``` z")[:9] == ["code"] * 9 and names("```\nopen") == ["code"] * 8
    assert names("\u4f60a\u3042\uac00") == ["cjk", "other", "cjk", "cjk"]
    assert names("x\U0001f600\u2705") == ["other", "emoji", "emoji"]
    assert names("\u00e9\u2013") == ["other", "other"]


def test_positions_are_counted_by_kind_and_by_the_character_behind_the_space():
    aligner = Aligner(byte_level([(b"1", b"2"), (b" ", b"7")]), byte_level([(b" ", b"7")], think=False))
    alignment = aligner.align([ids_of(aligner.teacher, b"a", b"12", b" 7", b"<|end|>"), ids_of(aligner.teacher, b"a")])
    counts = aligner.coverage(alignment)
    assert counts.sum() == 6
    assert counts[ALIGNED, CLASSES.index("digits")] == 2 and counts[INNER, CLASSES.index("digits")] == 1
    assert counts[ALIGNED, CLASSES.index("other")] == 3
    np.testing.assert_array_equal(aligner.coverage(aligner.align([])), 0 * counts)


def test_what_is_told_before_any_target_is_made_is_what_the_targets_have():
    uncovered = 0
    for seed in range(60):
        rng, alphabet = np.random.default_rng(seed), b"ab1 "
        sizes = rng.integers(1, 14, 2)
        aligner = Aligner(*(byte_level(random_merges(rng, alphabet, n), alphabet=alphabet) for n in sizes))
        text = [i for i in range(len(aligner.teacher)) if i not in aligner.teacher.markers]
        traces = [[*rng.choice(text, 12).tolist(), aligner.teacher.stop_ids[0]] for _ in range(10)]
        alignment = aligner.align(traces)
        targets = aligner.targets(alignment, [dists_of(one_hot(ids), ids) for ids in traces], CAPTURE)
        counts = aligner.coverage(alignment)
        np.testing.assert_array_equal(counts, aligner.coverage(alignment, targets.kind_N))
        uncovered += counts[UNCOVERED].sum()
    assert uncovered > 0


def test_shares_and_text():
    counts = np.zeros((6, len(CLASSES)), np.int64)
    counts[ALIGNED, 0], counts[INNER, 0], counts[2, 0], counts[ALIGNED, 3] = 6, 2, 2, 10
    assert covered_share(counts) == {"all": 0.9, "other": 0.8, CLASSES[3]: 1.0}
    rows = coverage_rows(counts)
    assert [row["text"] for row in rows] == ["other", CLASSES[3], "all"]
    assert rows[0]["aligned"] == 6 and rows[0]["inside"] == 2 and rows[2]["aligned"] == 16
    lines = coverage_text(rows).splitlines()
    assert len(lines) == 4 and lines[1].split()[:3] == ["other", "10", "80.00%"] and lines[3].split()[1] == "20"
