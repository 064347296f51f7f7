"""Where a tokenizer's word rule alone answers whether two tokens can be neighbours.

Byte-level tokenizers first cut text into words, by a pattern over kinds of characters; nothing merges across such a
cut. So if "he" and " said" are cut apart, any two tokens of the same shapes (letters; a space and letters) are. Shapes
are compared once for each pair of them, by the tokenizer's own rule, and a sample of the answers is checked against
encoding; should the rule depend on more than shapes, nothing is answered here and all is left to encoding.

Shape legend: V ids of the vocabulary, N pairs.
"""

import re
import unicodedata
from functools import cache

import numpy as np

from distill.align_bytes import TEXTS_PER_CALL, ByteTokenizer

MAX_SHAPES = 4096
AUDITED_PAIRS = 20_000
_UNKNOWN, _CUT, _ASK = range(3)
# Besides blanks, signs that word rules know by name.
_OWN_KIND = {" ": " ", "\n": "r", "\r": "R", "\t": "t", "\v": "t", "\f": "t", "\x85": "t", "/": "/", "_": "_"}
_LETTERS = "ulkULTMO"
_CJK = re.compile("[\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff]")


class WordCuts:
    """cut(before, after): True where the word rule cuts between these two ids and changes neither."""

    def __init__(self, student: ByteTokenizer):
        self._student = student
        self._rule = student.word_rule
        self._shape_V, self._table = np.full(len(student), -1, np.int64), np.zeros((0, 0), np.uint8)
        if self._rule is not None:
            self._name_shapes()
            if not self._audit():
                self._shape_V[:] = -1

    def cut(self, before_N: np.ndarray, after_N: np.ndarray) -> np.ndarray:
        """bool [N]; False says nothing."""
        first_N, second_N = self._shape_V[before_N], self._shape_V[after_N]
        known = np.flatnonzero((first_N >= 0) & (second_N >= 0))
        found_N = np.zeros(len(before_N), bool)
        answers = self._table[first_N[known], second_N[known]]
        new = known[answers == _UNKNOWN]
        if len(new):
            _, where = np.unique(first_N[new] << 32 | second_N[new], return_index=True)
            for at in new[where].tolist():
                apart = self._is_cut(int(before_N[at]), int(after_N[at]))
                self._table[first_N[at], second_N[at]] = _CUT if apart else _ASK
            answers = self._table[first_N[known], second_N[known]]
        found_N[known] = answers == _CUT
        return found_N

    def _is_cut(self, before: int, after: int) -> bool:
        first, second = self._student.texts_V[before], self._student.texts_V[after]
        return self._words(first + second) == self._words(first) + self._words(second)

    def _words(self, text: str) -> list[str]:
        return [word for word, _ in self._rule.pre_tokenize_str(text)]

    def _name_shapes(self) -> None:
        """Numbers the shapes of all tokens that encoding gives back as they are; the most frequent ones get a place."""
        texts = self._student.texts_V
        # A token that could be part of an added token's written form, which is cut out before any rule applies.
        risky = {content[0] for content in self._student.added} | {"'", "\u2019"}
        usual = [
            i for i, text in enumerate(texts) if text and risky.isdisjoint(text) and i not in self._student.markers
        ]
        shapes: dict[str, list[int]] = {}
        for start in range(0, len(usual), TEXTS_PER_CALL):
            chunk = usual[start : start + TEXTS_PER_CALL]
            ids_N, first, last = self._student.encode_texts([texts[i] for i in chunk])
            same = (last - first == 1) & (ids_N[np.minimum(first, len(ids_N) - 1)] == chunk)
            for index, is_same in zip(chunk, same.tolist()):
                if is_same:
                    shapes.setdefault(_shape(texts[index]), []).append(index)
        largest = sorted(shapes.values(), key=len, reverse=True)[:MAX_SHAPES]
        for number, members in enumerate(largest):
            self._shape_V[members] = number
        self._table = np.zeros((len(largest), len(largest)), np.uint8)

    def _audit(self) -> bool:
        """Whether a sample of tokens that are said to be cut apart are encoded apart."""
        rng, known = np.random.default_rng(0), np.flatnonzero(self._shape_V >= 0)
        if not len(known):
            return False
        # Frequent tokens have small ids: half the sample from the first tenth.
        few = known[: len(known) // 10 + 1]
        before = np.concatenate([rng.choice(pool, AUDITED_PAIRS // 2) for pool in (few, known)])
        after = np.concatenate([rng.choice(pool, AUDITED_PAIRS // 2) for pool in (few, known)])
        said = self.cut(before, after)
        before, after, texts = before[said], after[said], self._student.texts_V
        if not len(before):
            return False
        ids_N, first, last = self._student.encode_texts([texts[a] + texts[b] for a, b in zip(before, after)])
        two = last - first == 2
        return bool(two.all() and (ids_N[first] == before).all() and (ids_N[first + 1] == after).all())


def _shape(text: str) -> str:
    """Runs of kinds of characters: of letters that there are some, of other signs whether one or several, of digits how
    many."""
    kinds = "".join(map(_kind, text))
    return re.sub(r"([^nN~]~?)\1+", lambda run: run[1] + ("" if run[1][0] in _LETTERS else "+"), kinds)


@cache
def _kind(letter: str) -> str:
    category, foreign = unicodedata.category(letter), "" if letter.isascii() else "~"
    if letter in _OWN_KIND or category[0] == "Z":
        return _OWN_KIND.get(letter, "t")
    if category[0] == "L":
        return "k" if _CJK.match(letter) else (category[1] if letter.isascii() else category[1].upper()) + foreign
    return ("n" if letter.isascii() else "N") if category[0] == "N" else category[0].lower() + foreign
