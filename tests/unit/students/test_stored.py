"""Tokens that are kept from launch to launch: the same examples, read instead of made, and made again where they are
not to be trusted."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from student_world import make_stages, make_tokenizer, make_traces

from distill.errors import StoreError
from students import stored
from students.data import load_traces
from students.stored import Ids


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(params=["own", "text", "bytes"])
def load(request, tokenizer, tmp_path, ranks) -> Callable:
    """load(**more) reads the same traces for a student with the teacher's tokenizer, or another one from the text, or
    from the bytes."""
    traces = make_traces(tokenizer, 12)
    stages = make_stages(tmp_path, tokenizer, traces, shards=3)
    student = tokenizer if request.param == "own" else make_tokenizer(tmp_path / "own", vocab_size=280)
    logits = None if request.param == "text" else stages[1]
    teacher = str(make_folder(tokenizer, tmp_path)) if request.param == "bytes" else None

    def call(**more):
        return load_traces(stages[0], logits, student, 160, teacher, ranks=ranks, **more)

    call.traces = stages[0]
    return call


def make_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def told(data) -> list[tuple]:
    return [(e.key, list(e.prompt_ids), list(e.completion_ids), list(e.sampled_ids), e.shard) for e in data.examples]


def same_batches(a, b) -> bool:
    for i in range(len(a.examples)):
        one, other = a.collate([[i]], 400), b.collate([[i]], 400)
        assert torch.equal(one.input_ids_N, other.input_ids_N) and torch.equal(one.labels_M, other.labels_M)
        if one.targets is not None:
            for name, value in vars(one.targets).items():
                assert value is None or torch.equal(value, getattr(other.targets, name)), name
    return True


def refuse(*_):
    raise AssertionError("it was read again")


def test_what_was_kept_is_what_would_be_made_and_is_not_made_again(load, tmp_path, monkeypatch):
    plain, first = load(), load(keep_in=tmp_path / "kept")
    monkeypatch.setattr(stored, "read_traces", refuse)
    second = load(keep_in=tmp_path / "kept")
    assert len(plain.examples) == 10 and told(plain) == told(first) == told(second)
    assert plain.counts == first.counts == second.counts
    assert plain.lengths == second.lengths and plain.trained == second.trained and plain.keys == second.keys
    assert same_batches(plain, second)
    assert isinstance(second.examples[0].completion_ids, Ids)


@pytest.mark.parametrize("end", ["about", "ids"])
def test_a_flipped_bit_is_neither_a_traceback_nor_another_token(load, tmp_path, end):
    expected = told(load(keep_in=tmp_path / "kept"))
    path = min((tmp_path / "kept").glob(f"*.{end}"))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 40).tolist():
        path.unlink()  # the bytes of a file that is mapped would change under those who read it
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << int(rng.integers(8)))]) + whole[at + 1 :])
        assert told(load(keep_in=tmp_path / "kept")) == expected


@pytest.mark.parametrize("damage", ["cut ids", "cut rest", "no rest", "no ids", "nonsense"])
def test_what_cannot_be_read_is_made_again(load, tmp_path, damage):
    expected = told(load(keep_in=tmp_path / "kept"))
    ids, rest = (sorted((tmp_path / "kept").glob(f"*.{end}"))[1] for end in ("ids", "about"))
    before = rest.stat().st_mtime_ns
    path = ids if "ids" in damage else rest
    if damage.startswith("cut"):
        path.write_bytes(path.read_bytes()[:-40])
    elif damage.startswith("no "):
        path.unlink()
    else:
        path.write_bytes(b"nonsense")
    assert told(load(keep_in=tmp_path / "kept")) == expected
    assert rest.stat().st_mtime_ns != before
    untouched = sorted((tmp_path / "kept").glob("*.about"))[0]
    assert untouched.stat().st_mtime_ns < rest.stat().st_mtime_ns


def test_another_filter_makes_them_again(load, tmp_path):
    everything = load(keep_in=tmp_path / "kept")
    gone = everything.examples[3].key.split("/")[0]
    some = load(keep_in=tmp_path / "kept", leave_out=lambda prompt: prompt.key == gone, made_with="without one")
    assert len(some.examples) == len(everything.examples) - 1 and some.counts["overlapping"] == 1
    assert told(load(keep_in=tmp_path / "kept")) == told(everything)


def test_a_damaged_shard_is_told_of_though_its_tokens_are_kept(load, tmp_path):
    load(keep_in=tmp_path / "kept")
    shard = next(s for s in load.traces.shards() if s.name.endswith(".parquet"))
    shard.path.write_bytes(shard.path.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match=r"damaged"):
        load(keep_in=tmp_path / "kept")


def test_a_run_of_ids_is_a_sequence_of_numbers():
    array = np.arange(100, 120, dtype=np.int32)
    ids = Ids(array, 3, 8)
    assert len(ids) == 5 and list(ids) == [103, 104, 105, 106, 107] and ids[1:3] == [104, 105] and ids[-1] == 107
    assert ids + Ids(array, 0, 1) == [103, 104, 105, 106, 107, 100] and type(ids[0]) is int and 105 in ids
    assert np.array_equal(np.asarray(ids, np.int64), array[3:8]) and len(Ids(array, 4, 4)) == 0
    made = np.asarray(ids)
    made[0] = 0
    assert array[3] == 103
