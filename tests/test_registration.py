"""The operators in PyTorch's machinery: opcheck, compile, export, autocast, checkpointing, functional calls."""

import copy
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from oracle import check_equal, draw, is_floating, results
from test_attention import attention_inputs
from test_cross_entropy import cross_entropy_inputs
from test_layer_norm import all_inputs, layer_norm_inputs
from test_linear import linear_inputs
from test_mlp import mlp_inputs
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gptkernels.library
from gptkernels import (
    causal_attention,
    causal_attention_packed,
    gelu_mlp,
    layer_norm,
    linear,
    linear_cross_entropy,
    triton_backend,
)
from gptkernels.backend import operators as namespace

fp32 = torch.float32
# Every public operator with arguments that use all of its parts.
OPERATORS = {
    "causal_attention": (causal_attention, lambda dtype=fp32: attention_inputs(1, 2, 5, 7, 8, dtype)),
    "dropout": (
        partial(causal_attention, dropout_p=0.3),
        lambda dtype=fp32: {**attention_inputs(1, 2, 5, 5, 8, dtype), "seed": torch.tensor(3)},
    ),
    "causal_attention_packed": (causal_attention_packed, lambda dtype=fp32: {"qkv": draw((2, 5, 3, 2, 8), dtype, 1)}),
    "layer_norm": (
        layer_norm,
        lambda dtype=fp32: layer_norm_inputs((2, 3, 9), dtype, weight=fp32, bias=fp32),
    ),
    "add_layer_norm": (layer_norm, lambda dtype=fp32: all_inputs((2, 3, 9), dtype)),
    "gelu_mlp": (gelu_mlp, lambda dtype=fp32: mlp_inputs((2, 3, 9), 11, dtype)),
    "linear": (linear, lambda dtype=fp32: linear_inputs((2, 3, 9), 11, dtype)),
    "linear_cross_entropy": (linear_cross_entropy, lambda dtype=fp32: cross_entropy_inputs(7, 9, 11, dtype)),
}
operators = pytest.mark.parametrize("op, inputs", OPERATORS.values(), ids=OPERATORS.keys())


def raw_calls(raw):
    """Every raw operator of a namespace with arguments; a backward with what its forward saved."""
    x, w, b = torch.randn(2, 3, 9), torch.randn(11, 9), torch.randn(11)
    yield raw.linear_forward, (x, w, b)
    yield raw.linear_backward, (torch.randn(2, 3, 11), x, w, True)
    yield raw.linear_backward, (torch.randn(2, 3, 11), x, w, False)
    proj = torch.randn(9, 11)
    yield raw.gelu_mlp_forward, (x, w, b, proj, None, True)
    _, h = raw.gelu_mlp_forward(x, w, b, proj, None, False)
    yield raw.gelu_mlp_backward, (torch.randn(2, 3, 9), x, h, w, proj, True, False, False)
    weight = torch.randn(9)
    yield raw.layer_norm_forward, (x, weight, weight, 1e-5, torch.bfloat16)
    yield raw.add_layer_norm_forward, (x.bfloat16(), x, weight, None, 1e-5, torch.bfloat16)
    _, total, mean, rstd = raw.add_layer_norm_forward(x, x, weight, None, 1e-5, torch.float32)
    yield raw.layer_norm_backward, (x, total, total, weight, False, mean, rstd)
    yield raw.layer_norm_backward, (x, None, total, None, True, mean, rstd)
    q, k, v = (t.detach() for t in attention_inputs(2, 3, 5, 7, 8, torch.float32).values())
    seed = torch.tensor(3)
    yield raw.attention_forward, (q, k, v, 0.3, 0.2, seed)
    out, stats = raw.attention_forward(q, k, v, 0.3, 0.0, None)
    yield raw.attention_backward, (torch.randn_like(q), q, k, v, out, stats, 0.3, 0.0, None)
    qkv = torch.randn(2, 5, 3, 3, 8)
    yield raw.attention_packed_forward, (qkv, 0.3, 0.0, None)
    out, stats = raw.attention_packed_forward(qkv, 0.3, 0.2, seed)
    yield raw.attention_packed_backward, (torch.randn_like(out), qkv, out, stats, 0.3, 0.2, seed)
    hidden, targets = torch.randn(7, 9), torch.randint(8, (7,))
    yield raw.linear_cross_entropy_forward, (hidden, w, targets, -100, True, 8)
    yield raw.linear_cross_entropy_gradients, (hidden, w, targets, -100, False, 11)


@pytest.mark.parametrize("backend", ["cpu", "triton", "simt"])
def test_opcheck(backend):
    raw, seen = namespace(backend), set()
    for op, arguments in raw_calls(raw):
        torch.library.opcheck(op, arguments)
        seen.add(op.default.name().removeprefix(f"{raw.name}::"))
    assert seen == set(gptkernels.library.NAMES)


@pytest.mark.parametrize("shape", [(0, 9), (0, 3, 9)])
@pytest.mark.parametrize("backend", ["cpu", "triton", "simt"])
def test_opcheck_without_rows(backend, shape):
    raw = namespace(backend)
    x, w, b = torch.randn(shape), torch.randn(11, 9), torch.randn(11)
    torch.library.opcheck(raw.linear_forward, (x, w, b))
    torch.library.opcheck(raw.layer_norm_forward, (x, None, None, 1e-5, torch.float32))


# torch's own: Dynamo instantiates an autograd.Function while it traces one, and inductor imports torch.jit.
compiles = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:.*torch.jit:DeprecationWarning"
)


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def under(manager, call, x):
    with manager:
        return call(x)


WATCHERS = {
    "mode": lambda call, x: under(Watch(), call, x),
    "function mode": lambda call, x: under(torch.device("cpu"), call, x),
    "profiler": lambda call, x: under(torch.autograd.profiler.profile(), call, x),
    "subclass": lambda call, x: call(x.as_subclass(Subclass)),
    "vmap": lambda call, x: torch.func.vmap(call)(x[None])[0],
    "trace": lambda call, x: torch.jit.trace(call, (x,), check_trace=False)(x),
    "compile": lambda call, x: torch.compile(call, fullgraph=True, backend="aot_eager")(x),
}


@compiles
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("watcher", [None, *WATCHERS])
def test_triton_goes_past_the_dispatcher_unless_it_is_watched(monkeypatch, watcher):
    """Under each watcher the operator that it can see is called, as often as it is not without; the result is the same."""
    ways, once = [], triton_backend.watched
    monkeypatch.setattr(triton_backend, "watched", lambda arguments: ways.append(once(arguments)) or ways[-1])

    def call(x):
        return linear(x, weight, backend="triton")

    x, weight = torch.randn(2, 5), torch.randn(3, 5)
    right = x @ weight.T
    found = WATCHERS[watcher](call, x) if watcher else call(x)
    torch.testing.assert_close(torch.Tensor(found), right)
    assert set(ways) == {watcher is not None}


def check_compiled(op, inputs, **options):
    """Compiled as one graph, results and gradients have eager's bits."""
    torch._dynamo.reset()
    wanted, douts = results(op, inputs)
    compiled = torch.compile(lambda *args, **kwargs: op(*args, **kwargs), fullgraph=True, **options)
    check_equal(results(compiled, inputs, douts)[0], wanted)


@compiles
@operators
def test_compile(op, inputs):
    check_compiled(op, inputs(), backend="aot_eager", dynamic=False)


@compiles
def test_compile_with_an_int_as_seed():
    torch._dynamo.reset()
    q = draw((1, 2, 5, 8), fp32, 1)
    call = partial(causal_attention, q, q, q, dropout_p=0.3)
    compiled = torch.compile(lambda seed: call(seed=seed), fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 2**40):
        assert torch.equal(compiled(seed), call(seed=seed))


# An operator, the names of the tensors for its arguments in turn, and those tensors.
TWICE = {
    "q is k is v": (causal_attention, "xxx", {"x": (1, 2, 5, 8)}),
    "k is v": (causal_attention, "xyy", {"x": (1, 2, 5, 8), "y": (1, 2, 7, 8)}),
    "x is residual": (lambda x, w, b, r: layer_norm(x, w, b, residual=r), "xwwx", {"x": (8, 8), "w": (8,)}),
    "linear": (linear, "xx", {"x": (8, 8)}),
    "gelu_mlp": (gelu_mlp, "xxbxb", {"x": (8, 8), "b": (8,)}),
    "linear_cross_entropy": (lambda x, w: linear_cross_entropy(x, w, torch.arange(8)), "xx", {"x": (8, 8)}),
}


def in_every_order(parts):
    """The sums that numbers of up to three tensors have: of two any order is the same, of three the last one matters."""
    if len(parts) < 3:
        return [sum(parts)]
    return [sum(parts[:i] + parts[i + 1 :]) + last for i, last in enumerate(parts)]


@compiles
@pytest.mark.parametrize("op, names, shapes", TWICE.values(), ids=TWICE.keys())
def test_compile_with_a_tensor_passed_twice(op, names, shapes):
    """Its gradient is the sum of those of tensors that are equal but not the same, in whatever order a graph adds them."""
    torch._dynamo.reset()
    inputs = {name: draw(shape, fp32, seed) for seed, (name, shape) in enumerate(shapes.items())}
    apart = {f"{name}{i}": inputs[name].detach().clone().requires_grad_() for i, name in enumerate(names)}
    wanted, douts = results(lambda **given: op(*given.values()), apart)
    call = torch.compile(lambda **given: op(*(given[name] for name in names)), backend="aot_eager", fullgraph=True)
    found, _ = results(call, inputs, douts)
    assert all(torch.equal(found[name], right) for name, right in wanted.items() if name.startswith("output"))
    for name in inputs:
        parts = [wanted[f"gradient of {name}{i}"] for i, passed in enumerate(names) if passed == name]
        assert any(torch.equal(found[f"gradient of {name}"], total) for total in in_every_order(parts)), name


@compiles
def test_compile_with_inductor():
    """A block's worth of operators in one compilation: what inductor does around them must keep strides and values."""

    def block(x, residual, weight, qkv_weight, w_fc, w_proj):
        y, total = layer_norm(x, weight, None, residual=residual)
        qkv = linear(y * 1.5, qkv_weight).view(2, 5, 3, 2, 4)
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        mixed = causal_attention(q, k, v).transpose(1, 2) + causal_attention_packed(qkv)
        hidden = gelu_mlp(mixed.reshape(2, 5, 8) + total, w_fc, None, w_proj, None)
        return linear_cross_entropy(hidden.view(10, 8), qkv_weight, torch.arange(10))

    shapes = {
        "x": (2, 5, 8),
        "residual": (2, 5, 8),
        "weight": (8,),
        "qkv_weight": (24, 8),
        "w_fc": (16, 8),
        "w_proj": (8, 16),
    }
    inputs = {name: draw(shape, torch.float32, i) for i, (name, shape) in enumerate(shapes.items())}
    torch._dynamo.reset()
    wanted, douts = results(block, inputs)
    found, _ = results(torch.compile(block, fullgraph=True, dynamic=False), inputs, douts)
    check_equal(found, wanted)


@compiles
def test_compile_with_dynamic_shapes():
    """Compiled for the first length, the graphs serve every other one."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(qkv, weight, targets):
        hidden = causal_attention_packed(qkv).flatten(2)
        hidden = layer_norm(hidden).flatten(0, 1)
        return linear_cross_entropy(hidden, weight, targets)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    weight = draw((11, 16), torch.float32, 2)
    counts = []
    for T in (5, 9, 14):
        inputs = {"qkv": draw((2, T, 3, 2, 8), torch.float32, T), "weight": weight, "targets": torch.arange(2 * T) % 11}
        wanted, douts = results(step, inputs)
        found, _ = results(compiled, inputs, douts)
        check_equal(found, wanted)
        counts.append(counter.frame_count)
    assert counts[0] == counts[2]


class Module(torch.nn.Module):
    """An operator whose floating arguments after the first are parameters."""

    def __init__(self, op, inputs):
        super().__init__()
        self.op, self.fixed = op, {}
        for name, x in list(inputs.items())[1:]:
            if is_floating(x):
                setattr(self, name, torch.nn.Parameter(x.detach().clone()))
            else:
                self.fixed[name] = x

    def forward(self, x):
        return self.op(x, **dict(self.named_parameters()), **self.fixed)


@operators
def test_export(op, inputs):
    inputs = inputs()
    x = next(iter(inputs.values())).detach()
    module = Module(op, inputs)
    program = torch.export.export(module, (x,))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(name.startswith("gptkernels.") for name in names)
    torch.testing.assert_close(program.module()(x), module(x), rtol=0, atol=0)


@operators
def test_functional_call(op, inputs):
    inputs = inputs()
    x = next(iter(inputs.values())).detach()
    module = Module(op, inputs)
    parameters = {name: 2 * p.detach() for name, p in module.named_parameters()}
    doubled = copy.deepcopy(module)
    doubled.load_state_dict(parameters)
    found = torch.func.functional_call(module, parameters, (x,))
    torch.testing.assert_close(found, doubled(x), rtol=0, atol=0)


@operators
@pytest.mark.parametrize("backend", ["cpu", "triton", "simt"])
def test_forward_mode_raises(monkeypatch, op, inputs, backend):
    """A raw operator would lose the tangent of any of its inputs: the derivative would be zero, without a word."""
    inputs = {name: x.detach() if is_floating(x) else x for name, x in inputs().items()}
    # Else make_dual compiles decompositions, of which none is used here, for 8 seconds.
    monkeypatch.setenv("PYTORCH_JIT", "0")
    with forward_ad.dual_level():
        op(**inputs, backend=backend)  # without a tangent all is as ever
        for name, x in inputs.items():
            if is_floating(x):
                dual = forward_ad.make_dual(x, torch.ones_like(x))
                with pytest.raises(RuntimeError, match=r"in forward mode \(jvp\) need backend='reference'"):
                    op(**{**inputs, name: dual}, backend=backend)


@operators
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(op, inputs, reentrant):
    """The forward run again in the backward gives the same gradients, bit for bit, the dropout mask included."""
    inputs = inputs()
    names = list(inputs)
    wanted, douts = results(op, inputs)

    def again(**arguments):
        return checkpoint(
            lambda *values: op(**dict(zip(names, values, strict=True))), *arguments.values(), use_reentrant=reentrant
        )

    check_equal(run_backward(again, inputs, douts), wanted)


def run_backward(call, inputs, douts):
    """results() by backward(): reentrant checkpointing does not work under autograd.grad."""
    leaves = {name: x.detach().requires_grad_(x.requires_grad) if is_floating(x) else x for name, x in inputs.items()}
    outputs = call(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, douts)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    wanting = {name: x.grad for name, x in leaves.items() if is_floating(x) and x.requires_grad}
    return {**found, **{f"gradient of {name}": g for name, g in wanting.items()}}


@operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(op, inputs, dtype):
    """Computes in autocast's dtype what it computes on rounded inputs; gradients come in the inputs' dtypes."""
    inputs = inputs(dtype)
    wide = op is layer_norm  # it reads what it is given and rounds only y
    rounded = {
        name: x.detach().bfloat16().requires_grad_() if is_floating(x) and name in ("x", "q", "k", "v", "qkv") else x
        for name, x in inputs.items()
    }
    wanted, douts = results(op, inputs if wide else rounded)
    if wide:  # the gradient of y arrives rounded
        wanted, _ = results(op, inputs, [douts[0].bfloat16(), *douts[1:]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = results(op, inputs, douts)
    for name, x in found.items():
        if name.startswith("gradient"):
            assert x.dtype == inputs[name.removeprefix("gradient of ")].dtype
    if op is not linear_cross_entropy:
        assert found["output 0"].dtype == torch.bfloat16
        if "residual" in inputs:
            assert found["output 1"].dtype == dtype
    else:
        assert found["output 0"].dtype == torch.float32
    for name, x in wanted.items():
        assert torch.equal(found[name], x.to(found[name].dtype)), name


@pytest.mark.parametrize("backend", ["cpu", "triton", "simt"])
@pytest.mark.parametrize("name", ["gelu_mlp", "linear", "linear_cross_entropy"])
def test_autocast_rounds_what_is_in_the_other_16_bits(name, backend):
    """The products are autocast's: float16 inputs and weights are bfloat16 ones there, with float16 gradients."""
    op, inputs = OPERATORS[name]
    op = partial(op, backend=backend)
    half = {key: x.detach().half().requires_grad_() if is_floating(x) else x for key, x in inputs().items()}
    rounded = {key: x.detach().bfloat16().requires_grad_() if is_floating(x) else x for key, x in half.items()}
    wanted, douts = results(op, rounded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = results(op, half, douts)
        for key in ("weight", "w_fc", "w_proj"):
            if key in half:
                with pytest.raises(TypeError, match=f"{key} must be in x's dtype"):
                    op(**{**half, key: half[key].detach().long()})
    for key, x in wanted.items():
        if key.startswith("gradient"):
            assert found[key].dtype == torch.float16
        assert torch.equal(found[key], x.to(found[key].dtype)), key
