"""Laws of the check before the traces: what a student's tokenizer cannot do is told then, by its checkpoint's name."""

from types import SimpleNamespace

import pytest
from align_world import byte_level
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill import align_tables
from distill.align_fit import check_tokenizers
from distill.errors import DataError, ModelError

ALPHABET = bytes(range(0x20, 0x7F)) + b"\n"


@pytest.fixture
def check(tmp_path, monkeypatch):
    """(folder for checkpoints, check(student path ..)) with a teacher that writes printable ASCII."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    byte_level([(b"1", b"2")], alphabet=ALPHABET).save_pretrained(tmp_path / "teacher")

    def run(*paths, capture=True):
        students = [SimpleNamespace(path=str(path)) for path in paths]
        teacher = SimpleNamespace(path=str(tmp_path / "teacher"), capture=capture or None)
        check_tokenizers(SimpleNamespace(teacher=teacher, students=students))

    return tmp_path, run


def saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def word_pieces() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "1": 1, "##2": 2, "<|end|>": 3}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    template = byte_level([]).chat_template
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=template)


def unigrams() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("1", -1.0), ("<|end|>", -9.0)], unk_id=0))
    backend.normalizer, backend.decoder = normalizers.NFKC(), decoders.Metaspace()
    template = byte_level([]).chat_template
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=template)


def test_tables_of_every_pair_are_there_afterwards(check):
    folder, run = check
    run(*(saved(byte_level(merges), folder / f"student{len(merges)}") for merges in ([], [(b"a", b"b")])))
    assert len(list((folder / "cache").rglob("tables-*.npz"))) == 2


def test_a_pair_is_made_once_for_students_of_one_checkpoint(check, monkeypatch):
    folder, run = check
    path, made = saved(byte_level([]), folder / "student"), []
    build = align_tables.build_tables
    monkeypatch.setattr(align_tables, "build_tables", lambda *pair: made.append(pair) or build(*pair))
    run(path, path)
    run(path)
    assert len(made) == 1


@pytest.mark.parametrize("make", [word_pieces, unigrams])
def test_a_tokenizer_without_exact_bytes_is_refused_only_where_distributions_are_compared(check, make):
    folder, run = check
    path = saved(make(), folder / "student")
    with pytest.raises(ModelError, match="neither byte-level nor byte-fallback") as error:
        run(saved(byte_level([]), folder / "good"), path)
    assert str(path) in str(error.value) and "teacher.capture: null" in str(error.value)
    run(path, capture=False)


def test_a_byte_of_the_teachers_that_a_student_cannot_write_is_refused(check):
    folder, run = check
    path = saved(byte_level([], alphabet=ALPHABET.replace(b"~", b"")), folder / "student")
    with pytest.raises(DataError, match="no token for a byte") as error:
        run(path)
    assert "b'~'" in str(error.value) and str(path) in str(error.value)


def test_a_template_that_takes_no_question_is_refused(check):
    folder, run = check
    tokenizer = byte_level([])
    tokenizer.chat_template = "{{ raise_exception('only tools') }}"
    with pytest.raises(DataError, match="only tools"):
        run(saved(tokenizer, folder / "student"), capture=False)


def test_a_hub_id_out_of_reach_is_told_of_and_a_folder_is_refused(check, capsys):
    folder, run = check
    run("some-org/no-such-model")
    assert "some-org/no-such-model" in capsys.readouterr().out
    bare = byte_level([])
    bare.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        run(saved(bare, folder / "student"))
