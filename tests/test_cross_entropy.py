"""linear_cross_entropy: loss, gradients, ignored and padded words, several chunks, memory, layouts and errors."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    BACKENDS,
    CUDA,
    LAYOUT_DTYPES,
    LAYOUTS,
    SIMT,
    check_against_oracle,
    check_equal,
    check_layouts,
    check_no_grad,
    check_no_second_gradient,
    check_only_wanted_gradients,
    check_repeats,
    draw,
    generator,
    over,
    results,
)

from gptkernels import linear_cross_entropy
from gptkernels.ops.cross_entropy import chunks, reference

# The products of a CUDA backend are torch's: on the CPU they round differently on more threads or at another alignment.
_, _, cases_of_own_products = over({**BACKENDS, **CUDA})
BACKENDS = {**BACKENDS, **SIMT}
backends, dtypes, cases = over({**BACKENDS, **CUDA})
SMALL = [(1, 1, 1), (1, 7, 5), (2, 3, 33), (17, 20, 9), (40, 33, 97)]
LARGE = [(65, 64, 1000), (300, 40, 65), (5, 385, 1023)]
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


def cross_entropy_inputs(N, C, V, dtype, seed=0, *, words=None, ignored=0.2, ignore_index=-100, weight_dtype=None):
    """Logits with a deviation of about 1; a share of the targets is ignored, but never the first."""
    words = V if words is None else words
    targets = torch.randint(words, (N,), generator=generator(seed + 2))
    drop = torch.rand(N, generator=generator(seed + 3)) < ignored
    drop[:1] = False
    return {
        "x": draw((N, C), dtype, seed, C**-0.5),
        "weight": draw((V, C), weight_dtype or dtype, seed + 1),
        "targets": targets.masked_fill(drop, ignore_index),
    }


@reductions
@cases("N, C, V", SMALL, LARGE)
def test_matches_the_oracle(backend, dtype, N, C, V, reduction):
    call = partial(linear_cross_entropy, reduction=reduction)
    check_against_oracle(call, partial(cross_entropy_inputs, N, C, V, dtype), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_long_chunks(dtype):
    """Chunks of 660 rows: the weight's gradient of each is summed in two pieces and added to that of those before."""
    check_against_oracle(linear_cross_entropy, partial(cross_entropy_inputs, 700, 8, 20000, dtype), "cpu")


@dtypes
def test_float32_weights(backend, dtype):
    inputs = partial(cross_entropy_inputs, 17, 20, 43, dtype, weight_dtype=torch.float32)
    check_against_oracle(linear_cross_entropy, inputs, backend)
    found, _ = results(partial(linear_cross_entropy, backend=backend), inputs(0))
    assert found["output 0"].dtype == found["gradient of weight"].dtype == torch.float32


@reductions
@cases("N, words", [(1, 1), (9, 40), (9, 41), (9, 63)])
def test_padded_vocabulary(backend, dtype, N, words, reduction):
    """Rows of weight beyond vocab_size take no part and get a gradient of zero, even if they hold NaN."""
    call = partial(linear_cross_entropy, vocab_size=words, reduction=reduction)
    inputs = partial(cross_entropy_inputs, N, 12, 64, dtype, words=words)
    check_against_oracle(call, inputs, backend)
    given = inputs(0)
    found, douts = results(partial(call, backend=backend), given)
    assert (found["gradient of weight"][words:] == 0).all()
    with torch.no_grad():
        given["weight"][words:] = math.nan
    check_equal(results(partial(call, backend=backend), given, douts)[0], found)


@pytest.mark.parametrize("V", [1, 8, 24, 65, 96, 50257])
def test_rows_of_logits_are_what_cublas_and_triton_are_fast_with(V):
    """Whole multiples of 16, a vocabulary that is no such one padded with words of 0; the words themselves are kept."""
    weight = draw((V + 3, 4), torch.float32, 1).detach()
    found = chunks.words(weight, V, torch.bfloat16)
    assert found.shape[0] % 16 == 0 and found.shape[0] - V < 64
    assert torch.equal(found[:V], weight[:V].bfloat16()) and not found[V:].any()


@reductions
@cases("ignore_index", [-1, 0, 3, 10**9])
def test_ignore_index(backend, dtype, ignore_index, reduction):
    """Any number can stand for a row that does not count, also one that would be a word."""
    call = partial(linear_cross_entropy, ignore_index=ignore_index, reduction=reduction)
    inputs = partial(cross_entropy_inputs, 15, 12, 33, dtype, ignore_index=ignore_index, ignored=0.5)
    check_against_oracle(call, inputs, backend)
    given = inputs(0)
    found, _ = results(partial(call, backend=backend), given)
    ignored = given["targets"] == ignore_index
    assert (found["gradient of x"][ignored] == 0).all() and (found["gradient of x"][~ignored] != 0).any(dim=1).all()


@backends
def test_ignored_rows_do_not_matter(backend):
    """The loss is that of the other rows alone, whatever the ignored ones hold."""
    given = cross_entropy_inputs(20, 12, 33, torch.float32, ignored=0.4)
    used = given["targets"] != -100
    call = partial(linear_cross_entropy, backend=backend)
    found, douts = results(call, given)
    alone, _ = results(
        call, {**given, "x": given["x"].detach()[used].requires_grad_(), "targets": given["targets"][used]}, douts
    )
    torch.testing.assert_close(found["output 0"], alone["output 0"])
    torch.testing.assert_close(found["gradient of weight"], alone["gradient of weight"])
    if found["output 0"].is_cuda:  # cuBLAS takes another kernel for another number of rows
        torch.testing.assert_close(found["gradient of x"][used], alone["gradient of x"])
    else:
        assert torch.equal(found["gradient of x"][used], alone["gradient of x"])


@dtypes
@pytest.mark.parametrize("N", [0, 5])
def test_no_row_counts(backend, dtype, N):
    """The mean over nothing is NaN, as in PyTorch; the sum is 0 with gradients of 0."""
    given = cross_entropy_inputs(N, 12, 33, dtype)
    given["targets"].fill_(-100)
    mean, _ = results(partial(linear_cross_entropy, backend=backend), given)
    assert mean["output 0"].isnan()
    total, _ = results(partial(linear_cross_entropy, reduction="sum", backend=backend), given)
    assert total["output 0"] == 0
    for name in ("gradient of x", "gradient of weight"):
        assert (total[name] == 0).all() and total[name].shape == mean[name].shape


@cases("scale", [30.0, 3e3, 1e6])
def test_large_logits(backend, dtype, scale):
    """Logits far beyond exp's range: the loss is their distance to the largest."""

    def inputs(seed):
        given = cross_entropy_inputs(9, 16, 43, dtype, seed)
        factor = min(scale, torch.finfo(dtype).max / 64)  # float16's own logits must not overflow
        given["x"] = (factor * given["x"].detach()).requires_grad_()
        return given

    check_against_oracle(linear_cross_entropy, inputs, backend)


@dtypes
@pytest.mark.parametrize("sign", [-1, 1])
def test_all_logits_far_from_zero(backend, dtype, sign):
    """Every logit near +-1000: neither the sum of exponentials nor a padding lane's 0 may decide."""

    def inputs(seed):
        given = cross_entropy_inputs(6, 4, 21, dtype, seed)
        given["x"] = torch.full((6, 4), 16.0 * sign, dtype=dtype, requires_grad=True)
        given["weight"] = (16 + given["weight"].detach().float() * 0.5).to(dtype).requires_grad_()
        return given

    check_against_oracle(linear_cross_entropy, inputs, backend)


@cases("N, C, V", [], [(300, 8, 50257), (26, 4, 500_001)])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "float32 weight"])
def test_several_chunks(backend, dtype, N, C, V, mixed):
    """More logits than a chunk holds, with rows ignored in each, and a chunk's rows all ignored."""

    def inputs(seed):
        given = cross_entropy_inputs(N, C, V, dtype, seed, weight_dtype=torch.float32 if mixed else None)
        given["targets"][-N // 2 :] = -100
        given["targets"][-1] = 7
        return given

    # float32 weights beside bfloat16 x are rounded: the loss, one number, may be right by luck.
    check_against_oracle(linear_cross_entropy, inputs, backend, draws=5 if mixed else 1, few=1)


@pytest.mark.parametrize("width", [16, 50304, 128256, 262144, 804_864, 1_000_000])
def test_rows_of_a_chunk(width):
    """Whatever the batch and the vocabulary, a chunk's logits are no more than are said to be held, and rows share it."""
    for N in (0, 1, 127, 128, 2048, 2049, 4095, 4097, 16384, 10**7 + 1):
        rows = chunks.rows_of_a_chunk(N, width, chunks.CHUNK_LOGITS)
        assert min(N, 1) <= rows <= N and rows * width <= max(103_022_592, 128 * width)
        assert rows == N or rows % 128 == 0
        # No more chunks than needed.
        most = max(128, 103_022_592 // width // 128 * 128)
        assert rows == 0 or -(-N // rows) <= -(-N // most)


@pytest.mark.parametrize("backend", ["triton", "simt", *CUDA])
def test_the_logits_of_a_chunk_are_held(backend, monkeypatch):
    """400 rows in chunks of at most 256: no larger matrix of logits is made, and the results are as ever."""
    monkeypatch.setattr(chunks, "CHUNK_LOGITS", 256 * 48)
    made = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, *, out: made.append(out.shape) or mm(a, b, out=out))
    inputs = partial(cross_entropy_inputs, 400, 16, 48, torch.float32)
    results(partial(linear_cross_entropy, backend=backend), inputs(0))
    assert made == [(256, 48), (144, 48)]
    check_against_oracle(linear_cross_entropy, inputs, backend, draws=1)


@dtypes
def test_the_output_gradient_scales_both(backend, dtype):
    """Of one number, of half of it, and of a half of a sum of losses."""
    given = cross_entropy_inputs(9, 16, 43, dtype)
    call = partial(linear_cross_entropy, backend=backend)
    one, _ = results(call, given, [torch.tensor(1.0)])
    large, _ = results(call, given, [torch.tensor(2.0**12)])  # halves exactly in float16 too
    half, _ = results(call, given, [torch.tensor(2.0**11)])
    for name in ("gradient of x", "gradient of weight"):
        assert torch.equal(half[name], large[name] * 0.5)
    x, weight, targets = given.values()
    gradients = torch.autograd.grad((call(x, weight, targets) + call(x, weight, targets)) / 2, [x, weight])
    torch.testing.assert_close(gradients, (one["gradient of x"], one["gradient of weight"]))


@dtypes
@reductions
def test_a_loss_scale_saves_small_gradients(backend, dtype, reduction):
    """What scales the loss multiplies a gradient before it is rounded: here without it float16 has none but 0 or 6e-8."""

    def inputs(seed):
        given = cross_entropy_inputs(9, 16, 43, dtype, seed)
        return {**given, **{name: (2e-6 * given[name].detach()).requires_grad_() for name in ("x", "weight")}}

    def call(**arguments):
        return linear_cross_entropy(**arguments, reduction=reduction) * 2.0**12

    check_against_oracle(call, inputs, backend)


@dtypes
def test_a_retained_graph_gives_the_same_again(backend, dtype):
    """The forward's gradients are given away once; the second backward makes them anew, unharmed by what became of them."""
    x, weight, targets = cross_entropy_inputs(9, 16, 43, dtype).values()
    loss = linear_cross_entropy(x, weight, targets, backend=backend)
    first = torch.autograd.grad(loss, [x, weight], torch.tensor(3.0), retain_graph=True)
    kept = [g.clone() for g in first]
    for gradient in first:
        gradient.fill_(math.nan)
    for retain in (True, False):
        again = torch.autograd.grad(loss, [x, weight], torch.tensor(3.0), retain_graph=retain)
        assert all(map(torch.equal, again, kept))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@cases_of_own_products("layout", LAYOUTS, slow_dtypes=LAYOUT_DTYPES)
@pytest.mark.parametrize("names", [["x"], ["weight"], ["x", "weight"]], ids=str)
def test_layouts(backend, dtype, layout, names):
    inputs = cross_entropy_inputs(9, 12, 21, dtype)
    check_layouts(partial(linear_cross_entropy, backend=backend), inputs, layout, names)


@cases_of_own_products("layout", LAYOUTS, slow_dtypes=LAYOUT_DTYPES)
def test_layouts_of_nothing(backend, dtype, layout):
    call = partial(linear_cross_entropy, reduction="sum", backend=backend)
    check_layouts(call, cross_entropy_inputs(0, 12, 21, dtype), layout, ["x"])


@backends
def test_strided_targets(backend):
    inputs = cross_entropy_inputs(9, 12, 21, torch.float32)
    call = partial(linear_cross_entropy, backend=backend)
    wanted, douts = results(call, inputs)
    spread = inputs["targets"].repeat_interleave(3)[::3]
    check_equal(results(call, {**inputs, "targets": spread}, douts)[0], wanted)
    found, _ = results(call, {**inputs, "targets": torch.tensor(4).expand(9)}, douts)
    check_equal(found, results(call, {**inputs, "targets": torch.full((9,), 4)}, douts)[0])


@cases_of_own_products("N, C, V", [(9, 12, 21)], [(130, 100, 700), (700, 20, 65)])
def test_repeats(backend, dtype, N, C, V):
    # Triton's chunks are multiplied by torch.mm, whose bits on the CPU depend on the number of threads.
    threads = (1,) if backend == "triton" else (1, 2)
    call = partial(linear_cross_entropy, backend=backend)
    check_repeats(call, cross_entropy_inputs(N, C, V, dtype), repeats=2, threads=threads)


@backends
def test_gradients_only_for_what_wants_them(backend):
    inputs = cross_entropy_inputs(5, 9, 7, torch.float32)
    check_only_wanted_gradients(partial(linear_cross_entropy, backend=backend), inputs, ["x", "weight"])


@backends
def test_modes(backend):
    inputs = cross_entropy_inputs(5, 9, 7, torch.float32)
    check_no_grad(partial(linear_cross_entropy, backend=backend), inputs)
    check_no_second_gradient(partial(linear_cross_entropy, backend=backend), inputs)


PEAK = """
import resource, torch, gptkernels
x, weight = torch.randn(512, 16, requires_grad=True), torch.randn(50257, 16, requires_grad=True)
targets = torch.randint(50257, (512,))
gptkernels.linear_cross_entropy(x[:4], weight, targets[:4], backend="cpu").backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
gptkernels.linear_cross_entropy(x, weight, targets, backend="cpu").backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark of memory is read in Linux's unit")
def test_the_logits_of_the_batch_are_never_held():
    """512 rows of 50257 logits are 103 MB; one of their two chunks is 53 MB."""
    process = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(process.stdout) < 80e6


@reductions
def test_reference_is_pytorchs(reduction):
    inputs = cross_entropy_inputs(15, 12, 33, torch.float64, words=30)
    call = partial(reference.linear_cross_entropy, vocab_size=30, reduction=reduction)
    found, douts = results(call, inputs)
    wanted, _ = results(
        lambda x, weight, targets: F.cross_entropy(x @ weight[:30].T, targets, reduction=reduction), inputs, douts
    )
    torch.testing.assert_close(found, wanted)


x, w, t = torch.zeros(4, 8), torch.zeros(9, 8), torch.zeros(4).long()
shapes = r"x must be \(N, C\), weight \(V, C\) and targets \(N,\), got .*: flatten batch and tokens"
every_backend = pytest.mark.parametrize("backend", ["reference", "auto", *BACKENDS])


@pytest.mark.on_cpu
@every_backend
@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((x[None], w, t), {}, ValueError, shapes),
        ((x, w[0], t), {}, ValueError, shapes),
        ((x, w[:, :7], t), {}, ValueError, shapes),
        ((x, w, t[:3]), {}, ValueError, shapes),
        ((x, w, t[:, None]), {}, ValueError, shapes),
        ((x, w, t.int()), {}, TypeError, "targets must be int64, got torch.int32: convert them"),
        ((x, w, t.to("meta")), {}, ValueError, "targets must be on x's device cpu, got meta: move one of them"),
        ((x.int(), w, t), {}, TypeError, "x must be floating point, got torch.int32: convert it"),
        ((x, w.bfloat16(), t), {}, TypeError, "weight must be in x's dtype torch.float32, got"),
        ((x, w.to("meta"), t), {}, ValueError, "weight must be on x's device cpu, got meta"),
        ((x, w, t), {"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
        ((x, w, t), {"vocab_size": 0}, ValueError, "vocab_size must be from 1 to weight's 9 rows, got 0"),
        ((x, w, t), {"vocab_size": 10}, ValueError, "vocab_size must be from 1 to weight's 9 rows, got 10"),
        ((x, w[:0], t), {}, ValueError, "vocab_size must be from 1 to weight's 0 rows, got 0"),
    ],
)
def test_errors(backend, arguments, options, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(*arguments, **options, backend=backend)


@pytest.mark.on_cpu
@every_backend
@pytest.mark.parametrize("target, vocab_size", [(9, None), (-1, None), (-2, 9), (5, 5), (2**40, None)])
def test_targets_out_of_range(backend, target, vocab_size):
    targets = torch.tensor([0, 1, target, 2])
    # Without a look at the device's memory a kernel can only say that there is one; the cpu says which.
    named = rf"^targets must be in .* got {target} at 2"
    messages = {"reference": "out of bounds", "auto": named, "cpu": named}
    for given in (x, x.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match=messages.get(backend, "targets must be in")):
            linear_cross_entropy(given, w, targets, vocab_size=vocab_size, backend=backend)
