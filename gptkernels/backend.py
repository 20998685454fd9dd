"""Which backends exist, which work here and why the others do not, and what "auto" takes."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import gptkernels.library  # noqa: F401  the native library adds implementations to the schemas defined there
from gptkernels import cuda_backend, triton_backend

BACKENDS = ("reference", "triton", "cuda", "cpu", "simt")
# What each backend computes in, and where; on CPU tensors Triton's kernels are interpreted, and "simt" executes the CUDA
# kernels. Both are slow, and "auto" never takes them there.
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "simt": (torch.float32, torch.bfloat16, torch.float16),
}
DEVICES = {"cpu": ("cpu",), "triton": ("cuda", "cpu"), "cuda": ("cuda",), "simt": ("cpu",)}
# What "auto" takes for tensors on a device.
FASTEST = {"cpu": "cpu", "cuda": "triton"}
# From the plainest to the fastest; a build of one runs on every CPU that has it.
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
FOLDER = Path(__file__).parent


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this CPU and this torch run, plainest first."""
    capability = torch.backends.cpu.get_cpu_capability()
    isas = ["baseline"]
    if capability in ("AVX2", "AVX512"):
        isas.append("avx2")
    if capability == "AVX512":
        isas.append("avx512")
        if capable("avx512_bf16", "_is_avx512_bf16_supported"):
            isas.append("avx512_bf16")
    return tuple(isas)


def capable(name: str, private: str) -> bool:
    """What torch says of this CPU: by the public function, which came after torch 2.10, or the private one before it."""
    public: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return public.get(name, False) or getattr(torch.cpu, private, lambda: False)()


def torch_has_amx() -> bool:
    """Whether torch multiplies bfloat16 on this CPU's AMX tiles, which is several times as fast as our dot products."""
    return torch.backends.mkldnn.is_available() and capable("amx_tile", "_is_amx_tile_supported")


def load_cpu_library() -> tuple[str | None, str]:
    """Load the one library that suits this CPU: (its instruction set or None, an explanation)."""
    supported, forced = supported_isas(), os.environ.get("GPTKERNELS_CPU_ISA")
    if forced and forced not in supported:
        raise RuntimeError(
            f"GPTKERNELS_CPU_ISA must be one of {', '.join(supported)} on this CPU, got {forced!r}: unset it to choose by itself"
        )
    candidates = [forced] if forced else list(reversed(supported))
    reasons = []
    for isa in candidates:
        path = FOLDER / f"_cpu_{isa}.so"
        if not path.exists():
            reasons.append(f"{path.name} is not built")
            continue
        try:
            torch.ops.load_library(path)
        except OSError as error:
            reasons.append(f"{path.name} does not load: {error}")
            continue
        return isa, f"{path.name} loaded" + (f" ({'; '.join(reasons)})" if reasons else "")
    return (
        None,
        f"{'; '.join(reasons)}: run `pip install -e .` with a C++20 compiler; `gptkernels doctor` shows its messages",
    )


_cpu_isa, _cpu_explanation = load_cpu_library()
_unavailable = {
    "reference": None,
    "triton": triton_backend.unavailable(),
    "cuda": cuda_backend.cuda_unavailable,
    "cpu": None if _cpu_isa else f"the native CPU library is missing: {_cpu_explanation}",
    "simt": cuda_backend.simt_unavailable,
}
_bf16_products = "own"
_printed: set[str] = set()


def cpu_library() -> tuple[str | None, str]:
    """(instruction set of the loaded native CPU library or None, an explanation)."""
    return _cpu_isa, _cpu_explanation


def plain_functions() -> ctypes.CDLL:
    """The loaded library's functions that are no operators."""
    return ctypes.CDLL(str(FOLDER / f"_cpu_{_cpu_isa}.so"))


def cores_apart() -> float | None:
    """Seconds from a core to another and back, of two of torch's threads now; None with one thread, or no library.

    Where the two share no cache it is several times as long, and what one thread wrote is slow to read for the other.
    """
    if _cpu_isa is None:
        return None
    measure = plain_functions().gptkernels_cores_apart
    measure.restype = ctypes.c_double
    return measure() or None


def take_bf16_products(whose: str) -> None:
    """Whose matrix products the cpu backend takes in bfloat16 from now on: its "own", or "torch"'s with its own epilogues."""
    global _bf16_products
    if whose not in ("own", "torch"):
        raise ValueError(f"whose must be 'own' or 'torch', got {whose!r}")
    plain_functions().gptkernels_bf16_products_by_torch(whose == "torch")
    _bf16_products = whose


def bf16_products() -> str:
    """Whose matrix products the cpu backend takes in bfloat16."""
    return _bf16_products


# Asked for an instruction set, what one looks at are its kernels.
if _cpu_isa and torch_has_amx() and not os.environ.get("GPTKERNELS_CPU_ISA"):
    take_bf16_products("torch")


def available_backends() -> dict[str, str | None]:
    """Every backend with None where it works here, else the reason why not and the remedy.

    "triton" works without a GPU too: its kernels then run interpreted, on CPU tensors, slowly. "simt" are the CUDA
    kernels, executed and checked on the CPU, slowly as well.
    """
    return dict(_unavailable)


def resolve(backend: str, x: Tensor, dtype: torch.dtype | None = None) -> str:
    """The backend that runs an operator on x, computing in dtype (x's own if not given).

    An explicit backend is honoured or raises; "auto" takes the fastest one that can, and says so once when that is
    only the reference. Raises ValueError (unknown name, wrong device), TypeError (dtype), RuntimeError (not available).
    """
    dtype = dtype or x.dtype
    if backend == "reference":
        return backend
    if backend == "auto":
        fastest = FASTEST.get(x.device.type)
        if fastest and dtype in DTYPES[fastest] and _unavailable[fastest] is None:
            return fastest
        say_fallback((fastest and _unavailable[fastest]) or f"no kernels for {dtype} on {x.device.type}")
        return "reference"
    check_backend(backend, x, dtype)
    return backend


def check_backend(backend: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raise what keeps an explicit backend from running."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {backend!r}")
    if reason := _unavailable[backend]:
        raise RuntimeError(f"backend={backend!r} cannot run here: {reason}")
    if x.device.type not in DEVICES[backend]:
        devices = " or ".join(DEVICES[backend])
        raise ValueError(f"backend={backend!r} needs tensors on {devices}, got {x.device}: move them, or use 'auto'")
    if dtype not in DTYPES[backend]:
        names = " or ".join(str(d).removeprefix("torch.") for d in DTYPES[backend])
        raise TypeError(f"backend={backend!r} computes in {names}, got {dtype}: convert, or use backend='reference'")


def operators(backend: str) -> Any:
    """The raw operators (gptkernels/library.py) of a backend."""
    match backend:
        case "triton":
            return torch.ops.gptkernels_triton
        case "simt":
            return torch.ops.gptkernels_simt
        case _:
            return torch.ops.gptkernels


def kernels(backend: str) -> Any:
    """The raw operators for ops/<op>/native.py, whose callers record no gradient there: the shortest way to each."""
    return triton_backend.DIRECT if backend == "triton" else operators(backend)


def say_fallback(reason: str) -> None:
    """Print, once for each reason, that "auto" found nothing faster than plain PyTorch."""
    if reason not in _printed and not torch.compiler.is_compiling():
        _printed.add(reason)
        print(f"gptkernels: backend auto takes the reference (plain PyTorch): {reason}", file=sys.stderr)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product on x is computed in: autocast's where it is on, else x's own."""
    if not torch._C._is_any_autocast_enabled():
        return x.dtype
    device = x.device.type
    # meta tensors have no autocast; to ask torch which devices have is a question that Dynamo of torch 2.11 cannot trace.
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def autocasts(*tensors: Tensor) -> bool:
    """Whether autocast makes one dtype of these tensors."""
    dtypes = {autocast_dtype(x) if x.is_floating_point() else x.dtype for x in tensors}
    return len(dtypes) == 1 and tensors[0].dtype != torch.float64 and torch._C._is_any_autocast_enabled()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype, without the microsecond that `to` takes to find nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def factor(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as the kernels of a product in dtype take it: in dtype, or in float32, which they round themselves."""
    return weight if weight.dtype in (dtype, torch.float32) else weight.to(dtype)


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is made of the tensors; raises where it cannot by an autograd.Function of ours."""
    check_tangents(*tensors)
    if torch.is_grad_enabled():
        check_transforms(*tensors)
        for x in tensors:  # any() of a generator takes as long again
            if x is not None and x.requires_grad:
                return True
    return False


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors for an autograd.Function, to which Dynamo passes none twice: while it traces, a repeated one is a view."""
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(
        x.view_as(x) if x is not None and any(x is before for before in tensors[:i]) else x
        for i, x in enumerate(tensors)
    )


def check_tangents(*tensors: Tensor | None) -> None:
    """Raise for a derivative in forward mode, which the raw operators would lose without a word: a jvp of zero."""
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError("derivatives in forward mode (jvp) need backend='reference': the native kernels have none")


def check_transforms(*tensors: Tensor | None) -> None:
    """Raise for gradients under torch.func's transforms, which are more than an autograd.Function of ours has.

    vmap alone hides that a tensor requires a gradient, and would lose it without a word.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    for x in tensors:
        while x is not None and not x.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(x):
            x = torch._C._functorch.get_unwrapped(x)
        if x is not None and x.requires_grad:
            raise RuntimeError(
                "gradients under torch.func (grad, vjp, jacrev, vmap) need backend='reference': the native kernels have "
                "them for backward() and torch.autograd.grad"
            )


def check_backward() -> None:
    """Raise in a backward that is itself being recorded: the native gradients have no gradients of their own."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "gradients of gradients need backend='reference': the native kernels have no second derivative "
            "(backward was called with create_graph=True)"
        )
