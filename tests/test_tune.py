"""gptkernels tune: which GEMM is stored, that it holds, and what is said where there is no GPU. The timer is a fake."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheels for this platform")
from gptkernels import tune
from gptkernels.ops.linear import choice
from gptkernels.ops.mlp import cublaslt
from model.cli import main

FAST = "Fast GPU"
GEMMS = "triton", "cublas"  # tests/test_cublaslt.py has the third


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A place of its own for winners, no memory of others, and no cuBLASLt."""
    monkeypatch.setattr(cublaslt, "library", lambda: None)
    monkeypatch.setenv("GPTKERNELS_CACHE", str(tmp_path / "cache"))
    caches = (choice.measurements, choice.choose)
    for each in caches:
        each.cache_clear()
    yield tmp_path / "cache" / "gemm.json"
    for each in caches:
        each.cache_clear()


def tuned(monkeypatch, seconds):
    """Lines of a run in which a call of a GEMM takes seconds[gemm]; nothing is run."""
    monkeypatch.setattr(tune, "candidate", lambda *arguments: lambda: seconds[arguments[-1]])
    monkeypatch.setattr(tune, "by_rule", lambda product, *_: "cublas" if product == "plain" else "triton")
    return list(tune.tune(64, 32, torch.bfloat16, "cuda", FAST, lambda call: call()))


@pytest.mark.parametrize("fastest", GEMMS)
def test_the_faster_one_is_stored_and_chosen(monkeypatch, cache, fastest):
    lines = tuned(monkeypatch, {gemm: 1e-3 if gemm == fastest else 2e-3 for gemm in GEMMS})
    assert all(f"-> {fastest}" in line for line in lines)
    stored = json.loads(cache.read_text())[FAST]
    assert len(stored) == len(lines) == 9 and set(stored.values()) == {fastest}
    assert [path.name for path in cache.parent.iterdir()] == ["gemm.json"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: FAST)
    for kind, M, N, K in tune.products(64, 32):
        assert choice.choose(kind, M, N, K, torch.bfloat16, torch.device("cuda", 0)) == fastest


def test_a_difference_within_the_noise_leaves_the_rule(monkeypatch, cache):
    """So that a second run stores the same."""
    for faster in GEMMS:
        tuned(monkeypatch, {gemm: 0.98e-3 if gemm == faster else 1e-3 for gemm in GEMMS})
        stored = json.loads(cache.read_text())[FAST]
        assert all(gemm == ("cublas" if name.startswith("plain") else "triton") for name, gemm in stored.items())


def test_the_median_of_calls_taken_in_turns_decides(monkeypatch):
    order = []

    def timer(call):
        order.append(call())
        return 1e-3 if order[-1] == "cublas" or len(order) == 1 else 2e-3  # one lucky call of the slower one

    times = tune.measure({gemm: lambda gemm=gemm: gemm for gemm in GEMMS}, timer)
    assert order == [*GEMMS] * tune.ROUNDS
    assert tune.winner(times, "triton") == "cublas"


def test_devices_and_earlier_winners_are_kept(cache):
    choice.store_winner("plain", 8, 8, 8, torch.bfloat16, "Other GPU", "cublas")
    choice.store_winner("gelu", 8, 8, 8, torch.bfloat16, FAST, "triton")
    choice.store_winner("plain", 8, 8, 8, torch.bfloat16, FAST, "triton")
    stored = json.loads(cache.read_text())
    assert stored["Other GPU"] == {"plain bfloat16 8x8x8": "cublas"} and len(stored[FAST]) == 2
    with pytest.raises(ValueError, match="triton, cublas, cublaslt, got 'mkl'"):
        choice.store_winner("plain", 8, 8, 8, torch.bfloat16, FAST, "mkl")


def test_a_broken_file_is_named(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("{")
    with pytest.raises(RuntimeError, match=r"gemm\.json is not JSON.*delete it"):
        choice.measurements()


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("product", ["plain", "gelu", "gelu_backward"])
def test_a_candidate_runs_its_kernels(product, gemm):
    """On the CPU: ours interpreted, cuBLAS's place taken by torch's own product."""
    from gptkernels.interpreter import interpreted

    with interpreted():
        tune.candidate(product, 16, 24, 8, torch.float32, "cpu", gemm)()


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 1
    assert "tune measures on an NVIDIA GPU" in capsys.readouterr().err
    assert main(["tune", "--rows", "0"]) == 2
