"""Laws of the lm-eval adapter: its likelihoods are transformers' own, its text is greedy decoding's, offline."""

import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from distill.errors import DataError
from distill.evals.lm_eval_model import DistillLM, main
from distill.tokens import PREFILL, load_tokenizer, render_prompt, split_thinking, stop_ids

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "teachers" / "tiny"
NAMES = ("student-qwen", "student-llama", "teacher")
TEXT = "So 17 + 25 is 42. Let me check: the answer, 1,234 apples and 7 pears.\nWait, no. " * 2


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    """(the adapter, transformers' own model in float64, the tokenizer)"""
    folder = TINY / request.param
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, local_files_only=True, experts_implementation="eager"
    ).eval()
    return DistillLM(str(folder), device="cpu", batch_size=4), model, load_tokenizer(folder)


@pytest.fixture(scope="module")
def qwen():
    return DistillLM(str(TINY / "student-qwen"), device="cpu", batch_size=4)


def ask(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def some_text(rng, low=1, high=60):
    begin = rng.randrange(len(TEXT) - high)
    return TEXT[begin : begin + rng.randint(low, high)]


@torch.inference_mode()
def nats(model, context, continuation):
    """(sum, whether each is the most likely) of the continuation's log-probabilities, float64."""
    logits_TV = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].double()
    ids_T1 = torch.tensor(continuation)[:, None]
    return logits_TV.log_softmax(-1).gather(1, ids_T1).sum().item(), bool(
        (logits_TV.argmax(-1, keepdim=True) == ids_T1).all()
    )


def test_loglikelihood_is_the_float64_log_softmax_of_the_logits(pair):
    lm, model, tok = pair
    rng = random.Random()
    asked = [("So" + some_text(rng), " " + some_text(rng).strip()) for _ in range(12)]
    for (context, continuation), (value, is_greedy) in zip(asked, lm.loglikelihood(ask("loglikelihood", *asked), True)):
        moved = context[len(context.rstrip()) :] + continuation  # spaces at the end belong to the continuation
        context = context.rstrip()
        whole, begin = tok.encode(context + moved), tok.encode(context)
        expected, greedy = nats(model, begin, whole[len(begin) :])
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-4) and is_greedy == greedy, (context, continuation)


def test_what_the_model_itself_writes_is_greedy_and_one_changed_token_is_not(pair):
    lm, model, tok = pair
    context = render_prompt(tok, "What is 8 + 5?")
    written = model.generate(torch.tensor([context]), do_sample=False, max_new_tokens=6)[0, len(context) :].tolist()
    other = [*written[:2], (written[2] + 1) % len(tok), *written[3:]]
    asked = [((), context, written), ((), context, other), ((), context, written[:1]), ((), context, [])]
    found = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [True, False, True, True]
    assert found[3] == (0.0, True) and found[1][0] < found[0][0]
    assert found[1][0] == pytest.approx(nats(model, context, other)[0], rel=1e-5)


def test_without_a_context_the_first_token_follows_the_end_of_a_sequence(qwen):
    model = AutoModelForCausalLM.from_pretrained(TINY / "student-qwen", dtype=torch.float64).eval()
    tok = qwen.tokenizer
    found = qwen.loglikelihood(ask("loglikelihood", ("", "So 17"), ("  ", "So 17")), True)
    for (value, _), text in zip(found, ("So 17", "  So 17")):
        assert value == pytest.approx(nats(model, [tok.eos_token_id], tok.encode(text))[0], rel=1e-5)
    out = model.generate(torch.tensor([[tok.eos_token_id]]), do_sample=False, max_new_tokens=9)
    expected = tok.decode(out[0, 1:], skip_special_tokens=True)
    assert qwen.generate_until(ask("generate_until", ("", {"max_gen_toks": 9})), True) == [expected]


def test_rolling_likelihood_counts_every_token_once_whatever_the_windows(qwen, monkeypatch):
    tok = qwen.tokenizer
    model = AutoModelForCausalLM.from_pretrained(TINY / "student-qwen", dtype=torch.float64).eval()
    text = TEXT + TEXT
    ids = tok.encode(text)
    (whole,) = qwen.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)), True)
    assert whole == pytest.approx(nats(model, [tok.eos_token_id], ids)[0], rel=1e-6)
    monkeypatch.setattr(DistillLM, "max_length", 33)  # windows of 32 tokens to predict
    (parts,) = qwen.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)), True)
    expected, done = nats(model, [tok.eos_token_id], ids[:32])[0], 32
    while done < len(ids):
        end = min(len(ids), done + 32)
        expected += nats(model, ids[end - 33 : done], ids[done:end])[0]
        done = end
    assert parts == pytest.approx(expected, rel=1e-6) and abs(parts - whole) > 1e-3


def test_generate_until_is_greedy_decoding_cut_at_the_first_stop_string(pair):
    lm, model, tok = pair
    rng = random.Random()
    contexts = [some_text(rng, 20) for _ in range(3)]
    expected = []
    for context in contexts:
        ids = tok.encode(context)
        out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=70, eos_token_id=stop_ids(tok))
        expected.append(tok.decode(out[0, len(ids) :], skip_special_tokens=True))
    free = lm.generate_until(ask("generate_until", *[(c, {"max_gen_toks": 70}) for c in contexts]), True)
    assert free == expected
    until = [text[len(text) // 2 :][:3] for text in expected]
    asked = [(c, {"until": [stop, "\x00"], "max_gen_toks": 70}) for c, stop in zip(contexts, until)]
    cut = lm.generate_until(ask("generate_until", *asked), True)
    assert cut == [text.split(stop)[0] if stop else text for text, stop in zip(expected, until)]
    assert any(len(short) < len(text) for short, text in zip(cut, expected))


def test_in_a_chat_the_answer_after_thinking_is_what_counts(qwen):
    context = qwen.apply_chat_template([{"role": "user", "content": "What is 8 + 5?"}])
    assert qwen.tok_encode(context) == render_prompt(qwen.tokenizer, "What is 8 + 5?") and context.endswith(PREFILL)
    keeping = DistillLM(qwen.path, device="cpu", keep_thinking=True)
    settings = {"until": ["\n\n\n"], "max_gen_toks": 200}
    (answer,), (whole,) = (
        lm.generate_until(ask("generate_until", (context, settings)), True) for lm in (qwen, keeping)
    )
    assert "</think>" in whole and answer == split_thinking(whole)[1] and answer
    inside = whole[:2] or "</"
    (same,) = qwen.generate_until(ask("generate_until", (context, settings | {"until": ["</think>", inside]})), True)
    assert same == answer.split("</think>")[0].split(inside)[0]
    (unfinished,) = qwen.generate_until(ask("generate_until", (context, {"until": [], "max_gen_toks": 1})), True)
    assert unfinished == "" or "</think>" in qwen.tokenizer.decode(qwen.tok_encode(whole)[:1])


def test_sampling_is_the_same_for_a_seed_and_another_for_another(qwen):
    asked = ask("generate_until", *[(TEXT[:n], {"do_sample": True, "temperature": 1.5, "max_gen_toks": 80,
                                               "until": ["\x00"]}) for n in (9, 20, 40)])  # fmt: skip
    again = DistillLM(qwen.path, device="cpu", batch_size=1)
    other = DistillLM(qwen.path, device="cpu", seed=1)
    first, second, third = (lm.generate_until(asked, True) for lm in (qwen, again, other))
    assert first == second and first != third and len(set(first)) == 3


def test_settings_that_would_be_ignored_are_refused(qwen):
    with pytest.raises(DataError, match="num_beams"):
        qwen.generate_until(ask("generate_until", ("a", {"num_beams": 4})), True)
    with pytest.raises(DataError, match="no room"):
        qwen.generate_until(ask("generate_until", ("a", {"max_gen_toks": 100_000})), True)


def test_a_context_that_is_too_long_loses_its_beginning_and_is_counted(qwen):
    before, room = qwen.cut_contexts, qwen.max_length
    ids = qwen.tok_encode("7 " * room)
    short, long = qwen._loglikelihood_tokens([(None, ids[-room + 1 :], ids[:1]), (None, ids, ids[:1])], True)
    assert short == long and qwen.cut_contexts == before + 1


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """doc_to_target: "{{gold}}"
doc_to_choice: "{{options}}"
output_type: multiple_choice
metric_list: [{metric: acc}]
"""
WRITE = """doc_to_target: "{{answer}}"
output_type: generate_until
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 120}
filter_list:
  - {name: boxed, filter: [{function: regex, regex_pattern: 'boxed\\{(-?\\d+)\\}'}, {function: take_first}]}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks over a local file: choose a continuation, write an answer."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for a, b in ((3, 4), (8, 5), (12, 7), (20, 31), (6, 6), (9, 14)):
        question = f"State the final answer to the following arithmetic problem: {a} + {b} ="
        rows.append({"question": question, "answer": str(a + b), "options": [" the", " zq"], "gold": 0})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in (("local_choice", CHOICE), ("local_write", WRITE)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=folder / "rows.jsonl") + textwrap.dedent(rest))
    return folder


OFFLINE = """
import runpy, socket, sys
def refuse(self, address):
    raise OSError(f"no network in this test: {address}")
socket.socket.connect = refuse
sys.argv = ["distill.evals.lm_eval_model", *sys.argv[1:]]
runpy.run_module("distill.evals.lm_eval_model", run_name="__main__")
"""


def test_local_tasks_from_end_to_end_without_a_network(tasks, tmp_path):
    models = [str(TINY / name) for name in ("teacher", "student-qwen")]
    command = ["--model", *models, "--tasks", "local_choice,local_write", "--include-path", str(tasks), "--chat"]
    ran = subprocess.run(
        [sys.executable, "-c", OFFLINE, *command, "--device", "cpu", "--out", str(tmp_path / "out.json")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text())
    teacher, student = (found[path]["results"] for path in models)
    assert teacher["local_write"]["exact_match,boxed"] > student["local_write"]["exact_match,boxed"] >= 0
    assert 0 <= teacher["local_choice"]["acc,none"] <= 1
    assert all(model in ran.stdout for model in models) and "local_write" in ran.stdout
    lm = DistillLM(models[0], device="cpu")
    rows = [json.loads(line) for line in (tasks / "rows.jsonl").read_text().splitlines()]
    texts = [lm.apply_chat_template([{"role": "user", "content": row["question"]}]) for row in rows]
    written = lm.generate_until(
        ask("generate_until", *[(t, {"until": ["\n\n"], "max_gen_toks": 120}) for t in texts]), True
    )
    right = np.mean([f"boxed{{{row['answer']}}}" in text for row, text in zip(rows, written)])
    assert teacher["local_write"]["exact_match,boxed"] == pytest.approx(right)


def test_an_unknown_task_is_an_error_that_names_it(tasks, capsys):
    status = main(["--model", str(TINY / "student-qwen"), "--tasks", "local_choise", "--include-path", str(tasks)])
    assert status == 2 and "local_choise" in capsys.readouterr().err
