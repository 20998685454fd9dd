"""What each operator must compute and move, and what share of a machine's roof a time achieves.

Conventions, the same for every implementation, so that ratios compare like with like:

* flops counts the matrix products of the math (a multiply and an add are two), not what an implementation
  happens to run: recomputed logits, recomputed attention scores and element-wise work beside a GEMM are free.
  Attention is 4*B*H*T*T*D forward, halved when causal, and 2.5x that backward (FlashAttention-2's convention).
* bytes is compulsory traffic: every input read once, every output written once, and what the forward must leave
  for the backward (row statistics, the MLP's pre-activation). A cache never makes it smaller, a bad kernel only larger.
* LayerNorm has no matrix product, so its element-wise operations are counted.

Symbols: B batch, H heads, T tokens, D head dim, C width, F MLP width, N = B*T rows, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

STATISTIC_BYTES = 4  # lse, mean and rstd are fp32 in every dtype
INDEX_BYTES = 8  # torch's targets are int64

# Per element of LayerNorm: mean 1, centre 1, variance 2, normalise 1, scale and shift 2.
LAYER_NORM_FORWARD_FLOPS = 7
# Per element: xhat 2, dy*w 1, its two row means 3, dx 4, dweight 2, dbias 1.
LAYER_NORM_BACKWARD_FLOPS = 13


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes of main memory that a piece of work needs at least."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class OpCost:
    """Forward and backward cost of an operator."""

    forward: Cost
    backward: Cost

    @property
    def both(self) -> Cost:
        """Forward and backward together."""
        return self.forward + self.backward

    def __add__(self, other: OpCost) -> OpCost:
        return OpCost(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> OpCost:
        return OpCost(self.forward * times, self.backward * times)


def attention(B: int, H: int, T: int, D: int, dtype_bytes: int, causal: bool = True) -> OpCost:
    """Softmax attention on (B, H, T, D): q, k, v to out and lse; q, k, v, out, lse, dout to dq, dk, dv."""
    flops = 4 * B * H * T * T * D // (2 if causal else 1)
    tensor = B * H * T * D * dtype_bytes
    lse = B * H * T * STATISTIC_BYTES
    return OpCost(Cost(flops, 4 * tensor + lse), Cost(5 * flops // 2, 8 * tensor + lse))


def layer_norm(N: int, C: int, dtype_bytes: int, residual: bool = False) -> OpCost:
    """LayerNorm of N rows of width C; with a residual the sum is an output and its gradient an input."""
    tensor = N * C * dtype_bytes
    parameters = 2 * C * dtype_bytes  # weight and bias, or their gradients
    statistics = 2 * N * STATISTIC_BYTES
    forward = Cost(
        N * C * (LAYER_NORM_FORWARD_FLOPS + residual),
        (4 if residual else 2) * tensor + parameters + statistics,
    )
    backward = Cost(
        N * C * (LAYER_NORM_BACKWARD_FLOPS + residual),
        # dy and x read, dx written; the sum's gradient is one more read, dresidual is dx itself.
        (4 if residual else 3) * tensor + 2 * parameters + statistics,
    )
    return OpCost(forward, backward)


def linear(N: int, C_in: int, C_out: int, dtype_bytes: int, bias: bool = True) -> OpCost:
    """y = x W^T + b on N rows: one GEMM forward, two (dx and dW) backward."""
    flops = 2 * N * C_in * C_out
    x, y, weight = N * C_in, N * C_out, C_in * C_out + (C_out if bias else 0)
    return OpCost(
        Cost(flops, (x + weight + y) * dtype_bytes),
        Cost(2 * flops, (y + 2 * x + 2 * weight) * dtype_bytes),
    )


def gelu_mlp(N: int, C: int, F: int, dtype_bytes: int) -> OpCost:
    """gelu(x W_fc^T + b_fc) W_proj^T + b_proj on N rows: two GEMMs forward, four backward."""
    flops = 4 * N * C * F
    rows, pre_activation, weights = N * C, N * F, 2 * C * F + C + F
    return OpCost(
        Cost(flops, (2 * rows + pre_activation + weights) * dtype_bytes),
        Cost(2 * flops, (3 * rows + pre_activation + 2 * weights) * dtype_bytes),
    )


def linear_cross_entropy(N: int, C: int, V: int, dtype_bytes: int) -> OpCost:
    """Mean cross-entropy of x W^T on N rows; the logits are not traffic, since they need not be held."""
    flops = 2 * N * C * V
    rows, weight = N * C, V * C
    targets = N * INDEX_BYTES
    return OpCost(
        Cost(flops, (rows + weight) * dtype_bytes + targets),
        Cost(2 * flops, 2 * (rows + weight) * dtype_bytes + targets),
    )


def training_step(L: int, H: int, C: int, V: int, B: int, T: int, dtype_bytes: int, F: int | None = None) -> OpCost:
    """Forward and backward of a pre-norm GPT with L layers and a tied head of V columns, without the optimizer.

    F is the MLP's width, 4*C if not given. Embedding look-ups are left out: they are a copy of N rows.
    """
    N, F = B * T, 4 * C if F is None else F
    block = (
        layer_norm(N, C, dtype_bytes, residual=True) * 2
        + linear(N, C, 3 * C, dtype_bytes)
        + attention(B, H, T, C // H, dtype_bytes)
        + linear(N, C, C, dtype_bytes)
        + gelu_mlp(N, C, F, dtype_bytes)
    )
    return block * L + layer_norm(N, C, dtype_bytes) + linear_cross_entropy(N, C, V, dtype_bytes)


def fraction_of_roof(cost: Cost, seconds: float, flops_per_second: float, bytes_per_second: float) -> float:
    """The share of the roofline that `seconds` achieves: the time that the binding roof needs, over the time taken."""
    least = max(cost.flops / flops_per_second, cost.bytes / bytes_per_second)
    return least / seconds
