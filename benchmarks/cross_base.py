"""The base that each student of bench_cross_tokenizer starts from, and the student it is measured against.

What a tokenizer costs is told only by two students that differ in nothing else. The Qwen-like student's twin with the
teacher's tokenizer is bundled; the Llama-like one is another architecture, so its twin is trained here from scratch,
by the same recipe.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

TINY = Path("teachers/tiny")
STUDENTS = ("same", "same_llama", "qwen", "llama")
TWIN = {"qwen": "same", "llama": "same_llama"}  # the same architecture, the teacher's tokenizer
SEED = 0


def path_of(student: str, folder: Path) -> Path:
    """Where the student's weights and tokenizer lie; `folder` is the benchmark's."""
    return folder / "student-same-llama" if student == "same_llama" else TINY / f"student-{student}"


def train_twin(folder: Path, share: float, device: str) -> None:
    """The Llama-like student with the teacher's tokenizer, if it is not there yet. share: of the recipe's text and
    steps. Some 3 minutes on an H100."""
    from teachers.tiny import corpus, train
    from teachers.tiny.recipes import RECIPES

    final = path_of("same_llama", folder)
    if final.exists():
        return
    partial = final.resolve().with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(path_of("same", folder) / name, partial / name)
    recipe = replace(RECIPES["student-llama"], folder=str(partial), tokenizer="teacher")
    data = corpus.build(recipe.style, partial, round(recipe.docs * share), SEED, os.cpu_count())
    model, curve = train.train(recipe, data, round(recipe.steps * share), SEED, device)
    train.save(model, curve, recipe, {"seed": SEED})
    partial.rename(final)


if __name__ == "__main__":
    import argparse

    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    train_twin(args.folder, 1.0, args.device)
