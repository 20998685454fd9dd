"""Paths of Triton's kernels that no argument of an operator takes on the CPU, and bugs planted in them, which must be seen."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheels for this platform")
import triton
import triton.language as tl
from interpreter_checks import OutOfBounds, Race
from oracle import BACKENDS, check_against_oracle, check_equal, draw, results
from test_attention import attention_inputs
from test_cross_entropy import cross_entropy_inputs
from test_layer_norm import all_inputs
from test_linear import linear_inputs
from test_mlp import mlp_inputs
from triton.runtime.interpreter import InterpreterBuilder

from gptkernels import causal_attention, causal_attention_packed, gelu_mlp, layer_norm, linear, linear_cross_entropy
from gptkernels.ops.attention import triton as attention_kernels
from gptkernels.ops.linear import triton as linear_kernels
from gptkernels.ops.linear import triton_tiles
from gptkernels.ops.mlp import triton as mlp_kernels

dtypes = pytest.mark.parametrize("dtype", BACKENDS["triton"], ids=lambda dtype: str(dtype)[6:])

# Each operator at a size whose rows, times their stride, go far beyond any single dimension.
SIZES = {
    "attention": (causal_attention, partial(attention_inputs, 1, 3, 70, 70, 24)),
    "packed attention": (causal_attention_packed, lambda dtype, seed=0: {"qkv": draw((1, 70, 3, 2, 16), dtype, seed)}),
    "layer_norm": (layer_norm, partial(all_inputs, (140, 40))),
    "linear": (linear, partial(linear_inputs, (70, 40), 66)),
    "mlp": (gelu_mlp, partial(mlp_inputs, (70, 24), 66)),
    "cross_entropy": (linear_cross_entropy, partial(cross_entropy_inputs, 40, 24, 66)),
}
# Of the sizes above and of the kernels' tiles. layer_norm's second kernel multiplies 256 partial rows, of a thousand or two
# that there can be, by C; cross_entropy's first one looks at 2048 targets at once.
LARGEST_DIMENSION = {"layer_norm": 256 * 40, "cross_entropy": 2048}
every_operator = pytest.mark.parametrize("name", SIZES)


@contextmanager
def force_int64():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_kernels, "FORCE_INT64", True)
        patch.setattr(linear_kernels, "FORCE_INT64", True)
        yield


@contextmanager
def narrow_offsets_noted():
    """The largest offset that is added to a pointer in 32 bits, as the only element of a list."""
    largest, add = [0], InterpreterBuilder.create_addptr

    def create_addptr(self, pointer, offset):
        if offset.data.itemsize < 8:
            largest[0] = max(largest[0], int(abs(offset.data).max()))
        return add(self, pointer, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_addptr", create_addptr)
        yield largest


@every_operator
@dtypes
def test_offsets_of_64_bits(name, dtype):
    """Forced, no 32-bit offset holds a product with a stride, and the results are those of the usual path.

    layer_norm and cross_entropy have no other path: their rows are always counted in 64 bits.
    """
    op, make = SIZES[name]
    call = partial(op, backend="triton")
    with narrow_offsets_noted() as usual:
        wanted, douts = results(call, make(dtype=dtype))
    with force_int64(), narrow_offsets_noted() as forced:
        check_equal(results(call, make(dtype=dtype), douts)[0], wanted)
    limit = LARGEST_DIMENSION.get(name, 256)
    assert 0 < forced[0] <= limit
    assert name in LARGEST_DIMENSION or usual[0] > limit


@every_operator
def test_offsets_of_64_bits_match_the_oracle(name):
    op, make = SIZES[name]
    with force_int64():
        check_against_oracle(op, lambda seed: make(dtype=torch.bfloat16, seed=seed), "triton", draws=1)


def test_wide_strides_take_64_bits():
    """Without force, where the last row of a tile lies 2^31 elements from its first one."""
    assert attention_kernels.needs_int64((0, 0, 2**24, 1)) and not attention_kernels.needs_int64((0, 0, 2**24 - 1, 1))
    plan = partial(triton_tiles.plan, 64, 64, 64, dtype=torch.float32, tf32=False, device=torch.device("cpu"))
    for stride, wide in ((2**25, True), (2**25 - 1, False)):
        for strides, along in (((stride, 64), True), ((64, stride), True), ((stride, 64), False)):
            _, constants = plan(*strides, along, along, int64=False, descriptors=False)
            assert constants["INT64"] is wide


@dtypes
@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_tensor_descriptors(monkeypatch, name, dtype):
    """The loads of sm_90 and later, with tails on all sides of the tiles."""
    monkeypatch.setattr(linear_kernels, "FORCE_DESCRIPTORS", True)
    seen = []
    monkeypatch.setattr(
        linear_kernels, "blocks", lambda *args, blocks=linear_kernels.blocks: seen.append(1) or blocks(*args)
    )
    op, make = (linear, linear_inputs) if name == "linear" else (gelu_mlp, mlp_inputs)
    check_against_oracle(op, lambda seed: make((72, 24), 40, dtype, seed), "triton", draws=1)
    assert seen


@dtypes
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_beside_cublas(monkeypatch, dtype, approximate):
    """The passes over memory that stand beside torch's products."""
    monkeypatch.setattr(linear_kernels, "choose", lambda *_: "cublas")
    monkeypatch.setattr(mlp_kernels, "choose", lambda *_: "cublas")
    call = partial(gelu_mlp, approximate=approximate)
    check_against_oracle(call, lambda seed: mlp_inputs((140, 9), 300, dtype, seed), "triton", draws=1)


@dtypes
@pytest.mark.parametrize("dropout", [{}, {"dropout_p": 0.3, "seed": 5}], ids=["", "dropout"])
def test_one_pass_attention_backward(monkeypatch, any_order, dtype, dropout):
    """The form whose dq is added up by atomics."""
    backward_into, asked = attention_kernels.backward_into, []
    monkeypatch.setattr(
        attention_kernels, "backward_into", lambda *args: (asked.append(args[-1]), backward_into(*args))
    )
    call = partial(causal_attention, deterministic=False, **dropout)
    check_against_oracle(call, lambda seed: attention_inputs(1, 2, 70, 75, 24, dtype, seed), "triton", draws=1)
    check_against_oracle(
        partial(causal_attention, deterministic=False, scale=-0.3),
        lambda seed: attention_inputs(1, 1, 9, 9, 24, dtype, seed),
        "triton",
    )
    for D in (72, 136):
        check_against_oracle(call, lambda seed, D=D: attention_inputs(1, 1, 35, 20, D, dtype, seed), "triton", draws=3)
    # One key, one weight of 1, and no gradient at all, not even a rounding error.
    check_against_oracle(call, lambda seed: attention_inputs(1, 2, 1, 1, 64, dtype, seed), "triton")
    assert set(asked) == {True}


@triton.jit
def unmasked_part(at, start: tl.constexpr, width: tl.constexpr, D: tl.constexpr):
    return tl.load(at + start + tl.arange(0, width)[None, :])


@triton.jit
def head_of_none(ptr, stride_b, stride_h, unit: tl.constexpr, b, h):
    return ptr + b.to(tl.int64) * stride_b * unit


@triton.jit
def unmasked_columns(ptr, i: tl.constexpr, rows, N, C: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    return tl.load(ptr + i * BLOCK + rows[:, None] * C + tl.arange(0, TAIL)[None, :], mask=(rows < N)[:, None]).to(
        tl.float32
    )


@triton.jit
def first_part(ptr, part, i: tl.constexpr, rows, N, C: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, part.shape[1])[None, :]
    tl.store(ptr + columns + 0 * rows[:, None], part.to(ptr.dtype.element_ty), mask=columns < C)


@triton.jit
def first_column(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return pid % tl.cdiv(M, BLOCK_M) * BLOCK_M, 0


@triton.jit
def unclamped(start, size, stride, ALONG_K: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    return tl.arange(0, BLOCK) * stride if ALONG_K else tl.arange(0, BLOCK)


@triton.jit
def first_sums(sums_ptr, sums, row, col, N, BLOCK_N: tl.constexpr):
    j = col + tl.arange(0, BLOCK_N)
    tl.store(sums_ptr + j, sums, mask=j < N)


@triton.jit
def unmasked_logits(
    row_ptr, start, V, width, UNROLL: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr
):
    i = tl.arange(0, THREADS)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    return tl.load(row_ptr + start + i + tl.zeros((UNROLL, 1, 1), tl.int32)).to(tl.float32)


@pytest.mark.parametrize(
    "name, module, helper, planted, error",
    [
        ("attention", "triton_forward", "load_part", unmasked_part, OutOfBounds),
        ("attention", "triton_backward", "head_of", head_of_none, Race),
        ("packed attention", "triton_backward", "head_of", head_of_none, Race),
        ("layer_norm", "triton", "load_part", unmasked_columns, OutOfBounds),
        ("layer_norm", "triton", "store_part", first_part, Race),
        ("linear", "triton", "offsets_along", unclamped, OutOfBounds),
        ("linear", "triton", "tile_of", first_column, Race),
        ("mlp", "triton", "store_sums", first_sums, Race),
        ("cross_entropy", "triton", "load_logits", unmasked_logits, Race),
    ],
)
def test_a_planted_bug_is_caught_in_the_oracle_tests(monkeypatch, name, module, helper, planted, error):
    """A kernel's helper is replaced by one that forgets a mask, or that gives two programs one place to write to."""
    op, make = SIZES[name]
    folder = "attention" if name.endswith("attention") else name
    monkeypatch.setattr(f"gptkernels.ops.{folder}.{module}.{helper}", planted)
    with pytest.raises(error):
        check_against_oracle(op, lambda seed: make(dtype=torch.float32, seed=seed), "triton", draws=1)
