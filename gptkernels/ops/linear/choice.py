"""Which GEMM runs a product of the Triton backend: the kernels here ("triton"), torch's ("cublas") with GELU in a pass, or
cuBLASLt's with GELU in the epilogue ("cublaslt"); and of cuda's.

For Triton a winner measured on this device (`gptkernels tune` stores it) decides; where there is none, a rule does, which
takes one of the first two. cuda leaves products to cuBLAS by a rule alone, and there takes cuBLASLt where that was measured
to win.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path

import torch

# The widest K for which a pass over memory saved by the epilogue is worth more than what a Triton GEMM is slower than
# cuBLAS, about 8 % of its time: 0.08 * 2K / (220 TFLOP/s) = 2 bytes / (1.4 TB/s) an element on an A100 gives 1960. The
# backward's epilogue saves twice the bytes. A plain product saves nothing. Reasoned for sm_80, not measured there.
WIDEST_K = {"plain": 0, "gelu": 2048, "gelu_backward": 4096}
GEMMS = ("triton", "cublas", "cublaslt")
# From this compute capability on cuBLAS multiplies by wgmma and is too far ahead for any epilogue. In a step of GPT-2 (124M,
# 16384 tokens) on an H200, us a layer: gelu 172 by Triton, 164 by cuBLAS and a pass; gelu_backward 279 and 232; two gradients
# of weights 262 and 175. csrc's mma.sync: 16384 x 768 x 2304 took 166 us, by cuBLAS 93.
CUBLAS_FROM = 9


@lru_cache(maxsize=64)
def cublas_is_ahead(device: torch.device) -> bool:
    """Whether every product on this GPU is left to cuBLAS."""
    return torch.cuda.get_device_properties(device).major >= CUBLAS_FROM


@lru_cache(maxsize=4096)
def choose(product: str, M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, tanh: bool = True) -> str:
    """One of GEMMS for a product (M, K) x (K, N): "plain", with the "gelu" epilogue, or with "gelu_backward"'s."""
    if device.type != "cuda":
        return "triton"
    stored = measurements().get(torch.cuda.get_device_name(device), {}).get(key(product, M, N, K, dtype))
    if stored == "cublaslt" and not tanh:  # the GELU that it has not
        stored = None
    return stored or by_rule(product, M, N, K, dtype, device)


def by_rule(product: str, M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> str:
    """The choice without a measurement."""
    # float32 runs on the FMA units, where cuBLAS is further ahead than a pass costs.
    if dtype == torch.float32 or WIDEST_K[product] < K or cublas_is_ahead(device):
        return "cublas"
    # Rows that begin off 16 bytes are loaded one element at a time, and fewer tiles than processors leave some idle:
    # cuBLAS has kernels for both.
    tiles = -(-M // 64) * -(-N // 64)
    if N % 8 or K % 8 or tiles < torch.cuda.get_device_properties(device).multi_processor_count:
        return "cublas"
    return "triton"


def key(product: str, M: int, N: int, K: int, dtype: torch.dtype) -> str:
    """A measurement's name: one holds for all M up to the next power of two."""
    return f"{product} {str(dtype).removeprefix('torch.')} {1 << max(M - 1, 0).bit_length()}x{N}x{K}"


def measurements_file() -> Path:
    """Where winners are stored: $GPTKERNELS_CACHE, else ~/.cache/gptkernels."""
    return Path(os.environ.get("GPTKERNELS_CACHE") or Path.home() / ".cache" / "gptkernels") / "gemm.json"


@lru_cache(maxsize=1)
def measurements() -> dict[str, dict[str, str]]:
    """Winners by device name, then by key()."""
    return read_measurements()


def read_measurements() -> dict[str, dict[str, str]]:
    """What the file holds now."""
    path = measurements_file()
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise RuntimeError(f"{path} is not JSON ({error}): delete it and run `gptkernels tune` again") from None


def store_winner(product: str, M: int, N: int, K: int, dtype: torch.dtype, device_name: str, winner: str) -> None:
    """Store a measured winner, one of GEMMS; it holds from now on, in this process too.

    The file is replaced as a whole: a reader sees the old one or the new one, also when this process is killed.
    """
    if winner not in GEMMS:
        raise ValueError(f"winner must be one of {', '.join(GEMMS)}, got {winner!r}")
    stored = read_measurements()
    stored.setdefault(device_name, {})[key(product, M, N, K, dtype)] = winner
    path = measurements_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    new.replace(path)
    measurements.cache_clear()
    choose.cache_clear()
