"""`gptkernels tune`: which GEMM runs a GPT's products on this GPU, the kernels here, cuBLAS or cuBLASLt, by measurement.

Opt-in: nothing is timed at any other time. Winners are stored for the device's name (ops/linear/choice.py says where) and
hold until they are measured again, so one program does the same on every run. What cuBLASLt refuses, or makes other
numbers of than cuBLAS and a pass, is said and not taken.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gptkernels.ops.linear.choice import GEMMS, by_rule, measurements_file, store_winner

Outputs = tuple[Tensor, ...]
Timer = Callable[[Callable[[], Outputs]], float]
# A winner must be this much faster than what the rule takes: less is noise, which would store another one each time.
MARGIN = 0.03
ROUNDS = 5
# How far two right results are apart at most, by a row's norm: each rounds to 16 bits, bfloat16 by 2^-9 of a number and less.
AGREEMENT = 2.0**-7


def products(width: int, rows: int) -> Iterator[tuple[str, int, int, int]]:
    """(kind, M, N, K) of the products of a transformer block that choose() is asked about."""
    hidden = 4 * width
    for N, K in ((3 * width, width), (width, width), (width, hidden), (hidden, width)):
        yield "plain", rows, N, K  # y = x W^T, and dx
    # dW. That of the projection to q, k and v has the key of (hidden, width).
    for M, N in ((width, width), (hidden, width), (width, hidden)):
        yield "plain", M, N, rows
    yield "gelu", rows, hidden, width
    yield "gelu_backward", rows, hidden, width


def candidate(
    product: str, M: int, N: int, K: int, dtype: torch.dtype, device: str, gemm: str
) -> Callable[[], Outputs]:
    """A call that runs the product once, its epilogue included, and returns what it has made."""
    from gptkernels.ops.linear.triton import multiply
    from gptkernels.ops.mlp.triton import gelu_backward, gelu_forward

    generator = torch.Generator(device).manual_seed(0)  # every candidate's numbers are the same

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    a, out = make(M, K), make(M, N)

    def plain() -> Outputs:
        multiply(a, b, out, b_along_k=True, gemm=gemm)
        return (out,)

    def forward() -> Outputs:
        gelu_forward(a, b, bias, out, g, True, gemm)
        return out, g

    def backward() -> Outputs:
        dh, g, sums = gelu_backward(a, out, b, True, True, gemm, dtype)
        return (dh, g) if sums is None else (dh, g, sums)

    if product == "gelu_backward":
        b = make(K, N)
        return backward
    b, bias, g = make(N, K) * K**-0.5, make(N), make(M, N)  # sums of about 1, where GELU is curved
    return plain if product == "plain" else forward


def candidates(product: tuple[str, int, int, int], dtype: torch.dtype, device: str) -> dict[str, Callable[[], Outputs]]:
    """The GEMMs that can run the product, cuBLASLt with GELU's epilogue alone."""
    from gptkernels.ops.mlp import cublaslt

    fused = product[0] != "plain" and dtype in cublaslt.TYPES and cublaslt.library() is not None
    return {gemm: candidate(*product, dtype, device, gemm) for gemm in GEMMS if fused or gemm != "cublaslt"}


def objection(calls: dict[str, Callable[[], Outputs]]) -> str | None:
    """Why cuBLASLt must not be taken: what it says, or the numbers that it makes beside cuBLAS's and a pass's."""
    try:
        found = calls["cublaslt"]()
    except RuntimeError as error:
        return str(error)
    apart = [distance(x, y) for x, y in zip(found, calls["cublas"](), strict=True)]
    if all(each < AGREEMENT for each in apart):  # not so of NaN
        return None
    return f"its results are {', '.join(f'{each:.2g}' for each in apart)} of a row's norm away from cuBLAS's"


def distance(x: Tensor, y: Tensor) -> float:
    """The most between two rows, by the norm of y's; of partial sums, of which each GEMM has others, after they are added."""
    x, y = x.float(), y.float()
    if x.shape != y.shape:
        x, y = x.sum(0), y.sum(0)
    return ((x - y).norm(dim=-1) / y.norm(dim=-1)).max().item()


def winner(times: dict[str, list[float]], rule: str) -> str:
    """The faster one by median, if it is so by MARGIN; else the rule's."""
    medians = {gemm: statistics.median(each) for gemm, each in times.items()}
    best = min(medians, key=medians.__getitem__)
    return best if medians[best] < (1.0 - MARGIN) * medians[rule] else rule


def measure(calls: dict[str, Callable[[], Outputs]], timer: Timer) -> dict[str, list[float]]:
    """Seconds of each, taken in turns, so that a drift of the clock meets all."""
    times: dict[str, list[float]] = {gemm: [] for gemm in calls}
    for _ in range(ROUNDS):
        for gemm, call in calls.items():
            times[gemm].append(timer(call))
    return times


def gpu_timer(call: Callable[[], object]) -> float:
    """Seconds of a call on the GPU, the L2 cache flushed before each."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=50, return_mode="median")) / 1e3


def tune(width: int, rows: int, dtype: torch.dtype, device: str, name: str, timer: Timer) -> Iterator[str]:
    """Measure and store each product's winner; a line about each."""
    for product in products(width, rows):
        kind, M, N, K = product
        calls = candidates(product, dtype, device)
        if "cublaslt" in calls and (reason := objection(calls)):
            yield f"{kind:14} {M:6} x {N:6} x {K:6}  without cublaslt: {reason}"
            del calls["cublaslt"]
        times = measure(calls, timer)
        rule = by_rule(*product, dtype, torch.device(device))
        chosen = winner(times, rule)
        store_winner(*product, dtype, name, chosen)
        figures = "  ".join(f"{gemm} {statistics.median(times[gemm]) * 1e6:8.1f} us" for gemm in calls)
        yield f"{kind:14} {M:6} x {N:6} x {K:6}  {figures}  -> {chosen}" + (
            "" if chosen == rule else "  (not the rule's)"
        )


def main(argv: Sequence[str]) -> int:
    """The command line; RuntimeError where there is no GPU."""
    parser = argparse.ArgumentParser(prog="gptkernels tune", description=__doc__)
    parser.add_argument("--width", type=int, default=768, help="the model's width (default 768)")
    parser.add_argument("--rows", type=int, default=8192, help="tokens of a batch (default 8192)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options = parser.parse_args(argv)
    if min(options.width, options.rows) < 1:
        parser.error(f"--width and --rows must be at least 1, got {options.width} and {options.rows}")
    if not torch.cuda.is_available():
        raise RuntimeError(
            "tune measures on an NVIDIA GPU, and torch sees none: run it where `gptkernels doctor` shows one; "
            "until then the rule in gptkernels/ops/linear/choice.py decides"
        )
    name = torch.cuda.get_device_name()
    print(f"{name}, {options.dtype}")
    for line in tune(options.width, options.rows, getattr(torch, options.dtype), "cuda", name, gpu_timer):
        print(line, flush=True)
    print(f"stored in {measurements_file()}")
    return 0
