"""The CUDA kernels compiled by nvcc for GPUs that are not here, and counted by csrc/simt: `gptkernels kernels`.

A part of what `make gpu-static` compiles: attention's forward and two of its gradients, LayerNorm's forward and
cross-entropy, for sm_80.
"""

import dataclasses
import json
import re
import subprocess

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheels for this platform")

from gptkernels import static_cuda, static_simt, static_table
from gptkernels.backend import available_backends

needs_nvcc = pytest.mark.skipif(static_cuda.unavailable() is not None, reason=str(static_cuda.unavailable()))
needs_simt = pytest.mark.skipif(available_backends()["simt"] is not None, reason=str(available_backends()["simt"]))


def kernels_of(op, stem, arch=80):
    return static_cuda.kernels_of(static_cuda.CSRC / op / f"{stem}_cuda.cu", arch)


@needs_nvcc
def test_attention_uses_tensor_cores():
    """Every instance: two dtypes, four widths, with and without dropout."""
    kernels = kernels_of("attention", "attention_forward")
    assert len(kernels) == 16
    for kernel in kernels:
        assert kernel.name.startswith("attention_forward<ForwardTile<") and static_cuda.problems(kernel) == []
        assert kernel.spilled == 0 and kernel.tensor_cores >= 128 and kernel.cp_async and kernel.ldmatrix, kernel
        assert (kernel.widest_load, kernel.widest_store) == (16, 16) and kernel.registers <= 255
        assert kernel.threads in (128, 256), kernel


# The kernels with the fewest registers to spare: gradients in one pass, which hold dq beside dk and dv, with one stage,
# which hold Q's fragments or work on tiles as wide as two stages do, and those whose rows no warps share.
TIGHT = """
#include "attention/attention_forward.cuh"
#include "attention/attention_key_gradient.cuh"
#include "attention/attention_query_gradient.cuh"
namespace gptkernels {
using In = Heads<const bf16>;
using Out = Heads<bf16>;
using Floats = Global<float>;
using Terms = Global<const float>;
using Seed = Global<const int64_t>;
#define KEY_GRADIENT(...)                                                     \
    template __global__ void attention_key_gradient<GradientTile<__VA_ARGS__>>( \
        In, In, In, In, Terms, Out, Out, Floats, Seed, AttentionSizes);
KEY_GRADIENT(bf16, 64, true, 2, 4, 1, 32, 2, true)
KEY_GRADIENT(bf16, 64, false, 2, 4, 1, 32, 2)
KEY_GRADIENT(bf16, 128, true, 2, 2, 2, 64, 1, true)
KEY_GRADIENT(bf16, 128, true, 2, 2, 2, 64, 1)
KEY_GRADIENT(bf16, 128, false, 2, 2, 2, 64, 1, true)
#define QUERY_GRADIENT(...)                                                     \
    template __global__ void attention_query_gradient<GradientTile<__VA_ARGS__>>( \
        In, In, In, In, In, Terms, Floats, Out, Seed, AttentionSizes);
QUERY_GRADIENT(bf16, 128, false, 2, 4, 2, 64, 1)
QUERY_GRADIENT(bf16, 64, false, 2, 4, 1, 32, 2)
template __global__ void attention_forward<ForwardTile<bf16, 128, false, 2, 4, 64>>(
    In, In, In, Out, Floats, Seed, AttentionSizes);
}
"""


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_kernels_short_of_registers_do_not_spill(tmp_path, arch):
    path = tmp_path / "tight_cuda.cu"
    path.write_text(TIGHT)
    kernels = static_cuda.kernels_of(path, arch)
    assert len(kernels) == 8
    for kernel in kernels:
        assert static_cuda.problems(kernel) == [] and kernel.spilled == 0, kernel
        assert kernel.registers > 240 and kernel.tensor_cores and kernel.cp_async and kernel.ldmatrix, kernel


@needs_nvcc
def test_no_spills_on_sm_75():
    """There tiles of more than 64 KiB are empty kernels: D = 256, of this file."""
    kernels = [kernel for kernel in kernels_of("attention", "attention_forward", 75) if "<fp16" in kernel.name]
    assert len(kernels) == 8
    for kernel in kernels:
        assert static_cuda.problems(kernel) == [] and kernel.spilled == 0, kernel
        assert (kernel.tensor_cores == 0) == ("<fp16, 256" in kernel.name), kernel


PACKETS = """
#include "common/device.cuh"
using namespace gptkernels;
__global__ void packets(Global<const float> x, Global<float> y) {
    SHARED_ARRAY(float, tile, 128);
    store(tile + 4 * (int)threadIdx.x, load<4>(x + 4 * (int)threadIdx.x));
    Vector<float, 4> sum = {x[0], x[1], x[2], x[3]};
    __syncthreads();
    for (int i = 0; i < 4; ++i) sum[i] *= tile[threadIdx.x + 32 * i];
    __syncthreads();
    store(tile + 4 * (int)threadIdx.x, sum);
    __syncthreads();
    y[threadIdx.x] = tile[31 - threadIdx.x];
}
"""


@needs_nvcc
def test_floats_go_to_shared_memory_in_packets(tmp_path):
    """In the compiler's own output: split into words there, only the assembler may join them again."""
    path = tmp_path / "packets.cu"
    path.write_text(PACKETS)
    command = ["nvcc", "-ptx", "-O3", "-std=c++20", "-arch=sm_80", f"-I{static_cuda.CSRC}", str(path), "-o", "-"]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"\bst\.shared[.\w]*", code)) == {"st.shared.v4.b32"}


@needs_nvcc
@pytest.mark.parametrize("op, stem", [("layer_norm", "layer_norm_forward"), ("cross_entropy", "cross_entropy")])
def test_rows_are_read_in_packets(op, stem):
    """All but those for rows that no packet fits: their first template argument after the threads is a width of 1."""
    kernels = kernels_of(op, stem)
    assert len(kernels) > 5
    for kernel in kernels:
        assert static_cuda.problems(kernel) == [] and kernel.spilled == 0, kernel
        assert kernel.threads and not kernel.tensor_cores
        elementwise = "kernel<32, 1," in kernel.name or "kernel<0, 1," in kernel.name or "count" in kernel.name
        assert elementwise or kernel.widest_load == 16, kernel


SPILLS = """
__global__ void __launch_bounds__(1024) attention_forward(const float4* x, float4* y, int n) {
    float4 held[16];
    for (int i = 0; i < 16; ++i) held[i] = x[i * 1024 + threadIdx.x];
    for (int k = 0; k < n; ++k)
        for (int i = 0; i < 16; ++i) held[i].x += held[(i + 1) % 16].y * held[(i + 5) % 16].w;
    for (int i = 0; i < 16; ++i) y[i * 1024 + threadIdx.x] = held[i];
}
"""
SLOW = """
struct bf16 {};
template <class T>
__global__ void gemm_kernel(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x] * 2; }
template __global__ void gemm_kernel<bf16>(const float*, float*);
"""


@needs_nvcc
def test_bad_kernels_are_found(tmp_path):
    path = tmp_path / "bad_cuda.cu"
    path.write_text(SPILLS)
    (spills,) = static_cuda.kernels_of(path, 90)
    assert spills.threads == 1024 and spills.spilled_in_loops and "spills" in static_cuda.problems(spills)[0]
    path.write_text(SLOW)
    (slow,) = static_cuda.kernels_of(path, 80)
    assert slow.name == "gemm_kernel<bf16>" and (slow.spilled, slow.widest_load) == (0, 4)
    assert static_cuda.problems(slow) == [
        "multiplies 16-bit matrices without tensor cores",
        "loads its matrices without cp.async",
        "loads no more than 4 bytes at once",
    ]
    assert static_cuda.problems(dataclasses.replace(slow, arch=75)) == []  # no bfloat16 product there: an empty kernel
    path.write_text("__global__ void f() { missing(); }")
    with pytest.raises(RuntimeError, match=r"nvcc .* failed: [\s\S]*missing"):
        static_cuda.kernels_of(path, 80)


@needs_simt
def test_no_bank_conflicts_and_whole_sectors():
    """Every 16-bit kernel on aligned tensors. layer_norm_sum reads a few rows here, in pieces for many."""
    found = list(static_simt.table("", (torch.bfloat16,)))
    assert {counts.op for counts in found} == {"attention", "layer_norm", "linear", "mlp", "cross_entropy"}
    for counts in found:
        assert counts.conflicts == 0, counts
        assert counts.excess <= 1.02 or counts.kernel == "layer_norm_sum", counts
        assert bool(counts.mma) == counts.kernel.startswith(("attention", "gemm")), counts


@needs_simt
@needs_nvcc
def test_the_tables(capsys):
    assert static_table.main(["--of", "cuda", "simt", "--op", "cross", "--arch", "80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["CUDA", "kernel,"] and any(x.startswith("cross_entropy_kernel<bf16") for x in lines)
    assert any(x.split()[:3] == ["cross_entropy", "cross_entropy", "64x64"] for x in lines)
    assert static_table.main(["--of", "simt", "--op", "cross", "--json"]) == 0
    rows = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert {row["table"] for row in rows} == {"simt"} and all(row["conflicts"] == 0 for row in rows)
    assert static_table.main(["--of", "simt", "--op", "linear_cross_entropy"]) == 0
    assert all(x.split()[1] == "cross_entropy" for x in capsys.readouterr().out.splitlines()[1:])
    for table in (static_cuda.table([80], "nothing", 1), static_simt.table("nothing")):
        with pytest.raises(ValueError, match="no kernels of an operator called 'nothing'"):
            next(table)


def test_a_table_that_cannot_be_made(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert static_table.main(["--of", "cuda"]) == 2
    assert "no table of cuda: nvcc and c++filt not found on the PATH" in capsys.readouterr().err
