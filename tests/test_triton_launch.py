"""Launches by the compiled kernel: found again for the same arguments only."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheels for this platform")
from gptkernels import static, triton_launch
from gptkernels.ops.attention import triton as attention
from gptkernels.ops.cross_entropy import triton as cross_entropy
from gptkernels.ops.layer_norm import triton as layer_norm
from gptkernels.ops.linear import triton as linear
from gptkernels.ops.mlp import triton as mlp

GPU = torch.device("cuda", 0)  # only its name: nothing is launched
CONSTANTS = {"BLOCK": 64, "FLAG": True, "num_warps": 4}


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


@pytest.fixture
def plan(monkeypatch):
    """Of three numbers' kernel, on a GPU that is the current device."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return triton_launch.Plan(Kernel(), (4, 2), GPU, (3,), CONSTANTS)


def test_a_plan_does_without_the_jit_for_tensors_alike(plan):
    x = torch.zeros(64)
    for tensor in (x, x[8:], torch.zeros(2, 3)):
        plan.launch(tensor)
    ((grid, arguments, constants),) = plan.kernel.by_jit
    assert (grid, arguments[0] is x, arguments[1:], constants) == (
        (4, 2),
        True,
        (3,),
        {**CONSTANTS, "enable_fp_fusion": True},
    )
    # All of the kernel's arguments in their order, constants too, but not what the JIT alone takes.
    assert [(grid, rest) for grid, (_, *rest) in plan.kernel.compiled] == 2 * [((4, 2), [3, 64, True])]
    assert plan.kernel.compiled[0][1][0].data_ptr() == x[8:].data_ptr()


@pytest.mark.parametrize(
    "change", [torch.zeros(8, dtype=torch.bfloat16), torch.zeros(9)[1:], None], ids=["dtype", "alignment", "none"]
)
def test_other_tensors_are_compiled_anew(plan, change):
    x = torch.zeros(8)
    for tensors in ((x, x), (x, change), (change, x), (x, x), (x, change)):
        plan.launch(*tensors)
    assert (len(plan.kernel.by_jit), len(plan.kernel.compiled)) == (3, 2)


def test_a_plan_describes_the_tensors_that_have_blocks(plan):
    plan.blocks, a, b = ([16, 32],), torch.zeros(32, 64), torch.zeros(32, 64)
    for _ in range(2):
        plan.launch(a, b)
    for _, (first, second, *_), *_ in (plan.kernel.by_jit[0], plan.kernel.compiled[0]):
        assert (first.base, first.block_shape, second) == (a, [16, 32], b)


def test_a_plan_launches_on_its_own_device_or_not_at_all(monkeypatch):
    kernel, x, entered = Kernel(), torch.zeros(64), []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    for grid in ((4, 2), (0, 2)):
        triton_launch.Plan(kernel, grid, GPU, (3,), {}).launch(x)
    assert entered == [GPU] and len(kernel.by_jit) == 1


def attend(make, T=64, S=64, wide=0, scale=0.125, dropout_p=0.0, atomics=False, packed=False, B=1, H=2, D=64):
    seed = make(dtype=torch.int64) if dropout_p else None
    if packed:
        qkv = make(B, T, 3, H, D + wide)[..., :D]
        out, stats = attention.attention_packed_forward(qkv, scale, dropout_p, seed)
        attention.attention_packed_backward(out, qkv, out, stats, scale, dropout_p, seed, atomics)
    else:
        q, (k, v) = make(B, H, T, D + wide)[..., :D], make(2, B, H, 70, D)[:, :, :, :S].unbind()
        out, stats = attention.attention_forward(q, k, v, scale, dropout_p, seed)
        attention.attention_backward(out, q, k, v, out, stats, scale, dropout_p, seed, atomics)


def normalise(make, N=8, C=768, eps=1e-5, **narrow):
    x, weight = make(N, C), make(C)
    _, mean, rstd = layer_norm.layer_norm_forward(x, weight, weight, eps, narrow.get("dtype", x.dtype))
    layer_norm.layer_norm_backward(make(N, C, **narrow), None, x, weight, True, mean, rstd)


def multiply(make, N=300, C_in=64, C_out=64, wide=0, wide_weight=0, begin=0):
    x, weight = make(N, C_in + wide)[:, :C_in], make(C_out + begin, C_in + wide_weight)[begin:, begin : C_in + begin]
    linear.linear_backward(linear.linear_forward(x, weight, None), x, weight, True)


def perceive(make, N=300, C=64, F=128, wide=0, wide_weight=0, tanh=True):
    x, w_fc = make(N, C + wide)[:, :C], make(F, C + wide_weight)[:, :C]
    w_proj = make(C, F + wide_weight)[:, :F]
    y, h = mlp.gelu_mlp_forward(x, w_fc, None, w_proj, None, tanh)
    mlp.gelu_mlp_backward(y, x, h, w_fc, w_proj, True, True, tanh)


def lose(make, N=8, V=64, words=64, ignore=-100, mean=True, op=cross_entropy.linear_cross_entropy_forward):
    op(make(N, 16), make(V, 16), make(N, dtype=torch.int64), ignore, mean, words)


def patch(*owners, **values):
    return {"patches": [(owner, name, value) for owner in owners for name, value in values.items()]}


OTHER = [{"device": 86}, {"device": 90}, {"dtype": torch.float32}]
TF32 = {"dtype": torch.float32, **patch(torch.backends.cuda, matmul=SimpleNamespace(allow_tf32=True))}
CUBLAS = patch(linear, mlp, choose=lambda *_: "cublas")
WIDE = patch(linear, FORCE_INT64=True)
# Each makes other launches than the first one, from which it differs as little as it can.
SETTINGS = {
    attend: [
        {}, *OTHER, TF32, {"B": 2}, {"H": 3}, {"D": 32}, {"T": 48}, {"S": 48}, {"wide": 8}, {"wide": 1}, {"scale": 0.25},
        {"dropout_p": 0.1}, {"dropout_p": 0.2}, {"atomics": True}, {"packed": True}, {"packed": True, "wide": 8},
        {"packed": True, "H": 3}, patch(attention, FORCE_INT64=True),
    ],
    normalise: [{}, *OTHER, {"N": 9}, {"C": 776}, {"eps": 1e-6}],
    multiply: [
        {}, *OTHER, TF32, WIDE, CUBLAS, {"N": 301}, {"N": 64}, {"C_in": 72}, {"C_out": 72}, {"wide": 8}, {"wide": 1},
        {"wide_weight": 8}, {"device": 90, "wide_weight": 8}, {"device": 90, "wide_weight": 8, "begin": 1},
    ],
    perceive: [
        {}, *OTHER, TF32, WIDE, {"N": 301}, {"N": 64}, {"C": 72}, {"F": 136}, {"wide": 8}, {"wide_weight": 8},
        {"tanh": False}, *({**each, **CUBLAS} for each in (*OTHER, {}, {"N": 500}, {"F": 129}, {"tanh": False})),
        {"patches": [*CUBLAS["patches"], (mlp, "int64", lambda _: True)]},
    ],
    lose: [
        {}, *OTHER, {"N": 9}, {"V": 80, "words": 80}, {"words": 48}, {"words": 50}, {"ignore": -1}, {"mean": False},
        {"op": cross_entropy.linear_cross_entropy_gradients},
    ],
}  # fmt: skip


def launches(call, device=80, dtype=torch.bfloat16, patches=(), **settings):
    """What a call launches on a pretended GPU."""
    noted = []

    def note(plan, *tensors):
        noted.append((plan.kernel.__name__, plan.grid, plan.device, repr((plan.numbers, plan.constants, plan.blocks))))

    def make(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device=f"cuda:{device}")

    with static.recorded(device), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(triton_launch.Plan, "launch", note)
        monkeypatch.setattr(linear, "choose", lambda *_: "triton")
        monkeypatch.setattr(mlp, "choose", lambda *_: "triton")
        for owner, name, value in patches:
            monkeypatch.setattr(owner, name, value)
        call(make, **settings)
    return noted


@pytest.mark.parametrize("call", SETTINGS, ids=lambda call: call.__name__)
def test_plans_are_found_again_for_the_same_settings_only(monkeypatch, call):
    """After calls with other settings a call launches what it would if nothing were kept."""
    found = [launches(call, **settings) for settings in SETTINGS[call]]
    for op in (attention, layer_norm, linear, mlp, cross_entropy):
        for name, function in list(vars(op).items()):
            if name.endswith(("_plan", "_plans")) and hasattr(function, "cache_clear"):
                monkeypatch.setattr(op, name, function.__wrapped__)
    for settings, each in zip(SETTINGS[call], found, strict=True):
        assert each == launches(call, **settings), settings
    assert len(set(map(repr, found))) == len(found)
