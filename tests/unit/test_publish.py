"""Laws of publishing: only safe files, only true claims, the licence kept, and what loads back is what was trained."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_server import serve
from safetensors.numpy import load_file, save_file

from distill.config import Config
from distill.config_students import Student
from distill.errors import ConfigError, DataError, ModelError, ServiceError
from distill.model_card import Made, card, eval_result_files, hub_id, license_of, notice, published_name
from distill.publish import check_publish, choose_student, probe_logits, publish_student, warnings
from teachers.tiny.tokenizers import SPECS, build

MADE = Made(
    "deepspeed distill/run.py --config c.yaml", "c0ffee", "0123456789abcdef", "feedbead00000000", "abad1dea00000000"
)
GYM = {"kind": "reasoning_gym", "families": {"chain_sum": 40, "gcd": 8}, "levels": [1, 2], "seed": 77}


def row(name, role, pass_at_1, ci_low, ci_high, mean_tokens, truncated_share=0.0):
    return {
        "name": name,
        "role": role,
        "pass_at_1": pass_at_1,
        "ci_low": ci_low,
        "ci_high": ci_high,
        "mean_tokens": mean_tokens,
        "truncated_share": truncated_share,
    }


MODELS = [
    row("teacher", "teacher", 0.97, 0.95, 0.99, 81.2),
    row("small (base)", "base", 0.21, 0.15, 0.27, 9.0),
    row("small", "student", 0.8125, 0.75, 0.875, 85.4, 0.0125),
    row("other", "student", 0.5, 0.4, 0.6, 85.4),
]
AGAINST_BASE = {
    "a": "small",
    "b": "small (base)",
    "difference": 0.6025,
    "ci_low": 0.52,
    "ci_high": 0.68,
    "p_value": 1e-4,
}
GAP = {"student": "small", "value": 0.7928, "ci_low": 0.7, "ci_high": 0.88}
REPORT = {"models": MODELS, "comparisons": [AGAINST_BASE], "gap_recovered": [GAP]}


def make_config(base="bases/small", publish=None, **more):
    return Config.model_validate(
        {
            "run": {"name": "r"},
            "prompts": {"train": [{"kind": "hf", "path": "open-r1/maths", "limit": 9}], "eval": [GYM]},
            "teacher": {"path": "deepseek-ai/DeepSeek-R1"},
            "students": [{"name": "small", "path": base}, {"name": "other", "path": base}],
            "publish": publish or {},
        }
        | more
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real checkpoint: a random Qwen3 of two layers with the bundled tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("train") / "small"
    tok = build(SPECS["qwen"], ["we add the numbers and check again.\n"] * 30)
    torch.manual_seed(3)
    shape = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=320, head_dim=16, max_position_embeddings=128, **shape))
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    (folder / "optimizer_state.json").write_text("{}")
    return folder


def copy_of(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def metadata(text):
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(head), body


# --- the folder ------------------------------------------------------------------------------------------------------


def test_published_folder_loads_generates_and_computes_what_was_trained(trained, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expected = probe_logits(trained)
    result = publish_student(
        make_config(),
        "small",
        trained,
        tmp_path / "6-publish" / "small",
        report=REPORT,
        made=MADE,
        expected_probe=expected,
    )
    out = tmp_path / "6-publish" / "small"
    assert result["files"] == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert result["probe"] == expected and result["loaded_back"] and result["url"] is None
    assert result["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert os.listdir(out.parent) == ["small"]
    tok, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    settings = model.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_p) == (True, 0.6, 0.95)
    assert settings.eos_token_id == [tok.convert_tokens_to_ids("<|end|>")]
    inputs = tok.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert tok.decode(inputs["input_ids"][0]) == "<|user|>hi<|assistant|><think>\n"
    with torch.no_grad():
        assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_publishing_again_replaces_the_folder(trained, tmp_path):
    out = tmp_path / "small"
    out.mkdir()
    (out / "stale.txt").write_text("from an older run")
    publish_student(make_config(), "small", trained, out, report=REPORT, made=MADE)
    assert not (out / "stale.txt").exists() and (out / "README.md").exists()


def test_probe_is_logsumexp_and_logits_of_the_next_token(trained):
    import torch
    from transformers import AutoModelForCausalLM

    from distill.tokens import load_tokenizer, render_prompt

    tok = load_tokenizer(trained)
    model = AutoModelForCausalLM.from_pretrained(trained)
    with torch.no_grad():
        logits = model(torch.tensor([render_prompt(tok, "What is 17 + 25?")])).logits[0, -1, : len(tok)]
    logits = logits.double().numpy()
    picked = [int(i) for i in np.linspace(0, len(tok) - 1, 15)]
    np.testing.assert_allclose(probe_logits(trained), [np.log(np.exp(logits).sum()), *logits[picked]], atol=2e-5)


def test_weights_that_compute_something_else_are_refused_and_leave_no_folder(trained, tmp_path):
    expected = probe_logits(trained)
    damaged = copy_of(trained, tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"] + 0.05
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="other logits"):
        publish_student(
            make_config(), "small", damaged, tmp_path / "out", report=REPORT, made=MADE, expected_probe=expected
        )
    assert not (tmp_path / "out").exists()


def test_weights_with_nan_are_refused(trained, tmp_path):
    damaged = copy_of(trained, tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.nan
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        publish_student(make_config(), "small", damaged, tmp_path / "out", report=REPORT, made=MADE)


def test_tokenizer_larger_than_the_vocabulary_is_refused(trained, tmp_path):
    other = copy_of(trained, tmp_path / "other")
    build(SPECS["llama"], ["some text here\n"] * 9).save_pretrained(other)
    with pytest.raises(ModelError, match="320 vocabulary rows"):
        probe_logits(other)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_model.bin", pickle.dumps({"a": 1}), "pickles or code"),
        ("modeling_small.py", b"import os", "pickles or code"),
        ("model.safetensors", pickle.dumps({"a": 1}), "not a safetensors file"),
        ("model-00002-of-00002.safetensors", b"\x00" * 64, "not a safetensors file"),
        ("model.safetensors.index.json", b'{"weight_map": {"w": "model-00009.safetensors"}}', "weights are missing"),
        ("config.json", b"{", "not readable as JSON"),
    ],
)
def test_unsafe_or_damaged_checkpoints_are_refused(trained, tmp_path, name, content, message):
    bad = copy_of(trained, tmp_path / "bad")
    (bad / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        publish_student(make_config(), "small", bad, tmp_path / "out", report=REPORT, made=MADE)
    assert not (tmp_path / "out").exists()


def test_names_of_code_that_the_base_came_with_are_not_published(trained, tmp_path):
    """They are copied into every checkpoint: refusing them there would be the end of a whole run."""
    model = copy_of(trained, tmp_path / "model")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(content | {"auto_map": {"AutoModelForCausalLM": "org/evil--x.Y"}}))
    publish_student(make_config(), "small", model, tmp_path / "out", report=REPORT, made=MADE)
    for name in ("config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((trained / name).read_text())


@pytest.mark.parametrize("repo", ["me/..", "me/a--b", "me/-a", "me/a.git", "me/" + "x" * 97])
def test_a_repository_that_the_hub_cannot_have_is_told_before_any_work(repo, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 20)
    with pytest.raises(ConfigError, match=r"publish\.repo is no name of the Hub"):
        check_publish(make_config(publish={"repo": repo, "license": "mit"}))


def test_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="no trained checkpoint"):
        publish_student(make_config(), "small", tmp_path / "none", tmp_path / "out", report=REPORT, made=MADE)


# --- the card --------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_student_learned_from_beside_the_traces():
    chats = {"kind": "jsonl", "path": "/data/chats.jsonl", "limit": 50}
    mixed = {
        "trace_sets": [{"name": "m", "run": "runs/math", "weight": 0.5}],
        "general": {"sources": [{"kind": "bundled"}, chats], "share": 0.2},
        "text_sets": [{"name": "talk", "source": {"kind": "hf", "path": "org/talks"}}],
        "on_policy": {"rounds": 2},
    }
    config = make_config(train=mixed)
    learner = {"kind": "logits", "alpha": 0.9}
    config.students[0] = Student(name="small", path="bases/small", loss=learner, adapter={"kind": "lora", "rank": 8})
    said = card(config, "small", REPORT, MADE, license_of("bases/small", "mit"))
    general = "general data, 20% of an epoch's tokens (bundled questions; local file chats.jsonl, first 50 rows)"
    others = ("traces of the run math (weight 0.5)", "org/talks, split train", "in 2 rounds", "lora of rank 8, merged")
    for part in (general, *others):
        assert part in said
    config.students[0] = Student(name="small", path="bases/small", loss={"kind": "response"})
    said = card(config, "small", REPORT, MADE, license_of("bases/small", "mit"))
    assert "general data" in said and "org/talks" not in said and "rounds" not in said and "lora" not in said
    said = card(make_config(), "small", REPORT, MADE, license_of("bases/small", "mit"))
    assert "also trained on" not in said and "| adapter" not in said


def test_card_metadata_is_what_the_hub_reads_back(tmp_path):
    from huggingface_hub import ModelCard

    config = make_config("Qwen/Qwen3-0.6B", {"license": "apache-2.0", "repo": "me/small-student"})
    text = card(config, "small", REPORT, MADE, license_of("Qwen/Qwen3-0.6B", "apache-2.0"))
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == ("Qwen/Qwen3-0.6B", "finetune")
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert data.datasets == ["open-r1/maths"] and "distillation" in data.tags
    (result,) = data.eval_results
    assert (data.model_name, result.metric_type, result.metric_value) == ("small-student", "pass@1", 0.8125)
    assert result.metric_args == {"ci_low": 0.75, "ci_high": 0.875, "k": 4}
    assert "[0.750, 0.875] at 95%" in result.metric_name
    assert result.dataset_name == ("procedural problems from reasoning-gym (levels 1, 2; seed 77; chain_sum 40, gcd 8)")


def test_card_tells_results_teacher_and_how_it_was_made():
    text = card(make_config("Qwen/Qwen3-0.6B"), "small", REPORT, MADE, license_of("Qwen/Qwen3-0.6B", None))
    for line in (
        "| **small** | student | **0.812** | [0.750, 0.875] | 85 | 1.2% |",
        "| teacher | teacher | 0.970 | [0.950, 0.990] | 81 | 0.0% |",
        "Share of the gap between base and teacher recovered: 0.793 [0.700, 0.880].",
        "small minus small (base): +0.603 [0.520, 0.680], p = 0.0001 (paired test over prompts).",
        "| teacher's tokenizer | fingerprint `abad1dea00000000` |",
        "| command | `deepspeed distill/run.py --config c.yaml` |",
        "| code | commit `c0ffee` |",
        "| config | hash `0123456789abcdef` |",
        "| prompts | open-r1/maths, split train, first 9 rows |",
    ):
        assert line in text.splitlines(), line
    teacher = "[deepseek-ai/DeepSeek-R1](https://huggingface.co/deepseek-ai/DeepSeek-R1)"
    assert f"| teacher | {teacher}, fingerprint `feedbead00000000` |" in text.splitlines()


def test_card_claims_no_hub_base_for_a_local_folder(tmp_path):
    base = tmp_path / "secret-home" / "base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    license = license_of(str(base), None)
    text = card(make_config(str(base)), "small", REPORT, MADE, license)
    head, body = metadata(text)
    assert "base_model" not in head and "base_model_relation" not in head
    assert head["license"] == "mit"
    assert "`base`" in body and "secret-home" not in text


def test_card_shows_no_secret_of_the_command_line():
    made = Made("run.py --set teacher.url=https://me:pw123456@host --set x=hf_AbCdEfGhIjKlMnOpQrSt", "c", "h", "f")
    text = card(make_config(), "small", REPORT, made, license_of("bases/small", None))
    assert "pw123456" not in text and "hf_AbCd" not in text and "@host" in text


def test_report_without_the_student_is_an_error():
    with pytest.raises(DataError, match="does not know this student"):
        card(make_config(), "small", {"models": REPORT["models"][:2]}, MADE, license_of("b", None))


def test_card_says_what_the_report_could_not_measure():
    gap = GAP | {"value": None, "ci_low": None, "ci_high": None, "reason": "the teacher is no better than the base"}
    unsure = row("teacher", "teacher", None, None, None, None, None)
    report = {
        "models": [unsure, *MODELS[1:]],
        "gap_recovered": [gap],
        "comparisons": [AGAINST_BASE | {"p_value_holm": 0.5}],
    }
    text = card(make_config(), "small", report, MADE, license_of("b", None))
    assert "| teacher | teacher | n/a | [n/a, n/a] | n/a | n/a |" in text.splitlines()
    assert "recovered: not defined (the teacher is no better than the base)." in text
    assert "p = 0.0001, 0.5 after Holm" in text
    with pytest.raises(DataError, match="nothing could be graded"):
        card(make_config(), "small", {"models": [row("small", "student", *[None] * 5)]}, MADE, license_of("b", None))


def test_scores_go_to_a_hub_benchmark_only_if_it_alone_was_measured():
    aime = {"kind": "hf", "path": "HuggingFaceH4/aime_2024", "split": "test"}

    def files(sources):
        config = make_config(prompts={"train": [GYM], "eval": sources})
        return eval_result_files(config, "small", REPORT, "2026-01-02")

    assert files([GYM]) == {} and files([aime, GYM]) == {}
    ((name, content),) = files([aime]).items()
    (entry,) = yaml.safe_load(content)
    assert name == "aime_2024.yaml"
    assert entry["dataset"] == {"id": "HuggingFaceH4/aime_2024", "task_id": "default"}
    assert entry["value"] == 81.25 and entry["date"] == "2026-01-02" and "[0.750, 0.875]" in entry["notes"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/abc", "Qwen/Qwen3-0.6B"),
        ("/data/base", None),
        ("a/b/c", None),
        ("teachers/tiny", None),  # a folder of this tree
    ],
)
def test_hub_id(path, expected):
    assert hub_id(path) == expected


# --- licence ---------------------------------------------------------------------------------------------------------

LLAMA3_SHAPE = {"model_type": "llama", "vocab_size": 128_256}


@pytest.mark.parametrize(
    ("base", "configured", "shape", "identifier", "release"),
    [
        ("meta-llama/Llama-3.1-8B", None, {}, "llama3.1", "3.1"),
        ("meta-llama/Meta-Llama-3-8B", None, {}, "llama3", "3"),
        ("unsloth/llama-3.3-70b", None, {}, "llama3.3", "3.3"),
        ("/models/base", "llama3.2", {}, "llama3.2", "3.2"),
        ("/models/base", None, LLAMA3_SHAPE, "llama3", "3"),
        ("teachers/tiny/student-llama", None, {"model_type": "llama", "vocab_size": 2304}, None, None),
        ("Qwen/Qwen3-8B", "apache-2.0", {}, "apache-2.0", None),
        ("/data/llama-33-things", None, {}, None, None),
    ],
)
def test_licence_of_a_base(base, configured, shape, identifier, release):
    license = license_of(base, configured, shape)
    assert (license.identifier, license.llama_release) == (identifier, release)


def test_llama_derivative_must_be_named_llama_and_keep_the_licence():
    license = license_of("meta-llama/Llama-3.1-8B", None)
    assert published_name("me/Llama-small", "small", license) == "Llama-small"
    assert published_name(None, "small", license) == "Llama-small"
    with pytest.raises(ConfigError, match=r"me/Llama-R1-small"):
        published_name("me/R1-small", "small", license)
    with pytest.raises(ConfigError, match=r"llama3\.1"):
        license_of("meta-llama/Llama-3.1-8B", "mit")


def test_llama_card_and_folder_carry_the_prescribed_words(trained, tmp_path):
    base = tmp_path / "Llama-3.1-tiny"
    base.mkdir()
    (base / "LICENSE").write_text("the agreement")
    (base / "USE_POLICY.md").write_text("the policy")
    out = tmp_path / "out"
    publish_student(make_config(str(base)), "small", trained, out, report=REPORT, made=MADE)
    expected = (
        "Llama 3.1 is licensed under the Llama 3.1 Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved."
    )
    assert (out / "NOTICE").read_text().strip() == expected
    assert (out / "LICENSE").read_text() == "the agreement" and (out / "USE_POLICY.md").exists()
    head, body = metadata((out / "README.md").read_text())
    assert head["license"] == "llama3.1" and "Built with Llama" in body and "# Llama-small" in body
    assert notice(license_of("Qwen/Qwen3-8B", None)) is None


# --- which student, and checks before any work -----------------------------------------------------------------------


def test_best_is_the_student_with_the_highest_pass_at_1():
    assert choose_student(make_config(), REPORT) == "small"
    assert choose_student(make_config(), REPORT | {"run": {"best_student": "other"}}) == "other"
    assert choose_student(make_config(publish={"student": "other"}), REPORT) == "other"
    assert choose_student(make_config(publish={"student": None}), REPORT) is None
    with pytest.raises(DataError, match="no scored student"):
        choose_student(make_config(), {"models": REPORT["models"][:2]})


def test_a_student_no_better_than_its_base_is_not_published_without_a_word():
    rows = [
        ("b", "base", None, 0.5),
        ("s", "student", "b", 0.5),
        ("t", "student", "b", 0.6),
        ("u", "student", "b", None),
    ]
    report = {"models": [{"name": n, "role": r, "base": b, "pass_at_1": p} for n, r, b, p in rows]}
    checked = {"loaded_back": True, "gguf": None}
    (told,) = warnings("s", report, checked)
    assert "s is published with a pass@1 of 0.500" in told and "b, has 0.500" in told
    assert [warnings(name, report, checked) for name in "tux"] == [[], [], []]
    assert len(warnings("t", report, {"loaded_back": False, "gguf": {"checked": False}})) == 2


def test_checks_before_any_work(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    check_publish(make_config())
    with pytest.raises(ConfigError, match=r"best or one of \['small', 'other'\]"):
        check_publish(make_config(publish={"student": "smal"}))
    with pytest.raises(ConfigError, match="starts with Llama"):
        check_publish(make_config("meta-llama/Llama-3.1-8B", {"repo": "me/r1"}))
    with pytest.raises(ServiceError, match="HF_TOKEN"):
        check_publish(make_config(publish={"repo": "me/r1"}))
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    check_publish(make_config(publish={"repo": "me/r1"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ServiceError, match="HF_HUB_OFFLINE"):
        check_publish(make_config(publish={"repo": "me/r1"}))


# --- upload ----------------------------------------------------------------------------------------------------------


def in_process(hub, code, home, *arguments, token="hf_writer"):
    """Run code in a process whose Hub is the test's: HF_ENDPOINT is read when huggingface_hub is imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= {"HF_TOKEN": token} if token else {}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


UPLOAD = """
    import json, sys
    from pathlib import Path
    from distill.config import Config
    from distill.errors import DistillError
    from distill.model_card import Made
    from distill.publish import publish_student
    config = Config.model_validate_json(sys.argv[1])
    try:
        result = publish_student(config, "small", Path(sys.argv[2]), Path(sys.argv[3]), report=json.loads(sys.argv[4]),
                                 made=Made("run", "c", "h", "f"))
        print(result["url"])
    except DistillError as error:
        print(type(error).__name__, error)
"""


def test_upload_creates_the_repository_sends_the_folder_and_transformers_loads_it_from_there(trained, tmp_path):
    config = make_config("Qwen/Qwen3-0.6B", {"repo": "me/small-student", "license": "apache-2.0"})
    arguments = (config.model_dump_json(), trained, tmp_path / "out", json.dumps(REPORT))
    with serve() as hub:
        assert in_process(hub, UPLOAD, tmp_path / "home", *arguments).strip() == f"{hub.url}/me/small-student"
        assert hub.private == {"me/small-student": True}
        local = {
            str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()
        }
        assert hub.repos["me/small-student"] == local
        assert b"hf_writer" not in b"".join(local.values())
        probe = in_process(
            hub,
            """
            from huggingface_hub import snapshot_download
            from transformers import AutoModelForCausalLM, AutoTokenizer
            AutoModelForCausalLM.from_pretrained("me/small-student"); AutoTokenizer.from_pretrained("me/small-student")
            from distill.publish import probe_logits
            print(probe_logits(snapshot_download("me/small-student")))
            """,
            tmp_path / "other-home",
            token=None,
        )
    assert json.loads(probe) == probe_logits(trained)


UPLOAD_ONLY = """
    import sys
    from distill.errors import DistillError
    from distill.publish import upload
    try:
        print(upload(sys.argv[1], "me/small-student"))
    except DistillError as error:
        print(type(error).__name__, error)
"""


def test_refused_upload_is_a_service_error_and_running_again_completes_it(trained, tmp_path):
    with serve() as hub:
        reader = in_process(hub, UPLOAD_ONLY, tmp_path / "home", trained, token="hf_reader")
        assert reader.startswith("ServiceError publish.repo: me/small-student") and "write access" in reader
        assert "hf_reader" not in reader
        hub.fail_commits = 1
        broken = in_process(hub, UPLOAD_ONLY, tmp_path / "home", trained)
        assert broken.startswith("ServiceError") and "same command again" in broken
        assert in_process(hub, UPLOAD_ONLY, tmp_path / "home", trained).strip().endswith("/me/small-student")
        assert set(hub.repos["me/small-student"]) == {path.name for path in trained.iterdir()}


def test_files_that_the_repository_has_are_not_sent_again(trained, tmp_path):
    with serve() as hub:
        in_process(hub, UPLOAD_ONLY, tmp_path / "home", trained)
        in_process(hub, UPLOAD_ONLY, tmp_path / "home", trained)
        commits = [path for method, path in hub.requests if "/commit/" in path]
        assert len(commits) == 1


def test_uploaded_llama_derivative_needs_the_agreement_from_the_hub_or_fails(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from distill.errors import ServiceError
        from distill.publish import _copy_legal
        out = Path(sys.argv[1]); out.mkdir()
        try:
            _copy_legal("meta-llama/Llama-3.2-1B", out, must=True)
        except ServiceError as error:
            print(error)
        _copy_legal("meta-llama/Llama-3.1-8B", out, must=True)
        print((out / "LICENSE").read_text())
    """
    with serve() as hub:
        hub.repos["meta-llama/Llama-3.1-8B"] = {"LICENSE": b"the agreement"}
        hub.repos["meta-llama/Llama-3.2-1B"] = {}
        out = in_process(hub, code, tmp_path / "home", tmp_path / "out").splitlines()
    assert "Put the agreement as LICENSE" in out[0] and out[1] == "the agreement"


def test_importing_the_module_loads_no_torch():
    code = "import sys, distill.publish; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.split() == ["False", "False"]
