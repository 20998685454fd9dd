"""The GPT as a careful PyTorch user writes it: torch's fused attention, LayerNorm, GELU and cross-entropy.

The operators have the names of ours, so that one clock can be put around both (benchmarks/breakdown.py), and are the best
eager column of `bench ops` too.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.reference import GPT, sinusoidal_positions


class BestEager(nn.Module):
    """What ours has to beat."""

    def __init__(self, weights: GPT) -> None:
        """Around the reference's own Parameter objects."""
        super().__init__()
        self.config = weights.config
        self.transformer, self.lm_head = weights.transformer, weights.lm_head
        if self.config.pos == "sinusoidal":
            table = sinusoidal_positions(self.config.context, self.config.n_embd)
            self.register_buffer("positions", table.to(self.lm_head.weight), persistent=False)

    def forward(self, idx: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        return linear(self.hidden(idx), self.lm_head.weight)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return linear_cross_entropy(self.hidden(idx).flatten(0, 1), self.lm_head.weight, targets.flatten())

    def hidden(self, idx: Tensor) -> Tensor:
        """(B, T, C): what the head reads. x is the residual stream, h its normalised value."""
        x = self.look_up(idx)
        h = layer_norm(x, *parameters(self.transformer.h[0].ln_1))
        next_norms = [block.ln_1 for block in self.transformer.h[1:]] + [self.transformer.ln_f]
        for block, next_norm in zip(self.transformer.h, next_norms, strict=True):
            h, x = layer_norm(self.attend(block.attn, h), *parameters(block.ln_2), residual=x)
            h, x = layer_norm(self.think(block.mlp, h), *parameters(next_norm), residual=x)
        return h

    def look_up(self, idx: Tensor) -> Tensor:
        """(B, T, C): token plus position."""
        x = F.embedding(idx, self.transformer.wte.weight)
        if self.config.pos == "learned":
            return x + self.transformer.wpe.weight[: idx.shape[1]]
        return x + self.positions[: idx.shape[1]] if self.config.pos == "sinusoidal" else x

    def attend(self, attn: nn.Module, h: Tensor) -> Tensor:
        """The attention branch."""
        out = causal_attention_packed(linear(h, *parameters(attn.c_attn)), self.config.n_head)
        return linear(out, *parameters(attn.c_proj))

    def think(self, mlp: nn.Module, h: Tensor) -> Tensor:
        """The MLP branch."""
        approximate = "tanh" if self.config.act == "gelu_tanh" else "none"
        return gelu_mlp(h, *parameters(mlp.c_fc), *parameters(mlp.c_proj), approximate=approximate)


def parameters(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias."""
    return layer.weight, layer.bias


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None):
    """torch's LayerNorm with the reference's epsilon; with a residual of the sum, and the sum too."""
    total = x if residual is None else x + residual
    h = F.layer_norm(total, weight.shape, weight, bias, 1e-5)
    return h if residual is None else (h, total)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's linear."""
    return F.linear(x, weight, bias)


def causal_attention_packed(qkv: Tensor, H: int) -> Tensor:
    """torch's fused attention on (B, T, 3 C), to (B, T, C)."""
    B, T, width = qkv.shape
    C = width // 3
    q, k, v = (x.view(B, T, H, C // H).transpose(1, 2) for x in qkv.split(C, dim=2))
    return causal_attention(q, k, v).transpose(1, 2).reshape(B, T, C)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's fused attention on (B, H, T, D)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def gelu_mlp(
    x: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, *, approximate: str = "tanh"
) -> Tensor:
    """torch's linear and GELU."""
    return F.linear(F.gelu(F.linear(x, w_fc, b_fc), approximate=approximate), w_proj, b_proj)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's cross-entropy on all the logits."""
    return F.cross_entropy(F.linear(x, weight), targets)
