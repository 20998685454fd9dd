"""causal_attention and its packed form: values, gradients, masks, layouts and errors."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    BACKENDS,
    CUDA,
    LAYOUT_DTYPES,
    LAYOUTS,
    SIMT,
    SLOW_BACKENDS,
    check_against_oracle,
    check_equal,
    check_layouts,
    check_no_grad,
    check_no_second_gradient,
    check_only_wanted_gradients,
    check_repeats,
    draw,
    laid_out,
    over,
    results,
)
from torch.utils._python_dispatch import TorchDispatchMode

from gptkernels import causal_attention, causal_attention_packed
from gptkernels.ops.attention import reference

BACKENDS = {**BACKENDS, **SIMT}
backends, dtypes, cases = over({**BACKENDS, **CUDA})
# B, H, T, S, D: queries as many as keys, fewer, more; around the tiles' edges; every width of tile and tails of it.
SMALL = [
    (1, 2, 1, 1, 8),
    (2, 1, 2, 2, 16),
    (1, 1, 3, 3, 1),
    (2, 3, 17, 17, 5),
    (1, 1, 63, 63, 32),
    (1, 2, 65, 65, 40),
    (1, 1, 1, 70, 64),
    (2, 1, 5, 67, 33),
    (1, 2, 9, 3, 16),
    (1, 1, 70, 2, 24),
    (1, 1, 3, 0, 8),
    (1, 1, 97, 97, 16),
    (1, 1, 130, 130, 24),
    (1, 1, 11, 13, 72),
    (1, 1, 11, 13, 104),
    (1, 1, 13, 11, 136),
    (1, 1, 11, 11, 200),
    (1, 1, 13, 35, 256),
]
LARGE = [
    (1, 2, 97, 97, 64),
    (2, 2, 127, 127, 80),
    (1, 3, 200, 200, 96),
    (1, 2, 129, 129, 128),
    (1, 1, 130, 130, 256),
    (1, 1, 66, 66, 129),
    (1, 1, 31, 190, 100),
    (1, 2, 200, 97, 65),
    (1, 1, 192, 64, 7),
    (3, 5, 64, 64, 64),
    (1, 1, 1000, 1000, 16),
]
EMPTY = [(0, 2, 3, 3, 8), (2, 0, 3, 3, 8), (2, 3, 0, 0, 8), (1, 1, 0, 4, 8)]


def attention_inputs(B, H, T, S, D, dtype, seed=0, scale=1.0):
    return {
        "q": draw((B, H, T, D), dtype, seed, scale),
        "k": draw((B, H, S, D), dtype, seed + 1),
        "v": draw((B, H, S, D), dtype, seed + 2),
    }


@cases("B, H, T, S, D", SMALL + EMPTY, LARGE)
def test_matches_the_oracle(backend, dtype, B, H, T, S, D):
    check_against_oracle(causal_attention, partial(attention_inputs, B, H, T, S, D, dtype), backend)


@cases("scale", [0.3, -0.5, 0.0, 2.0])
def test_scale(backend, dtype, scale):
    call = partial(causal_attention, scale=scale)
    check_against_oracle(call, partial(attention_inputs, 1, 2, 19, 21, 12, dtype), backend)


@cases("T, S, p, seed", [(7, 7, 0.1, 0), (5, 9, 0.5, -1), (9, 6, 0.9, 2**63 - 1)], [(130, 130, 0.2, 2**40 + 7)])
def test_dropout_matches_the_oracle(backend, dtype, T, S, p, seed):
    call = partial(causal_attention, dropout_p=p, seed=seed)
    check_against_oracle(call, partial(attention_inputs, 2, 3, T, S, 8, dtype), backend)


@cases("case", ["large", "huge", "equal"])
def test_large_scores(backend, dtype, case):
    """Scores beyond what exp takes (float16 ends at 65504); and equal ones, where the maximum is everywhere.

    In one draw alone every row may have but one weight, and a gradient of nothing but rounding errors; in a few the
    rounding of two equally large scores, which decides over it, may favour one of the two that are compared.
    """
    factor = {"large": 40.0, "huge": 1e4 if dtype != torch.float16 else 1e3, "equal": 0.0}[case]
    draws = 3 if backend in SLOW_BACKENDS else 12
    check_against_oracle(
        causal_attention, lambda seed: attention_inputs(1, 2, 67, 67, 16, dtype, seed, factor), backend, draws=draws
    )


@dtypes
def test_scores_far_below_zero(backend, dtype):
    """All scores of a row near -300: exp of them is 0, of their distance to the largest is not."""
    inputs = attention_inputs(1, 1, 9, 9, 4, dtype)
    inputs["q"] = torch.full_like(inputs["q"], -10.0).requires_grad_()
    inputs["k"] = (10 + 0.05 * inputs["k"].detach()).to(dtype).requires_grad_()
    check_against_oracle(partial(causal_attention, scale=1.0), lambda seed: inputs, backend)


@dtypes
def test_rows_without_a_key_are_zero(backend, dtype):
    """With fewer keys than queries the first queries see none: output 0, and no gradient from or to them."""
    inputs = attention_inputs(2, 2, 80, 5, 16, dtype)
    found, _ = results(partial(causal_attention, backend=backend), inputs)
    for name in ("output 0", "gradient of q"):
        assert (found[name][:, :, :75] == 0).all() and (found[name][:, :, 76:] != 0).any()
    assert all(x.isfinite().all() for x in found.values())
    # The output gradients of those rows reach nothing.
    _, (dout,) = results(partial(causal_attention, backend=backend), inputs)
    other = dout.clone()
    other[:, :, :75] = 1e3
    check_equal(results(partial(causal_attention, backend=backend), inputs, [other])[0], found)


@cases("T, S", [(9, 9), (6, 11)], [(130, 130), (70, 140)])
@pytest.mark.parametrize("dropout", [{}, {"dropout_p": 0.3, "seed": 5}], ids=["", "dropout"])
def test_the_future_does_not_reach_the_past(backend, dtype, T, S, dropout):
    call = partial(causal_attention, backend=backend, **dropout)
    inputs = attention_inputs(1, 2, T, S, 8, dtype)
    out, (dout,) = results(call, inputs)
    for t in {1, 2, T // 2, T - 1}:
        changed = {name: x.detach().clone() for name, x in inputs.items()}
        for name, first in (("q", t), ("k", S - T + t), ("v", S - T + t)):
            changed[name][:, :, first:] = 3.0 - 7.0 * changed[name][:, :, first:]
        assert torch.equal(call(**changed)[:, :, :t], out["output 0"][:, :, :t])
        # The other way round: a loss on the first t outputs has no gradient at later tokens, and does not see them.
        early = dout.clone()
        early[:, :, t:] = 0
        found, _ = results(call, inputs, [early])
        for name, first in (("q", t), ("k", S - T + t), ("v", S - T + t)):
            assert (found[f"gradient of {name}"][:, :, first:] == 0).all()
        there, _ = results(call, {name: x.requires_grad_() for name, x in changed.items()}, [early])
        assert torch.equal(there["gradient of q"][:, :, :t], found["gradient of q"][:, :, :t])


@dtypes
def test_a_query_alone_is_the_last_of_many(backend, dtype):
    """Bottom-right alignment, with the same dropout mask: as decoding token by token needs it."""
    inputs = {name: x.detach() for name, x in attention_inputs(2, 2, 21, 21, 8, dtype).items()}
    call = partial(causal_attention, dropout_p=0.4, seed=9, backend=backend)
    whole = call(**inputs)
    for T in (1, 2, 5):
        part = call(inputs["q"][:, :, -T:], inputs["k"], inputs["v"])
        torch.testing.assert_close(part, whole[:, :, -T:])


MASKS = [(2, 3, 9, 9), (1, 2, 5, 12), (1, 1, 8, 3), (1, 1, 63, 97), (1, 1, 1, 256)]


@cases("B, H, T, S", MASKS, [(2, 3, 97, 97), (1, 2, 65, 150)])
@pytest.mark.parametrize("seed", [0, 1234, -7, 2**62 + 3, torch.tensor(2**35 + 1)], ids=str)
def test_dropout_mask_is_the_references(backend, dtype, B, H, T, S, seed):
    """Equal scores and an identity matrix for v: the output is the mask itself, scaled."""
    seed = seed.to(torch.get_default_device()) if isinstance(seed, torch.Tensor) else seed
    zeros = torch.zeros(B, H, T, S, dtype=dtype), torch.zeros(B, H, S, S, dtype=dtype)
    v = torch.eye(S, dtype=dtype).expand(B, H, S, S)
    out = causal_attention(*zeros, v, dropout_p=0.25, seed=seed, backend=backend)
    keep = reference.dropout_keep(torch.as_tensor(seed, device=v.device), 0.25, (B, H, T, S)) & causal_mask(T, S)
    assert torch.equal(out != 0, keep)
    weights = keep / causal_mask(T, S).sum(-1, keepdim=True).clamp(min=1) / 0.75
    torch.testing.assert_close(out, weights.to(dtype))


@cases("T, S", [(9, 9), (33, 95), (120, 40)], [(128, 128), (90, 166)])
def test_outputs_and_all_gradients_have_one_mask(backend, dtype, T, S):
    """The reference's mask, also out of dq, dk and dv: each is computed by a kernel that draws it anew.

    q and k lie in different dimensions, so all scores are 0 and the weights of row i are P_i = 1 / (keys that it sees).
    With v = [0 | 1] and dout = [1 | ones] (1: an identity) out holds the dropped weights, dv their transpose, and dq and dk
    hold ds = P (mask / (1 - p) - delta), delta the sum of a row's dropped weights.
    """
    p, H, D = 0.25, 2, T + S
    rows, keys = torch.eye(D, dtype=dtype)[:T], torch.eye(D, dtype=dtype)[T:]
    q, k, v = (x.expand(1, H, *x.shape).clone().requires_grad_() for x in (rows, keys, keys))
    out = causal_attention(q, k, v, scale=1.0, dropout_p=p, seed=5, backend=backend)
    dout = (rows + (torch.arange(D) >= T)).expand_as(out)
    dq, dk, dv = (x.double() for x in torch.autograd.grad(out, (q, k, v), dout))
    keep = reference.dropout_keep(torch.tensor(5), p, (1, H, T, S)) & causal_mask(T, S)
    weights = causal_mask(T, S) / causal_mask(T, S).sum(-1, keepdim=True).clamp(min=1)
    delta = (keep * weights).sum(-1, keepdim=True) / (1 - p)
    for name, ds in (("dq", dq[..., T:]), ("dk", dk[..., :T].mT)):
        assert torch.equal(ds / weights + delta > 0.5, keep), name
    assert torch.equal(out[..., T:] != 0, keep)
    assert torch.equal(dv[..., :T].mT != 0, keep)


def causal_mask(T, S):
    return torch.ones(T, S, dtype=torch.bool).tril(S - T)


@backends
def test_seed_as_tensor_is_seed_as_int(backend):
    inputs = attention_inputs(1, 2, 9, 9, 8, torch.float32)
    call = partial(causal_attention, dropout_p=0.3, backend=backend)
    wanted, _ = results(partial(call, seed=-77), inputs)
    check_equal(results(partial(call, seed=torch.tensor(-77)), inputs)[0], wanted)
    other, _ = results(partial(call, seed=-78), inputs)
    assert not torch.equal(other["output 0"], wanted["output 0"])


@cases("layout", [*LAYOUTS, "token-major", "broadcast heads"], slow_dtypes=LAYOUT_DTYPES)
@pytest.mark.parametrize("names", ["qkv", "q", "k", "v", ""], ids=lambda names: names or "dout")
def test_layouts(backend, dtype, layout, names):
    inputs = attention_inputs(2, 3, 7, 7, 12, dtype)
    call = partial(causal_attention, backend=backend, dropout_p=0.2, seed=3)
    if layout in LAYOUTS:
        return check_layouts(call, inputs, layout, names)
    given = dict(inputs)
    for name in names or inputs:
        x = inputs[name].detach()
        if layout == "token-major":
            given[name] = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        else:
            given[name] = x[:, :1].expand_as(x).requires_grad_()
    return check_layouts(call, given, "contiguous", names or inputs)


@cases("B, H, T, S, D", EMPTY, slow_dtypes=LAYOUT_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_nothing(backend, dtype, layout, B, H, T, S, D):
    """Also an empty tensor has strides, and its contiguous() is itself whatever they are."""
    call = partial(causal_attention, backend=backend)
    check_layouts(call, attention_inputs(B, H, T, S, D, dtype), layout, "qkv")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS, *CUDA])
def test_output_is_token_major(backend):
    """On every backend: what views it as (B, T, C) must not fail where auto takes the reference."""
    for inputs in (attention_inputs(2, 3, 5, 5, 8, torch.float32), attention_inputs(2, 3, 1, 5, 8, torch.float32)):
        assert causal_attention(**inputs, backend=backend).transpose(1, 2).is_contiguous()
    assert causal_attention_packed(draw((2, 5, 3, 3, 8), torch.float32, 1), backend=backend).is_contiguous()


PACKED = [(2, 3, 9, 8), (1, 1, 1, 5), (2, 2, 0, 4), (0, 2, 4, 4)]


@cases("B, H, T, D", PACKED, [(2, 3, 130, 40)], slow_dtypes=LAYOUT_DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
def test_packed_is_unpacked(backend, dtype, B, H, T, D, layout):
    qkv = laid_out(draw((B, T, 3, H, D), dtype, 1), layout)
    options = {"scale": 0.4, "dropout_p": 0.3, "seed": 4, "backend": backend}
    found, (dout,) = results(partial(causal_attention_packed, **options), {"qkv": qkv}, layout=layout)
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in qkv.unbind(2))
    unpacked, _ = results(partial(causal_attention, **options), {"q": q, "k": k, "v": v}, [dout.transpose(1, 2)])
    assert torch.equal(found["output 0"], unpacked["output 0"].transpose(1, 2))
    assert found["output 0"].is_contiguous()
    gradients = torch.stack([unpacked[f"gradient of {name}"].transpose(1, 2) for name in "qkv"], dim=2)
    assert torch.equal(found["gradient of qkv"], gradients)
    assert found["gradient of qkv"].is_contiguous()


@cases("T, D, p", [(7, 8, 0.0), (7, 8, 0.3), (33, 72, 0.2)], [(100, 64, 0.0)])
def test_packed_matches_the_oracle(backend, dtype, T, D, p):
    call = partial(causal_attention_packed, dropout_p=p, seed=6 if p else None)
    check_against_oracle(call, lambda seed: {"qkv": draw((2, T, 3, 2, D), dtype, seed)}, backend)


@backends
def test_packed_copies_nothing(backend):
    """From the projection to the next one and back, only the two operators and views of memory run."""
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    projection = draw((2, 9, 3 * 2 * 8), torch.float32, 1)
    dout = draw((2, 9, 16), torch.float32, 2)
    with Record():
        out = causal_attention_packed(projection.view(2, 9, 3, 2, 8), backend=backend).view(2, 9, 16)
        out.backward(dout)
    views = {"aten.view.default", "aten.detach.default", "aten._unsafe_view.default", "aten.alias.default"}
    copies = [name for name in seen if name not in views and not name.startswith("gptkernels")]
    assert len([name for name in seen if name.startswith("gptkernels")]) == 2 and not copies


@cases("B, H, T, S", [(1, 2, 9, 9), (1, 2, 5, 7)], [(2, 3, 9, 9), (2, 3, 5, 7), (2, 3, 200, 200)])
def test_repeats(backend, dtype, B, H, T, S):
    call = partial(causal_attention, backend=backend, dropout_p=0.1, seed=1)
    check_repeats(call, attention_inputs(B, H, T, S, 20, dtype))


@cases("p", [0.0, 0.3])
def test_a_backward_in_any_order_matches_the_oracle(any_order, backend, dtype, p):
    call = partial(causal_attention, dropout_p=p, seed=4, deterministic=False)
    check_against_oracle(call, partial(attention_inputs, 1, 2, 37, 41, 24, dtype), backend)


@backends
def test_gradients_only_for_what_wants_them(backend):
    call = partial(causal_attention, backend=backend)
    check_only_wanted_gradients(call, attention_inputs(1, 2, 5, 6, 8, torch.float32), ["q", "k", "v"])


@backends
def test_modes(backend):
    inputs = attention_inputs(1, 2, 5, 5, 8, torch.float32)
    qkv = {"qkv": draw((2, 5, 3, 2, 8), torch.float32, 1)}
    for op, given in ((causal_attention, inputs), (causal_attention_packed, qkv)):
        check_no_grad(partial(op, backend=backend), given)
        check_no_second_gradient(partial(op, backend=backend), given)


@dtypes
def test_nan_stays_in_its_rows(backend, dtype):
    inputs = {name: x.detach() for name, x in attention_inputs(1, 2, 9, 9, 8, dtype).items()}
    inputs["q"][0, 1, 4, 2] = math.nan
    out = causal_attention(**inputs, backend=backend)
    where = torch.zeros_like(out, dtype=torch.bool)
    where[0, 1, 4] = True
    assert torch.equal(out.isnan(), where)


def test_head_dim_beyond_the_kernels():
    inputs = attention_inputs(1, 1, 3, 3, 257, torch.float32)
    with pytest.raises(ValueError, match=r"backend='cpu' takes a head dim up to 256, got 257: use more heads or"):
        causal_attention(**inputs, backend="cpu")
    assert torch.equal(causal_attention(**inputs), causal_attention(**inputs, backend="reference"))


def test_reference_is_pytorchs():
    inputs = attention_inputs(2, 3, 11, 11, 8, torch.float64)
    found, douts = results(reference.causal_attention, inputs)
    wanted, _ = results(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), inputs, douts)
    torch.testing.assert_close(found, wanted)
    inputs = attention_inputs(2, 3, 4, 11, 8, torch.float64)
    wanted, douts = results(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(4, 11), scale=0.7), inputs
    )
    torch.testing.assert_close(results(partial(reference.causal_attention, scale=0.7), inputs, douts)[0], wanted)


x = torch.zeros(2, 3, 4, 8)


@pytest.mark.on_cpu
@pytest.mark.parametrize("backend", ["reference", "auto", *BACKENDS])
@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((x[0], x[0], x[0]), {}, ValueError, r"q must be \(B, H, T, D\) and k, v \(B, H, S, D\) with D >= 1, got"),
        ((x, x, x[:, :, :2]), {}, ValueError, "q must be"),
        ((x, x[:1], x[:1]), {}, ValueError, "q must be"),
        ((x, x[..., :4], x[..., :4]), {}, ValueError, "q must be"),
        ((x[..., :0],) * 3, {}, ValueError, "with D >= 1"),
        ((x.int(),) * 3, {}, TypeError, "one floating dtype, got torch.int32"),
        ((x, x.bfloat16(), x), {}, TypeError, "one floating dtype, got torch.float32, torch.bfloat16"),
        ((x, x.to("meta"), x), {}, ValueError, "must be on one device, got cpu, meta and cpu: move them"),
        ((x, x, x), {"dropout_p": 1.0, "seed": 1}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ((x, x, x), {"dropout_p": -0.1, "seed": 1}, ValueError, r"dropout_p must be in \[0, 1\)"),
        ((x, x, x), {"dropout_p": math.nan, "seed": 1}, ValueError, r"dropout_p must be in \[0, 1\)"),
        ((x, x, x), {"dropout_p": 0.1}, ValueError, "dropout_p=0.1 needs seed=, an int or a 0-d int64 tensor"),
        ((x, x, x), {"dropout_p": 0.1, "seed": torch.zeros(1).long()}, ValueError, "seed must be a 0-d int64 tensor"),
        ((x, x, x), {"dropout_p": 0.1, "seed": torch.tensor(1.0)}, ValueError, "seed must be a 0-d int64 tensor"),
        ((x, x, x), {"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be an int or a 0-d int64 tensor, got 1.5"),
        ((x, x, x), {"dropout_p": 0.1, "seed": "1"}, TypeError, "seed must be an int or a 0-d int64 tensor, got '1'"),
        ((x, x, x), {"dropout_p": 0.1, "seed": 2**63}, ValueError, "seed must fit into 64 bits"),
    ],
)
def test_errors(backend, arguments, options, error, message):
    with pytest.raises(error, match=message):
        causal_attention(*arguments, **options, backend=backend)


@pytest.mark.on_cpu
@pytest.mark.parametrize("backend", ["reference", "auto", *BACKENDS])
@pytest.mark.parametrize("shape", [(2, 4, 3, 8), (2, 4, 2, 3, 8), (2, 4, 3, 3, 0)])
def test_packed_errors(backend, shape):
    with pytest.raises(ValueError, match=r"qkv must be \(B, T, 3, H, D\) with D >= 1, got .*: view the projection so"):
        causal_attention_packed(torch.zeros(shape), backend=backend)
    with pytest.raises(TypeError, match=r"qkv must be floating point, got torch\.int32: convert it"):
        causal_attention_packed(torch.zeros(2, 4, 3, 3, 8).int(), backend=backend)
