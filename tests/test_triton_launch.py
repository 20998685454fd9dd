"""Launches by the compiled kernel: found again for the same arguments only, and in less time than Triton's own launch takes."""

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheels for this platform")
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gptkernels import triton_launch
from gptkernels.ops.attention import triton as attention
from gptkernels.ops.linear.triton_descriptors import describe

GPU = torch.device("cuda", 0)  # only its name: nothing is launched
BLOCKS = {"A_ALONG_K": True, "B_ALONG_K": True, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}


class Compiled:
    """What the JIT returns; notes what it is launched with."""

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid[:2], arguments))


class Kernel:
    """A kernel whose launches by the JIT, and later ones of what that has compiled, are noted."""

    arg_names = ("x", "n", "BLOCK", "FLAG")

    def __init__(self):
        self.by_jit, self.compiled = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.by_jit.append((grid, arguments, constants))
            return Compiled(self.compiled)

        return launch


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    monkeypatch.setattr(triton_launch, "_compiled", {})


def launch(kernel, x, n=3, grid=(4, 2), device=GPU, **constants):
    triton_launch.launch_compiled(
        kernel, grid, device, (x, n), {"BLOCK": 64, "FLAG": True, "num_warps": 4, **constants}
    )


def test_a_second_launch_does_without_the_jit():
    kernel, x, y = Kernel(), torch.zeros(8), torch.zeros(64, 2)
    launch(kernel, x)
    launch(kernel, y, grid=(9, 1))
    assert [call[0] for call in kernel.by_jit] == [(4, 2)]
    ((grid, arguments),) = kernel.compiled
    # All of the kernel's arguments in their order, constants too, but not what the JIT alone takes.
    assert grid == (9, 1) and arguments[0] is y and arguments[1:] == (3, 64, True)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(8, dtype=torch.bfloat16)},
        {"x": torch.zeros(9)[1:]},
        {"x": None},
        {"n": 4},
        {"BLOCK": 128},
        {"FLAG": False},
        {"num_warps": 8},
        {"device": torch.device("cuda", 1)},
        {"num_stages": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_arguments_are_compiled_anew(change):
    kernel, given = Kernel(), {"x": torch.zeros(8)}
    launch(kernel, **given)
    launch(kernel, **{**given, **change})
    launch(Kernel(), **given)  # another kernel is not this one either
    assert len(kernel.by_jit) == 2 and not kernel.compiled


def test_descriptors_of_other_blocks_are_compiled_anew():
    kernel, a = Kernel(), torch.zeros(32, 32)
    for blocks in (BLOCKS, BLOCKS, {**BLOCKS, "BLOCK_M": 32}):
        launch(kernel, describe(a, a, blocks)[0])
    assert (len(kernel.by_jit), len(kernel.compiled)) == (2, 1)


def test_kernels_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(triton_launch, "MOST_COMPILED", 3)
    kernel = Kernel()
    for n in (1, 2, 3, 4, 4, 1):
        launch(kernel, torch.zeros(8), n=n)
    assert [call[1][1] for call in kernel.by_jit] == [1, 2, 3, 4, 1]


def test_a_plan_does_without_the_jit_for_tensors_alike(monkeypatch):
    kernel, x = Kernel(), torch.zeros(64)
    plan = triton_launch.Plan(kernel, (4, 2), GPU, (3,), {"BLOCK": 64, "FLAG": True, "num_warps": 4})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for tensor in (x, x[8:], x[1:], x.bfloat16(), x[1:], x.bfloat16()):
        plan.launch(tensor)
    given = {"BLOCK": 64, "FLAG": True, "num_warps": 4}
    assert [(grid, n, constants) for grid, (_, n), constants in kernel.by_jit] == 3 * [((4, 2), 3, given)]
    assert [(grid, rest) for grid, (_, *rest) in kernel.compiled] == 3 * [((4, 2), [3, 64, True])]
    assert kernel.compiled[0][1][0].data_ptr() == x[8:].data_ptr()


def test_a_plan_launches_on_its_own_device_or_not_at_all(monkeypatch):
    kernel, x, entered = Kernel(), torch.zeros(64), []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    for grid in ((4, 2), (0, 2)):
        triton_launch.Plan(kernel, grid, GPU, (3,), {}).launch(x)
    assert entered == [GPU] and len(kernel.by_jit) == 1


def test_a_launch_takes_less_python_than_the_jits(monkeypatch):
    """A launch of attention's forward, which does nothing here, by plan, by key and by the JIT, which takes most."""
    nothing = SimpleNamespace(packed_metadata=None, function=None, launch_metadata=lambda *_: None, run=lambda *_: None)
    fake = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 80, 32),
    )
    monkeypatch.setattr(driver, "_active", fake)
    monkeypatch.setattr(
        JITFunction, "_do_compile", lambda self, key, *_: self.device_caches[0][0].setdefault(key, nothing)
    )
    launched = []
    monkeypatch.setattr(triton_launch.Plan, "launch", lambda plan, *tensors: launched.append((plan, tensors)))
    q, k, v = torch.zeros(3, 1, 2, 8, 64, dtype=torch.bfloat16).unbind()
    attention.attention_forward(q, k, v, 0.125, 0.0, None)
    ((plan, tensors),) = launched
    jit, arguments = plan.kernel[plan.grid], (*tensors, *plan.numbers)
    monkeypatch.setattr(JITFunction, "__getitem__", lambda self, grid: lambda *args, **kwargs: Compiled([]))

    def by_key():
        triton_launch.launch_compiled(plan.kernel, plan.grid, GPU, arguments, plan.constants)

    by_jit, by_plan = fastest(lambda: jit(*arguments, **plan.constants)), fastest(lambda: plan.launch_here(tensors))
    assert 1.5 * fastest(by_key) < by_jit
    assert 3 * by_plan < by_jit, f"{1e6 * by_plan:.1f} us, by the JIT {1e6 * by_jit:.1f}"


def fastest(call, rounds=100, calls=5):
    """Seconds a call, the least of many short rounds: others may use the processor too."""
    times = []
    for _ in range(rounds):
        begin = time.thread_time()
        for _ in range(calls):
            call()
        times.append(time.thread_time() - begin)
    return min(times) / calls
