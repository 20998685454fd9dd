"""The CUDA matrix products on the CPU: every tile over its edges, every way of a factor, counters and schedules."""

from functools import partial

import pytest
import torch
from oracle import check_against_oracle, check_equal, draw, results

from gptkernels import gelu_mlp, linear, simt

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# With one processor every product that is wider than 64 gets the tile of 128 x 128, with 108 that of 64 x 64. Steps of k
# are 32 deep (float32: 16), two of them under way. Rows of 16 bytes and others; x's columns, C_out.
WIDTHS = [(40, 72), (33, 129), (136, 66), (200, 8), (7, 70)]
PROCESSORS = pytest.mark.parametrize("processors", [1, 108])


def linear_inputs(N, C_in, C_out, dtype, seed):
    weight, bias = draw((C_out, C_in), dtype, seed + 1), draw((C_out,), dtype, seed + 2)
    return {"x": draw((N, C_in), dtype, seed), "weight": weight, "bias": bias}


def mlp_inputs(N, C, F, dtype, seed):
    w_fc, w_proj = draw((F, C), dtype, seed + 1, C**-0.5), draw((C, F), dtype, seed + 3)
    biases = {"b_fc": draw((F,), dtype, seed + 2), "b_proj": draw((C,), dtype, seed + 4)}
    return {"x": draw((N, C), dtype, seed), "w_fc": w_fc, "w_proj": w_proj, **biases}


@DTYPES
@PROCESSORS
@pytest.mark.parametrize("C_in, C_out", WIDTHS)
def test_linear_over_the_edges_of_tiles(dtype, processors, C_in, C_out):
    with simt.device(processors=processors):
        check_against_oracle(linear, partial(linear_inputs, 131, C_in, C_out, dtype), "simt", draws=1)


@DTYPES
@PROCESSORS
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("C, F", [(40, 72), (66, 129)])
def test_mlp_over_the_edges_of_tiles(dtype, processors, approximate, C, F):
    with simt.device(processors=processors):
        call = partial(gelu_mlp, approximate=approximate)
        check_against_oracle(call, partial(mlp_inputs, 131, C, F, dtype), "simt", draws=1)


@DTYPES
def test_many_groups_of_tiles(dtype):
    """More than a group of 8 rows of tiles, and a last group of another height."""
    check_against_oracle(linear, partial(linear_inputs, 64 * 9 + 1, 8, 130, dtype), "simt", draws=1)


def test_sums_of_many_rows():
    """The bias gradient goes through more than one level of partial sums, the MLP's through its pieces."""
    check_against_oracle(linear, partial(linear_inputs, 600, 8, 20, torch.float32), "simt", draws=1)
    check_against_oracle(gelu_mlp, partial(mlp_inputs, 300, 8, 40, torch.bfloat16), "simt", draws=1)


@DTYPES
@PROCESSORS
def test_counters(dtype, processors):
    """No bank conflicts in any kernel, and whole sectors, where rows start on 16 bytes."""
    with simt.device(processors=processors), simt.recording() as report:
        results(partial(gelu_mlp, backend="simt"), mlp_inputs(256, 64, 128, dtype, 0))
    products = {name: counters for name, counters in report.kernels.items() if name.startswith("gemm")}
    assert set(products) == {"gemm", "gemm_gelu", "gemm_gelu_backward"}
    for name, counters in products.items():
        for kind, counter in counters.items():
            if isinstance(counter, dict):
                assert counter.get("wavefronts") == counter.get("ideal_wavefronts"), f"{name}: {kind}"
                assert counter.get("sectors", 0) <= 1.02 * counter.get("ideal_sectors", 0), f"{name}: {kind}"
        copied = counters["cp_async"]
        assert copied["bytes"] == 16 * 32 * copied["instructions"], name


@DTYPES
def test_schedules_agree(dtype):
    inputs = mlp_inputs(70, 40, 72, dtype, 5)
    wanted, douts = results(partial(gelu_mlp, backend="simt"), inputs)
    for seed in (1, 2, 3):
        with simt.schedule(seed):
            check_equal(results(partial(gelu_mlp, backend="simt"), inputs, douts)[0], wanted)


def test_before_sm_80():
    """Turing's tensor cores multiply float16 only."""
    inputs = linear_inputs(20, 16, 8, torch.float16, 0)
    wanted = linear(**inputs, backend="simt")
    with simt.device(75, 40, 64 * 1024):
        assert torch.equal(linear(**inputs, backend="simt"), wanted)
        with pytest.raises(RuntimeError, match="bfloat16 products need a GPU of compute capability"):
            linear(**{name: x.bfloat16() for name, x in inputs.items()}, backend="simt")


@pytest.fixture
def tf32():
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def rounded(x):
    """To tf32: the nearest with 10 bits of mantissa, halves away from zero."""
    return ((x.detach().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).requires_grad_()


@PROCESSORS
@pytest.mark.parametrize("C_in, C_out", WIDTHS)
def test_tf32_where_torch_allows_it(tf32, processors, C_in, C_out):
    """On factors that are tf32 already nothing more is lost, and on others it is the product of the rounded ones."""
    exact = linear_inputs(131, C_in, C_out, torch.float32, 3)
    inputs = {"x": rounded(exact["x"]), "weight": rounded(exact["weight"]), "bias": exact["bias"]}
    dout = rounded(draw((131, C_out), torch.float32, 4)).detach()
    with simt.device(processors=processors):
        ours, _ = results(partial(linear, backend="simt"), inputs, [dout])
        check_equal(results(partial(linear, backend="simt"), exact, [dout])[0], ours)
    truth, _ = results(
        partial(linear, backend="reference"),
        {n: x.detach().double().requires_grad_() for n, x in inputs.items()},
        [dout.double()],
    )
    for name, right in truth.items():
        assert (ours[name] - right).abs().max() <= 8 * torch.finfo(torch.float32).eps * right.abs().max(), name


def test_tf32_is_not_taken_unasked():
    inputs = linear_inputs(9, 40, 8, torch.float32, 0)
    usual = linear(**inputs, backend="simt")
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert not torch.equal(linear(**inputs, backend="simt"), usual)
        with simt.device(75, 40, 64 * 1024):  # which has none
            assert torch.equal(linear(**inputs, backend="simt"), usual)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.equal(linear(**inputs, backend="simt"), usual)
