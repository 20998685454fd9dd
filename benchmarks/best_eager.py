"""The GPT as a careful PyTorch user writes it: what ours has to beat."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.reference import GPT, sinusoidal_positions


class BestEager(nn.Module):
    """The GPT as a careful PyTorch user writes it: torch's fused attention, LayerNorm, GELU and cross-entropy."""

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
        x = F.embedding(idx, self.transformer.wte.weight)
        if self.config.pos == "learned":
            x = x + self.transformer.wpe.weight[: idx.shape[1]]
        elif self.config.pos == "sinusoidal":
            x = x + self.positions[: idx.shape[1]]
        for block in self.transformer.h:
            x = x + self.attend(block.attn, norm(block.ln_1, x))
            x = x + self.think(block.mlp, norm(block.ln_2, x))
        return F.linear(norm(self.transformer.ln_f, x), self.lm_head.weight)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self(idx).flatten(0, 1), targets.flatten())

    def attend(self, attn: nn.Module, h: Tensor) -> Tensor:
        """The attention branch."""
        B, T, C = h.shape
        H = self.config.n_head
        qkv = F.linear(h, attn.c_attn.weight, attn.c_attn.bias)
        q, k, v = (x.view(B, T, H, C // H).transpose(1, 2) for x in qkv.split(C, dim=2))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(out.transpose(1, 2).reshape(B, T, C), attn.c_proj.weight, attn.c_proj.bias)

    def think(self, mlp: nn.Module, h: Tensor) -> Tensor:
        """The MLP branch."""
        approximate = "tanh" if self.config.act == "gelu_tanh" else "none"
        inner = F.gelu(F.linear(h, mlp.c_fc.weight, mlp.c_fc.bias), approximate=approximate)
        return F.linear(inner, mlp.c_proj.weight, mlp.c_proj.bias)


def norm(ln: nn.Module, x: Tensor) -> Tensor:
    """torch's LayerNorm with the reference's epsilon."""
    return F.layer_norm(x, ln.weight.shape, ln.weight, ln.bias, 1e-5)
