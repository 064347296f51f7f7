"""The shape of the tree: short files, empty packages, no code that loads code, the import rule, nothing private."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("distill", "teachers", "students", "benchmarks")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PRODUCT = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".cfg", ".txt", ".json", ".jinja", ""}
MAX_LINES = 400

# A call by one of these names runs text or bytes as code; `torch.load` and `yaml.load` do so by default or on request.
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
UNSAFE_LOADERS = {
    ("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("torch", "load"), ("joblib", "load"),
    ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("marshal", "loads"), ("shelve", "open"),
}  # fmt: skip


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_sources_to_judge():
    assert len(SOURCES) > 50 and all(any(named(p).startswith(package) for p in SOURCES) for package in PACKAGES)


def test_no_source_file_is_longer_than_a_sitting():
    lengths = {named(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name == "__init__.py"], ids=named)
def test_a_package_file_holds_its_docstring_and_nothing_else(path):
    (statement,) = ast.parse(path.read_text()).body
    assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    assert isinstance(statement.value.value, str) and statement.value.value.strip()


def test_every_module_says_what_it_is():
    silent = [named(path) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def unsafe(tree: ast.AST) -> list[str]:
    """What in a module could run code that came with data: "line: call"."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "shelve", "dill", "cloudpickle"):
            found.append(f"{node.lineno}: from {node.module} import")
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in RUNS_CODE:
            found.append(f"{node.lineno}: {function.id}()")
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            called = (function.value.id, function.attr)
            if called in UNSAFE_LOADERS:
                found.append(f"{node.lineno}: {'.'.join(called)}()")
        for keyword in node.keywords:
            constant = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg == "trust_remote_code" and constant is not False:
                found.append(f"{node.lineno}: trust_remote_code")
            if keyword.arg == "weights_only" and constant is not True:
                found.append(f"{node.lineno}: weights_only")
            if keyword.arg in ("shell", "allow_pickle") and constant is not False:
                found.append(f"{node.lineno}: {keyword.arg}")
    return found


@pytest.mark.parametrize(
    "code",
    ["eval('1')", "exec(x)", "pickle.loads(b)", "torch.load(p)", "yaml.load(f)", "f(trust_remote_code=True)",
     "f(trust_remote_code=flag)", "np.load(p, allow_pickle=True)", "run(c, shell=True)", "from pickle import load"],
)  # fmt: skip
def test_the_search_for_unsafe_code_finds_it(code):
    assert len(unsafe(ast.parse(code))) == 1


def test_no_code_of_the_product_runs_code_that_came_with_data():
    assert unsafe(ast.parse("model.eval(); yaml.safe_load(f); f(trust_remote_code=False); pickle.dumps(x)")) == []
    found = {named(path): unsafe(ast.parse(path.read_text())) for path in SOURCES}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_the_import_rule_is_kept():
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    kept = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert kept.returncode == 0 and "0 broken" in kept.stdout, kept.stdout + kept.stderr


def test_nothing_names_the_machine_or_the_project_it_was_written_on():
    """Paths of one machine and references that mean nothing to a reader of this tree."""
    private = re.compile(r"/work/|/tmp/w\b|/root/|/home/\w+/|\b[Ii]ssue #?\d|DESIGN\.md|FACTS\.md|CONTRACT\.md")
    found = []
    for name in PRODUCT:
        path = ROOT / name
        if not name or name.startswith("tests/") or path.suffix not in TEXT or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            found += [f"{name}:{number}: {match[0]}" for match in private.finditer(line)]
    assert found == []


def test_no_file_in_the_tree_is_large_or_a_pickle():
    paths = [ROOT / name for name in PRODUCT if name and (ROOT / name).is_file()]
    assert [named(p) for p in paths if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pyc")] == []
    assert [named(p) for p in paths if p.stat().st_size > 32_000_000] == []
    teacher = sum(p.stat().st_size for p in (ROOT / "teachers/tiny/teacher").iterdir())
    assert teacher < 36_000_000
