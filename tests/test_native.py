"""The CPU kernels themselves, without torch, under the compiler's sanitizers (tests/native_driver.cpp)."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gptkernels.backend import supported_isas

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
# What setup.py compiles these instruction sets with.
FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mprfchw -mfma -mf16c",
    "avx512_bf16": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mprfchw -mavx512bf16 -mfma -mf16c",
}
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler: none in $CXX, g++ or clang++")


PRODUCTS = [ROOT / "csrc/common/gemm.cpp", ROOT / "csrc/common/gemm_pieces.cpp"]
KERNELS = [*sorted((ROOT / "csrc").glob("*/*_cpu.cpp")), *PRODUCTS]
WORKSPACE = ROOT / "csrc/common/workspace.cpp"
PROGRAM = [*KERNELS, WORKSPACE, ROOT / "tests/native_driver.cpp"]
POOL = [ROOT / "csrc/common/pool.cpp", WORKSPACE, ROOT / "tests/pool_driver.cpp"]


def build_and_run(folder, flags, sources):
    """Compile the files, each by itself on two cores, and run the program."""
    common = [COMPILER, "-std=c++20", "-O1", "-g0", "-Wno-psabi", "-pthread", *flags.split()]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(pair):
        return run([*common, f"-I{ROOT / 'csrc'}", "-c", pair[0], "-o", pair[1]])

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(compile_one, zip(sources, objects, strict=True)))
    run([*common, *objects, "-o", folder / "driver"])
    return run([folder / "driver"])


def run(command):
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, f"{' '.join(map(str, command))}\n{process.stdout}{process.stderr}"
    return process.stdout


@pytest.mark.parametrize("isa", supported_isas())
def test_no_read_or_write_out_of_bounds(isa, tmp_path):
    """AddressSanitizer and UndefinedBehaviorSanitizer, and right results, on buffers of exactly the size they need."""
    output = build_and_run(tmp_path, f"{FLAGS[isa]} -fsanitize=address,undefined -fno-sanitize-recover=all", PROGRAM)
    assert output.endswith(" 0 failures\n")


def test_no_data_race(tmp_path):
    """ThreadSanitizer, with three threads."""
    output = build_and_run(tmp_path, "-fsanitize=thread", PROGRAM)
    assert output.endswith(" 0 failures\n")


@pytest.mark.parametrize("flags", ["", "-fsanitize=thread"], ids=["plain", "thread"])
def test_pool(flags, tmp_path):
    """The memory of results: what is in use is left alone, what is idle is found again or given to the system."""
    assert build_and_run(tmp_path, flags, POOL) == "0 failures\n"
