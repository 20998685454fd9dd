"""The library of CUDA kernels against a CUDA build of torch, where a GPU need not be: `make test-cuda-build`."""

import json
import os
import subprocess
import sys

import pytest
import torch

from gptkernels.cuda_backend import FOLDER, PYTHON
from gptkernels.library import NAMES

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA: make test-cuda-build")


def without_a_gpu(code):
    """What a program prints that finds no GPU, every symbol of the libraries looked up at once."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "LD_BIND_NOW": "1"}
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FOLDER.parent)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_every_library_is_built():
    report = json.loads((FOLDER / "_build.json").read_text())
    assert {"gptkernels._cuda", "gptkernels._simt", "gptkernels._simt_report"} < report.keys()
    assert set(report.values()) == {"built"}


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_has_cuda_kernels(name):
    """At the CUDA key, and from the library: where one lacks, a function that says so stands there."""
    (place,) = [x for x in torch._C._dispatch_dump(f"gptkernels::{name}").splitlines() if x.startswith("CUDA: ")]
    assert ("_cuda_torch.cpp:" in place) == (name not in PYTHON), place


def test_the_kernels_that_python_calls():
    names = [x for x in torch._C._dispatch_get_all_op_names() if x.startswith("gptkernels_kernels::")]
    assert len(names) > 4
    assert [x for x in names if not torch._C._dispatch_has_kernel_for_dispatch_key(x, "CUDA")] == []


def test_a_call_without_a_gpu_says_what_is_missing():
    output = without_a_gpu("""
import torch
from gptkernels import causal_attention, gelu_mlp, layer_norm, linear, linear_cross_entropy
x, w = torch.ones(4, 8), torch.ones(8, 8)
targets = torch.zeros(4, dtype=torch.int64)
q = torch.ones(1, 1, 4, 8)
for call in (
    lambda: causal_attention(q, q, q, backend="cuda"),
    lambda: layer_norm(x, backend="cuda"),
    lambda: gelu_mlp(x, w, None, w, None, backend="cuda"),
    lambda: linear(x, w, backend="cuda"),
    lambda: linear_cross_entropy(x, w, targets, backend="cuda"),
):
    try:
        call()
    except RuntimeError as error:
        print(error)
""")
    message = "backend='cuda' cannot run here: cuda finds no GPU that torch can use: use backend='simt', 'cpu' or"
    assert output.count(message) == 5, output


def test_cpu_tensors_are_computed_as_ever():
    code = "import torch, gptkernels; print(gptkernels.linear(torch.ones(1, 2), torch.ones(3, 2)).tolist())"
    assert without_a_gpu(code) == "[[2.0, 2.0, 2.0]]\n"
