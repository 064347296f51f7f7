"""Laws of mixed training: what a set weighs, what each token's loss is, what is kept apart."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from student_world import make_dists, make_model, make_stages, make_tokenizer, make_traces, settings
from transformers import AutoModelForCausalLM

from distill.config import check_machine, load_config
from distill.config_mixture import BundledQuestions, General, GeneralJsonl
from distill.errors import ConfigError, DataError, DistillError
from distill.logit_cache import CacheReader, to_sparse_targets
from distill.losses.buckets import BucketedTargets
from distill.losses.sparse import SparseTargets
from distill.records import Prompt
from distill.store import RunFolder
from distill.tasks.split import is_heldout
from distill.tokens import end_id, load_tokenizer, render_prompt
from distill.tracking import Tracker
from students import general
from students.data import load_traces
from students.mixture import Mixture, Part, hold_out, merge
from students.packing import Passes, TrainPlan
from students.sequence import RowRanks
from students.train import train_student


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


# --- passes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.3, 0.5, 1.0, 1.7, 2.0, 3.4])
def test_no_example_comes_again_before_all_others_of_its_set_have(weight):
    sizes, epochs = [7, 10], 6
    passes = Passes(sizes, [1.0, weight])
    seen = [0] * sum(sizes)
    for epoch in range(epochs):
        members = passes.members(epoch, lambda i, number: str((i * 7919 + number * 104729) % 1009).encode())
        assert len(set(members)) == len(members)
        for i, _ in members:
            seen[i] += 1
        assert seen[:7] == [epoch + 1] * 7
        assert max(seen[7:]) - min(seen[7:]) <= 1
        assert sum(seen[7:]) == round(10 * weight * (epoch + 1))


def test_a_fraction_is_another_part_in_every_epoch():
    passes = Passes([10], [0.5])
    first, second = ({i for i, _ in passes.members(epoch, lambda i, n: str(i * n % 7).encode())} for epoch in (0, 1))
    assert len(first) == len(second) == 5 and first.isdisjoint(second)


def test_plan_of_fractional_passes_counts_its_own_steps_and_tokens():
    lengths = [3, 4, 5, 6, 7, 8, 9, 10, 2, 2]
    made = dict(row_tokens=10, batch_tokens=20, epochs=5, seed=1, passes=Passes([6, 4], [1.0, 0.4]))
    plan = TrainPlan([f"k{i}" for i in range(10)], lengths, [1] * 10, **made)
    steps = [plan[i] for i in range(len(plan))]
    assert sum(step.tokens for step in steps) == plan.tokens
    counts = [[i for step in steps if step.epoch == e for row in step.rows for i in row] for e in range(5)]
    assert all(sorted(i for i in each if i < 6) == list(range(6)) for each in counts)
    assert sum(len([i for i in each if i >= 6]) for each in counts) == 8  # 4 * 0.4 * 5
    assert 0 < plan.efficiency <= 1 and plan.epochs_done(len(plan)) == 5
    assert plan.digest != TrainPlan([f"k{i}" for i in range(10)], lengths, [1] * 10, **made | {"passes": None}).digest


# --- targets and losses ----------------------------------------------------------------------------------------------


def sparse(tokenizer, count, seed):
    ids = list(range(20, 20 + count))
    return SparseTargets(*map(torch.from_numpy, to_sparse_targets([make_dists(ids, len(tokenizer), seed)])))


def test_merged_targets_keep_every_row_and_say_nothing_elsewhere(tokenizer):
    a, b = sparse(tokenizer, 3, 1), sparse(tokenizer, 2, 2)
    where_a, where_b = torch.tensor([0, 4, 5]), torch.tensor([2, 3])
    merged = merge(7, [(where_a, a), (where_b, b)])
    for where, part in ((where_a, a), (where_b, b)):
        for i, n in enumerate(where.tolist()):
            width = part.ids_NK.shape[1]
            assert torch.equal(merged.logprobs_NK[n, :width], part.logprobs_NK[i])
            assert torch.equal(merged.ids_NK[n, :width], part.ids_NK[i]) and merged.tail_N[n] == part.tail_N[i]
            assert (merged.logprobs_NK[n, width:] == -torch.inf).all()
    for n in (1, 6):
        assert merged.tail_N[n] == 1 and (merged.logprobs_NK[n] == -torch.inf).all()
    merged.check(len(tokenizer))


def test_merged_buckets_of_one_token_give_the_loss_of_the_tokens(tokenizer):
    from distill.losses.fused import distill_loss

    part = sparse(tokenizer, 4, 3)
    bucket = BucketedTargets(torch.tensor([[5, 6]]), torch.tensor([[0, 0]]), torch.log(torch.tensor([[0.9]])),
                             torch.tensor([0.1]))  # fmt: skip
    merged = merge(5, [(torch.arange(4), part), (torch.tensor([4]), bucket)])
    assert isinstance(merged, BucketedTargets)
    merged.check(len(tokenizer))
    torch.manual_seed(0)
    hidden, head = torch.randn(4, 8).double(), torch.randn(len(tokenizer), 8).double()
    labels = torch.arange(20, 24)
    first = merged.rows(torch.arange(4))
    losses = [distill_loss(hidden, head, labels, targets=t, alpha=1.0, normalizer=4.0)[0].item() for t in (part, first)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def mixture(world, weight=1.0):
    run = RunFolder(world, "run", commit="test")
    tokenizer = load_tokenizer(world / "model")
    own = load_traces(run.stage("traces"), None, tokenizer, 96)
    other = load_traces(run.stage("traces"), run.stage("logits"), tokenizer, 96)
    return Mixture([Part("traces", own, 1.0, 0.0), Part("other", other, 1.0, 1.0, weight)])


def test_each_token_has_the_loss_of_its_set_and_the_sets_add_up(world):
    from students.step import LossSettings, StudentStep

    data = mixture(world)
    count = len(data.parts[0].data.examples)
    rows = [[0, count + 1], [count + 2, 3]]
    batch = data.collate(rows, 400)
    tokens = [len(data.examples[i].trained) for row in rows for i in row]
    assert batch.set_M.tolist() == [0] * tokens[0] + [1] * (tokens[1] + tokens[2]) + [0] * tokens[3]
    assert batch.alpha_M.tolist() == [float(s) for s in batch.set_M]
    model = AutoModelForCausalLM.from_pretrained(world / "model", attn_implementation="packed_causal")
    step = StudentStep(model, LossSettings(), sets=2)
    loss, sums = step(batch, sum(tokens))
    plain = AutoModelForCausalLM.from_pretrained(world / "model", attn_implementation="eager").double()
    expected = [0.0, 0.0]
    for i in (i for row in rows for i in row):
        example = data.examples[i]
        ids = torch.tensor(example.prompt_ids + example.completion_ids)[None]
        logp = plain(ids).logits[0, len(example.prompt_ids) - 1 : -1].log_softmax(1)
        if i < count:
            expected[0] += F.nll_loss(logp, torch.tensor(example.completion_ids), reduction="sum").item()
            continue
        t = data.parts[1].data.targets([example], 400)
        mass = t.logprobs_NK.double().exp()
        logs = logp.gather(1, t.ids_NK)
        rest = (1 - (logs.exp() * (mass > 0)).sum(1)).log()
        total = mass.sum(1) + t.tail_N.double()
        mass, tail = mass / total[:, None], t.tail_N.double() / total
        expected[1] += (torch.special.xlogy(mass, mass) - mass * logs).sum().item()
        expected[1] += (torch.special.xlogy(tail, tail) - tail * rest).sum().item()
    heavy = StudentStep(model, LossSettings(), sets=2)(mixture(world, weight=3.0).collate(rows, 400), sum(tokens))
    assert heavy[0].item() == pytest.approx((expected[0] + 3 * expected[1]) / sum(tokens), rel=2e-5)
    found = sums[-2:].tolist()
    assert found == pytest.approx([e / sum(tokens) for e in expected], rel=2e-5)
    assert loss.item() == pytest.approx(sum(found), rel=1e-6)


def test_a_mixture_of_one_set_gives_that_sets_batches(world):
    run = RunFolder(world, "run", commit="test")
    data = load_traces(run.stage("traces"), run.stage("logits"), load_tokenizer(world / "model"), 96)
    mixed, plain = Mixture([Part("traces", data, 1.0, 0.9)]).collate([[1, 2]], 400), data.collate([[1, 2]], 400)
    assert mixed.set_M is None and torch.equal(mixed.input_ids_N, plain.input_ids_N)
    assert torch.equal(mixed.targets.logprobs_NK, plain.targets.logprobs_NK)


def test_an_empty_share_of_a_mixture_bears_no_loss(world):
    batch = mixture(world).collate([], 400)
    assert batch.labels_M.tolist() == [-100] and batch.alpha_M.tolist() == [0.0] and batch.set_M.tolist() == [0]


def test_ranks_that_share_a_row_share_its_sets(world):
    data = mixture(world)
    count = len(data.parts[0].data.examples)
    batch = data.collate([[0, count + 1, 2]], 400)
    shares = [RowRanks(3, place, "group").share(batch) for place in range(3)]
    for name in ("labels_M", "set_M", "alpha_M"):
        assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(batch, name))
    assert torch.equal(torch.cat([s.targets.tail_N for s in shares]), batch.targets.tail_N)


# --- held-out traces -------------------------------------------------------------------------------------------------


def test_held_out_prompts_are_whole_and_the_same_for_a_seed(world):
    run = RunFolder(world, "run", commit="test")
    data = load_traces(run.stage("traces"), None, load_tokenizer(world / "model"), 96)
    train, held_out = hold_out(data, 5, seed=1)
    sides = [{key.split("/")[0] for key in side.keys} for side in (train, held_out)]
    assert sides[0].isdisjoint(sides[1]) and len(held_out.examples) == train.counts["held_out"] >= 5
    assert sorted(train.keys + held_out.keys) == sorted(data.keys)
    assert train.counts["trained_tokens"] == sum(train.trained)
    assert hold_out(data, 5, seed=1)[1].keys == held_out.keys != hold_out(data, 5, seed=2)[1].keys
    assert hold_out(data, 0, seed=1)[1] is None
    with pytest.raises(DataError, match="nothing is left to train on"):
        hold_out(data, len(data.examples), seed=1)


# --- general data ----------------------------------------------------------------------------------------------------


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return GeneralJsonl(path=str(path))


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_bundled_questions_are_never_those_for_evaluation():
    from collections import Counter

    from distill.evals.retention import general_prompts
    from distill.prompts import normalised

    counts = Counter()
    asked = general_prompts(60)
    rows = general.read_rows([BundledQuestions(per_kind=120)], asked, counts)
    questions = {normalised(row.questions[0]) for row in rows}
    assert questions.isdisjoint(normalised(prompt.text) for prompt in asked)
    assert not any(is_heldout(Prompt(row.questions[0], "", "")) for row in rows)
    assert len(rows) == counts["read"] - counts["overlapping"] - counts["duplicate"] > 500


def test_rows_that_the_evaluation_asks_are_left_out_and_counted(tmp_path):
    from collections import Counter

    rows = [chat("What is 3+4 ?", "7"), chat("Copy: a", "a"), chat("Copy: a", "a"), {"messages": "plain text"}]
    counts = Counter()
    kept = general.read_rows([write_rows(tmp_path / "g.jsonl", rows)], [Prompt("what is 3 + 4", "7", "x")], counts)
    assert sorted(row.questions[0] for row in kept) == ["Copy: a", "plain text"]
    assert (counts["read"], counts["overlapping"], counts["duplicate"]) == (4, 1, 1)
    with pytest.raises(DataError, match="no general data is left"):
        general.read_rows([write_rows(tmp_path / "g.jsonl", rows[:1])], [Prompt("what is 3 + 4", "7", "x")], Counter())


@pytest.mark.parametrize(
    "row", [{"messages": []}, {"messages": [{"role": "user", "content": "q"}]}, {"text": "x"}, {"messages": 3},
            {"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}, {"messages": ["q", "a"]}],
    ids=str,
)  # fmt: skip
def test_a_row_that_is_no_conversation_is_named(tmp_path, row):
    from collections import Counter

    source = write_rows(tmp_path / "g.jsonl", [chat("q", "a"), row])
    with pytest.raises(DataError, match="line 2"):
        general.read_rows([source], [], Counter())


def test_own_answers_close_the_reasoning_and_end_the_turn(tokenizer, tmp_path):
    source = write_rows(
        tmp_path / "g.jsonl",
        [chat("What is 1 + 2?", "3"), chat("Why?", "<think>\nso</think>\nthus"), {"messages": "a b"}],
    )
    rows = general.GeneralRows(General(sources=[source], loss="ce"), tokenizer, [], max_seq_tokens=96)
    data = rows.load(math.inf, None)
    texts = {tokenizer.decode(e.prompt_ids + e.completion_ids): e for e in data.examples}
    assert set(texts) == {
        "<|user|>What is 1 + 2?<|assistant|><think>\n</think>\n3<|end|>",
        "<|user|>Why?<|assistant|><think>\nso</think>\nthus<|end|>",
        "a b",
    }
    first = texts["<|user|>What is 1 + 2?<|assistant|><think>\n</think>\n3<|end|>"]
    assert first.prompt_ids == render_prompt(tokenizer, "What is 1 + 2?") and first.completion_ids[-1] == end_id(
        tokenizer
    )
    assert data.counts["rows"] == 3 and data.caches is None


def test_rows_that_cannot_be_used_are_counted_and_stop_nothing(tokenizer, tmp_path):
    called = chat("look it up", "I call")
    called["messages"][1]["tool_calls"] = [{"function": {"name": "f"}}]
    rows = [chat("fine", "yes"), chat("a <|end|> inside", "x"), chat("much " * 100, "x"), {"messages": "z"}, called]
    source = write_rows(tmp_path / "g.jsonl", rows)
    made = general.GeneralRows(General(sources=[source], loss="ce"), tokenizer, [], max_seq_tokens=60)
    data = made.load(math.inf, None)
    assert len(data.examples) == data.counts["rows"] == 1 and data.counts["refused"] == 4
    source = write_rows(tmp_path / "g.jsonl", rows[1:])
    with pytest.raises(DataError, match="no row of general data can be used"):
        general.GeneralRows(General(sources=[source], loss="ce"), tokenizer, [], max_seq_tokens=60).load(math.inf, None)


def test_special_tokens_in_plain_text_are_characters(tokenizer, tmp_path):
    row = general.Row((), "ends with <|end|>, it says")
    ids = row.prompt_ids(tokenizer) + row.completion_ids(tokenizer)
    assert end_id(tokenizer) not in ids and tokenizer.decode(ids) == row.text


# --- whole trainings -------------------------------------------------------------------------------------------------


def run_mixed(root, ranks, name, *, kind="logits", general=None, asked=(), **changes):
    """(counts, rows of log.jsonl, stage) of a training in `root`, a prepared world with the run "run"."""
    run = RunFolder(root, "run", commit="test")
    config = settings(root / "model", kind, general=general, **changes)
    student = config.students[0].model_copy(update={"name": name})
    stage = run.stage("train", name).open({}, {})
    with Tracker(config, stage.path) as tracker:
        counts = train_student(config, student, run.stage("traces"), run.stage("logits"), stage, ranks, tracker, asked)
    run.release()
    return counts, [json.loads(line) for line in (stage.path / "log.jsonl").read_text().splitlines()], stage


@pytest.fixture
def own_world(tmp_path):
    make_model(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    make_stages(tmp_path, tokenizer, make_traces(tokenizer, 24))
    return tmp_path


@pytest.mark.parametrize("kind", ["response", "logits"])
def test_the_base_is_asked_once_and_costs_nothing_at_the_start(own_world, ranks, kind):
    """At the first step the student is the base: the divergence from the base's own distributions is almost 0."""
    rows = [chat(f"What is {a} + {b}?", str(a + b)) for a in range(100, 110) for b in range(3)]
    source = write_rows(own_world / "g.jsonl", rows)
    how = General(sources=[source], share=0.3, max_new_tokens=12)
    counts, log, stage = run_mixed(own_world, ranks, "a", kind=kind, general=how, epochs=3)
    assert 0 < log[0]["loss/general"] < 0.02 < 1 < log[0]["loss/traces"]  # the cache rounds: a few thousandths of a nat
    assert max(row.get("loss/general", 0) for row in log) > 2 * log[0]["loss/general"]  # held, not pinned
    shares = counts["general_input_tokens"]
    assert counts["general_rows"] <= 30 and shares > 0
    spent = counts["tokens"] - 3 * counts["input_tokens"]
    assert spent == pytest.approx(0.3 * counts["tokens"], rel=0.15)
    cache = stage.path / "general" / "general-00000.cache"
    stamp = cache.stat().st_mtime_ns
    (stage.path / "train.json").unlink()
    _, log_again, _ = run_mixed(own_world, ranks, "a", kind=kind, general=how, epochs=3)
    assert cache.stat().st_mtime_ns == stamp
    keys = [name for name in log[0] if name not in ("step_s", "tokens_per_s", "data_wait_s")]
    assert [[row.get(k) for k in keys] for row in log] == [[row.get(k) for k in keys] for row in log_again]


@pytest.mark.parametrize("changes", [{"micro_batch_tokens": 96}, {"zero_stage": 3, "micro_batch_tokens": 192}], ids=str)
def test_losses_of_the_sets_are_the_same_for_any_micro_batch_split_and_zero_stage(own_world, ranks, changes):
    rows = [chat(f"What is {a} + {a}?", str(2 * a)) for a in range(100, 130)]
    how = General(sources=[write_rows(own_world / "g.jsonl", rows)], share=0.3, max_new_tokens=12)
    _, expected, _ = run_mixed(own_world, ranks, "a", general=how, epochs=1)
    _, found, _ = run_mixed(own_world, ranks, "b", general=how, epochs=1, **changes)
    for row, want in zip(found, expected, strict=True):
        assert row.keys() == want.keys()
        for name in ("loss", "loss/traces", "loss/general", "kd", "grad_norm"):
            assert row.get(name, 0) == pytest.approx(want.get(name, 0), rel=1e-5, abs=1e-5), name


def test_answers_of_the_base_do_not_depend_on_how_often_it_was_stopped(own_world, ranks, monkeypatch):
    monkeypatch.setattr(general, "SHARD_ROWS", 4)
    source = write_rows(own_world / "g.jsonl", [chat(f"Say {i}", "x") for i in range(10)])
    how = General(sources=[source], share=0.5, max_new_tokens=8)
    _, log, stage = run_mixed(own_world, ranks, "a", kind="response", general=how, epochs=1)
    before = {path.name: path.read_bytes() for path in (stage.path / "general").glob("*.cache")}
    assert len(before) == 3
    (stage.path / "general" / "general-00001.cache").unlink()
    (stage.path / "train.json").unlink()
    _, again, _ = run_mixed(own_world, ranks, "a", kind="response", general=how, epochs=1)
    after = {path.name: path.read_bytes() for path in (stage.path / "general").glob("*.cache")}
    assert before == after and [row["loss"] for row in log] == [row["loss"] for row in again]


def test_the_base_reads_texts_and_passes_over_what_it_cannot_be_asked(own_world, ranks):
    rows = [{"messages": f"{a} and {a + 1} make {2 * a + 1}." * 2} for a in range(12)]
    rows += [chat("a <|end|> inside", "x"), chat("What is 5 + 5?", "10")]
    how = General(sources=[write_rows(own_world / "g.jsonl", rows)], share=0.5, max_new_tokens=8)
    counts, log, stage = run_mixed(own_world, ranks, "t", kind="response", general=how, epochs=1)
    assert counts["general_rows"] == 13 and counts["general_refused"] == 1
    tokenizer = load_tokenizer(own_world / "model")
    texts = {general.Row((), row["messages"]).key: row["messages"] for row in rows[:12]}
    with CacheReader(stage.path / "general" / "general-00000.cache") as reader:
        read = {key: tokenizer.decode(reader[key].sampled_T.tolist()) for key in reader.keys() if key in texts}  # noqa: SIM118
    assert len(read) == 12 and all(texts[key].endswith(found) and len(found) > 20 for key, found in read.items())
    assert log[0].get("loss/general", 0) < 0.02


def test_traces_of_another_run_are_trained_with_their_weight(own_world, ranks):
    make_stages(
        own_world / "other",
        load_tokenizer(own_world / "model"),
        make_traces(load_tokenizer(own_world / "model"), 10, seed=5),
    )
    sets = [{"name": "again", "run": str(own_world / "other" / "run"), "weight": 0.5}]
    counts, log, _ = run_mixed(own_world, ranks, "b", epochs=2, trace_sets=sets)
    assert (counts["kept"], counts["again_kept"]) == (20, 8)
    assert counts["tokens"] == 2 * counts["input_tokens"] + counts["again_input_tokens"]
    assert all(row["loss/traces"] > 0 for row in log) and any("loss/again" in row for row in log)


def test_traces_of_another_run_that_the_evaluation_asks_are_left_out(own_world, ranks):
    tokenizer = load_tokenizer(own_world / "model")
    others = make_traces(tokenizer, 10, seed=5)
    make_stages(own_world / "other", tokenizer, others)
    asked = [Prompt(others[0].prompt.text.upper(), "", "x"), Prompt("unrelated", "", "x")]
    sets = [{"name": "again", "run": str(own_world / "other" / "run")}]
    counts, *_ = run_mixed(own_world, ranks, "c", epochs=1, trace_sets=sets, asked=asked)
    assert (counts["again_kept"], counts["again_overlapping"]) == (7, 1)
    # a run's own held-out traces are no more to be learned from another run that has them too
    sets = [{"name": "same", "run": str(own_world / "twin" / "run")}]
    make_stages(own_world / "twin", tokenizer, make_traces(tokenizer, 24))
    counts, *_ = run_mixed(own_world, ranks, "d", epochs=1, eval_traces=4, trace_sets=sets)
    assert counts["same_overlapping"] == counts["held_out"] >= 4


# --- the config ------------------------------------------------------------------------------------------------------

VALID = """
run: {name: t}
prompts: {train: [{kind: jsonl, path: a}], eval: [{kind: jsonl, path: b}]}
teacher: {path: teachers/tiny/teacher}
students: [{name: a, path: teachers/tiny/student-same}]
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(VALID)
    return path


def test_an_empty_general_section_takes_bundled_questions_and_none_is_the_default(config_file):
    assert load_config(config_file).train.general is None
    found = load_config(config_file, ["train.general={}"]).train.general
    assert [source.kind for source in found.sources] == ["bundled"] and (found.share, found.loss) == (0.1, "kl_to_base")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.general={share: 1.0}", "share is 1.0; it must be < 1"),
        ("train.general={share: 0}", "share is 0; it must be > 0"),
        ("train.general={sources: []}", "sources"),
        ("train.general={loss: kl}", "loss is 'kl'; it must be one of 'kl_to_base', 'ce'"),
        ("train.general={sources: [{kind: jsonl, path: x, feild: y}]}", "Did you mean field?"),
        ("train.trace_sets=[{name: general, run: r}]", "that set is there already"),
        ("train.trace_sets=[{name: a, run: r}, {name: a, run: s}]", "train.trace_sets.0 has that name too"),
        ("train.trace_sets=[{name: a, run: runs/t}]", "that is this run"),
        ("train.trace_sets=[{name: a, run: r, weight: 0}]", "weight is 0; it must be > 0"),
        ("train.too_long=cut", "too_long is 'cut'"),
        ("train.curriculum=short", "curriculum is 'short'"),
        ("train.loader_workers=-1", "loader_workers is -1"),
    ],
)
def test_a_wrong_mixture_is_told_with_its_setting(config_file, override, said):
    with pytest.raises(ConfigError) as error:
        load_config(config_file, [override])
    assert said in str(error.value)


def test_what_is_not_there_is_told_before_any_work(config_file):
    sets = ["train.trace_sets=[{name: a, run: nowhere}]", "train.general={sources: [{kind: jsonl, path: gone.jsonl}]}"]
    with pytest.raises(DistillError) as error:
        check_machine(load_config(config_file, sets))
    assert "no run there has finished its traces" in str(error.value) and "gone.jsonl" in str(error.value)
