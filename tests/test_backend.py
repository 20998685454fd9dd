"""Which backend runs: explicit choices, auto's fallback, instruction sets, and a package without its library."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gptkernels
from gptkernels import backend as backends
from gptkernels import layer_norm, linear

ROOT = Path(__file__).parent.parent
x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


def run(code, folder=ROOT, **environment):
    """A program that finds in its folder the gptkernels to import."""
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder)


def test_available_backends():
    available = gptkernels.available_backends()
    assert tuple(available) == backends.BACKENDS
    assert available["reference"] is None and available["cpu"] is None
    for name, reason in available.items():
        if reason is not None:
            assert name in reason and "use" in reason
    isa, explanation = backends.cpu_library()
    assert isa == backends.supported_isas()[-1] and f"_cpu_{isa}.so loaded" in explanation


def test_auto_takes_the_cpu_kernels():
    for dtype in (torch.float32, torch.bfloat16):
        assert backends.resolve("auto", x.to(dtype)) == "cpu"


@pytest.mark.parametrize("name", ["CPU", "", "eager", None])
def test_unknown_backends(name):
    with pytest.raises(ValueError, match="backend must be auto or one of reference, triton, cuda, cpu, simt, got"):
        layer_norm(x, backend=name)


def test_explicit_backends_never_fall_back():
    for name, reason in gptkernels.available_backends().items():
        if reason is not None:
            with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run here: "):
                layer_norm(x, backend=name)
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(TypeError, match=f"backend='cpu' computes in float32 or bfloat16, got {dtype}: convert, or"):
            layer_norm(x.to(dtype), backend="cpu")
    with pytest.raises(ValueError, match="backend='cpu' needs tensors on cpu, got meta: move them"):
        layer_norm(x.to("meta"), backend="cpu")


def test_the_residual_counts_too():
    """A float64 residual cannot be added by the cpu kernels, whatever x is."""
    with pytest.raises(TypeError, match=r"backend='cpu' computes in float32 or bfloat16, got torch\.float64"):
        layer_norm(x, residual=x.double(), backend="cpu")


def test_reference_takes_every_dtype():
    for dtype in (torch.float16, torch.float64):
        y = linear(x.to(dtype), torch.ones(2, 5, dtype=dtype), backend="reference")
        assert y.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_auto_says_its_fallback_once(dtype, capsys, monkeypatch):
    monkeypatch.setattr(backends, "_printed", set())
    for _ in range(3):
        y = layer_norm(x.to(dtype))
        assert torch.equal(y, layer_norm(x.to(dtype), backend="reference"))
    captured = capsys.readouterr()
    line = f"gptkernels: backend auto takes the reference (plain PyTorch): no kernels for {dtype} on cpu\n"
    assert captured.err == line and captured.out == ""
    layer_norm(x.to("meta"))
    assert "no kernels for torch.float32 on meta" in capsys.readouterr().err
    layer_norm(x), layer_norm(x.to(dtype), backend="reference")
    assert capsys.readouterr().err == ""


# Every operator in both dtypes, by the same budget as everywhere: run with each instruction set that the CPU has.
BUDGET = """
import sys
sys.path.insert(0, "tests")
import torch
torch._C._set_deterministic_algorithms(True)
from functools import partial
from oracle import LAYOUTS, check_against_oracle, check_layouts
import test_attention, test_cross_entropy, test_layer_norm, test_linear, test_mlp
import gptkernels
from gptkernels.backend import cpu_library
for dtype in (torch.float32, torch.bfloat16):
    for shape in ((1, 2, 65, 65, 33), (1, 1, 5, 70, 8)):
        for options in ({}, {"dropout_p": 0.2, "seed": 3}):
            inputs = partial(test_attention.attention_inputs, *shape, dtype)
            check_against_oracle(partial(gptkernels.causal_attention, **options), inputs, "cpu")
    check_against_oracle(gptkernels.layer_norm, partial(test_layer_norm.all_inputs, (9, 43), dtype), "cpu")
    for approximate in ("tanh", "none"):
        inputs = partial(test_mlp.mlp_inputs, (13, 21), 70, dtype)
        check_against_oracle(partial(gptkernels.gelu_mlp, approximate=approximate), inputs, "cpu")
    for shape, C_out in (((25, 33), 31), ((7, 769), 20)):
        check_against_oracle(gptkernels.linear, partial(test_linear.linear_inputs, shape, C_out, dtype), "cpu")
    inputs = partial(test_cross_entropy.cross_entropy_inputs, 17, 20, 43, dtype)
    check_against_oracle(gptkernels.linear_cross_entropy, inputs, "cpu")
    for op, given in (
        (gptkernels.causal_attention, test_attention.attention_inputs(2, 2, 7, 9, 12, dtype)),
        (gptkernels.causal_attention_packed, {"qkv": test_attention.draw((2, 7, 3, 2, 12), dtype, 1)}),
        (gptkernels.layer_norm, test_layer_norm.all_inputs((2, 5, 43), dtype)),
        (gptkernels.linear, test_linear.linear_inputs((2, 5, 33), 31, dtype)),
        (gptkernels.gelu_mlp, test_mlp.mlp_inputs((2, 5, 21), 35, dtype)),
        (gptkernels.linear_cross_entropy, test_cross_entropy.cross_entropy_inputs(9, 20, 43, dtype)),
    ):
        for layout in LAYOUTS:
            check_layouts(partial(op, backend="cpu"), given, layout, [name for name in given if name != "targets"])
print(cpu_library()[0])
"""


@pytest.mark.parametrize("isa", backends.supported_isas())
def test_instruction_sets(isa):
    process = run(BUDGET, GPTKERNELS_CPU_ISA=isa)
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"{isa}\n"


def test_an_instruction_set_that_the_cpu_lacks():
    process = run("import gptkernels", GPTKERNELS_CPU_ISA="avx1024")
    assert process.returncode != 0
    known = ", ".join(backends.supported_isas())
    assert f"GPTKERNELS_CPU_ISA must be one of {known} on this CPU, got 'avx1024': unset it" in process.stderr


WITHOUT_LIBRARY = """
import torch, gptkernels
x, w = torch.randn(3, 5), torch.randn(2, 5)
assert gptkernels.__file__.startswith({folder!r}), gptkernels.__file__
assert torch.equal(gptkernels.linear(x, w), gptkernels.linear(x, w, backend="reference"))
print(gptkernels.available_backends()["cpu"])
try:
    gptkernels.linear(x, w, backend="cpu")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("broken", [False, True], ids=["absent", "broken"])
def test_without_a_library(broken, tmp_path):
    """Nothing is built, or what is there does not load: the reference works, and cpu says what to do."""
    shutil.copytree(ROOT / "gptkernels", tmp_path / "gptkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    reason = "is not built"
    if broken:
        reason = "does not load: "
        for isa in backends.ISAS:
            (tmp_path / "gptkernels" / f"_cpu_{isa}.so").write_text("not a library")
    process = run(WITHOUT_LIBRARY.format(folder=str(tmp_path)), folder=tmp_path)
    assert process.returncode == 0, process.stderr
    explanation, error = process.stdout.splitlines()
    assert explanation.startswith("the native CPU library is missing: ") and reason in explanation
    assert "run `pip install -e .` with a C++20 compiler" in explanation
    assert error == f"backend='cpu' cannot run here: {explanation}"
    assert process.stderr.count("backend auto takes the reference (plain PyTorch)") == 1


def test_how_far_apart_the_cores_are():
    """Of two threads that run at the same time: on a busy machine some tries find them so. A try ends after 20 ms."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = [seconds for _ in range(20) if (seconds := backends.cores_apart())]
        assert found and 1e-9 < min(found) < 0.02
        torch.set_num_threads(1)
        assert backends.cores_apart() is None
    finally:
        torch.set_num_threads(threads)


def test_a_scale_that_learns_is_refused():
    """Its gradient would be lost: q times it has one."""
    q = torch.randn(1, 2, 3, 4)
    scale = torch.nn.Parameter(torch.tensor(0.5))
    for call in (
        lambda: gptkernels.causal_attention(q, q, q, scale=scale),
        lambda: gptkernels.causal_attention_packed(torch.randn(1, 3, 3, 2, 4), scale=scale),
    ):
        with pytest.raises(
            TypeError, match=r"scale must be a number, got a tensor .*: multiply q by it, with scale=1.0"
        ):
            call()
    assert torch.equal(*(gptkernels.causal_attention(q, q, q, scale=s) for s in (0.5, scale.detach())))


def test_attention_takes_what_autocast_makes_one_dtype():
    """As scaled_dot_product_attention does: rotary positions leave q and k in float32 beside a v in 16 bits."""
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gptkernels.causal_attention(q, k, v.bfloat16())
        wanted = gptkernels.causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
        with pytest.raises(TypeError, match="one floating dtype"):
            gptkernels.causal_attention(q, k, v.double())
        with pytest.raises(TypeError, match="one floating dtype"):
            gptkernels.causal_attention(q, k, v.int())
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)
    with pytest.raises(TypeError, match="one floating dtype"):
        gptkernels.causal_attention(q, k, v.bfloat16())
