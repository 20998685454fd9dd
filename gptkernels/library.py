"""The table of contents: every raw operator's schema and its fake (shapes and dtypes without data).

Defined in Python, so that the operators exist without a compiled part; the native libraries only add implementations.
A forward also returns what its backward needs. A gradient that does not exist (no bias) is an empty tensor, so that the
number of results is fixed. None of them is differentiable: gptkernels/ops/<op>/api.py holds the autograd.Function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("gptkernels", "DEF")
# The same operators twice more: what runs on them is chosen by the name, never inside a traced graph.
TRITON = torch.library.Library("gptkernels_triton", "DEF")
SIMT = torch.library.Library("gptkernels_simt", "DEF")
NAMES: list[str] = []
# Kernels of both CUDA libraries that Python calls between products of torch's, or chooses instead of them
# (gptkernels/ops/<op>/cuda.py). cross_entropy_count gives (targets that count, targets out of range), cross_entropy_rows
# the rows' losses; column_sums are dy's, in like's dtype; gelu_backward turns dg into dh and gives g and the sums of dh's
# columns.
KERNELS = torch.library.Library("gptkernels_kernels", "DEF")
for _schema in (
    "column_sums(Tensor dy, Tensor like) -> Tensor",
    "gelu(Tensor h, bool tanh) -> Tensor",
    "gelu_backward(Tensor(a!) dg, Tensor h, Tensor like, bool tanh, bool sums) -> (Tensor, Tensor)",
    "cross_entropy_count(Tensor targets, int ignore_index, int vocab_size) -> Tensor",
    "cross_entropy_rows(Tensor(a!) logits, Tensor targets, Tensor counts, int ignore_index, bool mean, int vocab_size,"
    " bool gradient) -> Tensor",
):
    KERNELS.define(_schema)
# Operators of which the CUDA libraries have their own products, among those kernels.
OWN_PRODUCTS = ("linear_forward", "linear_backward", "gelu_mlp_forward", "gelu_mlp_backward")
MaybeTensor = Tensor | None


def define(schema: str) -> Callable[[Callable], Callable]:
    """Define an operator by its schema in every namespace; the decorated function is its fake."""
    name = schema.partition("(")[0]
    NAMES.append(name)
    for library in (LIBRARY, TRITON, SIMT, *([KERNELS] if name in OWN_PRODUCTS else [])):
        library.define(schema)

    def register(fake: Callable) -> Callable:
        for library in (LIBRARY, TRITON, SIMT):
            torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
        return fake

    return register


def optional_like(reference: Tensor, size: int, exists: bool) -> Tensor:
    """A vector in the reference's dtype, or the empty tensor that stands for no gradient."""
    return reference.new_empty((size if exists else 0,))


def contiguous(x: MaybeTensor) -> MaybeTensor:
    """An optional tensor as the kernels read it."""
    return None if x is None else x.contiguous()


@define("linear_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
def linear_forward(x: Tensor, weight: Tensor, bias: MaybeTensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@define("linear_backward(Tensor dy, Tensor x, Tensor weight, bool has_bias) -> (Tensor, Tensor, Tensor)")
def linear_backward(dy: Tensor, x: Tensor, weight: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), optional_like(weight, weight.shape[0], has_bias)


@define(
    "gelu_mlp_forward(Tensor x, Tensor w_fc, Tensor? b_fc, Tensor w_proj, Tensor? b_proj, bool tanh) -> (Tensor, Tensor)"
)
def gelu_mlp_forward(
    x: Tensor, w_fc: Tensor, b_fc: MaybeTensor, w_proj: Tensor, b_proj: MaybeTensor, tanh: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], w_fc.shape[0]))


@define(
    "gelu_mlp_backward(Tensor dy, Tensor x, Tensor h, Tensor w_fc, Tensor w_proj, bool has_b_fc, bool has_b_proj, bool tanh)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def gelu_mlp_backward(
    dy: Tensor, x: Tensor, h: Tensor, w_fc: Tensor, w_proj: Tensor, has_b_fc: bool, has_b_proj: bool, tanh: bool
) -> tuple[Tensor, ...]:
    F, C = w_fc.shape
    return (
        x.new_empty(x.shape),
        w_fc.new_empty((F, C)),
        optional_like(w_fc, F, has_b_fc),
        w_proj.new_empty((C, F)),
        optional_like(w_proj, C, has_b_proj),
    )


@define(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)"
)
def layer_norm_forward(
    x: Tensor, weight: MaybeTensor, bias: MaybeTensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    statistic = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), statistic, torch.empty_like(statistic)


@define(
    "add_layer_norm_forward(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def add_layer_norm_forward(
    x: Tensor, residual: Tensor, weight: MaybeTensor, bias: MaybeTensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    y, mean, rstd = layer_norm_forward(x, weight, bias, eps, dtype)
    return y, total, mean, rstd


@define(
    "layer_norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor? weight, bool has_bias, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)"
)
def layer_norm_backward(
    dy: Tensor, dtotal: MaybeTensor, x: Tensor, weight: MaybeTensor, has_bias: bool, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    like, C = x if weight is None else weight, x.shape[-1]
    return x.new_empty(x.shape), optional_like(like, C, weight is not None), optional_like(like, C, has_bias)


@define(
    "attention_forward(Tensor q, Tensor k, Tensor v, float scale, float dropout_p, Tensor? seed) -> (Tensor, Tensor)"
)
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: MaybeTensor
) -> tuple[Tensor, Tensor]:
    B, H, T, D = q.shape
    out = q.new_empty((B, T, H, D)).transpose(1, 2)  # token-major, as the projection after it wants it
    return out, q.new_empty((B, H, T, 2), dtype=torch.float32)


# With `atomics`, where a backend has it, dq is added up in one pass of 5 products instead of 7: its bits then vary.
@define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, float scale, float dropout_p,"
    " Tensor? seed, bool atomics=False) -> (Tensor, Tensor, Tensor)"
)
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    scale: float,
    dropout_p: float,
    seed: MaybeTensor,
    atomics: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@define("attention_packed_forward(Tensor qkv, float scale, float dropout_p, Tensor? seed) -> (Tensor, Tensor)")
def attention_packed_forward(qkv: Tensor, scale: float, dropout_p: float, seed: MaybeTensor) -> tuple[Tensor, Tensor]:
    B, T, _, H, D = qkv.shape
    return qkv.new_empty((B, T, H, D)), qkv.new_empty((B, H, T, 2), dtype=torch.float32)


@define(
    "attention_packed_backward(Tensor dout, Tensor qkv, Tensor out, Tensor stats, float scale, float dropout_p, Tensor? seed,"
    " bool atomics=False) -> Tensor"
)
def attention_packed_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    stats: Tensor,
    scale: float,
    dropout_p: float,
    seed: MaybeTensor,
    atomics: bool = False,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


@define(
    "linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool mean, int vocab_size)"
    " -> Tensor"
)
def linear_cross_entropy_forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, vocab_size: int
) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


@define(
    "linear_cross_entropy_gradients(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool mean, int vocab_size)"
    " -> (Tensor, Tensor, Tensor)"
)
def linear_cross_entropy_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    # In fp32 whatever the inputs are in: what scales the loss multiplies them before they are rounded.
    loss = x.new_empty((), dtype=torch.float32)
    return loss, loss.new_empty(x.shape), loss.new_empty(weight.shape)
