"""`gptkernels bench plot`: the pictures of committed results and of a sweep, whole, and the same every time."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

from model.cli import main

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


@pytest.fixture
def drawing():
    """Only where matplotlib is: an extra of the package."""
    pytest.importorskip("matplotlib", reason="pictures need `pip install -e '.[plot]'`")


def draw(folder: Path, *files: Path) -> dict[str, bytes]:
    """The pictures by name."""
    assert main(["bench", "plot", *map(str, files), "--out", str(folder)]) == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(file: Path, result: dict, **changes) -> Path:
    """The file, with a result in it."""
    file.write_text(json.dumps({**result, **changes}))
    return file


def words_of(svg: bytes) -> str:
    """All the text of a picture, whose letters are letters."""
    return " ".join(xml.etree.ElementTree.fromstring(svg).itertext())


def test_committed_results(drawing, tmp_path):
    files = [RESULTS / "avx2-ops.json", RESULTS / "avx2-train-gpt-384.json"]
    first, again = draw(tmp_path / "a", *files), draw(tmp_path / "b", *files)
    names = {"avx2-ops-speedup", "avx2-ops-roofline", "avx2-train-gpt-384-speedup"}
    assert set(first) == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert first == again, "a picture may change only with its figures"
    assert all(first[f"{name}.png"].startswith(b"\x89PNG") for name in names)
    result = json.loads(files[0].read_text(encoding="utf-8"))
    for name in ("avx2-ops-speedup.svg", "avx2-ops-roofline.svg"):
        assert result["machine"]["commit"][:12] in words_of(first[name])
    text = words_of(first["avx2-ops-speedup.svg"])
    for case in result["cases"]:
        assert case["case"] in text and f"{case['speedup']['eager']['both']:.2f}x" in text
    assert "GFLOP/s" in words_of(first["avx2-ops-roofline.svg"])


def test_cost_against_an_axis(drawing, tmp_path):
    result = json.loads((RESULTS / "avx2-ops.json").read_text(encoding="utf-8"))
    attention = [case for case in result["cases"] if case["op"] == "attention"]
    sweep = [{**case, "axis": "T", "at": case["shape"]["T"]} for case in attention]
    pictures = draw(tmp_path / "out", written(tmp_path / "sweep.json", result, what="scaling", cases=sweep))
    assert set(pictures) == {"sweep-T.png", "sweep-T.svg"}
    text = words_of(pictures["sweep-T.svg"])
    assert "CUDA graphs" not in text
    assert "Time against T" in text and "Memory against T" in text and "attention, ours" in text and "1024" in text


def test_cost_on_a_gpu_is_that_of_graphs(drawing):
    from benchmarks.plot import against_axis

    def column(ms: float) -> dict:
        return {"both": {"ms": 7 * ms}, "graph": {"both": {"ms": ms}}}

    cases = [{"op": "softmax", "device": "cuda", "rows": ["both"], "ours": ["cuda"], "at": at} for at in (1, 2)]
    for case in cases:
        case["columns"] = {"eager": column(3.0 * case["at"]), "cuda": column(2.0 * case["at"])}
    cases[1]["columns"]["eager"]["graph"] = {"unavailable": "no memory"}
    (axes,) = against_axis(cases, "N").axes
    assert axes.get_title() == "Time against N, as CUDA graphs"
    assert [list(line.get_ydata()) for line in axes.lines] == [[3.0], [2.0, 4.0]]


def test_what_counts_as_a_loss_and_what_has_no_figures(drawing, tmp_path):
    result = json.loads((RESULTS / "avx2-train-gpt-384.json").read_text(encoding="utf-8"))
    times = {"eager": 98.5, "compile": 97.0, "reference": 300.0, "ours": 100.0}
    columns = {name: {"passed": True, "step": {"ms": ms}} for name, ms in times.items()}
    case = {**result["cases"][0], "rows": ["step"], "ours": ["ours"], "columns": columns}
    result["cases"] = [case]
    text = words_of(draw(tmp_path / "a", written(tmp_path / "a.json", result))["a-speedup.svg"])
    assert "0.97x loses" in text and text.count("loses") == 1, "the other is within the noise"
    case["columns"]["ours"] = {"passed": True, "unavailable": "no memory"}
    assert draw(tmp_path / "b", written(tmp_path / "b.json", result)) == {}


@pytest.mark.parametrize("content", ["{}", "[1]", "# Title"])
def test_a_file_that_is_no_result(drawing, tmp_path, capsys, content):
    file = tmp_path / "other.json"
    file.write_text(content)
    assert main(["bench", "plot", str(file), "--out", str(tmp_path)]) == 1
    assert "other.json must be a result of bench" in capsys.readouterr().err


def test_loss_of_runs_against_time(drawing, tmp_path):
    machine = {
        "device": "a CPU",
        "threads": 2,
        "torch": "2.13.0",
        "commit": "0123456789abcdef",
        "date": "2026-11-26T10",
    }
    runs = []
    for model, speed in (("fast", 1.0), ("reference", 2.0)):
        run = {"run": f"runs/a-{model}", "config": {"train.model": model}, "step": 20, "machine": machine}
        points = [[10, 5.0 * speed, 3.0], [20, 10.0 * speed, 2.5]]
        runs.append(written(tmp_path / f"run-{model}.json", run, evaluations=points))
    pictures = draw(tmp_path / "out", *runs)
    assert set(pictures) == {"run-fast-loss.png", "run-fast-loss.svg"}
    text = words_of(pictures["run-fast-loss.svg"])
    assert "a-fast, fast model: 2.500 after 20 steps, 10 s" in text
    assert "a-reference, reference model: 2.500 after 20 steps, 20 s" in text
    assert text.count("a CPU, 2 threads, torch 2.13.0, commit 0123456789ab, 2026-11-26") == 1


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "benchmarks.plot", raising=False)
    assert main(["bench", "plot", str(RESULTS / "avx2-ops.json"), "--out", str(tmp_path)]) == 1
    assert "pip install -e '.[plot]'" in capsys.readouterr().err
