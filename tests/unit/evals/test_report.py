"""Laws of the report: it can be made again from the files alone, says what it does not know, and executes nothing."""

import json
import re
import resource
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from eval_world import answer, byte_tokenizer, open_run, run_eval, sums

from distill import align_spans
from distill.align_report import CLASSES, coverage_rows
from distill.errors import DataError, StoreError
from distill.evals import report as reports
from distill.evals import stats, svg
from distill.evals.page import render_page
from distill.evals.report import build_report, write_report
from distill.evals.retention import compare_retention, general_prompts, retention_params
from distill.evals.run_files import read_log, read_run
from distill.evals.table import best_student, p_value_text, render_table
from distill.records import Prompt, Trace, Verdict
from distill.store import RunFolder
from distill.tasks.general import KINDS
from distill.tasks.split import is_heldout
from distill.traceset import write_traces

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"
MODELS = (  # name, role, base, loss, share of prompts solved
    ("teacher", "teacher", "", "", 0.95),
    ("base", "base", "", "", 0.1),
    ("response", "student", "base", "response", 0.7),
    ("logits", "student", "base", "logits", 0.9),
)
CONFIG = {
    "hardware": {"price_per_device_hour": 36.0},
    "eval": {"confidence": 0.95, "permutations": 500},
    "tracking": {"api_key": "abcdef"},
}


def solver(share, evil=False):
    """Solves the first `share` of forty prompts (by their answer), the others wrongly."""
    tail = EVIL if evil else ""

    def write(prompt, index):
        right = int(prompt.answer) < 80 * share
        return tail + answer(prompt.answer if right else "-1")

    return write


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A whole run folder: evaluation and retention of four models, agreement, traces, logs and manifests."""
    root, tok, prompts = tmp_path_factory.mktemp("runs"), byte_tokenizer(), sums(40)
    folder, general = open_run(root), general_prompts(4, seed=1, kinds=("copying", "sorting"))
    for name, role, base, loss, share in MODELS:
        about = {"name": name, "role": role, "base": base, "loss": loss}
        run_eval(folder, tok, prompts, solver(share, evil=role == "student"), **about)
        if role != "teacher":
            write = lambda p, i, role=role: answer(p.answer if role == "base" or p.family == "copying" else "?")  # noqa: E731
            run_eval(folder, tok, general, write, k=1, set_name="retention", params=retention_params(32), **about)
    value = {"value": 0.5, "ci_low": 0.4, "ci_high": 0.6}
    kl = {"bits_per_byte": value, "kl_per_token": value, "top1": value, "tokens": 9, "traces": 2}
    first, second = {"from": 0, "to": 16, **kl}, {"from": 16, "to": None, **kl}
    counts = np.zeros((len(align_spans.KINDS), len(CLASSES)), np.int64)
    kinds = (align_spans.ALIGNED, align_spans.INNER, align_spans.CONTRADICTED)
    counts[kinds, (0, 1, 1)] = 6, 1, 2
    same, other = {"covered_share": 1.0}, {"covered_share": 7 / 9}
    rows = [
        {"student": "logits", **kl, **other, "coverage": coverage_rows(counts), "by_position": [first, second]},
        {"student": "response", **kl, **same, "coverage": coverage_rows(0 * counts), "by_position": [first]},
    ]
    for row in rows:
        folder.write_json(f"agreement-{row['student']}.json", {**row, "fingerprint": "w0"})
    folder.write_json("agreement-base.json", {**rows[0], "student": "base", "fingerprint": "other weights"})
    folder.finish({}, wall_s=1.0, device_s=1.0)
    traces = open_run(root, "traces")
    verdicts = [Verdict.CORRECT] * 6 + [Verdict.WRONG] * 3 + [Verdict.TRUNCATED]
    made = [
        Trace(prompts[0], i, i, [1], [2], f"t{i}", "stop", verdict, verdict == "correct",
              "" if verdict == "correct" else verdict.value)
        for i, verdict in enumerate(verdicts)
    ]  # fmt: skip
    traces.write_shard("traces-00000.parquet", lambda path: write_traces(path, made))
    traces.finish({}, wall_s=10.0, device_s=20.0)
    log = folder.path.parent / "4-student" / "logits"
    log.mkdir(parents=True)
    (log / "log.jsonl").write_text(
        "".join(json.dumps({"step": s, "loss": 2 / s, "kl": 1 / s}) + "\n" for s in range(1, 4))
    )
    (log / "manifest.json").write_text(json.dumps({"wall_s": 100.0, "device_s": 100.0}))
    return folder.path.parent


@pytest.fixture(scope="module")
def report(run_dir):
    return write_report(run_dir, CONFIG)


class Checker(HTMLParser):
    """Collects tags and attributes, and fails on a tag that is not closed in order."""

    VOID = {"meta", "br", "img", "link", "input"}
    SELF_CLOSING = {"line", "rect", "circle", "polyline", "polygon"}

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in self.SELF_CLOSING
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


# The data


def test_models_have_the_fields_a_program_reads(report):
    assert [m["name"] for m in report["models"]] == ["teacher", "base", "response", "logits"]
    for model in report["models"]:
        assert {"name", "role", "pass_at_1", "ci_low", "ci_high", "mean_tokens", "truncated_share"} <= set(model)
        assert model["ci_low"] <= model["pass_at_1"] <= model["ci_high"]
    assert [m["pass_at_1"] for m in report["models"]] == [0.95, 0.1, 0.7, 0.9]


def test_gap_recovered_is_that_of_the_accuracies(report):
    gaps = {row["student"]: row for row in report["gap_recovered"]}
    assert gaps["logits"]["value"] == pytest.approx((0.9 - 0.1) / (0.95 - 0.1))
    assert gaps["response"]["value"] == pytest.approx((0.7 - 0.1) / (0.95 - 0.1))
    assert gaps["logits"]["ci_low"] < gaps["logits"]["value"] < gaps["logits"]["ci_high"]


def test_comparisons_are_every_student_with_teacher_base_and_earlier_student(report):
    pairs = [(row["a"], row["b"]) for row in report["comparisons"]]
    assert pairs == [
        ("response", "teacher"), ("response", "base"),
        ("logits", "teacher"), ("logits", "base"), ("logits", "response"),
    ]  # fmt: skip
    last = report["comparisons"][-1]
    assert last["difference"] == pytest.approx(0.2)
    assert last["p_value"] == pytest.approx(2 / 2**8)  # eight problems, all one way
    assert last["p_value_holm"] >= last["p_value"]


def test_groups_cover_every_problem_and_average_to_the_whole(report):
    for model in report["models"]:
        for key in ("by_family", "by_level"):
            rows = model[key]
            assert sum(row["problems"] for row in rows) == 40
            mean = sum(row["value"] * row["problems"] for row in rows) / 40
            assert mean == pytest.approx(model["pass_at_1"])
        assert sum(bin["share"] for bin in model["lengths"]) == pytest.approx(1.0)


def test_rejections_ledger_and_costs_come_from_the_stage_folders(report):
    assert {row["reason"]: row["traces"] for row in report["rejected"] if row["traces"]} == {"wrong": 3, "truncated": 1}
    assert report["traces"] == {"sampled": 10, "kept": 6}
    stages = {row["stage"]: row for row in report["ledger"]["stages"]}
    assert stages["2-traces"]["wall_s"] >= 10.0 and stages["2-traces"]["device_s"] == 20.0
    assert stages["4-student/logits"]["cost"] == pytest.approx(1.0)  # 100 s at 36 an hour
    assert list(stages) == ["2-traces", "4-student/logits", "5-eval"]
    total = report["ledger"]["total"]
    assert total["cost"] == pytest.approx(sum(row["cost"] for row in stages.values()))


def test_agreement_measured_on_other_weights_is_left_out(report):
    assert [row["student"] for row in report["agreement"]] == ["response", "logits"]


def test_without_a_price_there_is_no_cost(run_dir):
    data = read_run(run_dir)
    data.config = {}
    ledger = build_report(data)["ledger"]
    assert ledger["total"]["cost"] is None and all(row["cost"] is None for row in ledger["stages"])


def test_the_same_report_comes_from_the_files_alone(run_dir, report):
    eval_dir = run_dir / "5-eval"
    stored = json.loads((eval_dir / "report.json").read_text())
    page = (eval_dir / "report.html").read_text()
    assert stored == json.loads(json.dumps(report))
    for name in ("report.json", "report.html"):
        (eval_dir / name).unlink()
    done = subprocess.run(
        [sys.executable, "-m", "distill.evals.report", str(run_dir)], capture_output=True, text=True, check=True
    )
    assert json.loads((eval_dir / "report.json").read_text()) == stored
    assert (eval_dir / "report.html").read_text() == page
    assert "gap recovered" in done.stdout and str(eval_dir / "report.html") in done.stdout


def test_a_folder_that_cannot_be_written_is_an_error_with_a_remedy(run_dir):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(StoreError, match=r"5-eval: cannot be written: File too large.*run\.dir"):
            write_report(run_dir, CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    write_report(run_dir, CONFIG)


def test_secrets_of_the_config_are_in_no_file(run_dir, report):
    for path in (run_dir / "5-eval").glob("*.*ml"):
        assert "abcdef" not in path.read_text()
    assert report["config"]["tracking"]["api_key"] != "abcdef"


def test_making_a_report_again_loads_no_torch():
    code = "import sys, distill.evals.report; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_a_folder_without_evaluation_is_a_clear_error(tmp_path, capsys):
    with pytest.raises(StoreError, match="holds no evaluation"):
        write_report(tmp_path)
    assert reports.main([str(tmp_path)]) == 2
    assert "holds no evaluation" in capsys.readouterr().err


def test_models_evaluated_on_different_prompts_are_not_put_in_one_report(run_dir):
    data = read_run(run_dir)
    data.results["base"].rows.pop()
    with pytest.raises(DataError, match="different prompts"):
        build_report(data)


def test_a_gap_that_is_not_there_is_undefined_with_its_reason(run_dir):
    data = read_run(run_dir)
    data.results = {name: data.results[name] for name in ("teacher", "base", "response")}
    data.results["base"].rows = data.results["teacher"].rows
    report = build_report(data)
    gap = report["gap_recovered"][0]
    assert gap["value"] is None and "may be zero" in gap["reason"]
    assert "undefined" in render_table(report) and "may be zero" in render_table(report)
    parsed(render_page(report))


def test_a_report_without_base_or_other_parts_still_renders(run_dir):
    data = read_run(run_dir)
    data.results = {name: data.results[name] for name in ("teacher", "logits")}
    data.retention, data.agreement, data.training, data.rejected, data.traces, data.ledger = {}, [], {}, {}, {}, []
    report = build_report(data)
    assert report["gap_recovered"][0]["reason"] == "the base was not evaluated"
    page = render_page(report)
    parsed(page)
    assert 'id="training"' not in page and 'id="results"' in page


def test_examples_show_failures_and_cut_long_texts(run_dir):
    data = read_run(run_dir)
    for row in data.results["logits"].rows:
        row["generations"][0] = "x" * 9_000
    report = build_report(data)
    verdicts = [{s["verdict"] for s in example["samples"]} for example in report["examples"]]
    assert len(verdicts) == 6 and sum(v != {"correct"} for v in verdicts) >= 3
    assert all(example["samples"][0]["model"] == "teacher" for example in report["examples"])
    text = report["examples"][0]["samples"][-1]["text"]
    assert text.startswith("x" * 8_000 + " ... (1000 more")


def test_examples_take_turns_between_families(run_dir):
    data = read_run(run_dir)
    for row in data.results["teacher"].rows[:26]:
        row["family"] = "first"  # many of a kind in front must not fill the page
    solved_by_all = build_report(data)["examples"][3:]
    assert [example["family"] for example in solved_by_all] == ["first", "even", "odd"]


def test_numbers_that_are_not_finite_become_null(run_dir):
    data = read_run(run_dir)
    data.training = {"logits": [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")}]}
    report = build_report(data)
    assert [row["loss"] for row in report["training"]["logits"]] == [None, None]
    json.dumps(report, allow_nan=False)
    parsed(render_page(report))


# Logs


def test_a_log_of_an_interrupted_run_counts_each_step_once(tmp_path):
    rows = [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}, {"step": 2, "loss": 2.5}, {"step": 3, "loss": 1}]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 4, "lo')
    assert [(r["step"], r["loss"]) for r in read_log(path)] == [(1, 3), (2, 2.5), (3, 1)]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        read_log(path)


def test_long_logs_are_averaged_not_sampled():
    rows = [{"step": i + 1, "loss": float(i % 2), "note": "text"} for i in range(1200)]
    thinned = reports._thinned(rows)
    assert len(thinned) == 300 and thinned[-1]["step"] == 1200
    assert {row["loss"] for row in thinned} == {0.5} and "note" not in thinned[0]
    assert reports._thinned(rows[:5]) == [{"step": r["step"], "loss": r["loss"]} for r in rows[:5]]
    assert reports._thinned([]) == []
    evaluated = [row | ({"eval_loss": row["step"]} if row["step"] % 100 == 0 else {}) for row in rows]
    kept = [row["eval_loss"] for row in reports._thinned(evaluated) if "eval_loss" in row]
    assert kept == list(range(100, 1201, 100))  # none is lost among the steps without one


# Retention


def test_general_questions_are_held_out_distinct_and_stable():
    prompts = general_prompts(10, seed=3)
    assert len({p.key for p in prompts}) == len(prompts) == 10 * len(KINDS)
    assert all(is_heldout(p) for p in prompts)
    assert general_prompts(10, seed=3, kinds=KINDS[2:3]) == [p for p in prompts if p.family == KINDS[2]]
    assert {p.key for p in general_prompts(10, seed=4)} != {p.key for p in prompts}


def test_retention_compares_each_kind_with_the_base(report):
    rows = {(row["model"], row["kind"]): row for row in report["retention"]}
    assert rows["base", "all"]["accuracy"] == 1.0 and "difference" not in rows["base", "all"]
    assert rows["logits", "copying"]["difference"] == 0.0
    assert rows["logits", "sorting"]["accuracy"] == 0.0 and rows["logits", "sorting"]["base_accuracy"] == 1.0
    assert rows["logits", "sorting"]["difference"] == -1.0
    assert rows["logits", "all"]["accuracy"] == pytest.approx(0.5)
    assert rows["logits", "all"]["p_value"] == pytest.approx(2 / 2**4)
    assert not any(model == "teacher" for model, _ in rows)


def test_retention_on_different_questions_is_refused(run_dir):
    data = read_run(run_dir)
    with pytest.raises(DataError, match="different questions"):
        compare_retention(data.retention["logits"], data.results["base"])


def test_retention_is_greedy():
    params = retention_params(20)
    assert (params.temperature, params.top_p, params.top_k, params.max_new_tokens) == (0.0, 1.0, 0, 20)


# The table and the page


def test_the_terminal_table_has_a_line_a_model(report):
    lines = render_table(report).splitlines()
    assert len(lines) == 2 + 4
    assert re.split(r"\s{2,}", lines[0]) == [
        "model", "pass@1 [95% CI]", "mean tokens", "truncated", "gap recovered [95% CI]", "KL bits/byte",
        "same top-1", "p vs base", "p vs response",
    ]  # fmt: skip
    logits = next(line for line in lines if line.startswith("logits"))
    assert (
        "0.5000" in logits
        and "50.0%" in logits
        and "90.0 [" in logits
        and "94.1 [" in logits
        and "<0.0001" in logits
        and "0.0078" in logits
    )
    assert "p vs" not in lines[2] and "undefined" not in lines[2]


def test_best_student_is_the_most_accurate(report):
    assert best_student(report) == "logits" == report["run"]["best_student"]
    assert best_student({"models": report["models"][:2]}) is None


@pytest.mark.parametrize(
    ("p", "text"), [(None, ""), (0.0, "<0.0001"), (0.00012, "0.0001"), (0.0312, "0.0312"), (1, "1.00")]
)
def test_p_values_are_never_written_as_zero(p, text):
    assert p_value_text(p) == text


def test_the_page_is_well_formed_and_loads_and_runs_nothing(run_dir, report):
    page = (run_dir / "5-eval" / "report.html").read_text()
    checker = parsed(page)
    assert not {"script", "img", "link", "iframe", "object", "form", "base"} & set(checker.tags)
    for name, value in checker.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "data", "action")
        if name in ("href", "xlink:href"):
            assert value.startswith("#")
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|@import|url\(", page)


def test_model_text_is_shown_as_text(run_dir):
    page = (run_dir / "5-eval" / "report.html").read_text()
    assert EVIL not in page and "<script" not in page
    assert any(EVIL in text for text in parsed(page).text)


def test_names_and_reasons_from_outside_are_escaped_too(run_dir):
    data = read_run(run_dir)
    report = json.loads(json.dumps(build_report(data)).replace("logits", "lo<i>gits"))
    report["models"][0]["by_family"][0]["family"] = report["rejected"][0]["reason"] = "<b onclick=x>"
    report["gap_recovered"][0]["reason"] = '"><u>'
    report["gap_recovered"][0] |= {"value": None, "ci_low": None, "ci_high": None}
    report["examples"][0] |= {"prompt": "<marquee>", "answer": "<u>", "family": "<u>"}
    report["ledger"]["stages"][0]["stage"] = "<u>"
    checker = parsed(render_page(report))
    assert not {"i", "u", "b", "marquee"} & set(checker.tags) - {"i"}
    assert not any(name == "onclick" for name, _ in checker.attributes)
    assert any("lo<i>gits" in text for text in checker.text)


def test_control_characters_of_a_model_are_shown_and_leave_the_page_a_text(report):
    written = json.loads(json.dumps(report))
    written["examples"][0]["samples"][0]["text"] = "a\x00b\x1b[31mc\x07\x7f\td\ne"
    page = render_page(written)
    assert "a␀b␛[31mc␇␡\td\ne" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page)


def test_every_share_of_the_results_and_every_change_has_its_interval(report):
    page = render_page(report)
    row = page.split('<section id="results">')[1].split("<tr>")[4]  # the first student below head, teacher and base
    student = next(model for model in report["models"] if model["role"] == "student")
    assert f"{100 * student['pass_at_1']:.1f}%" in row and row.count("<small>[") == 4  # pass@1, pass@k, maj@k, gap
    changed = next(each for each in report["retention"] if each["model"] == student["name"] and each["difference"])
    low, high = 100 * changed["difference_low"], 100 * changed["difference_high"]
    assert f"({100 * changed['difference']:+.1f} [{low:+.1f}, {high:+.1f}])" in page


def test_what_a_column_counts_is_said(report):
    text = " ".join(parsed(render_page(report)).text)
    for said in ("pass@k: one of k", "maj@k: the most", "Truncated: the token", "Measured: the share", "temperature 1"):
        assert said in text


def test_every_section_has_its_numbers_in_a_table_too(report):
    page = render_page(report)
    for section in ("results", "comparisons", "families", "training", "lengths", "agreement", "retention", "ledger"):
        content = page.split(f'<section id="{section}">')[1].split("</section>")[0]
        assert "<table>" in content, section
    for figure in ("94.1%", "[", "77.8%", "contradicted", "66.7%", "6 of 10", "wrong", "+80.0"):
        assert figure in page


# Charts


def coordinates(chart, attribute):
    return [float(value) for value in re.findall(rf'<circle[^>]* {attribute}="([-\d.]+)"', chart)]


def test_dots_lie_on_the_axis_in_proportion():
    series = [svg.Series("a", "s2", [svg.Point(v, v, v) for v in (0.0, 0.25, 1.0)])]
    chart = svg.dots(["x", "y", "z"], series, title="t")
    low, quarter, high = coordinates(chart, "cx")
    assert (quarter - low) / (high - low) == pytest.approx(0.25, abs=1e-3)
    assert low < quarter < high <= svg.WIDTH
    assert len(coordinates(svg.dots(["x"], [svg.Series("a", "s2", [None])], title="t"), "cx")) == 0


def test_curves_map_values_upwards_and_powers_of_two_evenly():
    points = [svg.Point(v, x=x) for v, x in ((1.0, 8), (2.0, 16), (4.0, 32))]
    chart = svg.curves([svg.Series("a", "s2", points)], x_label="", y_label="", title="", log_x=True, marks=True)
    x, y = coordinates(chart, "cx"), coordinates(chart, "cy")
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert y[0] > y[1] > y[2] and y[1] - y[2] == pytest.approx(2 * (y[0] - y[1]), abs=0.3)
    assert svg.curves([svg.Series("a", "s2", [])], x_label="", y_label="", title="") == ""


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.3, 0.9, [0.4, 0.6, 0.8]), (0, 900, [0, 200, 400, 600, 800]), (2, 2, [2])],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected)


def test_ticks_of_any_range_are_few_and_inside():
    rng = np.random.default_rng(0)
    for _ in range(300):
        low = rng.normal() * 10 ** rng.uniform(-6, 6)
        high = low + 10 ** rng.uniform(-6, 6)
        found = svg.ticks(low, high)
        slack = 1e-6 * (high - low)
        assert 1 <= len(found) <= 6 and all(low - slack <= tick <= high + slack for tick in found)


def test_a_whisker_stays_inside_its_cell():
    chart = svg.whisker(svg.Point(0.5, -9.0, 9.0), "s2", -1, 1)
    ends = [float(v) for v in re.findall(r' x[12]="([-\d.]+)"', chart)]
    assert min(ends) >= 0 and max(ends) <= 116


def test_maj_votes_count_equal_correct_answers_as_one(tmp_path):
    # 1/2 and 0.5 are both right: together they outvote 7, which comes twice.
    tok = byte_tokenizer()
    prompt = Prompt("Half of one?", "1/2", "f", grader="number")
    texts = ["1/2", "0.5", "0.50", "7", "7"]
    result, _ = run_eval(open_run(tmp_path), tok, [prompt, Prompt("b", "1", "f")], lambda p, i: answer(texts[i]), k=5)
    assert stats.maj_at_k(result.answers[:1], result.correctness_PK[:1]).value == 1.0


def test_reading_a_report_takes_no_lock(run_dir):
    with RunFolder(run_dir.parent, run_dir.name, commit="other") as run:
        run.lock()
        assert read_run(run_dir).name == "run"
