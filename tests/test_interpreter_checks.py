"""The interpreter as a context: what it launches, what it leaves behind, and what its checks find."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheels for this platform")
import triton
import triton.language as tl
from interpreter_checks import OutOfBounds, Race, checked
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from gptkernels.interpreter import interpreted

N = 256


def values(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(0)).to(dtype)


@triton.jit
def cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@triton.jit
def helper(x):
    return x + 1


@triton.autotune([triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128}, num_warps=8)], key=["size"])
@triton.jit
def scale_kernel(x_ptr, out_ptr, size, scale, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < size, other=0.0) * scale, mask=i < size)


def scale_on(x: torch.Tensor, scale: float = 0.1) -> torch.Tensor:
    out = torch.empty_like(x)
    scale_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, out, x.numel(), scale)
    return out


def test_a_float_argument_is_a_float32_and_masked_lanes_touch_nothing():
    x = values(torch.float32)[:100].clone()
    with interpreted(), checked():
        assert torch.equal(scale_on(x), x * torch.tensor(0.1))


def test_a_misspelled_argument_raises():
    x = values(torch.float32)
    with interpreted(), pytest.raises(TypeError, match="BLOCKS"):
        cast_kernel[(1,)](x, x, N=N, BLOCKS=3)


def snapshot() -> dict:
    watched = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.block_type, JITFunction, triton.runtime.Autotuner)
    watched += (triton.runtime.interpreter.InterpreterBuilder, triton.runtime.interpreter)
    return {owner: dict(vars(owner)) for owner in watched}


@triton.jit
def failing_kernel(x_ptr):
    tl.static_assert(False, "as told")


def test_nothing_is_left_behind():
    x = values(torch.float32)
    with interpreted():  # once, so that what is found lazily exists
        scale_on(x)
    before, names = snapshot(), set(globals())
    with interpreted():
        with interpreted():
            scale_on(x)
        scale_on(x)
        with pytest.raises(AssertionError, match="as told"):
            failing_kernel[(1,)](x)
    with pytest.raises(ZeroDivisionError), interpreted():
        raise ZeroDivisionError
    assert snapshot() == before
    assert set(globals()) == names
    with (
        pytest.raises(RuntimeError, match="active drivers")
        if not torch.cuda.is_available()
        else pytest.raises(ValueError)
    ):
        scale_on(x)
    with pytest.raises(RuntimeError, match="outside"):
        helper(1)


def test_kernels_compile_after_being_interpreted():
    x = values(torch.bfloat16)
    with interpreted():
        cast_kernel[(1,)](x, x, N)
    source = ASTSource(cast_kernel, {"x_ptr": "*bf16", "out_ptr": "*fp32", "N": "constexpr"}, constexprs={"N": N})
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": True})
    assert "st.global" in compiled.asm["ptx"]


def test_threads_take_turns():
    x, results = values(torch.float32), []

    def work(scale: float) -> None:
        with interpreted():
            results.append(torch.equal(scale_on(x, scale), x * torch.tensor(scale)))

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (0.1, 0.2, 0.3, 0.4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


@triton.jit
def shift_kernel(x_ptr, out_ptr, size, read, write, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i + read, mask=i < size)
    tl.store(out_ptr + i + write, x, mask=i < size)


@pytest.mark.parametrize(
    ("read", "write", "message"),
    [
        (1, 0, r"shift_kernel, program \(6, 0, 0\): load of 1 .* offset 100 of x_ptr, whose offsets are 0 to 99"),
        (0, 1, r"shift_kernel, program \(6, 0, 0\): store of 1 .* offset 100 of out_ptr"),
        (-3, 0, r"program \(0, 0, 0\): load of 3 .* offset -3 of x_ptr"),
    ],
)
def test_out_of_bounds_is_found(read, write, message):
    storage = torch.randn(200), torch.empty(200)
    x, out = (s[50:150] for s in storage)  # the storage goes on: the view is what counts
    with interpreted(), checked():
        shift_kernel[(7,)](x, out, 100, 0, 0, BLOCK=16)
        with pytest.raises(OutOfBounds, match=message):
            shift_kernel[(7,)](x, out, 100, read, write, BLOCK=16)
    if sys.version_info >= (3, 11):
        with interpreted(), pytest.raises(AssertionError) as raised:
            failing_kernel[(1,)](x)
        assert "in kernel failing_kernel" in raised.value.__notes__[0]


@pytest.mark.parametrize(
    ("read", "write", "message"),
    [
        (0, 1, r"program \(1, 0, 0\) makes a load at offset 16 of x_ptr, which program \(0, 0, 0\) has written"),
        (1, 0, r"program \(1, 0, 0\) makes a store at offset 16 of x_ptr, which program \(0, 0, 0\) has read"),
    ],
)
def test_races_between_reader_and_writer_are_found_in_both_orders(read, write, message):
    x = torch.randn(100)
    with interpreted(), checked():
        shift_kernel[(6,)](x, x, 96, 0, 0, BLOCK=16)
        with pytest.raises(Race, match=message):
            shift_kernel[(6,)](x, x, 96, read, write, BLOCK=16)


@triton.jit
def column_sum_kernel(x_ptr, out_ptr, ATOMIC: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + tl.program_id(0) * N + i)
    if ATOMIC:
        tl.atomic_add(out_ptr + i, x)
    else:
        tl.store(out_ptr + i, tl.load(out_ptr + i) + x)


def test_lost_updates_are_races_and_atomics_are_not():
    x, out = torch.randn(4, 16), torch.zeros(16)
    with interpreted(), checked():
        column_sum_kernel[(4,)](x, out, True, 16)
        assert torch.allclose(out, x.sum(0))
        with pytest.raises(Race, match=r"makes a load at offset 0 of out_ptr"):
            column_sum_kernel[(4,)](x, out, False, 16)
    with interpreted():  # and unseen without the check
        column_sum_kernel[(4,)](x, out, False, 16)


@triton.jit
def overflow_kernel(out_ptr, row, stride):
    tl.store(out_ptr, row * stride)


def test_integer_overflow_is_found():
    out = torch.empty(1, dtype=torch.int64)
    with interpreted():
        overflow_kernel[(1,)](out, 2**20, 2**12)
        assert out.item() == 0
        with checked(), pytest.raises(AssertionError, match="overflow"):
            overflow_kernel[(1,)](out, 2**20, 2**12)
