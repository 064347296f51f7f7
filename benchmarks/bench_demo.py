"""Do distributions teach more than text? The demo over seeds: response against logit loss, equal data and steps.

    python -m benchmarks.bench_demo --seeds 0 1 2

Every seed is a whole run of configs/demo.yaml in its own folder (other samples, other data order), so a killed one
goes on where it stopped. Rows: gap_recovered/<student>/seed<N>, pass_at_1/..., minutes/seed<N>, and the mean difference
of gap recovered over seeds with its standard error.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.results_file import row, write
from distill.commit import commit

STUDENTS = ("response", "logits")


def one_run(seed: int, runs: Path, sets: list[str]) -> dict:
    """The report of the demo with run.seed = seed."""
    name = f"demo-seed{seed}"
    overrides = [f"run.name={name}", f"run.dir={runs}", f"run.seed={seed}", *sets]
    command = [sys.executable, "-m", "distill.run", "--config", "configs/demo.yaml"]
    subprocess.run(command + [part for one in overrides for part in ("--set", one)], check=True)
    return json.loads((runs / name / "5-eval" / "report.json").read_text())


def rows_of(seed: int, report: dict) -> list[dict]:
    """The figures of one run."""
    rows = []
    for model in report["models"]:
        rows.append(row(f"pass_at_1/{model['name']}/seed{seed}", model["pass_at_1"], "share"))
        for name, unit in (("ci_low", "share"), ("ci_high", "share"), ("mean_tokens", "tokens")):
            rows.append(row(f"pass_at_1/{model['name']}/seed{seed}/{name}", model[name], unit))
    for gap in report["gap_recovered"]:
        goal = ">= 0.8" if gap["student"] == "logits" else None
        rows.append(row(f"gap_recovered/{gap['student']}/seed{seed}", gap["value"], "share of the gap", goal=goal))
        for name in ("ci_low", "ci_high"):
            rows.append(row(f"gap_recovered/{gap['student']}/seed{seed}/{name}", gap[name], "share of the gap"))
    for pair in report["comparisons"]:
        if {pair["a"], pair["b"]} == set(STUDENTS):
            rows.append(row(f"p_value/logits_vs_response/seed{seed}", pair["p_value"], "probability"))
            rows.append(row(f"difference/logits_minus_response/seed{seed}", pair["difference"], "share"))
    for one in report["agreement"]:
        if one.get("kl_per_token"):
            rows.append(row(f"kl_per_token/{one['student']}/seed{seed}", one["kl_per_token"]["value"], "nats"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"))
    parser.add_argument("--set", action="append", default=[], help="changes to configs/demo.yaml, as for distill.run")
    args = parser.parse_args()
    rows, gaps = [], {student: [] for student in STUDENTS}
    for seed in args.seeds:
        report = one_run(seed, args.runs, args.set)
        minutes = report["ledger"]["total"]["wall_s"] / 60  # of all its launches, where it was interrupted
        rows += [*rows_of(seed, report), row(f"minutes/seed{seed}", minutes, "minutes", goal="<= 12")]
        for gap in report["gap_recovered"]:
            gaps[gap["student"]].append(gap["value"])
    difference = np.subtract(gaps["logits"], gaps["response"])
    rows.append(row("gap_recovered/logits_minus_response/mean", float(difference.mean()), "share of the gap"))
    if len(difference) > 1:
        error = float(difference.std(ddof=1) / len(difference) ** 0.5)
        rows.append(row("gap_recovered/logits_minus_response/standard_error", error, "share of the gap"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu{os.cpu_count()}"
    question = "On equal traces and steps, does the logit loss keep more of the teacher than the response loss?"
    print(write("demo", question, rows, device=f"{device}, {platform.machine()}", commit=commit()))


if __name__ == "__main__":
    main()
