"""Small tokenizers for the tests of the alignment, made by hand: bytes, merges, chat tokens."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.align_bytes import ByteTokenizer
from distill.tokens import byte_alphabet

CHAT = ("<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
).replace("<|user|>{{", "{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}{{")
LETTERS = [letter for letter, _ in sorted(byte_alphabet().items(), key=lambda pair: pair[1])]


def letters(raw: bytes) -> str:
    return "".join(LETTERS[b] for b in raw)


def byte_level(
    merges: list[tuple[bytes, bytes]],
    *,
    alphabet: bytes = bytes(range(256)),
    think: bool = True,
    pattern: str | None = None,
    nfc: bool = False,
    end: str = "<|end|>",
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with these merges in this order. pattern: how text is cut into words, None for not at all."""
    vocab = {}
    for piece in [*(letters(bytes([b])) for b in alphabet), *(letters(a + b) for a, b in merges)]:
        vocab.setdefault(piece, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(letters(a), letters(b)) for a, b in merges]))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*words, bytes_only])
    backend.normalizer = normalizers.NFC() if nfc else None
    backend.decoder = decoders.ByteLevel()
    return _finish(backend, think, end)


def byte_fallback(pieces: list[str], merges: list[tuple[str, str]], *, think: bool = True) -> PreTrainedTokenizerFast:
    """A vocabulary that writes the space as U+2581 and unknown characters as bytes: "<0x00>" .. and these pieces."""
    vocab = {"<unk>": 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)}
    for piece in [*pieces, *(a + b for a, b in merges)]:
        vocab.setdefault(piece, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finish(backend, think, "<|end|>")


def _finish(backend: Tokenizer, think: bool, end: str) -> PreTrainedTokenizerFast:
    chat = [end, *CHAT[1:]]
    backend.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in chat])
    if think:
        backend.add_tokens([AddedToken(content, normalized=False) for content in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, chat_template=TEMPLATE.replace("<|end|>", end)
    )


def ids_of(tokenizer: ByteTokenizer, *pieces: bytes) -> list[int]:
    """The id of each of these byte strings, markers by their written form."""
    added = {content.encode(): index for content, index in tokenizer.added.items()}
    return [added[piece] if piece in added else tokenizer.id_of_bytes[piece] for piece in pieces]


def pieces_of(tokenizer: ByteTokenizer, ids) -> list[bytes]:
    return [tokenizer.bytes_V[index] for index in ids]
