"""The operators and the fast model on a GPU: graphs, streams, compilation, tensors beyond 2^31 elements, whole models.

Values and gradients of each operator are the business of its own test file, which runs on the GPU where there is one.
"""

import copy
from functools import partial

import pytest
import torch
from oracle import CUDA, GPU, check_against_oracle, check_equal, largest, results
from test_attention import attention_inputs
from test_cross_entropy import cross_entropy_inputs
from test_layer_norm import all_inputs
from test_linear import linear_inputs
from test_mlp import mlp_inputs
from test_model import batch, make_reference

from gptkernels import causal_attention, causal_attention_packed, gelu_mlp, layer_norm, linear, linear_cross_entropy
from model.config import ModelConfig
from model.fast import FastGPT

pytestmark = pytest.mark.skipif(not GPU, reason="needs a GPU")
backends = pytest.mark.parametrize("backend", ["triton", *CUDA])
OPERATORS = {
    "causal_attention": (causal_attention, lambda dtype: attention_inputs(2, 3, 200, 200, 64, dtype)),
    "dropout": (
        partial(causal_attention, dropout_p=0.2),
        lambda dtype: {**attention_inputs(2, 3, 130, 130, 64, dtype), "seed": torch.tensor(3)},
    ),
    "layer_norm": (layer_norm, lambda dtype: all_inputs((300, 768), dtype)),
    "gelu_mlp": (gelu_mlp, lambda dtype: mlp_inputs((200, 128), 512, dtype)),
    "linear": (linear, lambda dtype: linear_inputs((200, 128), 384, dtype)),
    "linear_cross_entropy": (linear_cross_entropy, lambda dtype: cross_entropy_inputs(300, 128, 1000, dtype)),
}
operators = pytest.mark.parametrize("op, inputs", OPERATORS.values(), ids=OPERATORS.keys())


@backends
@operators
def test_graph(backend, op, inputs):
    """Captured with its backward once and replayed on other numbers, an operator gives the bits of an ordinary call."""
    call = partial(op, backend=backend)
    given = {name: x.detach().requires_grad_(x.requires_grad) for name, x in inputs(torch.bfloat16).items()}
    wanting = [x for x in given.values() if x.requires_grad]

    def step():
        outputs = call(**given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [*outputs, *torch.autograd.grad(outputs, wanting, [torch.ones_like(y) for y in outputs])]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles, and makes the workspaces
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for factor in (1.0, 0.5):
        with torch.no_grad():
            for x in wanting:
                x.mul_(factor)
        graph.replay()
        for found, wanted in zip(captured, step(), strict=True):
            assert torch.equal(found, wanted)


@backends
@operators
def test_current_stream(backend, op, inputs):
    """On a stream of its own an operator waits for what was queued there before, as every operator of torch does."""
    call = partial(op, backend=backend)
    given = inputs(torch.bfloat16)
    wanted, douts = results(call, given)
    stream = torch.cuda.Stream()
    late = {name: torch.zeros_like(x).requires_grad_(x.requires_grad) for name, x in given.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(100_000_000)
        for name, x in late.items():
            x.copy_(given[name])
    with torch.cuda.stream(stream):
        outputs = call(**late)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad(outputs, [x for x in late.values() if x.requires_grad], douts)
    stream.synchronize()
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    names = [name for name, x in late.items() if x.requires_grad]
    check_equal({**found, **{f"gradient of {n}": g for n, g in zip(names, gradients, strict=True)}}, wanted)


@backends
@operators
def test_compile(backend, op, inputs):
    """As one graph of inductor's an operator has eager's bits."""
    torch._dynamo.reset()
    call = partial(op, backend=backend)
    given = inputs(torch.bfloat16)
    wanted, douts = results(call, given)
    check_equal(results(torch.compile(lambda **kw: call(**kw), fullgraph=True), given, douts)[0], wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape, F_width", [((130, 64), 256), ((513, 200), 328), ((7, 24), 40), ((300, 33), 65)])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_triton_products(monkeypatch, dtype, shape, F_width, approximate):
    """Triton's own products, which choose() leaves to cuBLAS on many GPUs; those of float32 on all of them."""
    for module in ("linear", "mlp"):
        monkeypatch.setattr(f"gptkernels.ops.{module}.triton.choose", lambda *_: "triton")
    torch.set_default_device("cuda")
    try:
        inputs = partial(mlp_inputs, shape, F_width, dtype)
        check_against_oracle(partial(gelu_mlp, approximate=approximate), inputs, "triton")
        wider = partial(mlp_inputs, shape, F_width, dtype, weight_dtype=torch.float32)
        check_against_oracle(partial(gelu_mlp, approximate=approximate), wider, "triton")
    finally:
        torch.set_default_device(None)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape, F_width", [((130, 64), 256), ((513, 200), 328), ((7, 24), 40)])
@pytest.mark.parametrize("b_fc", [True, False])
def test_cublaslt(monkeypatch, backend, dtype, shape, F_width, b_fc):
    """NVIDIA's library with its epilogues, which no rule chooses."""
    for module in ("triton", "cuda"):
        monkeypatch.setattr(f"gptkernels.ops.mlp.{module}.choose", lambda *_: "cublaslt")
    monkeypatch.setattr("gptkernels.ops.mlp.cuda.own_products", lambda _: False)
    torch.set_default_device("cuda")
    try:
        check_against_oracle(gelu_mlp, partial(mlp_inputs, shape, F_width, dtype, b_fc=b_fc), backend)
    finally:
        torch.set_default_device(None)


LARGE = {  # more than 2^31 elements in 16 bits, and the last of them computed alone
    "layer_norm": (lambda x, **kw: layer_norm(x, **kw), (2**21 + 5, 1024)),
    "causal_attention_packed": (causal_attention_packed, (2**10, 1024, 3, 11, 64)),
    "gelu_mlp": (
        lambda x, **kw: gelu_mlp(x, torch.ones(4096, 64).to(x) / 64, None, torch.ones(64, 4096).to(x) / 64, None, **kw),
        (2**19 + 7, 64),
    ),
}


@backends
@pytest.mark.parametrize("call, shape", LARGE.values(), ids=LARGE.keys())
def test_beyond_two_to_the_31(backend, call, shape):
    """The last rows of a large tensor, and their gradients, are those of these rows alone."""
    x = torch.empty(shape, dtype=torch.bfloat16).normal_().requires_grad_()
    y = call(x, backend=backend)
    dy = torch.empty_like(y).normal_()
    (dx,) = torch.autograd.grad(y, x, dy)
    last = x.detach()[-2:].clone().requires_grad_()
    alone = call(last, backend=backend)
    (dlast,) = torch.autograd.grad(alone, last, dy[-2:].clone())
    for found, wanted in ((y[-2:], alone), (dx[-2:], dlast)):
        assert largest(found.double() - wanted.double()) <= 2 * torch.finfo(x.dtype).eps * largest(wanted.double())


CONFIG = ModelConfig(vocab_size=1000, context=200, n_layer=3, n_head=4, n_embd=256, dropout=0.1)


def outputs(gpt, x, y, dtype):
    """Logits, loss and every gradient, in float64."""
    gpt.zero_grad()
    options = {"return_logits": True} if isinstance(gpt, FastGPT) else {}
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not torch.float32):
        logits, loss = gpt(x, y, seed=11, **options)
    loss.backward()
    gradients = {name: p.grad.double() for name, p in gpt.named_parameters()}
    return {"logits": logits.detach().double(), "loss": loss.detach().double(), **gradients}


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model(backend, dtype):
    """The fast model errs at most as the operators' rule allows, float64 being the truth; twice it has the same bits."""
    worst = {}
    for draw in range(3):
        with torch.device("cpu"):
            gpt, (x, y) = make_reference(CONFIG, draw).cuda(), batch(CONFIG, B=4, seed=draw)
        x, y = x.cuda(), y.cuda()
        oracle = outputs(copy.deepcopy(gpt).double(), x, y, torch.float32)
        plain = outputs(gpt, x, y, dtype)
        fast = FastGPT.from_reference(gpt, backend=backend)
        ours = outputs(fast, x, y, dtype)
        again = outputs(fast, x, y, dtype)
        for name, right in oracle.items():
            assert torch.equal(ours[name], again[name]), name
            found = (largest(ours[name] - right), largest(plain[name] - right), largest(right))
            worst[name] = [max(pair) for pair in zip(found, worst.get(name, found), strict=True)]
    for name, (error, plain_error, magnitude) in worst.items():
        allowed = (2 if name in ("logits", "loss") else 3) * plain_error + torch.finfo(dtype).eps * magnitude
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
