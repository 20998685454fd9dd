"""The operators' cases for pytest-benchmark: `pytest benchmarks --benchmark-only`, `-k small` for a first look.

`gptkernels bench` interleaves its columns and is what figures are quoted from; this suite is for comparing two commits
with pytest-benchmark's own tools:

    pytest benchmarks --benchmark-only --benchmark-autosave        # on the one, then, on the other,
    pytest benchmarks --benchmark-only --benchmark-compare
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.case import GPU_BACKENDS, column_names
from benchmarks.device import AS_IT_COMES, COLD
from benchmarks.op import DTYPES, Op, Shape
from benchmarks.ops import OPS, Gate, op_column, op_data
from benchmarks.options import Options
from gptkernels.backend import available_backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = Options(device=DEVICE, compile=False, cache=COLD if DEVICE == "cuda" else AS_IT_COMES)
DTYPE = DTYPES[OPTIONS.dtype]


def shape_id(shape: Shape) -> str:
    """B8-H6-T256-D64."""
    return "-".join(f"{k}{v}" for k, v in shape.items())


CASES = [
    pytest.param(op, shape, column, id=f"{op.name}-{size}-{shape_id(shape)}-{column.replace(' ', '_')}")
    for op in OPS.values()
    for size, shapes in (("small", (op.small,)), ("full", op.shapes if DEVICE == "cpu" else op.gpu_shapes))
    for shape in shapes
    for column in (*column_names(OPTIONS), *([op.extra.name] if op.extra else []))
]


@pytest.mark.parametrize(("op", "shape", "name"), CASES)
def test_forward_backward(benchmark, op: Op, shape: Shape, name: str) -> None:
    """Forward and backward of one column, compared with float64 first."""
    if name in GPU_BACKENDS and (missing := available_backends()[name]):
        pytest.skip(missing)
    data = op_data(op, shape, DTYPE, OPTIONS.device, OPTIONS.cache)
    column = op_column(op, name, data, OPTIONS.backend)
    errors = Gate(op, data)(column, column.results())
    assert errors is None or all(row.passed for row in errors), errors
    cost = op.cost(shape, DTYPE.itemsize).both
    benchmark.group = f"{op.name} {shape_id(shape)}"
    benchmark.extra_info.update(
        flops=cost.flops, bytes=cost.bytes, kept_bytes=column.kept_bytes(), column=name, shape=shape, device=DEVICE
    )
    benchmark(column.run)
