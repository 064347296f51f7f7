"""The plan against what the benchmarks measured: figures of benchmarks/results, none typed here."""

import json
from functools import cache
from pathlib import Path

import pytest

from benchmarks.bench_student import FITTING, ROWS, TOKENS
from benchmarks.bench_teacher import NEW, PROMPT, SIZES
from benchmarks.student_parts import GEOMETRIES, SHARED
from distill.capacity import GPUS, Load, place, score_seconds, train_memory, train_seconds
from distill.config import Geometry, Train
from distill.geometry import read_geometry, train_flops

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
H100 = GPUS["h100"]


@cache
def measured(file: str) -> dict[str, float]:
    path = max(RESULTS.glob(file))  # of the newest date
    return {row["name"]: row["value"] for row in json.loads(path.read_text())["rows"]}


def geometry(folder: Path, family: str, sizes: dict) -> Geometry:
    (folder / "config.json").write_text(json.dumps({"model_type": family} | sizes))
    return read_geometry(folder, "path")


@pytest.fixture
def teacher(tmp_path):
    return geometry(tmp_path, "deepseek_v3", SIZES)


@pytest.mark.parametrize("size", ["1.7b", "4b"])
def test_memory_and_speed_of_training(size, tmp_path):
    found, name = measured("student_NVIDIA-H100*.json"), f"qwen3-{size}-{TOKENS // 1024}k"
    student = geometry(tmp_path, "qwen3", {"tie_word_embeddings": True} | SHARED | GEOMETRIES[size])
    tokens = {"max_seq_tokens": TOKENS, "micro_batch_tokens": TOKENS, "batch_tokens": ROWS * TOKENS}
    train = Train(
        **tokens, zero_stage=1, kept_activations="products", activation_checkpointing=True, **FITTING.get(size, {})
    )
    needs_gib = sum(train_memory(student, train, 1).values()) / 2**30
    assert needs_gib == pytest.approx(found[f"peak_gib/{name}"], rel=0.1)
    rate = 1e6 / train_seconds(student, train, 1e6, TOKENS, 1, 8, H100)
    assert rate == pytest.approx(found[f"tokens_per_s/{name}"], rel=0.15)
    assert rate * train_flops(student, TOKENS) / H100.bf16_flops == pytest.approx(found[f"mfu/{name}"], rel=0.15)


@pytest.mark.parametrize(("rows", "within"), [(1, 0.4), (8, 0.2), (64, 0.2), (256, 0.2)])
def test_speed_of_decoding(teacher, rows, within):
    placed = place(teacher, H100, 1, 8, Load(PROMPT, NEW, NEW, rows, rows))
    found = measured("teacher_h100*.json")[f"decode_tokens_per_s/b{rows}"]
    assert placed.fits and placed.tokens_per_s == pytest.approx(found, rel=within)


def test_speed_of_decoding_on_two(teacher):
    placed = place(teacher, H100, 2, 8, Load(PROMPT, NEW, NEW, 128, 256), ways=(1, 2))
    assert placed.tokens_per_s == pytest.approx(
        measured("teacher-2gpu*.json")["decode_tokens_per_s/b256/2gpu-ep2-tp1"], rel=0.2
    )


def test_speed_of_scoring(teacher):
    rates = [gpus * 1e6 / score_seconds(teacher, gpus * 1e6, 4096, gpus, H100) for gpus in (1, 2)]
    assert rates[0] == pytest.approx(measured("teacher_h100*.json")["score_tokens_per_s"], rel=0.2)
    assert rates[1] == pytest.approx(measured("teacher-2gpu*.json")["score_tokens_per_s/2gpu-ep2-tp1"], rel=0.2)
