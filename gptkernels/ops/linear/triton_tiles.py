"""The geometry of a GEMM launch: what a device offers, which tile a product gets, and what follows from its strides."""

from __future__ import annotations

from typing import Any

import torch
import triton

from gptkernels.triton_launch import limits


def tiles(
    dtype: torch.dtype,
    M: int,
    N: int,
    shared_memory: int,
    processors: int = 1,
    tf32: bool = False,
    descriptors: bool = False,
    tensor_memory: bool = False,
) -> dict[str, int]:
    """The tile, warps and stages of a GEMM.

    16 bits: 64 x 64 a warp, where a k16 step reads shared memory once per 4 mma of each row; 3 steps of 64 in flight. The
    largest tile that still gives every processor one, never wider than the matrix needs. float32 on the FMA units is
    bound by registers, not by shared memory.
    """
    if dtype == torch.float32 and not tf32:
        ladder = [(64, 64, 16, 4, 3)]
    elif dtype == torch.float32:
        ladder = [(128, 128, 32, 4, 3), (64, 64, 32, 4, 3)]
    elif descriptors and shared_memory < 128 * 1024:
        # sm_120 takes its operands through registers, and a TMA loop leaves fewer of them: 64 x 32 a warp.
        ladder = [(128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (64, 64, 64, 4, 4)]
    else:
        # Sums that come from tensor memory are in registers all at once, beside what an epilogue makes of them: 64 a thread.
        ladder = [
            (128, 256, 64, 8, 3),
            (128, 128, 64, 8 if tensor_memory else 4, 3),
            (64, 128, 64, 4, 3),
            (64, 64, 64, 4, 4),
        ]
    itemsize = dtype.itemsize
    for BLOCK_M, BLOCK_N, BLOCK_K, warps, stages in ladder:  # noqa: B007  the last one is taken if none fits
        fits = (BLOCK_M + BLOCK_N) * BLOCK_K * itemsize * stages <= shared_memory
        narrow = BLOCK_M < 2 * M and BLOCK_N < 2 * N
        if fits and narrow and triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N) >= processors:
            break
    return {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": BLOCK_K,
        "num_warps": warps,
        "num_stages": stages,
    }


def plan(
    M: int,
    N: int,
    K: int,
    stride_a: int,
    stride_b: int,
    a_along_k: bool,
    b_along_k: bool,
    dtype: torch.dtype,
    tf32: bool,
    int64: bool,
    descriptors: bool,
    device: torch.device,
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and constants of a launch."""
    shared_memory, processors, _, tensor_memory = limits(device)
    constants: dict[str, Any] = tiles(dtype, M, N, shared_memory, processors, tf32, descriptors, tensor_memory)
    grid = (triton.cdiv(M, constants["BLOCK_M"]) * triton.cdiv(N, constants["BLOCK_N"]),)
    vector = 16 // dtype.itemsize
    along = (stride_a, stride_b, N, K) if a_along_k else (stride_a, stride_b, N, K, M)
    aligned = all(size % vector == 0 for size in along)
    furthest = max(max(constants["BLOCK_M"], constants["BLOCK_K"]) * stride for stride in (stride_a, N))
    furthest = max(furthest, max(constants["BLOCK_N"], constants["BLOCK_K"]) * stride_b)
    constants.update(
        A_ALONG_K=a_along_k,
        B_ALONG_K=b_along_k,
        DESCRIPTORS=descriptors and aligned and min(M, N, K, stride_a, stride_b) > 0,
        VECTOR=vector if aligned else 1,
        EVEN_K=K % constants["BLOCK_K"] == 0,
        INT64=int64 or furthest >= 2**31,
        PRECISION="tf32" if tf32 else "ieee",
    )
    return grid, constants


def vector(itemsize: int, *sizes: int) -> int:
    """The elements of a 16-byte load if all sizes are multiples of it, else 1."""
    elements = 16 // itemsize
    return elements if all(size % elements == 0 for size in sizes) else 1
