"""Laws of a tokenizer as a map of bytes: whatever goes in comes out, and nothing is read as a special token."""

import numpy as np
import pytest
from align_world import byte_fallback, byte_level, ids_of, pieces_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from distill import align_bytes
from distill.align_bytes import SEPARATOR, ByteTokenizer, run_index
from distill.errors import DataError, ModelError

SPM = byte_fallback(
    ["\u2581", "a", "b", "e", "t", "h", "\u2581\u2581", "\u4f60", "\u00e9"],
    [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "\u2581")],
)
BPE = byte_level(
    [(b" ", b"t"), (b" t", b"h"), (b"\xe4", b"\xbd"), (b"a", b"\xcc")], pattern=r" ?\p{L}+|\s+|[^\s\p{L}]+"
)
NFC = byte_level([(b"a", b"b")], nfc=True)


@pytest.fixture(scope="module")
def tokenizers():
    return [ByteTokenizer(each) for each in (SPM, BPE, NFC)]


TEXTS = st.one_of(
    st.binary(max_size=30),
    st.text(max_size=20).map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.lists(
        st.sampled_from([b"a", b"the", b" ", b"\n", b"\xe4\xbd\xa0", b"\xe4\xbd", b"e\xcc\x81", "\u2581".encode(),
                         b"<|end|>", b"</think>", b"<think>", SEPARATOR.encode(), SEPARATOR[0].encode(), b"<0x41>"]),
        max_size=8,
    ).map(b"".join),
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, max_size=12), letters=st.integers(1, 40))
def test_where_a_call_is_cut_for_the_cores_changes_nothing(tokenizers, texts, letters, monkeypatch):
    whole = [each.encode(texts) for each in tokenizers]
    with monkeypatch.context() as patch:
        patch.setattr(align_bytes, "LETTERS_PER_PART", letters)
        cut = [each.encode(texts) for each in tokenizers]
    for ours, theirs in zip(whole, cut, strict=True):
        assert list(map(list, ours)) == list(map(list, theirs))


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4))
def test_ids_have_the_bytes_that_they_were_made_of(tokenizers, texts):
    for tokenizer in tokenizers:
        for text, ids in zip(texts, tokenizer.encode(texts)):
            assert tokenizer.join(ids).tobytes() == text
            assert b"".join(pieces_of(tokenizer, ids)) == text
        for text, ids in zip(texts, tokenizer.encode_pieces(texts)):
            assert tokenizer.join(ids).tobytes() == text


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.characters(blacklist_categories=("Cs",)), min_size=1), min_size=2, max_size=4))
def test_each_text_is_encoded_as_if_it_were_alone(tokenizers, texts):
    for tokenizer in tokenizers:
        together = tokenizer.encode([text.encode() for text in texts])
        assert [ids.tolist() for ids in together] == [tokenizer.encode([t.encode()])[0].tolist() for t in texts]


def test_where_nothing_is_unusual_the_ids_are_the_tokenizers_own(tokenizers):
    for tokenizer in tokenizers:
        text = "the bath \u4f60\n the"
        assert tokenizer.encode([text.encode()])[0].tolist() == tokenizer.tokenizer.encode(
            text, add_special_tokens=False
        )


def test_the_normalizer_changes_no_bytes():
    text = "e\u0301 \u212b \u2126"
    own = ByteTokenizer(NFC)
    assert own.join(np.array(NFC.encode(text, add_special_tokens=False))).tobytes() != text.encode()
    assert own.join(own.encode([text.encode()])[0]).tobytes() == text.encode()
    tokenizer = ByteTokenizer(byte_level([(b" ", b"a"), (b"a", b"b")], nfc=True, pattern=r"\s|\S+"))
    # and the rest of the tokenizer works as ever: its word rule cuts before anything merges
    assert pieces_of(tokenizer, tokenizer.encode(["e\u0301 ab".encode()])[0]) == [b"e", b"\xcc", b"\x81", b" ", b"ab"]


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_space_that_the_tokenizer_would_put_before_a_text_is_left_out_and_nothing_is_cut_finer(scheme):
    tokenizer = byte_fallback(["\u2581", *"theab"], [("t", "h"), ("th", "e"), ("\u2581", "the")])
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    own = ByteTokenizer(tokenizer)
    assert tokenizer.tokenize("the the") == ["\u2581the"] * 2
    assert pieces_of(own, own.encode([b"the the"])[0]) == [b"the", b" the"]


def test_a_special_token_in_a_text_is_plain_characters(tokenizers):
    for tokenizer in tokenizers:
        (ids,) = tokenizer.encode([b"a<|end|>b"])
        assert len(ids) > 3 and not set(ids.tolist()) & tokenizer.markers


def test_a_written_out_space_sign_is_not_a_space():
    tokenizer = ByteTokenizer(SPM)
    sign, space = tokenizer.encode(["\u2581".encode(), b" "])
    assert pieces_of(tokenizer, sign) == [b"\xe2", b"\x96", b"\x81"] and pieces_of(tokenizer, space) == [b" "]


def test_an_added_token_of_space_signs_is_spaces():
    """Some vocabularies list their runs of spaces as added tokens."""
    tokenizer = byte_fallback(["\u2581", "a"], [("\u2581", "\u2581")])
    tokenizer.add_tokens(["\u2581\u2581"])
    found = ByteTokenizer(tokenizer)
    assert found.bytes_V[tokenizer.get_vocab()["\u2581\u2581"]] == b"  "
    assert pieces_of(found, found.encode([b"  a"])[0]) == [b"  ", b"a"]


def test_bytes_that_are_no_text_merge_as_the_model_merges_them():
    tokenizer = ByteTokenizer(BPE)
    assert pieces_of(tokenizer, tokenizer.encode([b"\xe4\xbd"])[0]) == [b"\xe4\xbd"]
    # a piece of a vocabulary continues its word: the rule that cuts words cannot say, so the merges alone do
    assert pieces_of(tokenizer, tokenizer.encode_pieces([b"a\xcc"])[0]) == [b"a\xcc"]
    assert ids_of(tokenizer, b"\xe4\xbd") == tokenizer.encode([b"\xe4\xbd"])[0].tolist()


def test_a_byte_without_a_token_raises():
    tokenizer = ByteTokenizer(byte_level([], alphabet=b"ab"))
    with pytest.raises(DataError, match="no token for a byte"):
        tokenizer.encode([b"abc"])


def test_a_tokenizer_that_draws_its_cuts_is_refused():
    tokenizer = byte_level([(b"a", b"b")])
    tokenizer.backend_tokenizer.model.dropout = 0.1
    with pytest.raises(ModelError, match="at random"):
        ByteTokenizer(tokenizer)


def test_runs_by_hand():
    assert run_index(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert run_index(np.array([], np.int64), np.array([], np.int64)).tolist() == []
