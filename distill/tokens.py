"""Chat rendering, `<think>` and what identifies a tokenizer. Imports transformers only when a tokenizer is loaded.

Where tokens are cut: the prompt (which ends with "<think>\\n"), the reasoning, "</think>\\n", the answer and the
end-of-turn token are encoded one by one and their ids concatenated. Where the markers are single tokens this equals
encoding the whole conversation; where they are plain text (Llama-3) it keeps ".</" or ">\\n\\n" from becoming one token
that straddles two parts, so that a prompt's ids are always a prefix of the example's ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

from distill.errors import DataError, ModelError
from distill.records import Prompt, SampleRequest, sample_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
PREFILL = THINK_OPEN + "\n"
# Pre-trained checkpoints often carry chat tokens but no template; these make the two usual sets of tokens usable.
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
_LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n{% endif %}"
)


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint folder (or hub id), exactly as its tokenizer.json says.

    The file is taken as it is, whatever class tokenizer_config.json names: some of those classes rebuild the
    pre-tokenizer and cut text differently from the model's training. No remote code is ever run. A checkpoint without
    a chat template gets one when it has the ChatML or Llama-3 chat tokens.
    Errors: ModelError when there is no tokenizer.json, it cannot be read, or no chat template can be had.
    """
    from transformers import PreTrainedTokenizerFast

    path = os.fspath(path)
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "tokenizer.json")):
        raise ModelError(
            "no tokenizer.json in this folder", where=path, remedy="Point to a folder saved by save_pretrained()."
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
    try:
        tok = PreTrainedTokenizerFast.from_pretrained(
            path, trust_remote_code=False, local_files_only=offline or os.path.isdir(path)
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(
            f"the tokenizer cannot be loaded: {error}",
            where=path,
            remedy="Check the path; a hub id needs a network and HF_HUB_OFFLINE unset.",
        ) from error
    if not tok.chat_template:
        tok.chat_template = _default_template(tok, path)
    return tok


def _default_template(tok: PreTrainedTokenizerFast, path: str) -> str:
    added = tok.get_added_vocab()
    if "<|start_header_id|>" in added:
        return _LLAMA3
    if "<|im_start|>" in added:
        return _CHATML
    raise ModelError(
        "the tokenizer has no chat template and no known chat tokens",
        where=path,
        remedy="Add a chat_template.jinja to the folder.",
    )


def fingerprint(tok: PreTrainedTokenizerFast) -> str:
    """16 hex digits over everything that decides how text becomes ids: vocabulary, merges, normalizer, pre-tokenizer,
    added tokens, the special tokens' roles and the chat template. Padding and truncation settings do not count."""
    state = json.loads(tok.backend_tokenizer.to_str())
    kept = {k: state.get(k) for k in ("model", "normalizer", "pre_tokenizer", "decoder", "added_tokens")}
    kept["roles"] = {"bos": tok.bos_token, "eos": tok.eos_token, "pad": tok.pad_token}
    kept["template"] = tok.chat_template
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def render_prompt(tok: PreTrainedTokenizerFast, prompt_text: str) -> list[int]:
    """Ids of the conversation up to where the assistant thinks: always ends with the ids of "<think>\\n".

    Errors: DataError when the prompt holds one of the tokenizer's special tokens, which would end or forge a turn.
    """
    return render_chat(tok, [{"role": "user", "content": prompt_text}])


def render_chat(tok: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> list[int]:
    """`render_prompt` of a conversation of several messages, each with its role and content. DataError also for roles
    that hold a special token, or that the template refuses or leaves out without a word."""
    for message in messages:
        _refuse_special(tok, message["content"])
        _refuse_special(tok, message["role"])
    from jinja2 import TemplateError

    try:
        text = tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise DataError(
            f"the chat template does not take this conversation: {error}",
            where=str(tok.name_or_path) or None,
            value=[message["role"] for message in messages],
            remedy="Leave it out, or use roles in the order that the template asks for.",
        ) from error
    for message in messages:
        # Of the assistant's earlier turns templates leave out the reasoning, as their models are meant to read them.
        if message["role"] != "assistant" and message["content"].strip() not in text:
            raise DataError(
                f"the chat template leaves out what {message['role']!r} says",
                where=str(tok.name_or_path) or None,
                value=message["content"][:80],
                remedy="Leave the conversation out, or use roles that the template knows: system, user, assistant.",
            )
    if text.endswith(THINK_OPEN):
        text += "\n"
    elif not text.endswith(PREFILL):
        text += PREFILL
    return tok.encode(text, add_special_tokens=False)


def sample_requests(
    tok: PreTrainedTokenizerFast, prompts: Iterable[Prompt], n: int, run_seed: int
) -> Iterator[SampleRequest]:
    """n requests a prompt, in order; a seed depends on run_seed, the prompt's content and the index alone."""
    for prompt in prompts:
        ids = tuple(render_prompt(tok, prompt.text))
        for index in range(n):
            yield SampleRequest(prompt.key, index, ids, sample_seed(run_seed, prompt.key, index))


def encode_completion(tok: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of what the assistant writes after "<think>\\n", without an end token.

    Cut around the first "</think>" by the rule at the top of this file. Special tokens that occur in the text are
    encoded as plain characters, so the ids' bytes are the text's bytes (after the tokenizer's normalizer).
    """
    marker = re.search(r"</think>\n?", text)
    parts = [text[: marker.start()], marker.group(), text[marker.end() :]] if marker else [text]
    with _special_as_text(tok):
        return [i for part in parts if part for i in tok.encode(part, add_special_tokens=False)]


def render_example(
    tok: PreTrainedTokenizerFast, prompt_text: str, reasoning: str, answer: str
) -> tuple[list[int], list[int]]:
    """(prompt_ids, completion_ids) of one training example; the completion is the part that bears loss.

    Completion: "{reasoning}</think>\\n{answer}" and the end-of-turn token. Both texts are kept verbatim.
    Errors: DataError when the reasoning holds "</think>" or the prompt a special token.
    """
    if THINK_CLOSE in reasoning:
        raise DataError(
            "the reasoning itself contains </think>", value=reasoning[:80], remedy="Split it with split_thinking()."
        )
    completion = encode_completion(tok, f"{reasoning}{THINK_CLOSE}\n{answer}")
    return render_prompt(tok, prompt_text), [*completion, end_id(tok)]


def split_thinking(text: str) -> tuple[str, str | None]:
    """(thinking, answer) of a completion; answer is None when there is no "</think>": the model never finished.

    The first "</think>" counts. A leading "<think>\\n" (not every server strips the prefill) and the one newline after
    "</think>" belong to the markers; everything else is kept.
    """
    text = re.sub(r"\A\s*<think>\n?", "", text)
    thinking, marker, answer = text.partition(THINK_CLOSE)
    return (thinking, answer.removeprefix("\n")) if marker else (thinking, None)


def end_id(tok: PreTrainedTokenizerFast) -> int:
    """The token that ends the assistant's turn: the first added token the template writes after the message.

    Errors: ModelError when the template cannot be rendered, or nothing ends a turn.
    """
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "~answer~"}]
    try:
        tail = tok.apply_chat_template(messages, tokenize=False).rpartition("~answer~")[2]
    except TemplateError as error:
        remedy = "Copy chat_template.jinja and tokenizer_config.json again from where the model is published."
        what = f"the chat template does not take a question and an answer: {error}"
        raise ModelError(what, where=str(tok.name_or_path), remedy=remedy) from error
    added = tok.get_added_vocab()
    starts = {content: tail.find(content) for content in added if content in tail}
    if starts:
        return added[min(starts, key=lambda content: (starts[content], -len(content)))]
    if tok.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no eos token and its template ends no turn",
            where=str(tok.name_or_path),
            remedy="Set eos_token in tokenizer_config.json.",
        )
    return tok.eos_token_id


def stop_ids(tok: PreTrainedTokenizerFast, given: Iterable[int] | None = None) -> list[int]:
    """Ids that end a completion, ascending: `given`, else end of turn and end of sequence (often the same)."""
    if given is not None:
        return sorted(set(given))
    eos = [] if tok.eos_token_id is None else [tok.eos_token_id]
    return sorted({end_id(tok), *eos})


def token_bytes(tok: PreTrainedTokenizerFast) -> list[bytes]:
    """The exact bytes of each id, indexed by id; b"" for ids that nothing owns.

    Read from the vocabulary, not by decoding: a token may be part of a UTF-8 character. An added token's bytes are
    its written form (of a run of "\\u2581": as many spaces). Byte-level vocabularies (GPT-2 alphabet) and
    byte-fallback ones ("\\u2581", "<0x0A>") are known; another kind raises ModelError.
    """
    state = json.loads(tok.backend_tokenizer.to_str())
    to_bytes = _piece_decoder(state, str(tok.name_or_path))
    added = {each.content for each in tok.added_tokens_decoder.values() if each.special or each.content.strip("\u2581")}
    vocab = tok.get_vocab()
    table = [b""] * (max(vocab.values()) + 1)
    for piece, index in vocab.items():
        table[index] = piece.encode() if piece in added else to_bytes(piece)
    return table


def _piece_decoder(state: dict, where: str):
    steps = state.get("decoder") or {}
    kinds = {step["type"] for step in steps.get("decoders", [steps]) if step}
    if "ByteLevel" in kinds:
        alphabet = byte_alphabet()
        return lambda piece: bytes(alphabet[c] for c in piece)
    if "ByteFallback" in kinds:
        return lambda piece: (
            bytes([int(piece[3:5], 16)])
            if re.fullmatch(r"<0x[0-9A-F]{2}>", piece)
            else piece.replace("\u2581", " ").encode()
        )
    raise ModelError(
        "the tokenizer is neither byte-level nor byte-fallback, so its tokens have no exact bytes",
        where=where,
        value=sorted(kinds),
        remedy="Use a byte-level BPE tokenizer (Qwen, Llama-3, DeepSeek).",
    )


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """Character -> byte of the GPT-2 alphabet: printable Latin-1 stands for itself, the rest starts at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


@contextmanager
def _special_as_text(tok: PreTrainedTokenizerFast):
    backend = tok.backend_tokenizer
    before = backend.encode_special_tokens
    # The wrapper resets the backend's flag from its own attribute at each call, so both are set.
    wrapper_before, tok.split_special_tokens = tok.split_special_tokens, True
    backend.encode_special_tokens = True
    try:
        yield
    finally:
        tok.split_special_tokens = wrapper_before
        backend.encode_special_tokens = before


def special_tokens(tok: PreTrainedTokenizerFast) -> list[str]:
    """What no prompt may hold, since it would end or forge a turn: the written form of each special token."""
    return [token.content for token in tok.added_tokens_decoder.values() if token.special]


def _refuse_special(tok: PreTrainedTokenizerFast, text: str) -> None:
    if found := [token for token in special_tokens(tok) if token in text]:
        raise DataError(
            f"the prompt contains the special token {found[0]}",
            value=text[:80],
            remedy="Remove the prompt or write the token differently.",
        )
