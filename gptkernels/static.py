"""Compile every Triton kernel for any GPU without one, and read from the machine code what it will cost.

`recorded(arch)` runs the launch functions of ops/*/triton.py on tensors without data of a pretended device cuda:ARCH: each launch is
noted, with the signature, the constants, the options and the divisibility by 16 that Triton's own JIT would compile it
with. So what is compiled is what would be launched, tile choices included. `figures` compiles one such launch and reads
registers, spills, shared memory and instructions with the tools that Triton brings along. Needs triton, and no GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
import triton.backends.nvidia
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, create_function_from_signature

KB = 1024
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"


@dataclasses.dataclass(frozen=True)
class Device:
    """What a kernel may use on one architecture (CUDA C programming guide, technical specifications)."""

    multiprocessors: int  # of the data-centre card: A100, A40, L40S, H100 SXM, B200, RTX 5090
    shared_per_block: int
    shared_per_multiprocessor: int
    warps: int
    blocks: int


DEVICES = {
    80: Device(108, 163 * KB, 164 * KB, 64, 32),
    86: Device(84, 99 * KB, 100 * KB, 48, 16),
    89: Device(142, 99 * KB, 100 * KB, 48, 24),
    90: Device(132, 227 * KB, 228 * KB, 64, 32),
    100: Device(148, 227 * KB, 228 * KB, 64, 32),
    120: Device(170, 99 * KB, 100 * KB, 48, 24),
}
REGISTERS = 65536  # of a multiprocessor, on every architecture above
REGISTER_UNIT = 256  # registers are given to warps in such portions
SHARED_RESERVED = 1 * KB  # of every block, for the driver

# Bytes of registers a thread that may wait in memory while a loop runs that does not use them.
WORDS_AROUND_LOOPS = 16

# A tensor-core instruction by the opcode that it starts with.
TENSOR_CORES = {"HMMA": "mma", "IMMA": "mma", "HGMMA": "wgmma", "UTCHMMA": "tcgen05", "UTCQMMA": "tcgen05"}
# An instruction is "/*0120*/  @!P0 LDG.E.128 R4, [R2.64] ;"; of a hexadecimal encoding only the comment is left.
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.M)


@dataclasses.dataclass
class Launch:
    """One kernel as it would be launched on an architecture."""

    arch: int
    kernel: JITFunction
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def key(self) -> str:
        """Equal for launches that compile to the same code."""
        return repr((self.arch, self.name, self.signature, self.constants, self.attributes, self.options))


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the compiled kernel uses; instructions are counted in the code, not in a run of it."""

    registers: int
    spilled: int  # bytes of stack a thread
    spilled_in_loops: int  # instructions that move them, in loops; the others run once
    shared: int
    shared_limit: int
    threads: int
    blocks: int  # that a multiprocessor can hold at once
    occupancy: float  # their warps over those that it could hold
    matrix: bool  # the source multiplies matrices
    tensor_cores: dict[str, int]  # instructions by kind: mma, wgmma, tcgen05
    cp_async: int
    tma: int
    widest_load: int  # bytes of a thread's widest load from global memory
    widest_store: int
    instructions: int
    executed: int | None  # by a thread; None where the code loops

    @property
    def asynchronous(self) -> str:
        """How matrices reach shared memory."""
        return "TMA" if self.tma else "cp.async" if self.cp_async else "-"

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "asynchronous": self.asynchronous}


def properties(arch: int) -> SimpleNamespace:
    """What torch.cuda.get_device_properties says of a device of the architecture."""
    device = DEVICES[arch]
    return SimpleNamespace(
        name=f"sm_{arch}",
        major=arch // 10,
        minor=arch % 10,
        multi_processor_count=device.multiprocessors,
        shared_memory_per_block_optin=device.shared_per_block,
        shared_memory_per_multiprocessor=device.shared_per_multiprocessor,
        regs_per_multiprocessor=REGISTERS,
        max_threads_per_multi_processor=32 * device.warps,
        warp_size=32,
        total_memory=80 * KB**3,
    )


def arch_of(device: Any = None) -> int:
    """The architecture that the index of a fake device stands for."""
    index = device if device is None or isinstance(device, int) else torch.device(device).index
    return torch.cuda.current_device() if index is None else index


class OnDevice(torch.Tensor):
    """A tensor without data (a meta tensor) that says it is on a device that does not exist here."""

    is_cuda = True
    device = property(lambda self: torch.device("cuda", torch.cuda.current_device()))

    def get_device(self) -> int:
        return torch.cuda.current_device()

    def data_ptr(self) -> int:
        # Storages are aligned, so this has the alignment of the address.
        return int(self.storage_offset()) * self.element_size()


class Pretend(TorchFunctionMode):
    """Makes every tensor of a cuda device one without data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(OnDevice, lambda x: x.as_subclass(torch.Tensor), (args, dict(kwargs or {})))
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        results = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, lambda x: x.as_subclass(OnDevice) if x.is_meta else x, results)


@contextlib.contextmanager
def recorded(arch: int) -> Iterator[list[Launch]]:
    """Inside, tensors made on `cuda:ARCH` have no data, and launches with them are noted in the list instead of run."""
    if arch not in DEVICES:
        raise ValueError(f"arch must be one of {', '.join(map(str, DEVICES))}, got {arch}")
    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(launch_of(arch, kernel, grid, args, kwargs))

    def run_first(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        return tuner.fn.run(*args, **kwargs, **tuner.configs[0].all_kwargs())

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (JITFunction, "run", run),
            (Autotuner, "run", run_first),
            (torch.cuda, "current_device", lambda: arch),
            (torch.cuda, "get_device_properties", lambda device=None: properties(arch_of(device))),
            (torch.cuda, "get_device_name", lambda device=None: properties(arch_of(device)).name),
            (torch.cuda, "get_device_capability", lambda device=None: divmod(arch_of(device), 10)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(Pretend())
        yield launches


@functools.cache
def backend_of(arch: int) -> Any:
    return make_backend(GPUTarget("cuda", arch, 32))


def launch_of(arch: int, kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """What Triton's JIT would compile for these arguments."""
    backend = backend_of(arch)
    kwargs = {"debug": False, **kwargs}
    bound, specialization, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **kwargs)
    # Given, because its default is about to change (Triton 3.10).
    kwargs.setdefault("enable_fp_fusion", True)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, None)
    sizes = grid(bound) if callable(grid) else grid
    return Launch(arch, kernel, tuple(sizes), signature, constants, attributes, dict(options.__dict__))


def figures(launch: Launch) -> Figures:
    """Compile a launch (1 to 4 s, cached by Triton) and read its figures."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", launch.arch, 32), options=launch.options)
    usage, code = disassemble(compiled.asm["cubin"])
    families, in_code = counted(code)
    tensor_cores: Counter[str] = Counter()
    for family, kind in TENSOR_CORES.items():
        tensor_cores[kind] += families[family]
    shared = int(compiled.metadata.shared)
    threads = 32 * int(compiled.metadata.num_warps)
    blocks = blocks_per_multiprocessor(DEVICES[launch.arch], usage["REG"], threads // 32, shared)
    return Figures(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=shared,
        shared_limit=DEVICES[launch.arch].shared_per_block,
        threads=threads,
        blocks=blocks,
        occupancy=blocks * threads / 32 / DEVICES[launch.arch].warps,
        matrix="tt.dot" in compiled.asm["ttir"],
        tensor_cores={kind: count for kind, count in tensor_cores.items() if count},
        cp_async=families["LDGSTS"],
        tma=families["UTMALDG"],
        executed=None if loops(code) else in_code["instructions"],
        **in_code,
    )


def counted(code: str) -> tuple[Counter[str], dict[str, int]]:
    """Of a disassembly: its instructions by family, and those of Figures' figures that are counted in the code."""
    opcodes = Counter(opcode for _, opcode, _ in INSTRUCTION.findall(code) if opcode != "NOP")
    families: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        families[opcode.split(".")[0]] += count
    moved = (sum(" LDL" in line or " STL" in line for line in body) for body in loops(code))
    return families, {
        "spilled_in_loops": max(moved, default=0),
        "widest_load": max((width(x) for x in opcodes if x.startswith(("LDG.", "LDGSTS."))), default=0),
        "widest_store": max((width(x) for x in opcodes if x.startswith("STG.")), default=0),
        "instructions": opcodes.total(),
    }


def spills(spilled: int, in_loops: int, around_loops: int) -> list[str]:
    """What there is to say of bytes a thread that do not fit into registers, and of instructions that move them in loops.

    A word that is stored once before a loop and loaded once after it costs nothing: so many bytes of those may be.
    """
    wrong = in_loops or spilled > around_loops
    return [f"spills {spilled} bytes a thread, {in_loops} instructions in loops"] if wrong else []


def problems(figures: Figures, dtype: torch.dtype) -> list[str]:
    """What a kernel on aligned, contiguous data must not show, in words; empty if it is as it should be."""
    found = spills(figures.spilled, figures.spilled_in_loops, WORDS_AROUND_LOOPS)
    if figures.shared > figures.shared_limit:
        found.append(f"needs {figures.shared} bytes of shared memory, the device has {figures.shared_limit}")
    if figures.matrix and dtype.itemsize == 2 and not figures.tensor_cores:
        found.append("multiplies 16-bit matrices without tensor cores")
    if figures.matrix and dtype == torch.float32 and figures.tensor_cores:
        found.append("multiplies float32 matrices in TF32")
    if figures.matrix and figures.asynchronous == "-":
        found.append("loads its matrices without cp.async or TMA")
    if not figures.tma and figures.widest_load < 16:
        found.append(f"loads no more than {figures.widest_load} bytes at once")
    return found


def disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """(resources by name, machine code as text)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run_tool("cuobjdump", "--dump-resource-usage", file.name)
        code = run_tool("nvdisasm", "-c", file.name)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}, code


def run_tool(name: str, *arguments: str | Path) -> str:
    result = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{name} failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def width(opcode: str) -> int:
    """Bytes that one thread moves with a global load or store: LDG.E.128 -> 16."""
    modifiers = opcode.split(".")
    for bits in (256, 128, 64):
        if str(bits) in modifiers:
            return bits // 8
    return next((n for name, n in (("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)) if name in modifiers), 4)


def loops(code: str) -> list[list[str]]:
    """The instructions of every loop: from where a branch goes back to, up to it.

    The branch to itself that ends every kernel does not count.
    """
    place: dict[str, int] = {}
    instructions: list[str] = []
    found = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            place[label[1]] = len(instructions)
        elif INSTRUCTION.match(line):
            branch = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)
            if branch and place.get(branch[1], len(instructions)) < len(instructions):
                found.append(instructions[place[branch[1]] :])
            instructions.append(line)
    return found


def blocks_per_multiprocessor(device: Device, registers: int, warps: int, shared: int) -> int:
    """How many blocks fit at once by registers, shared memory, warps and their own limit."""
    of_warp = math.ceil(registers * 32 / REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // of_warp // warps
    by_shared = device.shared_per_multiprocessor // (shared + SHARED_RESERVED)
    return min(by_registers, by_shared, device.warps // warps, device.blocks)
