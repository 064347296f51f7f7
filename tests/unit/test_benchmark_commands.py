"""Benchmarks answer --help from any folder, started as files and as modules, on a machine without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_says_what_it_measures(name, tmp_path):
    assert len(NAMES) > 5
    for how in ([str(ROOT / "benchmarks" / f"{name}.py")], ["-m", f"benchmarks.{name}"]):
        command = [sys.executable, *how, "--help"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr[-1000:]
