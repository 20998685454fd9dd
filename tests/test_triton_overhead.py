"""What Python adds to a call without gradients: at most 10 us above its bare launches, by Triton's JIT and by torch.

Without a GPU: the kernels' launches do nothing, and neither do torch's matrix products. What is left is timed beside the
same launches alone, as the JIT makes them of ready arguments. `pytest -rP` prints the times.
"""

import time
from functools import partial
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheels for this platform")
from oracle import draw
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gptkernels import (
    causal_attention,
    causal_attention_packed,
    gelu_mlp,
    layer_norm,
    linear,
    linear_cross_entropy,
    triton_backend,
    triton_launch,
)

# A bare launch of attention's forward took 18.3 us where 10 us are the limit: elsewhere the limit is the same part of it.
LIMIT = 10 / 18.3

draw = partial(draw, dtype=torch.bfloat16, seed=0)
X, VECTOR, WIDE, W = draw((2, 2, 64)), draw((64,)), draw((128,)), draw((128, 64))
TARGETS = torch.zeros(4, dtype=torch.int64)
CALLS = {
    "attention": partial(causal_attention, *draw((3, 1, 2, 4, 64))),
    "packed attention": partial(causal_attention_packed, draw((1, 4, 3, 2, 64))),
    "layer_norm": partial(layer_norm, X, VECTOR, VECTOR),
    "layer_norm with residual": partial(layer_norm, X, VECTOR, VECTOR, residual=X),
    "linear": partial(linear, X, W, WIDE),
    "gelu_mlp": partial(gelu_mlp, X, W, WIDE, draw((64, 128)), VECTOR),
    "linear_cross_entropy": partial(linear_cross_entropy, X.view(4, 64), W, TARGETS),
}
LOSSES, TRUE = torch.zeros(4), torch.tensor(True)
# What torch launches in a call, of ready arguments.
BY_TORCH = {
    "linear_cross_entropy": [
        lambda: torch.mm(X, W), partial(torch._assert_async, TRUE, ""), LOSSES.sum, partial(torch.div, LOSSES[0], LOSSES[1]),
    ],
}  # fmt: skip


class Compiled:
    """What the JIT has compiled, and whose launch does nothing."""

    packed_metadata = function = None
    launch_metadata = run = staticmethod(lambda *_: None)

    def __getitem__(self, grid):
        return lambda *_: None


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    """CPU tensors take the way of CUDA's, up to launches that do nothing."""
    fake = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 80, 32),
    )
    monkeypatch.setattr(driver, "_active", fake)
    monkeypatch.setattr(
        JITFunction, "_do_compile", lambda self, key, *_: self.device_caches[0][0].setdefault(key, Compiled())
    )
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "mm", lambda *_, **__: None)
    check = torch._assert_async
    monkeypatch.setattr(
        torch, "_assert_async", lambda _, message: check(TRUE, message)
    )  # nothing has made its argument
    for op, names in triton_backend.OPERATORS.items():
        for name in names:
            run = triton_backend.compiled(op, name)
            monkeypatch.setattr(triton_backend.DIRECT, name, triton_backend.direct(name, run, run))
    monkeypatch.setattr(triton_launch.Plan, "launch", launch)


def launch(plan, *tensors):
    """Plan.launch on a GPU."""
    if plan.empty:
        return
    if plan.index is not None:
        raise AssertionError("these tests have no GPU")
    if torch.cuda.current_device() == 0:
        plan.launch_here(tensors)


def bare(name, call):
    """A call of what the operator launches and of nothing else."""
    launched = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(triton_launch.Plan, "launch", lambda *of_plan: launched.append(of_plan))
        call()
    launches = [(plan.kernel[plan.grid], (*tensors, *plan.numbers), plan.constants) for plan, *tensors in launched]
    assert launches

    def run():
        for kernel, arguments, constants in launches:
            kernel(*arguments, **constants)
        for each in BY_TORCH.get(name, ()):
            each()

    return run


def fastest(*calls):
    """Without end: microseconds of each call, the least of more and more short rounds in turns.

    Others may use the processor too: who waits for a quiet moment asks again.
    """
    least = [float("inf") for _ in calls]
    while True:
        for _ in range(20):
            for i, call in enumerate(calls):
                begin = time.thread_time()
                for _ in range(25):
                    call()
                least[i] = min(least[i], 1e6 / 25 * (time.thread_time() - begin))
        yield least


@pytest.mark.parametrize("name", CALLS)
def test_a_call_takes_little_python(name):
    attention = bare("attention", partial(CALLS["attention"], backend="triton"))
    call = partial(CALLS[name], backend="triton")
    with torch.no_grad():
        for unit, launches, whole in islice(fastest(attention, bare(name, call), call), 30):
            if whole - launches < LIMIT * unit:
                break
    print(f"{name}: {whole:.1f} us, {launches:.1f} of them bare launches, {whole - launches:.1f} above")
    assert whole - launches < LIMIT * unit
