"""Laws of the alignment: every student token has a place, the bytes are the trace's, reasons are what they say."""

import numpy as np
import pytest
from align_world import byte_level, ids_of, pieces_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_align_tables import random_pair

from distill.align import Aligner
from distill.align_bytes import ByteTokenizer
from distill.align_spans import ALIGNED, CONTRADICTED, INNER, INSIDE, RECUT, align
from distill.align_tables import build_tables
from distill.errors import DataError
from distill.tokens import encode_completion, end_id
from teachers.tiny.tokenizers import SPECS, build

SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=80, deadline=None)
@given(seed=SEEDS, traces=st.integers(0, 4))
def test_every_position_follows_the_definitions(seed, traces):
    """Against a plain loop over bytes."""
    teacher, student = random_pair(seed)
    tables = build_tables(teacher, student)
    rng = np.random.default_rng(seed)
    texts = [rng.integers(len(teacher) - 5, size=rng.integers(0, 12)) for _ in range(traces)]
    found = align(teacher, student, tables, texts)
    n = 0
    for index, ids in enumerate(texts):
        own = found.trace(index).tolist()
        raw = teacher.join(ids).tobytes()
        assert own == student.encode([raw])[0].tolist()
        starts = np.cumsum([0, *teacher.lens_V[ids]]).tolist()
        own_starts = np.cumsum([0, *student.lens_V[own]]).tolist()[:-1]
        for j, start in enumerate(own_starts):
            i = max(i for i in range(len(ids)) if starts[i] <= start)
            assert found.teacher_N[n] == found.teacher_offsets_B1[index] + i
            assert found.before_N[n] == (own[j - 1] if j else -1)
            pieces = student.encode([teacher.bytes_V[ids[i]]])[0].tolist()
            depth = sum(starts[i] <= s < start for s in own_starts)
            root = tables.root_S
            if starts[i] not in own_starts:
                expected = INSIDE
            elif pieces[:depth] != own[j - depth : j] or depth >= len(pieces):
                expected = RECUT
            elif root[own[j]] != root[pieces[depth]]:
                expected = CONTRADICTED
            else:
                expected = INNER if depth else ALIGNED
            assert found.kind_N[n] == expected
            assert expected == INSIDE or found.depth_N[n] == depth
            n += 1
    assert n == len(found)


@pytest.fixture(scope="module")
def bundled():
    lines = ["we add 12 and 345.\n\nSo it's \u00e9t\u00e9, \u4f60\u597d!", "  x_1 = 25/3 </think>\n\\boxed{7}"] * 30
    made = {name: build(spec, lines) for name, spec in SPECS.items()}
    return made["teacher"], [Aligner(made["teacher"], made[name]) for name in ("qwen", "llama")]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(blacklist_categories=("Cs",)), max_size=30), cut=st.integers(0, 3))
def test_any_text_keeps_its_bytes_and_every_position_gets_a_kind(bundled, text, cut):
    """Also one that the token budget cut inside a character; the qwen student's own normalizer would change it."""
    teacher, aligners = bundled
    ids = encode_completion(teacher, text + "\u4f60e\u0301\u212b \U0001f600")
    for aligner in aligners:
        traces = [np.array([*ids, end_id(teacher)]), np.array(ids[: len(ids) - cut])]
        found = aligner.align(traces)
        for index, trace in enumerate(traces):
            own = found.trace(index)
            written = aligner.student.join(own).tobytes()
            assert written == aligner.teacher.join(trace).tobytes()  # "<|end|>" is written alike in both
        assert int(found.lens_N.sum()) == sum(int(aligner.teacher.lens_V[trace].sum()) for trace in traces)
        assert found.kind_N[found.student_offsets_B1[1] - 1] == ALIGNED  # the end


def test_by_hand():
    teacher = byte_level([(b"1", b"2"), (b"12", b"3"), (b"a", b"b"), (b"ab", b"c"), (b"c", b"d"), (b"x", b"y")])
    student = byte_level([(b"b", b"c"), (b"y", b"z")])
    aligner = Aligner(teacher, student)
    t = aligner.teacher
    ids = ids_of(t, b"123", b"ab", b"cd", b"</think>", b"xy", b"z", b"<|end|>")
    found = aligner.align([ids])
    assert pieces_of(aligner.student, found.ids_N) == [
        b"1", b"2", b"3", b"a", b"bc", b"d", b"</think>", b"x", b"yz", b"<|end|>",
    ]  # fmt: skip
    assert found.kind_N.tolist() == [
        ALIGNED, INNER, INNER,
        ALIGNED, INNER,  # "bc" stands where "ab" has its piece "b": same bucket, since the teacher has no "bc"
        INSIDE,  # in "cd", whose beginning the student does not see
        ALIGNED, ALIGNED, INNER, ALIGNED,
    ]  # fmt: skip
    assert found.before_N[[0, 7]].tolist() == [-1, -1]  # nothing merges across a marker


def test_a_token_whose_cut_the_following_text_changes():
    """Alone "abx" is a, bx; before "y" it is ab, xy: behind its beginning stand other pieces than the table's."""
    teacher = byte_level([(b"a", b"b"), (b"ab", b"x")])
    student = byte_level([(b"x", b"y"), (b"b", b"x"), (b"a", b"b")])
    aligner = Aligner(teacher, student)
    found = aligner.align([ids_of(aligner.teacher, b"abx", b"y"), ids_of(aligner.teacher, b"abx")])
    assert pieces_of(aligner.student, found.ids_N) == [b"ab", b"xy", b"a", b"bx"]
    # "ab" is shared, so it is no way to begin with "a"; "bx" is not, so it would be one to go on with "b"
    assert found.kind_N.tolist() == [CONTRADICTED, RECUT, ALIGNED, INNER]


def test_a_marker_that_the_student_lacks_is_text_apart_from_its_neighbours():
    teacher = byte_level([])
    student = byte_level([(b".", b"<"), (b">", b"\n")], think=False)
    aligner = Aligner(teacher, student)
    ids = ids_of(aligner.teacher, b".", b"</think>", b"\n", b"<|end|>")
    found = aligner.align([ids])
    expected = [b".", *(bytes([b]) for b in b"</think>"), b"\n", b"<|end|>"]
    assert pieces_of(aligner.student, found.ids_N) == expected  # neither ".<" nor ">\n"
    assert found.kind_N.tolist() == [ALIGNED, ALIGNED, *[INNER] * 7, ALIGNED, ALIGNED]


def test_ids_as_sampled_stay_whether_or_not_the_tokenizer_would_write_them():
    teacher = byte_level([(b"a", b"b")])
    same = Aligner(teacher, teacher)
    ids = ids_of(same.teacher, b"a", b"b", b"ab")
    assert same.align([ids]).ids_N.tolist() == ids
    other = Aligner(teacher, byte_level([(b"a", b"b")], think=False))
    found = other.align([ids])
    assert pieces_of(other.student, found.ids_N) == [b"ab", b"ab"]
    assert found.kind_N.tolist() == [CONTRADICTED, ALIGNED]


def test_text_that_is_no_utf8_and_a_normalizer_that_would_change_bytes():
    teacher = byte_level([(b"\xe4", b"\xbd")])
    aligner = Aligner(teacher, byte_level([(b"\xbd", b"\xa0")], nfc=True))
    ids = ids_of(aligner.teacher, b"e", b"\xcc", b"\x81", b"\xe4\xbd", b"\xa0", b"\xff")
    found = aligner.align([ids])
    assert b"".join(pieces_of(aligner.student, found.ids_N)) == b"e\xcc\x81\xe4\xbd\xa0\xff"
    assert found.kind_N.tolist() == [ALIGNED, ALIGNED, ALIGNED, ALIGNED, INNER, ALIGNED]


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_an_id_that_nothing_owns_raises(bad):
    aligner = Aligner(byte_level([]), byte_level([], think=False))
    with pytest.raises(DataError, match="no bytes for"):
        aligner.align([[65, bad]])


def test_alignment_of_several_traces_is_that_of_each():
    teacher, student = random_pair(7)
    tables = build_tables(teacher, student)
    rng = np.random.default_rng(0)
    traces = [rng.integers(len(teacher) - 5, size=n) for n in (9, 0, 4, 1)]
    together = align(teacher, student, tables, traces)
    for index, ids in enumerate(traces):
        alone = align(teacher, student, tables, [ids])
        own = slice(*together.student_offsets_B1[index : index + 2])
        for name in ("ids_N", "lens_N", "before_N", "kind_N"):
            np.testing.assert_array_equal(getattr(together, name)[own], getattr(alone, name))
        np.testing.assert_array_equal(together.teacher_N[own] - together.teacher_offsets_B1[index], alone.teacher_N)
    assert isinstance(teacher, ByteTokenizer)
