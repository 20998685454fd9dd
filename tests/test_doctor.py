"""`doctor`: it tells what is there, and works where nothing is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptkernels.backend import BACKENDS, cpu_library
from model import cli, doctor

ROOT = Path(doctor.__file__).parent.parent
WITHOUT_BUILD = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")


@pytest.fixture
def report(capsys):
    """The report's lines after a call."""

    def run():
        assert cli.main(["doctor"]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out.splitlines()

    return run


def row(lines, name):
    return next(line for line in lines if line.split()[:1] == [name])


def test_it_says_what_is_here(report):
    lines = report()
    assert torch.__version__ in row(lines, "torch") and torch.backends.cpu.get_cpu_capability() in row(lines, "cpu")
    for name in ("python", "gpu", "c++", "nvcc", "triton", "baseline", *BACKENDS):
        assert row(lines, name)
    assert len(lines) < 50  # one page
    if cpu_library()[0] is not None:
        assert row(lines, "layer_norm").split()[1:] == ["cpu", "cpu", "reference"] or torch.cuda.is_available()
        assert "loaded" in row(lines, cpu_library()[0])
        assert row(lines, "bf16").split()[:4] == ["bf16", "matrix", "products:", "own"]
        assert "works" in row(lines, "cpu") or any("works" in line for line in lines if line.split()[:1] == ["cpu"])


def test_a_triton_that_cannot_be_imported_is_explained(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "cannot be imported: ModuleNotFoundError" in row(report(), "triton")


def test_no_tools(report, monkeypatch):
    monkeypatch.setenv("PATH", "")
    lines = report()
    assert "not found (needed to build the cpu kernels" in row(lines, "c++") and "not found" in row(lines, "nvcc")


def test_a_failed_build_shows_its_message(report, monkeypatch, tmp_path):
    path = tmp_path / "_build.json"
    monkeypatch.setattr(doctor, "BUILD_REPORT", path)
    message = "csrc/a.cpp:1:2: error: " + "x" * 500
    names = ("_cpu_avx2", "_cuda", "_simt", "_simt_report")
    path.write_text(json.dumps({f"gptkernels.{name}": f"CompileError: {name}\n{message}" for name in names}))
    lines = report()
    for name in names:
        line = row(lines, name.removeprefix("_cpu_"))
        assert f"CompileError: {name}" in line and lines[lines.index(line) + 1].strip() == message
    path.write_text("{")
    assert "not built" in row(report(), "avx2")


def test_a_library_that_the_last_build_left_out_is_no_missing_one(report, monkeypatch, tmp_path):
    path = tmp_path / "_build.json"
    monkeypatch.setattr(doctor, "BUILD_REPORT", path)
    path.write_text(json.dumps({"gptkernels._cpu_baseline": "built", "gptkernels._simt": "built"}))
    (tmp_path / "_cpu_avx2.so").touch()
    lines = report()
    assert "of an earlier build (in the last one: left out)" in row(lines, "avx2")
    assert "built, but _cpu_baseline.so is no longer there" in row(lines, "baseline")
    assert "not built" in row(lines, "avx512")
    path.write_text(json.dumps({"gptkernels._cpu_avx2": "CompileError: no"}))
    assert "of an earlier build (in the last one: CompileError: no)" in row(report(), "avx2")


def test_a_build_that_fails_is_explained(tmp_path):
    """setup.py on sources of which all but one are wrong: the compiler's own words, with the file, are in the report."""
    for name in ("gptkernels", "model"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=WITHOUT_BUILD)
    shutil.copy(ROOT / "setup.py", tmp_path)
    for name in ("one/one_cpu.cpp", "simt/engine.cpp", "simt/python.cpp", "simt/report.cpp"):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name.endswith("report.cpp") else f'#error "planted in {name}"\n')
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "GPTKERNELS_BUILD_ISAS": "baseline"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "planted" in done.stdout + done.stderr  # shown while building, too
    command = [sys.executable, "-m", "model", "doctor"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    files = {"baseline": "one/one_cpu.cpp", "_simt": "simt/engine.cpp", "_simt_report": "simt/python.cpp"}
    for name, file in files.items():
        start = lines.index(row(lines, name))
        (message,) = [line.strip() for line in lines[start + 1 : start + 5] if f'"planted in {file}"' in line]
        assert message.startswith(f"csrc/{file}:1:2: error: ")


def test_a_reason_names_the_remedy(report):
    if torch.version.cuda is None:  # it is the end of the message
        assert any(line.endswith("use backend='triton' meanwhile") for line in report())
    x = {torch.float16: torch.empty(0, 64, dtype=torch.float16)}
    if cpu_library()[0] is not None:
        assert "convert, or use backend='reference'" in doctor.explain("cpu", x)
    assert doctor.explain("reference", x) == "works"


def test_it_works_where_nothing_was_built(tmp_path):
    """A copy of the sources alone, in a process of its own: the table has the reference, and the remedy is told."""
    for name in ("gptkernels", "model"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=WITHOUT_BUILD)
    command = [sys.executable, "-m", "model", "doctor"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert "not built" in row(lines, "baseline")
    assert "pip install -e ." in done.stdout
    if not torch.cuda.is_available():
        assert row(lines, "gelu_mlp").split()[1:] == ["reference"] * 3
