"""`bench train --breakdown`: where the time of a training step goes, and what each operator keeps for the backward.

A step is one row of laps: at the beginning and the end of every operator call a lap ends, in the forward where the call is
made, in the backward by identities around the call whose own backward ends the lap. So the laps of a step add up to the
step, and what lies between the calls is a row of its own, `rest`: residual adds that no norm takes, views, the sums and
copies of autograd, Python. The identities cost time as well, which is part of these rows: `marks` is by how much a step with
them is longer than the median of those without.

What is kept for the backward is counted in a forward without a clock (benchmarks/kept.py), once each, at the first operator
that keeps it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks import best_eager
from benchmarks.device import warm_up
from benchmarks.harness import Times, timed_rounds
from benchmarks.kept import Kept
from model import fast

if TYPE_CHECKING:
    from benchmarks.options import Options
    from benchmarks.train_step import TrainBench, TrainColumn

OPERATORS = ("layer_norm", "linear", "causal_attention_packed", "gelu_mlp", "linear_cross_entropy")
# Methods of the two models that are no operators of ours, under the name that they have here.
EMBEDDING, METHODS = "embedding", ("look_up", "add_positions")
REST, OPTIMIZER, MARKS = "rest", "optimizer", "marks"
ROWS = (EMBEDDING, *OPERATORS, REST)
PHASES = ("forward", "backward")

Operator = Callable[..., Any]


class Mark(torch.autograd.Function):
    """Tensors as they are; their gradients too, after a call of `act`."""

    @staticmethod
    def forward(ctx: Any, act: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.act = act
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.act()
        return None, *gradients


def marked(act: Callable[[], None], values: Sequence[Any], wanted: Callable[[Any], bool]) -> list[Any]:
    """The values, those that are wanted through one Mark: its backward comes when all their gradients are there."""
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor) and wanted(value)]
    result = list(values)
    if places and torch.is_grad_enabled():
        for i, value in zip(places, Mark.apply(act, *(values[i] for i in places)), strict=True):
            result[i] = value
    return result


class Laps:
    """Ends a lap of the clock at both ends of every operator call, in the forward and in the backward."""

    def __init__(self, lap: Callable[[], None]) -> None:
        self.lap = lap
        self.names: list[str] = []
        self.current, self.phase = REST, "forward"

    def go_on_as(self, name: str) -> None:
        """The lap that ends belongs to what has run, the next one to `name`."""
        self.lap()
        self.names.append(f"{self.phase} {self.current}")
        self.current = name

    def around(self, name: str, operator: Operator) -> Operator:
        """The operator with its laps."""

        def call(*args: Any, **kwargs: Any) -> Any:
            values = marked(lambda: self.go_on_as(REST), (*args, *kwargs.values()), lambda t: t.requires_grad)
            given = dict(zip(kwargs, values[len(args) :], strict=True))
            self.go_on_as(name)
            result = operator(*values[: len(args)], **given)
            self.go_on_as(REST)
            outputs = result if isinstance(result, tuple) else (result,)
            # The head's own weight, which the look-up hands on, is no result of a call.
            outputs = tuple(marked(lambda: self.go_on_as(name), outputs, lambda t: t.grad_fn is not None))
            return outputs if isinstance(result, tuple) else outputs[0]

        return call


@contextmanager
def wrapped(models: Iterable[nn.Module], around: Callable[[str, Operator], Operator]) -> Iterator[None]:
    """While open, the operators of both models are what `around` makes of them, and the models' look-ups too."""
    before = [(module, name, getattr(module, name)) for module in (best_eager, fast) for name in OPERATORS]
    methods = [(model, name) for model in models for name in METHODS if hasattr(model, name)]
    try:
        for module, name, operator in before:
            setattr(module, name, around(name, operator))
        for model, name in methods:
            setattr(model, name, around(EMBEDDING, getattr(model, name)))
        yield
    finally:
        for module, name, operator in before:
            setattr(module, name, operator)
        for model, name in methods:
            delattr(model, name)


class Marked:
    """A column whose run gives the seconds of each operator in each phase."""

    def __init__(self, column: TrainColumn) -> None:
        self.name, self.column = column.name, column

    def run(self) -> dict[str, float]:
        """Seconds by phase and operator, of the optimizer and of the whole step."""
        clock = self.column.bench.clock
        warm_up(clock, self.column.stages())
        laps = Laps(clock.lap)
        with wrapped([self.column.model], laps.around):
            clock.start()
            self.column.forward()
            laps.go_on_as(REST)
            laps.phase = "backward"
            self.column.backward()
            laps.go_on_as(REST)
            laps.phase = OPTIMIZER
            self.column.optimize()
            laps.go_on_as(REST)
        seconds: dict[str, float] = dict.fromkeys((f"{phase} {row}" for phase in PHASES for row in ROWS), 0.0)
        for name, lap in zip(laps.names, clock.laps(), strict=True):
            seconds[name] = seconds.get(name, 0.0) + lap
        return {**seconds, "step": sum(seconds.values())}


def kept_bytes(column: TrainColumn) -> dict[str, int]:
    """Bytes kept for the backward by each operator of a forward."""
    kept = Kept([*column.bench.weights.parameters(), *column.bench.batches[0]])
    found = dict.fromkeys(ROWS, 0)

    def around(name: str, operator: Operator) -> Operator:
        def call(*args: Any, **kwargs: Any) -> Any:
            # What has been kept since the last call and before this one belongs to neither.
            found[REST] += kept.add(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            result = operator(*args, **kwargs)
            found[name] += kept.add(result if isinstance(result, tuple) else (result,))
            return result

        return call

    with wrapped([column.model], around):
        column.forward()
    assert column.value is not None
    found[REST] += kept.add([column.value])
    column.clear()
    return found


def breakdown(bench: TrainBench, names: Sequence[str], options: Options) -> dict[str, dict[str, object]]:
    """By column: milliseconds and bytes of each operator, and of the step that they add up to."""
    columns = [bench.column(name) for name in names]
    share = options.budget / max(1, 2 * len(columns))
    times = timed_rounds([Marked(column) for column in columns], [], options.rounds, share, {})
    without = timed_rounds(columns, [], options.rounds, share, {})
    return {
        column.name: column_figures(times[column.name], statistics.median(without[column.name]["step"]))
        | {"kept_bytes": kept_bytes(column)}
        for column in columns
    }


def column_figures(times: Times, step_without: float) -> dict[str, object]:
    """Mean milliseconds over the steps of middling length: means add up, and no disturbed step is among them."""
    steps = times["step"]
    cut = len(steps) // 5
    middle = sorted(range(len(steps)), key=steps.__getitem__)[cut : len(steps) - cut]
    mean = {
        name: 1e3 * statistics.fmean(seconds[i] for i in middle) for name, seconds in times.items() if name != "host"
    }
    return {
        "steps": len(middle),
        **{phase: {row: mean[f"{phase} {row}"] for row in ROWS} for phase in PHASES},
        OPTIMIZER: mean[f"{OPTIMIZER} {REST}"],
        "step": mean["step"],
        MARKS: mean["step"] - 1e3 * step_without,
    }


def lines(figures: dict[str, dict], ours: Sequence[str]) -> list[tuple[str, ...]]:
    """The table's cells: a row an operator, three cells a column, and how many times faster ours is."""
    ours = [name for name in ours if name in figures and "eager" in figures]
    head = [f"{name} {what}" for name in figures for what in ("fwd ms", "bwd ms", "kept MB")]
    result = [("operator", "", *head, *(f"{name}/eager" for name in ours))]

    def both(name: str, row: str) -> float:
        return sum(figures[name][phase][row] for phase in PHASES)

    for row in ROWS:
        cells = [
            cell
            for of in figures.values()
            for cell in (*(f"{of[phase][row]:.3f}" for phase in PHASES), f"{of['kept_bytes'][row] / 1e6:.2f}")
        ]
        ratios = (f"{both('eager', row) / both(name, row):.2f}x" if both(name, row) else "-" for name in ours)
        result.append((row, "", *cells, *ratios))
    for key in (OPTIMIZER, "step", MARKS):
        cells = [cell for of in figures.values() for cell in (f"{of[key]:.3f}", "", "")]
        ratios = (f"{figures['eager'][key] / figures[name][key]:.2f}x" if key != MARKS else "-" for name in ours)
        result.append((key, "", *cells, *ratios))
    return result
