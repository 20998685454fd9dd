"""cuBLASLt's products with GELU in their epilogues, by the copy of the library that torch has loaded.

    gelu:            h = x W^T + b,   g = gelu(h)                (GELU_AUX_BIAS; GELU_AUX without a bias)
    gelu_backward:   dh = (dy W) * gelu'(h),   db = its column sums   (DGELU_BGRAD; DGELU where none are wanted)

Its GELU is tanh's, as PyTorch takes it. No rule chooses it: `gptkernels tune` does where it measures it to be the fastest
and finds its numbers to agree (ops/linear/choice.py). **Not run on a GPU**: tests run these calls against a library that
does on the CPU what NVIDIA's documentation says of each (tests/cublaslt_stand_in.cpp), and make the descriptors with
NVIDIA's own.

cuBLASLt's matrices lie column by column, so that rows (M, K) of ours are its (K, M); in its terms D^T = op(W) x^T.
Source: NVIDIA cuBLAS, cublasLtMatmul(), cublasLtEpilogue_t and cublasLtMatmulDescAttributes_t; the numbers below are
those of CUDA 13's header.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Epilogues, as sums of their parts.
BIAS, BIAS_GRADIENT, GELU_LEAVING_H, GELU_GRADIENT = 4, 16, 32 + 128, 64 + 128
# Attributes of a product: transposition of its first factor, epilogue, bias, h and h's distance between rows.
TRANSPOSED, EPILOGUE, BIAS_POINTER, H_POINTER, H_STRIDE = 3, 7, 8, 11, 12
COMPUTE_32F, FLOAT, MOST_WORKSPACE = 68, 0, 1
TYPES = {torch.float16: 2, torch.bfloat16: 14}
# What NVIDIA advises from Hopper on; it must be asked for, the default is none.
WORKSPACE_BYTES = 32 << 20
# What cuBLASLt takes pointers to be multiples of, unless told.
ALIGNMENT = 256

REMEDY = "run `gptkernels tune` again, or delete its file"

SIGNATURES = {
    "cublasLtCreate": (c_void_p,),
    "cublasLtMatmulDescCreate": (c_void_p, c_int, c_int),
    "cublasLtMatmulDescDestroy": (c_void_p,),
    "cublasLtMatmulDescSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatrixLayoutCreate": (c_void_p, c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutDestroy": (c_void_p,),
    "cublasLtMatmulPreferenceCreate": (c_void_p,),
    "cublasLtMatmulPreferenceDestroy": (c_void_p,),
    "cublasLtMatmulPreferenceSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatmulAlgoGetHeuristic": (*7 * (c_void_p,), c_int, c_void_p, c_void_p),
    "cublasLtMatmul": (*14 * (c_void_p,), c_size_t, c_void_p),
}


@cache
def library() -> Any:
    """torch's cuBLASLt; None where there is none, as beside a CPU build of torch."""
    if torch.version.cuda is None:
        return None
    try:
        return declared(ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}"))
    except OSError:
        return None


class Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: an algorithm, and what it needs."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


def declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """The library, whose functions know what they take."""
    for name, types in SIGNATURES.items():
        getattr(found, name).argtypes = types
    found.cublasLtGetStatusString.restype = ctypes.c_char_p
    return found


def call(function: str, *arguments: Any) -> None:
    """Call a function of the library; RuntimeError with its own words where it fails."""
    found = library()
    if found is None:
        raise RuntimeError(f"torch brings no cuBLASLt here, which a measurement asks for: {REMEDY}")
    if status := getattr(found, function)(*arguments):
        reason = found.cublasLtGetStatusString(status).decode()
        raise RuntimeError(f"{function} of cuBLASLt failed ({reason}), which a measurement asks for: {REMEDY}")


@cache
def handle(device: torch.device) -> c_void_p:
    """cuBLASLt's handle on a device, kept."""
    made = c_void_p()
    call("cublasLtCreate", byref(made))
    return made


@contextmanager
def described(kind: str, *arguments: int) -> Iterator[c_void_p]:
    """A "MatmulDesc", "MatrixLayout" or "MatmulPreference", for as long as it is needed."""
    made = c_void_p()
    call(f"cublasLt{kind}Create", byref(made), *arguments)
    try:
        yield made
    finally:
        call(f"cublasLt{kind}Destroy", made)


def aligned(x: Tensor) -> Tensor:
    """x, contiguous and at an address that every kernel takes."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def multiply(
    weight: Tensor, along_k: bool, x: Tensor, out: Tensor, h: Tensor, epilogue: int, bias: Tensor | None
) -> None:
    """out (M, N) = epilogue(x W^T) of x (M, K) and weight (N, K), or x W of weight (K, N) where not along_k."""
    (M, K), N, kind = x.shape, out.shape[1], TYPES[x.dtype]
    if M == 0 or N == 0:
        return
    attributes = {
        TRANSPOSED: c_int(along_k), EPILOGUE: c_int(epilogue), H_POINTER: c_void_p(h.data_ptr()), H_STRIDE: c_int64(N),
    }  # fmt: skip
    if bias is not None:
        attributes[BIAS_POINTER] = c_void_p(bias.data_ptr())
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    with (
        torch.cuda.device(x.device) if x.is_cuda else nullcontext(),
        described("MatmulDesc", COMPUTE_32F, FLOAT) as product,
        described("MatrixLayout", kind, weight.shape[1], weight.shape[0], weight.shape[1]) as a,
        described("MatrixLayout", kind, K, M, K) as b,
        described("MatrixLayout", kind, N, M, N) as d,
        described("MatmulPreference") as preference,
    ):
        for attribute, value in attributes.items():
            call("cublasLtMatmulDescSetAttribute", product, attribute, byref(value), ctypes.sizeof(value))
        pointers = weight.data_ptr(), a, x.data_ptr(), b, byref(c_float(0.0)), out.data_ptr(), d, out.data_ptr(), d
        most, found, count = c_uint64(WORKSPACE_BYTES), Found(), c_int()
        call("cublasLtMatmulPreferenceSetAttribute", preference, MOST_WORKSPACE, byref(most), ctypes.sizeof(most))
        # The library remembers what it has found for a shape.
        call(
            "cublasLtMatmulAlgoGetHeuristic", handle(x.device), product, a, b, d, d, preference, 1, byref(found),
            byref(count),
        )  # fmt: skip
        if count.value == 0:
            raise RuntimeError(f"cuBLASLt has no product for {M} x {N} x {K}, which a measurement asks for: {REMEDY}")
        workspace = torch.empty(found.workspace, dtype=torch.uint8, device=x.device)
        call(
            "cublasLtMatmul", handle(x.device), product, byref(c_float(1.0)), *pointers, byref(found),
            workspace.data_ptr(), workspace.numel(), stream,
        )  # fmt: skip


def gelu(x: Tensor, w_fc: Tensor, b_fc: Tensor | None, h: Tensor, g: Tensor) -> None:
    """h = x W^T + b and g = gelu(h) of rows x (M, K) and w_fc (N, K); h and g are contiguous, N and K multiples of 8."""
    bias = None if b_fc is None else aligned(b_fc.to(x.dtype))
    epilogue = GELU_LEAVING_H + (0 if bias is None else BIAS)
    rows = g.view(-1, g.shape[-1])
    multiply(aligned(w_fc), True, aligned(x), rows, h, epilogue, bias)


def gelu_backward(dy: Tensor, h: Tensor, w_proj: Tensor, dh: Tensor, db: Tensor | None) -> None:
    """dh = (dy W) * gelu'(h) of rows dy (M, K), h (M, N) and w_proj (K, N), and the sums of dh's columns, in its dtype."""
    if db is not None and len(dh) == 0:
        db.zero_()
    epilogue = GELU_GRADIENT + (0 if db is None else BIAS_GRADIENT)
    multiply(aligned(w_proj), False, aligned(dy), dh, aligned(h), epilogue, db)
