"""Whether two student tokens can stand side by side: a boundary between them exists only if encoding keeps it.

The student's tokenizer would have merged " h" and "el"; so where its text shows a boundary behind " h", the teacher's
next token cannot have begun with "el". Answers are found by encoding the two together, and remembered.
"""

import numpy as np

from distill.align_bytes import ByteTokenizer
from distill.align_words import WordCuts

REMEMBERED_BITS = 22  # 4 million pairs, 36 MB
PAIRS_PER_CALL = 4096


class PairMask:
    """valid(before, after) for arrays of student ids, with a memory of fixed size (the newest of a slot stays).

    counts: pairs asked for, those that the word rule did not answer, those that were not remembered either.
    """

    def __init__(self, student: ByteTokenizer, bits: int = REMEMBERED_BITS):
        self._student, self._shift = student, np.uint64(64 - bits)
        self._keys = np.full(1 << bits, -1, np.int64)
        self._answers = np.zeros(1 << bits, bool)
        self._words = WordCuts(student)
        self.counts = np.zeros(3, np.int64)

    def valid(self, before_N: np.ndarray, after_N: np.ndarray) -> np.ndarray:
        """bool [N]: before and after are what the bytes of both together are encoded to."""
        answers_N = self._words.cut(before_N, after_N)
        open_ = np.flatnonzero(~answers_N)
        keys = before_N[open_].astype(np.int64) << 32 | after_N[open_]
        slots = self._slots(keys)
        answers = self._answers[slots]
        unknown = np.flatnonzero(self._keys[slots] != keys)
        if len(unknown):
            keys_U, inverse = np.unique(keys[unknown], return_inverse=True)
            answers_U = self._encode(keys_U >> 32, keys_U & 0xFFFFFFFF)
            slots_U = self._slots(keys_U)
            self._keys[slots_U], self._answers[slots_U] = keys_U, answers_U
            answers[unknown] = answers_U[inverse]
        answers_N[open_] = answers
        self.counts += np.array([len(before_N), len(open_), len(unknown)])
        return answers_N

    def _slots(self, keys: np.ndarray) -> np.ndarray:
        return (keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> self._shift

    def _encode(self, before_U: np.ndarray, after_U: np.ndarray) -> np.ndarray:
        texts, valid_U, rest = self._student.texts_V, np.zeros(len(before_U), bool), []
        for first in range(0, len(before_U), PAIRS_PER_CALL):
            pairs = list(zip(before_U[first:][:PAIRS_PER_CALL].tolist(), after_U[first:][:PAIRS_PER_CALL].tolist()))
            joined = [None if texts[a] is None or texts[b] is None else texts[a] + texts[b] for a, b in pairs]
            plain = np.array([first + i for i, text in enumerate(joined) if text is not None], np.int64)
            rest += [first + i for i, text in enumerate(joined) if text is None]
            if len(plain):
                valid_U[plain], unsure = self._encode_plain(
                    before_U[plain], after_U[plain], [text for text in joined if text is not None]
                )
                rest += plain[unsure].tolist()
        valid_U[rest] = self._encode_bytes([(int(before_U[u]), int(after_U[u])) for u in rest])
        return valid_U

    def _encode_plain(
        self, before_U: np.ndarray, after_U: np.ndarray, texts: list[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(whether they stay two; whether only what stands before the boundary came out as other tokens)."""
        ids_N, first_U, last_U = self._student.encode_texts(texts)
        ends_U = (last_U - first_U > 1) & (ids_N[last_U - 1] == after_U)
        valid_U = ends_U & (last_U - first_U == 2) & (ids_N[first_U] == before_U)
        return valid_U, ends_U & ~valid_U

    def _encode_bytes(self, pairs: list[tuple[int, int]]) -> list[bool]:
        """For any two. A token that its own bytes do not give (its context did) counts as what they do give."""
        table = self._student.bytes_V
        both = self._student.encode_pieces([table[a] + table[b] for a, b in pairs])
        alone = self._student.encode_pieces([table[a] for a, _ in pairs])
        return [ids.tolist() in ([a, b], [*first.tolist(), b]) for (a, b), ids, first in zip(pairs, both, alone)]
