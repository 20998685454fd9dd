"""What the operator tests share: the backends to run over, the error budget, and awkward ways for a tensor to lie."""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module

import pytest
import torch

from gptkernels import available_backends

# The backends under test and what each computes in. The reference is the oracle; its own tests compare it with torch's ops.
BACKENDS = {
    "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
# The CUDA kernels on the CPU, for the operators that have them.
SIMT = {"simt": (torch.float32, torch.bfloat16, torch.float16)}
# With a GPU they run there too, and Triton's are compiled (conftest.py makes it the device of those tests).
GPU = torch.cuda.is_available()
CUDA = {"cuda": (torch.float32, torch.bfloat16, torch.float16)} if available_backends()["cuda"] is None else {}
# Those that interpret or emulate their kernels: they run the small cases only.
SLOW_BACKENDS = ("simt",) if GPU else ("triton", "simt")
# Of a layout a kernel sees strides and the size of an element: a slow backend runs those cases in one dtype.
LAYOUT_DTYPES = (torch.bfloat16,)


def over(kinds_of):
    """Decorators (backends, dtypes, cases) that parametrise a test over these backends and what each computes in."""

    def cases(names, small, large=(), slow_dtypes=None):
        """Over backend, dtype and `names`; a slow backend runs the small cases, in slow_dtypes if those are given."""
        parameters = []
        for backend, kinds in kinds_of.items():
            slow = backend in SLOW_BACKENDS
            for dtype in slow_dtypes if slow and slow_dtypes else kinds:
                for case in [*small, *([] if slow else large)]:
                    case = case if isinstance(case, tuple) else (case,)
                    name = "-".join([backend, str(dtype)[6:], *map(str, case)])
                    parameters.append(pytest.param(backend, dtype, *case, id=name))
        return pytest.mark.parametrize(f"backend, dtype, {names}", parameters)

    dtypes = [
        pytest.param(backend, dtype, id=f"{backend}-{str(dtype)[6:]}")
        for backend, kinds in kinds_of.items()
        for dtype in kinds
    ]
    return pytest.mark.parametrize("backend", kinds_of), pytest.mark.parametrize("backend, dtype", dtypes), cases


backends, dtypes, cases = over(BACKENDS)


def generator(seed):
    """Of random numbers on the test's device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def draw(shape, dtype, seed, scale=1.0):
    """Normal numbers that want a gradient, the same for every dtype but for their rounding."""
    return (scale * torch.randn(shape, generator=generator(seed), dtype=torch.float64)).to(dtype).requires_grad_()


def storage_of(x):
    """All bytes of the memory that x lies in, gaps between its elements included."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage()).clone()


def results(call, inputs, douts=None, layout="contiguous", seed=91):
    """What call(**inputs) returns, and the gradient of each input that wants one, by name; and the output gradients.

    Those are drawn if not given, in each output's dtype. Checks on the way that no input is written to.
    """
    tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    leaves = {name: x.detach().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    before = {name: storage_of(x) for name, x in tensors.items()}
    outputs = call(**{**inputs, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    wanting = {name: x for name, x in leaves.items() if x.requires_grad}
    if wanting:
        if douts is None:
            douts = [laid_out(draw(y.shape, y.dtype, seed + i).detach(), layout) for i, y in enumerate(outputs)]
        given = [dout.to(y.dtype) for dout, y in zip(douts, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, list(wanting.values()), given)
        found.update({f"gradient of {name}": g for name, g in zip(wanting, gradients, strict=True)})
    for name, x in tensors.items():
        assert torch.equal(storage_of(x), before[name]), f"{name} was written to"
    return found, douts


def double(x):
    return x.detach().double().requires_grad_(x.requires_grad) if is_floating(x) else x


def is_floating(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def accesses_checked(backend: str) -> AbstractContextManager[None]:
    """Triton's kernels watched for accesses out of bounds and races between programs."""
    return import_module("interpreter_checks").checked() if backend == "triton" and not GPU else nullcontext()


def check_against_oracle(call, inputs, backend, draws=None, few=64):
    """The error of `backend` is at most 2x (gradients 3x) that of the reference in the same dtype, plus one rounding.

    The truth is the reference in float64, on the very same numbers. `inputs` makes a dict of arguments from a seed. Each
    result's error is its largest over some draws (3, on a slow backend 1), more of them where it has fewer than `few`
    numbers: one may be right by luck.
    """
    worst = {}
    few = 1 if draws == 1 else few
    usual, most = (1, 8) if backend in SLOW_BACKENDS else (3, 20)
    draws = draws or usual
    for seed in range(most):
        given = inputs(1000 * seed + 17)
        with accesses_checked(backend) if seed == 0 else nullcontext():
            ours, douts = results(partial(call, backend=backend), given, seed=1000 * seed + 91)
        plain, _ = results(partial(call, backend="reference"), given, douts)
        right, _ = results(partial(call, backend="reference"), {name: double(x) for name, x in given.items()}, douts)
        for name, truth in right.items():
            y, reference = ours[name], plain[name]
            assert (y.shape, y.dtype) == (reference.shape, reference.dtype), name
            found = (largest(y.double() - truth), largest(reference.double() - truth), largest(truth))
            assert not any(map(math.isnan, found)), f"{name}: NaN in {found} (error, reference's error, magnitude)"
            before = worst.get(name, (found, y.dtype))[0]
            worst[name] = [max(pair) for pair in zip(found, before, strict=True)], y.dtype
        if seed + 1 >= draws and all(x.numel() == 0 or x.numel() * (seed + 1) >= few for x in right.values()):
            break
    for name, ((error, plain_error, magnitude), dtype) in worst.items():
        factor = 3 if name.startswith("gradient") else 2
        allowed = factor * plain_error + torch.finfo(dtype).eps * magnitude
        assert error <= allowed, (
            f"{name}: error {error:.4g}, allowed {allowed:.4g}: {factor} x the reference's {plain_error:.4g} "
            f"+ eps x {magnitude:.4g}"
        )


def check_equal(found, wanted):
    """The same results, bit for bit."""
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape, name
        difference = largest(found[name].double() - x.double())
        assert torch.equal(found[name], x), f"{name} differs by up to {difference:.4g}"


LAYOUTS = ("transposed", "spaced", "misaligned", "expanded", "expanded everywhere")


def laid_out(x, layout):
    """x in other memory: the same numbers, except that an expanded tensor repeats its first ones."""
    if layout == "contiguous" or x.dim() == 0:
        return x
    first = x.detach() if x.numel() else x.detach().new_zeros([1] * x.dim())  # an empty tensor can be expanded too
    if layout == "transposed":  # the last dimension is not contiguous
        y = x.detach().mT.contiguous().mT if x.dim() > 1 else x.detach().repeat_interleave(2)[::2]
    elif layout == "spaced":  # each row is contiguous and lies among others
        y = torch.full([2 * size + 1 for size in x.shape], math.nan, dtype=x.dtype)
        y = y[tuple(slice(1, None, 2) for _ in x.shape[:-1])][..., 1 : 1 + x.shape[-1]].copy_(x.detach())
    elif layout == "misaligned":
        y = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype)[1:].view(x.shape).copy_(x.detach())
    elif layout == "expanded":
        y = first[:1].expand_as(x)
    else:  # what the gradient of a sum is
        y = first.flatten()[:1].view([1] * x.dim()).expand_as(x)
    return y.requires_grad_(x.requires_grad)


def check_near(found, wanted):
    """The same results but for the order of sums."""
    for name, x in wanted.items():
        difference, allowed = largest(found[name].double() - x.double()), 4 * torch.finfo(x.dtype).eps * largest(x)
        assert difference <= allowed, f"{name} differs by up to {difference:.4g}, allowed {allowed:.4g}"


def check_layouts(call, inputs, layout, names):
    """The named inputs and the output gradients in a layout give the bits that contiguous copies of them give.

    But where Triton compiles: there which thread holds a number, and with it the order of sums, follows from how wide
    loads are, and that from strides and addresses.
    """
    given = {name: laid_out(x, layout) if name in names else x for name, x in inputs.items()}
    found, douts = results(call, given, layout=layout)
    copies = {
        name: x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor)
        else x
        for name, x in given.items()
    }
    wanted, _ = results(call, copies, [dout.clone(memory_format=torch.contiguous_format) for dout in douts])
    (check_near if GPU and call.keywords["backend"] == "triton" else check_equal)(found, wanted)
    for name in names:
        assert f"gradient of {name}" in found


def check_repeats(call, inputs, repeats=3, threads=(1, 2)):
    """The same bits every time, on 1 and 2 threads, and after a call that left NaN in every workspace."""
    torch.set_num_threads(threads[0])
    wanted, _ = results(call, inputs)
    leftovers = {
        name: torch.full_like(x, math.nan).requires_grad_(x.requires_grad) if is_floating(x) else x
        for name, x in inputs.items()
    }
    for count in threads:
        torch.set_num_threads(count)
        results(call, leftovers)
        for _ in range(repeats):
            check_equal(results(call, inputs)[0], wanted)


def check_only_wanted_gradients(call, inputs, names):
    """Whichever inputs want a gradient, they get the same one, and the output needs none when none does."""
    inputs = {name: x.detach() if is_floating(x) else x for name, x in inputs.items()}
    everything, _ = results(call, {**inputs, **{name: inputs[name].requires_grad_() for name in names}})
    for wanted in [[], *([name] for name in names)]:
        given = {name: x.detach().requires_grad_(name in wanted) if is_floating(x) else x for name, x in inputs.items()}
        found, _ = results(call, given)
        check_equal(found, {name: everything[name] for name in found})
        outputs = call(**given)
        for y in outputs if isinstance(outputs, tuple) else (outputs,):
            assert y.requires_grad == bool(wanted)


def check_no_second_gradient(call, inputs):
    """A gradient of a gradient raises what the documentation says, and says what to do."""
    outputs = call(**inputs)
    total = sum(y.sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,)))
    wanting = [x for x in inputs.values() if is_floating(x) and x.requires_grad]
    with pytest.raises(RuntimeError, match="gradients of gradients need backend='reference'"):
        torch.autograd.grad(total, wanting, create_graph=True)


def check_no_grad(call, inputs):
    """Without recording, in both modes, the output is the same and needs no gradient."""
    wanted = results(call, inputs)[0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            outputs = call(**inputs)
        for i, y in enumerate(outputs if isinstance(outputs, tuple) else (outputs,)):
            assert not y.requires_grad
            assert torch.equal(y, wanted[f"output {i}"])
