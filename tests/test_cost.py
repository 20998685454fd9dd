"""The cost formulas against hand-counted cases and against torch's own counter of GEMM flops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from gptkernels import cost
from gptkernels.cost import Cost, OpCost


def counted(forward, *inputs) -> tuple[int, int]:
    """Flops of the matrix products of a function's forward and of its backward, as torch counts them."""
    with FlopCounterMode(display=False) as mode:
        y = forward(*inputs)
    forward_flops = mode.get_total_flops()
    with FlopCounterMode(display=False) as mode:
        y.sum().backward()
    return forward_flops, mode.get_total_flops()


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def flops(c: OpCost) -> tuple[int, int]:
    return c.forward.flops, c.backward.flops


def test_linear_counts_what_torch_counts():
    assert flops(cost.linear(6, 8, 10, 4)) == counted(F.linear, *leaves((6, 8), (10, 8), (10,)))


def test_mlp_counts_what_torch_counts():
    def mlp(x, w_fc, w_proj):
        return F.linear(F.gelu(F.linear(x, w_fc)), w_proj)

    assert flops(cost.gelu_mlp(6, 8, 32, 4)) == counted(mlp, *leaves((6, 8), (32, 8), (8, 32)))


def test_cross_entropy_counts_what_torch_counts():
    def head(x, weight):
        return F.cross_entropy(F.linear(x, weight), torch.zeros(6, dtype=torch.int64))

    assert flops(cost.linear_cross_entropy(6, 8, 50, 4)) == counted(head, *leaves((6, 8), (50, 8)))


def test_attention_forward_counts_what_torch_counts():
    def attention(q, k, v):
        return torch.softmax(q @ k.transpose(-2, -1), -1) @ v

    shape = (2, 3, 16, 8)
    forward, backward = counted(attention, *leaves(shape, shape, shape))
    full = cost.attention(*shape, 4, causal=False)
    assert full.forward.flops == forward
    # Four products backward, and the convention's fifth: the scores are computed again.
    assert full.backward.flops * 4 == backward * 5
    causal = cost.attention(*shape, 4)
    assert flops(causal) == (forward // 2, full.backward.flops // 2)


def test_bytes_by_hand():
    # linear, 2 rows 3 -> 5, fp32: x 6, W 15, b 5, y 10 numbers; backward reads dy 10, x 6, W 15, writes dx 6, dW 15, db 5.
    linear = cost.linear(2, 3, 5, 4)
    assert linear.forward.bytes == (6 + 15 + 5 + 10) * 4
    assert linear.backward.bytes == (10 + 6 + 6 + 2 * (15 + 5)) * 4
    # attention, one head of 4 tokens of 2: q, k, v, out of 8 numbers in bf16, lse of 4 in fp32.
    attention = cost.attention(1, 1, 4, 2, 2)
    assert attention.forward.bytes == 4 * 8 * 2 + 4 * 4
    assert attention.backward.bytes == 8 * 8 * 2 + 4 * 4
    # cross-entropy: 2 rows of 3, 7 columns, int64 targets; the logits are no traffic.
    head = cost.linear_cross_entropy(2, 3, 7, 4)
    assert head.forward.bytes == (6 + 21) * 4 + 2 * 8
    assert head.backward.bytes == 2 * (6 + 21) * 4 + 2 * 8
    # layer_norm with residual: x, residual in, y, sum out; weight, bias; mean and rstd of each row in fp32.
    norm = cost.layer_norm(2, 3, 2, residual=True)
    assert norm.forward.bytes == 4 * 6 * 2 + 2 * 3 * 2 + 2 * 2 * 4
    # mlp: x, y, hidden pre-activation, weights and biases.
    mlp = cost.gelu_mlp(2, 3, 12, 4)
    assert mlp.forward.bytes == (2 * 6 + 24 + 2 * 36 + 3 + 12) * 4


def test_layer_norm_counts_its_element_wise_work():
    plain, fused = cost.layer_norm(4, 8, 4), cost.layer_norm(4, 8, 4, residual=True)
    assert flops(plain) == (4 * 8 * 7, 4 * 8 * 13)
    assert fused.forward.flops - plain.forward.flops == 4 * 8  # the addition


def test_costs_add_up():
    one = OpCost(Cost(2, 3), Cost(5, 7))
    assert (one + one * 2) == OpCost(Cost(6, 9), Cost(15, 21))
    assert one.both == Cost(7, 10)


def test_training_step_is_six_flops_a_weight_and_token():
    L, H, C, V, B, T = 2, 2, 32, 65, 3, 16
    step = cost.training_step(L, H, C, V, B, T, 4).both.flops
    weights = L * 12 * C * C + V * C
    attention = cost.attention(B, H, T, C // H, 4).both.flops * L
    norms = cost.layer_norm(B * T, C, 4).both.flops + 2 * L * cost.layer_norm(B * T, C, 4, residual=True).both.flops
    assert step == 6 * weights * B * T + attention + norms


@pytest.mark.parametrize(
    ("work", "seconds", "fraction"),
    [
        (Cost(flops=100, bytes=1), 2.0, 0.5),  # 100 flops at 100 a second: the flops bind
        (Cost(flops=1, bytes=40), 8.0, 0.5),  # 40 bytes at 10 a second: the bytes bind
        (Cost(flops=100, bytes=10), 1.0, 1.0),  # both bind
    ],
)
def test_fraction_of_roof(work, seconds, fraction):
    assert cost.fraction_of_roof(work, seconds, 100.0, 10.0) == pytest.approx(fraction)
