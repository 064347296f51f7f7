"""Laws of the harness: what a model is asked depends on the prompts alone; shards resume; nothing is lost or mixed."""

import json
import threading

import numpy as np
import pytest
from eval_world import PARAMS, answer, byte_tokenizer, open_run, run_eval, sums

from distill.errors import DataError, StoreError
from distill.evals import stats
from distill.evals.harness import evaluate
from distill.evals.results import Candidate, evaluated, load_result
from distill.grade import Grader
from distill.records import CaptureSpec, Prompt, Sample, TokenDists, sample_seed
from distill.store import RunFolder
from distill.tokens import render_prompt


@pytest.fixture(scope="module")
def tok():
    return byte_tokenizer()


def one_dist_a_token(ids):
    """The teacher is certain of every token up to one in a thousand."""
    count = len(ids)
    return TokenDists(
        np.arange(count + 1, dtype=np.int64),
        np.array(ids, np.int32),
        np.full(count, np.log(0.999), np.float32),
        np.full(count, 0.001, np.float32),
        np.zeros(count, np.float32),
        np.array(ids, np.int32),
    )


def mixed(prompt, index):
    """Sample 0 right, 1 wrong, 2 cut off; prompts with answer 8 are never readable."""
    if prompt.answer == "8":
        return "hm</think>\nno box"
    return (answer(prompt.answer), answer("-1"), ("thinking for ever", "length"))[index]


def test_verdicts_become_correctness_lengths_and_shares(tmp_path, tok):
    prompts = sums(6)
    result, _ = run_eval(open_run(tmp_path), tok, prompts, mixed)
    expected_PK = np.tile([1.0, 0.0, 0.0], (6, 1))
    expected_PK[4] = 0.0
    np.testing.assert_array_equal(result.correctness_PK, expected_PK)
    assert result.truncated_share == pytest.approx(5 / 18)
    assert [p.key for p in result.prompts] == [p.key for p in prompts] and result.prompts == prompts
    # Bytes of the text, </think> one token, and the end token when it ended.
    assert result.tokens_PK[0, 2] == len("thinking for ever")
    assert result.tokens_PK[0, 0] == len("think about it") + 1 + len("\n\\boxed{0}") + 1
    assert result.mean_tokens == pytest.approx(result.tokens_PK.mean())
    assert result.texts[0][0] == answer("0") and result.answers[0] == ["correct", "read: -1", None]
    assert stats.pass_at_1(result.correctness_PK).value == pytest.approx(5 / 18)


def test_every_model_is_asked_the_same_with_the_same_seeds(tmp_path, tok):
    prompts, folder = sums(5), open_run(tmp_path)
    asked = {}
    for name in ("teacher", "base"):
        _, sampler = run_eval(folder, tok, prompts, mixed, name=name, run_seed=7)
        asked[name] = {(r.key, r.sample_index): (r.seed, r.prompt_ids) for r in sampler.requests}
    assert asked["teacher"] == asked["base"] and len(asked["base"]) == 15
    first = prompts[0]
    assert asked["base"][first.key, 2] == (sample_seed(7, first.key, 2), tuple(render_prompt(tok, first.text)))


def test_a_finished_evaluation_asks_for_nothing_and_reads_back_the_same(tmp_path, tok):
    prompts, folder = sums(9), open_run(tmp_path)
    first, _ = run_eval(folder, tok, prompts, mixed)
    again, sampler = run_eval(folder, tok, prompts, mixed)
    assert sampler.requests == [] and again.rows == first.rows


def test_an_interrupted_evaluation_asks_only_for_the_missing_shard(tmp_path, tok):
    prompts, folder = sums(10), open_run(tmp_path)
    whole, _ = run_eval(folder, tok, prompts, mixed)
    lost = folder.path / "eval-teacher-00001.parquet"
    lost.unlink()
    again, sampler = run_eval(folder, tok, prompts, mixed)
    assert {r.key for r in sampler.requests} == {p.key for p in prompts[4:8]}
    assert again.rows == whole.rows


def test_a_sampler_that_dies_loses_only_unfinished_shards(tmp_path, tok):
    prompts, folder = sums(8), open_run(tmp_path)

    def dies_late(prompt, index):
        return answer("0") if prompt in prompts[:4] else answer("0") + " and a long tail"

    class Dying:
        def sample(self, requests, params, capture):
            from eval_world import Scripted

            for number, sample in enumerate(Scripted(tok, prompts, dies_late).sample(requests, params, capture)):
                if number == 14:  # the short completions of the first shard are 12
                    raise KeyboardInterrupt
                yield sample

    with pytest.raises(KeyboardInterrupt), Grader(1) as grader:
        evaluate(
            Candidate("m", "student"), Dying(), tok, prompts, PARAMS, 3, grader, folder, shard_prompts=4, progress=False
        )
    assert [s.name for s in folder.shards()] == ["eval-m-00000.parquet"]


def test_two_ranks_share_the_shards_and_both_get_the_whole_result(tmp_path, tok):
    prompts = sums(14)
    alone, _ = run_eval(open_run(tmp_path / "alone"), tok, prompts, mixed)
    run = RunFolder(tmp_path / "two", "run", commit="abc1234").stage("eval").open({"eval": 1}, {})
    folders = [run, RunFolder(tmp_path / "two", "run", commit="abc1234", rank=1).stage("eval").open({"eval": 1}, {})]
    gate, found = threading.Barrier(2), {}

    def work(rank):
        own = byte_tokenizer()  # as each rank has
        found[rank] = run_eval(folders[rank], own, prompts, mixed, rank=rank, world=2, barrier=gate.wait)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    asked = [{r.key for r in found[rank][1].requests} for rank in (0, 1)]
    assert not asked[0] & asked[1] and asked[0] | asked[1] == {p.key for p in prompts}
    assert found[0][0].rows == found[1][0].rows == alone.rows


def test_every_rank_calls_its_sampler_when_any_shard_is_missing(tmp_path, tok):
    # One missing shard, two ranks: rank 1 has nothing to ask, but a sharded model needs it to take part.
    prompts, calls = sums(3), []

    class Counting:
        def sample(self, requests, params, capture):
            calls.append(list(requests))
            return iter(())

    run_eval(open_run(tmp_path), tok, sums(1), mixed, name="other")
    with pytest.raises(StoreError, match="no eval results"), Grader(1) as grader:
        evaluate(
            Candidate("m", "student"), Counting(), tok, prompts, PARAMS, 1, grader, open_run(tmp_path),
            rank=1, world=2, progress=False,
        )  # fmt: skip
    assert calls == [[]]


def test_captured_distributions_are_kept_for_sample_0_of_every_prompt(tmp_path, tok):
    from distill.logit_cache import CacheReader

    prompts, folder = sums(6), open_run(tmp_path)
    run_eval(folder, tok, prompts, mixed, dists=one_dist_a_token, capture=CaptureSpec())
    readers = [CacheReader(folder.path / f"eval-teacher-0000{i}.cache") for i in (0, 1)]
    keys = [key for reader in readers for key in reader.keys()]  # noqa: SIM118
    assert sorted(keys) == sorted(f"{p.key}/0" for p in prompts)
    row = load_result(folder, "teacher").rows[0]
    stored = readers[0][f"{prompts[0].key}/0"]
    assert stored.sampled_T.tolist() == row["completion_ids"][0]


def test_results_of_other_weights_prompts_or_sampling_are_refused(tmp_path, tok):
    prompts, folder = sums(4), open_run(tmp_path)
    run_eval(folder, tok, prompts, mixed)
    for change in ({"print": "w1"}, {"run_seed": 1}, {"k": 2}):
        with pytest.raises(StoreError, match="other prompts, sampling settings, seed or weights"):
            run_eval(folder, tok, prompts, mixed, **change)
    with pytest.raises(StoreError, match="other prompts"):
        run_eval(folder, tok, [*prompts[:3], Prompt("What is 9+9?", "18", "odd", grader="integer")], mixed)


def test_a_damaged_shard_is_named_and_not_used(tmp_path, tok):
    prompts, folder = sums(4), open_run(tmp_path)
    run_eval(folder, tok, prompts, mixed)
    path = folder.path / "eval-teacher-00000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"eval-teacher-00000\.parquet"):
        run_eval(folder, tok, prompts, mixed)


def test_grader_failures_are_counted_and_left_out_of_accuracy(tmp_path, tok):
    class Failing(Grader):
        def grade(self, items):
            from dataclasses import replace

            graded = super().grade(items)
            return [replace(g, verdict="error", detail="broke") if g.extracted == "-1" else g for g in graded]

    from eval_world import Scripted

    prompts = sums(3)
    write = lambda prompt, index: (answer(prompt.answer), answer("-1"))[index]  # noqa: E731
    with Failing(1) as grader:
        result = evaluate(
            Candidate("m", "student"), Scripted(tok, prompts, write), tok, prompts, PARAMS, 2, grader,
            open_run(tmp_path), progress=False,
        )  # fmt: skip
    assert result.grader_errors == 3
    assert stats.pass_at_1(result.correctness_PK).value == 1.0
    assert json.dumps(result.rows[0]["detail"]) == '["", "broke"]'


@pytest.mark.parametrize("fault", ["missing", "twice", "stranger"])
def test_a_sampler_that_returns_other_samples_than_asked_is_an_error(tmp_path, tok, fault):
    class Faulty:
        def sample(self, requests, params, capture):
            samples = [Sample(r.key, r.sample_index, r.seed, [1, 2], "length") for r in requests]
            if fault == "missing":
                samples.pop()
            elif fault == "twice":
                samples.append(samples[0])
            else:
                samples[0] = Sample("0" * 16, 0, 1, [1], "length")
            yield from samples

    with pytest.raises(DataError), Grader(1) as grader:
        evaluate(
            Candidate("m", "student"), Faulty(), tok, sums(2), PARAMS, 2, grader, open_run(tmp_path), progress=False
        )


def test_no_prompt_or_a_repeated_prompt_is_an_error_before_any_work(tmp_path, tok):
    for prompts, what in (([], "no prompt"), ([*sums(2), sums(1)[0]], "twice")):
        with pytest.raises(DataError, match=what):
            run_eval(open_run(tmp_path), tok, prompts, mixed)


def test_model_names_that_are_no_file_names_do_not_collide(tmp_path, tok):
    folder = open_run(tmp_path)
    for name, text in (("a/b", "0"), ("a-b", "1"), ("a b", "2")):
        run_eval(folder, tok, sums(2), lambda p, i, text=text: answer(text), name=name)
    texts = {name: load_result(folder, name).texts[0][0] for name in ("a/b", "a-b", "a b")}
    assert texts == {"a/b": answer("0"), "a-b": answer("1"), "a b": answer("2")}
    assert {c.name for c in evaluated(folder)} == {"a/b", "a-b", "a b"}


def test_models_are_listed_teacher_base_response_logits(tmp_path, tok):
    folder = open_run(tmp_path)
    for name, role, base, loss in (
        ("z-logits", "student", "b", "logits"), ("a-response", "student", "b", "response"),
        ("b", "base", "", ""), ("t", "teacher", "", ""),
    ):  # fmt: skip
        run_eval(folder, tok, sums(1), mixed, name=name, role=role, base=base, loss=loss)
    assert [c.name for c in evaluated(folder)] == ["t", "b", "a-response", "z-logits"]
