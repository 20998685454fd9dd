"""The fast model on the kernels for GPUs, emulated on the CPU: the same function as the reference, and one way to train.

"triton" are Triton's kernels interpreted, "simt" the CUDA kernels, which check every access as they run.
"""

import pytest
import torch

from gptkernels import layer_norm
from gptkernels.backend import available_backends
from model.equivalence_run import compare_all
from model.equivalence_subject import subject
from model.fast import FastGPT
from model.generate import generate

pytestmark = pytest.mark.on_cpu
SMALL = ("n_layer=1", "n_embd=16", "n_head=2", "context=8", "batch=2", "vocab_size=13")


@pytest.fixture(params=("triton", "simt"))
def backend(request):
    if reason := available_backends()[request.param]:
        pytest.skip(reason)
    return request.param


VARIANTS = [
    ("triton", (), torch.float32),
    ("triton", ("dropout=0.2",), torch.float32),
    ("triton", ("bias=off", "act=gelu", "pos=none"), torch.float32),
    ("triton", ("dropout=0.2",), torch.bfloat16),
    ("simt", ("dropout=0.2",), torch.float32),
    ("simt", ("bias=off", "act=gelu", "pos=none"), torch.bfloat16),
]


@pytest.mark.parametrize("backend, overrides, dtype", VARIANTS, indirect=["backend"])
def test_the_model_is_the_references_function(backend, overrides, dtype):
    """Every level of check, with three training steps and four tokens of text; what ran twice has the same bits."""
    what = subject("tiny", [*SMALL, *overrides], seed=0)
    result = compare_all(what, steps=3, backend=backend, dtype=dtype, seed=0, runs=2, tokens=4)
    assert len(result.rows) > 30 and [row.quantity for row in result.rows if not row.passed] == []
    assert all(row.repeats is True for row in result.rows)


def test_it_writes_the_same_text(backend):
    model = subject("tiny", SMALL, seed=1).weights.eval()
    prompt = torch.tensor([3, 1, 4])
    expected = list(generate(model, prompt, 12, temperature=0))
    assert list(generate(FastGPT.from_reference(model, backend=backend), prompt, 12, temperature=0)) == expected


def test_every_operator_runs_on_it(backend):
    model = FastGPT.from_reference(subject("tiny", SMALL, seed=0).weights, backend=backend)
    assert set(model.backends().values()) == {backend}


def test_dtypes_that_it_does_not_compute_in_are_refused(backend):
    with pytest.raises(TypeError, match=rf"backend='{backend}' computes in float32 or .*, got torch\.float64"):
        layer_norm(torch.ones(2, 3, dtype=torch.float64), backend=backend)
