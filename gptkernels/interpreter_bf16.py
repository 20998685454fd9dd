"""The arithmetic of Triton's interpreter, corrected to what a GPU computes.

Triton's interpreter stores bfloat16 as its 16 bits and then adds and multiplies those bits as integers. Here every
operation on bfloat16 is done in float32 and rounded once to nearest even, as the hardware does: float32 has more than
twice the bits, so that the double rounding of +, -, *, / is harmless. Also corrected: tl.dot rounds float32 operands to
TF32 where the kernel asks for it; reductions go by halves in the dtype of their input (numpy would sum float16 in
float32, which no GPU does); an fma rounds once. Used by gptkernels/interpreter.py; imports triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as upstream
from triton._C.libtriton import ir

Array = np.ndarray
Handle = upstream.TensorHandle
Builder = upstream.InterpreterBuilder

TF32_DROPPED_BITS = np.uint32(13)  # 23 mantissa bits of float32 against 10


def widen(bits: Array) -> Array:
    """bfloat16 bits as float32: exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: Array) -> Array:
    """float32 as bfloat16 bits, to nearest even; NaN stays a NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = np.isnan(values)
    return np.where(nan, np.uint16(0x7FFF), rounded.astype(np.uint16)) if nan.any() else rounded.astype(np.uint16)


def to_tf32(values: Array) -> Array:
    """float32 with TF32's 10 mantissa bits, ties away from zero (cvt.rna.tf32); inf and NaN stay."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    half = np.uint32(1) << (TF32_DROPPED_BITS - np.uint32(1))
    rounded = ((bits + half) >> TF32_DROPPED_BITS << TF32_DROPPED_BITS).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def numbers(handle: Any) -> Array:
    """The values of a handle as numpy can compute with them."""
    return widen(handle.data) if is_bf16(handle) else handle.data


def handle_of(values: Array, dtype: Any) -> Any:
    """A handle of float32 results in their dtype; comparisons stay booleans."""
    if dtype.scalar == tl.bfloat16 and values.dtype != np.bool_:
        return Handle(narrow(values), tl.bfloat16)
    return Handle(values, dtype.scalar)


original = {
    name: getattr(Builder, name) for name in ("binary_op", "unary_op", "ternary_op", "cast_impl", "create_fp_to_fp")
}


def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[[Array, Array], Array]) -> Any:
    if not is_bf16(lhs):
        return original["binary_op"](self, lhs, rhs, op)
    result = op(numbers(lhs), numbers(rhs))
    return Handle(result, tl.int1) if result.dtype == np.bool_ else Handle(narrow(result), tl.bfloat16)


def unary_op(self: Any, arg: Any, op: Callable[[Array], Array]) -> Any:
    return handle_of(op(numbers(arg)), arg.dtype) if is_bf16(arg) else original["unary_op"](self, arg, op)


def ternary_op(self: Any, first: Any, second: Any, third: Any, op: Callable[..., Array]) -> Any:
    # A select moves bits and needs no numbers; a clamp compares them.
    if op is np.where or not is_bf16(third):
        return original["ternary_op"](self, first, second, third, op)
    return handle_of(op(numbers(first), numbers(second), numbers(third)), third.dtype)


def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    target = dst_type.scalar
    if target == tl.bfloat16:
        return src if is_bf16(src) else Handle(narrow(src.data.astype(np.float32)), tl.bfloat16)
    if is_bf16(src):
        src = Handle(widen(src.data), tl.float32)
    return src if src.dtype.scalar == target else original["cast_impl"](self, src, dst_type)


def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
    """A cast with an explicit rounding: to nearest even, or toward zero by dropping bits."""
    if dst_type.scalar in (tl.bfloat16, tl.float16) and rounding == ir.ROUNDING_MODE.RTNE:
        return cast_impl(self, src, dst_type)
    return original["create_fp_to_fp"](self, src, dst_type, rounding)


def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: int) -> Any:
    """a @ b + d, 16-bit operands multiplied exactly and summed in float32 as tensor cores do.

    Full-precision float32 operands are summed in float64: BLAS would give q k^T and (k q^T)^T different bits, where a
    GPU's chain of FMAs along k gives the same, and a backward that makes the forward's scores again relies on it.
    """
    if not a.dtype.scalar.is_floating() or a.dtype.scalar.primitive_bitwidth not in (16, 32):
        return upstream_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
    left, right = (numbers(operand).astype(np.float32, copy=False) for operand in (a, b))
    if a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
        left, right = to_tf32(left), to_tf32(right)
    elif a.dtype.scalar == tl.float32:
        left, right = left.astype(np.float64), right.astype(np.float64)
    total = np.matmul(left, right) + numbers(d).astype(np.float32, copy=False)
    if is_bf16(d):
        return Handle(narrow(total), tl.bfloat16)
    return Handle(total.astype(d.data.dtype, copy=False), d.dtype.scalar)


upstream_dot = Builder.create_dot


def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """x*y + z rounded once: float64 holds the product of two float32 exactly, of two 16-bit numbers with room to spare."""
    if z.data.dtype == np.float64:
        return Handle(x.data * y.data + z.data, tl.float64)
    exact = numbers(x).astype(np.float64) * numbers(y) + numbers(z)
    return Handle(narrow(exact), tl.bfloat16) if is_bf16(z) else Handle(exact.astype(z.data.dtype), z.dtype.scalar)


def create_erf(self: Any, arg: Any) -> Any:
    values = torch.from_numpy(np.ascontiguousarray(arg.data))
    return Handle(torch.erf(values).numpy(), arg.dtype.scalar)


def create_umulhi(self: Any, lhs: Any, rhs: Any) -> Any:
    """The upper half of the unsigned product, whatever the sign of the operands' type."""
    bits = lhs.data.itemsize * 8
    if bits == 64:
        return upstream_umulhi(self, lhs, rhs)
    unsigned = np.dtype(f"uint{bits}")
    left, right = (operand.data.astype(unsigned).astype(np.uint64) for operand in (lhs, rhs))
    return Handle(((left * right) >> np.uint64(bits)).astype(unsigned).view(lhs.data.dtype), lhs.dtype.scalar)


upstream_umulhi = Builder.create_umulhi


def get_bf16(self: Any, value: float) -> Any:
    return Handle(narrow(np.array([value], dtype=np.float32)), tl.bfloat16)


BUILDER_METHODS: dict[str, Callable] = {
    "binary_op": binary_op,
    "unary_op": unary_op,
    "ternary_op": ternary_op,
    "cast_impl": cast_impl,
    "create_fp_to_fp": create_fp_to_fp,
    "create_dot": create_dot,
    "create_fma": create_fma,
    "create_erf": create_erf,
    "create_umulhi": create_umulhi,
    "get_bf16": get_bf16,
}


def tensor_of(data: Array, dtype: Any) -> Any:
    """A tl.tensor of the data: a scalar where it has no dimensions left."""
    if data.ndim:
        return tl.tensor(Handle(data, dtype.scalar), tl.block_type(dtype.scalar, list(data.shape)))
    return tl.tensor(Handle(data.reshape(1), dtype.scalar), dtype.scalar)


def reduce(input: Any, axis: int | None, combine_fn: Any, keep_dims: bool = False, **_: Any) -> Any:
    """tl.reduce by halves: log2(n) vectorised steps, each in the dtype of the input."""
    single = not isinstance(input, tuple)
    tensors = (input,) if single else tuple(input)
    arrays = [t.handle.data.ravel() if axis is None else np.moveaxis(t.handle.data, axis, 0) for t in tensors]
    dtypes = [t.dtype for t in tensors]
    while (size := arrays[0].shape[0]) > 1:
        half = size // 2
        arrays = combine([a[:half] for a in arrays], [a[half:] for a in arrays], dtypes, combine_fn)
    results = [a[0] if isinstance(a[0], np.ndarray) else np.asarray(a[0]) for a in arrays]
    if keep_dims:
        shape = tensors[0].handle.data.shape
        kept = [1] * len(shape) if axis is None else [1 if i == axis % len(shape) else n for i, n in enumerate(shape)]
        results = [r.reshape(kept) for r in results]
    reduced = tuple(tensor_of(r, dtype) for r, dtype in zip(results, dtypes, strict=True))
    return reduced[0] if single else reduced


def combine(left: list[Array], right: list[Array], dtypes: list[Any], combine_fn: Any) -> list[Array]:
    """combine_fn on whole arrays; sums, maxima and minima without the way through tl.tensor."""
    op = known_ops().get(combine_fn.fn)
    if op is not None and len(left) == 1:
        if dtypes[0].scalar == tl.bfloat16:
            return [narrow(op(widen(left[0]), widen(right[0])))]
        return [op(left[0], right[0])]
    operands = [tensor_of(a, dtype) for a, dtype in zip(left + right, dtypes * 2, strict=True)]
    result = combine_fn(*operands)
    # A comparison of Python numbers or a cast may have widened a result: it goes back to its input's dtype.
    results = result if isinstance(result, tuple) else (result,)
    return [r.handle.data.astype(a.dtype, copy=False) for r, a in zip(results, left, strict=True)]


def known_ops() -> dict[Any, Callable[[Array, Array], Array]]:
    # As compiled: max.f32 and min.f32 give the number where one operand is a NaN.
    standard = tl.standard
    return {
        standard._sum_combine.fn: np.add,
        standard._elementwise_max.fn: np.fmax,
        standard._elementwise_min.fn: np.fmin,
    }


def associative_scan(input: Any, axis: int, combine_fn: Any, reverse: bool = False, **_: Any) -> Any:
    """tl.associative_scan, one step an element along the axis and all other axes at once."""
    single = not isinstance(input, tuple)
    tensors = (input,) if single else tuple(input)
    arrays = [np.moveaxis(t.handle.data, axis, 0) for t in tensors]
    arrays = [a[::-1] if reverse else a for a in arrays]
    dtypes = [t.dtype for t in tensors]
    state = [a[:1] for a in arrays]
    rows = [state]
    for i in range(1, arrays[0].shape[0]):
        state = combine(state, [a[i : i + 1] for a in arrays], dtypes, combine_fn)
        rows.append(state)
    scanned = [np.concatenate([row[j] for row in rows]) for j in range(len(arrays))]
    scanned = [np.ascontiguousarray(np.moveaxis(s[::-1] if reverse else s, 0, axis)) for s in scanned]
    results = tuple(tensor_of(s, dtype) for s, dtype in zip(scanned, dtypes, strict=True))
    return results[0] if single else results


def index_of(self: Any) -> int:
    return int(self.handle.data.item())


# (module or class, name, replacement): set while a kernel runs, after upstream's own replacements.
LANGUAGE: tuple[tuple[Any, str, Any], ...] = (
    (tl, "reduce", reduce),
    (tl.core, "reduce", reduce),
    (tl, "associative_scan", associative_scan),
    (tl.core, "associative_scan", associative_scan),
    (tl.tensor, "__index__", index_of),
)
