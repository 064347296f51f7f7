"""A tokenizer as a map between byte strings and ids, exact for any bytes.

Text is bytes, and two tokenizers can only be compared there. Ids become bytes by the vocabulary (never by decoding: a
token may be part of a character), and bytes become ids whose bytes are the same again: the tokenizer's Unicode
normalizer and added prefix space are off, its special tokens are plain characters, and what its text interface cannot
hold (bytes that are no UTF-8, "\\u2581" in a vocabulary that writes the space so) is spelled on the level of bytes.

Shape legend: V ids of the vocabulary, N tokens, B bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from distill.errors import DataError, ModelError
from distill.tokens import byte_alphabet, fingerprint, stop_ids, token_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

# Between texts that are encoded in one call; an added token is cut out before anything else, so neighbours never meet.
SEPARATOR = "\U0010fffd\U0010fffc\U0010fffd"
TEXTS_PER_CALL, LETTERS_PER_CALL = 2048, 4_000_000
LETTERS_PER_PART = 20_000  # of a call: parts are encoded in parallel
SPACE = "\u2581"


class ByteTokenizer:
    """One tokenizer, byte for byte.

    ids -> bytes: bytes_V (list), flat_B with starts_V and lens_V (the same as arrays). bytes -> ids: encode.
    markers: ids that are no text (special and other added tokens; see tokens.token_bytes for their bytes).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.where = str(tokenizer.name_or_path)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        self.byte_level = _has_step(state.get("decoder"), "ByteLevel")
        self.bytes_V = token_bytes(tokenizer)
        self.lens_V = np.array([len(each) for each in self.bytes_V], np.int64)
        self.starts_V = np.cumsum(self.lens_V) - self.lens_V
        self.flat_B = np.frombuffer(b"".join(self.bytes_V), np.uint8)
        model_vocab = state["model"]["vocab"]
        self.added = {
            token["content"]: token["id"]
            for token in state["added_tokens"]
            if token["special"] or self.byte_level or token["content"] not in model_vocab
        }
        self.markers = set(self.added.values())
        self._backend, self._separator = _exact_backend(state, self.where)
        # How text is cut into words before anything merges, where the tokenizer does so.
        self.word_rule: PreTokenizer | None = self._backend.pre_tokenizer if self.byte_level else None
        # What the text interface would read as something else: bytes that are no UTF-8, the middle of SEPARATOR, and a
        # written-out "\u2581".
        self._foreign = re.compile(f"[\udc80-\udcff{SEPARATOR[1]}{'' if self.byte_level else SPACE}]+")

    def __len__(self) -> int:
        return len(self.bytes_V)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.tokenizer)

    @cached_property
    def stop_ids(self) -> list[int]:
        return stop_ids(self.tokenizer)

    @cached_property
    def id_of_bytes(self) -> dict[bytes, int]:
        """The text token of each byte string; of several (a character and its "<0xNN>") the one with a merge rule or,
        failing that, the last: byte tokens come first in such vocabularies."""
        found = {}
        for index, each in enumerate(self.bytes_V):
            if each and index not in self.markers:
                found[each] = index
        return found

    def join(self, ids_N: np.ndarray) -> np.ndarray:
        """[B] uint8: the bytes of these ids, one behind the other."""
        return gather_runs(self.flat_B, self.starts_V[ids_N], self.lens_V[ids_N])

    def encode(self, texts: list[bytes]) -> list[np.ndarray]:
        """int64 ids of each text, whose bytes are the text's exactly. Every text is encoded on its own.

        Errors: DataError when the vocabulary has no token for one of the bytes.
        """
        found: list[np.ndarray | None] = [None] * len(texts)
        plain = []
        for index, text in enumerate(texts):
            decoded = text.decode("utf-8", "surrogateescape")
            if self._foreign.search(decoded):
                found[index] = self._spell(decoded)
            else:
                plain.append((index, decoded))
        for chunk in _chunks(plain):
            for (index, decoded), ids in zip(chunk, self._encode_plain([text for _, text in chunk])):
                found[index] = ids if self._is(ids, texts[index]) else self._spell(decoded)
        return found

    def can_write(self, text: bytes) -> bool:
        """Whether the vocabulary has a token for each of these bytes."""
        return -1 not in [self._byte_ids[b] for b in text]

    def encode_pieces(self, texts: list[bytes]) -> list[np.ndarray]:
        """encode() of the strings of a vocabulary: one that is no UTF-8 is the middle of some text, whose other part
        may belong to the same word, so it is merged as one word."""
        whole = [each for each in texts if _is_text(each) or not self.byte_level]
        encoded = iter(self.encode(whole))
        return [next(encoded) if _is_text(each) or not self.byte_level else self._merge(each) for each in texts]

    @cached_property
    def texts_V(self) -> list[str | None]:
        """Each id's bytes as text, None where they are none or the text interface would read them as something else."""
        decoded = [each.decode("utf-8", "surrogateescape") for each in self.bytes_V]
        return [None if self._foreign.search(text) else text for text in decoded]

    def encode_texts(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, first, last): text i, without SEPARATOR in it, is ids[first[i]:last[i]]; bytes are not compared."""
        joined = [SEPARATOR.join(part) for part in _parts(texts)]
        found = self._backend.encode_batch_fast(joined, add_special_tokens=False)
        ids_N = np.concatenate([ids for each in found for ids in ([self._separator], each.ids)][1:]).astype(np.int64)
        cuts = np.flatnonzero(ids_N == self._separator)
        return ids_N, np.append(0, cuts + 1), np.append(cuts, len(ids_N))

    def _encode_plain(self, texts: list[str]) -> list[np.ndarray]:
        ids_N, first, last = self.encode_texts(texts)
        return [ids_N[a:b] for a, b in zip(first.tolist(), last.tolist())]

    def _spell(self, decoded: str) -> np.ndarray:
        """Ids of a text that holds something the text interface cannot: it alone is spelled in bytes."""
        parts, last = [], 0
        for foreign in self._foreign.finditer(decoded):
            parts += [(decoded[last : foreign.start()], False), (foreign.group(), True)]
            last = foreign.end()
        parts.append((decoded[last:], False))
        ids = [self._spelled_part(*part) for part in parts if part[0]]
        return np.concatenate([*ids, np.zeros(0, np.int64)])

    def _spelled_part(self, part: str, foreign: bool) -> np.ndarray:
        raw = part.encode("utf-8", "surrogateescape")
        if not foreign:
            ids = self._encode_plain([part])[0]
            if self._is(ids, raw):
                return ids
        return self._merge(raw)

    def _is(self, ids: np.ndarray, raw: bytes) -> bool:
        return b"".join([self.bytes_V[i] for i in ids.tolist()]) == raw

    def _merge(self, raw: bytes) -> np.ndarray:
        """The model alone, without the rules that cut text into words; single bytes where it has no byte alphabet."""
        if self.byte_level:
            letters = _letters()
            tokens = self._backend.model.tokenize("".join(letters[b] for b in raw))
            ids = np.array([token.id for token in tokens], np.int64)
            if self._is(ids, raw):
                return ids
        if not self.can_write(raw):
            raise DataError(
                "the tokenizer has no token for a byte of this text",
                where=self.where,
                value=raw[:40],
                remedy="Use a byte-level or byte-fallback tokenizer with all 256 bytes.",
            )
        return np.array([self._byte_ids[b] for b in raw], np.int64)

    @cached_property
    def _byte_ids(self) -> list[int]:
        vocab = self.tokenizer.get_vocab()
        names = _letters() if self.byte_level else [f"<0x{b:02X}>" for b in range(256)]
        return [vocab.get(name, -1) for name in names]


def _chunks(plain: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    chunk, letters = [], 0
    for each in plain:
        chunk.append(each)
        letters += len(each[1])
        if len(chunk) == TEXTS_PER_CALL or letters >= LETTERS_PER_CALL:
            yield chunk
            chunk, letters = [], 0
    if chunk:
        yield chunk


def _parts(texts: list[str]) -> Iterator[list[str]]:
    """The texts in order, in runs of at least so many letters; one empty run of none."""
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    cuts = np.flatnonzero(np.diff(ends // LETTERS_PER_PART, prepend=0)) + 1
    for first, last in pairwise([0, *cuts.tolist(), len(texts)]):
        if first < last or not texts:
            yield texts[first:last]


def gather_runs(values: np.ndarray, starts_N: np.ndarray, lens_N: np.ndarray) -> np.ndarray:
    """values[s : s + l] of every (s, l), one behind the other."""
    return values[run_index(starts_N, lens_N)]


def run_index(starts_N: np.ndarray, lens_N: np.ndarray) -> np.ndarray:
    """int64 [sum of lens]: s, s+1, .. s+l-1 of every (s, l)."""
    ends_N = np.cumsum(lens_N)
    total = int(ends_N[-1]) if len(ends_N) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts_N - ends_N + lens_N, lens_N)


@lru_cache(maxsize=1)
def _letters() -> list[str]:
    """The letter of the byte-level alphabet that stands for each byte."""
    return [letter for letter, _ in sorted(byte_alphabet().items(), key=lambda pair: pair[1])]


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _steps(part: dict | None, key: str) -> list[dict]:
    return [] if part is None else part.get(key, [part])


def _has_step(part: dict | None, kind: str) -> bool:
    return any(step["type"] == kind for step in _steps(part, "decoders"))


def _exact_backend(state: dict, where: str) -> tuple[Tokenizer, int]:
    """(a copy of the tokenizer that keeps every byte, the id of SEPARATOR in it)."""
    from tokenizers import AddedToken, Tokenizer

    # A vocabulary that writes the space as "\u2581" does so in its normalizer; everything else there changes bytes.
    steps = [step for step in _steps(state.get("normalizer"), "normalizers") if _is_space_rule(step)]
    state["normalizer"] = {"type": "Sequence", "normalizers": steps} if steps else None
    for step in _steps(state.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
        elif step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
    state["post_processor"] = state["truncation"] = state["padding"] = None
    if (state["model"] or {}).get("dropout"):
        raise ModelError(
            "the tokenizer draws its cuts at random",
            where=where,
            value=state["model"]["dropout"],
            remedy='Set "dropout" to null in tokenizer.json.',
        )
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_tokens([AddedToken(SEPARATOR, special=False, normalized=False)])
    backend.encode_special_tokens = True
    return backend, backend.token_to_id(SEPARATOR)


def _is_space_rule(step: dict) -> bool:
    return step["type"] == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE
