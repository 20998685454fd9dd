"""linear: values and gradients around the edges of the product's tiles, layouts and errors."""

import resource
import statistics
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

from gptkernels import linear
from gptkernels.ops.linear import reference

BACKENDS = {**BACKENDS, **SIMT}
backends, dtypes, cases = over({**BACKENDS, **CUDA})
# x's shape and C_out. The product's register tile is 6 or 12 rows by 8 to 32 columns, a slice of the sum 384 or 768 deep,
# a block 384 columns by 1020 rows: each of the three products of forward and backward crosses each edge.
SMALL = [((1, 1), 1), ((5,), 3), ((2, 3, 7), 5), ((13, 17), 9), ((12, 32), 64), ((25, 33), 31)]
LARGE = [
    ((9, 380), 40),
    ((64, 383), 33),
    ((7, 385), 20),
    ((3, 769), 40),
    ((6, 1000), 1),
    ((1, 64), 65),
    ((5, 9), 385),
    ((11, 8), 1100),
    ((1031, 6), 33),
    ((97, 384), 127),
    ((400, 13), 10),
]
EMPTY = [((0, 7), 5), ((3, 0, 4), 2), ((3, 0), 4), ((3, 4), 0)]


def linear_inputs(shape, C_out, dtype, seed=0, *, bias=True, weight_dtype=None):
    kind = weight_dtype or dtype
    inputs = {"x": draw(shape, dtype, seed), "weight": draw((C_out, shape[-1]), kind, seed + 1)}
    return {**inputs, "bias": draw((C_out,), kind, seed + 2)} if bias else inputs


@cases("shape, C_out", SMALL + EMPTY, LARGE)
def test_matches_the_oracle(backend, dtype, shape, C_out):
    check_against_oracle(linear, partial(linear_inputs, shape, C_out, dtype), backend)


@dtypes
def test_without_bias(backend, dtype):
    check_against_oracle(linear, partial(linear_inputs, (9, 20), 11, dtype, bias=False), backend)


@cases("shape, C_out", [((9, 20), 11)], [((50, 400), 70)])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_float32_weights(backend, dtype, shape, C_out, bias):
    """Rounded on their way into a bfloat16 product; their gradients are float32."""
    inputs = partial(linear_inputs, shape, C_out, dtype, weight_dtype=torch.float32, bias=bias)
    check_against_oracle(linear, inputs, backend)
    assert results(partial(linear, backend=backend), inputs(0))[0]["gradient of weight"].dtype == torch.float32


@pytest.mark.parametrize("dtype", SIMT["simt"], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "shape, C_out", [((1, 1), 1), ((5,), 3), ((2, 3, 7), 5), ((260, 8), 24), ((0, 7), 5), ((3, 0), 4)]
)
def test_products_of_torch(monkeypatch, dtype, shape, C_out, bias):
    """What goes around them, as on a GPU whose cuBLAS is faster than the products here."""
    monkeypatch.setattr("gptkernels.ops.linear.cuda.own_products", lambda x: False)
    check_against_oracle(linear, partial(linear_inputs, shape, C_out, dtype, bias=bias), "simt")


@dtypes
def test_a_wide_range_of_numbers(backend, dtype):
    """Rows of 1e-15 beside rows of 1e15 (float16: 1e-2 and 1e2): each keeps its own scale."""

    def inputs(seed):
        given = linear_inputs((8, 24), 10, dtype, seed)
        reach = 2 if dtype is torch.float16 else 15
        scale = torch.logspace(-reach, reach, 8, dtype=torch.float64)[:, None]
        given["x"] = (given["x"].detach().double() * scale).to(dtype).requires_grad_()
        return given

    check_against_oracle(linear, inputs, backend)


@backends
def test_rows_are_independent(backend):
    """NaN and infinity stay in their row, and the other rows keep their bits."""
    x, weight, bias = (t.detach() for t in linear_inputs((15, 40), 37, torch.float32).values())
    clean = linear(x, weight, bias, backend=backend)
    x[7, 3], x[9, 0] = float("nan"), float("inf")
    y = linear(x, weight, bias, backend=backend)
    assert y[7].isnan().all() and y[9].isinf().all()
    rest = [n for n in range(15) if n not in (7, 9)]
    assert torch.equal(y[rest], clean[rest])


@cases("layout", LAYOUTS, slow_dtypes=LAYOUT_DTYPES)
@pytest.mark.parametrize("names", [["x"], ["weight"], ["bias"], []], ids=str)
def test_layouts(backend, dtype, layout, names):
    check_layouts(partial(linear, backend=backend), linear_inputs((2, 5, 12), 9, dtype), layout, names)


@cases("shape, C_out", EMPTY, slow_dtypes=LAYOUT_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_nothing(backend, dtype, layout, shape, C_out):
    check_layouts(partial(linear, backend=backend), linear_inputs(shape, C_out, dtype), layout, ["x", "weight"])


# The last one's weight gradient is summed in two pieces, and its bias gradient in bands of rows.
@cases("shape, C_out", [((9, 20), 7)], [((300, 500), 400), ((800, 100), 60)])
def test_repeats(backend, dtype, shape, C_out):
    check_repeats(partial(linear, backend=backend), linear_inputs(shape, C_out, dtype), repeats=2)


@backends
def test_gradients_only_for_what_wants_them(backend):
    inputs = linear_inputs((4, 9), 5, torch.float32)
    check_only_wanted_gradients(partial(linear, backend=backend), inputs, ["x", "weight", "bias"])


@backends
def test_modes(backend):
    inputs = linear_inputs((4, 9), 5, torch.float32)
    check_no_grad(partial(linear, backend=backend), inputs)
    check_no_second_gradient(partial(linear, backend=backend), inputs)


def test_results_take_turns_in_memory():
    """A round of results of several sizes, each freed before the next, asks the system for no memory after a while.

    The sizes are far apart, and all together more than is ever in use. Each page of fresh memory would be a fault.
    """
    x = torch.randn(2048, 16)
    weights = [torch.randn(C_out, 16) for C_out in (40, 300, 700, 1500, 6000)]
    faults = []
    for _ in range(30):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for weight in weights:
            linear(x, weight, backend="cpu")
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert statistics.median(faults[-10:]) < 10, faults


def test_reference_is_pytorchs():
    for inputs in (linear_inputs((3, 4, 7), 5, torch.float64), linear_inputs((3, 7), 5, torch.float64, bias=False)):
        found, douts = results(reference.linear, inputs)
        wanted, _ = results(lambda x, weight, bias=None: F.linear(x, weight, bias), inputs, douts)
        torch.testing.assert_close(found, wanted)


x, w, b = torch.zeros(4, 8), torch.zeros(5, 8), torch.zeros(5)


@pytest.mark.on_cpu
@pytest.mark.parametrize("backend", ["reference", "auto", *BACKENDS])
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((x, w[0]), ValueError, r"x must be \(..., C_in\) and weight \(C_out, C_in\), got \(4, 8\) and \(8,\)"),
        ((x[:, :7], w), ValueError, r"x must be \(..., C_in\) and weight"),
        ((torch.tensor(1.0), w), ValueError, r"x must be \(..., C_in\) and weight"),
        ((x.int(), w.int()), TypeError, "x must be floating point, got torch.int32: convert it"),
        ((x, w.bfloat16()), TypeError, "weight must be in x's dtype torch.float32, got torch.bfloat16"),
        ((x, w.to("meta")), ValueError, "weight must be on x's device cpu, got meta: move one of them"),
        ((x, w, b[:4]), ValueError, r"bias must be \(5,\), got \(4,\)"),
        ((x, w, b[:, None]), ValueError, r"bias must be \(5,\), got \(5, 1\)"),
        ((x.bfloat16(), w, b.bfloat16()), TypeError, "bias must have its weight's dtype torch.float32, got"),
        ((x, w, b.to("meta")), ValueError, "bias must be on its weight's device cpu, got meta: move one of them"),
    ],
)
def test_errors(backend, arguments, error, message):
    with pytest.raises(error, match=message):
        linear(*arguments, backend=backend)
