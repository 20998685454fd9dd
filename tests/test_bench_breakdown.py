"""`bench train --breakdown`: rows that add up to the step, bytes that can be counted by hand, gradients as they were."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.breakdown import PHASES, ROWS, Laps, Marked, breakdown, column_figures, kept_bytes, lines, wrapped
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
    # Nothing of ours is left in the models.
    assert "look_up" not in vars(column.model)
    count = len(laps.names)
    column.results()
    assert len(laps.names) == count > 0


class CountingClock:
    """A clock on which every lap takes a second."""

    warm, laps_ended = False, 0

    def start(self) -> None:
        self.laps_ended = 0

    def lap(self) -> None:
        self.laps_ended += 1

    def laps(self) -> list[float]:
        return [1.0] * self.laps_ended


@pytest.mark.parametrize(("name", "embeddings"), [("eager", 1), ("ours", 2)])
def test_every_call_has_a_lap_in_both_directions(bench, name, embeddings):
    bench.clock = CountingClock()
    seconds = Marked(bench.column(name)).run()
    L = bench.config.model.n_layer
    calls = {"embedding": embeddings, "layer_norm": 2 * L + 1, "linear": 2 * L, "causal_attention_packed": L}
    calls |= {"gelu_mlp": L, "linear_cross_entropy": 1}
    total = sum(calls.values())
    # One lap of the rest before each call and, in the forward, one after the last; in the backward one a call, since the look-up
    # is the last thing that autograd does.
    rest = {"forward rest": total + 1, "backward rest": total}
    expected = {f"{phase} {row}": count for phase in PHASES for row, count in calls.items()} | rest
    assert seconds == {**expected, "optimizer rest": 1, "step": 4 * total + 2}


@pytest.mark.parametrize("name", ["eager", "ours"])
def test_laps_add_up_to_the_step(bench, name):
    column = Marked(bench.column(name))
    column.run()
    began = time.perf_counter()
    seconds = column.run()
    assert 0 < seconds["step"] <= time.perf_counter() - began
    assert all(seconds[f"{phase} {row}"] > 0 for phase in PHASES for row in ROWS), seconds


def test_figures_are_of_the_steps_of_middling_length():
    step = [9.0, 1.0, 3.0, 2.0, 0.1]
    rows = {f"{phase} {row}": [i * s / 100 for s in step] for phase in PHASES for i, row in enumerate(ROWS)}
    figures = column_figures({**rows, "optimizer rest": [5.0, 1.0, 1.0, 4.0, 5.0], "step": step, "host": []}, 1.5)
    assert figures["steps"] == 3 and figures["step"] == pytest.approx(2000) and figures["marks"] == pytest.approx(500)
    assert figures["optimizer"] == pytest.approx(2000)
    for phase in PHASES:
        assert figures[phase] == pytest.approx({row: 20.0 * i for i, row in enumerate(ROWS)})


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
    # q, k, v, the output and one number a row; in the norms the sum and two numbers; of the other linear layers' inputs
    # the one is the attention's output, which is counted there.
    assert eager["causal_attention_packed"] == L * 4 * N * (4 * C + m.n_head)
    for kept in (eager, ours):
        assert kept["layer_norm"] == (2 * L + 1) * 4 * N * (C + 2) and kept["linear"] == L * 4 * N * C
        assert kept["embedding"] == kept["rest"] == 0
    for name, kept in (("eager", eager), ("ours", ours)):
        assert sum(kept.values()) == bench.column(name).kept_bytes()


def test_the_table_has_every_operator(bench):
    figures = breakdown(bench, ["eager", "ours"], Options(rounds=3))
    for of in figures.values():
        total = sum(of[phase][row] for phase in PHASES for row in ROWS) + of["optimizer"]
        assert total == pytest.approx(of["step"])
        assert of["kept_bytes"]["gelu_mlp"] > 0 and of["steps"] == 3
    table = lines(figures, ["ours"])
    assert [row[0] for row in table][1:] == [*ROWS, "optimizer", "step", "marks"]


def test_the_tables_cells():
    def column(forward: float, backward: float, megabytes: float, step: float) -> dict:
        phases = {"forward": dict.fromkeys(ROWS, forward), "backward": dict.fromkeys(ROWS, backward)}
        kept = {"kept_bytes": dict.fromkeys(ROWS, 1000000.0 * megabytes)}
        return {**phases, **kept, "optimizer": 0.5, "step": step, "marks": 0.25}

    table = lines({"eager": column(1.0, 2.0, 3.0, 8.0), "ours": column(0.5, 1.0, 2.5, 16.0)}, ["ours", "cuda"])
    heads = [f"{name} {what}" for name in ("eager", "ours") for what in ("fwd ms", "bwd ms", "kept MB")]
    assert table[0] == ("operator", "", *heads, "ours/eager")
    for row in table[1 : 1 + len(ROWS)]:
        assert row[1:] == ("", "1.000", "2.000", "3.00", "0.500", "1.000", "2.50", "2.00x")
    assert table[1 + len(ROWS) :] == [
        ("optimizer", "", "0.500", "", "", "0.500", "", "", "1.00x"),
        ("step", "", "8.000", "", "", "16.000", "", "", "0.50x"),
        ("marks", "", "0.250", "", "", "0.250", "", "", "-"),
    ]
