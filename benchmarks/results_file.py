"""One format for every result, benchmarks/results/<what>_<device>_<date>.json, for people and for benchmarks.check."""

import datetime
import json
import platform
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "deepspeed", "numpy", "liger-kernel", "trl", "zstandard")


def row(name: str, value: float, unit: str, *, goal: str | None = None, peer: bool = False) -> dict:
    """One figure. goal: such as ">= 0.8", tested by benchmarks.check; peer: it belongs to other software."""
    found = {"name": name, "value": value, "unit": unit}
    return found | ({"goal": goal} if goal else {}) | ({"peer": True} if peer else {})


def write(what: str, question: str, rows: list[dict], *, device: str, commit: str) -> Path:
    """Writes the result and returns its path; an older result of the same what, device and day is replaced."""
    date = datetime.date.today().isoformat()
    result = {
        "question": question,
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "device": device,
        "versions": _versions(),
        "commit": commit,
        "date": date,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{what}_{device.split(',')[0].replace(' ', '-')}_{date}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _versions() -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
