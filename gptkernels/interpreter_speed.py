"""Triton's interpreter without its repeated work: types, shapes and broadcasts remembered instead of built again.

The interpreter spends its time in building the same few type objects for every operation. These replacements give the
same objects and the same results in about half the time. Set while a kernel runs (gptkernels/interpreter.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as upstream
from triton.language.semantic import TritonSemantic

types: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
numpy_dtypes: dict[str, np.dtype] = {}
block_init, tensor_init = tl.block_type.__init__, tl.tensor.__init__
unwrap, dtype_equals, find_numpy_dtype = tl.core._unwrap_if_constexpr, tl.dtype.__eq__, upstream._get_np_dtype
broadcast = TritonSemantic.broadcast_impl_value
ATOMS = frozenset((int, float, bool, str, type(None), tl.tensor, tl.dtype))


def unwrap_if_constexpr(value: Any) -> Any:
    kind = type(value)
    if kind in ATOMS:
        return value
    return value.value if kind is tl.constexpr else unwrap(value)


def equal_dtypes(self: Any, other: Any) -> bool:
    return self is other or dtype_equals(self, other)


def block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """block_type.__init__ from memory."""
    key = element_ty.name, tuple([size.value if type(size) is tl.constexpr else size for size in shape])
    known = types.get(key)
    if known is None:
        block_init(self, element_ty, shape)
        probe = object.__new__(tl.tensor)
        tensor_init(probe, None, self)
        known = types[key] = {**vars(self), "tensor_shape": probe.shape, "tensor_numel": probe.numel}
    self.__dict__.update(known)


def tensor(self: Any, handle: Any, type: Any) -> None:
    """tensor.__init__ with the shape that its type remembers."""
    shape = type.__dict__.get("tensor_shape")
    if shape is None:
        tensor_init(self, handle, type)
    else:
        self.handle, self.type, self.dtype = handle, type, type.element_ty
        self.shape, self.numel = shape, type.tensor_numel


def numpy_dtype(dtype: Any) -> np.dtype:
    scalar = dtype.scalar
    found = numpy_dtypes.get(scalar.name)
    if found is None:
        found = numpy_dtypes[scalar.name] = find_numpy_dtype(scalar)
    return found


def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
    """The two operands at one shape, as views; upstream is left with the errors and the unequal ranks."""
    left = tuple(lhs.type.shape) if lhs.type.is_block() else ()
    right = tuple(rhs.type.shape) if rhs.type.is_block() else ()
    if left == right:
        return lhs, rhs
    if not left or not right:
        shape = left or right
    elif len(left) == len(right) and all(m == n or 1 in (m, n) for m, n in zip(left, right, strict=True)):
        shape = tuple(map(max, left, right))
    else:
        return broadcast(self, lhs, rhs)
    return spread(lhs, left, shape), spread(rhs, right, shape)


def spread(value: Any, before: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    if before == shape:
        return value
    handle = value.handle
    data = np.broadcast_to(handle.data if before else handle.data.reshape(()), shape)
    return tl.tensor(upstream.TensorHandle(data, handle.dtype), tl.block_type(value.type.scalar, list(shape)))


LANGUAGE: tuple[tuple[Any, str, Any], ...] = (
    (tl.core, "_unwrap_if_constexpr", unwrap_if_constexpr),
    (tl.dtype, "__eq__", equal_dtypes),
    (tl.block_type, "__init__", block_type),
    (tl.tensor, "__init__", tensor),
    (upstream, "_get_np_dtype", numpy_dtype),
    (TritonSemantic, "broadcast_impl_value", broadcast_impl_value),
)
