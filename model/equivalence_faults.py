"""Known bugs of GPT kernels, each as a wrong function around the right operator: what `check --sabotage` plants.

They stand at the operator boundary: no kernel is edited. Where a kernel cannot be led to the error by its arguments, the
operator is written out with it in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptkernels import causal_attention
from model.equivalence_sites import Choice, Operator, Site

Wrong = Callable[[Operator], Operator]
# The first block's input and the last block's output see less than the middle of the model: faults stand in block 1.
LAYER = 1


@dataclass(frozen=True)
class Fault:
    """A bug: what it is, the operator call that it replaces (within a block), and the settings that it shows itself under."""

    name: str
    place: str
    wrong: Wrong
    settings: tuple[str, ...] = ()

    @property
    def site(self) -> str:
        """The name of the place in the model."""
        return self.place if self.place == "loss" else f"h.{LAYER}.{self.place}"

    def planted(self) -> Choice:
        """The choice that plants it: the wrong function is made once, since it may remember what it saw."""
        made: dict[str, Operator] = {}

        def choose(site: Site, operator: Operator) -> Operator:
            if site.name != self.site:
                return operator
            return made.setdefault(site.name, self.wrong(operator))

        return choose


def attention_by(call: Callable[[Tensor, Tensor, Tensor, str], Tensor]) -> Wrong:
    """Attention from a function of q, k, v (B, H, T, D) each and the backend, without dropout."""

    def wrong(operator: Operator) -> Operator:
        def attend(qkv: Tensor, *, backend: str, **kwargs: Any) -> Tensor:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            return call(q, k, v, backend).transpose(1, 2)

        return attend

    return wrong


def sees_the_next(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """With one query less than keys, query i sees key i + 1; the last query has no next key."""
    early = causal_attention(q[:, :, :-1], k, v, backend=backend)
    return torch.cat((early, causal_attention(q[:, :, -1:], k, v, backend=backend)), dim=2)


def misses_itself(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """With one key less than queries, query i sees key i - 1 at most."""
    return causal_attention(q, k[:, :, :-1], v[:, :, :-1], backend=backend)


def softmax_without_row_sum(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """The right value, but the gradient takes the normaliser for a constant: dS = P dP, without the row sum of P dP."""
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = (q @ k.mT / math.sqrt(q.shape[3])).masked_fill(future, -math.inf)
    return (scores - torch.logsumexp(scores, -1, keepdim=True).detach()).exp() @ v


def norm_by(statistics: Callable[[Tensor, float], tuple[Tensor, Tensor]]) -> Wrong:
    """LayerNorm from a function of the rows and eps that gives mean and 1 / deviation."""

    def wrong(operator: Operator) -> Operator:
        def norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: Tensor, backend: str) -> Any:
            total = x + residual
            mean, rstd = statistics(total, 1e-5)
            y = (total - mean) * rstd * weight
            return (y if bias is None else y + bias), total

        return norm

    return wrong


def eps_outside(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """1 / (sqrt(var) + eps)."""
    return x.mean(-1, keepdim=True), 1.0 / (x.var(-1, unbiased=False, keepdim=True).sqrt() + eps)


def unbiased(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The variance over C - 1."""
    return x.mean(-1, keepdim=True), torch.rsqrt(x.var(-1, unbiased=True, keepdim=True) + eps)


def constant_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The right values, but the gradient takes them for constants: its two mean terms are missing."""
    mean, rstd = x.mean(-1, keepdim=True), torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + eps)
    return mean.detach(), rstd.detach()


def lost_residual(operator: Operator) -> Operator:
    """No gradient goes down the residual stream."""
    return lambda *args, residual, **kwargs: operator(*args, residual=residual.detach(), **kwargs)


def unscaled(operator: Operator) -> Operator:
    """Scores without 1 / sqrt(D)."""
    return lambda qkv, **kwargs: operator(qkv, **{**kwargs, "scale": 1.0})


def stale_seed(operator: Operator) -> Operator:
    """Dropout with the seed of the first call, for ever."""
    first: list[int] = []

    def attend(qkv: Tensor, *, seed: int | None = None, **kwargs: Any) -> Tensor:
        if seed is not None:
            first.append(seed)
        return operator(qkv, seed=first[0] if first else None, **kwargs)

    return attend


def other_gelu(operator: Operator) -> Operator:
    """GELU by erf where the tanh formula is asked for."""
    return lambda *args, **kwargs: operator(*args, **{**kwargs, "approximate": "none"})


def no_output_bias(operator: Operator) -> Operator:
    """The MLP without its second bias."""
    return lambda x, w_fc, b_fc, w_proj, b_proj, **kwargs: operator(x, w_fc, b_fc, w_proj, None, **kwargs)


def no_bias(operator: Operator) -> Operator:
    """A projection without its bias."""
    return lambda x, weight, bias, **kwargs: operator(x, weight, None, **kwargs)


def transposed(operator: Operator) -> Operator:
    """A square weight read (in, out)."""
    return lambda x, weight, *args, **kwargs: operator(x, weight.T, *args, **kwargs)


def short_bias_gradient(operator: Operator) -> Operator:
    """The gradient of the bias leaves the last row out."""

    def project(x: Tensor, weight: Tensor, bias: Tensor, **kwargs: Any) -> Tensor:
        y = operator(x, weight, None, **kwargs)
        return torch.cat((y[..., :-1, :] + bias, y[..., -1:, :] + bias.detach()), dim=-2)

    return project


def narrow_sums(operator: Operator) -> Operator:
    """Inputs rounded to bfloat16 on their way into a float32 product."""

    def project(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return operator(x.bfloat16().to(x.dtype), weight.bfloat16().to(weight.dtype), *args, **kwargs)

    return project


def by_chance(operator: Operator) -> Operator:
    """A last bit that depends on the moment, as sums by atomic additions have it: each error is small enough."""
    calls: list[int] = []

    def project(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(0)
        y: Tensor = operator(*args, **kwargs)
        return y * (1.0 + (len(calls) % 2) * torch.finfo(y.dtype).eps)

    return project


def head_without_gradient(operator: Operator) -> Operator:
    """The loss gives the head's weight no gradient."""
    return lambda x, weight, *args, **kwargs: operator(x, weight.detach(), *args, **kwargs)


FAULTS = (
    Fault("mask off by one: a token sees the next one", "attn", attention_by(sees_the_next)),
    Fault("mask off by one: a token does not see itself", "attn", attention_by(misses_itself)),
    Fault("scores not scaled by 1/sqrt(D)", "attn", unscaled),
    Fault("gradient of softmax without the row sum", "attn", attention_by(softmax_without_row_sum)),
    Fault("stale dropout seed", "attn", stale_seed, ("dropout=0.1",)),
    Fault("eps outside the root", "ln_2", norm_by(eps_outside)),
    Fault("variance over C - 1", "ln_2", norm_by(unbiased)),
    Fault("gradient of the norm without its mean terms", "ln_2", norm_by(constant_statistics)),
    Fault("gradient of the residual lost", "ln_2", lost_residual),
    Fault("GELU by erf instead of tanh", "mlp", other_gelu),
    Fault("bias of the MLP's output dropped", "mlp", no_output_bias),
    Fault("bias of a projection dropped", "attn.c_proj", no_bias),
    Fault("weight transposed", "attn.c_proj", transposed),
    Fault("gradient of a bias without the last row", "attn.c_attn", short_bias_gradient),
    Fault("inputs rounded to bfloat16", "attn.c_attn", narrow_sums),
    Fault("last bits left to chance", "attn.c_attn", by_chance),
    Fault("head without a gradient from the loss", "loss", head_without_gradient, ("tie=off",)),
)
