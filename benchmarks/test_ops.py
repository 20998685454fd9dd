"""The operators' cases for pytest-benchmark: `pytest benchmarks --benchmark-only`, `-k small` for a first look.

`gptkernels bench` interleaves its columns and is what figures are quoted from; this suite is for comparing two commits
with pytest-benchmark's own tools (--benchmark-autosave, --benchmark-compare).
"""

from __future__ import annotations

import pytest

from benchmarks.case import column_names
from benchmarks.op import DTYPES, Op, Shape
from benchmarks.ops import OPS, Gate, op_column, op_data
from benchmarks.options import Options

OPTIONS = Options(compile=False)


def shape_id(shape: Shape) -> str:
    """B8-H6-T256-D64."""
    return "-".join(f"{k}{v}" for k, v in shape.items())


CASES = [
    pytest.param(op, shape, column, id=f"{op.name}-{size}-{shape_id(shape)}-{column.replace(' ', '_')}")
    for op in OPS.values()
    for size, shapes in (("small", (op.small,)), ("full", op.shapes))
    for shape in shapes
    for column in (*column_names(OPTIONS), *([op.extra.name] if op.extra else []))
]


@pytest.mark.parametrize(("op", "shape", "name"), CASES)
def test_forward_backward(benchmark, op: Op, shape: Shape, name: str) -> None:
    """Forward and backward of one column, compared with float64 first."""
    data = op_data(op, shape, DTYPES[OPTIONS.dtype])
    column = op_column(op, name, data, OPTIONS.backend)
    errors = Gate(op, data)(column, column.results())
    assert errors is None or all(row.passed for row in errors), errors
    cost = op.cost(shape, DTYPES[OPTIONS.dtype].itemsize).both
    benchmark.group = f"{op.title} {shape_id(shape)}"
    benchmark.extra_info.update(flops=cost.flops, bytes=cost.bytes, column=name, shape=shape)
    benchmark(column.run)
