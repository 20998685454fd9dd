"""Every Triton kernel compiles for GPUs that are not here, and its machine code is as it should be.

A part of what `make gpu-static` compiles: one of each kernel, bfloat16, sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheels for this platform")
import triton
import triton.language as tl

from gptkernels import static, static_table
from gptkernels.static_cases import DTYPES, cases

KERNELS = {
    "attention": {"attention_forward_kernel", "query_gradient_kernel", "key_gradient_kernel"},
    "layer_norm": {"forward_kernel", "backward_kernel", "sum_kernel"},
    "cross_entropy": {"count_kernel", "cross_entropy_kernel"},
    "linear": {"gemm_kernel", "column_sums_kernel"},
    "mlp": {"gemm_gelu_kernel", "gemm_gelu_backward_kernel"},
}
USUAL = {case.op: case for case in reversed(cases()) if case.usual and case.dtype == torch.bfloat16}
TENSOR_CORES = {80: "mma", 90: "wgmma", 100: "tcgen05"}


@pytest.mark.parametrize("arch", TENSOR_CORES)
@pytest.mark.parametrize("op", KERNELS)
def test_machine_code(op, arch):
    case = USUAL[op]
    with static.recorded(arch) as launches:
        case.run(f"cuda:{arch}")
    by_name = {launch.name: launch for launch in reversed(launches)}
    assert by_name.keys() >= KERNELS[op]
    for name in KERNELS[op]:
        found = static.figures(by_name[name])
        assert static.problems(found, case.dtype) == [], f"{name} on sm_{arch}: {found}"
        assert set(found.tensor_cores) == ({TENSOR_CORES[arch]} if found.matrix else set()), found
        assert found.matrix == (op == "attention" or name.startswith("gemm"))
        if name.startswith("gemm"):
            assert found.asynchronous == ("TMA" if arch >= 90 else "cp.async"), found


@pytest.mark.parametrize("size", ["D=128", "D=128 T=1000", "D=64 dropout", "D=64 packed"])
def test_registers_suffice_on_sm_80(size):
    """The tightest kernels: another order of two statements (dv before ds) once made key_gradient_kernel spill 4 KB."""
    case = next(case for case in cases() if (case.op, case.size, case.dtype) == ("attention", size, torch.bfloat16))
    with static.recorded(80) as launches:
        case.run("cuda:80")
    for launch in launches:
        found = static.figures(launch)
        assert static.problems(found, case.dtype) == [], f"{launch.name}: {found}"


RAGGED = [("D=64 dropout T=1000", 90), ("D=128 dropout T=1000", 90), ("D=256 T=1000", 90)]


@pytest.mark.parametrize("size, arch", [("D=256 atomics", 80), ("D=256 dropout", 90), *RAGGED])
def test_registers_suffice_for_key_gradients(size, arch):
    """Where dq's sums, dropout's words or the addresses of ragged rows are beside the sums of dk and dv."""
    case = next(c for c in cases() if (c.op, c.size, c.dtype) == ("attention", size, torch.bfloat16))
    with static.recorded(arch) as launches:
        case.run(f"cuda:{arch}")
    (launch,) = (launch for launch in launches if launch.name == "key_gradient_kernel")
    found = static.figures(launch)
    assert static.problems(found, case.dtype) == [], found


def test_float32_fits_at_head_dim_256():
    """Its tiles once needed 100 KB of shared memory, which sm_86 has not, and spilled 600 bytes."""
    case = next(c for c in cases() if (c.op, c.size, c.dtype) == ("attention", "D=256", torch.float32))
    with static.recorded(86) as launches:
        case.run("cuda:86")
    assert {launch.name for launch in launches} == KERNELS["attention"]
    for launch in launches:
        assert static.problems(static.figures(launch), case.dtype) == [], launch.name


# By Triton 3.9 the others do not spill either, by 3.7.1 they do (README.md).
WIDE = [*itertools.product(DTYPES, (80, 120)), (torch.bfloat16, 90), (torch.float16, 90), (torch.float32, 100)]


@pytest.mark.parametrize("dtype, arch", WIDE, ids=str)
def test_wide_rows_of_layer_norm(dtype, arch):
    """The sums of dweight and dbias take half of the registers, beside loads of 16 bytes."""
    case = next(c for c in cases() if (c.op, c.size, c.dtype) == ("layer_norm", "C=16384", dtype))
    with static.recorded(arch) as launches:
        case.run(f"cuda:{arch}")
    for launch in {launch.key: launch for launch in launches}.values():
        found = static.figures(launch)
        assert static.problems(found, dtype) == [] and not found.spilled, f"{launch.name}: {found}"


@triton.jit
def copy_kernel(x_ptr, out_ptr, scale, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < size) * scale, mask=i < size)


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, K, BLOCK: tl.constexpr, PRECISION: tl.constexpr = "ieee"):
    i, k = tl.arange(0, BLOCK), tl.arange(0, 16)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, 16):
        a = tl.load(a_ptr + i[:, None] * K + start + k[None, :])
        b = tl.load(b_ptr + i[:, None] * K + start + k[None, :])
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    tl.store(out_ptr + i[:, None] * BLOCK + i[None, :], acc)


def figures_of(kernel, *arguments, dtype=torch.bfloat16, arch=80, **options) -> static.Figures:
    """Figures of one launch; a tuple among the arguments is the shape of a tensor, its last number an offset into it."""
    with static.recorded(arch) as launches:
        tensors = [
            torch.empty(a[0] + a[1], dtype=dtype, device=f"cuda:{arch}")[a[1] :] if isinstance(a, tuple) else a
            for a in arguments
        ]
        kernel[(1,)](*tensors, **options)
    return static.figures(launches[0])


def test_alignment_decides_the_width_of_loads():
    aligned = figures_of(copy_kernel, (1024, 0), (1024, 0), 2.0, 1024, BLOCK=1024)
    assert (aligned.widest_load, aligned.widest_store, aligned.executed) == (16, 16, aligned.instructions)
    assert static.problems(aligned, torch.bfloat16) == []
    shifted = figures_of(copy_kernel, (1024, 1), (1024, 0), 2.0, 1024, BLOCK=1024)
    assert shifted.widest_load == 2
    assert static.problems(shifted, torch.bfloat16) == ["loads no more than 2 bytes at once"]


def test_a_kernel_that_spills_is_found():
    fits = figures_of(product_kernel, (4096, 0), (4096, 0), (4096, 0), 64, BLOCK=64, num_warps=4)
    assert fits.matrix and not fits.spilled and fits.executed is None
    spills = figures_of(product_kernel, (16384, 0), (16384, 0), (16384, 0), 64, BLOCK=128, num_warps=2)
    assert any("spills" in problem for problem in static.problems(spills, torch.bfloat16))


def test_a_word_kept_around_a_loop_is_no_problem_and_one_moved_in_it_is():
    fits = figures_of(product_kernel, (4096, 0), (4096, 0), (4096, 0), 64, BLOCK=64, num_warps=4)
    around = dataclasses.replace(fits, spilled=8, spilled_in_loops=0)
    within = dataclasses.replace(fits, spilled=8, spilled_in_loops=1)
    assert static.problems(around, torch.bfloat16) == []
    assert len(static.problems(within, torch.bfloat16)) == 1
    assert len(static.problems(dataclasses.replace(around, spilled=32), torch.bfloat16)) == 1


def test_loops_are_found_by_their_branches():
    code = """
.L_x_1:
        /*0000*/                   STL [R1], R2 ;
.L_x_2:
        /*0010*/                   LDL R2, [R1] ;
        /*0020*/               @P0 BRA `(.L_x_2) ;
        /*0030*/               @P1 BRA `(.L_x_3) ;
        /*0040*/                   EXIT ;
.L_x_3:
        /*0050*/                   BRA `(.L_x_3) ;
"""
    (body,) = static.loops(code)
    assert len(body) == 1 and "LDL" in body[0]


def test_float32_in_tf32_is_found():
    size = (4096, 0)
    for precision, wrong in (("ieee", []), ("tf32", ["multiplies float32 matrices in TF32"])):
        found = figures_of(product_kernel, size, size, size, 64, dtype=torch.float32, BLOCK=64, PRECISION=precision)
        assert static.problems(found, torch.float32) == wrong


def test_blocks_of_a_multiprocessor():
    """Worked by hand from the occupancy rules for sm_80."""
    device = static.DEVICES[80]
    assert static.blocks_per_multiprocessor(device, registers=32, warps=8, shared=0) == 8  # warps
    assert static.blocks_per_multiprocessor(device, registers=255, warps=4, shared=0) == 2  # registers
    assert static.blocks_per_multiprocessor(device, registers=32, warps=4, shared=54 * 1024) == 2  # shared memory
    assert static.blocks_per_multiprocessor(device, registers=32, warps=1, shared=0) == 32  # blocks


def test_recording_runs_nothing_and_leaves_nothing():
    before = torch.cuda.current_device, torch.cuda.get_device_properties, triton.JITFunction.run
    with static.recorded(90) as launches:
        x = torch.empty(3, 5, device="cuda:90", dtype=torch.float16)
        assert (x.device, x.is_cuda, x.new_empty(2).get_device()) == (torch.device("cuda", 90), True, 90)
        assert torch.cuda.get_device_capability(x.device) == (9, 0)
        assert torch.zeros(2).device.type == "cpu"
        copy_kernel[lambda meta: (meta["BLOCK"] // 8,)](x, x, 1.5, 15, BLOCK=16, num_warps=2)
    (launch,) = launches
    assert (launch.name, launch.grid, launch.options["num_warps"]) == ("copy_kernel", (2,), 2)
    assert launch.signature == {
        "x_ptr": "*fp16",
        "out_ptr": "*fp16",
        "scale": "fp32",
        "size": "i32",
        "BLOCK": "constexpr",
    }
    assert before == (torch.cuda.current_device, torch.cuda.get_device_properties, triton.JITFunction.run)
    with pytest.raises(ValueError, match="75"), static.recorded(75):
        pass


def test_the_table_shows_a_case(capsys):
    assert tuple(static.DEVICES) == static_table.KNOWN_ARCHES
    index = next(i for i, case in enumerate(cases()) if case.op == "layer_norm" and case.usual)
    rows = static_table.rows_of(index, 80, liger=False)
    assert {row.kernel for row in rows} == KERNELS["layer_norm"]
    forward = next(row for row in rows if row.kernel == "forward_kernel")
    assert forward.per_element is not None and 5 < forward.per_element < 24
    cells = static_table.text(forward).split()
    assert cells[:5] == ["forward_kernel", "layer_norm", "C=768", "bfloat16", "80"]
    with pytest.raises(SystemExit):
        static_table.main(["--arch", "75"])
    assert "--arch must be one of 80" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        static_table.main(["--op", "nothing"])
    assert "one of attention, layer_norm, mlp, cross_entropy, linear, got nothing" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no kernels"):
        list(static_table.table([80], False, "nothing", False, 1))
