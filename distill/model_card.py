"""The README.md of a published student, its scores for the Hub, and what its base's licence asks for. No torch here.

Metadata names a base model, a data set or a benchmark only where the Hub has it; a local folder or a procedural
generator is named in the text instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distill.config import Config
from distill.errors import ConfigError, DataError
from distill.redact import redact_text

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_LLAMA3 = re.compile(r"(?:^|/|--)(?:meta-)?llama-?3(?:\.(\d))?(?!\d)", re.IGNORECASE)


@dataclass(frozen=True)
class Made:
    """How the student came to be: the command line, the commit of the code, the hash of the resolved config, the
    fingerprints of the teacher's checkpoint and tokenizer."""

    command: str
    commit: str
    config_hash: str
    teacher_fingerprint: str
    tokenizer_fingerprint: str = ""


@dataclass(frozen=True)
class License:
    """`identifier` for the metadata (None: unknown) and, for a Llama base, the release its agreement belongs to."""

    identifier: str | None
    llama_release: str | None = None


def hub_id(path: str) -> str | None:
    """The Hub id that a path stands for (an id, or a snapshot in the Hub's local cache); None for another folder."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+?)(?:/|$)", path)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return path if _HUB_ID.match(path) and not Path(path).exists() else None


def license_of(base: str, configured: str | None, model_config: dict[str, Any] | None = None) -> License:
    """The licence of a student made from `base`: the configured one, else the one on the base's own card.

    A base is Meta's Llama 3 when its id or its licence says so, or when a folder's model_config has that architecture
    with Llama 3's 128,256-row vocabulary; a small model that merely uses the architecture is not.
    Errors: ConfigError when another licence is configured for such a base.
    """
    own = configured or _card_license(base)
    match = _LLAMA3.search(hub_id(base) or Path(base).name) or re.match(r"llama3(?:\.(\d))?", own or "")
    shape = model_config or {}
    if match:
        release = f"3.{match[1]}" if match[1] else "3"
    elif shape.get("model_type") == "llama" and shape.get("vocab_size") == 128_256:
        release = "3"
    else:
        return License(own)
    if configured and not configured.startswith("llama"):
        raise ConfigError(
            f"{base} is a Llama {release} model, whose derivatives keep its licence",
            where="publish.license",
            value=configured,
            remedy=f"Use llama{release}, or leave it out.",
        )
    return License(own or f"llama{release}", release)


def published_name(repo: str | None, student: str, license: License) -> str:
    """The name on the card. The Llama licence (1.b.i) wants derivatives' names to start with "Llama": a folder that
    stays here gets the prefix; a repository's name is the user's, so a wrong one is a ConfigError."""
    name = repo.split("/")[1] if repo else student
    if license.llama_release is None or name.startswith("Llama"):
        return name
    if repo is None:
        return f"Llama-{name}"
    raise ConfigError(
        f"a model made from Llama {license.llama_release} must have a name that starts with Llama",
        where="publish.repo",
        value=repo,
        remedy=f"Use {repo.split('/')[0]}/Llama-{name} (Llama {license.llama_release} licence, 1.b.i).",
    )


def card(config: Config, student: str, report: dict[str, Any], made: Made, license: License) -> str:
    """The whole README.md: metadata, the table of the report, teacher, data, training, and how to run it."""
    name = published_name(config.publish.repo, student, license)
    parts = [
        f"---\n{_metadata(config, student, name, report, license)}---\n",
        f"# {name}\n",
        _summary(config, student),
        "## Results\n",
        _results(config, student, report),
        "## How it was made\n",
        _provenance(config, student, made),
        "## Use\n",
        _usage(config, name),
        "## Licence\n",
        _license_text(config, student, license),
    ]
    return "\n".join(parts)


def eval_result_files(config: Config, student: str, report: dict[str, Any], date: str) -> dict[str, str]:
    """File name -> content for .eval_results/: one benchmark of the Hub a file, and only if it alone was measured.

    A figure over several sources, or over a generated one, belongs to no benchmark of the Hub and is not sent to one.
    """
    sources = config.prompts.eval
    if len(sources) != 1 or sources[0].kind != "hf" or not (benchmark := hub_id(sources[0].path)):
        return {}
    source, row = sources[0], _row(report, student)
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entry = EvalResultEntry(
        dataset_id=benchmark,
        task_id=source.subset or "default",
        value=round(100 * row["pass_at_1"], 2),
        date=date,
        notes=f"{_metric_name(config, row)}; split {source.split}{_limit(source)}",
    )
    file = f"{benchmark.split('/')[1].lower()}.yaml"
    return {file: yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)}


def notice(license: License) -> str | None:
    """The text of the NOTICE file that the Llama licence (1.b.iii) prescribes word for word; None for other bases."""
    release = license.llama_release
    return release and (
        f"Llama {release} is licensed under the Llama {release} Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
    )


def source_name(source: Any) -> str:
    """What a prompt source is, in words that let a reader find the same problems."""
    if source.kind == "reasoning_gym":
        families = ", ".join(f"{family} {count}" for family, count in source.families.items())
        levels = ", ".join(map(str, source.levels))
        return f"procedural problems from reasoning-gym (levels {levels}; seed {source.seed}; {families})"
    if source.kind == "jsonl":
        return f"local file {Path(source.path).name}{_limit(source)}"
    known = hub_id(source.path) or f"local folder {Path(source.path).name}"
    return f"{known}{f' ({source.subset})' if source.subset else ''}, split {source.split}{_limit(source)}"


def _limit(source: Any) -> str:
    return f", first {source.limit} rows" if getattr(source, "limit", None) else ""


def _metadata(config: Config, student: str, name: str, report: dict[str, Any], license: License) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    row, base = _row(report, student), hub_id(config.student(student).path)
    benchmarks = [hub_id(s.path) for s in config.prompts.eval if s.kind == "hf"]
    result = EvalResult(
        task_type="text-generation",
        task_name="Reasoning",
        dataset_type=benchmarks[0] if len(config.prompts.eval) == 1 and benchmarks and benchmarks[0] else "held-out",
        dataset_name="; ".join(source_name(source) for source in config.prompts.eval),
        metric_type="pass@1",
        metric_name=_metric_name(config, row),
        metric_value=round(row["pass_at_1"], 4),
        metric_args={"ci_low": _rounded(row["ci_low"]), "ci_high": _rounded(row["ci_high"]), "k": config.eval.k},
    )
    datasets = sorted({hub_id(s.path) for s in config.prompts.train if s.kind == "hf"} - {None})
    data = ModelCardData(
        base_model=base,
        base_model_relation="finetune" if base else None,
        datasets=datasets or None,
        license=license.identifier,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["distillation", "reasoning", *(["llama"] if license.llama_release else [])],
        model_name=name,
        eval_results=[result],
    )
    return data.to_yaml() + "\n"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _metric_name(config: Config, row: dict[str, Any]) -> str:
    return (
        f"pass@1, {_interval(row)} at {config.eval.confidence:.0%} confidence, mean of {config.eval.k} samples, "
        f"temperature {config.eval.temperature:g}, top-p {config.eval.top_p:g}"
    )


def _interval(row: dict[str, Any]) -> str:
    return f"[{_show(row['ci_low'])}, {_show(row['ci_high'])}]"


def _show(value: float | None, style: str = ".3f") -> str:
    """A figure of the report, which writes null for one that could not be had."""
    return "n/a" if value is None else format(value, style)


def _row(report: dict[str, Any], name: str) -> dict[str, Any]:
    rows = {row["name"]: row for row in report.get("models", [])}
    if name not in rows:
        raise DataError(
            "the report does not know this student",
            where="report.json",
            value=name,
            remedy=f"It has {sorted(rows)}. Run the eval stage again.",
        )
    if rows[name]["pass_at_1"] is None:
        raise DataError("the student has no pass@1: nothing could be graded", where="report.json", value=name)
    return rows[name]


def _summary(config: Config, student: str) -> str:
    chosen = config.student(student)
    what = "the text of its reasoning traces"
    if chosen.loss.kind == "logits":
        what += f" and its token distributions ({chosen.loss.divergence}, weight {chosen.loss.alpha:g})"
    return (
        f"A dense student of {_named(config.teacher.path)}, trained from {_named(chosen.path)} on {what}. It reasons "
        "between `<think>` and `</think>`, then answers.\n"
    )


def _named(path: str) -> str:
    known = hub_id(path)
    return f"[{known}](https://huggingface.co/{known})" if known else f"`{Path(path).name}`"


def _results(config: Config, student: str, report: dict[str, Any]) -> str:
    _row(report, student)
    lines = ["| model | role | pass@1 | interval | mean tokens | truncated |", "|---|---|---|---|---|---|"]
    for row in report["models"]:
        mark = "**" if row["name"] == student else ""
        lines.append(
            f"| {mark}{row['name']}{mark} | {row['role']} | {mark}{_show(row['pass_at_1'])}{mark} | {_interval(row)} "
            f"| {_show(row['mean_tokens'], '.0f')} | {_show(row['truncated_share'], '.1%')} |"
        )
    for gap in report.get("gap_recovered", []):
        if gap["student"] == student:
            recovered = f"{_show(gap['value'])} {_interval(gap)}" if gap["value"] is not None else "not defined"
            reason = f" ({gap['reason']})" if gap.get("reason") else ""
            lines += ["", f"Share of the gap between base and teacher recovered: {recovered}{reason}."]
    for each in report.get("comparisons", []):
        if student in (each["a"], each["b"]):
            against = f"{each['a']} minus {each['b']}: {_show(each['difference'], '+.3f')} {_interval(each)}"
            adjusted = f", {_show(each['p_value_holm'], '.2g')} after Holm" if "p_value_holm" in each else ""
            p_value = f"p = {_show(each['p_value'], '.2g')}{adjusted}"
            lines.append(f"\n{against}, {p_value} (paired test over prompts).")
    sources = "; ".join(source_name(source) for source in config.prompts.eval)
    lines.append(
        f"\nMeasured on {sources}, all models in one harness on the same prompts: {config.eval.k} samples a prompt, "
        f"temperature {config.eval.temperature:g}, top-p {config.eval.top_p:g}, at most {config.eval.max_new_tokens} "
        f"tokens. Intervals at {config.eval.confidence:.0%}, clustered by prompt.\n"
    )
    return "\n".join(lines)


def _provenance(config: Config, student: str, made: Made) -> str:
    sampling, train, adapter = config.teacher.sampling, config.train, config.student(student).adapter
    verified = "only those with a correct answer kept" if config.traces.verify else "kept whether correct or not"
    rows: Sequence[tuple[str, str]] = (
        ("teacher", f"{_named(config.teacher.path)}, fingerprint `{made.teacher_fingerprint}`"),
        ("teacher's tokenizer", f"fingerprint `{made.tokenizer_fingerprint}`" if made.tokenizer_fingerprint else ""),
        ("prompts", "; ".join(source_name(source) for source in config.prompts.train)),
        (
            "traces",
            f"{sampling.n} a prompt, temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, {verified}",
        ),
        (
            "training",
            f"{train.epochs} epochs, {train.batch_tokens} tokens a step, learning rate {train.lr:g} "
            f"({train.schedule} to {train.min_lr_ratio:g} of it), rows of {train.max_seq_tokens} tokens",
        ),
        ("also trained on", "; ".join(_beside_traces(config, student))),
        ("adapter", f"{adapter.kind} of rank {adapter.rank}, merged" if adapter else ""),
        ("command", f"`{redact_text(made.command)}`"),
        ("code", f"commit `{made.commit}`"),
        ("config", f"hash `{made.config_hash}`"),
    )
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {text} |\n" for name, text in rows if text)


def _beside_traces(config: Config, student: str) -> Iterator[str]:
    """What else the student learned from, so that nobody takes its abilities for the traces' doing."""
    train = config.train
    for each in train.trace_sets:
        yield f"traces of the run {Path(each.run).name} (weight {each.weight:g})"
    if train.general:
        names = "; ".join("bundled questions" if s.kind == "bundled" else source_name(s) for s in train.general.sources)
        how = "the base's own answers to" if train.general.loss == "kl_to_base" else "the answers in"
        yield f"{how} general data, {train.general.share:.0%} of an epoch's tokens ({names})"
    if config.student(student).loss.kind == "logits":
        for each in train.text_sets:
            yield f"conversations that the teacher read, not wrote (weight {each.weight:g}; {source_name(each.source)})"
        if train.on_policy:
            yield f"its own text, read by the teacher, in {train.on_policy.rounds} rounds"


def _usage(config: Config, name: str) -> str:
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'name = "{config.publish.repo or name}"\n'
        "tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)\n"
        'messages = [{"role": "user", "content": "What is 17 + 25?"}]\n'
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True)\n"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens="
        f"{config.eval.max_new_tokens})[0]))\n"
        "```\n\n"
        "No system prompt. generation_config.json holds the settings that the table was measured with.\n"
    )


def _license_text(config: Config, student: str, license: License) -> str:
    base = _named(config.student(student).path)
    lines = [f"`{license.identifier}`, as that of the base model {base}."]
    if license.identifier is None:
        lines = [f"The licence of the base model {base} applies; it was not stated when this card was written."]
    if license.llama_release:
        lines.append(f"Built with Llama. {notice(license)}See LICENSE and NOTICE.")
    return "\n\n".join(lines) + "\n"


def _card_license(base: str) -> str | None:
    readme = Path(base) / "README.md"
    if not readme.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8"), re.DOTALL)
    try:
        metadata = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return None
    return str(metadata["license"]) if isinstance(metadata, dict) and metadata.get("license") else None
