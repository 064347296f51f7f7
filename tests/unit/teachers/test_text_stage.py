"""What the teacher reads and did not write: its distributions, shard by shard, through a kill, marked as read."""

import json
from pathlib import Path

import numpy as np
import pytest
from service_world import serving

from distill.client import ServiceTeacher
from distill.config import load_config
from distill.config_mixture import GeneralJsonl, TextSet
from distill.dist import init_ranks
from distill.errors import DataError
from distill.logit_cache import CacheReader
from distill.records import CaptureSpec
from distill.split import Split
from distill.store import RunFolder
from distill.tokens import load_tokenizer
from teachers.engine import TeacherEngine
from teachers.texts import TextStage, check_texts, readable_texts

TEACHER = "teachers/tiny/teacher"
PEOPLE = [
    [{"role": "user", "content": f"What is {i} + {i}?"}, {"role": "assistant", "content": f"Twice {i} is {2 * i}."}]
    for i in range(11, 19)
]


@pytest.fixture(scope="module")
def engine():
    return TeacherEngine(TEACHER)


def people(folder: Path, conversations=PEOPLE, **more) -> TextSet:
    path = folder / "people.jsonl"
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in conversations))
    return TextSet(name="people", source=GeneralJsonl(path=str(path)), **more)


def read(folder: Path, each: TextSet, load):
    """(counts, the opened stage) after one launch."""
    config = load_config("configs/demo.yaml", ["traces.shard_prompts=3", "teacher.capture.k_max=16"])
    stage = RunFolder(folder, "run", commit="test").stage("logits", each.name).open({}, {})
    counts = TextStage(config, each, stage, init_ranks("cpu"), load, Split()).run()
    stage.run.release()
    return counts, stage


def test_every_turn_is_scored_after_its_prompt_and_marked_as_read(engine, tmp_path):
    counts, stage = read(tmp_path, people(tmp_path), lambda: engine)
    assert counts["texts"] == 8 and len(stage.shards()) == 3
    texts, _ = readable_texts(people(tmp_path), engine.tokenizer)
    assert counts["tokens"] == sum(len(text.completion_ids) for text in texts)
    reader = CacheReader(stage.path / "people-00001.cache")
    reader.require(sampled=False, complete=True)
    with pytest.raises(DataError, match="the teacher only read"):
        reader.require(sampled=True)
    (alone,) = engine.score([(texts[4].prompt_ids, texts[4].completion_ids)], CaptureSpec(16, 1e-3))
    found = reader[texts[4].key]
    assert found.sampled_T.tolist() == texts[4].completion_ids
    dense = np.exp(
        alone.logprobs_S[alone.ids_S == alone.sampled_T[np.repeat(np.arange(len(alone)), np.diff(alone.offsets_T1))]]
    )
    kept = np.exp(
        found.logprobs_S[found.ids_S == found.sampled_T[np.repeat(np.arange(len(found)), np.diff(found.offsets_T1))]]
    )
    np.testing.assert_allclose(kept, dense, atol=0.01)


def test_a_launch_that_goes_on_makes_only_what_is_missing_and_the_same(engine, tmp_path):
    each = people(tmp_path)
    _, stage = read(tmp_path, each, lambda: engine)
    before = {shard.name: shard.sha256 for shard in stage.shards()}
    (stage.path / "people-00001.cache").unlink()
    untouched = (stage.path / "people-00000.cache").stat().st_mtime_ns
    counts, stage = read(tmp_path, each, lambda: engine)
    assert {shard.name: shard.sha256 for shard in stage.shards()} == before and counts["texts"] == 8
    assert (stage.path / "people-00000.cache").stat().st_mtime_ns == untouched

    def nobody():
        raise AssertionError("nothing is missing")

    assert read(tmp_path, each, nobody)[0] == counts


def test_what_the_teacher_cannot_read_is_counted_by_reason(tmp_path):
    tokenizer = load_tokenizer(TEACHER)
    special = next(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    more = [
        [{"role": "user", "content": f"a {special} b"}, {"role": "assistant", "content": "c"}],
        [{"role": "user", "content": "tell"}, {"role": "assistant", "content": "and so on " * 60}],
        [{"role": "user", "content": "nothing"}],
    ]
    each = people(tmp_path, PEOPLE + more, max_tokens=100)
    texts, counts = readable_texts(each, tokenizer)
    assert len(texts) == 8 and counts["read"] == 11 and counts["turns"] == 10
    assert (counts["refused"], counts["too_long"], counts["no_assistant"]) == (1, 1, 1)
    assert readable_texts(each.model_copy(update={"max_tokens": 5000}), tokenizer, max_positions=100)[1] == counts
    with pytest.raises(DataError, match="can read none of the texts"):
        readable_texts(each.model_copy(update={"max_tokens": 8}), tokenizer)


def test_sets_that_cannot_be_read_are_told_before_the_traces_and_read_ones_are_not_looked_at(engine, tmp_path):
    def config(each):
        given = {"name": each.name, "source": each.source.model_dump(), "max_tokens": each.max_tokens}
        return load_config("configs/demo.yaml", [f"train.text_sets=[{json.dumps(given)}]"])

    run = RunFolder(tmp_path, "run", commit="test")
    check_texts(config(people(tmp_path)), run)
    with pytest.raises(DataError, match="can read none of the texts"):
        check_texts(config(people(tmp_path, max_tokens=8)), run)
    broken = people(tmp_path)
    with Path(broken.source.path).open("a") as file:
        file.write('{"messages": 3}\n')
    with pytest.raises(DataError, match="line 9: the field 'messages' is no conversation"):
        check_texts(config(broken), run)
    run.stage("logits", "people").open({}, {}).finish({})
    check_texts(config(broken), run)
    run.release()


def test_general_data_that_cannot_be_learned_is_told_before_the_traces(tmp_path):
    path, run = tmp_path / "chats.jsonl", RunFolder(tmp_path, "run", commit="test")
    source = {"kind": "jsonl", "path": str(path)}
    config = load_config("configs/demo.yaml", [f"train.general={json.dumps({'sources': [source]})}"])
    path.write_text(json.dumps({"messages": PEOPLE[0]}) + "\n")
    check_texts(config, run)
    path.write_text(path.read_text() + '{"messages": 3}\n')
    with pytest.raises(DataError, match="line 2: the field 'messages' is neither text nor a conversation"):
        check_texts(config, run)
    asked = [{"role": "system", "content": "Be brief."}, *PEOPLE[0]]  # the bundled students know no system
    path.write_text(json.dumps({"messages": asked}) + "\n")
    with pytest.raises(DataError, match=r"none of 1 rows can be asked of teachers/tiny/student-qwen; .*not system"):
        check_texts(config, run)
    both = json.dumps({"sources": [source, {"kind": "bundled"}]})
    check_texts(load_config("configs/demo.yaml", [f"train.general={both}"]), run)  # the others are enough
    run.stage("traces").open({}, {}).finish({})
    check_texts(config, run)  # the training reads it next, and says the same
    run.release()


def test_through_the_service_the_same_is_read(engine, tmp_path):
    each = people(tmp_path)
    (tmp_path / "own").mkdir(), (tmp_path / "served").mkdir()
    own = read(tmp_path / "own", each, lambda: engine)
    with serving(engine) as world:
        client = ServiceTeacher(world.url, TEACHER, concurrency=2)
        served = read(tmp_path / "served", each, lambda: client)
        client.close()
    assert own[0] == served[0]
    for shard in own[1].shards():
        a, b = (CacheReader(stage.path / shard.name) for stage in (own[1], served[1]))
        assert list(a.keys()) == list(b.keys()) and a.header == b.header
        for key in a.keys():  # noqa: SIM118
            np.testing.assert_array_equal(a[key].sampled_T, b[key].sampled_T)
            np.testing.assert_allclose(a[key].tail_T, b[key].tail_T, atol=1e-3)
