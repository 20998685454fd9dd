"""LoRA: frozen projections with a trained difference of low rank (Hu et al. 2021, arXiv 2106.09685).

    W = W0 + alpha / rank * up down,    down (rank, in) random at first, up (out, rank) zero

The sum is made before each use, so that the fused operators take part unchanged: a product of C x rank x C a layer more, and
a gradient of W's size for a moment, against optimizer states and stored gradients of the low-rank factors alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from model.config import LoraConfig
from model.fast import Model
from model.reference import Block, Linear


class LowRank(nn.Module):
    """weight + scale * up down."""

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.scale = config.alpha / config.rank
        self.down = nn.Parameter(weight.new_empty(config.rank, columns).normal_(std=1.0 / math.sqrt(columns)))
        self.up = nn.Parameter(weight.new_zeros(rows, config.rank))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # the operators round the sum themselves, once
            return torch.addmm(weight, self.up, self.down, alpha=self.scale)


def projections(model: Model) -> Iterator[Linear]:
    """The linear layers of attention and MLP."""
    for block in cast("list[Block]", list(model.transformer.h)):
        yield from (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)


def add_lora(model: Model, config: LoraConfig) -> None:
    """Freeze a model and give each projection a low-rank difference to train; the function is the same until it has."""
    model.requires_grad_(False)
    for linear in projections(model):
        # unsafe leaves out a trial of the sum, which on the meta device, where there is no autocast, cannot be made.
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, config), unsafe=True)


def merge_lora(model: Model) -> None:
    """Make plain weights of the sums, and everything trainable again; nothing where no LoRA is."""
    for linear in projections(model):
        if parametrize.is_parametrized(linear, "weight"):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    model.requires_grad_(True)
