"""The cpu backend where its bfloat16 products are torch's, as on a CPU with AMX: the operators' own tests, and the choice."""

import itertools
import subprocess
import sys
from functools import partial

import pytest
import test_cross_entropy
import test_linear
import test_mlp
import test_registration
import torch
from oracle import check_against_oracle, check_repeats, results

from gptkernels import backend as backends
from gptkernels import gelu_mlp, linear, linear_cross_entropy

bf16, fp32 = torch.bfloat16, torch.float32
gelus, flags = ("tanh", "none"), (False, True)
# Bodies of tests beside their arguments after backend and dtype.
BODIES = {
    test_linear.test_matches_the_oracle: [*test_linear.SMALL, *test_linear.EMPTY, *test_linear.LARGE],
    test_linear.test_without_bias: [()],
    test_linear.test_float32_weights: [((9, 20), 11, False), ((50, 400), 70, True)],
    test_linear.test_a_wide_range_of_numbers: [()],
    test_mlp.test_matches_the_oracle: [
        (*case, gelu) for case in [*test_mlp.SMALL, *test_mlp.EMPTY, *test_mlp.LARGE] for gelu in gelus
    ],
    test_mlp.test_without_biases: [(False, False), (True, False), (False, True)],
    test_mlp.test_float32_weights: [((6, 20), 43, "tanh"), ((50, 100), 400, "none")],
    test_mlp.test_gelu_over_the_range_of_numbers: [("tanh",), ("none",)],
    test_mlp.test_a_far_tail_has_no_nan: [("tanh",), ("none",)],
    test_cross_entropy.test_matches_the_oracle: [
        (*case, reduction)
        for case in [*test_cross_entropy.SMALL, *test_cross_entropy.LARGE]
        for reduction in ("mean", "sum")
    ],
    test_cross_entropy.test_float32_weights: [()],
    test_cross_entropy.test_padded_vocabulary: [(1, 1, "sum"), (9, 40, "mean"), (9, 41, "mean"), (9, 63, "sum")],
    test_cross_entropy.test_ignore_index: [(-1, "mean"), (3, "sum")],
    test_cross_entropy.test_no_row_counts: [(0,), (5,)],
    test_cross_entropy.test_large_logits: [(30.0,), (3e3,), (1e6,)],
    test_cross_entropy.test_all_logits_far_from_zero: [(-1,), (1,)],
    test_cross_entropy.test_the_output_gradient_scales_both: [()],
    test_cross_entropy.test_a_loss_scale_saves_small_gradients: [("mean",), ("sum",)],
    test_cross_entropy.test_a_retained_graph_gives_the_same_again: [()],
    test_cross_entropy.test_several_chunks: [(600, 2, 50257, False)],
}
CASES = [
    pytest.param(body, case, id="-".join([body.__module__[5:], body.__name__[5:], *map(str, case)]))
    for body, cases in BODIES.items()
    for case in cases
]
OPERATORS = {
    "linear": (linear, partial(test_linear.linear_inputs, (2, 3, 9), 11), 3),
    "gelu_mlp": (gelu_mlp, partial(test_mlp.mlp_inputs, (2, 3, 9), 11), 6),
    "linear_cross_entropy": (linear_cross_entropy, partial(test_cross_entropy.cross_entropy_inputs, 7, 9, 11), 3),
}
operators = pytest.mark.parametrize("op, inputs, products", OPERATORS.values(), ids=OPERATORS.keys())


@pytest.fixture(autouse=True)
def products_by_torch():
    before = backends.bf16_products()
    backends.take_bf16_products("torch")
    yield
    backends.take_bf16_products(before)


@pytest.mark.parametrize("body, arguments", CASES)
def test_the_operators_own_tests(body, arguments):
    body("cpu", bf16, *arguments)


def products_of_torch(op, inputs):
    """How often a forward and backward ask torch for a product."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        results(partial(op, backend="cpu"), inputs)
    return sum(event.count for event in profile.key_averages() if event.key == "aten::mm")


@operators
def test_which_products_are_torchs(op, inputs, products):
    """Those of bfloat16, beside float32 weights too and under autocast; none of float32, and none where ours are asked for."""
    assert products_of_torch(op, inputs(bf16)) == products
    assert products_of_torch(op, inputs(bf16, weight_dtype=fp32)) == products
    assert products_of_torch(op, inputs(fp32)) == 0
    with torch.autocast("cpu", dtype=bf16):
        assert products_of_torch(op, inputs(fp32)) == products
    backends.take_bf16_products("own")
    assert products_of_torch(op, inputs(bf16)) == 0


@pytest.mark.parametrize("shape, C_out", [((1100, 2), 1000), ((1000, 2), 1100), ((2, 1100), 1000)])
def test_pieces(shape, C_out):
    """More than 2^20 elements that want an epilogue are made piece by piece, cut along the longer side."""
    inputs = partial(test_linear.linear_inputs, shape, C_out, bf16, weight_dtype=fp32)
    check_against_oracle(linear, inputs, "cpu", draws=1)
    assert products_of_torch(linear, inputs(0)) == 4
    check_against_oracle(gelu_mlp, partial(test_mlp.mlp_inputs, shape, C_out, bf16, weight_dtype=fp32), "cpu", draws=1)


@operators
def test_repeats(op, inputs, products):
    """The same bits on the same number of threads: beyond that, torch promises none."""
    check_repeats(partial(op, backend="cpu"), inputs(bf16), repeats=2, threads=(1,))


@test_registration.compiles
@operators
def test_compile(op, inputs, products):
    test_registration.check_compiled(op, inputs(bf16), backend="aot_eager", dynamic=False)


@operators
@pytest.mark.parametrize("dtype", [fp32, bf16])
def test_autocast(op, inputs, products, dtype):
    test_registration.test_autocast(op, inputs, dtype)


def test_opcheck():
    """Every raw operator with a product in it, on bfloat16 tensors."""
    seen = set()
    for op, arguments in test_registration.raw_calls(torch.ops.gptkernels):
        name = op.default.name().partition("::")[2]
        if name.startswith(("linear", "gelu_mlp")):
            narrow = [x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
            torch.library.opcheck(op, tuple(narrow))
            seen.add(name)
    assert len(seen) == 6


AT_IMPORT = """
import torch
torch.cpu.get_capabilities = lambda: {"amx_tile": True}
from gptkernels.backend import bf16_products
print(bf16_products())
"""


def test_the_choice_at_import(monkeypatch):
    """AMX decides; an instruction set that is asked for multiplies by itself."""
    # Which others there are is asked by the same function, which knows of nothing but AMX here.
    for forced, wanted in (("", "torch"), ("baseline", "own")):
        monkeypatch.setenv("GPTKERNELS_CPU_ISA", forced)
        process = subprocess.run([sys.executable, "-c", AT_IMPORT], capture_output=True, text=True)
        assert (process.stdout, process.stderr) == (f"{wanted}\n", "")


def test_what_torch_says_of_amx(monkeypatch):
    """By its public function or the private one of torch 2.10; where torch lacks oneDNN, the tiles are of no use to it."""
    for public, private, onednn in itertools.product(flags, flags, flags):
        # Each version of torch has one of them.
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda public=public: {"amx_tile": public}, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda private=private: private, raising=False)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda onednn=onednn: onednn)
        assert backends.torch_has_amx() == (onednn and (public or private))
    for name in ("get_capabilities", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert not backends.torch_has_amx()
    with pytest.raises(ValueError, match="whose must be 'own' or 'torch', got 'mkl'"):
        backends.take_bf16_products("mkl")
