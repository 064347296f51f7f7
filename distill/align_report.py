"""What share of the teacher's signal reaches a student with another tokenizer: positions by kind and by kind of text.

Shape legend: N student positions, B bytes of all traces.
"""

from __future__ import annotations

import re

import numpy as np

from distill.align_bytes import ByteTokenizer
from distill.align_spans import COVERED, KINDS, Alignment

# Later ones take bytes from earlier ones: a digit in a formula is a digit.
_CLASSES = {
    "code": rb"```.*?(?:```|\Z)|`[^`\n]+`",
    "latex": rb"\$\$.*?\$\$|\$[^$\n]+\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+(?:\{[^{}]*\})*",
    "digits": rb"[0-9]+",
    # Kana, Han, Hangul, their symbols and full-width forms, as UTF-8.
    "cjk": rb"(?:\xe2[\xba-\xbf]|[\xe3-\xe9][\x80-\xbf]|\xea[\xb0-\xbf]|[\xeb\xec][\x80-\xbf]|\xed[\x80-\x9e]"
    rb"|\xef[\xa4-\xab\xbc-\xbf])[\x80-\xbf]|\xf0[\xa0-\xaf][\x80-\xbf]{2}",
    # U+1F000-1FFFF, U+2600-27BF, joiners and presentation marks.
    "emoji": rb"\xf0\x9f[\x80-\xbf]{2}|\xe2[\x98-\x9e][\x80-\xbf]|\xe2\x80\x8d|\xef\xb8[\x8e\x8f]",
}
CLASSES = ("other", *_CLASSES)
_PATTERNS = [re.compile(pattern, re.DOTALL) for pattern in _CLASSES.values()]


def coverage(teacher: ByteTokenizer, alignment: Alignment, kind_N: np.ndarray) -> np.ndarray:
    """int64 [kinds, classes]: positions by kind (KINDS) and by what stands at their first byte that is no space
    (CLASSES). kind_N: those of the targets; an alignment does not know of uncovered positions. Counts add up."""
    text = teacher.join(alignment.teacher_ids_T)
    class_B = np.concatenate([classify(text[a:b].tobytes()) for a, b in _spans(teacher, alignment)] or [text])
    at_N = np.cumsum(alignment.lens_N) - alignment.lens_N
    at_N = at_N + ((alignment.lens_N > 1) & (text[at_N] == ord(" ")))
    joint = kind_N.astype(np.int64) * len(CLASSES) + class_B[at_N]
    return np.bincount(joint, minlength=len(KINDS) * len(CLASSES)).reshape(len(KINDS), len(CLASSES))


def classify(text: bytes) -> np.ndarray:
    """uint8 [B]: the index in CLASSES of every byte."""
    class_B = np.zeros(len(text), np.uint8)
    for number, pattern in enumerate(_PATTERNS, 1):
        for match in pattern.finditer(text):
            class_B[match.start() : match.end()] = number
    return class_B


def covered_share(counts: np.ndarray) -> dict[str, float]:
    """Share of the positions that have a distribution: of each class that occurs, and "all"."""
    covered, total = counts[: COVERED + 1].sum(0), counts.sum(0)
    shares = {name: covered[i] / total[i] for i, name in enumerate(CLASSES) if total[i]}
    return {"all": float(covered.sum() / max(total.sum(), 1))} | {name: float(share) for name, share in shares.items()}


def coverage_rows(counts: np.ndarray) -> list[dict]:
    """The counts as plain values: {"text": class, KIND: positions ..} of each class that occurs, and of "all"."""
    columns = [(name, counts[:, i]) for i, name in enumerate(CLASSES) if counts[:, i].sum()]
    columns.append(("all", counts.sum(1)))
    return [{"text": name} | {KINDS[k]: int(column[k]) for k in KINDS} for name, column in columns]


def coverage_text(rows: list[dict]) -> str:
    """A table to print, of coverage_rows: for each class of text the positions and the share of each kind."""
    lines = ["text      positions  covered  " + "  ".join(f"{name:>12s}" for name in KINDS.values())]
    for row in rows:
        counts = np.array([row[name] for name in KINDS.values()])
        shares = counts / max(counts.sum(), 1)
        cells = "  ".join(f"{share:12.2%}" for share in shares)
        lines.append(f"{row['text']:8s} {counts.sum():10d}  {shares[: COVERED + 1].sum():7.2%}  {cells}")
    return "\n".join(lines)


def _spans(teacher: ByteTokenizer, alignment: Alignment) -> list[tuple[int, int]]:
    """Where each trace's bytes begin and end."""
    ends_T = np.cumsum(teacher.lens_V[alignment.teacher_ids_T])
    edges = np.concatenate([[0], ends_T])[alignment.teacher_offsets_B1]
    return list(zip(edges[:-1].tolist(), edges[1:].tolist()))
