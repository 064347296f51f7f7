"""Every shipped config loads, plans and fits its own hardware without a network, and says what its recipe says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.config import load_config
from distill.geometry import parameters
from distill.plan import plan

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# name: (base model, parameters, learning rate) of the six published students
PUBLISHED = {
    "qwen1.5b": ("Qwen/Qwen2.5-Math-1.5B", 1_543_714_304, 1e-4),
    "qwen7b": ("Qwen/Qwen2.5-Math-7B", 7_615_616_512, 8e-5),
    "qwen14b": ("Qwen/Qwen2.5-14B", 14_770_033_664, 7e-5),
    "qwen32b": ("Qwen/Qwen2.5-32B", 32_763_876_352, 6e-5),
    "llama8b": ("meta-llama/Llama-3.1-8B", 8_030_261_248, 5e-5),
    "llama70b": ("meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496, 2e-5),
}
LOGITS = {"qwen32b", "llama70b"}  # learn from distributions too; the published ones from text alone
SERVED = {"qwen1.5b", "qwen7b", "llama8b", "llama8b_qlora"}  # the teacher needs more GPUs than the student
GPUS = {"qwen1.5b": 8, "qwen7b": 8, "llama8b": 8, "llama8b_qlora": 1, "qwen14b": 32, "qwen32b": 32, "llama70b": 64}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def run_offline(*arguments: str) -> subprocess.CompletedProcess:
    """The command in a process whose every attempt to open a network socket fails."""
    code = "import socket, sys\ndef refuse(*a, **k): raise AssertionError('network')\n"
    code += "socket.socket.connect = socket.getaddrinfo = refuse\n"
    code += f"sys.argv = ['distill.run', *{list(arguments)!r}]\nfrom distill.run import main\nsys.exit(main())"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "WANDB_"))}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_loads_plans_and_fits_its_own_hardware(path):
    result = plan(load_config(path))
    assert result.fits, result.problems
    assert result.gpus == GPUS.get(path.stem, 1) and result.gpu == "h100"
    served = [note for note in result.notes if note.startswith("The teacher answers at ")]
    assert result.notes == served and bool(served) is (path.stem in SERVED)
    assert result.hours > 0 and result.render().endswith("Everything fits.")


def test_the_six_published_students_and_the_demo_are_there_and_each_is_in_the_readme():
    assert {path.stem for path in CONFIGS} == {*PUBLISHED, "demo", "llama8b_qlora"}
    readme = (ROOT / "configs" / "README.md").read_text()
    for path in CONFIGS:
        (row,) = [line for line in readme.splitlines() if line.startswith(f"| `{path.name}`")]
        config = load_config(path)
        assert f"{config.train.lr:.0e}".replace("e-0", "e-") in row
        if path.stem != "demo":
            assert f"{config.hardware.gpus} x {config.hardware.gpu.upper()}" in row
            assert config.students[0].path.split("/")[1] in row
            assert f"| {'distributions' if config.students[0].loss.kind == 'logits' else 'text'} |" in row
            (trained,) = [each for each in plan(config).rows if each.stage == "train"]
            assert f"| {trained.gpu_hours:,.0f}" in row


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_student_is_trained_by_the_published_recipe(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    (student,) = config.students
    base, count, lr = PUBLISHED[name]
    assert (student.path, parameters(student.geometry).total, config.train.lr) == (base, count, lr)
    assert config.teacher.path == "deepseek-ai/DeepSeek-R1"
    assert parameters(config.teacher.geometry).total == 671_026_419_200
    assert config.prompts.train[0].limit * config.teacher.sampling.n == 800_000
    train, held_out = config.train, config.eval
    assert (train.epochs, train.max_seq_tokens, train.batch_tokens) == (2, 32_768, 64 * 32_768)
    assert (train.schedule, train.min_lr_ratio) == ("cosine", 0.1)
    assert (student.loss.kind, student.loss.alpha) == (("logits", 1) if name in LOGITS else ("response", 0))
    assert (config.teacher.capture is None) is (name not in LOGITS)
    assert (held_out.temperature, held_out.top_p, held_out.max_new_tokens) == (0.6, 0.95, 32_768)
    assert 4 <= held_out.k <= 64


@pytest.mark.parametrize("name", ["llama8b", "llama8b_qlora", "llama70b"])
def test_llama_configs_state_the_naming_rule_and_refuse_to_break_it(name):
    path = ROOT / "configs" / f"{name}.yaml"
    text = path.read_text()
    assert 'must START with\n# "Llama"' in text and "Built with Llama" in text
    assert load_config(path, ["publish.repo=org/Llama-r1"]).publish.repo == "org/Llama-r1"
    with pytest.raises(Exception, match="start with Llama"):
        load_config(path, ["publish.repo=org/r1-llama"])


def test_the_demo_compares_two_losses_on_equal_terms_on_disjoint_prompts():
    config = load_config(ROOT / "configs" / "demo.yaml")
    response, logits = config.students
    assert response.path == logits.path and (response.loss.kind, logits.loss.kind) == ("response", "logits")
    problems = [
        [(s.families, s.levels, s.seed) for s in sources] for sources in (config.prompts.train, config.prompts.eval)
    ]
    for (train, train_levels, train_seed), (held_out, levels, seed) in zip(*problems, strict=True):
        assert set(train) == set(held_out) and train_levels == levels and train_seed != seed
        assert all(train[family] > 10 * held_out[family] for family in train)
    assert config.hardware.device == "auto" and config.tracking.wandb == "offline" and config.publish.repo is None


def test_the_variant_for_one_gpu_trains_adapters_on_a_base_in_4_bits():
    config, whole = (load_config(ROOT / "configs" / f"{name}.yaml") for name in ("llama8b_qlora", "llama8b"))
    assert config.students[0].adapter.kind == "qlora" and whole.students[0].adapter is None
    assert config.students[0].path == whole.students[0].path and config.train.optimizer == "paged_adamw8bit"
    (row,) = [each for each in plan(config).rows if each.stage == "train"]
    assert row.memory_bytes < 40e9  # the weights alone, with optimizer, would be 128 GB


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen7b", ["hardware.gpus=4", "train.zero_stage=3"]),
        ("llama8b", ["hardware.gpus=4", "train.zero_stage=3"]),
        ("llama8b", ["hardware.gpus=32", "teacher.url=null", "teacher.token_env=null"]),
        ("qwen32b", ["hardware.gpus=16"]),
        ("llama70b", ["hardware.gpus=32"]),
        ("llama70b", ["hardware.gpu=h200", "train.sequence_parallel=1"]),
    ],
    ids=str,
)
def test_the_other_hardware_of_the_readme_is_enough(name, changes):
    result = plan(load_config(ROOT / "configs" / f"{name}.yaml", changes))
    assert result.fits, result.problems
    page = (ROOT / "configs" / "README.md").read_text()
    assert all(change in page for change in changes)


def test_the_plan_command_needs_no_network_and_answers_for_other_hardware():
    done = run_offline("--config", "configs/qwen32b.yaml", "--plan", "--gpus", "64")
    assert done.returncode == 0, done.stderr
    assert "64 x h100" in done.stdout and "32.76B" in done.stdout and "Everything fits." in done.stdout
    done = run_offline("--config", "configs/qwen32b.yaml", "--plan", "--gpus", "8", "--json")
    assert done.returncode == 2 and '"fits": false' in done.stdout and "Use 16 x h100" in done.stdout
