"""The calls whose kernels gptkernels/static.py compiles: each operator at the sizes that its tile choices tell apart."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from gptkernels.ops.attention import triton as attention
from gptkernels.ops.cross_entropy import triton as cross_entropy
from gptkernels.ops.layer_norm import triton as layer_norm
from gptkernels.ops.linear import triton as linear
from gptkernels.ops.mlp import triton as mlp
from gptkernels.static import Launch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = 8192  # tokens of a batch, enough to fill every device
Make = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an operator's launch functions, forward and backward, with a way to make its inputs."""

    op: str
    size: str
    dtype: torch.dtype
    call: Callable[[Make], None]
    usual: bool = True  # in the short table too
    # The elements that a launch goes through, for instructions an element; None for a matrix product.
    elements: Callable[[Launch], int] | None = None

    def run(self, device: str) -> None:
        def make(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.call(make)


def cases() -> list[Case]:
    """Every case, the three dtypes of one size side by side."""
    return [case for dtype in DTYPES for each in (attention_cases, row_cases, product_cases) for case in each(dtype)]


def attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    B, T, H = 8, 1024, 12
    kinds = ("", " dropout", " T=1000", " atomics", " dropout atomics", " dropout T=1000", " contiguous dout")
    for D, kind in (*itertools.product((64, 128, 256), kinds), (32, ""), (80, "")):

        def call(make: Make, D: int = D, kind: str = kind) -> None:
            dropout_p, seed = (0.1, make(1, dtype=torch.int64)) if "dropout" in kind else (0.0, None)
            q, k, v, dout = make(4, B, H, 1000 if "T=1000" in kind else T, D).unbind()
            out, stats = attention.attention_forward(q, k, v, D**-0.5, dropout_p, seed)
            dout = dout if "dout" in kind else out  # a model's has the strides of out, (B, T, H, D)
            attention.attention_backward(dout, q, k, v, out, stats, D**-0.5, dropout_p, seed, "atomics" in kind)

        yield Case("attention", f"D={D}{kind}", dtype, call, usual=D in (64, 128) and not kind)

    def packed(make: Make) -> None:
        qkv = make(B, T, 3, H, 64)
        out, stats = attention.attention_packed_forward(qkv, 0.125, 0.0, None)
        attention.attention_packed_backward(out, qkv, out, stats, 0.125, 0.0, None)

    yield Case("attention", "D=64 packed", dtype, packed)


def row_cases(dtype: torch.dtype) -> Iterator[Case]:
    for C in (768, 4096, 16384):

        def norm(make: Make, C: int = C) -> None:
            x, weight = make(ROWS, C), make(C)
            _, mean, rstd = layer_norm.layer_norm_forward(x, weight, weight, 1e-5, x.dtype)
            layer_norm.add_layer_norm_forward(x, x, weight, weight, 1e-5, x.dtype)
            layer_norm.layer_norm_backward(x, None, x, weight, True, mean, rstd)
            layer_norm.layer_norm_backward(x, x, x, weight, True, mean, rstd)

        def elements(_: Launch, C: int = C) -> int:
            return ROWS * C

        yield Case("layer_norm", f"C={C}", dtype, norm, usual=C == 768, elements=elements)

    if dtype.itemsize == 2:

        def norm_of_stream(make: Make) -> None:
            """A training's: branches of 16 bits beside the float32 stream that they are added to."""
            branch, stream, weight = (
                make(ROWS, 16384),
                make(ROWS, 16384, dtype=torch.float32),
                make(16384, dtype=torch.float32),
            )
            _, _, mean, rstd = layer_norm.add_layer_norm_forward(branch, stream, weight, weight, 1e-5, dtype)
            layer_norm.layer_norm_backward(branch, stream, stream, weight, True, mean, rstd)

        yield Case("layer_norm", "C=16384, stream", dtype, norm_of_stream, usual=False)

    def loss(make: Make) -> None:
        x, weight, targets = make(ROWS, 768), make(50304, 768), make(ROWS, dtype=torch.int64)
        cross_entropy.linear_cross_entropy_forward(x, weight, targets, -1, True, 50257)
        cross_entropy.linear_cross_entropy_gradients(x, weight, targets, -1, True, 50257)

    yield Case("cross_entropy", "V=50304", dtype, loss, elements=lambda launch: launch.grid[0] * 50304)


def product_cases(dtype: torch.dtype) -> Iterator[Case]:
    # The fewer rows, the smaller the tile.
    for rows in (ROWS, 2048, 1024, 512, 256):

        def linear_call(make: Make, rows: int = rows) -> None:
            x, weight, bias = make(rows, 768), make(2304, 768), make(2304)
            y = linear.linear_forward(x, weight, bias)
            linear.linear_backward(y, x, weight, True)

        def mlp_call(make: Make, rows: int = rows) -> None:
            x, w_fc, b_fc, w_proj, b_proj = make(rows, 768), make(3072, 768), make(3072), make(768, 3072), make(768)
            for tanh in (True, False):
                y, h = mlp.gelu_mlp_forward(x, w_fc, b_fc, w_proj, b_proj, tanh)
                mlp.gelu_mlp_backward(y, x, h, w_fc, w_proj, True, True, tanh)

        usual, size = rows == ROWS, "" if rows == ROWS else f", {rows} rows"
        yield Case("linear", f"768 -> 2304{size}", dtype, chosen(linear_call, "triton"), usual)
        yield Case("mlp", f"768 -> 3072{size}", dtype, chosen(mlp_call, "triton"), usual)
        if usual:
            yield Case("mlp", "768 -> 3072, cublas", dtype, chosen(mlp_call, "cublas"))


def chosen(call: Callable[[Make], None], gemm: str) -> Callable[[Make], None]:
    """The call with every matrix product by these kernels or by cuBLAS, whatever "auto" would take."""

    def forced(make: Make) -> None:
        with mock.patch.object(linear, "choose", lambda *_: gemm), mock.patch.object(mlp, "choose", lambda *_: gemm):
            call(make)

    return forced


def liger_cases() -> list[Case]:
    """Liger-Kernel's LayerNorm and cross-entropy at the same sizes; ImportError where it is not installed."""
    liger_loss = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    liger_norm = importlib.import_module("liger_kernel.ops.layer_norm")

    def norm(make: Make) -> None:
        x, weight = make(ROWS, 768), make(768)
        y, _, mean, rstd, *_ = liger_norm.layer_norm_forward(x, weight, weight, 1e-5)
        liger_norm.layer_norm_backward(y, x, weight, weight, mean, rstd)

    def loss(make: Make) -> None:
        # As its fused linear cross-entropy launches it for a chunk; the wrapper itself reads a count on the host.
        logits, targets, losses = make(ROWS, 50304), make(ROWS, dtype=torch.int64), make(ROWS, dtype=torch.float32)
        kernel = liger_loss.liger_cross_entropy_kernel
        absent = {name: 0 if name.endswith("stride") else None for name in kernel.arg_names}
        flags = {name: False for name in kernel.arg_names if name.startswith(("RETURN_", "HAS_"))}
        given = {
            "X_ptr": logits,
            "X_stride": 50304,
            "Y_ptr": targets,
            "Y_stride": 1,
            "loss_ptr": losses,
            "loss_stride": 1,
            "n_cols": 50304,
            "n_non_ignore": ROWS,
            "sum_non_ignore_weight": ROWS,
            "weight_sum": 0.0,
            "ignore_index": -1,
            "lse_square_scale": 0.0,
            "label_smoothing": 0.0,
            "reduction": "mean",
            "HAS_GRADIENTS": True,
            "BLOCK_SIZE": liger_loss.MAX_FUSED_SIZE,
            "num_warps": 32,
        }
        kernel[(ROWS,)](**{**absent, **flags, **given})

    return [
        Case("liger layer_norm", "C=768", torch.bfloat16, norm, elements=lambda _: ROWS * 768),
        Case("liger cross_entropy", "V=50304", torch.bfloat16, loss, elements=lambda launch: launch.grid[0] * 50304),
    ]
