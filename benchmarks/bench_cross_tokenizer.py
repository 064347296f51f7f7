"""Does a student with another tokenizer learn as much of a cached teacher as one with the teacher's own?

    python -m benchmarks.bench_cross_tokenizer --gpus 4

The bundled teacher, its Qwen-like and its Llama-like student, and of each the twin that has the teacher's tokenizer and
is otherwise the same (cross_base); equal traces, steps and order, several seeds (other traces, another order). Methods:
ours, text alone, and others' (cross_losses). What is finished lies in --folder and is not done again. Rows, over all
seeds:

    gap_recovered/METHOD/STUDENT    (student - its base) / (teacher - its base) in pass@1; /ci_low, /ci_high: over
                                    problems (Fieller); /seedN; /seed_error: standard error of the mean over seeds
    bits_per_byte/METHOD/STUDENT    KL(teacher || student) through the alignment, on the teacher's held-out completions
    pass_at_1/METHOD/STUDENT, top1/METHOD/STUDENT; METHOD "base" is the student before training
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch

# The command's own folder must be found by worker processes too, however it was started.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cross_base import STUDENTS, TWIN, path_of, train_twin
from benchmarks.results_file import row, write
from distill.commit import commit

K = 2
EPOCHS = 2


def plan(seeds: list[int], students: list[str], methods: list[str]) -> list[tuple[str, str, int]]:
    """(student, method, seed) of every training, whole methods first; a student before training is method "base"."""
    from benchmarks.cross_train import METHODS

    return [
        (student, method, seed)
        for method in ("base", *methods)
        for seed in seeds
        for student in students
        if method in ("base", *METHODS[student])
    ]


def prepare(folder: Path, seed: int | None, share: float, k: int, device: str) -> None:
    """The traces of one seed, or (None) the teacher's evaluation."""
    from benchmarks import cross_data

    name, side = ("teacher", "eval") if seed is None else (f"seed{seed}", "train")
    if (folder / f"{name}.done.json").exists():
        return
    prompts = cross_data.problems(side, share)
    if seed is None:
        done = cross_data.sample_teacher(folder / name, prompts, k=k, seed=0, device=device, keep_wrong=True)
    else:
        done = cross_data.sample_teacher(folder / name, prompts, k=1, seed=seed, device=device, keep_wrong=False)
    (folder / f"{name}.done.json").write_text(json.dumps(done))


def measure(folder: Path, job: tuple[str, str, int], settings: dict, device: str) -> None:
    """One training and evaluation, or the evaluation of a base."""
    from benchmarks import cross_data, cross_train
    from distill.tokens import load_tokenizer
    from students.model import load_student

    student, method, seed = job
    path = folder / f"{method}-{student}-{seed}.json"
    if path.exists():
        return
    prompts = cross_data.problems("eval", settings["share"])
    eval_texts = cross_data.read_texts(folder / "teacher")[: settings["texts"]]
    if method == "base":
        model, tokenizer = load_student(str(path_of(student, folder)), packed=False)
        teacher = load_tokenizer(cross_data.TEACHER)
        found = cross_train.evaluate(
            model.to(device), tokenizer, prompts, eval_texts, teacher, k=settings["k"], seed=seed, device=device
        )
    else:
        texts = cross_data.read_texts(folder / f"seed{seed}")
        run = cross_train.Run(student, path_of(student, folder), method, seed, settings["epochs"], device)
        found = cross_train.run_one(run, texts, eval_texts, prompts, settings["k"], cross_data.TEACHER)
    found["device"] = torch.cuda.get_device_name(device) if device != "cpu" else f"cpu{os.cpu_count()}"
    path.write_text(json.dumps(found))


def _worker(devices: list[str], function, folder: Path, *arguments) -> float:
    """Runs one job on this process's device; the seconds it took."""
    began_s = time.monotonic()
    torch.set_num_threads(1)
    number = multiprocessing.current_process()._identity[0] - 1
    function(folder, *arguments, devices[number % len(devices)])
    return time.monotonic() - began_s


def run_all(first: dict[int | str | None, tuple], jobs: list[tuple], devices: list[str], folder: Path) -> None:
    """Every job (function, *arguments), one process for each entry of devices; a failed one is told of at the end.

    first: what must be done before jobs, whose second entry is (student, method, seed): by seed, by student; None
    before all.
    """
    failed, done, context = [], set(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(devices), mp_context=context) as pool:
        running = {pool.submit(_worker, devices, job[0], folder, *job[1:]): name for name, job in first.items()}
        waiting = list(jobs)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                try:
                    print(f"{name}: {future.result():.1f} s", flush=True)
                    done.add(name)
                except Exception:
                    traceback.print_exc()
                    failed.append(name)
            ready = [job for job in waiting if {None, *job[1]} & first.keys() <= done]
            waiting = [job for job in waiting if job not in ready]
            running |= {pool.submit(_worker, devices, job[0], folder, *job[1:]): job[1] for job in ready}
    if failed:
        raise SystemExit(f"failed: {failed}")


def load(folder: Path, student: str, method: str, seeds: list[int]) -> list[dict]:
    """What was measured of these seeds, as far as it is finished."""
    paths = [folder / f"{method}-{student}-{seed}.json" for seed in seeds]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def rows_of(folder: Path, seeds: list[int], students: list[str], methods: list[str]) -> list[dict]:
    """The figures of every method that all seeds are finished of; of others the finished seeds one by one."""
    from benchmarks.cross_losses import PEERS
    from benchmarks.cross_train import METHODS
    from distill.evals import stats

    teacher_PK = np.array(json.loads((folder / "teacher.done.json").read_text())["right_PK"])
    rows, gaps = [row("pass_at_1/teacher", float(teacher_PK.mean()), "share")], {}
    rows.append(row("problems", len(teacher_PK), "problems"))
    for student in students:
        base_PK = np.concatenate([np.array(r["right_PK"]) for r in load(folder, student, "base", seeds)], 1)
        for method in ("base", *(m for m in METHODS[student] if m in methods)):
            found = load(folder, student, method, seeds)
            if len(found) < len(seeds):
                print(f"{method}/{student} is not finished: run again to go on")
                rows += single_seeds(folder, student, method, seeds, teacher_PK.mean(), base_PK.mean())
                continue
            right = [np.array(each["right_PK"]) for each in found]
            rows += figures(f"{method}/{student}", found, np.concatenate(right, 1))
            if method != "base":
                gap = stats.gap_recovered(np.concatenate(right, 1), teacher_PK, base_PK)
                each = [(r.mean() - base_PK.mean()) / (teacher_PK.mean() - base_PK.mean()) for r in right]
                gaps[method, student] = float(np.mean(each)), gap, each
    for (method, student), (value, gap, each) in gaps.items():
        name = f"gap_recovered/{method}/{student}"
        peer = method in PEERS
        rows.append(row(name, value, "share of the gap", goal=goal_of(method, student, gaps), peer=peer))
        for end, at in (("ci_low", gap.low), ("ci_high", gap.high)):
            rows += [] if at is None else [row(f"{name}/{end}", at, "share of the gap")]
        rows += [row(f"{name}/seed{seed}", float(one), "share of the gap") for seed, one in zip(seeds, each)]
        if len(each) > 1:
            error = float(np.std(each, ddof=1) / len(each) ** 0.5)
            rows.append(row(f"{name}/seed_error", error, "share of the gap"))
    return rows + closest(rows)


def single_seeds(folder: Path, student: str, method: str, seeds: list[int], teacher: float, base: float) -> list[dict]:
    """The finished seeds of a method that lacks some."""
    rows = []
    for seed in seeds:
        for each in load(folder, student, method, [seed]):
            right = float(np.mean(each["right_PK"]))
            gap, bits = (right - base) / (teacher - base), each["bits_per_byte"]["value"]
            rows.append(row(f"gap_recovered/{method}/{student}/seed{seed}", float(gap), "share of the gap", peer=True))
            rows.append(row(f"bits_per_byte/{method}/{student}/seed{seed}", bits, "bits per byte", peer=True))
    return rows


def closest(rows: list[dict]) -> list[dict]:
    """For each student with another tokenizer the bits per byte of the best other method over ours."""
    value, found = {each["name"]: each["value"] for each in rows}, []
    for student in TWIN:
        names = [n for n in value if n.startswith("bits_per_byte/") and n.endswith(f"/{student}")]
        others = [value[n] for n in names if not n.startswith(("bits_per_byte/ours/", "bits_per_byte/base/"))]
        if others and (own := value.get(f"bits_per_byte/ours/{student}")):
            found.append(row(f"bits_per_byte_best_other_over_ours/{student}", min(others) / own, "times", goal="> 1"))
    return found


def goal_of(method: str, student: str, gaps: dict) -> str | None:
    """Ours: within 0.03 of its twin with the teacher's tokenizer, and above every other method."""
    if method != "ours" or student not in TWIN:
        return None
    others = [value for (m, s), (value, *_) in gaps.items() if s == student and m != "ours"]
    twin = [gaps["ours", TWIN[student]][0] - 0.03] if ("ours", TWIN[student]) in gaps else []
    return f">= {max(others + twin):.4f}" if others + twin else None


def figures(name: str, found: list[dict], right_PK: np.ndarray) -> list[dict]:
    """pass@1 with its interval, bits per byte and agreement, over seeds."""
    from distill.evals import stats

    accuracy = stats.pass_at_1(right_PK)
    rows = [row(f"pass_at_1/{name}", accuracy.value, "share")]
    rows += [row(f"pass_at_1/{name}/{end}", getattr(accuracy, end), "share") for end in ("low", "high")]
    for key, unit in (("bits_per_byte", "bits per byte"), ("top1", "share")):
        values = [each[key]["value"] for each in found]
        rows.append(row(f"{key}/{name}", float(np.mean(values)), unit))
        if len(values) > 1:
            rows.append(row(f"{key}/{name}/seed_error", float(np.std(values, ddof=1) / len(values) ** 0.5), unit))
    rows.append(row(f"covered_share/{name}", found[0]["covered_share"], "share of positions"))
    if "train_s" in found[0]:
        rows.append(row(f"train_s/{name}", float(np.mean([each["train_s"] for each in found])), "s"))
        rows.append(row(f"steps/{name}", found[0]["steps"], "steps"))
    return rows


def print_table(rows: list[dict]) -> None:
    value = {each["name"]: each["value"] for each in rows}
    print(f"\n{'method/student':18s} {'pass@1':>8s} {'gap recovered':>24s} {'bits/byte':>10s} {'top-1':>7s}")
    for name in [n.removeprefix("pass_at_1/") for n in value if n.startswith("pass_at_1/") and n.count("/") == 2]:
        if name.endswith(("/low", "/high")):
            continue
        gap = value.get(f"gap_recovered/{name}")
        ends = [value.get(f"gap_recovered/{name}/{end}", float("nan")) for end in ("ci_low", "ci_high")]
        text = "" if gap is None else f"{gap:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"
        print(f"{name:18s} {value[f'pass_at_1/{name}']:8.3f} {text:>24s} "
              f"{value[f'bits_per_byte/{name}']:10.4f} {value[f'top1/{name}']:7.4f}")  # fmt: skip


def main() -> None:
    from benchmarks.cross_losses import PEERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_cross_tokenizer"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=[*STUDENTS])
    parser.add_argument("--methods", nargs="+", default=["response", "ours", *PEERS])
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="0: the CPU")
    parser.add_argument("--per-gpu", type=int, default=4, help="trainings at a time on one of them")
    parser.add_argument("--share", type=float, default=1.0, help="of the problems")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the traces")
    parser.add_argument("--report", action="store_true", help="train nothing; the rows of what is finished")
    parser.add_argument("--texts", type=int, default=300, help="teacher completions that KL is measured on")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    devices = [f"cuda:{i}" for _ in range(args.per_gpu) for i in range(args.gpus)] or ["cpu"]
    settings = {"share": args.share, "k": K, "epochs": args.epochs, "texts": args.texts}
    first = {seed: (prepare, seed, args.share, K) for seed in (None, *args.seeds)}
    if "same_llama" in args.students:
        first["same_llama"] = (train_twin, args.share)
    jobs = [(measure, job, settings) for job in plan(args.seeds, args.students, args.methods)]
    if not args.report:
        run_all(first, jobs, devices, args.folder)
    rows = rows_of(args.folder, args.seeds, args.students, args.methods)
    print_table(rows)
    used = [each for s, method, seed in plan(args.seeds, args.students, args.methods)
            for each in load(args.folder, s, method, [seed])]  # fmt: skip
    device = " and ".join(sorted({each["device"] for each in used}))
    question = "Does a student with another tokenizer learn as much of a cached teacher as one with the teacher's own?"
    what = "cross_tokenizer" if args.epochs == EPOCHS else f"cross_tokenizer-{args.epochs}epochs"
    print(write(what, question, rows, device=f"{device}, {platform.machine()}", commit=commit()))


if __name__ == "__main__":
    main()
