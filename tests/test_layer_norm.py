"""layer_norm, with and without a residual addition: values, gradients, statistics, layouts and errors."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    BACKENDS,
    CUDA,
    LAYOUT_DTYPES,
    LAYOUTS,
    SIMT,
    check_against_oracle,
    check_layouts,
    check_no_grad,
    check_no_second_gradient,
    check_only_wanted_gradients,
    check_repeats,
    draw,
    over,
    results,
)

from gptkernels import layer_norm
from gptkernels.ops.layer_norm import reference

BACKENDS = {**BACKENDS, **SIMT}
backends, dtypes, cases = over({**BACKENDS, **CUDA})
SMALL = [
    (1,),
    (7,),
    (1, 1),
    (1, 7),
    (3, 2),
    (2, 3, 8),
    (5, 33),
    (9, 64),
    (3, 384),
    (2, 1000),
    (1, 4099),
    (2, 7001),
    (2, 8200),
]
LARGE = [(67, 9), (2, 1, 5, 768), (130, 100), (33, 1000), (2000, 5)]
EMPTY = [(0, 7), (3, 0, 5)]
OTHER = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32, torch.float16: torch.float32}


def layer_norm_inputs(shape, dtype, seed=0, *, weight=None, bias=None, residual=None, mean=0.0):
    """x around `mean`, and of weight, bias and residual those whose dtype is given."""
    inputs = {"x": (mean + draw(shape, torch.float64, seed).detach()).to(dtype).requires_grad_()}
    for i, (name, kind) in enumerate((("weight", weight), ("bias", bias))):
        if kind is not None:
            inputs[name] = (1 - i + draw(shape[-1:], torch.float64, seed + 1 + i).detach()).to(kind).requires_grad_()
    if residual is not None:
        inputs["residual"] = draw(shape, residual, seed + 3)
    return inputs


def all_inputs(shape, dtype, seed=0, **options):
    return layer_norm_inputs(shape, dtype, seed, weight=dtype, bias=dtype, residual=dtype, **options)


shapes = partial(cases, "shape", [(shape,) for shape in SMALL + EMPTY], [(shape,) for shape in LARGE])


@shapes()
def test_matches_the_oracle(backend, dtype, shape):
    check_against_oracle(layer_norm, partial(layer_norm_inputs, shape, dtype, weight=dtype, bias=dtype), backend)


@shapes()
def test_residual_matches_the_oracle(backend, dtype, shape):
    check_against_oracle(layer_norm, partial(all_inputs, shape, dtype), backend)


def test_results_that_are_stored_past_the_caches():
    """From 4 MiB on the cpu kernels stream their results, but not rows of an odd width."""
    for shape in ((1100, 1024), (1100, 1001)):
        check_against_oracle(layer_norm, partial(all_inputs, shape, torch.float32), "cpu")


@cases("weight, bias", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_without_weight_or_bias(backend, dtype, weight, bias, residual):
    kinds = {"weight": weight, "bias": bias, "residual": residual}
    options = {name: dtype for name, given in kinds.items() if given}
    check_against_oracle(layer_norm, partial(layer_norm_inputs, (5, 43), dtype, **options), backend)


@dtypes
@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16], ids=str)
def test_float32_weights(backend, dtype, residual):
    """Weights in float32 beside bfloat16 numbers, and a residual in another dtype than x."""
    check_against_oracle(
        layer_norm,
        partial(layer_norm_inputs, (6, 43), dtype, weight=torch.float32, bias=torch.float32, residual=residual),
        backend,
    )


@dtypes
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_a_float32_bias_alone(backend, dtype, residual):
    """Its gradient is summed and kept in float32, with no weight beside it that says so."""
    inputs = partial(layer_norm_inputs, (40, 43), dtype, bias=torch.float32, residual=dtype if residual else None)
    check_against_oracle(layer_norm, inputs, backend)


@cases("C", [36, 768, 1000, 2500, 6148], slow_dtypes=(torch.bfloat16, torch.float16))
def test_a_float32_stream(backend, dtype, C):
    """What autocast makes: weights and residual in float32 beside x of 16 bits; widths of every tile that is there for it."""
    options = {"weight": torch.float32, "bias": torch.float32, "residual": torch.float32}
    check_against_oracle(layer_norm, partial(layer_norm_inputs, (5, C), dtype, **options), backend)


@dtypes
@pytest.mark.parametrize("with_weight", [False, True])
def test_residual_of_another_dtype(backend, dtype, with_weight):
    """The sum has the wider dtype, y has x's, each gradient that of its tensor."""
    weight = dtype if with_weight else None
    inputs = partial(layer_norm_inputs, (6, 43), dtype, weight=weight, bias=weight, residual=OTHER[dtype])
    check_against_oracle(layer_norm, inputs, backend)
    found, _ = results(partial(layer_norm, backend=backend), inputs(0))
    assert found["output 0"].dtype == dtype and found["output 1"].dtype == torch.float32
    assert found["gradient of x"].dtype == dtype and found["gradient of residual"].dtype == OTHER[dtype]


@cases("eps", [1e-12, 1e-3, 1.0])
def test_eps(backend, dtype, eps):
    check_against_oracle(partial(layer_norm, eps=eps), partial(all_inputs, (5, 40), dtype), backend)


@cases("shape", [((4, 43),)], [((4, 1000),)])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_rows_far_from_zero(backend, dtype, shape, residual):
    """A mean of 1e4 beside a deviation of 1: the difference of squares would have lost the variance."""
    options = {"weight": dtype, "bias": dtype, "residual": dtype if residual else None}
    check_against_oracle(layer_norm, partial(layer_norm_inputs, shape, dtype, mean=1e4, **options), backend)


@dtypes
def test_rows_without_variance(backend, dtype):
    """A constant row normalises to the bias; eps alone keeps its gradient finite."""

    def inputs(seed):
        given = layer_norm_inputs((3, 16), dtype, seed, weight=dtype, bias=dtype)
        given["x"] = torch.tensor([0.0, 3.0, -256.0], dtype=dtype)[:, None].repeat(1, 16).requires_grad_()
        return given

    given = inputs(0)
    y = layer_norm(**given, backend=backend)
    assert torch.equal(y, given["bias"].expand(3, 16))
    check_against_oracle(layer_norm, inputs, backend)


@cases("scale", [1e-4, 1e-18, 1e15])
def test_magnitudes(backend, dtype, scale):
    """Small beside eps, and large: the variance must neither vanish nor overflow."""

    def inputs(seed):
        given = layer_norm_inputs((4, 24), dtype, seed, weight=dtype)
        factor = min(scale, torch.finfo(dtype).max / 16)  # float16 reaches 65504
        given["x"] = (given["x"].detach() * factor).requires_grad_()
        return given

    check_against_oracle(layer_norm, inputs, backend)


@dtypes
def test_only_one_output_is_used(backend, dtype):
    """The last block's sum is not used, and sometimes y is not: the other's gradient alone flows back."""
    for used in (0, 1):

        def call(used=used, **arguments):
            return layer_norm(**arguments)[used]

        inputs = partial(layer_norm_inputs, (4, 19), dtype, weight=dtype, bias=dtype, residual=dtype)
        if used == 0:
            check_against_oracle(call, inputs, backend)
            continue
        given = inputs(0)
        total = call(**given, backend=backend)
        (dx, dresidual) = torch.autograd.grad(total.sum(), [given["x"], given["residual"]])
        assert (dx == 1).all() and (dresidual == 1).all()


@cases("layout", LAYOUTS, slow_dtypes=LAYOUT_DTYPES)
@pytest.mark.parametrize("names", [["x"], ["residual"], ["weight"], ["bias"], ["x", "residual"], []], ids=str)
def test_layouts(backend, dtype, layout, names):
    check_layouts(partial(layer_norm, backend=backend), all_inputs((5, 11), dtype), layout, names)


@cases("layout", LAYOUTS, slow_dtypes=LAYOUT_DTYPES)
def test_layouts_without_residual(backend, dtype, layout):
    inputs = layer_norm_inputs((2, 5, 11), dtype, weight=dtype, bias=dtype)
    check_layouts(partial(layer_norm, backend=backend), inputs, layout, ["x"])


@cases("shape", [(shape,) for shape in EMPTY], slow_dtypes=LAYOUT_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_nothing(backend, dtype, layout, shape):
    check_layouts(partial(layer_norm, backend=backend), all_inputs(shape, dtype), layout, ["x", "residual"])


@cases("shape", [((9, 20),)], [((301, 77),)])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_repeats(backend, dtype, shape, residual):
    options = {"weight": dtype, "bias": dtype, "residual": dtype if residual else None}
    check_repeats(partial(layer_norm, backend=backend), layer_norm_inputs(shape, dtype, **options))


@backends
def test_rows_are_independent(backend):
    """A row has the same bits alone as among others, and NaN stays in its row."""
    inputs = {name: x.detach() for name, x in all_inputs((7, 30), torch.float32).items()}
    y, _ = layer_norm(**inputs, backend=backend)
    alone = {name: x[3:4] if x.dim() == 2 else x for name, x in inputs.items()}
    assert torch.equal(layer_norm(**alone, backend=backend)[0], y[3:4])
    inputs["x"][5, 29] = math.nan
    broken = layer_norm(**inputs, backend=backend)[0]
    assert broken[5].isnan().all()
    assert torch.equal(broken[:5], y[:5]) and torch.equal(broken[6:], y[6:])


@backends
def test_gradients_only_for_what_wants_them(backend):
    inputs = all_inputs((4, 9), torch.float32)
    check_only_wanted_gradients(partial(layer_norm, backend=backend), inputs, ["x", "weight", "bias", "residual"])
    del inputs["residual"]
    check_only_wanted_gradients(partial(layer_norm, backend=backend), inputs, ["x", "weight", "bias"])


@backends
@pytest.mark.parametrize("residual", [None, torch.float32], ids=["", "residual"])
def test_modes(backend, residual):
    inputs = layer_norm_inputs((4, 9), torch.float32, weight=torch.float32, residual=residual)
    check_no_grad(partial(layer_norm, backend=backend), inputs)
    check_no_second_gradient(partial(layer_norm, backend=backend), inputs)


def test_reference_is_pytorchs():
    inputs = layer_norm_inputs((3, 4, 11), torch.float64, weight=torch.float64, bias=torch.float64)
    found, douts = results(partial(reference.layer_norm, eps=1e-3), inputs)
    wanted, _ = results(lambda x, weight, bias: F.layer_norm(x, (11,), weight, bias, 1e-3), inputs, douts)
    torch.testing.assert_close(found, wanted)
    inputs["residual"] = draw((3, 4, 11), torch.float64, 8)
    found, douts = results(reference.layer_norm, inputs)

    def separately(x, weight, bias, residual):
        return F.layer_norm(x + residual, (11,), weight, bias), x + residual

    torch.testing.assert_close(found, results(separately, inputs, douts)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_reference_of_16_bit_numbers(dtype):
    """Far from 0, where float16 has no squares, each rounding of the result is the only one; x is right to the last bit."""
    x = draw((5, 96), dtype, 3) * 400 + 1000
    y = layer_norm(x, backend="reference")
    right = F.layer_norm(x.double(), (96,))
    assert ((y.double() - right).abs() <= right.abs() * torch.finfo(dtype).eps / 2 + 1e-4).all()


x, w = torch.zeros(4, 8), torch.zeros(8)


@pytest.mark.on_cpu
@pytest.mark.parametrize("backend", ["reference", "auto", *BACKENDS])
@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((x.int(),), {}, TypeError, "x must be floating point, got torch.int32: convert it"),
        ((torch.tensor(1.0),), {}, ValueError, r"x must be \(..., C\) with C >= 1, got \(\)"),
        ((x[:, :0],), {}, ValueError, r"x must be \(..., C\) with C >= 1, got \(4, 0\)"),
        (
            (x, (8,), w, w),
            {},
            TypeError,
            r"weight must be a tensor \(C,\) .* got tuple and Tensor: the order is x, weight",
        ),
        ((x, 8, w), {}, TypeError, "weight must be a tensor .* got int and float: the order is x, weight, bias, eps"),
        ((x, w, w, 0.0), {}, ValueError, "eps must be positive, got 0.0"),
        ((x, w, w, math.nan), {}, ValueError, "eps must be positive, got nan"),
        ((x, w[:7]), {}, ValueError, r"weight must be \(8,\) for x \(4, 8\), got \(7,\)"),
        ((x, None, w[:1]), {}, ValueError, r"bias must be \(8,\) for x \(4, 8\), got \(1,\)"),
        ((x, w.to("meta")), {}, ValueError, "weight must be on x's device cpu, got meta: move one of them"),
        ((x, w.bfloat16()), {}, TypeError, "weight must be in x's dtype torch.float32, got torch.bfloat16"),
        ((x.bfloat16(), w, w.bfloat16()), {}, TypeError, "weight and bias must have one dtype, got torch.float32 and"),
        ((x, w), {"residual": x[:1]}, ValueError, r"residual must have x's shape and device, got \(1, 8\) on cpu"),
        ((x, w), {"residual": x.to("meta")}, ValueError, "residual must have x's shape and device, got .* on meta"),
        ((x, w), {"residual": x.int()}, TypeError, "residual must be floating point, got torch.int32"),
    ],
)
def test_errors(backend, arguments, options, error, message):
    with pytest.raises(error, match=message):
        layer_norm(*arguments, **options, backend=backend)
