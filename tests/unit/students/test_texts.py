"""Laws of training on text that the teacher only read: what is learned of it, and what never is."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from student_world import make_dists, make_stages, make_traces
from transformers import AutoModelForCausalLM

from distill.cache_format import CacheHeader
from distill.config import load_config
from distill.config_mixture import GeneralJsonl, TextSet, missing_for_mixture
from distill.conversations import read_turns
from distill.errors import ConfigError, DataError
from distill.logit_cache import CacheReader, CacheWriter, to_sparse_targets
from distill.losses.buckets import BucketedTargets
from distill.prompts import normalised
from distill.records import SamplingParams
from distill.sampling_law import sampling_law
from distill.store import RunFolder
from distill.tokens import encode_completion, end_id, fingerprint, load_tokenizer
from students import replay
from students.data import Example, TraceData, load_traces, without_cut_chunks
from students.mixture import Mixture, Part, merge
from students.step import LossSettings, StudentStep
from students.texts import load_texts


def said(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def read_set(root, tokenizer, conversations, *, sampled=False, name="people"):
    """(the set, its finished stage) as teachers/texts.py leaves them, with random distributions."""
    path = root / f"{name}.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in conversations))
    each = TextSet(name=name, source=GeneralJsonl(path=str(path)))
    run = RunFolder(root, "run", commit="test")
    stage = run.stage("logits", name).open({}, {})
    header = CacheHeader("t", fingerprint(tokenizer), "x", len(tokenizer), k_max=6, tail_bound=0.0, sampled=sampled)

    def write(path):
        with CacheWriter(path, header) as writer:
            for i, row in enumerate(read_turns(each.source, Counter())):
                ids = [*encode_completion(tokenizer, row.answer), end_id(tokenizer)]
                writer.append(row.key, make_dists(ids, len(tokenizer), i))

    stage.write_shard(f"{name}-00000.cache", write)
    stage.finish({}, fingerprints={"tokenizer": fingerprint(tokenizer)})
    run.release()
    return each, stage


PEOPLE = [said(f"Is {i} even?", f"Hm, {i}. So {'yes' if i % 2 == 0 else 'no'}.") for i in range(6)]


def test_a_text_is_the_teachers_tokens_after_the_students_own_prompt(world, tmp_path):
    tokenizer = load_tokenizer(world / "model")
    each, stage = read_set(tmp_path, tokenizer, PEOPLE)
    data = load_texts(each, stage, tokenizer, "unused", None, max_seq_tokens=96)
    texts = {tokenizer.decode(e.prompt_ids + e.completion_ids) for e in data.examples}
    assert "<|user|>Is 3 even?<|assistant|><think>\n</think>\nHm, 3. So no.<|end|>" in texts and len(texts) == 6
    assert not data.drawn and all(e.sampled_ids == e.completion_ids for e in data.examples)
    assert data.counts["texts"] == 6 and data.counts["trained_tokens"] == sum(data.trained)


def test_what_the_evaluation_asks_and_what_is_too_long_is_left_out_and_counted(world, tmp_path):
    tokenizer = load_tokenizer(world / "model")
    each, stage = read_set(tmp_path, tokenizer, [*PEOPLE, said("long", "so " * 80)])
    asked = {normalised("is  3 EVEN?")}
    data = load_texts(each, stage, tokenizer, "unused", None, max_seq_tokens=96, asked=asked)
    assert (data.counts["overlapping"], data.counts["too_long"], len(data.examples)) == (1, 1, 5)
    with pytest.raises(DataError, match="no text is left"):
        load_texts(each, stage, tokenizer, "unused", None, max_seq_tokens=8)


def test_a_file_that_was_changed_since_it_was_read_is_an_error(world, tmp_path):
    tokenizer = load_tokenizer(world / "model")
    each, stage = read_set(tmp_path, tokenizer, PEOPLE)
    (tmp_path / "people.jsonl").write_text(json.dumps(said("other", "text")))
    with pytest.raises(DataError, match="no longer there"):
        load_texts(each, stage, tokenizer, "unused", None, max_seq_tokens=96)


def test_samples_are_no_texts_and_texts_are_no_samples(world, tmp_path):
    tokenizer = load_tokenizer(world / "model")
    each, stage = read_set(tmp_path, tokenizer, PEOPLE, sampled=True)
    with pytest.raises(DataError, match="was sampled by the teacher"):
        load_texts(each, stage, tokenizer, "unused", None, max_seq_tokens=96)
    traces, logits = make_stages(tmp_path / "moved", tokenizer, make_traces(tokenizer, 4), shards=1)
    (shard,) = logits.shards()
    reader = CacheReader(shard.path)
    header, found = replace(reader.header, sampled=False), {key: reader[key] for key in reader.keys()}  # noqa: SIM118
    shard.path.unlink()
    with CacheWriter(shard.path, header) as writer:
        for key, dists in found.items():
            writer.append(key, dists)
    with pytest.raises(DataError, match="the teacher only read"):
        load_traces(traces, logits, tokenizer, 96)


def test_the_loss_of_its_tokens_is_the_divergence_alone(world, tmp_path):
    tokenizer = load_tokenizer(world / "model")
    run = RunFolder(world, "run", commit="test")
    own = load_traces(run.stage("traces"), run.stage("logits"), tokenizer, 96)
    each, stage = read_set(tmp_path, tokenizer, PEOPLE)
    texts = load_texts(each, stage, tokenizer, "unused", own, max_seq_tokens=96)
    data = Mixture([Part("traces", own, 1.0, 0.7), Part("people", texts, each.weight, each.alpha)])
    first = len(own.examples)
    batch = data.collate([[0, first, first + 3]], 400)
    model = AutoModelForCausalLM.from_pretrained(world / "model", attn_implementation="packed_causal")
    step = StudentStep(model, LossSettings(alpha=0.7), sets=2)
    trained = len(batch.labels_M)
    _, sums = step(batch, trained)
    logp = torch.log_softmax(step.model.lm_head(step.hidden(batch)[batch.trained_M]).double(), 1)
    mine = (batch.set_M == 1).nonzero().squeeze(1)
    dists = [texts.caches["people-00000"][e.key] for e in (texts.examples[0], texts.examples[3])]
    ids, logs, tail = (torch.from_numpy(x) for x in to_sparse_targets(dists))
    mass, tail = logs.double().exp(), tail.double()
    total = mass.sum(1) + tail
    mass, tail = mass / total[:, None], tail / total
    student = logp[mine].gather(1, ids)
    rest = (1 - (student.exp() * (mass > 0)).sum(1)).log()
    kl = (torch.special.xlogy(mass, mass) - mass * student).sum() + (tail * (tail.log() - rest)).sum()
    assert sums[-1].item() == pytest.approx(kl.item() / trained, rel=2e-4)


def chunked(chunk, logp=None):
    count = len(chunk)
    zero = torch.zeros(count, 1, dtype=torch.int64)
    return BucketedTargets(
        zero, zero - 1, torch.full((count, 1), -torch.inf), torch.ones(count), torch.zeros(count, dtype=torch.bool),
        torch.tensor(chunk), torch.arange(count) * -0.1 if logp is None else logp,
    )  # fmt: skip


def test_chunks_of_several_sets_stay_apart():
    merged = merge(7, [(torch.tensor([0, 2, 4]), chunked([0, 0, -1])), (torch.tensor([1, 3, 6]), chunked([0, 1, 1]))])
    found = merged.chunk_N.tolist()
    assert found[5] == found[4] == -1 and found[0] == found[2] and found[3] == found[6]
    assert len({found[0], found[1], found[3]}) == 3 and -1 not in (found[0], found[1], found[3])
    np.testing.assert_allclose(merged.chunk_logprobs_N, [0, 0, -0.1, -0.1, -0.2, 0, -0.2], atol=1e-7)


def test_a_chunk_that_a_window_cuts_has_no_likelihood():
    rows = torch.tensor([1, 2, 3, 4])
    assert without_cut_chunks(chunked([0, 0, 1, 1, 2, 2]), rows).rows(rows).chunk_N.tolist() == [-1, 1, 1, -1]


def test_tokens_of_traces_keep_their_second_term_beside_texts(world, tmp_path):
    """Only in a mixture of buckets is there one."""
    part = chunked([0, 0])
    data = TraceData([Example("a", [1], [2, 3], "s", [2, 3])], {}, Counter())
    read = TraceData([Example("b", [1], [2, 3], "s", [2, 3])], {}, Counter(), drawn=False)
    data.targets = read.targets = lambda members, rows: replace(part, drawn_N=None)
    batch = Mixture([Part("traces", data), Part("people", read, alpha=1.0)]).collate([[0, 1]], 9)
    assert batch.targets.drawn_N.tolist() == [True, True, False, False]


def test_the_law_of_the_traces_leaves_out_a_token_that_it_would_not_draw():
    dists = make_dists([5, 6, 7], 50, 3)
    law = SamplingParams(temperature=0.5, top_p=0.3)
    drawn, read = (sampling_law(dists, law, drawn=d) for d in (True, False))
    for t in range(3):
        own = [part.ids_S[part.offsets_T1[t] : part.offsets_T1[t + 1]].tolist() for part in (drawn, read)]
        assert set(own[1]) <= set(own[0]) and dists.sampled_T[t] in own[0] and own[1]
    assert len(read.ids_S) < len(drawn.ids_S)


def test_a_refused_step_is_read_back_with_its_chunks(tmp_path):
    data = TraceData([Example("a", [1], [2, 3, 4], "s", [2, 3, 4])], None, Counter())
    batch, other = replace(data.collate([[0]], 9), targets=chunked([0, 0, -1])), data.collate([[0]], 9)
    replay.save_rows(tmp_path / "rows", [batch, other], LossSettings(), 3.0, 1)
    (found, plain), _ = replay.read_rows(tmp_path / "rows")
    assert torch.equal(found.targets.chunk_N, batch.targets.chunk_N) and plain.targets is None
    assert torch.equal(found.labels_M, batch.labels_M)


# --- settings --------------------------------------------------------------------------------------------------------

TEXT = "train.text_sets=[{name: people, source: {kind: jsonl, path: people.jsonl}}]"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([TEXT, "teacher.capture=null", "students=[{name: a, path: x, loss: {kind: response}}]"], "capture is null"),
        ([TEXT, "students=[{name: a, path: x, loss: {kind: response}}]"], "no student has loss.kind logits"),
        ([TEXT.replace("people,", "general,")], "that set is there already"),
        ([TEXT.replace("}}]", "}, alpha: 0}]")], "alpha"),
        ([TEXT.replace("}}]", "}, max_tokens: 1}]")], "max_tokens"),
        (["train.text_sets=[{name: people}]"], "source"),
    ],
)
def test_a_set_that_nobody_can_learn_from_is_refused_before_any_work(overrides, told):
    with pytest.raises(ConfigError, match=told):
        load_config("configs/demo.yaml", overrides)


def test_the_set_is_no_part_of_what_traces_depend_on_and_of_what_students_do():
    from distill.config import stage_spec

    plain, with_text = (load_config("configs/demo.yaml", overrides) for overrides in ([], [TEXT]))
    assert stage_spec(plain, "traces") == stage_spec(with_text, "traces")
    assert stage_spec(plain, "train", "logits") != stage_spec(with_text, "train", "logits")
    heavier = load_config("configs/demo.yaml", [TEXT.replace("}}]", "}, weight: 2, alpha: 0.5}]")])
    assert stage_spec(with_text, "text", "people") == stage_spec(heavier, "text", "people")


def text_set(name="people", kind="jsonl", path="README.md"):
    return f"train.text_sets=[{{name: {name}, source: {{kind: {kind}, path: {path}}}}}]"


@pytest.mark.parametrize("name", ["traces", "general", "said", "manifest.json", "traces-00000.cache"])
def test_a_set_cannot_have_the_name_of_another_or_of_a_file_beside_it(name):
    with pytest.raises(ConfigError, match="Use another name"):
        load_config("configs/demo.yaml", [text_set(name)])


def test_texts_that_are_not_there_are_told_before_any_work_and_the_hub_is_not_asked():
    for kind, path, missing in (("jsonl", "no/such", 1), ("hf", "./no/such", 1), ("hf", "org/data", 0), ("hf", ".", 0)):
        found = list(missing_for_mixture(load_config("configs/demo.yaml", [text_set("people", kind, path)])))
        assert len(found) == missing and all(path in str(error) for error in found)
