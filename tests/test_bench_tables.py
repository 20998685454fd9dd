"""`gptkernels bench table`: what the tables say of results, and which results they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cli import check_arguments, main, make_parser
from benchmarks.gpu_table import gpu_markdown
from benchmarks.long_format import csv_text
from benchmarks.scaling import line as scaling_line
from benchmarks.tables import case_text, roof_line
from benchmarks.targets import TARGETS, markdown


def fake_case(**fields) -> dict:
    """A case in which ours is twice as fast as everybody."""
    names = ("reference", "eager", "compile", "bare gemms", "ours fp32")
    return {
        "dtype": "fp32",
        "speedup": {name: {"both": 2.0, "step": 2.0} for name in names},
        "columns": {
            "ours": {
                "step": {"matmul_roof_percent": 80.0},
                "memory": {"peak_mb": 1.0, "peak_beyond_gradients_mb": 0.5},
            },
            "eager": {"memory": {"peak_mb": 4.0, "peak_beyond_gradients_mb": 3.0}},
        },
        **fields,
    }


def result_file(cases: list[dict], quick: bool = False) -> dict:
    machine = dict.fromkeys(("cpu", "cores", "threads", "cpu_capability", "kernels", "torch", "commit", "date"), "x")
    return {"command": "bench", "machine": machine, "quick": quick, "cases": cases}


def test_table_says_met_and_not_met():
    cases = [fake_case(size="shakespeare-cpu"), fake_case(size="gpt-384"), fake_case(op="cross_entropy")]
    cases[2]["shape"] = {"N": 1024, "C": 768, "V": 50257}
    others = [
        {**result_file([fake_case(size="gpt2-width")]), **kind} for kind in ({"device": "cuda"}, {"what": "scaling"})
    ]
    check = {"command": "check", "name": "tiny", "dtype": "fp32"}
    check["rows"] = [{"quantity": "loss", "error": 1.0, "allowed": 2.0, "passed": True}]
    lines = markdown([result_file(cases), *others, check]).splitlines()
    rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("|")}
    assert all(target.work in rows for target in TARGETS)
    assert rows["shakespeare-cpu training step, fp32"].endswith("| met |")
    assert (
        "at least 1.35x torch.compile | 2x the reference, 2x best eager" in rows["shakespeare-cpu training step, fp32"]
    )
    width = rows["6 layers, 6 heads, width 384, T=256, B=8, V=65, training step, fp32"]
    assert width.endswith("| not met: of the matmul roof |")
    assert "80 % of the matmul roof" in width
    assert "not met: best eager's peak memory" in rows["linear_cross_entropy fwd+bwd, 1024x768x50257, fp32"]
    assert rows["the same, bf16"].endswith("| not measured |")
    (width_row,) = (row for work, row in rows.items() if work.startswith("GPT-2 width"))
    assert width_row.endswith("| not measured |"), "neither a GPU's figures nor a sweep's are a goal's"
    assert rows["fast against reference, tiny, fp32"].endswith("| met |")


def gpu_rows(*cases: dict, quick: bool = False) -> list[str]:
    """The lines of a GPU's table that are of these cases."""
    file = {**result_file([{**case, "dtype": "bf16"} for case in cases], quick), "device": "cuda"}
    return gpu_markdown([file]).splitlines()[2 : 2 + len(cases)]


def graph_case(**times: float) -> dict:
    """A case of which there are CUDA graphs of these milliseconds."""
    columns = {name: {"graph": {"both": {"ms": ms}}} for name, ms in times.items()}
    return {"case": "softmax N=8", "rows": ["forward", "both"], "ours": ["triton", "cuda"], "columns": columns}


def test_table_of_a_gpu():
    case = graph_case(eager=3.0, compile=1.5, triton=2.0)
    for name, megabytes in (("eager", 40.0), ("compile", 0.0), ("triton", 20.0)):
        case["columns"][name]["memory"] = {"peak_beyond_gradients_mb": megabytes}
    case["columns"]["reference"] = {}
    slow = graph_case(eager=1234.4, triton=4321.4)
    assert gpu_rows(case, slow) == [
        "| softmax N=8 | - | 3 | 1.5 | 2 | - | triton: 1.50x eager, 0.75x compile (loses) "
        "| 40 MB eager, 0 MB compile, 20 MB triton |",
        "| softmax N=8 | - | 1234 | - | 4321 | - | triton: 0.29x eager (loses) | - |",
    ]


def test_table_of_a_gpu_on_which_none_of_ours_has_a_graph():
    case = graph_case(eager=3.0)
    case["columns"]["triton"] = {"graph": {"unavailable": "OutOfMemoryError: no memory"}}
    assert gpu_rows(case) == ["| softmax N=8 | - | 3 | - | - | - | - | - |"]


@pytest.mark.parametrize(("theirs", "lost"), [(0.985, False), (0.975, True)])
def test_a_loss_is_a_loss_in_every_table(theirs, lost):
    def figures(ms: float) -> dict:
        return {"ms": ms, "ms_p20": ms, "ms_p80": ms, "gflops": 1.0, "gbps": 1.0, "runs": 1} | dict.fromkeys(
            ("matmul_roof_percent", "roofline_percent"), 1.0
        )

    columns = {
        name: {"passed": True, "both": figures(ms), "graph": {"both": figures(ms)}}
        for name, ms in (("eager", theirs), ("triton", 1.0))
    }
    case = {"case": "softmax", "dtype": "bf16", "rows": ["both"], "ours": ["triton"], "columns": columns}
    case |= {"rounds": 1, "roof": {"matmul": {}, "copy_gbps": 1.0}, "axis": "N", "at": 8}
    text = case_text(case)
    assert text.count(f"{theirs:.2f}x LOSES") == (2 if lost else 0), "launched, and as a graph"
    assert ("triton LOSES to: both of eager" in text) is lost
    assert ("LOSES" in scaling_line(case)) is lost
    assert ("(loses)" in gpu_rows(case)[0]) is lost


def test_table_reads_training_runs_and_refuses_quick_figures():
    def trained(model: str, seconds: float) -> dict:
        config = {"train.model": model}
        return {"config": config, "step": 2000, "train_seconds": seconds, "val_loss_random": 1.875, "data": "text"}

    table = markdown([trained("fast", 50.0), trained("reference", 100.0)])
    assert "1.88 validation loss measured nanoGPT's way, 0.5x the reference's time for the same steps | met |" in table
    with pytest.raises(ValueError, match="--quick"):
        markdown([result_file([], quick=True)])
    with pytest.raises(ValueError, match="--quick"):
        gpu_rows(graph_case(eager=3.0, triton=2.0), quick=True)


@pytest.mark.parametrize("content", ["[1]", "{}", "# Title", ""])
def test_a_file_that_is_no_result(tmp_path, content):
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"other.json must be JSON of bench --out, of check, or a run's result.json"):
        main(["table", str(file)])


def test_the_roof_line_names_how_far_apart_the_cores_were():
    roof = {"matmul": {"float32": {"gflops": 190.0, "layout": "A B", "size": 2048}}, "copy_gbps": 35.0}
    assert roof_line(roof) == "roof: matmul float32 190 GFLOP/s (A B, 2048^3), copy 35 GB/s"
    assert roof_line(roof | {"cores_ns": [54, 55, 331, 480]}).endswith("GB/s; cores 55 ns apart (54 to 480)")


def test_committed_csv_is_of_the_json_beside_it():
    folder = Path(__file__).parent.parent / "benchmarks/results"
    results = {path: json.loads(path.read_text()) for path in folder.glob("*.json")}
    tables = {path.with_suffix(".csv"): result for path, result in results.items() if "cases" in result}
    assert tables and tables.keys() == set(folder.glob("*.csv"))
    for path, result in tables.items():
        assert path.read_text() == csv_text(result), path


def test_operators_have_their_names_and_their_files():
    parser = make_parser()
    args = parser.parse_args(["ops", "causal_attention", "gelu_mlp", "linear_cross_entropy", "layer_norm", "mlp"])
    check_arguments(parser, args)
    assert args.names == ["attention", "mlp", "cross_entropy", "layer_norm", "mlp"]
