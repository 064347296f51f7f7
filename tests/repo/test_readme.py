"""What the READMEs tell a reader to type and to look at is there and is accepted.

Commands are taken from code blocks and from inline code. A run command is parsed by the program's own parser and its
config is loaded with the overrides shown; of other modules each option must be one that they have.
"""

import ast
import re
import shlex
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from distill.config import load_config
from distill.run import parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    path
    for path in (ROOT / "README.md", ROOT / "configs" / "README.md", ROOT / "benchmarks" / "README.md")
    if path.exists()
]
LAUNCHER = {
    "--num_accelerators": 1, "--num_gpus": 1, "--num_nodes": 1, "--master_port": 1, "--master_addr": 1,
    "--hostfile": 1, "--include": 1, "--exclude": 1, "--launcher": 1, "--no_ssh": 0, "--node_rank": 1,
}  # fmt: skip
STARTS = ("python ", ".venv/bin/python ", "deepspeed ", ".venv/bin/deepspeed ", "make ", "pip ", "git ", "torchrun ")


def commands(page: Path) -> list[str]:
    """Every command line of a page, without prompt, comment, continuation and variables set before it."""
    text = page.read_text()
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```[^\n]*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks += ["\n".join(re.findall(r"^(?: {4}|\t)(.*)$", rest, re.MULTILINE))]
    blocks += re.findall(r"`([^`\n]+)`", rest)
    found = []
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"^\$\s+", "", line.strip())
            line = re.sub(r"^(?:[A-Z_][A-Z0-9_]*=\S+\s+)+", "", line)
            if line.startswith(STARTS) and "..." not in line:
                found.append(line)
    return list(dict.fromkeys(found))


CASES = [(page.relative_to(ROOT), command) for page in PAGES for command in commands(page)]


def words(command: str) -> list[str]:
    parts = shlex.split(command, comments=True)
    for mark in ("&&", "||", "|", ";", ">", "2>&1", "&"):
        parts = parts[: parts.index(mark)] if mark in parts else parts
    return parts


def after_launcher(parts: list[str]) -> list[str]:
    """The script and its arguments of `deepspeed [launcher options] script ...`; an unknown launcher option fails."""
    rest = parts[1:]
    while rest and rest[0].startswith("-"):
        name, _, value = rest[0].partition("=")
        assert name in LAUNCHER, f"{name} is not an option of the launcher that we know"
        rest = rest[1 if value else 1 + LAUNCHER[name] :]
    return rest


def check_run(arguments: list[str]) -> None:
    try:
        args = parse(arguments)
    except SystemExit as end:  # --help ends with 0, a wrong command line with 2
        assert end.code == 0, f"the program refuses {arguments}"
        return
    if args.config and not re.search(r"[A-Z<>]{3,}", Path(args.config).name):
        load_config(ROOT / args.config, args.set)


@cache
def options(module: str) -> set[str]:
    """The options that a module's parser adds, read from its source and from that of what it imports here."""
    source = Path(find_spec(module).origin).read_text()
    names = {
        argument.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
        for argument in node.args
        if isinstance(argument, ast.Constant)
    }
    return names | {"--help", "-h"}


def check_module(module: str, arguments: list[str]) -> None:
    if module in ("pytest", "venv", "pip", "ruff"):
        return
    assert find_spec(module), f"there is no module {module}"
    assert "__main__" in Path(find_spec(module).origin).read_text(), f"{module} is not a command"
    if module == "distill.run":
        return check_run(arguments)
    unknown = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    assert [name for name in unknown if name not in options(module)] == []


def test_the_pages_hold_commands():
    assert any(page.name == "README.md" and page.parent == ROOT / "configs" for page in PAGES)
    assert len(CASES) >= 4


@pytest.mark.parametrize(("page", "command"), CASES, ids=[f"{page}: {command}" for page, command in CASES])
def test_a_command_of_a_page_is_accepted(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    parts = words(command)
    program = Path(parts[0]).name
    if program == "make":
        rules = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [each for each in parts[1:] if "=" not in each and each not in rules] == []
    elif program == "deepspeed":
        script, *arguments = after_launcher(parts)
        assert (ROOT / script).is_file(), f"there is no {script}"
        if script == "distill/run.py":
            check_run(arguments)
    elif program.startswith("python"):
        if parts[1] == "-m":
            check_module(parts[2], parts[3:])
        elif not parts[1].startswith("-"):
            assert (ROOT / parts[1]).is_file(), f"there is no {parts[1]}"
            check_run(parts[2:]) if parts[1] == "distill/run.py" else None
    elif program == "pip" and "-e" in parts:
        extras = re.search(r"\[(.*)\]", parts[parts.index("-e") + 1])
        known = re.findall(r"^(\w[\w-]*) =$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
        assert not extras or set(extras[1].split(",")) <= set(known)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_shows_or_links_exists(page):
    text = re.sub(r"^```[^\n]*\n.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)", text) + re.findall(
        r"<(?:img|source)[^>]+src=\"([^\"]+)\"", text
    )
    local = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_of_the_tree_that_a_page_names_exists(page):
    """Inline code that looks like a path below one of the tree's folders."""
    top = "distill|teachers|students|configs|tests|benchmarks"
    named = set(re.findall(rf"`((?:{top})/[\w./-]+)`", page.read_text()))
    absent = [name for name in named if not (ROOT / name).exists() and not re.search(r"[A-Z]{3,}", name)]
    assert absent == []
