"""What a report needs, read from a run folder; nothing is computed here, and nothing but the files is asked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill import files
from distill.errors import DataError, StoreError
from distill.evals.results import Candidate, EvalResult, evaluated, load_result, slug
from distill.evals.retention import SET_NAME as RETENTION
from distill.redact import redact
from distill.store import STAGES, RunFolder
from distill.traceset import DROP_REASONS, read_rows

CONFIG_FILE = "config.json"  # in the folder of the eval stage, as the agreement files


@dataclass
class RunData:
    """A run as its files tell it. results and retention: by model, teacher first; agreement: rows of
    distill.evals.agreement; training: log rows of each student; rejected: reason -> traces; ledger: what each finished
    stage cost (stage, wall_s, device_s); config: the resolved config without secrets."""

    name: str
    results: dict[str, EvalResult]
    retention: dict[str, EvalResult] = field(default_factory=dict)
    agreement: list[dict] = field(default_factory=list)
    training: dict[str, list[dict]] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    traces: dict[str, int] = field(default_factory=dict)
    ledger: list[dict] = field(default_factory=list)
    config: dict = field(default_factory=dict)
    commit: str = ""
    date: str = ""


def read_run(run_dir: Path | str) -> RunData:
    """Everything the report is made of. StoreError when the folder holds no evaluation, or for a damaged file."""
    run_dir = Path(run_dir)
    eval_dir = run_dir / STAGES["eval"]
    folder = RunFolder(run_dir.parent, run_dir.name, commit="").stage("eval")
    candidates = evaluated(folder)
    if not candidates:
        raise StoreError("holds no evaluation", where=str(run_dir), remedy="Run it first, to the end of --stages eval.")
    manifest = _read_json_or(eval_dir / "manifest.json", {})
    rejected, traces = _rejections(sorted((run_dir / STAGES["traces"]).glob("*.parquet")))
    return RunData(
        name=run_dir.name,
        results={c.name: load_result(folder, c.name) for c in candidates},
        retention={c.name: load_result(folder, c.name, RETENTION) for c in evaluated(folder, RETENTION)},
        agreement=[row for row in (read_agreement(eval_dir, c) for c in candidates) if row],
        training=_training(run_dir / STAGES["train"]),
        rejected=rejected,
        traces=traces,
        ledger=_ledger(run_dir),
        config=_read_json_or(eval_dir / CONFIG_FILE, {}),
        commit=manifest.get("commit", ""),
        date=manifest.get("date", ""),
    )


def write_settings(run_dir: Path | str, config: dict) -> None:
    """Keeps the resolved config, without secrets, beside the evaluation: a later report then needs only the files."""
    files.write_json(Path(run_dir) / STAGES["eval"] / CONFIG_FILE, redact(config))


def agreement_file(candidate: Candidate) -> str:
    """The name of the file with a student's row of distill.evals.agreement."""
    return f"agreement-{slug(candidate.name)}.json"


def read_agreement(eval_dir: Path, candidate: Candidate) -> dict | None:
    """A student's row; None when there is none, or it was measured on other weights or in another way."""
    row = _read_json_or(eval_dir / agreement_file(candidate), {})
    return row if "bits_per_byte" in row and row["fingerprint"] == candidate.fingerprint else None


def read_log(path: Path) -> list[dict]:
    """The rows of a JSON-lines log in the order of their steps.

    A run that was killed and went on has written some steps twice: the later row counts. Its last line may be cut short
    and is left out; a damaged line elsewhere is a DataError.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    rows: dict[Any, dict] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(
                f"is not JSON: {error}", where=f"{path} line {number}", remedy="Delete this line."
            ) from error
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def _training(train_dir: Path) -> dict[str, list[dict]]:
    return {path.parent.name: read_log(path) for path in sorted(train_dir.glob("*/log.jsonl"))}


def _rejections(paths: Iterable[Path]) -> tuple[dict[str, int], dict[str, int]]:
    """(traces by reason of rejection, {"sampled", "kept"}); both empty when there are no traces."""
    reasons: Counter[str] = Counter()
    sampled = 0
    for path in paths:
        for row in read_rows(path, ["drop_reason"]):
            sampled += len(row["drop_reason"])
            reasons.update(filter(None, row["drop_reason"]))
    if not sampled:
        return {}, {}
    ordered = {reason: reasons.pop(reason, 0) for reason in DROP_REASONS} | dict(reasons)
    return ordered, {"sampled": sampled, "kept": sampled - sum(ordered.values())}


def _ledger(run_dir: Path) -> list[dict]:
    rows = []
    for stage in STAGES.values():
        for path in (run_dir / stage / "manifest.json", *sorted((run_dir / stage).glob("*/manifest.json"))):
            if path.exists():
                manifest = _read_json_or(path, {})
                label = path.parent.relative_to(run_dir).as_posix()
                rows.append({"stage": label, "wall_s": manifest["wall_s"], "device_s": manifest["device_s"]})
    return rows


def _read_json_or(path: Path, absent: dict) -> dict:
    if not path.exists():
        return absent
    return files.read_json(path, "Delete it and run the stage again, or pass --restart eval.")
