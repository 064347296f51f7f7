"""One run of everything: what it leaves on disk, what others can do with it, and that a second launch does nothing."""

import json
import re
import sys
import time

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from launches import SECRETS, STAGE_FOLDERS, contents, distill, environment, numbers, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.records import prompt_key
from distill.tracking import read_history


@pytest.fixture(scope="module")
def report(reference) -> dict:
    return json.loads((reference.folder / "5-eval" / "report.json").read_text())


def table(out: str) -> list[str]:
    """The lines of the table at the end of a launch."""
    lines = out.splitlines()
    (first,) = [i for i, line in enumerate(lines) if line.startswith("model ")]
    return lines[first : first + 6]  # the heading, its rule and four models


def test_every_stage_leaves_its_folder_and_a_manifest_that_chains_to_the_ones_before(reference):
    manifests = {}
    for name in [*STAGE_FOLDERS[:3], "4-student/response", "4-student/logits", *STAGE_FOLDERS[4:]]:
        manifest = json.loads((reference.folder / name / "manifest.json").read_text())
        assert manifest["stage"] == name
        assert {"spec", "hash", "commit", "inputs", "fingerprints", "counts", "wall_s", "device_s", "versions"} <= set(
            manifest
        )
        assert manifest["wall_s"] >= 0 and manifest["versions"]["torch"] == torch.__version__
        manifests[name] = manifest
    assert sorted(path.name for path in reference.folder.iterdir() if path.name[0].isdigit()) == STAGE_FOLDERS
    prompts, traces, logits = (manifests[name] for name in STAGE_FOLDERS[:3])
    assert (prompts["counts"]["train"], prompts["counts"]["eval"]) == (24, 12)
    assert traces["inputs"]["prompts"] == logits["inputs"]["prompts"] == prompts["content_hash"]
    for name in ("response", "logits"):
        student = manifests[f"4-student/{name}"]
        assert student["inputs"]["traces"] == traces["content_hash"]
        assert manifests["5-eval"]["inputs"][f"train/{name}"] == student["content_hash"]
        # 24 prompts of at most 120 tokens in rows of 256, two rows a step, three epochs: a handful of steps
        assert 6 <= student["counts"]["steps"] <= 36
    assert manifests["6-publish"]["inputs"]["eval"] == manifests["5-eval"]["content_hash"]
    assert len(traces["shards"]) == len(logits["shards"]) == 3  # 24 prompts, 8 in a shard
    counts = traces["counts"]
    assert counts["samples"] == 24 == counts["kept"] + sum(counts["dropped"].values())
    assert counts["kept"] >= 20  # the bundled teacher answers the easiest level


def test_the_report_holds_what_the_design_names(report):
    assert [(row["name"], row["role"]) for row in report["models"]] == [
        ("teacher", "teacher"), ("base", "base"), ("response", "student"), ("logits", "student"),
    ]  # fmt: skip
    for row in report["models"]:
        assert 0 <= row["ci_low"] <= row["pass_at_1"] <= row["ci_high"] <= 1
        assert 0 < row["mean_tokens"] <= 120 and 0 <= row["truncated_share"] <= 1
        assert (row["problems"], row["samples_per_problem"], row["grader_errors"]) == (12, 2, 0)
    assert [row["base"] for row in report["models"]] == [None, None, "base", "base"]
    score = {row["name"]: row["pass_at_1"] for row in report["models"]}
    assert score["teacher"] > 0.8
    pairs = {(row["a"], row["b"]): row for row in report["comparisons"]}
    assert set(pairs) == {
        ("response", "teacher"),
        ("response", "base"),
        ("logits", "teacher"),
        ("logits", "base"),
        ("logits", "response"),
    }  # fmt: skip
    for (a, b), row in pairs.items():
        assert row["difference"] == pytest.approx(score[a] - score[b], abs=1e-12)
        assert row["ci_low"] <= row["difference"] <= row["ci_high"] and 0 < row["p_value"] <= 1
    for row in report["gap_recovered"]:
        gap = (score[row["student"]] - score["base"]) / (score["teacher"] - score["base"])
        assert row["value"] == pytest.approx(gap, abs=1e-12) and row["ci_low"] <= row["value"] <= row["ci_high"]
    assert [row["student"] for row in report["agreement"]] == ["response", "logits"]
    for row in report["agreement"]:
        assert row["kl_per_token"]["value"] > 0 and 0 <= row["top1"]["value"] <= 1 and row["traces"] > 0
    assert {row["model"] for row in report["retention"]} == {"base", "response", "logits"}
    assert all(row["n"] == (360 if row["kind"] == "all" else 60) for row in report["retention"])
    stages = [row["stage"] for row in report["ledger"]["stages"]]
    assert {"1-prompts", "2-traces", "4-student/response", "4-student/logits", "5-eval"} <= set(stages)
    steps = [row["step"] for row in report["training"]["logits"]]
    assert steps == list(range(1, len(steps) + 1))


def test_the_curves_of_training_and_a_table_of_samples_reach_the_tracker(reference, report):
    history = read_history(reference.folder)
    for name in ("response", "logits"):
        rows = [json.loads(line) for line in (reference.folder / "4-student" / name / "log.jsonl").open()]
        told = {each["step"]: each for each in history if each["scope"] == name and "train/loss" in each}
        assert list(told) == [row["step"] for row in rows]
        assert all(told[row["step"]][f"train/{key}"] == row[key] for row in rows for key in row if key != "step")
    (path,) = reference.folder.glob("tracking/wandb/offline-run-*/files/media/table/examples_*.table.json")
    table = json.loads(path.read_text())
    shown = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert len(shown) == len(report["examples"]) > 0
    for row, example in zip(shown, report["examples"], strict=True):
        samples = json.loads(row["samples"])
        assert [each["model"] for each in samples] == ["teacher", "response", "logits"]
        assert (row["prompt"], samples) == (example["prompt"], example["samples"])


def test_the_report_page_needs_nothing_but_itself(reference):
    page = (reference.folder / "5-eval" / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html") and page.rstrip().endswith("</html>")
    assert "<svg" in page and "response" in page and "logits" in page
    loads = re.findall(r"""(?:\bsrc|\bsrcset|\bposter|\bdata|xlink:href)\s*=\s*["']?(?!data:|#)([^"'\s>]+)""", page)
    assert [each for each in loads if "/" in each or "." in each] == []
    assert not re.search(r"<(?:script|link|iframe|object|embed|base)\b[^>]*(?:src|href)\s*=", page, re.IGNORECASE)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#|data:)", page)
    assert "Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"" in page
    outside = set(re.findall(r"https?://[^\s\"'<>)]+", page)) - {"http://www.w3.org/2000/svg"}
    assert not outside, outside


def test_the_published_folder_loads_as_a_stranger_would_load_it_and_samples(reference, report):
    (folder,) = [path for path in (reference.folder / "6-publish").iterdir() if path.is_dir()]
    assert folder.name == report["run"]["best_student"]
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".md", ".jinja", ""}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3 + 4?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    torch.manual_seed(0)
    generation = model.generation_config
    assert generation.do_sample and (generation.temperature, generation.top_p) == (0.6, 0.95)
    out = model.generate(**prompt, max_new_tokens=16)
    assert out.shape[1] > prompt["input_ids"].shape[1]
    trained = reference.folder / "4-student" / folder.name / "model" / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == trained.read_bytes()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "license: apache-2.0" in card and "pass@1" in card


def test_traces_are_what_datasets_and_trl_read(reference):
    """TRL's conversational language-modelling format is one column `messages`: a list of {role, content}."""
    files = sorted(str(path) for path in (reference.folder / "2-traces").glob("*.parquet"))
    rows = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(reference.scratch / "hf-cache")
    )
    assert len(rows) == 24
    openr1 = {"problem", "solution", "answer", "problem_type", "question_type", "source", "uuid", "messages",
              "is_reasoning_complete", "generations", "correctness_math_verify", "correctness_llama",
              "finish_reasons", "correctness_count"}  # fmt: skip
    assert openr1 <= set(rows.column_names)
    tokenizer = AutoTokenizer.from_pretrained("teachers/tiny/teacher")
    kept = 0
    for row in rows:
        assert row["uuid"] == prompt_key(row["problem"])
        assert row["correctness_count"] == sum(row["correctness_math_verify"])
        if row["messages"] is None:
            assert not any(row["keep"])
            continue
        kept += 1
        user, assistant = row["messages"]
        assert (user["role"], user["content"], assistant["role"]) == ("user", row["problem"], "assistant")
        first = row["keep"].index(True)
        assert assistant["content"] == "<think>\n" + row["generations"][first]  # the teacher's prompt ends in <think>
        assert "</think>" in assistant["content"] and rf"\boxed{{{row['answer']}}}" in assistant["content"]
        # What a trainer makes of the messages are the tokens that the teacher read and wrote, no more and no fewer.
        tokens = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"]
        assert tokens == row["prompt_ids"] + row["completion_ids"][first]
    assert kept == sum(any(row["keep"]) for row in rows) >= 20
    assert pq.read_schema(files[0]).field("messages").type.num_fields == 1


def test_no_secret_of_the_environment_is_in_any_file_or_on_the_screen(reference):
    places = [path for path in reference.folder.rglob("*") if path.is_file()]
    wandb = [path for path in places if path.suffix == ".wandb"]
    assert wandb and all(path.stat().st_size > 1000 for path in wandb)  # tracking really wrote something
    for path in [*places, reference.scratch / "out.txt", reference.scratch / "err.txt"]:
        content = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path


def test_no_python_process_of_the_run_tried_to_reach_the_network(reference):
    log = reference.scratch / "network.log"
    assert not log.exists(), log.read_text()


def test_a_second_launch_skips_every_stage_in_seconds_and_prints_the_same_table(reference, tmp_path):
    before = contents(reference.folder)
    first = json.loads((reference.folder / "5-eval" / "report.json").read_text())
    again = run(distill(reference.config), tmp_path, environment(tmp_path)).ok()
    assert again.wall_s < 30  # most of it imports; the first launch sampled, trained and evaluated
    for name in [*STAGE_FOLDERS[:2], "4-student/response", "4-student/logits", *STAGE_FOLDERS[4:]]:
        assert f"{name}: finished before, skipped" in again.out
    assert "it/s" not in again.err and "train response" not in again.err
    assert table(again.out) == table(reference.launch.out)
    after = contents(reference.folder)
    changed = {name for name in before if after.get(name) != before[name]}
    # The report is written again, now with the cost of the stage after it: nothing else changes.
    rewritten = {"5-eval/report.html", "5-eval/report.json"}
    assert {name for name in changed if not name.startswith(("tracking/", ".lock"))} <= rewritten
    report = json.loads((reference.folder / "5-eval" / "report.json").read_text())
    assert numbers(report) == numbers(first)
    costs = [row for row in report["ledger"]["stages"] if row["stage"] != "6-publish"]
    assert costs == [row for row in first["ledger"]["stages"] if row["stage"] != "6-publish"]


def test_help_answers_at_once_and_help_config_lists_every_setting(tmp_path):
    started_s = time.monotonic()
    shown = run([sys.executable, "-m", "distill.run", "--help"], tmp_path).ok()
    assert time.monotonic() - started_s < 2 and "--restart" in shown.out
    settings = run([sys.executable, "-m", "distill.run", "--help-config"], tmp_path).ok().out
    for name in ("run.name", "train.lr", "teacher.sampling.max_new_tokens", "eval.permutations", "publish.repo"):
        assert re.search(rf"^\s*{re.escape(name)}\b", settings, re.MULTILINE), name
