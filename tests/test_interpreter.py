"""Triton's interpreter as gptkernels runs it: GPU arithmetic in every dtype, checks that find what they should."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheels for this platform")
import triton
import triton.language as tl
from interpreter_checks import checked
from triton.tools.tensor_descriptor import TensorDescriptor

from gptkernels.interpreter import interpreted

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
N = 256
SPECIAL = (
    0.0,
    -0.0,
    1.0,
    1.00390625,
    1.01171875,
    -2.5,
    65504.0,
    65520.0,
    1e-8,
    6e-8,
    1e-40,
    3.4e38,
    math.inf,
    -math.inf,
)


def values(dtype: torch.dtype, seed: int = 0, special: bool = False) -> torch.Tensor:
    x = torch.randn(N, generator=torch.Generator().manual_seed(seed)) * 3
    if special:
        x[: len(SPECIAL)] = torch.tensor(SPECIAL)
        x[len(SPECIAL)] = math.nan
    return x.to(dtype)


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, but that any NaN equals any other."""
    assert actual.dtype == expected.dtype
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(actual), nan)
    integer = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    different = (actual.view(integer) != expected.view(integer)) & ~nan
    assert not different.any(), (actual[different][:4], expected[different][:4])


@triton.jit
def binary_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = x / y
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "where":
        out = tl.where(x > y, -x, tl.abs(y))
    elif OP == "fma":
        out = tl.fma(x, y, x)
    elif OP == "clamp":
        out = tl.clamp(x, -1.5, 0.5)
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("add", torch.add),
        ("sub", torch.sub),
        ("mul", torch.mul),
        ("div", torch.div),
        ("maximum", torch.maximum),
        ("where", lambda x, y: torch.where(x > y, -x, y.abs())),
        ("fma", lambda x, y: (x.double() * y.double() + x.double()).to(x.dtype)),
        ("clamp", lambda x, y: x.clamp(-1.5, 0.5)),
    ],
)
def test_arithmetic_rounds_as_torch_does(op, expected, dtype):
    x, y = values(dtype), values(dtype, seed=1)
    out = torch.empty_like(x)
    with interpreted():
        binary_kernel[(1,)](x, y, out, op, N)
    same_bits(out, expected(x, y))


@triton.jit
def cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_casts_round_to_nearest_even(source, target):
    x = values(source, special=True)
    out = torch.empty(N, dtype=target)
    with interpreted():
        cast_kernel[(1,)](x, out, N)
    same_bits(out, x.to(target))


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_casts_between_bfloat16_and_integers(integer):
    x = values(torch.bfloat16) * 100
    whole, back = torch.empty(N, dtype=integer), torch.empty(N, dtype=torch.bfloat16)
    with interpreted():
        cast_kernel[(1,)](x, whole, N)
        cast_kernel[(1,)](whole, back, N)
    assert torch.equal(whole, x.to(integer))
    same_bits(back, whole.to(torch.bfloat16))


@triton.jit
def cast_toward_zero_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16, fp_downcast_rounding="rtz"))


def test_cast_toward_zero_drops_bits():
    x = values(torch.float32)
    out = torch.empty(N, dtype=torch.bfloat16)
    with interpreted():
        cast_toward_zero_kernel[(1,)](x, out, N)
    same_bits(out, (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16))


@triton.jit
def function_kernel(x_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if OP == "erf":
        out = tl.math.erf(x)
    elif OP == "exp2":
        out = tl.math.exp2(x)
    elif OP == "rsqrt":
        out = tl.math.rsqrt(tl.abs(x))
    elif OP == "fdiv":
        out = tl.fdiv(1.0, x)
    elif OP == "sigmoid":
        out = tl.sigmoid(x)
    tl.store(out_ptr + i, out)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("erf", torch.erf),
        ("exp2", torch.exp2),
        ("rsqrt", lambda x: x.abs().rsqrt()),
        ("fdiv", torch.reciprocal),
        ("sigmoid", torch.sigmoid),
    ],
)
def test_functions_are_accurate(op, expected):
    x = values(torch.float32)
    out = torch.empty_like(x)
    with interpreted():
        function_kernel[(1,)](x, out, op, N)
    assert torch.allclose(out.double(), expected(x.double()), rtol=4e-7, atol=1e-9)


@triton.jit
def reduce_kernel(x_ptr, out_ptr, OP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    if OP == "sum":
        out = tl.sum(x, 1)
    elif OP == "max":
        out = tl.max(x, 1)
    elif OP == "min":
        out = tl.min(x, 1)
    elif OP == "argmax":
        out = tl.argmax(x, 1)
    tl.store(out_ptr + m, out)


def sum_by_halves(x: torch.Tensor) -> torch.Tensor:
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x[:, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("sum", sum_by_halves),
        ("max", lambda x: x.amax(1)),
        ("min", lambda x: x.amin(1)),
        ("argmax", lambda x: x.float().argmax(1).int()),
    ],
)
def test_reductions_stay_in_their_dtype(op, expected, dtype):
    x = values(dtype).view(16, 16)
    want = expected(x)
    out = torch.empty_like(want)
    with interpreted():
        reduce_kernel[(1,)](x, out, op, 16, 16)
    assert torch.equal(out, want)


@triton.jit
def welford(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    count = count_a + count_b
    delta = mean_b - mean_a
    return count, mean_a + delta * count_b / count, m2_a + m2_b + delta * delta * count_a * count_b / count


@triton.jit
def own_combine_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    count, mean, m2 = tl.reduce((tl.full((N,), 1.0, tl.float32), x, tl.zeros((N,), tl.float32)), 0, welford)
    tl.store(out_ptr, mean)
    tl.store(out_ptr + 1, m2 / count)
    tl.store(out_ptr + 2 + i, tl.cumsum(x, 0))


def test_own_combine_functions_and_scans():
    x = values(torch.float32)
    out = torch.empty(N + 2)
    with interpreted():
        own_combine_kernel[(1,)](x, out, N)
    assert torch.allclose(out[:2], torch.stack([x.mean(), x.var(unbiased=False)]), rtol=2e-6)
    assert torch.allclose(out[2:], x.cumsum(0), rtol=1e-5, atol=1e-4)


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + i[:, None] * K + k[None, :])
        b = tl.load(b_ptr + i[:, None] * K + k[None, :])
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    tl.store(c_ptr + i[:, None] * BLOCK + i[None, :], acc)


def dot(a: torch.Tensor, b: torch.Tensor, precision: str = "ieee") -> torch.Tensor:
    c = torch.empty(a.shape[0], b.shape[0])
    with interpreted():
        dot_kernel[(1,)](a, b, c, a.shape[1], a.shape[0], 16, precision)
    return c


@pytest.mark.parametrize("dtype", DTYPES)
def test_dot_sums_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 8, (16, 64), generator=generator).to(dtype) for _ in range(2))
    assert torch.equal(dot(a, b), a.float() @ b.float().T)
    a, b = (torch.randn(16, 64, generator=generator).to(dtype) for _ in range(2))
    assert torch.allclose(dot(a, b).double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)


def test_dot_rounds_to_tf32_only_when_asked():
    a, b = (torch.randn(16, 64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    exact = a.double() @ b.double().T
    error = {p: (dot(a, b, p).double() - exact).abs().max().item() for p in ("ieee", "tf32")}
    assert error["ieee"] < 1e-5 < 1e-3 < error["tf32"] < 1e-1, error


@triton.jit
def loop_index_kernel(out_ptr, stop, STEP: tl.constexpr):
    for i in range(0, stop, STEP):
        tl.store(out_ptr + i.to(tl.int64), i * 2)
    for i in tl.range(1, stop, STEP, num_stages=2):
        tl.store(out_ptr + i.to(tl.int64), i * 3)


def test_the_index_of_a_loop_is_a_tensor():
    out = torch.zeros(6, dtype=torch.int32)
    with interpreted(), checked():
        loop_index_kernel[(1,)](out, 6, 2)
    assert out.tolist() == [0, 3, 4, 9, 8, 15]


@triton.jit
def philox_kernel(out_ptr, seed, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b, c, d = tl.randint4x(seed, i)
    tl.store(out_ptr + i * 4, a)
    tl.store(out_ptr + i * 4 + 1, b)
    tl.store(out_ptr + i * 4 + 2, c)
    tl.store(out_ptr + i * 4 + 3, d)


def test_philox_gives_the_published_words():
    out = torch.empty(16, 4, dtype=torch.int32)
    with interpreted(), checked():
        philox_kernel[(1,)](out, 0, 16)
    # The known answer of Philox 4x32-10 for a zero key and counter (Salmon et al., 2011, Random123's kat_vectors).
    assert [word & 0xFFFFFFFF for word in out[0].tolist()] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert len(set(out.flatten().tolist())) == 64


@triton.jit
def descriptor_kernel(source, out_ptr, M, N, BLOCK: tl.constexpr):
    target = tl.make_tensor_descriptor(out_ptr, shape=[M, N], strides=[N, 1], block_shape=[BLOCK, BLOCK])
    m, n = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    tile = source.load([m, n])
    target.store([m, n], (tile.to(tl.float32) + 1.0).to(tile.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor_descriptors_clip_at_the_edge(dtype):
    x = values(dtype)[:240].view(10, 24)
    out = torch.zeros_like(x)
    source = TensorDescriptor.from_tensor(x, [16, 16])
    with interpreted(), checked():
        descriptor_kernel[(1, 2)](source, out, 10, 24, 16)
    same_bits(out, (x.float() + 1).to(dtype))
