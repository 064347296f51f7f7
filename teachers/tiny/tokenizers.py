"""Three byte-level BPE tokenizers that disagree where real ones do: numbers, contractions, Unicode, `<think>`.

    teacher  numbers in groups of up to three and a lone digit with its space, as DeepSeek-V3; <think> is one token
    qwen     every digit on its own, NFC, words take a leading symbol, as Qwen3; <think> is one token
    llama    numbers in groups of up to three, as Llama-3; <think> is plain text of several tokens

Whole pieces of the vocabulary are taken as they are (ignore_merges), and all numerals are added by hand with the merges
that build them, so that no number's cut depends on what the corpus happened to hold.

    python -m teachers.tiny.tokenizers --out DIR --seed 0
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random

DIGITS = "0123456789"
SPACE = "\u0120"  # a space in the byte-level alphabet
CHAT_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
THINK_TOKENS = ("<think>", "</think>")

_QWEN_LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEACHER_PATTERN = r" \p{N}(?!\p{N})|\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|[\r\n]+|\s+(?!\S)|\s+"

# An assistant message is kept verbatim, reasoning included: the template that trains must be the one that serves.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- '<|user|>' + message['content'] -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<|assistant|>' + message['content'] + '<|end|>' -}}"
    "{%- else -%}{{- raise_exception('roles are user and assistant, not ' + message['role']) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|><think>\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Spec:
    """One tokenizer to build. `numerals`: longest run of digits that is one token for certain."""

    name: str
    pattern: str
    vocab_size: int
    numerals: int
    spaced_digits: bool
    nfc: bool
    think_tokens: bool


SPECS = {
    spec.name: spec
    for spec in (
        Spec("teacher", _TEACHER_PATTERN, 1664, 3, spaced_digits=True, nfc=False, think_tokens=True),
        Spec("qwen", _QWEN_LLAMA_PATTERN % "", 576, 1, spaced_digits=False, nfc=True, think_tokens=True),
        Spec("llama", _QWEN_LLAMA_PATTERN % "{1,3}", 1792, 3, spaced_digits=False, nfc=False, think_tokens=False),
    )
}


def build(spec: Spec, corpus: Iterable[str]):
    """A PreTrainedTokenizerFast of at most spec.vocab_size tokens (fewer if the corpus has too few distinct pieces).

    Ids: 256 bytes, merges learnt from the corpus with every number taken out, numerals, then the added tokens.
    The same corpus gives the same tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    added = CHAT_TOKENS + (THINK_TOKENS if spec.think_tokens else ())
    numerals, numeral_merges = _numerals(spec)
    vocab, merges = _learn(spec, corpus, spec.vocab_size - len(added) - len(numerals))
    for piece in numerals:
        vocab.setdefault(piece, len(vocab))

    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges + numeral_merges, ignore_merges=True))
    backend.normalizer = normalizers.NFC() if spec.nfc else None
    backend.pre_tokenizer = pre_tokenizers.Sequence([_split(spec.pattern), _bytes()])
    backend.decoder = decoders.ByteLevel()
    # <think> is not "special": decoding must keep it, since the grader reads where the reasoning ends.
    for content in added:
        token = AddedToken(content, special=content in CHAT_TOKENS, normalized=False)
        (backend.add_special_tokens if content in CHAT_TOKENS else backend.add_tokens)([token])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _learn(spec: Spec, corpus: Iterable[str], vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges learnt on the corpus without its numbers: no merge holds or crosses into a digit."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC() if spec.nfc else None
    no_numbers = pre_tokenizers.Split(Regex(r" ?\p{N}+"), "removed")
    learner.pre_tokenizer = pre_tokenizers.Sequence([_split(spec.pattern), no_numbers, _bytes()])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learner.train_from_iterator(corpus, trainer)
    model = json.loads(learner.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _numerals(spec: Spec) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces to add (single digits are bytes already) and every merge that builds them, whichever pair goes first."""
    pieces, merges = [], []
    if spec.spaced_digits:
        pieces += [SPACE + d for d in DIGITS]
        merges += [(SPACE, d) for d in DIGITS]
    for length in range(2, spec.numerals + 1):
        for digits in map("".join, product(DIGITS, repeat=length)):
            pieces.append(digits)
            merges += [(digits[:cut], digits[cut:]) for cut in range(1, length)]
    return pieces, merges


def _split(pattern: str):
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _bytes():
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


# Share of texts with worked reasoning; the rest are bare answers. The mixes differ so that the word pieces do.
# Of tasks about the letters of arbitrary words only this much is learnt: a merge that hides letters would make spelling
# a matter of memory, and the models are far too small for that.
WORD_TASKS = (
    "Spell this word backward (example: sun -> nus):",
    'How many times does the letter "',
    "Spell:",
    "Copy:",
    "Join:",
    "Reverse:",
    "Sort by alphabet:",
    "Sort from small to large:",
)
ALPHABET = " ".join("abcdefghijklmnopqrstuvwxyz")
WORKED_SHARE = {"teacher": 1.0, "qwen": 0.5, "llama": 0.75}


def corpus_of(name: str, seed: int, documents: int) -> Iterator[str]:
    """`documents` texts that the tokenizer `name` learns from, drawn from the models' training domain (never from its
    held-out part), each tokenizer with its own seed and mix."""
    from teachers.tiny.corpus import document

    rng = Random(f"tokenizer/{name}/{seed}")
    made = 0
    while made < documents:
        parts = document("worked" if rng.random() < WORKED_SHARE[name] else "direct", rng, seed)
        if parts is not None:
            made += 1
            phrase = next((phrase for phrase in WORD_TASKS if parts[0].startswith(phrase)), None)
            yield f"{phrase} {ALPHABET}\nBackward:" if phrase else "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder; one sub-folder a tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=12_000, help="texts to learn from, for each tokenizer")
    args = parser.parse_args(argv)
    for name, spec in SPECS.items():
        tok = build(spec, corpus_of(name, args.seed, args.documents))
        tok.save_pretrained(args.out / name)
        print(f"{args.out / name}: {len(tok)} tokens")


if __name__ == "__main__":
    main()
