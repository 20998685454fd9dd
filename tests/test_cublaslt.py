"""cuBLASLt's epilogues in gelu_mlp, by a library that is none of NVIDIA's but does what theirs is documented to do."""

import ctypes
import json
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheels for this platform")
from oracle import check_against_oracle
from test_mlp import mlp_inputs

from gptkernels import gelu_mlp, tune
from gptkernels.interpreter import interpreted
from gptkernels.ops.linear import choice
from gptkernels.ops.mlp import cublaslt
from gptkernels.ops.mlp import cuda as cuda_operators
from gptkernels.ops.mlp import triton as triton_operators

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
compiled = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler: none in $CXX, g++ or clang++")
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """The library of tests/cublaslt_stand_in.cpp."""
    path = tmp_path_factory.mktemp("cublaslt") / "stand_in.so"
    source = Path(__file__).parent / "cublaslt_stand_in.cpp"
    command = [COMPILER, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", source, "-o", path]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return cublaslt.declared(ctypes.CDLL(str(path)))


@pytest.fixture
def library(stand_in, monkeypatch):
    """In the place of torch's, and the products of both backends left to it where they ask."""
    cublaslt.handle.cache_clear()
    monkeypatch.setattr(cublaslt, "library", lambda: stand_in)
    made, multiply = [], cublaslt.multiply
    monkeypatch.setattr(cublaslt, "multiply", lambda *arguments: made.append(arguments) or multiply(*arguments))
    for module in (triton_operators, cuda_operators):
        monkeypatch.setattr(module, "choose", lambda *_: "cublaslt")
    monkeypatch.setattr(cuda_operators, "own_products", lambda x: False)
    yield made
    assert made, "nothing was asked of the library"
    cublaslt.handle.cache_clear()


@compiled
@pytest.mark.parametrize("backend", ["triton", "simt"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, F_width", [((3, 7, 16), 40), ((1, 8), 8), ((130, 24), 72), ((0, 8), 16)])
@pytest.mark.parametrize("b_fc", [True, False])
def test_matches_the_oracle(library, backend, dtype, shape, F_width, b_fc):
    check_against_oracle(gelu_mlp, partial(mlp_inputs, shape, F_width, dtype, b_fc=b_fc), backend, draws=2)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_weights(library, dtype):
    check_against_oracle(
        gelu_mlp, partial(mlp_inputs, (9, 24), 48, dtype, weight_dtype=torch.float32), "triton", draws=2
    )


@compiled
def test_sums_for_float32_biases_are_not_rounded_to_16_bits(library):
    """The library's would be infinite in float16: 256 rows of 40 times a slope and a weight."""
    inputs = mlp_inputs((256, 16), 8, torch.float16, weight_dtype=torch.float32)
    inputs["b_fc"] = torch.full((8,), 4.0, requires_grad=True)
    y = gelu_mlp(**inputs, backend="triton")
    (db,) = torch.autograd.grad(y, inputs["b_fc"], torch.full_like(y, 40.0))
    right = gelu_mlp(**{name: t.double() for name, t in inputs.items()}, backend="reference")
    (wanted,) = torch.autograd.grad(right, inputs["b_fc"], torch.full_like(right, 40.0))
    assert wanted.abs().max() > 65504
    torch.testing.assert_close(db, wanted, rtol=2e-3, atol=2e-3 * wanted.abs().max().item())


@compiled
def test_misaligned_factors_are_copied(library):
    """The library refuses a pointer off 16 bytes; sums of one chain agree to the bit with those of aligned factors."""
    dtype, x, w, h, g = (
        torch.bfloat16,
        *(torch.randn(shape).bfloat16() for shape in ((6, 16), (24, 16), (6, 24), (6, 24))),
    )
    off = [torch.empty(t.numel() + 1, dtype=dtype)[1:].view(t.shape).copy_(t) for t in (x, w)]
    assert all(t.data_ptr() % 16 for t in off)
    cublaslt.gelu(x, w, None, h, g)
    kept = h.clone(), g.clone()
    cublaslt.gelu(*off, None, h.fill_(7), g.fill_(7))
    assert torch.equal(h, kept[0]) and torch.equal(g, kept[1])


@compiled
def test_what_the_library_refuses_is_said(library):
    x, w, h, g = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((4, 8), (12, 8), (4, 12), (4, 12)))
    with pytest.raises(
        RuntimeError, match=r"cublasLtMatmul of cuBLASLt failed \(invalid value\).*run `gptkernels tune` again"
    ):
        cublaslt.gelu(x, w, None, h, g)  # rows of h must be multiples of 8


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(cublaslt, "library", lambda: None)
    cublaslt.handle.cache_clear()
    x = torch.zeros(8, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="run `gptkernels tune` again"):
        cublaslt.gelu(x, x, None, x.clone(), x.clone())


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch brings the library")
def test_a_cpu_build_of_torch_has_none():
    cublaslt.library.cache_clear()
    assert cublaslt.library() is None


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA: make test-cuda-build")
def test_nvidias_library_takes_the_descriptors():
    """All but the product itself, which needs a GPU."""
    values = {
        cublaslt.TRANSPOSED: ctypes.c_int(1), cublaslt.BIAS_POINTER: ctypes.c_void_p(4096),
        cublaslt.H_POINTER: ctypes.c_void_p(8192), cublaslt.H_STRIDE: ctypes.c_int64(24),
    }  # fmt: skip
    parts = (cublaslt.GELU_LEAVING_H, cublaslt.BIAS), (cublaslt.GELU_GRADIENT, cublaslt.BIAS_GRADIENT)
    with cublaslt.described("MatmulDesc", cublaslt.COMPUTE_32F, cublaslt.FLOAT) as product:
        for epilogue in (part for first, second in parts for part in (first, first + second)):
            for attribute, value in {**values, cublaslt.EPILOGUE: ctypes.c_int(epilogue)}.items():
                size = ctypes.sizeof(value)
                cublaslt.call("cublasLtMatmulDescSetAttribute", product, attribute, ctypes.byref(value), size)
                found, written = type(value)(), ctypes.c_size_t()
                get = cublaslt.library().cublasLtMatmulDescGetAttribute
                assert get(product, attribute, ctypes.byref(found), ctypes.c_size_t(size), ctypes.byref(written)) == 0
                assert (found.value, written.value) == (value.value, size)
    for kind in cublaslt.TYPES.values():
        with cublaslt.described("MatrixLayout", kind, 24, 8, 24) as layout:
            assert layout.value


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A place of its own for winners, and no memory of others."""
    monkeypatch.setenv("GPTKERNELS_CACHE", str(tmp_path))
    for each in (choice.measurements, choice.choose):
        each.cache_clear()
    yield tmp_path / "gemm.json"
    for each in (choice.measurements, choice.choose):
        each.cache_clear()


def tuned(monkeypatch):
    """Lines of `gptkernels tune` on a GPU that is the CPU, where cuBLASLt is the fastest."""
    seconds = iter([2e-3, 2e-3, 1e-3] * 1000)
    monkeypatch.setattr(tune, "by_rule", lambda *_: "triton")
    monkeypatch.setattr(tune, "products", lambda *_: [("gelu", 16, 24, 8), ("gelu_backward", 16, 24, 8)])
    with interpreted():
        return list(tune.tune(8, 16, torch.bfloat16, "cpu", "A GPU", lambda call: (call(), next(seconds))[1]))


@compiled
def test_tune_takes_it_where_it_wins_and_agrees(library, cache, monkeypatch):
    lines = tuned(monkeypatch)
    assert len(lines) == 2 and all("-> cublaslt  (not the rule's)" in line for line in lines), lines
    assert set(json.loads(cache.read_text())["A GPU"].values()) == {"cublaslt"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")
    monkeypatch.setattr(choice, "by_rule", lambda *_: "cublas")
    asked = "gelu", 16, 24, 8, torch.bfloat16, torch.device("cuda", 0)
    assert (choice.choose(*asked, True), choice.choose(*asked, False)) == ("cublaslt", "cublas")


@compiled
@pytest.mark.parametrize("wrong", ["a row", "NaN", "ReLU", "refused"])
def test_tune_leaves_what_is_wrong(library, cache, monkeypatch, wrong):
    right = cublaslt.multiply

    def multiply(weight, along_k, x, out, h, epilogue, bias):
        if wrong == "refused":
            library.append(wrong)
            raise RuntimeError("cublasLtMatmul of cuBLASLt failed: not supported")
        right(weight, along_k, x, out, h, epilogue, bias)
        if wrong == "ReLU":
            out.copy_(h.relu() if along_k else out * (h > 0))
        else:
            out[-1] = out[0] if wrong == "a row" else float("nan")

    monkeypatch.setattr(cublaslt, "multiply", multiply)
    seconds = iter([2e-3, 1e-3] * 1000)
    monkeypatch.setattr(tune, "by_rule", lambda *_: "triton")
    monkeypatch.setattr(tune, "products", lambda *_: [("gelu", 16, 24, 8), ("gelu_backward", 16, 24, 8)])
    with interpreted():
        lines = list(tune.tune(8, 16, torch.bfloat16, "cpu", "A GPU", lambda call: (call(), next(seconds))[1]))
    assert [("without cublaslt: " in line, "-> cublas " in line) for line in lines] == 2 * [
        (True, False),
        (False, True),
    ]
    assert set(json.loads(cache.read_text())["A GPU"].values()) == {"cublas"}
