"""Students with other tokenizers than the teacher's learn from its distributions, through the whole pipeline."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from launches import ROOT, Launch, copy_run, distill, environment, run, small_config, write_config

OTHERS = ("qwen", "llama")


@dataclass
class Trained:
    folder: Path
    launch: Launch
    report: dict


def train_others(case: None, reference: Callable, scratch: Path) -> Trained:
    """Training and evaluation of both, on the traces of the uninterrupted run."""
    config = small_config(scratch / "runs")
    logits = config["students"][1]
    tiny = ROOT / "teachers" / "tiny"
    config["students"] = [logits | {"name": name, "path": str(tiny / f"student-{name}")} for name in OTHERS]
    config["eval"] |= {"k": 1, "retention": False}
    folder = copy_run(reference().folder, scratch / "runs", "4-student")
    path = write_config(scratch / "small.yaml", config)
    launch = run(distill(path, "--stages", "train,eval"), scratch, environment(scratch)).ok()
    return Trained(folder, launch, json.loads((folder / "5-eval" / "report.json").read_text()))


@pytest.mark.ahead(outcome=train_others)
@pytest.mark.parametrize("name", OTHERS)
def test_it_learns_from_distributions_and_the_report_says_how_close_it_came(name, outcome):
    train = outcome.folder / "4-student" / name
    counts = json.loads((train / "train.json").read_text())
    kinds = {key: value for key, value in counts.items() if key.startswith("positions_")}
    assert sum(kinds.values()) == counts["trained_tokens"] and counts["retokenised"] == counts["kept"] > 0
    assert kinds["positions_aligned"] > 0.6 * counts["trained_tokens"]
    log = [json.loads(line) for line in (train / "log.jsonl").read_text().splitlines()]
    assert log[-1]["kl"] < 0.8 * log[0]["kl"] and all(row["teacher_share"] > 0.8 for row in log)
    row = next(row for row in outcome.report["agreement"] if row["student"] == name)
    assert 0 < row["bits_per_byte"]["value"] < 10 and 0 < row["top1"]["value"] < 1
    assert 0.9 < row["covered_share"] <= 1 and sum(b["tokens"] for b in row["by_position"]) == row["tokens"]
    assert {"digits", "all"} <= {line["text"] for line in row["coverage"]}


@pytest.mark.ahead(outcome=train_others)
def test_what_survives_is_printed_before_the_training(outcome):
    out = outcome.launch.out
    assert out.count("contradicted") >= 2 and out.index("contradicted") < out.index("gap recovered")
    assert "digits" in out and "KL bits/byte" in out
