from dataclasses import replace

import pytest
import torch
from student_world import make_dists, make_stages, make_tokenizer, make_traces

from distill.errors import DataError
from distill.records import SamplingParams
from distill.sampling_law import sampling_law
from distill.tokens import end_id
from students.data import load_traces


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_a_micro_batch_by_hand(tokenizer, tmp_path):
    base = make_traces(tokenizer, 2)
    short = [
        replace(base[0], prompt_ids=[5, 6, 7], completion_ids=[8, 9, 10, 1]),
        replace(base[1], prompt_ids=[11], completion_ids=[12, 1]),
    ]
    stages = make_stages(tmp_path, tokenizer, short, shards=1)
    data = load_traces(*stages, tokenizer, 96)
    assert (data.lengths, data.trained) == ([6, 2], [4, 2])
    batch = data.collate([[1, 0]], 400)
    assert batch.input_ids_N.tolist() == [11, 12, 5, 6, 7, 8, 9, 10]
    assert batch.position_ids_N.tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
    assert batch.seq_lens == [2, 6]
    # the last prompt token predicts the first of the completion, the token before the stop token predicts that
    assert batch.trained_M.tolist() == [0, 1, 4, 5, 6, 7]
    assert batch.labels_M.tolist() == [12, 1, 8, 9, 10, 1]
    # each trained position has the distribution of the token that it predicts
    for row, (ids, seed) in enumerate([([12, 1], 1), ([12, 1], 1), *[([8, 9, 10, 1], 0)] * 4]):
        dists, t = make_dists(ids, len(tokenizer), seed), [0, 1, 0, 1, 2, 3][row]
        own = slice(dists.offsets_T1[t], dists.offsets_T1[t + 1])
        filled = batch.targets.logprobs_NK[row] > -torch.inf
        found = dict(zip(batch.targets.ids_NK[row][filled].tolist(), batch.targets.logprobs_NK[row][filled].tolist()))
        assert found == pytest.approx(dict(zip(dists.ids_S[own].tolist(), dists.logprobs_S[own].tolist())), abs=1 / 8)
        assert float(batch.targets.tail_N[row]) == pytest.approx(float(dists.tail_T[t]), rel=1 / 32)
        assert batch.labels_M[row] in batch.targets.ids_NK[row]


def test_dropped_and_too_long_traces_are_counted_and_never_cut(tokenizer, tmp_path):
    traces = make_traces(tokenizer, 20)
    stages = make_stages(tmp_path, tokenizer, traces)
    kept = [trace for trace in traces if trace.keep]
    lengths = sorted(len(t.prompt_ids) + len(t.completion_ids) - 1 for t in kept)
    limit = lengths[len(lengths) // 2]
    data = load_traces(*stages, tokenizer, limit)
    assert data.counts["traces"] == 20 and data.counts["kept"] == 16
    assert data.counts["too_long"] == sum(length > limit for length in lengths) > 0
    assert sorted(data.lengths) == [length for length in lengths if length <= limit]
    assert data.counts["input_tokens"] == sum(data.lengths)
    assert data.counts["retokenised"] == 0
    texts = {trace.sample_key: trace.completion_ids for trace in kept}
    assert all(example.completion_ids == texts[example.key] for example in data.examples)
    with pytest.raises(DataError, match="no trace is left"):
        load_traces(*stages, tokenizer, 8)


def test_response_loss_needs_no_distributions(tokenizer, tmp_path):
    traces, _ = make_stages(tmp_path, tokenizer, make_traces(tokenizer, 4))
    data = load_traces(traces, None, tokenizer, 96)
    assert data.caches is None and data.collate([[0, 1]], 400).targets is None


def test_a_trace_without_its_distributions_raises(tokenizer, tmp_path):
    traces = make_traces(tokenizer, 6)
    stages = make_stages(tmp_path, tokenizer, traces, without=(traces[3].sample_key,))
    with pytest.raises(DataError, match=f"trace {traces[3].sample_key} has no teacher distributions") as error:
        load_traces(*stages, tokenizer, 96)
    assert "traces-00001" in str(error.value) and "loss.kind: response" in str(error.value)
    (stages[1].path / "traces-00000.cache").unlink()
    with pytest.raises(DataError, match=r"traces-00000\.cache has no teacher distributions"):
        load_traces(*stages, tokenizer, 96)


def test_distributions_of_another_text_raise(tokenizer, tmp_path):
    traces = make_traces(tokenizer, 3)
    stages = make_stages(tmp_path / "a", tokenizer, traces, shards=1)
    other = [replace(traces[0], completion_ids=[*traces[0].completion_ids[:-2], 40, 1]), *traces[1:]]
    others = make_stages(tmp_path / "b", tokenizer, other, shards=1)
    data = load_traces(stages[0], others[1], tokenizer, 96)
    with pytest.raises(DataError, match="of another text"):
        data.collate([[0]], 400)
    assert data.collate([[1]], 400).keys == [traces[1].sample_key]


def test_a_teacher_token_outside_the_students_vocabulary_raises(tokenizer, tmp_path):
    data = load_traces(*make_stages(tmp_path, tokenizer, make_traces(tokenizer, 3), shards=1), tokenizer, 96)
    with pytest.raises(DataError, match="outside the student's 20 tokens"):
        data.collate([[0]], 20)


def test_another_tokenizer_reads_the_text_again_and_cannot_take_logits(tokenizer, tmp_path):
    own = make_tokenizer(tmp_path / "own", vocab_size=280)
    traces = make_traces(tokenizer, 6)
    stages = make_stages(tmp_path, tokenizer, traces)
    data = load_traces(stages[0], None, own, 160)
    assert data.counts["retokenised"] == data.counts["kept"] == 5
    texts = {trace.sample_key: trace for trace in traces}
    for example in data.examples:
        assert example.completion_ids[-1] == end_id(own)
        assert own.decode(example.completion_ids[:-1]) == texts[example.key].text
        assert own.decode(example.prompt_ids) == f"<|user|>{texts[example.key].prompt.text}<|assistant|><think>\n"
    with pytest.raises(DataError, match="tokenizer"):
        load_traces(*stages, own, 160)


def test_half_a_character_of_the_teacher_is_not_learned_as_another_one(tokenizer, tmp_path):
    own, traces = make_tokenizer(tmp_path / "own", vocab_size=280), make_traces(tokenizer, 3)
    half = tokenizer.convert_tokens_to_ids("Ã")  # the first byte of é
    ids = [*traces[0].completion_ids[:-1], half, traces[0].completion_ids[-1]]
    traces[0] = replace(traces[0], completion_ids=ids, text=tokenizer.decode(ids[:-1]))
    stages = make_stages(tmp_path, tokenizer, traces)
    data = load_traces(stages[0], None, own, 160)
    assert data.counts["not_utf8"] == 1 and {e.key for e in data.examples} == {t.sample_key for t in traces[1:]}
    assert load_traces(stages[0], None, tokenizer, 160).counts["not_utf8"] == 0  # its own tokens say it


def test_an_empty_share_is_one_token_without_loss(tokenizer, tmp_path):
    data = load_traces(*make_stages(tmp_path, tokenizer, make_traces(tokenizer, 3)), tokenizer, 96)
    batch = data.collate([], 400)
    assert batch.labels_M.tolist() == [-100] and batch.seq_lens == [1] and batch.keys == []


def test_the_target_can_be_the_law_that_the_traces_were_drawn_from(tokenizer, tmp_path):
    traces = make_traces(tokenizer, 3)
    stages = make_stages(tmp_path, tokenizer, traces, shards=1, sampling={"n": 2, "temperature": 0.5, "top_p": 0.8})
    own, law = (load_traces(*stages, tokenizer, 96, target=target) for target in ("teacher", "sampling"))
    assert own.law is None and law.law == SamplingParams(0.5, 0.8)
    targets = law.collate([[0]], 400).targets
    wanted = sampling_law(own._dists(own.examples[0]), SamplingParams(0.5, 0.8))
    assert torch.equal(targets.tail_N, torch.from_numpy(wanted.tail_T))
    filled = targets.logprobs_NK > -torch.inf
    assert torch.equal(filled.sum(1), torch.from_numpy(wanted.offsets_T1).diff())
    assert torch.equal(targets.ids_NK[filled], torch.from_numpy(wanted.ids_S).long())
    assert torch.equal(targets.logprobs_NK[filled], torch.from_numpy(wanted.logprobs_S))
    unknown = make_stages(tmp_path / "unknown", tokenizer, traces, shards=1)
    with pytest.raises(DataError, match="how the traces were drawn"):
        load_traces(*unknown, tokenizer, 96, target="sampling")
