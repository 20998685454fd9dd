"""`bench ops`: every operator's columns, gated, timed and weighed at each of its shapes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import bench_attention, bench_cross_entropy, bench_layer_norm, bench_linear, bench_mlp
from benchmarks.case import GPU_BACKENDS, OURS_FP32, column_names, factor, run_case
from benchmarks.compiler import compiled
from benchmarks.device import AS_IT_COMES, Clock, CudaClock, clock_of
from benchmarks.harness import Column
from benchmarks.memory import give_back_heap
from benchmarks.op import DTYPES, Op, OpColumn, Outputs, Results, Shape, as_tuple, output_gradients
from benchmarks.options import Options
from model.equivalence_rule import Row, compare

ROWS = ("forward", "backward", "both")
OPS = {
    module.OP.name: module.OP
    for module in (bench_attention, bench_layer_norm, bench_mlp, bench_linear, bench_cross_entropy)
}


@dataclass(frozen=True)
class OpData:
    """Inputs and output gradients of one case."""

    inputs: tuple[Tensor, ...]
    doutputs: tuple[Tensor, ...]
    clock: Clock | CudaClock

    def to(self, dtype: torch.dtype) -> OpData:
        """The very same values in another dtype, as leaves of their own."""

        def cast(x: Tensor) -> Tensor:
            return x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x

        return OpData(tuple(map(cast, self.inputs)), tuple(dy.to(dtype) for dy in self.doutputs), self.clock)

    def rows(self, dims: int) -> list[OpData]:
        """One a row of the first dimensions, of an operator in which those rows never meet."""

        def split(x: Tensor) -> list[Tensor]:
            return [row.view(*[1] * dims, *x.shape[dims:]) for row in x.detach().flatten(0, dims - 1)]

        inputs = zip(*map(split, self.inputs), strict=True)
        doutputs = zip(*map(split, self.doutputs), strict=True)
        return [OpData(*both, self.clock) for both in zip(inputs, doutputs, strict=True)]

    def gradient_bytes(self) -> int:
        """Bytes of the gradients of all inputs."""
        return sum(x.numel() * x.element_size() for x in self.inputs if x.requires_grad)


def op_data(op: Op, shape: Shape, dtype: torch.dtype, device: str = "cpu", cache: str = AS_IT_COMES) -> OpData:
    """Seeded inputs; the outputs' shapes come from the meta device, so that nothing is computed for them."""
    inputs = op.inputs(shape, dtype, device)
    outputs = as_tuple(op.eager(*(x.detach().to("meta") for x in inputs)))
    return OpData(inputs, output_gradients(outputs, device), clock_of(device, cache))


def op_column(op: Op, name: str, data: OpData, backend: str) -> Column:
    """One column by its name."""
    functions = {"reference": op.reference, "eager": op.eager, **op.others}
    if op.extra is not None and name == op.extra.name:
        return op.extra(data.inputs, data.clock)
    if name == OURS_FP32:
        data = data.to(torch.float32)

    def ours(*inputs: Tensor) -> Outputs:
        return op.ours(*inputs, backend=name if name in GPU_BACKENDS else backend)

    function = compiled(op.eager) if name == "compile" else functions.get(name, ours)
    return OpColumn(name, function, data.inputs, data.doutputs, data.clock)


class Gate:
    """The errors of a column's outputs and gradients against float64, beside those of the written-out form."""

    def __init__(self, op: Op, data: OpData) -> None:
        self.op, self.data = op, data
        arguments = list(inspect.signature(op.reference).parameters)[: len(data.inputs)]
        self.names = [name for name, x in zip(arguments, data.inputs, strict=True) if x.requires_grad]
        self.oracle = self.written_out(torch.float64)
        self.plain: dict[torch.dtype, Results] = {}

    def written_out(self, dtype: torch.dtype) -> Results:
        """What the written-out form gives in a dtype, row by row where no row needs another: all may not fit into memory."""
        if not self.op.independent:
            return self.whole(self.data, dtype)
        rows = [self.whole(row, dtype) for row in self.data.rows(self.op.independent)]
        outputs, gradients = zip(*rows, strict=True)

        def joined(parts: Sequence[tuple[Tensor, ...]], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(torch.cat(each).view_as(x) for each, x in zip(zip(*parts, strict=True), like, strict=True))

        return joined(outputs, self.data.doutputs), joined(gradients, self.data.inputs)

    def whole(self, data: OpData, dtype: torch.dtype) -> Results:
        """What the written-out form gives on these inputs as they are."""
        data = data.to(dtype)
        return OpColumn("written out", self.op.reference, data.inputs, data.doutputs, data.clock).results()

    def __call__(self, column: Column, got: object) -> list[Row] | None:
        """The errors of a column's results; None for a bound, which computes nothing that could be compared."""
        if not isinstance(column, OpColumn):
            return None
        dtype = column.leaves[0].dtype
        if dtype not in self.plain:
            # The reference is gated first and is the written-out form itself: a slow dtype need not do it twice.
            self.plain[dtype] = got if column.name == "reference" else self.written_out(dtype)
        outputs = zip(got[0], self.plain[dtype][0], self.oracle[0], strict=True)
        gradients = zip(self.names, got[1], self.plain[dtype][1], self.oracle[1], strict=True)
        return [
            *(
                compare(f"output {i}", *of, dtype=dtype, factor=factor(column.name, False))
                for i, of in enumerate(outputs)
            ),
            *(compare(f"d{name}", *of, dtype=dtype, factor=factor(column.name, True)) for name, *of in gradients),
        ]


def bench_case(op: Op, shape: Shape, options: Options, names: Sequence[str] = ()) -> dict[str, object]:
    """Every figure of one operator at one shape, in the columns of these names (all if there are none)."""
    data = op_data(op, shape, DTYPES[options.dtype], options.device, options.cache)
    others = op.others if options.device == "cuda" else ()
    case = run_case(
        f"{op.title} " + " ".join(f"{k}={v}" for k, v in shape.items()),
        names or [*column_names(options), *others, *([op.extra.name] if op.extra is not None else [])],
        ROWS,
        build=lambda name: op_column(op, name, data, options.backend),
        judge=Gate(op, data),
        cost=lambda row, dtype: getattr(op.cost(shape, dtype.itemsize), row),
        gradient_bytes=data.gradient_bytes(),
        work={"kind": "ops", "op": op.name, "shape": shape},
        options=options,
    )
    return {"op": op.name, "shape": shape, **case}


def bench_ops(names: Sequence[str], options: Options) -> Iterator[dict[str, object]]:
    """All the cases of the named operators, as they are done; with --quick one small shape each."""
    for op in (OPS[name] for name in names):
        shapes = op.shapes if options.device == "cpu" else (*op.gpu_shapes, *op.shapes)
        for shape in (op.small,) if options.quick else shapes:
            yield bench_case(op, shape, options)


def peak_work(work: dict) -> tuple[Column, int]:
    """For benchmarks.memory: the column at full shape, after its warm-up, and the bytes of its gradients."""
    op, dtype = OPS[str(work["op"])], DTYPES[str(work["dtype"])]
    data = op_data(op, work["shape"], dtype)
    if work["column"] == OURS_FP32:
        data = data.to(torch.float32)
    column = op_column(op, work["column"], data, work["backend"])
    give_back_heap()
    if work["column"] == "compile":
        column.run()
    else:
        op_column(op, work["column"], op_data(op, op.small, dtype), work["backend"]).run()
    return column, data.gradient_bytes()
