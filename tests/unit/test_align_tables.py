"""Laws of the tables of a pair: pieces, roots, buckets, prefixes; the file that keeps them; markers by meaning."""

from dataclasses import fields
from multiprocessing import get_context

import numpy as np
import pytest
from align_world import byte_fallback, byte_level, ids_of, pieces_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_align_exact import random_merges

from distill.align_bytes import ByteTokenizer
from distill.align_markers import match_markers
from distill.align_tables import PairTables, build_tables, load_tables
from distill.errors import DataError

SEEDS = st.integers(0, 2**32 - 1)


def random_pair(seed):
    rng, alphabet = np.random.default_rng(seed), b"abc "
    sizes = rng.integers(0, 16, 2)
    return [ByteTokenizer(byte_level(random_merges(rng, alphabet, n), alphabet=alphabet)) for n in sizes]


def pieces(tables, student, token):
    start, end = tables.offsets_T1[token : token + 2]
    return pieces_of(student, tables.pieces_P[start:end])


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_pieces_are_the_students_encoding_and_nodes_number_prefixes(seed):
    teacher, student = random_pair(seed)
    tables = build_tables(teacher, student)
    seen = {}
    for token in set(range(len(teacher))) - teacher.markers:
        start, end = tables.offsets_T1[token : token + 2]
        assert tables.pieces_P[start:end].tolist() == student.encode([teacher.bytes_V[token]])[0].tolist()
        for length in range(1, end - start + 1):
            prefix = tuple(tables.pieces_P[start : start + length].tolist())
            node = int(tables.nodes_P[start + length - 1])
            assert seen.setdefault(prefix, node) == node
    assert len(set(seen.values())) == len(seen)  # different prefixes have different numbers


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_roots_follow_the_definition_and_buckets_part_the_vocabulary(seed):
    teacher, student = random_pair(seed)
    tables = build_tables(teacher, student)

    def root(text: bytes) -> bytes:
        if text in student.id_of_bytes and text in teacher.id_of_bytes:
            return text
        other = teacher if text in student.id_of_bytes else student
        return root(other.bytes_V[other.encode([text])[0][0]])

    for index, text in enumerate(student.bytes_V):
        expected = index if index in student.markers else student.id_of_bytes[root(text)]
        assert tables.root_S[index] == expected
    assert sorted(tables.members_S.tolist()) == list(range(len(student)))
    for index in range(len(student)):
        start, size = tables.bucket_starts_S[index], tables.bucket_sizes_S[index]
        members = tables.members_S[start : start + size]
        assert members.tolist() == [i for i in range(len(student)) if tables.root_S[i] == index]
        # the root of a token that is not shared is the beginning of its bytes
        assert all(student.bytes_V[m].startswith(student.bytes_V[index]) for m in members)


def test_roots_by_hand():
    teacher = ByteTokenizer(byte_level([(b"1", b"2"), (b"12", b"3"), (b"i", b"n"), (b"in", b"g")]))
    student = ByteTokenizer(byte_level([(b"i", b"n"), (b"in", b"g"), (b"l", b"y"), (b"ing", b"ly")]))
    tables = build_tables(teacher, student)
    bucket = lambda text: student.bytes_V[tables.root_S[student.id_of_bytes[text]]]  # noqa: E731
    assert bucket(b"ing") == b"ing" and bucket(b"ingly") == b"ing" and bucket(b"ly") == b"l"
    token = teacher.id_of_bytes[b"123"]
    assert pieces(tables, student, token) == [b"1", b"2", b"3"]


def test_a_vocabulary_with_spaces_and_bytes_of_its_own_meets_a_byte_level_one():
    teacher = ByteTokenizer(byte_level([(b" ", b"a"), (b" a", b"b"), (b"\xe4", b"\xbd")]))
    student = ByteTokenizer(byte_fallback(["\u2581", "a", "b"], [("\u2581", "a")]))
    tables = build_tables(teacher, student)
    assert pieces(tables, student, teacher.id_of_bytes[b" ab"]) == [b" a", b"b"]
    assert pieces(tables, student, teacher.id_of_bytes[b"\xe4\xbd"]) == [b"\xe4", b"\xbd"]
    # "a" and "<0x61>" are the same byte: one bucket, named after the text token
    same = [index for index, text in enumerate(student.bytes_V) if text == b"a"]
    assert len(same) == 2 and {int(tables.root_S[index]) for index in same} == {student.id_of_bytes[b"a"]}


def test_what_the_teacher_has_no_bytes_for_stands_for_itself():
    teacher = ByteTokenizer(byte_level([(b"a", b"b")], alphabet=b"ab"))
    student = ByteTokenizer(byte_level([(b"a", b"x"), (b"b", b"a")], alphabet=b"abx"))
    tables = build_tables(teacher, student)
    a, b, x, ax, ba = ids_of(student, b"a", b"b", b"x", b"ax", b"ba")
    assert tables.root_S[[a, b, x, ax, ba]].tolist() == [a, b, x, ax, b]
    assert pieces(tables, student, *ids_of(teacher, b"ab")) == [b"a", b"b"]


def test_one_tokenizer_is_the_identity_even_for_tokens_that_it_would_never_write():
    tokenizer = ByteTokenizer(byte_level([(b"b", b"c"), (b"a", b"b")]))  # "ab" of "abc" never survives
    tables = build_tables(tokenizer, ByteTokenizer(tokenizer.tokenizer))
    everything = list(range(len(tokenizer)))
    assert tables.identical and tables.pieces_P.tolist() == everything == tables.root_S.tolist()
    assert tables.offsets_T1.tolist() == [*everything, len(tokenizer)]


def test_markers_meet_by_meaning():
    teacher = ByteTokenizer(byte_level([]))
    student = ByteTokenizer(byte_level([], think=False, end="<eot>"))
    found = match_markers(teacher, student)
    (end, user, assistant, think) = ids_of(teacher, b"<|end|>", b"<|user|>", b"<|assistant|>", b"<think>")
    assert found[end] == ids_of(student, b"<eot>")
    assert found[user] == ids_of(student, b"<|user|>") and found[assistant] == ids_of(student, b"<|assistant|>")
    assert pieces_of(student, found[think]) == [bytes([b]) for b in b"<think>"]
    back = match_markers(student, teacher)
    assert set(back) == student.markers and back[ids_of(student, b"<eot>")[0]] == [end]


def test_whatever_ends_the_teachers_text_is_what_ends_the_students_turn():
    """Also where the student's end of sequence is another token, and the teacher has two that end a text."""
    teacher, student = byte_level([]), byte_level([], end="<eot>")
    for tokenizer in (teacher, student):
        tokenizer.add_special_tokens({"eos_token": "<eos>"})
    found = match_markers(ByteTokenizer(teacher), ByteTokenizer(student))
    assert [found[teacher.get_vocab()[name]] for name in ("<|end|>", "<eos>")] == [[student.get_vocab()["<eot>"]]] * 2


def test_an_unknown_marker_is_its_written_form():
    tokenizer = byte_level([])
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    teacher, student = ByteTokenizer(tokenizer), ByteTokenizer(byte_level([]))
    found = match_markers(teacher, student)[tokenizer.get_vocab()["<tool>"]]
    assert student.join(np.array(found)).tobytes() == b"<tool>"
    assert not set(found) & student.markers


def test_tables_come_back_from_their_file_and_another_pair_has_another(tmp_path):
    teacher, student = random_pair(3)
    made = load_tables(teacher, student, tmp_path)
    (path,) = tmp_path.iterdir()
    stamp = path.stat().st_mtime_ns
    again = load_tables(teacher, student, tmp_path)
    for name in ("identical", "offsets_T1", "pieces_P", "nodes_P", "marker_T", "root_S"):
        np.testing.assert_array_equal(getattr(again, name), getattr(made, name))
        assert getattr(again, name).dtype == getattr(made, name).dtype
    assert path.stat().st_mtime_ns == stamp
    load_tables(student, teacher, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def flipped(raw: bytes, byte: int) -> bytes:
    return raw[:byte] + bytes([raw[byte] ^ 4]) + raw[byte + 1 :]


def same_or_refused(path, read, expected) -> None:
    """The file gives the tables that were written, or an error that names it."""
    try:
        found = read()
    except DataError as error:
        assert str(path) in str(error)
    else:
        for field in fields(PairTables):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))


def test_no_flipped_bit_is_taken_for_a_table_or_ends_in_another_error(tmp_path):
    teacher, student = random_pair(3)
    made = load_tables(teacher, student, tmp_path)
    (path,) = tmp_path.iterdir()
    raw = path.read_bytes()
    for byte in range(0, len(raw), 7):
        path.write_bytes(flipped(raw, byte))
        same_or_refused(path, lambda: load_tables(teacher, student, tmp_path), made)


def test_a_folder_that_cannot_be_written_costs_a_warning_and_no_run(tmp_path):
    teacher, student = random_pair(3)
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="XDG_CACHE_HOME"):
        found = load_tables(teacher, student, tmp_path / "file" / "align")
    np.testing.assert_array_equal(found.pieces_P, build_tables(teacher, student).pieces_P)


def make_tables(teacher, student, folders, expected):
    assert all(np.array_equal(load_tables(teacher, student, each).nodes_P, expected) for each in folders)


def test_processes_that_make_one_file_at_once_all_have_it_and_leave_it_whole(tmp_path):
    teacher, student = random_pair(3)
    folders, expected = [tmp_path / str(i) for i in range(20)], build_tables(teacher, student).nodes_P
    workers = [
        get_context("fork").Process(target=make_tables, args=(teacher, student, folders, expected)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert [len(list(folder.iterdir())) for folder in folders] == [1] * 20


@pytest.mark.parametrize("damage", [lambda raw: raw[:100], lambda raw: b"", lambda raw: raw[:-40] + bytes(40)])
def test_a_damaged_file_names_itself_and_the_remedy(tmp_path, damage):
    teacher, student = random_pair(3)
    load_tables(teacher, student, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="made again") as error:
        load_tables(teacher, student, tmp_path)
    assert str(path) in str(error.value)
