"""`bench train --breakdown`: rows that add up to the step, bytes that can be counted by hand, gradients as they were."""

from __future__ import annotations

import pytest
import torch

from benchmarks.breakdown import OPERATORS, PHASES, ROWS, Laps, Marked, breakdown, kept_bytes, lines, wrapped
from benchmarks.device import WARM
from benchmarks.options import Options
from benchmarks.train_step import TrainBench, train_config


@pytest.fixture
def bench(threads):
    """The smallest preset's training step."""
    torch.set_num_threads(1)
    return TrainBench(train_config("tiny"), "fp32", "auto")


@pytest.mark.parametrize("name", ["eager", "ours"])
def test_marks_change_no_bit(bench, name):
    column = bench.column(name)
    plain = column.results()
    laps = Laps(lambda: None)
    with wrapped([column.model], laps.around):
        marked = column.results()
    assert all(torch.equal(plain[key], marked[key]) for key in plain)
    # Every operator has a lap in both directions, and nothing of ours is left in the models.
    assert {f"{phase} {row}" for phase in ("forward",) for row in ROWS} <= set(laps.names)
    assert "look_up" not in vars(column.model)


@pytest.mark.parametrize("name", ["eager", "ours"])
def test_laps_add_up_to_the_step(bench, name):
    seconds = Marked(bench.column(name)).run()
    assert seconds["step"] == pytest.approx(sum(s for row, s in seconds.items() if row != "step"))
    assert all(seconds[f"{phase} {row}"] > 0 for phase in PHASES for row in ROWS), seconds


def test_a_marked_step_is_warmed_up_too(threads, monkeypatch):
    torch.set_num_threads(1)
    column = TrainBench(train_config("tiny"), "fp32", "auto", cache=WARM).column("eager")
    steps = []
    monkeypatch.setattr(column, "optimize", lambda optimize=column.optimize: steps.append(optimize()))
    seconds = Marked(column).run()
    assert len(steps) == 2 and seconds["step"] > 0, "one untimed step and one timed"


def test_kept_bytes_by_hand(bench):
    m, N = bench.config.model, bench.config.train.batch * bench.config.model.context
    L, C, F, V = m.n_layer, m.n_embd, 4 * m.n_embd, m.vocab_size
    eager, ours = kept_bytes(bench.column("eager")), kept_bytes(bench.column("ours"))
    # The MLP's input and pre-activation; eager keeps the activation too.
    assert ours["gelu_mlp"] == L * 4 * N * (C + F)
    assert eager["gelu_mlp"] == L * 4 * N * (C + 2 * F)
    # x, the log-softmax of the logits and one number, against x and the gradients of both factors.
    assert eager["linear_cross_entropy"] == 4 * N * (C + V) + 4
    assert ours["linear_cross_entropy"] == 4 * N * C + 4 * (N * C + V * C)
    assert ours["rest"] == eager["rest"] == 0


def test_the_table_has_every_operator(bench):
    figures = breakdown(bench, ["eager", "ours"], Options(rounds=3))
    for of in figures.values():
        total = sum(of[phase][row] for phase in PHASES for row in ROWS) + of["optimizer"]
        assert total == pytest.approx(of["step"])
    table = lines(figures, ["ours"])
    assert [row[0] for row in table][1:] == [*ROWS, "optimizer", "step", "marks"]
    assert set(OPERATORS) < set(ROWS) and len({len(row) for row in table}) == 1
