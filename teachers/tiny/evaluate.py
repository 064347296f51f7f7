"""Measure the bundled teacher on held-out problems and write its model card: `python -m teachers.tiny.evaluate`.

Only problems of the held-out tenth are asked, which neither the teacher nor the students were trained on. The load of
each expert is counted over the tokens of the sampled solutions.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from distill.evals.stats import clustered_mean
from distill.grade import Grader
from distill.records import Prompt, Sample, SamplingParams, Verdict
from distill.tasks import families
from distill.tasks.split import is_heldout
from distill.tokens import render_prompt, sample_requests
from teachers.engine import TeacherEngine
from teachers.tiny.train import ExpertLoad

HERE = Path(__file__).parent
PARAMS = SamplingParams(temperature=0.6, top_p=0.95, max_new_tokens=320)


def heldout_problems(per_level: int, seed: int) -> list[Prompt]:
    """Up to `per_level` different held-out problems of every family and level (small families have fewer)."""
    found: dict[str, Prompt] = {}
    for family in families.FAMILIES:
        for level in families.LEVELS:
            wanted = len(found) + per_level
            for index in range(per_level * 40):
                if len(found) == wanted:
                    break
                prompt = families.make_problem(family, level, seed, index)
                if prompt and is_heldout(prompt):
                    found.setdefault(prompt.key, prompt)
    return list(found.values())


def measure(engine: TeacherEngine, prompts: list[Prompt], k: int, seed: int) -> tuple[np.ndarray, list[Sample]]:
    """(correct_PK as 0, 1 or NaN for a grader that failed, the samples in order)."""
    requests = list(sample_requests(engine.tokenizer, prompts, k, seed))
    drawn = {(s.key, s.sample_index): s for s in tqdm(engine.sample(requests, PARAMS), total=len(requests))}
    samples = [drawn[r.key, r.sample_index] for r in requests]
    with Grader() as grader:
        items = [
            (p, engine.decode(drawn[p.key, i].completion_ids), drawn[p.key, i].finish_reason)
            for p in prompts
            for i in range(k)
        ]
        verdicts = [graded.verdict for graded in grader.grade(items)]
    right = [np.nan if v == Verdict.ERROR else float(v == Verdict.CORRECT) for v in verdicts]
    return np.array(right).reshape(len(prompts), k), samples


def expert_load(engine: TeacherEngine, prompts: list[Prompt], samples: list[Sample]) -> torch.Tensor:
    """Tokens each expert received as a multiple of its fair load, [MoE layers, experts], over whole solutions."""
    load = ExpertLoad(engine.model)
    by_key = {p.key: p for p in prompts}
    with torch.inference_mode():
        for sample in samples[:: max(1, len(samples) // 300)]:
            ids = [*render_prompt(engine.tokenizer, by_key[sample.key].text), *sample.completion_ids]
            engine.model(torch.tensor([ids], device=engine.model.device), use_cache=False)
    return load.share()


def by_family(prompts: list[Prompt], right_PK: np.ndarray) -> list[dict]:
    """pass@1 of every family and of all, with the clustered 95 % interval."""
    rows = []
    for name in (*families.FAMILIES, "all"):
        chosen = right_PK[[name in (p.family, "all") for p in prompts]]
        estimate = clustered_mean(np.nanmean(chosen, axis=1), chosen.size)
        row = {"family": name, "pass_at_1": estimate.value, "ci_low": estimate.low, "ci_high": estimate.high}
        rows.append({**row, "problems": estimate.n_problems})
    return rows


def card(training: dict, result: dict) -> str:
    """The model card of the bundled teacher: card.md with the figures of training.json and evaluation.json put in."""
    geometry = training["recipe"]["geometry"]
    rows = [
        [
            r["family"],
            f"{100 * r['pass_at_1']:.1f} %",
            f"{100 * r['ci_low']:.1f} - {100 * r['ci_high']:.1f} %",
            r["problems"],
        ]
        for r in result["families"]
    ]
    loads = [[i + 1, f"{row['least']:.2f}", f"{row['most']:.2f}"] for i, row in enumerate(result["expert_load"])]
    return (
        (HERE / "card.md")
        .read_text()
        .format(
            **geometry,
            millions=training["parameters"] / 1e6,
            corpus_millions=training["corpus_tokens"] / 1e6,
            train_minutes=training["train_s"] / 60,
            corpus_minutes=training["corpus_s"] / 60,
            train_command=training["command"],
            device=training["device"],
            steps=training["steps"],
            seed=training["seed"],
            torch=training["torch"],
            evaluate_command=result["command"],
            k=result["k"],
            temperature=PARAMS.temperature,
            top_p=PARAMS.top_p,
            mean_tokens=result["mean_tokens"],
            truncated=100 * result["truncated_share"],
            families="\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows),
            loads="\n".join("| " + " | ".join(map(str, row)) + " |" for row in loads),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-level", type=int, default=40, help="held-out problems of each family and level")
    parser.add_argument("--k", type=int, default=2, help="samples of each problem")
    parser.add_argument("--seed", type=int, default=99)
    args = parser.parse_args()
    folder = HERE / "teacher"
    engine = TeacherEngine(folder, device="cuda" if torch.cuda.is_available() else "cpu", batch_size=256)
    prompts = heldout_problems(args.per_level, args.seed)
    right_PK, samples = measure(engine, prompts, args.k, args.seed)
    load = expert_load(engine, prompts, samples)
    result = {
        "command": f"python -m teachers.tiny.evaluate --per-level {args.per_level} --k {args.k} --seed {args.seed}",
        "k": args.k,
        "families": by_family(prompts, right_PK),
        "mean_tokens": float(np.mean([len(s.completion_ids) for s in samples])),
        "truncated_share": float(np.mean([s.finish_reason == "length" for s in samples])),
        "expert_load": [{"least": row.min().item(), "most": row.max().item()} for row in load],
    }
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    training = json.loads((folder / "training.json").read_text())
    (folder / "README.md").write_text(card(training, result))
    print(f"pass@1 {result['families'][-1]['pass_at_1']:.3f}; card: {folder / 'README.md'}")


if __name__ == "__main__":
    main()
