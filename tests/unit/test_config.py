"""Laws of the config: nothing is accepted silently, every mistake is told at once, secrets never reach a message."""

import json
import math
import subprocess
import sys

import pytest

from distill.config import Config, describe, load_config, stage_spec
from distill.config_fields import settings
from distill.config_types import Divergence, Family, Grader
from distill.errors import ConfigError

VALID = """
run: {name: t}
prompts:
  train: [{kind: reasoning_gym, families: [chain_sum, gcd], per_family: 20, levels: [1, 2]}]
  eval: [{kind: reasoning_gym, families: {chain_sum: 5}}]
teacher: {path: org/teacher}
students:
  - {name: a, path: org/base, loss: {kind: logits, alpha: 0.9}}
  - {name: b, path: org/base, loss: {kind: response}}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def valid(write):
    return write(VALID)


def errors(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_a_minimal_file_gets_the_documented_defaults(valid):
    config = load_config(valid)
    assert (config.run.dir, config.run.seed, config.hardware.device) == ("runs", 0, "auto")
    assert (config.eval.k, config.eval.confidence, config.tracking.wandb) == (4, 0.95, "offline")
    assert config.prompts.train[0].families == {"chain_sum": 20, "gcd": 20}
    assert config.student("b").loss.alpha == 0.0


def test_overrides_reach_sections_lists_and_absent_sections_and_the_last_one_wins(valid):
    config = load_config(valid, ["students.1.name=z", "train.lr=1e-3", "train.lr=2e-3", "prompts.train.0.levels=[3]"])
    assert [s.name for s in config.students] == ["a", "z"]
    assert config.train.lr == 2e-3
    assert config.prompts.train[0].levels == [3]


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1E-5", 1e-5), ("1.e-5", 1e-5), (".5", 0.5), ("0.001", 1e-3), ("5e-1", 0.5)]
)
def test_every_way_to_write_a_float_is_a_float(valid, text, value):
    assert load_config(valid, [f"train.lr={text}"]).train.lr == value


def test_whole_floats_are_whole_numbers_and_others_are_not(valid):
    assert load_config(valid, ["train.batch_tokens=1e6", "eval.permutations=10_000"]).train.batch_tokens == 1_000_000
    assert "it must be a whole number" in errors(valid, "train.epochs=1.5")


@pytest.mark.parametrize(
    "override",
    [
        "train.epochs=true", "train.epochs='3'", "train.lr='1e-5'", "train.lr=true", "train.lr=.nan", "train.lr=.inf",
        "traces.verify=yes", "traces.verify=1", "train.betas=0.9", "run.name=3", "run.name=null", "eval=4",
        "run.name=../x", "students=[]", "prompts.train=[]", "train.betas=[0.9]", "train.betas=[0.9,0.9,0.9]",
    ],
)  # fmt: skip
def test_nothing_is_converted_silently(valid, override):
    assert f"--set {override.split('=')[0]} is" in errors(valid, override)


def test_an_error_says_what_where_the_value_and_the_remedy(write):
    path = write(VALID + "train: {lr: 0}\n")
    assert (
        errors(path) == f"train.lr in {path} is 0; it must be > 0. Use 1e-5 for a large student, 1e-3 for a tiny one."
    )


def test_all_errors_are_reported_at_once_with_contradictions_between_valid_settings(write):
    path = write(VALID + "train: {lr: 0, epochs: x, schedul: cosine}\neval: {k: 0}\npublish: {student: nobody}\n")
    text = errors(path, "run.name=a b", "train.zero_stage=7")
    lines = text.split("\n  ")
    assert lines[0] == f"7 errors in {path}:" and len(lines) == 8
    for part in ("train.lr", "train.epochs", "Did you mean schedule?", "eval.k", "publish.student", "--set run.name"):
        assert part in text


def test_a_contradiction_is_not_reported_for_a_setting_that_is_wrong_in_itself(valid):
    text = errors(valid, "train.max_seq_tokens=0")
    assert "errors in" not in text and text.startswith("--set train.max_seq_tokens is 0; it must be >= 8")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("train.warmup=0.1", "Did you mean warmup_ratio?"),
        ("students.0.loss.temprature=2.0", "Did you mean temperature?"),
        ("tracking.wanb=offline", "Did you mean wandb?"),
        ("lr=1e-5", "Did you mean train.lr?"),
        ("train.top_p=0.5", "Did you mean teacher.sampling.top_p or eval.top_p?"),
        ("trian={}", "Did you mean train?"),
        ("trian.lr=1e-5", "Did you mean train?"),
        ("prompts.eval.0.familes={}", "Did you mean families?"),
        ("publish.zzzzzz=1", "The settings there are student, repo, private, license, gguf."),
    ],
)
def test_an_unknown_key_suggests_the_nearest_name(valid, override, hint):
    assert f"--set {override.split('=')[0].replace('trian.lr', 'trian')} is not a setting. {hint}" in errors(
        valid, override
    )


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("train.schedule=cosin", "Did you mean cosine?"),
        ("students.0.loss.kind=logit", "Did you mean logits?"),
        ("prompts.train.0.kind=reasoninggym", "Did you mean reasoning_gym?"),
        ("prompts.eval.0.families={chainsum: 3}", "Did you mean chain_sum?"),
        ("hardware.device=gpu", "Use cuda for GPUs."),
    ],
)
def test_an_unknown_choice_suggests_the_nearest_one(valid, override, hint):
    assert hint in errors(valid, override)


def test_repeated_keys_are_errors_that_name_both_lines(write):
    path = write("run: {name: t}\n" + VALID + "train:\n  lr: 1e-3\n  epochs: 2\n  lr: 1e-4\n")
    text = errors(path)
    assert f"run stands twice in {path}: in lines 1 and 3. Remove one." in text
    assert f"lr stands twice in {path}: in lines 12 and 14. Remove one." in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the config is empty"),
        ("# nothing\n", "the config is empty"),
        ("- a\n- b\n", "must be a mapping, not a list"),
        ("just words\n", "must be a mapping, not a string"),
        ("run: {name: t\ntrain: 3\n", "line 2"),
        ("a: *b\n", "undefined alias"),
        ("run: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("run: [" * 3000, "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_a_config_error(write, content, said):
    assert said in errors(write(content))


def test_a_missing_file_lists_its_neighbours_and_binary_is_refused(tmp_path, valid):
    assert f"There are {valid}." in errors(str(tmp_path / "missing.yaml"))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in errors(str(tmp_path / "b.yaml"))
    assert "cannot be read" in errors(str(tmp_path))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr", "is not of the form section.setting=value"),
        ("=3", "is not of the form section.setting=value"),
        ("students.5.name=x", "students has 2 items, numbered from 0, so there is no students.5"),
        ("students.x.name=x", "students has 2 items, numbered from 0, so there is no students.x"),
        ("run.name.x=1", "run.name is a string, so there is no run.name.x"),
        ("train.lr=[1", "the value is not valid YAML"),
    ],
)
def test_a_malformed_override_is_an_error(valid, override, said):
    assert said in errors(valid, override)


CONTRADICTIONS = [
    (["students.1.name=a"], "students.1.name", "students.0 has that name too"),
    (["students.1.name=teacher"], "students.1.name", "taken by the tables"),
    (["students.1.loss.alpha=0.5"], "students.1.loss.alpha", "no divergence to weigh"),
    (["students.0.loss.alpha=0"], "students.0.loss.alpha", "with kind logits it must be > 0"),
    (["students.1.loss.target=sampling"], "students.1.loss.target", "the text alone is learned"),
    (
        ["students.0.loss.target=sampling", "teacher.sampling.temperature=1.1"],
        "students.0.loss.target",
        "drawn hotter than 1",
    ),
    (
        ["students.0.loss.target=sampling", "teacher.capture.tail_draws=4"],
        "students.0.loss.target",
        "stand for the teacher's distribution alone",
    ),
    (["students.0.loss.divergence=jsd", "students.0.loss.beta=1.0"], "students.0.loss.beta", "0 for every student"),
    (["teacher.capture=null"], "students.0.loss.kind", "no distribution would be stored"),
    (["train.micro_batch_tokens=100000"], "train.micro_batch_tokens", "must be <= train.batch_tokens, 65536"),
    (["train.max_seq_tokens=5000"], "train.max_seq_tokens", "must fit into train.micro_batch_tokens, 4096"),
    (["train.max_seq_tokens=2048"], "teacher.sampling.max_new_tokens", "must be < train.max_seq_tokens, 2048"),
    (["teacher.sampling.temperature=0", "teacher.sampling.n=2"], "teacher.sampling.n", "are all the same"),
    (["eval.temperature=0"], "eval.k", "greedy samples of a prompt are all the same"),
    (["eval.confidence=0.999"], "eval.permutations", "needs 20000 or more"),
    (["train.offload=nvme"], "train.zero_stage", "it must be >= 3 with train.offload nvme"),
    (["train.offload=cpu", "train.zero_stage=0"], "train.zero_stage", "it must be >= 1 with train.offload cpu"),
    (["train.offload_params=cpu"], "train.zero_stage", "it must be 3 with train.offload_params"),
    (["train.offload_params=nvme"], "train.zero_stage", "it must be 3 with train.offload_params"),
    (
        ["train.offload_params=nvme", "train.zero_stage=3", "train.master_weights=none"],
        "train.offload_params",
        "need master weights of float32",
    ),
    (["train.optimizer=adamw8bit", "train.offload=cpu"], "train.optimizer", "its state cannot be offloaded"),
    (["train.master_weights=none", "train.offload=cpu"], "train.master_weights", "offloaded state comes with them"),
    (["train.master_weights=none", "train.dtype=float32"], "train.master_weights", "Use float32, or dtype: bfloat16"),
    (["train.optimizer=paged_adamw8bit", "hardware.device=cpu"], "train.optimizer", "only CUDA moves pages"),
    (["students.0.adapter={kind: lora, targets: [q_proj, q_proj]}"], "students.0.adapter.targets", "named once"),
    (["students.0.adapter={kind: qlora}", "train.zero_stage=3"], "students.0.adapter.kind", "weights of 4 bits"),
    (["train.sequence_parallel=3", "hardware.gpus=8"], "train.sequence_parallel", "must divide hardware.gpus, 8"),
    (["train.kept_activations=products"], "train.kept_activations", "everything is kept"),
    (["publish.student=c"], "publish.student", "one of best, a, b, or null"),
    (["publish.student=null", "publish.repo=o/r"], "publish.repo", "nothing to upload"),
    (["publish.license=llama3.1", "publish.repo=o/my-model"], "publish.repo", "start with Llama"),
    (["teacher.url=http://10.0.0.1:8000"], "teacher.url", "must ask for a token"),
    (["teacher.token_env=T"], "teacher.token_env", "teacher.url is null"),
    (["hardware.gpus=12"], "hardware.gpus", "multiple of hardware.gpus_per_node, 8. Use 8."),
]


@pytest.mark.parametrize(("overrides", "setting", "said"), CONTRADICTIONS)
def test_settings_that_contradict_one_another_are_errors(valid, overrides, setting, said):
    text = errors(valid, *overrides)
    assert "errors in" not in text, text
    assert (text.startswith(f"{setting} in {valid} is") or text.startswith(f"--set {setting} is")) and said in text


def test_the_same_settings_without_the_contradiction_load(valid):
    good = ["teacher.url=http://localhost:8000", "publish.license=llama3.1", "publish.repo=o/Llama-x", "eval.k=1"]
    good += ["eval.temperature=0", "train.offload=nvme", "train.zero_stage=3", "hardware.gpus=16"]
    good += ["train.offload_params=nvme", "train.ema_decay=0.9"]
    assert load_config(valid, [*good]).publish.repo == "o/Llama-x"
    weights = ["train.zero_stage=3", "train.offload_params=nvme", "train.optimizer=adamw8bit"]
    assert load_config(valid, weights).train.offload_params == "nvme"


def test_a_geometry_needs_the_sizes_of_its_family_and_no_others(valid):
    dense = "{family: qwen2, hidden_size: 10, layers: 2, heads: 4, kv_heads: 3, intermediate_size: 8, vocab_size: 9}"
    text = errors(valid, f"students.0.geometry={dense}")
    assert "heads is 4; it must divide hidden_size, 10" in text and "kv_heads is 3; it must divide heads, 4" in text
    text = errors(valid, f"teacher.geometry={dense.replace('qwen2', 'deepseek_v3')}")
    assert "teacher.geometry.kv_lora_rank is missing" in text and "teacher.geometry.routed_experts is missing" in text
    odd = dense.replace("hidden_size: 10", "hidden_size: 8, routed_experts: 4").replace("kv_heads: 3", "kv_heads: 2")
    assert "family qwen2 has no such size" in errors(valid, f"students.0.geometry={odd}")
    assert "a student is dense" in errors(valid, f"students.0.geometry={dense.replace('qwen2', 'deepseek_v3')}")


@pytest.mark.parametrize(
    ("setting", "secret"),
    [
        ("publish.repo", "hf_abcdefghijklmnopqrstuvwxyz"),
        ("teacher.token_env", "sk-abcdefghijklmnopqrstuvwxyz"),
        ("teacher.token_env", "0123456789abcdef0123456789abcdef01234567"),
        ("tracking.api_key", "0123456789abcdef0123456789abcdef01234567"),
        ("teacher.url", "https://user:hunter2pass@example.org/v1"),
        ("run.name", "ghp_abcdefghijklmnopqrstuvwxyz"),
    ],
)
def test_a_secret_in_a_config_is_refused_and_never_repeated(write, valid, setting, secret):
    section, name = setting.split(".")
    in_file = errors(write(VALID.replace("run: {name: t}", "run: {}") + f"\n{section}x: {{{name}: '{secret}'}}\n"))
    by_override = errors(valid, f"{setting}={secret}")
    for text in (in_file, by_override):
        assert "holds what looks like a secret" in text and "HF_TOKEN" in text
        assert secret not in text and "hunter2pass" not in text


def test_ordinary_values_are_not_taken_for_secrets(valid):
    ordinary = ["teacher.token_env=MY_TEACHER_TOKEN", "teacher.url=https://example.org:8443/v1", "run.name=sk-learn"]
    assert load_config(valid, [*ordinary, "publish.repo=org/hf_model"]).teacher.token_env == "MY_TEACHER_TOKEN"


def test_names_that_other_modules_implement_are_the_ones_the_config_accepts():
    from typing import get_args

    from distill.grade import GRADERS
    from distill.losses.divergence import DIVERGENCES
    from distill.tasks.families import FAMILIES

    assert set(get_args(Family)) == set(FAMILIES)
    assert set(get_args(Grader)) == set(GRADERS)
    assert set(get_args(Divergence)) == set(DIVERGENCES)


def test_importing_the_config_imports_neither_torch_nor_transformers():
    code = "import sys, distill.config, distill.plan\n"
    code += "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_describe_names_every_setting_with_its_unit_and_bounds():
    table = describe()
    assert "train.batch_tokens" in table and "eval.top_p" in table
    (row,) = [line for line in table.splitlines() if line.startswith("train.lr ")]
    assert row.split()[:6] == ["train.lr", "float", "1e-05", ">", "0,", "<"]
    lines = table.splitlines()
    for path, info in settings(Config):
        first = path.replace("prompts.eval.", "prompts.train.").replace("students.N.geometry.", "teacher.geometry.")
        first = first.replace("train.text_sets.N.source(", "train.general.sources.N(")
        assert any(line.startswith(f"{first} ") for line in lines), path
        assert info.description or path.endswith(".kind"), path


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["teacher.speculative=eagle"], "teacher.speculative"),
        (["teacher.url=http://localhost:8000"], "its service draws as it was started"),
        (["teacher.tensor_parallel=2", "hardware.gpus=2"], "whole model"),
        (["teacher.tensor_parallel=auto", "teacher.expert_parallel=auto"], "whole model"),
    ],
)
def test_speculative_decoding_is_for_whole_models_here(valid, overrides, told):
    assert load_config(valid).teacher.speculative is None
    assert load_config(valid, ["teacher.speculative=mtp"]).teacher.speculative == "mtp"
    assert told in errors(valid, "teacher.speculative=mtp", *overrides)


# --- What a stage depends on ------------------------------------------------------------------------------------------

SPEED = ["teacher.batch_size=3", "hardware.gpus=4", "hardware.price_per_device_hour=2.0", "tracking.wandb=disabled"]
SPEED += ["train.micro_batch_tokens=8192", "train.checkpoint_steps=7", "train.zero_stage=2", "eval.batch_size=9"]
SPEED += [
    "teacher.speculative=mtp",
    "train.activation_checkpointing=true",
    "hardware.device=cpu",
    "run.dir=elsewhere",
    "tracking.project=p",
]


def specs(config: Config) -> dict[str, str]:
    stages = {s: stage_spec(config, s) for s in ("prompts", "traces", "eval", "publish")}
    stages |= {f"train {s}": stage_spec(config, "train", s) for s in ("a", "b")}
    return {name: json.dumps(spec, sort_keys=True) for name, spec in stages.items()}


def test_what_only_changes_speed_leaves_every_stage_as_it_is(valid):
    before = specs(load_config(valid))
    for override in SPEED:
        assert specs(load_config(valid, [override])) == before, override


@pytest.mark.parametrize(
    ("override", "stale"),
    [
        ("prompts.train.0.seed=5", {"prompts"}),
        ("prompts.max_train=7", {"prompts"}),
        ("teacher.sampling.temperature=1.0", {"traces"}),
        ("teacher.capture.k_max=32", {"traces"}),
        ("teacher.capture.tail_draws=4", {"traces"}),
        ("traces.verify=false", {"traces"}),
        ("teacher.path=org/other", {"traces", "eval"}),
        ("students.0.loss.alpha=0.5", {"train a"}),
        ("students.1.path=org/other", {"train b", "eval", "publish"}),
        ("train.lr=1e-4", {"train a", "train b"}),
        ("eval.k=8", {"eval"}),
        ("publish.license=mit", {"publish"}),
        ("run.seed=1", {"prompts", "traces", "train a", "train b", "eval"}),
    ],
)
def test_a_setting_makes_exactly_the_stages_stale_that_depend_on_it(valid, override, stale):
    before, after = specs(load_config(valid)), specs(load_config(valid, [override]))
    assert {name for name in before if before[name] != after[name]} == stale


def test_an_unknown_stage_has_no_spec(valid):
    with pytest.raises(ValueError, match="unknown stage"):
        stage_spec(load_config(valid), "training")
    with pytest.raises(ValueError, match="student's name"):
        stage_spec(load_config(valid), "train")


def test_sampling_bounds_are_the_mathematical_ones(valid):
    for good in (
        "teacher.sampling.top_p=1",
        "teacher.sampling.temperature=0",
        "teacher.capture.tail_bound=0",
        "teacher.capture.tail_draws=64",
    ):
        load_config(valid, [good])
    for bad in (
        "teacher.sampling.top_p=0",
        "teacher.sampling.top_p=1.01",
        "teacher.sampling.temperature=-0.1",
        "teacher.capture.tail_draws=65",
    ):
        assert bad.split("=")[0] in errors(valid, bad)
    assert math.isclose(load_config(valid).teacher.sampling.top_p, 0.95)
