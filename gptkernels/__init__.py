"""Fused kernels for GPT-style transformers: one call an operator, several backends behind it."""

from gptkernels.backend import available_backends
from gptkernels.ops.attention.api import causal_attention, causal_attention_packed
from gptkernels.ops.cross_entropy.api import linear_cross_entropy
from gptkernels.ops.layer_norm.api import layer_norm
from gptkernels.ops.linear.api import linear
from gptkernels.ops.mlp.api import gelu_mlp

__all__ = [
    "available_backends",
    "causal_attention",
    "causal_attention_packed",
    "gelu_mlp",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
]
