"""Run Triton kernels on CPU tensors: Triton's interpreter as a context manager, for tests and study.

Triton switches its interpreter on by an environment variable that is read when a kernel is decorated, which forbids
compiling in the same process. Inside `interpreted()` a launch with CPU tensors is interpreted and one with GPU tensors
is compiled as ever; outside nothing is changed. An operation costs some 20 us of Python, so a program of a kernel takes
milliseconds: small shapes only. What the interpreter cannot show: timing, shared memory limits, races inside a program.
Import this module only where it is used: it imports triton, whose ImportError says what is missing.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import textwrap
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as upstream
from triton.backends.nvidia.compiler import CUDAOptions
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from gptkernels import interpreter_bf16 as arithmetic
from gptkernels import interpreter_speed as speed

# (object, attribute, value): what a patch sets, and what restoring it sets back.
Attribute = tuple[Any, str, Any]
ABSENT = object()
LAUNCH_OPTIONS = frozenset(field.name for field in dataclasses.fields(CUDAOptions))

# Upstream keeps the program index in one global builder, so launches take turns; nested ones by the same thread do not wait.
lock = threading.RLock()
depth = 0
installed: list[Attribute] = []
jit_run, jit_call, autotuner_run = JITFunction.run, JITFunction.__call__, Autotuner.run


class Observer(Protocol):
    """Told of every interpreted launch, and makes it check integer overflow: tests/interpreter_checks.py is one."""

    def begin(self, kernel: str, arguments: Mapping[str, Any], grid: tuple[int, int, int]) -> None: ...
    def program(self, index: tuple[int, int, int]) -> None: ...
    def end(self) -> None: ...


observers: list[Observer] = []


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Inside, @triton.jit kernels launched on CPU tensors run under the interpreter, with bfloat16 as a GPU computes it.

    May be nested and entered from several threads; everything patched is restored when the last one leaves.
    """
    global depth
    with lock:
        if depth == 0:
            methods = ((upstream.InterpreterBuilder, name, f) for name, f in arithmetic.BUILDER_METHODS.items())
            launches = (
                (JITFunction, "run", run),
                (JITFunction, "__call__", device_call),
                (Autotuner, "run", run_first_config),
            )
            installed[:] = apply((*methods, *launches))
        depth += 1
    try:
        yield
    finally:
        with lock:
            depth -= 1
            if depth == 0:
                restore(installed)


def apply(attributes: tuple[Attribute, ...]) -> list[Attribute]:
    """Set attributes and return what restores them."""
    before = []
    for owner, name, value in attributes:
        before.append((owner, name, vars(owner).get(name, ABSENT)))
        setattr(owner, name, value)
    return before


def restore(before: list[Attribute]) -> None:
    while before:
        owner, name, value = before.pop()
        if value is ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, value)


@functools.cache
def language() -> tuple[Attribute, ...]:
    """Upstream's replacements in triton.language, found once: finding them costs more than a small kernel."""
    visible = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    scope = upstream._patch_lang(visible)
    try:
        found = {(id(owner), name): (owner, name, vars(owner)[name]) for owner, name, _ in scope._changes}
    finally:
        scope.restore()
    for key, (owner, name, value) in found.items():
        # A builtin that upstream only binds to its semantics keeps the builtin as a default argument.
        builtin: Any = (getattr(value, "__kwdefaults__", None) or {}).get("member")
        if hasattr(builtin, "__wrapped__"):
            found[key] = (owner, name, with_semantic(builtin.__wrapped__))
    own = (*arithmetic.LANGUAGE, *speed.LANGUAGE, (tl, "range", range_of_tensors))
    found.update({(id(owner), name): (owner, name, value) for owner, name, value in own})
    return tuple(found.values())


def with_semantic(builtin: Callable) -> Callable:
    """A builtin of triton.language bound to the interpreter: upstream does the same through two more calls."""

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = upstream.interpreter_semantic
        return builtin(*args, **kwargs)

    return call


def on_cpu(argument: Any) -> bool:
    tensor = argument.base if isinstance(argument, TensorDescriptor) else argument
    device = getattr(tensor, "device", None)
    return device is None or device.type == "cpu"


def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    """JITFunction.run: interpreted for CPU tensors, compiled for all others."""
    if not all(map(on_cpu, (*args, *kwargs.values()))):
        return jit_run(self, *args, grid=grid, warmup=warmup, **kwargs)
    if not warmup:
        launch(self, bind(self, args, kwargs), grid)
    return None


def run_first_config(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Autotuner.run without timing: the interpreter's times mean nothing, so the first configuration runs."""
    config = self.configs[0]
    if not all(map(on_cpu, (*args, *kwargs.values()))):
        return autotuner_run(self, *args, **kwargs)
    if config.pre_hook is not None:
        config.pre_hook({**dict(zip(self.arg_names, args, strict=False)), **kwargs, **config.all_kwargs()})
    return self.fn.run(*args, **kwargs, **config.all_kwargs())


def bind(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The kernel's arguments by name; options such as num_warps have no meaning here and are dropped."""
    signature = kernel.signature
    unknown = [name for name in kwargs if name not in signature.parameters and name not in LAUNCH_OPTIONS]
    if unknown:
        raise TypeError(
            f"{kernel.fn.__name__} takes no argument {unknown[0]!r}, and it is no option of a launch either"
        )
    bound = signature.bind(*args, **{name: v for name, v in kwargs.items() if name in signature.parameters})
    bound.apply_defaults()
    return dict(bound.arguments)


def launch(kernel: Any, arguments: dict[str, Any], grid: Any) -> None:
    """Run every program of the grid, one after the other."""
    sizes = grid(arguments) if callable(grid) else grid
    x, y, z = (int(n) for n in (*sizes, 1, 1)[:3])
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    values = {name: plain(v) if name in constexprs else convert(v) for name, v in arguments.items()}
    function, builder = rewritten(kernel.fn), upstream.interpreter_builder
    with lock, np.errstate(all="ignore"):
        for observer in observers:
            observer.begin(kernel.fn.__name__, arguments, (x, y, z))
        # As on a GPU, integers wrap; where somebody watches, int32 overflow and tl.device_assert raise.
        options = dataclasses.replace(builder.options, sanitize_overflow=bool(observers), debug=bool(observers))
        before = apply((*language(), (builder, "options", options)))
        try:
            builder.set_grid_dim(x, y, z)
            for index in np.ndindex(x, y, z):
                builder.set_grid_idx(*index)
                for observer in observers:
                    observer.program(index)
                function(**values)
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"in kernel {kernel.fn.__name__}, program {builder.grid_idx} of {(x, y, z)}")
            raise
        finally:
            restore(before)
        for observer in observers:
            observer.end()


def plain(value: Any) -> Any:
    return value.value if isinstance(value, tl.constexpr) else value


def convert(argument: Any) -> Any:
    """An argument as the kernel sees it; a Python float is a float32, as it is for compiled kernels."""
    if isinstance(argument, float):
        return tl.tensor(upstream.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
    return upstream._implicit_cvt(argument)


def range_of_tensors(first: Any, last: Any = None, step: Any = 1, **_: Any) -> Iterator[Any]:
    """range and tl.range in a kernel: the index is a tensor, as in a compiled one (upstream gives Python's int)."""
    start, stop = (0, first) if last is None else (first, last)
    dtype = tl.int64 if any(getattr(bound, "dtype", None) == tl.int64 for bound in (start, stop, step)) else tl.int32
    for i in range(*(plain(bound) for bound in (start, stop, step))):
        yield tl.tensor(upstream.TensorHandle(np.array([i], dtype=dtype.name), dtype), dtype)


def device_call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """JITFunction.__call__ from inside an interpreted kernel; elsewhere it raises as ever."""
    if vars(tl)["reduce"] is not arithmetic.reduce:
        return jit_call(self, *args, **kwargs)
    return rewritten(self.fn)(*args, **kwargs)


@functools.cache
def rewritten(fn: Callable) -> Callable:
    """A kernel's Python function with upstream's transformation (assigned numbers become tensors).

    Upstream executes it in the kernel's module and leaves dozens of names there. Here what it needs comes in as the
    parameters of an enclosing function, together with the variables that the kernel itself closes over.
    """
    lines, first = inspect.getsourcelines(fn)
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("def "))
    tree = upstream.ASTTransformer().visit(ast.parse(textwrap.dedent("".join(lines[start:]))))
    names = {name: value for name, value in vars(upstream).items() if name in NEEDED_NAMES}
    names["range"] = range_of_tensors
    names.update(zip(fn.__code__.co_freevars, (cell.cell_contents for cell in fn.__closure__ or ()), strict=True))
    enclosing = ast.parse(f"def enclosing({', '.join(names)}):\n    return {fn.__name__}")
    ast.increment_lineno(tree, first + start - 1)
    enclosing.body[0].body[:0] = tree.body  # type: ignore[attr-defined]
    ast.fix_missing_locations(enclosing)
    scope: dict[str, Any] = {}
    code = compile(enclosing, fn.__code__.co_filename, "exec", dont_inherit=True)
    exec(code, fn.__globals__, scope)
    return scope["enclosing"](**names)


NEEDED_NAMES = ("interpreter_semantic", "_InterpreterComparison")
