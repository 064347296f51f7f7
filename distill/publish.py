"""A finished student as a Hugging Face folder, checked by loading it back, and uploaded where the config says so.

The folder holds weights as safetensors (never a pickle, never code), the tokenizer with its chat template, generation
settings, the model card and the scores. torch and transformers are imported when weights are loaded.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill.config import Config
from distill.errors import ConfigError, DataError, ModelError, ServiceError, StoreError
from distill.gguf_check import check_gguf
from distill.gguf_export import export_gguf, require_packages
from distill.gguf_model import check_exportable
from distill.model_card import License, Made, card, eval_result_files, hub_id, license_of, notice, published_name
from distill.redact import redact_text
from distill.tokens import load_tokenizer, render_prompt, stop_ids

# Copied from the trained checkpoint; anything else that lies there (optimizer state, logs) is left behind.
_FILES = (
    "config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
_CODE_OR_PICKLE = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py", ".so"}
_LEGAL = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_PROBE_TOLERANCE = 1e-3


def check_publish(config: Config) -> None:
    """Returns if the publish section can be carried out, before any work.

    Errors: ConfigError for an unknown student, a name that the base's licence or the Hub forbids, or GGUF without its
    extra;
    ModelError for GGUF of a student that llama.cpp cannot hold; ServiceError when an upload is asked for without a
    token or with the Hub switched off. No network.
    """
    wanted = config.publish.student
    if wanted not in (None, "best") and wanted not in (names := [each.name for each in config.students]):
        raise ConfigError(
            "no such student", where="publish.student", value=wanted, remedy=f"Use best or one of {names}."
        )
    if wanted is None:
        return
    for student in config.students:
        if wanted in ("best", student.name):
            license = license_of(student.path, config.publish.license, _read_json(Path(student.path) / "config.json"))
            published_name(config.publish.repo, student.name, license)
            if config.publish.gguf and Path(student.path).is_dir():  # a base on the Hub is looked at when it is here
                check_exportable(student.path)
    if config.publish.gguf:
        require_packages()
    if config.publish.repo:
        _check_repo(config.publish.repo)
        _token()


def _check_repo(repo: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"publish.repo is no name of the Hub: {error}", remedy="Use ORG/NAME.") from None


def choose_student(config: Config, report: dict[str, Any]) -> str | None:
    """The student to publish: the configured one; for "best" the one that the report names best, or else the one with
    the highest pass@1 (the first of equals). DataError when no student was scored."""
    if config.publish.student != "best":
        return config.publish.student
    if named := report.get("run", {}).get("best_student"):
        return named
    students = [row for row in report.get("models", []) if row["role"] == "student" and row["pass_at_1"] is not None]
    if not students:
        raise DataError("the report holds no scored student", where="report.json", remedy="Run the eval stage again.")
    return max(students, key=lambda row: row["pass_at_1"])["name"]


def warnings(student: str, report: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """What whoever publishes this student should hear: no better than its base, or not checked. result: what
    publish_student returned."""
    found, scored = [], {row["name"]: row for row in report["models"] if row["pass_at_1"] is not None}
    own = scored.get(student)
    base = scored.get(own.get("base")) if own else None
    if base is not None and own["pass_at_1"] <= base["pass_at_1"]:
        its, has = (f"{row['pass_at_1']:.3f}" for row in (own, base))
        found.append(f"{student} is published with a pass@1 of {its}; its base, {base['name']}, has {has}")
    if not result["loaded_back"]:
        found.append("too large for this machine's memory, so it was not loaded back and compared")
    if result["gguf"] and not result["gguf"]["checked"]:
        found.append("too large for this machine's memory, so llama.cpp was not run on the GGUF file")
    return found


def publish_student(
    config: Config,
    student: str,
    model: Path,
    out: Path,
    *,
    report: dict[str, Any],
    made: Made,
    expected_probe: list[float] | None = None,
) -> dict[str, Any]:
    """Write the folder `out` from the trained checkpoint `model`, load it back, upload it if publish.repo is set.

    Returns {"folder", "bytes", "files", "loaded_back", "probe", "gguf" (the check's figures), "url" (None without
    upload)}. The folder appears under its name only once it is complete and its logits equal expected_probe (what
    probe_logits gave when the student was saved; by default that of `model` itself). loaded_back is False, and said so,
    where the weights exceed free memory.
    Errors: ModelError for pickles, code, damaged weights, other logits, or a GGUF file that computes other ones;
    ConfigError for a forbidden name; StoreError when the folder cannot be written; ServiceError when the Hub refuses.
    """
    model, out = Path(model), Path(out)
    _refuse_unsafe(model)
    base = config.student(student).path
    license = license_of(base, config.publish.license, _read_json(model / "config.json"))
    text = card(config, student, report, made, license)
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _copy_model(model, partial)
        _write_texts(config, student, partial, text, license, report, base)
    except OSError as error:
        raise StoreError(
            f"the folder cannot be written: {error.strerror}",
            where=str(partial),
            remedy="Free space or make it writable, then run again.",
        ) from error
    fits = _fits_in_memory(partial)
    probe = _check_loads(partial, expected_probe or probe_logits(model)) if fits else []
    gguf = _add_gguf(partial, student) if config.publish.gguf else None
    shutil.rmtree(out, ignore_errors=True)
    partial.replace(out)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {
        "folder": str(out),
        "bytes": sum(path.stat().st_size for path in files),
        "files": [str(path.relative_to(out)) for path in files],
        "loaded_back": fits,
        "probe": probe,
        "gguf": gguf,
        "url": upload(out, config.publish.repo, private=config.publish.private) if config.publish.repo else None,
    }


def probe_logits(folder: str | Path) -> list[float]:
    """A checksum of what a checkpoint computes: the logsumexp and 15 evenly spaced logits (float32) of the token that
    follows a fixed prompt. Loads the model with the Auto class on CPU in its stored dtype.

    Errors: ModelError when it cannot be loaded, has fewer rows than its tokenizer, or computes something not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tok = load_tokenizer(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=False, local_files_only=True, use_safetensors=True
        ).eval()
    except Exception as error:  # transformers raises many kinds
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"the checkpoint does not load: {first}", where=str(folder)) from error
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < len(tok):
        raise ModelError(
            f"the model has {rows} vocabulary rows, its tokenizer {len(tok)} tokens",
            where=str(folder),
            remedy="The tokenizer belongs to another model.",
        )
    with torch.inference_mode():
        logits_V = model(torch.tensor([render_prompt(tok, "What is 17 + 25?")])).logits[0, -1, : len(tok)].float()
    picked = torch.linspace(0, len(tok) - 1, 15).long()
    values = [logits_V.logsumexp(0).item(), *logits_V[picked].tolist()]
    if not all(map(math.isfinite, values)):
        raise ModelError("the model computes values that are not finite", where=str(folder))
    return [round(value, 6) for value in values]


def upload(folder: str | Path, repo: str, *, private: bool = True) -> str:
    """Upload every file of the folder to a model repository, made if missing; returns its address.

    The token comes from HF_TOKEN or `hf auth login` and is written nowhere. Files that the repository already has are
    not sent again, so that an interrupted upload goes on.
    Errors: ServiceError naming what the Hub answered.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    token = _token()
    if not os.isatty(2):
        disable_progress_bars()
    api = HfApi(token=token, library_name="distill")
    try:
        url = api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Upload student")
    except Exception as error:  # HTTP errors, but also broken connections of several libraries
        status = (
            error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
        )
        refused = status in (401, 403)
        raise ServiceError(
            f"the Hub refused the upload: {redact_text(str(error).strip().splitlines()[0])}",
            where=f"publish.repo: {repo}",
            value=status,
            remedy="Use a token with write access to this repository."
            if refused
            else "Run the same command again: files that arrived are not sent twice.",
        ) from None
    return str(url)


def _token() -> str:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ServiceError(
            "an upload is asked for while HF_HUB_OFFLINE is set",
            where="publish.repo",
            remedy="Unset HF_HUB_OFFLINE, or set publish.repo: null to write the folder only.",
        )
    token = get_token()
    if not token:
        raise ServiceError(
            "an upload is asked for and there is no Hugging Face token",
            where="publish.repo",
            remedy="Set HF_TOKEN or run `hf auth login`, or set publish.repo: null to write the folder only.",
        )
    return token


def _refuse_unsafe(model: Path) -> None:
    """Only safetensors that are what their name says: DeepSpeed can write a pickle under that name."""
    from safetensors import SafetensorError, safe_open

    if not model.is_dir():
        raise ModelError("no trained checkpoint in this folder", where=str(model), remedy="Run the train stage.")
    unsafe = sorted(path.name for path in model.iterdir() if path.suffix in _CODE_OR_PICKLE)
    if unsafe:
        raise ModelError(
            "the checkpoint holds pickles or code, which are never published",
            where=str(model),
            value=unsafe,
            remedy="Export the student as safetensors again.",
        )
    index = _read_json(model / "model.safetensors.index.json").get("weight_map", {})
    weights = sorted(model.glob("*.safetensors"))
    missing = sorted(set(index.values()) - {path.name for path in weights})
    if missing or not weights:
        raise ModelError(
            "weights are missing", where=str(model), value=missing or None, remedy="Run the train stage again."
        )
    for path in weights:
        try:
            with safe_open(path, "np") as file:
                file.keys()
        except SafetensorError as error:
            raise ModelError(
                f"not a safetensors file: {error}", where=str(path), remedy="Export the student again."
            ) from error


def _copy_model(model: Path, target: Path) -> None:
    for path in sorted(model.glob("*.safetensors")):
        try:
            os.link(path, target / path.name)  # the same bytes twice would cost 140 GB for a 70B student
        except OSError:
            shutil.copyfile(path, target / path.name)
    for name in _FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, target / name)
    for name in ("config.json", "tokenizer_config.json"):
        found = _read_json(target / name)
        if found.pop("auto_map", None):  # of the base: it names code that neither ran here nor is published
            _write(target / name, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def _write_texts(
    config: Config, student: str, folder: Path, text: str, license: License, report: dict[str, Any], base: str
) -> None:
    tok = load_tokenizer(folder)
    if not (folder / "chat_template.jinja").exists():
        (folder / "chat_template.jinja").write_text(tok.chat_template, encoding="utf-8")
    generation = {"do_sample": config.eval.temperature > 0, "eos_token_id": stop_ids(tok)}
    if tok.pad_token_id is not None:
        generation["pad_token_id"] = tok.pad_token_id
    if config.eval.temperature > 0:
        generation |= {"temperature": config.eval.temperature, "top_p": config.eval.top_p}
    _write(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    _write(folder / "README.md", text)
    for name, content in eval_result_files(config, student, report, datetime.now(UTC).date().isoformat()).items():
        _write(folder / ".eval_results" / name, content)
    _copy_legal(base, folder, must=bool(license.llama_release and config.publish.repo))
    if prescribed := notice(license):
        _write(folder / "NOTICE", prescribed)


def _copy_legal(base: str, folder: Path, must: bool) -> None:
    """The base's licence files. must: the Llama licence (1.b.i) wants the agreement itself in every distribution."""
    for path in (path for pattern in _LEGAL for path in Path(base).glob(pattern)):
        shutil.copyfile(path, folder / path.name)
    if not must or (folder / "LICENSE").exists():
        return
    from huggingface_hub import hf_hub_download

    try:
        shutil.copyfile(hf_hub_download(hub_id(base) or base, "LICENSE"), folder / "LICENSE")
    except Exception as error:
        raise ServiceError(
            f"the base's licence agreement must be uploaded with the student and cannot be had: {type(error).__name__}",
            where=base,
            remedy="Put the agreement as LICENSE into the base model's folder, or log in to the Hub.",
        ) from error


def _add_gguf(folder: Path, student: str) -> dict[str, Any]:
    """Writes STUDENT-TYPE.gguf into the folder, its matrices as the checkpoint has them, and runs it where it fits.

    Returns what was written and checked; {"checked": False} where float32 weights and the file exceed free memory.
    """
    draft = folder / "student.gguf"
    written = export_gguf(folder, draft, name=student)
    fits = _fits_in_memory(folder, copies=4)  # float32 of 16-bit weights is two; the file one more; room
    checked = check_gguf(draft, folder, weights=written["weights"]) if fits else {}
    draft.replace(folder / f"{student}-{written['weights']}.gguf")
    return written | {"checked": fits} | checked


def _fits_in_memory(folder: Path, copies: float = 1.2) -> bool:
    weights_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    import psutil

    return copies * weights_bytes < psutil.virtual_memory().available


def _check_loads(folder: Path, expected: list[float]) -> list[float]:
    found = probe_logits(folder)
    scale = max(1.0, *map(abs, expected))
    if len(found) != len(expected) or any(abs(a - b) > _PROBE_TOLERANCE * scale for a, b in zip(found, expected)):
        raise ModelError(
            "the folder loads but computes other logits than the trained student",
            where=str(folder),
            value=found[:3],
            remedy=f"Expected {expected[:3]}. Delete the folder and run the publish stage again.",
        )
    return found


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError("not readable as JSON", where=str(path), remedy="Restore the checkpoint.") from error
