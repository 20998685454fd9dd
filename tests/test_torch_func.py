"""torch.func's transforms of the operators: gradients under them are refused with the remedy, batched backwards are right, to the bit."""

import pytest
import torch
from oracle import is_floating
from test_registration import OPERATORS, operators

from model.config import ModelConfig
from model.fast import FastGPT

TRANSFORMS = {"grad": torch.func.grad, "jacrev": torch.func.jacrev, "vmap": torch.func.vmap}


def with_first(op, inputs, backend):
    """The operator's first result as a function of its first input, and that input."""
    name = next(iter(inputs))

    def call(x):
        result = op(**{**inputs, name: x}, backend=backend)
        return result[0] if isinstance(result, tuple) else result

    return call, inputs[name].detach().requires_grad_()


@operators
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_gradients_under_a_transform_raise(op, inputs, transform):
    """Torch's own error speaks of a method that an autograd.Function would have to have."""
    call, x = with_first(op, inputs(), "cpu")
    with pytest.raises(RuntimeError, match=r"under torch.func .* need backend='reference'"):
        transform(lambda x: call(x).sum())(x[None] if transform is torch.func.vmap else x)


@pytest.mark.parametrize("name", ["layer_norm", "linear_cross_entropy"])
def test_the_reference_has_them(name):
    op, inputs = OPERATORS[name]
    call, x = with_first(op, inputs(), "reference")
    (wanted,) = torch.autograd.grad(call(x).sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda x: call(x).sum())(x), wanted, rtol=0, atol=0)


@operators
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_batched_gradients_are_those_of_each_factor(op, inputs):
    """torch.autograd.grad with is_grads_batched, for which a backward sees several output gradients as one."""
    inputs = inputs()
    leaves = [x for x in inputs.values() if is_floating(x) and x.requires_grad]
    call, _ = with_first(op, inputs, "cpu")
    first = next(iter(inputs.values()))
    out = call(first)
    douts = torch.randn(3, *out.shape, dtype=out.dtype)
    found = torch.autograd.grad(out, leaves, douts, is_grads_batched=True, retain_graph=True)
    for i, dout in enumerate(douts):
        for x, wanted in zip(found, torch.autograd.grad(call(first), leaves, dout), strict=True):
            torch.testing.assert_close(x[i], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_of_a_model(backend):
    """By torch.func with the reference's operators the fast model's gradients are backward()'s; its kernels say so."""
    model = FastGPT(ModelConfig(vocab_size=97, context=8, n_layer=1, n_head=2, n_embd=16), backend=backend)
    idx = torch.arange(8)[None]
    model(idx, idx)[1].backward()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights):
        return torch.func.functional_call(model, weights, (idx, idx))[1]

    if backend == "cpu":
        with pytest.raises(RuntimeError, match="need backend='reference'"):
            torch.func.grad(loss)(weights)
    else:
        for name, found in torch.func.grad(loss)(weights).items():
            torch.testing.assert_close(found, model.get_parameter(name).grad, rtol=0, atol=0)
