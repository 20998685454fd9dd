"""linear_cross_entropy on the CUDA kernels (csrc/cross_entropy) between torch's products (chunks.py).

The same code runs backend="simt" on CPU tensors.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from gptkernels.ops.cross_entropy import chunks


def count(targets: Tensor, ignore_index: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """chunks.Kernels.count."""
    used, wrong = torch.ops.gptkernels_kernels.cross_entropy_count(targets, ignore_index, vocab_size).unbind()
    return used, wrong == 0


KERNELS = SimpleNamespace(count=count, rows=torch.ops.gptkernels_kernels.cross_entropy_rows)


def linear_cross_entropy_forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, vocab_size: int
) -> Tensor:
    """The loss (chunks.forward)."""
    return chunks.forward(KERNELS, x, weight, targets, ignore_index, mean, vocab_size)


def linear_cross_entropy_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, dx and dweight in fp32 (chunks.gradients)."""
    return chunks.gradients(KERNELS, x, weight, targets, ignore_index, mean, vocab_size)
