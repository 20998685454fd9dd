"""The GEMM's factors by tensor descriptor: from sm_90 on the TMA unit loads whole tiles and fills what lies beyond with 0."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def accumulate_descriptors(
    a,
    b,
    row,
    col,
    K,
    A_ALONG_K: tl.constexpr,
    B_ALONG_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile of A B at (row, col), loaded by the TMA unit: zeros beyond the matrices."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        a_tile = a.load([row, k0]) if A_ALONG_K else a.load([k0, row]).T
        b_tile = b.load([col, k0]).T if B_ALONG_K else b.load([k0, col])
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
    return acc


def blocks(constants: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Of the two factors as they lie in memory, last dimension contiguous."""
    BLOCK_M, BLOCK_N, BLOCK_K = constants["BLOCK_M"], constants["BLOCK_N"], constants["BLOCK_K"]
    a_block = [BLOCK_M, BLOCK_K] if constants["A_ALONG_K"] else [BLOCK_K, BLOCK_M]
    b_block = [BLOCK_N, BLOCK_K] if constants["B_ALONG_K"] else [BLOCK_K, BLOCK_N]
    return a_block, b_block
