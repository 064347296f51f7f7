"""Which GPUs hold a student together when it is evaluated: what the plan's rows say."""

import json
from pathlib import Path

import pytest

from distill.config import load_config
from distill.plan import plan, student_split

CONFIGS = Path(__file__).parents[2] / "configs"
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("gpus", [8, 32])
def test_a_student_too_large_for_a_gpu_is_cut_as_its_row_of_the_plan_says(gpus, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    config = load_config(CONFIGS / "llama70b.yaml")
    places = [student_split(config, tmp_path, "bfloat16", rank, gpus) for rank in range(gpus)]
    assert {place.size for place in places} == {8}  # 141 GB of weights, and 8 key-value heads
    assert [place.share for place in places] == [rank // 8 for rank in range(gpus)]
    rows = [row for row in plan(config, gpus=gpus, gpu="h100").rows if row.stage == "eval"]
    (student,) = [row for row in rows if row.model == config.students[0].name]
    assert student.layout.startswith("TP 8, ")


def test_a_small_student_is_whole_on_every_gpu():
    config = load_config(CONFIGS / "demo.yaml")
    folder = Path(__file__).parents[2] / "teachers" / "tiny" / "student-llama"
    places = [student_split(config, folder, "bfloat16", rank, 4) for rank in range(4)]
    assert [(place.size, place.share, place.shares) for place in places] == [(1, rank, 4) for rank in range(4)]
