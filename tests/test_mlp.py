"""gelu_mlp: values, gradients, both GELUs over the whole range of numbers, layouts and errors."""

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

from gptkernels import gelu_mlp
from gptkernels.ops.mlp import reference

BACKENDS = {**BACKENDS, **SIMT}
backends, dtypes, cases = over({**BACKENDS, **CUDA})
SMALL = [((1, 1), 1), ((7,), 5), ((2, 3, 7), 9), ((13, 17), 70), ((12, 32), 64)]
LARGE = [((65, 64), 256), ((5, 385), 40), ((9, 20), 1000), ((1050, 9), 17), ((127, 96), 384)]
EMPTY = [((0, 7), 5), ((2, 0, 4), 8), ((3, 4), 0)]
gelus = pytest.mark.parametrize("approximate", ["tanh", "none"])


def mlp_inputs(shape, F_width, dtype, seed=0, *, b_fc=True, b_proj=True, weight_dtype=None):
    C, kind = shape[-1], weight_dtype or dtype
    return {
        "x": draw(shape, dtype, seed),
        "w_fc": draw((F_width, C), kind, seed + 1, C**-0.5),
        "b_fc": draw((F_width,), kind, seed + 2) if b_fc else None,
        "w_proj": draw((C, F_width), kind, seed + 3),
        "b_proj": draw((C,), kind, seed + 4) if b_proj else None,
    }


@gelus
@cases("shape, F_width", SMALL + EMPTY, LARGE)
def test_matches_the_oracle(backend, dtype, shape, F_width, approximate):
    call = partial(gelu_mlp, approximate=approximate)
    check_against_oracle(call, partial(mlp_inputs, shape, F_width, dtype), backend)


@dtypes
@pytest.mark.parametrize("b_fc, b_proj", [(False, False), (True, False), (False, True)])
def test_without_biases(backend, dtype, b_fc, b_proj):
    check_against_oracle(gelu_mlp, partial(mlp_inputs, (6, 20), 43, dtype, b_fc=b_fc, b_proj=b_proj), backend)


@gelus
@cases("shape, F_width", [((6, 20), 43)], [((50, 100), 400)])
def test_float32_weights(backend, dtype, shape, F_width, approximate):
    """Rounded on their way into a bfloat16 product; their gradients are float32."""
    inputs = partial(mlp_inputs, shape, F_width, dtype, weight_dtype=torch.float32)
    check_against_oracle(partial(gelu_mlp, approximate=approximate), inputs, backend)
    found, _ = results(partial(gelu_mlp, backend=backend), inputs(0))
    for name in ("w_fc", "b_fc", "w_proj", "b_proj"):
        assert found[f"gradient of {name}"].dtype == torch.float32


@gelus
@dtypes
def test_gelu_over_the_range_of_numbers(backend, dtype, approximate):
    """One unit after another, from -1e4 to 1e4 (float16: 25): identity weights show GELU and its slope themselves."""
    far = torch.logspace(-6, 1.4 if dtype is torch.float16 else 4, 41)  # its reference cubes in float16
    places = torch.cat([torch.linspace(-14, 14, 561), far, -far])

    def inputs(seed):
        N = places.numel()
        x = places.double().mul(1 + 1e-3 * seed)[:, None].to(dtype).requires_grad_()
        one = torch.ones(1, 1, dtype=dtype)
        assert x.shape == (N, 1)
        return {"x": x, "w_fc": one, "b_fc": None, "w_proj": one, "b_proj": None}

    check_against_oracle(partial(gelu_mlp, approximate=approximate), inputs, backend, draws=1)
    check_elementwise(partial(gelu_mlp, approximate=approximate), inputs(0), backend, dtype)


def check_elementwise(call, inputs, backend, dtype):
    """Each element within 8 ulp of float64's, or of GELU's own rounding error near its zeros.

    The budget of the whole is set by its largest number, 1e4; this one sees the neighbourhood of 0 too.
    """
    dout = [torch.ones_like(inputs["x"])]
    ours, _ = results(partial(call, backend=backend), inputs, dout)
    right = {name: t.double().requires_grad_(t.requires_grad) for name, t in inputs.items() if t is not None}
    truth, _ = results(partial(call, backend="reference"), {**inputs, **right}, dout)
    eps, x = torch.finfo(dtype).eps, inputs["x"].detach().double()
    # Below smallest_normal numbers of the dtype lie smallest_normal * eps apart: rounding to nearest errs by half of that
    # however small a number is. One rounding is due: products with 1 are exact.
    subnormal = 0.5 * torch.finfo(dtype).smallest_normal * eps
    for name, unit in (("output 0", x.abs().clamp(max=1)), ("gradient of x", torch.ones_like(x))):
        allowed = 8 * eps * torch.maximum(truth[name].abs(), unit) + subnormal
        error = (ours[name].double() - truth[name]).abs()
        worst = (error / allowed).argmax()
        assert (error <= allowed).all(), f"{name} at {x.flatten()[worst]}: error {error.flatten()[worst]:.3g}"


@gelus
@pytest.mark.parametrize("dtype", SIMT["simt"], ids=str)
@pytest.mark.parametrize("shape, F_width", [((1, 1), 1), ((2, 3, 7), 9), ((13, 17), 72), ((260, 8), 24), ((0, 7), 5)])
def test_gelu_passes(monkeypatch, dtype, shape, F_width, approximate):
    """The CUDA kernels beside products of torch's, as on a GPU whose cuBLAS is faster than the products here."""
    monkeypatch.setattr("gptkernels.ops.mlp.cuda.own_products", lambda x: False)
    check_against_oracle(partial(gelu_mlp, approximate=approximate), partial(mlp_inputs, shape, F_width, dtype), "simt")
    call = partial(gelu_mlp, approximate=approximate, backend="simt")
    check_repeats(call, mlp_inputs(shape, F_width, dtype), repeats=1, threads=(1,))


@gelus
@dtypes
def test_a_far_tail_has_no_nan(backend, dtype, approximate):
    """Out there exp has long over- or underflown: GELU and its slope are 0 and 0, or x and 1."""
    far = [2e3, 6e4] if dtype is torch.float16 else [2e3, 1e6, 1e10, 1e15]
    x = torch.tensor([-number for number in far] + far, dtype=dtype)[:, None].requires_grad_()
    one = torch.ones(1, 1, dtype=dtype)
    y = gelu_mlp(x, one, None, one, None, approximate=approximate, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    positive = (x.detach() > 0).to(dtype)
    torch.testing.assert_close(y.detach(), x.detach() * positive, rtol=0, atol=1e-20)
    torch.testing.assert_close(dx, positive, rtol=0, atol=1e-7)


@backends
def test_gelus_differ(backend):
    inputs = mlp_inputs((6, 20), 43, torch.float32)
    tanh, erf = (gelu_mlp(**inputs, approximate=name, backend=backend) for name in ("tanh", "none"))
    assert 0 < (tanh - erf).abs().max() < 0.05
    assert torch.equal(gelu_mlp(**inputs, backend=backend), tanh)


@cases("layout", LAYOUTS, slow_dtypes=LAYOUT_DTYPES)
@pytest.mark.parametrize("names", [["x"], ["w_fc"], ["b_fc"], ["w_proj"], ["b_proj"], []], ids=str)
def test_layouts(backend, dtype, layout, names):
    check_layouts(partial(gelu_mlp, backend=backend), mlp_inputs((2, 5, 12), 9, dtype), layout, names)


@cases("shape, F_width", EMPTY, slow_dtypes=LAYOUT_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_nothing(backend, dtype, layout, shape, F_width):
    inputs = mlp_inputs(shape, F_width, dtype)
    check_layouts(partial(gelu_mlp, backend=backend), inputs, layout, ["x", "w_fc", "w_proj"])


@gelus
@cases("shape, F_width", [((9, 20), 17)], [((200, 100), 400), ((800, 20), 40)])
def test_repeats(backend, dtype, shape, F_width, approximate):
    call = partial(gelu_mlp, backend=backend, approximate=approximate)
    check_repeats(call, mlp_inputs(shape, F_width, dtype), repeats=2)


@backends
def test_gradients_only_for_what_wants_them(backend):
    inputs = mlp_inputs((4, 9), 5, torch.float32)
    check_only_wanted_gradients(partial(gelu_mlp, backend=backend), inputs, list(inputs))


@backends
def test_modes(backend):
    inputs = mlp_inputs((4, 9), 5, torch.float32)
    check_no_grad(partial(gelu_mlp, backend=backend), inputs)
    check_no_second_gradient(partial(gelu_mlp, backend=backend), inputs)


@gelus
def test_reference_is_pytorchs(approximate):
    def separately(x, w_fc, b_fc, w_proj, b_proj):
        return F.linear(F.gelu(F.linear(x, w_fc, b_fc), approximate=approximate), w_proj, b_proj)

    for biases in (True, False):
        inputs = mlp_inputs((3, 4, 7), 11, torch.float64, b_fc=biases, b_proj=biases)
        found, douts = results(partial(reference.gelu_mlp, approximate=approximate), inputs)
        torch.testing.assert_close(found, results(separately, inputs, douts)[0])


x, fc, proj = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(8, 6)
shapes = r"x must be \(..., C\), w_fc \(F, C\) and w_proj \(C, F\), got"


@pytest.mark.on_cpu
@pytest.mark.parametrize("backend", ["reference", "auto", *BACKENDS])
@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((x[:, :7], fc, None, proj, None), {}, ValueError, shapes),
        ((x, fc[0], None, proj, None), {}, ValueError, shapes),
        ((x, fc, None, fc, None), {}, ValueError, shapes),
        ((x, fc, None, proj[:7], None), {}, ValueError, shapes),
        ((torch.tensor(1.0), fc, None, proj, None), {}, ValueError, shapes),
        (
            (x, fc, None, proj, None),
            {"approximate": "erf"},
            ValueError,
            "approximate must be 'tanh' or 'none', got 'erf'",
        ),
        ((x.int(), fc, None, proj, None), {}, TypeError, "x must be floating point, got torch.int32: convert it"),
        ((x, fc.bfloat16(), None, proj, None), {}, TypeError, "w_fc must be in x's dtype torch.float32, got"),
        ((x, fc, None, proj.bfloat16(), None), {}, TypeError, "w_proj must be in x's dtype torch.float32, got"),
        ((x, fc, None, proj.to("meta"), None), {}, ValueError, "w_proj must be on x's device cpu, got meta"),
        ((x, fc, torch.zeros(8), proj, None), {}, ValueError, r"b_fc must be \(6,\), got \(8,\)"),
        ((x, fc, None, proj, torch.zeros(6)), {}, ValueError, r"b_proj must be \(8,\), got \(6,\)"),
        ((x, fc, torch.zeros(6).bfloat16(), proj, None), {}, TypeError, "b_fc must have its weight's dtype"),
        ((x, fc, None, proj, torch.zeros(8, device="meta")), {}, ValueError, "b_proj must be on its weight's device"),
    ],
)
def test_errors(backend, arguments, options, error, message):
    with pytest.raises(error, match=message):
        gelu_mlp(*arguments, **options, backend=backend)
