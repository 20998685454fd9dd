"""What only the CUDA kernels of attention have: tiles chosen by the device, the one-pass backward, counters. On csrc/simt."""

import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from oracle import draw, largest

import gptkernels.simt
from gptkernels import causal_attention, causal_attention_packed
from gptkernels.ops.attention import reference

HALF = [torch.bfloat16, torch.float16]


def inputs(B, H, T, S, D, dtype, seed=0):
    shapes = [(B, H, T, D), (B, H, S, D), (B, H, S, D)]
    return [draw(shape, dtype, 10 * seed + i) for i, shape in enumerate(shapes)]


def gradients(q, k, v, dout, dtype, scale, p, seed):
    """Of the reference in a dtype, with its output."""
    given = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out = reference.causal_attention(*given, scale=scale, dropout_p=p, seed=seed)
    return out.detach(), torch.autograd.grad(out, given, dout.to(dtype))


def errors(q, k, v, p, options):
    """Of each result of simt's raw operators: its error, the reference's in the same dtype, and its magnitude."""
    raw, scale, seed = torch.ops.gptkernels_simt, 0.2, torch.tensor(2**40 + 3) if p else None
    with torch.no_grad():
        dout = draw(q.shape, q.dtype, 7).detach()
        out, stats = raw.attention_forward(q, k, v, scale, p, seed)
        found = raw.attention_backward(dout, q, k, v, out, stats, scale, p, seed, **options)
    truth, plain = (gradients(q, k, v, dout, dtype, scale, p, seed) for dtype in (torch.float64, q.dtype))
    results = zip((out, *found), (truth[0], *truth[1]), (plain[0], *plain[1]), strict=True)
    return [(largest(y.double() - x), largest(near.double() - x), largest(x)) for y, x, near in results]


def check_gradients(*shape, dtype, p, **options):
    """Output and gradients within oracle.check_against_oracle's budget, over some draws: one may be right by luck."""
    draws = [errors(*inputs(*shape, dtype, seed), p, options) for seed in range(3)]
    for i, result in enumerate(zip(*draws, strict=True)):
        error, plain, magnitude = (max(each) for each in zip(*result, strict=True))
        assert error <= (3 if i else 2) * plain + torch.finfo(dtype).eps * magnitude


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "B, H, T, S, D", [(1, 2, 65, 65, 24), (2, 1, 40, 70, 64), (1, 1, 9, 3, 40), (1, 1, 70, 70, 96), (1, 1, 33, 40, 136)]
)
def test_one_pass_matches_the_oracle(dtype, p, B, H, T, S, D):
    check_gradients(B, H, T, S, D, dtype=dtype, p=p, atomics=True)


def test_one_pass_where_there_is_none():
    q, k, v = (x.detach() for x in inputs(1, 1, 5, 5, 8, torch.float32))
    out, stats = torch.ops.gptkernels_simt.attention_forward(q, k, v, 1.0, 0.0, None)
    arguments = (out, q, k, v, out, stats, 1.0, 0.0, None, True)
    with pytest.raises(RuntimeError, match="atomics on cuda takes float16 or bfloat16, got float32"):
        torch.ops.gptkernels_simt.attention_backward(*arguments)
    with pytest.raises(RuntimeError, match="cpu attention has the deterministic backward only"):
        torch.ops.gptkernels.attention_backward(*arguments)


@contextmanager
def device(capability, shared_kib):
    """Launchers see another device."""
    native = gptkernels.simt.module()
    native.set_device(capability, 100, shared_kib * 1024)
    try:
        yield
    finally:
        native.set_device(80, 108, 163 * 1024)


@pytest.mark.parametrize("capability, shared_kib", [(86, 99), (75, 64)])
@pytest.mark.parametrize("options", [{}, {"atomics": True}], ids=["", "one pass"])
@pytest.mark.parametrize("D", [64, 128])
def test_tiles_of_devices_with_less_shared_memory(capability, shared_kib, options, D):
    with device(capability, shared_kib):
        check_gradients(1, 1, 70, 130, D, dtype=torch.float16, p=0.0, **options)


def test_devices_without_a_tile():
    q, k, v = inputs(1, 1, 5, 5, 200, torch.float16)
    with device(75, 64):
        with pytest.raises(RuntimeError, match="no tile for a head dim of 200 in sm_75's 64 KiB of shared memory"):
            causal_attention(q, k, v, backend="simt")
        with pytest.raises(RuntimeError, match="bfloat16 on cuda needs sm_80 or later, got sm_75: use float16"):
            causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend="simt")


@pytest.mark.parametrize("D", [32, 64, 128, 256])
@pytest.mark.parametrize("atomics", [False, True], ids=["", "one pass"])
def test_no_bank_conflict_and_whole_sectors(D, atomics):
    q, k, v = (x.detach() for x in inputs(1, 1, 128, 128, D, torch.bfloat16))
    raw = torch.ops.gptkernels_simt
    with gptkernels.simt.recording() as report:
        out, stats = raw.attention_forward(q, k, v, 0.1, 0.0, None)
        raw.attention_backward(out, q, k, v, out, stats, 0.1, 0.0, None, atomics)
    assert len(report.kernels) == (4 if atomics else 3) and not any(report.violations.values())
    for name, kernel in report.kernels.items():
        for counter in kernel.values():
            if isinstance(counter, dict):
                assert counter.get("wavefronts", 0) == counter.get("ideal_wavefronts", 0), name
                assert counter.get("sectors", 0) <= 1.02 * counter.get("ideal_sectors", 0), name


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_every_schedule_gives_the_same_bits(dtype):
    q, k, v = inputs(1, 2, 70, 70, 64, dtype)

    def run():
        out = causal_attention(q, k, v, dropout_p=0.2, seed=4, backend="simt")
        return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out) * math.pi)

    wanted = run()
    for seed in (1, 2, 3):
        with gptkernels.simt.schedule(seed):
            assert all(torch.equal(x, y) for x, y in zip(run(), wanted, strict=True))


@pytest.mark.parametrize("dtype, kernels", [(torch.float32, 3), (torch.bfloat16, 4)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_what_deterministic_allows(any_order, dtype, kernels, packed):
    """Atomics where they are allowed and there are any, told by the kernels that run."""
    x = inputs(1, 1, 9, 9, 8, dtype)
    qkv = torch.stack([each.transpose(1, 2) for each in x], 2).detach().requires_grad_()

    def launched(**options):
        with gptkernels.simt.recording() as report:
            call = partial(causal_attention_packed, qkv) if packed else partial(causal_attention, *x)
            call(backend="simt", **options).sum().backward()
        return len(report.kernels)

    assert launched() == launched(deterministic=True) == 3
    assert launched(deterministic=False) == kernels
    torch._C._set_deterministic_algorithms(True)
    assert launched(deterministic=False) == 3
