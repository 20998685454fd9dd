"""`gptkernels bench --device cuda` where there is no GPU: its own code runs whole, on a stand-in that computes on the CPU.

The stand-in keeps what the benchmark may rely on: events know when they were recorded, a capture does the work once, and
whatever asks for the device cuda gets the CPU. So the names of columns, the gate, the graphs' figures, memory and tables
are what they are on a GPU; the times are not.
"""

from __future__ import annotations

import contextlib
import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks import device, graph, machine, train_step
from benchmarks.cli import main
from benchmarks.memory import gpu_peak
from benchmarks.ops import OPS, bench_case
from benchmarks.options import Options
from gptkernels.backend import available_backends


class Generator(torch.Generator):
    """A generator that counts on the CPU wherever it shall."""

    def __new__(cls, device: str = "cpu"):
        return super().__new__(cls, device="cpu")


class OnTheCpu(TorchFunctionMode):
    """Every function of torch that is asked for the device cuda gets the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*("cpu" if isinstance(a, str) and a == "cuda" else a for a in args), **kwargs)


class Event:
    """A CUDA event on a GPU that is as fast as the host."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing, "an event without it has no time"

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


class Graph:
    """A graph that may be captured once and replayed after that."""

    captured = False

    def replay(self) -> None:
        assert self.captured, "replayed before its capture"


@contextlib.contextmanager
def capture(graph: Graph, pool: str, stream: object, capture_error_mode: str):
    """Does the work once, as the GPU's memory has it after a replay."""
    assert pool == "pool" and stream is not None and capture_error_mode == "relaxed"
    yield
    graph.captured = True


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda as the benchmark uses it."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    properties = {"name": "Stand-in", "multi_processor_count": 1, "major": 9, "minor": 0, "total_memory": 1 << 30}
    fakes = {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": lambda: "pool",
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "memory_allocated": lambda: 1_000_000,
        "max_memory_allocated": lambda: 4_000_000,
        "reset_peak_memory_stats": lambda: None,
        "get_device_properties": lambda: SimpleNamespace(**properties, L2_cache_size=1 << 20),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    # What a capturable optimizer asks before a step: on a CUDA build of torch it starts a driver.
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None, raising=False)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(device, "FLUSH_BYTES", 1024)
    monkeypatch.setattr(machine, "GPU_QUICK_MATMUL", 64)
    monkeypatch.setattr(machine, "GPU_COPY_BYTES", 1 << 20)
    monkeypatch.setattr(train_step, "BATCHES", 1)  # the interpreter is slow
    monkeypatch.setattr(train_step, "FEW_TOKENS", 64)
    device.clock_of.cache_clear()
    machine.gpu_roofs.cache_clear()
    with OnTheCpu():
        yield
    device.clock_of.cache_clear()
    machine.gpu_roofs.cache_clear()


def bench(capsys, *argv: str) -> tuple[int, str, dict]:
    """Exit status, the text, and the last line as JSON."""
    status = main((*argv, "--device", "cuda", "--quick", "--no-compile", "--rounds", "1"))
    text = capsys.readouterr().out
    return status, text, json.loads(text.splitlines()[-1])


def assert_gpu_case(case: dict, measured: set[str]) -> None:
    """The columns that can run have every figure, also as graphs; the CUDA kernels say why they have none."""
    assert case["device"] == "cuda"
    assert case["ours"] == ["triton"]
    assert case["columns"]["cuda"]["unavailable"] == available_backends()["cuda"] is not None
    assert set(case["columns"]) == measured | {"cuda"}
    for name in measured:
        note = case["columns"][name]
        assert note["passed"], note
        assert note["host"]["ms"] > 0
        for row in case["rows"]:
            assert note[row]["ms"] > 0 and note["graph"][row]["ms"] > 0, (name, row)


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_ops(gpu, capsys, cache):
    status, text, result = bench(capsys, "ops", "layer_norm", "linear", "--dtype", "fp16", "--cache", cache)
    assert status == 0, text
    assert result["device"] == "cuda" and result["machine"]["gpu"] == "Stand-in"
    for case in result["cases"]:
        assert_gpu_case(case, {"reference", "eager", "triton"})
        assert case["cache"] == cache and f"fp16, {cache} cache" in text
        assert "triton against, graph" in text and "cuda: not measured" in text


@pytest.mark.parametrize(
    ("name", "stage", "error", "passes"),
    [
        *(("triton", stage, RuntimeError, False) for stage in ("capture", "replay", "judge", "timing")),
        ("triton", "timing", KeyError, False),
        ("triton", "capture", torch.OutOfMemoryError, True),
        ("eager", "replay", RuntimeError, True),
    ],
)
def test_a_graph_that_raises(gpu, capsys, monkeypatch, name, stage, error, passes):
    """Ours may be without a graph for want of memory alone, and the others for any reason."""

    class Unreadable:
        def __getitem__(self, i):
            raise error("planted")

    def planted(method):
        def call(self, *args):
            if name not in (getattr(self, "name", None), *(column.name for column in args[:1])):
                return method(self, *args)
            if stage == "judge":
                return Unreadable()
            raise error("planted")

        return call

    method = {"capture": "__init__", "replay": "results", "judge": "results", "timing": "run"}[stage]
    monkeypatch.setattr(graph.Replay, method, planted(getattr(graph.Replay, method)))
    status, text, result = bench(capsys, "ops", "layer_norm", "--dtype", "fp16")
    (case,) = result["cases"]
    note = case["columns"][name]
    said = f"{error.__name__}: " + ("'planted'" if error is KeyError else "planted")
    assert status == int(not passes) and result["passed"] is passes and note["passed"] is passes
    assert note["graph"]["unavailable" if passes else "error"] == said
    assert f"{name}: {'no CUDA graph' if passes else 'FAILED as a CUDA graph'}, {said}" in text
    assert passes or "Traceback" in note["graph"]["traceback"]
    assert case["columns"]["reference"]["graph"]["both"]["ms"] > 0, "the others are still measured"


def test_graphs_are_timed_in_rounds_with_the_roofs(gpu, capsys, monkeypatch):
    log = []

    def logged(of, name):
        method = of.run

        def run(self):
            log.append(name)
            return method(self)

        monkeypatch.setattr(of, "run", run)

    logged(machine.CopyRoof, "copy")
    logged(graph.Replay, "replay")
    bench(capsys, "ops", "layer_norm", "--dtype", "fp16")
    assert log[-4:] == ["copy", "replay"] * 2, "a warm-up and a round"


def test_peak_of_an_allocator(monkeypatch):
    class Column:
        name = "fake"

        def run(self):
            held.update(now=2_000_000, peak=max(4_000_000, held["peak"]))

    held = {"now": 1_000_000, "peak": 9_000_000}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(peak=held["now"]))
    expected = {"peak_mb": 3.0, "gradients_mb": 0.5, "peak_beyond_gradients_mb": 2.5}
    assert gpu_peak(Column(), 500_000) == expected
    assert gpu_peak(Column(), 500_000)["peak_mb"] == 2.0, "above what was there before, whatever was reached before"


def test_every_column_but_a_bound_has_its_peak(gpu):
    options = Options(device="cuda", backend="cuda", cache="warm", rounds=1, quick=True)
    columns = bench_case(OPS["mlp"], OPS["mlp"].small, options, ["eager", "cuda", "bare gemms"])["columns"]
    gradients = 4 * sum(x.numel() for x in OPS["mlp"].inputs(OPS["mlp"].small, torch.float32, "cpu")) / 1e6
    expected = {"peak_mb": 3.0, "gradients_mb": gradients, "peak_beyond_gradients_mb": 3.0 - gradients}
    assert columns["eager"]["memory"] == pytest.approx(expected)
    assert "memory" not in columns["bare gemms"] and columns["bare gemms"]["both"]["ms"] > 0


def test_a_reference_without_memory_leaves_the_others_their_gate(gpu, capsys, monkeypatch):
    def results(self):
        if self.name == "reference":
            raise torch.OutOfMemoryError("planted")
        return method(self)

    method = train_step.TrainColumn.results
    monkeypatch.setattr(train_step.TrainColumn, "results", results)
    status, _text, result = bench(capsys, "train", "--preset", "tiny", "--backend", "triton", "--dtype", "fp32")
    columns = result["cases"][0]["columns"]
    assert status == 0 and columns["reference"] == {"passed": True, "unavailable": "planted"}
    for name in ("eager", "triton"):
        assert columns[name]["gate"]["quantities"] > 2 and columns[name]["step"]["ms"] > 0


def test_train(gpu, capsys):
    status, text, result = bench(
        capsys, "train", "--preset", "tiny", "--backend", "triton", "--dtype", "fp32", "--breakdown"
    )
    assert status == 0, text
    (case,) = result["cases"]
    assert set(case["columns"]) == {"reference", "eager", "triton"}
    for note in case["columns"].values():
        assert note["passed"] and note["graph"]["step"]["ms"] > 0
    assert case["logits_compared"] == 64 and "logits are compared of 64 of 128 tokens" in text
    assert set(case["breakdown"]) == {"eager", "triton"}
