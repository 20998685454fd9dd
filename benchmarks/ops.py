"""`bench ops`: every operator's columns, gated, timed and weighed at each of its shapes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import bench_attention, bench_cross_entropy, bench_layer_norm, bench_linear, bench_mlp
from benchmarks.compiler import UNAVAILABLE_ERRORS, compiled, reason
from benchmarks.harness import Column, figures, progress, speedups, timed_rounds
from benchmarks.machine import roof_columns, roof_figures
from benchmarks.memory import measured_in_subprocess
from benchmarks.op import DTYPES, Op, OpColumn, Outputs, Shape, as_tuple, output_gradients
from benchmarks.options import Options
from model.equivalence import Row, compare

ROWS = ("forward", "backward", "both")
# kernels.md's rule: twice the plain error for what comes out, three times for gradients.
OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
OPS = {
    module.OP.name: module.OP
    for module in (bench_attention, bench_layer_norm, bench_mlp, bench_linear, bench_cross_entropy)
}


@dataclass(frozen=True)
class OpData:
    """Inputs and output gradients of one case."""

    inputs: tuple[Tensor, ...]
    doutputs: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> OpData:
        """The very same values in another dtype, as leaves of their own."""

        def cast(x: Tensor) -> Tensor:
            return x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x

        return OpData(tuple(map(cast, self.inputs)), tuple(dy.to(dtype) for dy in self.doutputs))

    def gradient_bytes(self) -> int:
        """Bytes of the gradients of all inputs."""
        return sum(x.numel() * x.element_size() for x in self.inputs if x.requires_grad)


def op_data(op: Op, shape: Shape, dtype: torch.dtype) -> OpData:
    """Seeded inputs; the outputs' shapes come from the meta device, so that nothing is computed for them."""
    inputs = op.inputs(shape, dtype)
    outputs = as_tuple(op.eager(*(x.detach().to("meta") for x in inputs)))
    return OpData(inputs, output_gradients(outputs))


def op_column(op: Op, name: str, data: OpData, backend: str) -> Column:
    """One column by its name."""
    functions = {"reference": op.reference, "eager": op.eager}
    if name == "compile":
        return OpColumn(name, compiled(op.eager), data.inputs, data.doutputs)
    if name in functions:
        return OpColumn(name, functions[name], data.inputs, data.doutputs)
    if op.extra is not None and name == op.extra.name:
        return op.extra(data.inputs)

    def ours(*inputs: Tensor) -> Outputs:
        return op.ours(*inputs, backend=backend)

    if name == "ours fp32":
        data = data.to(torch.float32)
    return OpColumn(name, ours, data.inputs, data.doutputs)


def column_names(op: Op, dtype: str, compile_: bool) -> list[str]:
    """The columns of a table, in order."""
    names = ["reference", "eager", *(["compile"] if compile_ else []), "ours"]
    names += ["ours fp32"] if dtype == "bf16" else []
    return names + ([op.extra.name] if op.extra is not None else [])


def gate(op: Op, data: OpData, column: OpColumn) -> list[Row]:
    """The column's outputs and gradients against float64, weighed by the error that the written-out form makes."""
    oracle = OpColumn("oracle", op.reference, *vars(data.to(torch.float64)).values()).results()
    dtype = column.leaves[0].dtype
    plain_data = data.to(dtype)
    plain = OpColumn("plain", op.reference, plain_data.inputs, plain_data.doutputs).results()
    got = column.results()
    names = [name for name, x in zip(inspect.signature(op.reference).parameters, data.inputs) if x.requires_grad]
    rows = [
        compare(f"output {i}", *values, dtype=dtype, factor=OUTPUT_FACTOR)
        for i, values in enumerate(zip(got[0], plain[0], oracle[0]))
    ]
    return rows + [
        compare(f"d{name}", *values, dtype=dtype, factor=GRADIENT_FACTOR)
        for name, *values in zip(names, got[1], plain[1], oracle[1])
    ]


def gated(op: Op, data: OpData, names: Sequence[str], backend: str) -> tuple[list[Column], dict[str, dict]]:
    """The columns that may be timed, and what is to be said of every column before."""
    columns: list[Column] = []
    notes: dict[str, dict] = {}
    for name in names:
        progress(f"{op.title}: gate of {name}")
        column = op_column(op, name, data, backend)
        notes[name] = {}
        if isinstance(column, OpColumn):
            try:
                rows = gate(op, data, column)
            except UNAVAILABLE_ERRORS as error:
                if name != "compile":
                    raise
                notes[name] = {"unavailable": reason(error)}
                continue
            notes[name] = {"gate": [row.figures() for row in rows], "passed": all(row.passed for row in rows)}
            if not notes[name]["passed"]:
                continue
        columns.append(column)
    return columns, notes


def bench_case(op: Op, shape: Shape, options: Options) -> dict[str, object]:
    """Every figure of one operator at one shape."""
    torch._dynamo.reset()  # each shape is compiled for itself, and the recompilation limit counts per function
    dtype = DTYPES[options.dtype]
    data = op_data(op, shape, dtype)
    columns, notes = gated(op, data, column_names(op, options.dtype, options.compile), options.backend)
    roofs = roof_columns(dtype, options.quick)
    times = timed_rounds(columns, roofs, options.rounds)
    roof = roof_figures(roofs, times)
    for column in columns:
        cost = op.cost(shape, 4 if column.name == "ours fp32" else dtype.itemsize)
        note = notes[column.name]
        for row in ROWS:
            note[row] = figures(times[column.name][row], getattr(cost, row), roof)
        if options.memory and isinstance(column, OpColumn):
            note["memory"] = measured_in_subprocess(
                {"kind": "ops", "op": op.name, "shape": shape, "column": column.name, **options.work()}
            )
    return {
        "case": f"{op.title} " + " ".join(f"{k}={v}" for k, v in shape.items()),
        "op": op.name,
        "shape": shape,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "roof": roof,
        "columns": notes,
        "speedup": speedups(notes, ROWS),
        "passed": all(note.get("passed", True) for note in notes.values()),
    }


def bench_ops(names: Sequence[str], options: Options) -> list[dict[str, object]]:
    """All the cases of the named operators; with --quick one small shape each."""
    return [
        bench_case(op, shape, options)
        for op in (OPS[name] for name in names)
        for shape in ((op.small,) if options.quick else op.shapes)
    ]


def peak_work(work: dict) -> tuple[Column, int]:
    """For benchmarks.memory: the column at full shape, after its warm-up, and the bytes of its gradients."""
    op, dtype = OPS[work["op"]], DTYPES[work["dtype"]]
    data = op_data(op, work["shape"], dtype)
    if work["column"] == "ours fp32":
        data = data.to(torch.float32)
    column = op_column(op, work["column"], data, work["backend"])
    if work["column"] == "compile":
        column.run()
    else:
        op_column(op, work["column"], op_data(op, op.small, dtype), work["backend"]).run()
    return column, data.gradient_bytes()
