"""Builds the native parts: one library of CPU kernels for each instruction set, of which Python loads one, the CUDA
kernels where nvcc and a CUDA build of torch are, and the CUDA kernels for the CPU (csrc/simt).

torch is needed to build, but is no build requirement where it can be found: pip's isolated build runs the user's own
Python, so the torch beside it is the one to build against. Only where there is none is it asked for. Each library is
optional: what fails to build is reported in gptkernels/_build.json, which `gptkernels doctor` shows.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprfchw", "-mfma", "-mf16c"],
}
ISAS["avx512_bf16"] = [*ISAS["avx512"], "-mavx512bf16"]
CUDA = "gptkernels._cuda"
# What compilers, linkers and the shell say of a failure, and how much of it is kept: the first few lines tell.
ERRORS = re.compile(r"\berror: |undefined reference|cannot find|not found|No such file", re.IGNORECASE)
ERROR_LINES = 4
# The stable ABI of torch 2.10: one build runs on that and every later version.
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
FLAGS = [
    "-O3",
    "-std=c++20",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    "-ffp-contract=fast",  # a * b + c is one rounding where the CPU has it
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",  # vectors are passed by value in internal functions only
    "-g0",
    TARGET,
]


def find_torch() -> bool:
    """Whether torch can be imported, if need be from the environment that pip was started in."""
    places = [None, sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    for place in places:
        if place is not None and (not (Path(place) / "torch").is_dir() or place in sys.path):
            continue
        if place is not None:
            sys.path.append(place)
        try:
            import torch  # noqa: F401
        except ImportError:
            if place is not None:
                sys.path.remove(place)
            continue
        return True
    return False


def find_toolkit() -> None:
    """Set CUDA_HOME, which torch guesses from where nvcc lies: that may be a script that runs the toolkit's."""
    import torch

    nvcc = shutil.which("nvcc")
    if torch.version.cuda is None or nvcc is None or "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ:
        return
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    if top := re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE):
        os.environ["CUDA_HOME"] = str(Path(top[1]).resolve())


def isas() -> list[str]:
    """The instruction sets to build for: all of an x86-64, else what the compiler assumes anyway (NEON on aarch64)."""
    wanted = os.environ.get("GPTKERNELS_BUILD_ISAS")
    if wanted is not None:
        unknown = [name for name in wanted.split() if name not in ISAS]
        if unknown:
            raise ValueError(f"GPTKERNELS_BUILD_ISAS must name some of {', '.join(ISAS)}, got {unknown[0]!r}")
        return wanted.split()
    return list(ISAS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]


def extensions() -> list:
    """Every native library that can be tried here."""
    find_toolkit()  # before torch's cpp_extension is imported, which guesses then
    return [*cpu_extensions(), *cuda_extensions(), simt_extension(), *report_extensions()]


def sources(*patterns: str) -> list[str]:
    """Files under csrc, as setuptools wants them."""
    found = [path for pattern in patterns for path in (ROOT / "csrc").glob(pattern)]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def cpu_extensions() -> list:
    """One library an instruction set, all from the same sources."""
    from torch.utils.cpp_extension import CppExtension

    device = {*sources("simt/*.cpp", "*/*_cuda_torch.cpp")}
    return [
        CppExtension(
            f"gptkernels._cpu_{isa}",
            [source for source in sources("*/*.cpp") if source not in device],
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": FLAGS + ISAS[isa]},
            py_limited_api=True,
        )
        for isa in isas()
    ]


def cuda_extensions() -> list:
    """The CUDA kernels, where torch was built with CUDA and its compiler is there; whether a GPU is does not matter."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    if torch.version.cuda is None or CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return []
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    nvcc = ["-O3", "-std=c++20", "-Xcompiler", "-fvisibility=hidden", "--threads", "2", TARGET]
    return [
        CUDAExtension(
            CUDA,
            sources("*/*_cuda.cu", "*/*_cuda_torch.cpp"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": [*FLAGS, "-DUSE_CUDA"], "nvcc": nvcc},
            py_limited_api=True,
        )
    ]


def simt_extension():
    """The CUDA kernels as C++, executed by csrc/simt: needs no CUDA. A .cu file would be given to nvcc, so that each is
    included by a .cpp file."""
    from torch.utils.cpp_extension import CppExtension

    folder = ROOT / "build" / "simt_sources"
    folder.mkdir(parents=True, exist_ok=True)
    kernels = []
    for source in sources("*/*_cuda.cu"):
        path = folder / f"{Path(source).stem}_simt.cpp"
        text = f'#include "{Path(source).relative_to("csrc")}"\n'
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        kernels.append(str(path.relative_to(ROOT)))
    engine = [source for source in sources("simt/*.cpp") if not source.endswith("/python.cpp")]
    # Unrolled loops leave paths on which a packet that no column of the row needs is never written, nor read.
    flags = [*FLAGS, "-O2", "-DGPTKERNELS_SIMT", "-Wno-maybe-uninitialized"]
    return CppExtension(
        "gptkernels._simt",
        [*engine, *kernels, *sources("*/*_cuda_torch.cpp")],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": flags},
        py_limited_api=True,
    )


def report_extensions() -> list:
    """The Python module with csrc/simt's reports, where pybind11 is."""
    try:
        import pybind11
    except ImportError:
        return []
    return [
        Extension(
            "gptkernels._simt_report",
            ["csrc/simt/python.cpp", "csrc/simt/report.cpp"],
            include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
            extra_compile_args={"cxx": [*FLAGS, "-DGPTKERNELS_SIMT"]},
        )
    ]


@contextlib.contextmanager
def copied_output(path: Path) -> Iterator[None]:
    """Let what is printed inside go to a file as well. ninja and the compilers print it, on descriptors 1 and 2, and the
    exception that follows does not say it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    streams = {1: sys.stdout, 2: sys.stderr}
    with subprocess.Popen(["tee", str(path)], stdin=subprocess.PIPE) as tee:
        kept = {}
        for descriptor, stream in streams.items():
            stream.flush()
            kept[descriptor] = os.dup(descriptor)
            os.dup2(tee.stdin.fileno(), descriptor)
        try:
            yield
        finally:
            for descriptor, stream in streams.items():
                stream.flush()
                os.dup2(kept[descriptor], descriptor)
                os.close(kept[descriptor])


def first_errors(path: Path) -> list[str]:
    """The first lines of a build's output that tell of an error, else its last ones, without the paths of this folder."""
    lines = [line.rstrip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if ERRORS.search(line)][:ERROR_LINES] or lines[-ERROR_LINES:]
    return [line.replace(f"{ROOT.resolve()}{os.sep}", "") for line in errors]


def build_command() -> type:
    """build_ext with a folder of objects for each library, going on after one that fails."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, ext) -> None:
            # The libraries share their sources: in one folder each would overwrite the others' objects.
            folder, self.build_temp = self.build_temp, str(Path(self.build_temp) / ext.name)
            messages = Path(self.build_temp).resolve() / "messages.txt"
            try:
                with copied_output(messages):
                    super().build_extension(ext)
                self.report[ext.name] = "built"
            except Exception as error:  # whatever a compiler run can raise; the text is kept and shown
                self.give_up(ext.name, error, first_errors(messages))
            finally:
                self.build_temp = folder

        def build_extensions(self) -> None:
            self.report: dict[str, str] = {}
            try:
                super().build_extensions()
            except Exception as error:  # raised before anything is built where nvcc is not of torch's CUDA version
                others = [ext for ext in self.extensions if ext.name != CUDA]
                if self.report or len(others) == len(self.extensions):
                    raise
                self.give_up(CUDA, error)
                self.extensions = others
                super().build_extensions()
            self.write_report(Path(self.build_lib))

        def give_up(self, name: str, error: Exception, details: list[str] | None = None) -> None:
            self.report[name] = "\n".join([f"{type(error).__name__}: {error}", *(details or [])])
            print(f"gptkernels: WARNING: {name} is not built: {self.report[name]}", file=sys.stderr)

        def write_report(self, folder: Path) -> None:
            path = folder / "gptkernels" / "_build.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.report, indent=2) + "\n")

        def copy_extensions_to_source(self) -> None:
            self.write_report(ROOT)
            self.extensions = [ext for ext in self.extensions if self.report[ext.name] == "built"]
            super().copy_extensions_to_source()

        def get_outputs(self) -> list[str]:
            return [name for name in super().get_outputs() if Path(name).exists()]

    return Build.with_options(no_python_abi_suffix=True)


if find_torch():
    setup(ext_modules=extensions(), cmdclass={"build_ext": build_command()})
else:
    # setuptools reports this to pip as a requirement of the build, which then runs this file again with torch there.
    setup(setup_requires=["torch>=2.10", "ninja"])
