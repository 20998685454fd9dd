"""The fast model on Triton's kernels, interpreted on the CPU: the same function as the reference, and one way to train."""

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheels for this platform")

from gptkernels import layer_norm
from model.equivalence_run import compare_all
from model.equivalence_subject import subject
from model.fast import FastGPT
from model.generate import generate

SMALL = ("n_layer=1", "n_embd=16", "n_head=2", "context=8", "batch=2", "vocab_size=13")


@pytest.mark.parametrize(
    "overrides, dtype",
    [
        ((), torch.float32),
        (("dropout=0.2",), torch.float32),
        (("bias=off", "act=gelu", "pos=none"), torch.float32),
        (("dropout=0.2",), torch.bfloat16),
    ],
)
def test_the_model_is_the_references_function(overrides, dtype):
    """Every level of check, with five training steps and four tokens of text; what ran twice has the same bits."""
    what = subject("tiny", [*SMALL, *overrides], seed=0)
    result = compare_all(what, steps=5, backend="triton", dtype=dtype, seed=0, runs=2, tokens=4)
    assert len(result.rows) > 30 and [row.quantity for row in result.rows if not row.passed] == []
    assert all(row.repeats is True for row in result.rows)


def test_it_writes_the_same_text():
    model = subject("tiny", SMALL, seed=1).weights.eval()
    prompt = torch.tensor([3, 1, 4])
    expected = list(generate(model, prompt, 12, temperature=0))
    assert list(generate(FastGPT.from_reference(model, backend="triton"), prompt, 12, temperature=0)) == expected


def test_every_operator_runs_on_it():
    model = FastGPT.from_reference(subject("tiny", SMALL, seed=0).weights, backend="triton")
    assert set(model.backends().values()) == {"triton"}


def test_dtypes_that_it_does_not_compute_in_are_refused():
    with pytest.raises(TypeError, match=r"backend='triton' computes in float32 or .*, got torch\.float64"):
        layer_norm(torch.ones(2, 3, dtype=torch.float64), backend="triton")
