"""What a run shows and writes: the bar, the step line, metrics.csv, the counted work."""

import io

import pytest

from model import report
from model.config import ModelConfig, resolve
from model.progress import Progress, bar_line
from model.run_files import Metrics, read_metrics


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


FIGURES = report.step_figures({"step": 50, "loss": 1.72, "lr": 1e-3, "grad_norm": 0.84}, 200, 38.0, 16384, 3 << 30)


def test_the_step_line_elsewhere():
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.update(FIGURES, 0.25, keep=True)
    progress.update(FIGURES, 0.26, keep=False)
    progress.note("note")
    line = "step 50/200 25% | loss 1.7200 | lr 1.0e-03 | gnorm 0.84 | 38.0 ms | 431k tok/s | 3.0 GiB | eta 5.7s"
    assert stream.getvalue() == f"{line}\nnote\n"


def test_the_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
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
        metrics = Metrics(path, last)
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
    assert products < report.flops_a_token(chosen) < 1.05 * products
