"""`gptkernels bench table`: what the tables say of results, and which results they refuse."""

from __future__ import annotations

import pytest

from benchmarks.gpu_table import gpu_markdown
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


def test_table_of_a_gpu():
    def column(ms: float, megabytes: float) -> dict:
        return {"graph": {"both": {"ms": ms}}, "memory": {"peak_beyond_gradients_mb": megabytes}}

    columns = {"reference": {}, "eager": column(3.0, 40.0), "compile": column(1.5, 30.0), "triton": column(2.0, 20.0)}
    case = {"case": "softmax N=8", "rows": ["forward", "both"], "ours": ["triton", "cuda"], "columns": columns}
    table = gpu_markdown([{**result_file([{**case, "dtype": "bf16"}]), "device": "cuda"}])
    row = next(line for line in table.splitlines() if line.startswith("| softmax"))
    assert row == (
        "| softmax N=8 | - | 3 | 1.5 | 2 | - | triton: 1.50x eager, 0.75x compile (loses) "
        "| 40 MB eager, 30 MB compile, 20 MB triton |"
    )


def test_table_reads_training_runs_and_refuses_quick_figures():
    def trained(model: str, seconds: float) -> dict:
        config = {"train.model": model}
        return {"config": config, "step": 2000, "train_seconds": seconds, "val_loss_random": 1.875, "data": "text"}

    table = markdown([trained("fast", 50.0), trained("reference", 100.0)])
    assert "1.88 validation loss measured nanoGPT's way, 0.5x the reference's time for the same steps | met |" in table
    with pytest.raises(ValueError, match="--quick"):
        markdown([result_file([], quick=True)])
