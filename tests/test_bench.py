"""`gptkernels bench`: fair rounds, a gate that refuses a wrong column, and figures that arrive whole."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import best_eager, harness
from benchmarks.case import excuse
from benchmarks.cli import main
from benchmarks.compiler import reason
from benchmarks.device import WARM, Clock
from benchmarks.machine import MatmulRoof
from benchmarks.memory import measured_in_subprocess
from benchmarks.op import OpColumn, random_leaves
from benchmarks.ops import OPS
from benchmarks.options import Options
from benchmarks.scaling import SWEEPS
from benchmarks.train_step import SIZES, TrainBench, train_config, work_of
from model.config import preset_names

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {"ms", "ms_p20", "ms_p80", "runs", "gflops", "gbps", "matmul_roof_percent", "roofline_percent"}


class Fake:
    """A column that says how long it took and remembers when it ran."""

    def __init__(self, name: str, seconds: float = 1.0, log: list[str] | None = None) -> None:
        self.name, self.seconds, self.log = name, seconds, [] if log is None else log

    def run(self) -> dict[str, float]:
        self.log.append(self.name)
        return {"both": self.seconds}


def test_order_rotates_so_that_everybody_follows_everybody():
    columns = [Fake(name) for name in "abcd"]
    orders = [[c.name for c in harness.in_turn(columns, r)] for r in range(8)]
    assert all(sorted(order) == list("abcd") for order in orders)
    assert {order[0] for order in orders} == set("abcd")
    places = Counter((order.index(name), name) for order in orders for name in "abcd")
    assert set(places.values()) == {2}
    assert orders[1] == orders[0][::-1]


def test_rounds_interleave_and_roofs_come_first():
    log: list[str] = []
    columns, roof = [Fake(name, log=log) for name in "ab"], Fake("roof", log=log)
    times = harness.timed_rounds(columns, [roof], 3, share=100.0, warm={})
    assert log == ["roof", "a", "b"] + ["roof", "a", "b"] + ["roof", "b", "a"] + ["roof", "b", "a"]
    assert times["a"]["both"] == [1.0] * 3


def test_a_slow_column_gets_the_rounds_that_fit_and_at_least_one():
    fast, slow, slowest = Fake("fast", 1.0), Fake("slow", 5.0), Fake("slowest", 99.0)
    times = harness.timed_rounds([fast, slow, slowest], [], 10, share=20.0, warm={"slowest": 99.0})
    assert [len(times[name]["both"]) for name in ("fast", "slow", "slowest")] == [10, 4, 1]
    assert slowest.log == ["slowest"], "its earlier run was its warm-up"


def test_planned_rounds_are_spread_evenly():
    taken = [r for r in range(20) if harness.takes_part(r, 4, 20)]
    assert taken == [0, 5, 10, 15]


def test_quantiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [harness.quantile(values, q) for q in (0.0, 0.2, 0.5, 0.8, 1.0)] == pytest.approx([1.0, 1.8, 3.0, 4.2, 5.0])
    assert harness.time_figures([0.002]) == pytest.approx({"ms": 2.0, "ms_p20": 2.0, "ms_p80": 2.0, "runs": 1})


def test_speedup_is_their_time_over_ours():
    columns = {"ours": {"both": {"ms": 2.0}}, "eager": {"both": {"ms": 3.0}}, "wrong": {"passed": False}}
    assert harness.speedups(columns, ["both"]) == {"eager": {"both": 1.5}}
    assert harness.speedups({"eager": {"both": {"ms": 3.0}}, "ours": {}}, ["both"]) == {}


def test_matmul_roof_computes_the_product_it_times():
    for layout in ("A B^T", "A B", "A^T B"):
        roof = MatmulRoof(torch.float32, 64, layout)
        roof.run()
        torch.testing.assert_close(roof.out, roof.a @ roof.b)
        assert roof.cost.flops == 2 * 64**3


def run_bench(capsys, *argv: str) -> tuple[int, str, dict]:
    """Exit status, the text, and the last line as JSON."""
    status = main((*argv, "--device", "cpu"))
    text = capsys.readouterr().out
    return status, text, json.loads(text.splitlines()[-1])


def assert_every_figure(case: dict, columns: set[str]) -> None:
    """Each column was gated and has every figure of every row."""
    assert set(case["columns"]) == columns
    assert case["roof"]["copy_gbps"] > 0
    for name, note in case["columns"].items():
        assert note["passed"], note
        assert "bound" in note or note["gate"]["quantities"] > 0
        for row in case["rows"]:
            assert set(note[row]) == FIGURES
            assert all(value > 0 for value in note[row].values())
            assert name == "ours" or case["speedup"][name][row] > 0


def test_ops_quick_ends_with_every_figure(capsys, tmp_path):
    out = tmp_path / "results" / "ops.json"
    status, text, result = run_bench(capsys, "ops", "--quick", "--no-compile", "--rounds", "2", "--out", str(out))
    assert status == 0, text
    assert result["passed"]
    assert [case["op"] for case in result["cases"]] == list(OPS)
    for case in result["cases"]:
        extra = {"bare gemms"} if case["op"] == "mlp" else set()
        assert_every_figure(case, {"reference", "eager", "ours"} | extra)
        assert case["case"] in text
    assert {"cpu", "cores", "threads", "cpu_capability", "torch", "commit", "date"} <= set(result["machine"])
    assert json.loads(out.read_text()) == result
    assert sorted(path.name for path in out.parent.iterdir()) == ["ops.csv", "ops.json"], "no half-written file is left"
    assert_long_table(out.with_suffix(".csv"), result)


def assert_long_table(path: Path, result: dict) -> None:
    """Every time of the JSON is a line of the CSV, with what it depends on."""
    lines = list(csv.DictReader(path.read_text().splitlines()))
    times = {
        (line["shape"], line["column"], line["row"]): float(line["value"]) for line in lines if line["metric"] == "ms"
    }
    for case in result["cases"]:
        shape = " ".join(f"{key}={value}" for key, value in case["shape"].items())
        for name, note in case["columns"].items():
            assert all(times[shape, name, row] == note[row]["ms"] for row in case["rows"])
    for line in lines:
        assert line["commit"] == result["machine"]["commit"] and line["date"] == result["machine"]["date"]
        assert line["torch"] == torch.__version__ and line["dtype"] == "fp32" and line["device"] == "cpu"


def test_scaling_goes_up_an_axis(capsys, tmp_path):
    out = tmp_path / "scaling.json"
    status, text, result = run_bench(capsys, "scaling", "T", "--quick", "--rounds", "2", "--out", str(out))
    assert status == 0, text
    assert [(case["axis"], case["at"], case["shape"]["T"]) for case in result["cases"]] == [
        ("T", 128, 128),
        ("T", 256, 256),
    ]
    for case in result["cases"]:
        assert_every_figure(case, {"eager", "ours"})
        assert f"T={case['at']}" in text
    assert_long_table(out.with_suffix(".csv"), result)
    assert {line["at"] for line in csv.DictReader(out.with_suffix(".csv").read_text().splitlines())} == {"128", "256"}


def test_sweeps_reach_what_they_promise():
    for sweeps in SWEEPS.values():
        (attention,) = sweeps["T"]
        assert [T for T, _ in attention.shapes()] == [128, 256, 512, 1024, 2048, 4096, 8192]
        for axis in sweeps.values():
            for sweep in axis:
                assert all(set(shape) == set(OPS[sweep.op].small) for _, shape in sweep.shapes())


def test_bf16_adds_our_fp32(capsys):
    status, text, result = run_bench(
        capsys, "ops", "linear", "--quick", "--no-compile", "--dtype", "bf16", "--rounds", "1"
    )
    assert status == 0, text
    assert_every_figure(result["cases"][0], {"reference", "eager", "ours", "ours fp32"})
    assert set(result["cases"][0]["roof"]["matmul"]) == {"bfloat16", "float32"}


# torch's own compiler uses what torch has deprecated.
@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:.*torch.jit.*:DeprecationWarning"
)
def test_train_quick_ends_with_every_figure(capsys):
    status, text, result = run_bench(capsys, "train", "--preset", "tiny", "--quick", "--rounds", "2")
    assert status == 0, text
    (case,) = result["cases"]
    assert case["rows"] == ["forward", "backward", "step"]
    assert_every_figure(case, {"reference", "eager", "compile", "ours", "ours compiled"})
    assert case["ours"] == ["ours", "ours compiled"]


def test_a_wrong_column_is_not_timed_and_fails_the_run(capsys, monkeypatch):
    def wrong(*inputs, backend):
        y, total = OPS["layer_norm"].eager(*inputs)
        return y * 1.001, total

    monkeypatch.setitem(OPS, "layer_norm", replace(OPS["layer_norm"], ours=wrong))
    status, text, result = run_bench(capsys, "ops", "layer_norm", "--quick", "--no-compile", "--rounds", "1")
    assert status == 1
    assert not result["passed"]
    ours = result["cases"][0]["columns"]["ours"]
    assert "forward" not in ours
    assert ours["gate"]["failed"][0]["quantity"] == "output 0"
    assert "ours: WRONG, not timed" in text
    assert "forward" in result["cases"][0]["columns"]["eager"], "the others are still measured"


def test_an_error_says_what_is_wrong():
    assert reason(RuntimeError("\n  out of registers\nsome more\n")) == "out of registers"
    triton = "at 1:0:\ndef kernel(x):\n^\nValueError('arange needs powers of 2')"
    assert reason(RuntimeError(triton)) == "at 1:0: ValueError('arange needs powers of 2')"
    assert reason(RuntimeError("at 1:0:")) == "at 1:0:"
    assert reason(KeyError()) == "KeyError"


def test_an_error_of_ours_on_a_gpu_is_kept_whole():
    try:
        raise RuntimeError("at 1:0:\ndef kernel(x):\n^\nno such tile")
    except RuntimeError as error:
        ours, other = (excuse(name, error, Options(device="cuda")) for name in ("cuda", "liger"))
    assert ours["error"] == "RuntimeError: at 1:0: no such tile" and not ours["passed"]
    assert "Traceback" in ours["traceback"] and "def kernel(x):" in ours["traceback"]
    assert other == {"passed": True, "unavailable": ours["error"]}


def test_a_case_with_nothing_timed_fails(capsys, monkeypatch):
    def results(self):
        if self.name == "written out":  # once, in float64
            return method(self)
        raise torch.OutOfMemoryError("planted")

    method = OpColumn.results
    monkeypatch.setattr(OpColumn, "results", results)
    status, text, result = run_bench(capsys, "ops", "mlp", "--quick", "--no-compile", "--rounds", "1")
    assert status == 1 and not result["passed"]
    assert "forward" in result["cases"][0]["columns"]["bare gemms"], "a bound is no column that could pass"
    assert "reference: not measured, planted" in text and "FAILED: no column has been timed" in text


def test_a_step_leaves_the_weights_that_were_gated():
    bench = TrainBench(train_config("tiny"), "fp32", "auto")
    before = [p.clone() for p in bench.weights.parameters()]
    columns = [bench.column(name) for name in ("reference", "eager", "ours")]
    for column in columns:
        assert set(column.run()) == {"forward", "backward", "optimizer", "step"}
    for p, was in zip(bench.weights.parameters(), before, strict=True):
        assert torch.equal(p, was)
        assert p.grad is None
        assert bench.optimizer.state[p]["exp_avg"].any(), "the optimizer did its work"


@pytest.mark.parametrize("pos", ["learned", "sinusoidal", "none"])
def test_best_eager_is_the_same_function(pos):
    config = train_config("tiny")
    bench = TrainBench(replace(config, model=replace(config.model, pos=pos, act="gelu")), "fp32", "auto")
    eager, reference = (bench.column(name).results() for name in ("eager", "reference"))
    for name, value in reference.items():
        torch.testing.assert_close(eager[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_the_sizes_are_the_issues():
    m = SIZES["gpt2-width"].model
    assert (m.n_layer, m.n_head, m.n_embd, m.context, m.vocab_size) == (4, 12, 768, 256, 50257)
    with pytest.raises(ValueError, match="no preset"):
        train_config("gpt-5")


@pytest.mark.parametrize(
    ("name", "settings", "batch"),
    [
        *((preset, "", 16) for preset in preset_names() if preset.startswith("gpt2-")),
        ("few.toml", "batch_tokens = 256", 4),
        ("micro.toml", "batch_tokens = 4096\nmicro_batch = '32'", 32),
        ("whole.toml", "batch = 64", 64),
    ],
)
def test_of_a_step_of_many_micro_batches_one_is_measured(tmp_path, name, settings, batch):
    if name.endswith(".toml"):
        (tmp_path / name).write_text(f"[model]\ncontext = 64\n[train]\n{settings}\n")
        name = str(tmp_path / name)
    assert train_config(name).train.batch == train_config(name).sequences == batch


def test_the_best_eager_of_an_operator_is_that_of_a_training_step(monkeypatch):
    for name in ("linear", "causal_attention", "gelu_mlp", "linear_cross_entropy"):
        assert getattr(best_eager, name) in [op.eager for op in OPS.values()]
    monkeypatch.setattr(best_eager, "layer_norm", lambda x, weight, bias, residual: (x, weight, bias, residual))
    assert OPS["layer_norm"].eager("x", "residual", "weight", "bias") == ("x", "weight", "bias", "residual")


def test_a_warm_up_gives_back_its_gradients():
    held = []

    def double(x: torch.Tensor) -> torch.Tensor:
        held.append(column.gradients)
        return 2 * x

    leaves = random_leaves(torch.float32, "cpu", (4,))
    column = OpColumn("double", double, leaves, (torch.ones(4),), Clock(WARM))
    assert set(column.run()) == {"forward", "backward", "both"}
    assert held == [None, None], "one untimed run and one timed"


def test_peak_sees_a_known_allocation():
    size = 64 << 20
    code = (
        "import json, torch\n"
        "from benchmarks.memory import peak_figures\n"
        "class Column:\n"
        "    name = 'fake'\n"
        f"    def run(self): torch.ones({size // 4}); return {{}}\n"
        # The protocol's warm-up: threads and code that the first large tensor loads do not count.
        "torch.ones(1 << 20)\n"
        "print(json.dumps(peak_figures(Column(), 1000)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    figures = json.loads(done.stdout)
    assert figures["peak_mb"] == pytest.approx(size / 1e6, abs=4)
    assert figures["peak_beyond_gradients_mb"] == pytest.approx(figures["peak_mb"] - 0.001)


def test_peak_of_a_column_in_a_process_of_its_own():
    N, C, V = 512, 64, 16384
    work = {"kind": "ops", "op": "cross_entropy", "shape": {"N": N, "C": C, "V": V}, "column": "eager"}
    figures = measured_in_subprocess({**work, "dtype": "fp32", "backend": "auto", "threads": 1})
    logits = N * V * 4 / 1e6
    # Up to four tensors of the logits' size live at once: they, their log-softmax, and the gradients of both.
    assert 2 * logits < figures["peak_beyond_gradients_mb"] < 4.5 * logits


def test_peak_of_a_preset_of_ones_own(tmp_path, monkeypatch):
    """Its path is as somebody writes it, and the process that measures runs somewhere else."""
    monkeypatch.chdir(tmp_path)
    sizes = {"context": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 11}
    lines = [f"{name} = {value}" for name, value in sizes.items()]
    Path("few.toml").write_text("\n".join(["[model]", *lines, "[train]", "batch = 2"]))
    columns = {"column": "eager", "dtype": "fp32", "backend": "auto", "threads": 1}
    figures = measured_in_subprocess(work_of("few.toml") | columns)
    parameters = sum(p.numel() for p in TrainBench(train_config("few.toml"), "fp32", "auto").weights.parameters())
    assert figures.get("gradients_mb") == 4e-6 * parameters, figures


def test_pytest_benchmark_suite_saves_and_compares(tmp_path):
    def suite(*options: str) -> str:
        command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "-k", "small", *options]
        quick = ["--benchmark-max-time=0.01", "--benchmark-min-rounds=2", f"--benchmark-storage={tmp_path}"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([*command, *quick], capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "16 passed" in suite("--benchmark-save=first")
    (file,) = tmp_path.rglob("*_first.json")
    saved = json.loads(file.read_text())["benchmarks"]
    assert {bench["group"].split()[0] for bench in saved} == set(OPS)
    for bench in saved:
        known = bench["extra_info"]
        assert known["flops"] > 0 and known["bytes"] > 0
        kept = known["kept_bytes"]
        # A bound has no backward, and a linear layer needs no more than its inputs.
        assert (
            kept is None if known["column"] == "bare gemms" else (kept > 0) == (not bench["group"].startswith("linear"))
        )
    assert "0001_first" in suite("--benchmark-compare", "-k", "small and layer_norm")


@pytest.mark.parametrize(
    "argv",
    [
        ("ops", "softmax"),
        ("scaling", "depth"),
        ("train", "--rounds", "-1"),
        ("train", "--rounds", "0"),
        ("ops", "--threads", "0"),
        ("ops", "--budget", "0"),
        ("ops", "--out", "x.csv"),
        ("ops", "--out", "results"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    def measured(*_):
        yield pytest.fail("measured")

    monkeypatch.setattr("benchmarks.cli.bench_ops", measured)
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    for out in ("file/x.json", "file/y/x.json", "folder.json"):
        why = "it is a folder" if out == "folder.json" else "its folder is a file"
        with pytest.raises(RuntimeError, match=f"cannot write .*{out}: {why}"):
            main(["ops", "--quick", "--out", str(tmp_path / out)])
