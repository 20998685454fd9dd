"""What a run shows and writes: the bar, the step line, metrics.csv, the counted work."""

import io

import pytest

from model import report
from model.config import ModelConfig, resolve
from model.progress import Progress, bar_line
from model.run_files import Metrics, read_metrics
from model.throughput import flops_a_token, named_peak


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


ROW = {"step": 50, "loss": 1.72, "lr": 1e-3, "grad_norm": 0.84}
FIGURES = report.step_figures(ROW, 200, 38.0, 16384, 3 << 30, 0.312)


def test_the_step_line_elsewhere():
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.update(FIGURES, 0.25, keep=True)
    progress.update(FIGURES, 0.26, keep=False)
    progress.note("note")
    line = "step 50/200 25% | loss 1.7200 | lr 1.0e-03 | gnorm 0.84 | 38.0 ms | 431k tok/s | MFU 31.2% | 3.0 GiB | eta 5.7s"
    assert stream.getvalue() == f"{line}\nnote\n"


def test_backends_that_are_slow_here_are_called_so():
    backends = {"linear": "cpu", "gelu_mlp": "simt", "layer_norm": "triton", "causal_attention": "cpu"}
    assert report.describe_backends(backends, "cpu").split("; ") == [
        "cpu (linear, causal_attention)",
        "simt (emulated, slow: gelu_mlp)",
        "triton (interpreted, slow: layer_norm)",
    ]
    assert report.describe_backends({"linear": "triton"}, "cuda") == "triton (linear)"


def test_the_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    stream = Terminal()
    progress = Progress(stream=stream)
    progress.update(FIGURES, 0.25, keep=False)
    progress.update(FIGURES, 0.26, keep=True)  # too soon to be drawn again
    assert stream.getvalue() == "\r\x1b[K" + "█" * 6 + "░" * 18 + " " + " | ".join(FIGURES.values())
    progress.note("note")
    assert stream.getvalue().endswith("\r\x1b[Knote\n")


@pytest.mark.parametrize("width", [10, 30, 60, 79, 100, 200])
def test_the_bar_never_wraps(width):
    line = bar_line(FIGURES, 0.5, width, unicode=False)
    assert len(line) <= width and ("step 50" in line or width == 10)
    assert ("#." in line) == (width >= 60) and ("gnorm" in line) == (width >= 200)


def test_metrics_survive_reopening(tmp_path):
    path = tmp_path / "metrics.csv"
    for last, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        metrics = Metrics(tmp_path, last)
        for step in steps:
            metrics.write({"step": step, "loss": step / 7 + last})
        metrics.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [
        ("1", "0.142857"), ("2", "0.285714"), ("3", "2.42857"), ("4", "2.57143")
    ]  # fmt: skip


def test_flops_a_token_by_hand():
    chosen, _ = resolve("tiny", ["vocab_size=10"])
    m = ModelConfig(vocab_size=10, context=16, n_layer=2, n_head=2, n_embd=32)
    assert chosen.model == m
    products = 6 * (2 * 12 * 32 * 32 + 32 * 10) + 2 * 3.5 * 2 * 16 * 32
    assert products < flops_a_token(chosen) < 1.05 * products


def test_flops_a_token_are_the_fields_within_a_percent():
    """6 N + 6 L C T for GPT-2's smallest model, N without the positions."""
    chosen, _ = resolve("gpt2-124m")
    weights = 12 * 12 * 768 * 768 + 768 * 50304
    assert flops_a_token(chosen) == pytest.approx(6 * weights + 6 * 12 * 768 * 1024, rel=0.02)


@pytest.mark.parametrize("name,dtype,tf32,peak", [
    ("NVIDIA H100 80GB HBM3", "bf16", False, 989e12),
    ("NVIDIA H100 PCIe", "fp16", False, 756e12),
    ("NVIDIA H200", "fp32", True, 494e12),
    ("NVIDIA A100-SXM4-40GB", "fp32", False, 19.5e12),
    ("NVIDIA L4", "bf16", True, 121e12),
    ("NVIDIA L40", "bf16", True, None),
    ("NVIDIA GeForce RTX 4090", "bf16", False, 165.2e12),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", False, None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", False, None),
    ("Some CPU", "fp32", False, None),
])  # fmt: skip
def test_the_peak_is_the_devices_own(name, dtype, tf32, peak):
    assert named_peak(name, dtype, tf32) == peak
