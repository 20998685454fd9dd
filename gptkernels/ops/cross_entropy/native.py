"""forward() and gradients() of the C++ implementation; PyTorch picks it by the tensors' device.

There is no backward(): logits are not held, and with the chunk's logits at hand the gradients cost two products, against
three when a backward has to make the logits again. So the forward that needs gradients makes them at once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, vocab_size: int) -> Tensor:
    """The loss."""
    return torch.ops.gptkernels.linear_cross_entropy_forward(
        x.contiguous(), weight.contiguous(), targets.contiguous(), ignore_index, mean, vocab_size
    )


def gradients(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients dx and dweight."""
    return torch.ops.gptkernels.linear_cross_entropy_gradients(
        x.contiguous(), weight.contiguous(), targets.contiguous(), ignore_index, mean, vocab_size
    )
