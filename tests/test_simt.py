"""csrc/simt itself: fragments and warp functions against the ISA's tables, and every planted bug is found."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gptkernels import layer_norm, simt
from gptkernels.backend import available_backends

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler: none in $CXX or g++")
FLAGS = ["-std=c++20", "-g0", "-Wno-psabi", "-DGPTKERNELS_SIMT"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ENGINE = [path for path in sorted((ROOT / "csrc/simt").glob("*.cpp")) if path.stem not in ("python", "interface")]
DRIVER = ROOT / "tests/simt_driver.cu"


def compile_program(folder, sources, flags, csrc=ROOT / "csrc"):
    """A program from C++ and CUDA sources, two compilers at a time."""
    objects = [folder / f"{source.name}.o" for source in sources]

    def compile_one(pair):
        run([COMPILER, *FLAGS, *flags, f"-I{csrc}", "-x", "c++", "-c", *pair[:1], "-o", pair[1]])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, zip(sources, objects, strict=True)))
    run([COMPILER, *flags, *objects, "-o", folder / "program"])
    return folder / "program"


def run(command):
    process = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert process.returncode == 0, f"{' '.join(map(str, command))}\n{process.stdout}{process.stderr}"
    return process.stdout


@pytest.fixture(scope="module", params=["plain", "sanitizers"])
def driver(request, tmp_path_factory):
    """tests/simt_driver.cu; once more under AddressSanitizer and UndefinedBehaviorSanitizer, which must stay silent."""
    folder = tmp_path_factory.mktemp(request.param)
    return compile_program(folder, [*ENGINE, DRIVER], ["-O1", *(SANITIZERS if request.param == "sanitizers" else [])])


RIGHT = [
    "reverse",
    "rotate",
    "broken",
    "product bf16",
    "product fp16",
    "mma bf16",
    "mma fp16",
    "mma fp16 k8",
    "mma tf32",
    "ldmatrix",
    "ldmatrix trans",
    "warp functions",
]


@needs_compiler
@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("kernel", RIGHT)
def test_right_kernels_are_right(driver, kernel, schedule):
    """In every order of warps and lanes: results as plain loops compute them, and no rule broken."""
    assert run([driver, kernel, "", schedule]) == "right\n"


BUGS = [
    ("reverse", "missing barrier", "shared race|uninitialised"),
    ("reverse", "off by one", r"out of bounds \(global\): load_global of 4 bytes at 1024 of a buffer of 1024"),
    ("rotate", "missing barrier", "shared race|uninitialised"),
    ("product bf16", "missing wait", "cp.async not waited for"),
    ("product fp16", "missing barrier", "shared race|cp.async not waited for"),
    ("broken", "uninitialised", "uninitialised shared memory: load_shared of 4 bytes at"),
    ("broken", "past shared", r"out of bounds \(shared\): store_shared of 4 bytes at 256 of an array of 256"),
    ("broken", "divergent barrier", "divergent barrier: 40 of 64 threads wait at the barrier in line"),
    ("broken", "divergent warp", "divergent warp function: 5 of 32 lanes wait"),
    ("broken", "misaligned", "misaligned: load_global of 16 bytes"),
    ("broken", "before global", r"out of bounds \(global\): store_global of 4 bytes at -4 of"),
    ("broken", "all write one", "shared race"),
    ("broken", "two barriers", "divergent barrier: thread . waits at the barrier in line"),
]


@needs_compiler
@pytest.mark.parametrize("schedule", [0, 5])
@pytest.mark.parametrize("kernel, bug, message", BUGS)
def test_planted_bugs_are_found(driver, kernel, bug, message, schedule):
    output = run([driver, kernel, bug, schedule])
    assert re.search(f"^raised: gptkernels simt: .*({message})", output) and "\nbroken: " in output, output


@needs_compiler
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_wrong_fragment_gives_a_wrong_product(driver, dtype):
    assert run([driver, f"product {dtype}", "wrong fragment"]) == "wrong\n"


@needs_compiler
def test_an_unswizzled_tile_has_bank_conflicts(driver):
    assert run([driver, "product bf16", "unswizzled"]).startswith("right\nbank conflicts\n")


def require_simt():
    if reason := available_backends()["simt"]:
        pytest.skip(reason)


def test_counters_reach_python():
    """768 bfloat16 in and out: 16-byte packets, whole sectors, a warp a row."""
    require_simt()
    x = torch.randn(8, 768, generator=torch.Generator().manual_seed(1)).bfloat16()
    with simt.recording() as report:
        layer_norm(x, backend="simt")
    kernel = report.kernels["layer_norm_forward"]
    assert kernel["warps"] == 8 and kernel["blocks"] == 2 and kernel["launches"] == 1
    loads = kernel["load_global"]
    assert loads["instructions"] == 8 * 3 and loads["bytes"] == 8 * 768 * 2
    assert loads["sectors"] == loads["ideal_sectors"] == 8 * 768 * 2 // 32
    assert not any(report.violations.values()) and not report.messages


def test_schedules_agree():
    """The order in which warps and lanes run does not show in the result."""
    require_simt()
    x = torch.randn(5, 2056, generator=torch.Generator().manual_seed(1))
    usual = layer_norm(x, backend="simt")
    for seed in (1, 2):
        with simt.schedule(seed):
            assert torch.equal(layer_norm(x, backend="simt"), usual)
