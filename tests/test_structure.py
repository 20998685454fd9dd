"""Which part may import which (CONTRIBUTING.md): read from the sources, imports within functions too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imports(path):
    """(module, name) of everything that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module, alias.name) for alias in node.names}
    return found


def importers(folder, package):
    """The files of a folder that import a package."""
    files = (ROOT / folder).rglob("*.py")
    return {path.name for path in files if any(module.split(".")[0] == package for module, _ in imports(path))}


@pytest.mark.parametrize("package", ["model", "benchmarks", "tests"])
def test_the_library_stands_alone(package):
    assert importers("gptkernels", package) == set()


def test_benchmarks_are_imported_by_their_commands_and_their_tests():
    assert importers("model", "benchmarks") == {"cli.py", "demo.py"}
    others = {n for n in importers("tests", "benchmarks") if not n.startswith("test_bench") and n != "test_demo.py"}
    assert others == set()
    modules = {path.stem for path in (ROOT / "tests").glob("*.py")}
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert not {module for module, _ in imports(path)} & modules, path


def test_the_references_import_torch():
    """And the model's its settings: an oracle that shared code with what it judges would be none."""
    ours = {(module, name) for module, name in imports(ROOT / "model/reference.py") if module.startswith("model")}
    assert ours == {("model.config", "ModelConfig")}
    for path in [ROOT / "model/reference.py", *(ROOT / "gptkernels/ops").glob("*/reference.py")]:
        tops = {module.split(".")[0] for module, _ in imports(path)}
        assert tops <= {"__future__", "math", "torch", "model"}, path


def test_implementations_import_no_other():
    names = {"native", "triton", "cuda", "reference"}
    for path in (ROOT / "gptkernels/ops").glob("*/*.py"):
        if path.stem.split("_")[0] in names:
            parts = {(module.split(".")[-1], name) for module, name in imports(path) if module.startswith("gptkernels")}
            others = {word for pair in parts for word in pair} & names - {path.stem.split("_")[0]}
            assert others == set(), path
