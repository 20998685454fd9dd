"""What a run leaves for readers: JSON lines, TensorBoard, the page with the gradient of each layer."""

import json
import math
import re
import sys
import types

import pytest
import torch
from training_case import chosen, gradients, small_settings, some_batch

from model.chart import label
from model.checkpoint import build_model
from model.memory import kept_by_operator
from model.optimize import Learner, layer_norms
from model.run_files import as_json_line, read_json_lines, read_metrics, trim_samples
from model.run_page import layer_figure, run_page
from model.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_norms_of_the_layers_are_parts_of_the_whole():
    config = chosen([], "vocab_size=11", "n_layer=3")
    learner = Learner(config, build_model(config), 8)
    gradients(learner, *some_batch(11, False), 8)
    norms = layer_norms(learner.model)
    assert list(norms) == ["wte", "wpe", "block 0", "block 1", "block 2", "ln_f"]
    whole = torch.nn.utils.get_total_norm([p.grad for p in learner.model.parameters()])
    assert torch.stack(list(norms.values())).norm() == pytest.approx(whole.item(), rel=1e-6)
    assert norms["ln_f"] == torch.nn.utils.get_total_norm([p.grad for p in learner.model.transformer.ln_f.parameters()])


def test_a_run_leaves_json_lines_and_a_page(tmp_path):
    config = chosen(
        small_settings(tmp_path), "name=a", "log_every=3", "eval_every=6", "sample_tokens=9", "recompute=full"
    )
    result = train(config, quiet=True)
    rows = read_json_lines(tmp_path / "a" / "metrics.jsonl")
    short = read_metrics(tmp_path / "a" / "metrics.csv")
    assert [row["step"] for row in rows] == [3, 6, 9, 12] == [int(row["step"]) for row in short]
    assert rows[-1]["val_loss"] == result["val_loss"] and list(rows[0]["grad_norms"])[2] == "block 0"
    page = (tmp_path / "a" / "report.html").read_text()
    for part in ("<svg", "Learning rate", "Gradient norm of each block", "Throughput", "12 of 12", "recompute = &quot;full&quot;",
                 f"{result['val_loss']:.4f}", "bytes in 2 layers", ">128<"):  # fmt: skip
        assert part in page, part  # 128: x and branch of 16 numbers in fp32
    assert len(re.findall("<polyline", page)) == 7 and "http://" not in re.sub(r'xmlns="[^"]*"', "", page)


def test_the_page_of_a_run_that_has_not_logged_yet(tmp_path):
    config = chosen([], "vocab_size=11")
    page = run_page(tmp_path, config, kept_by_operator(config, {"linear": "cpu"}), "")
    assert "0 of 40" in page and "not evaluated yet" in page


def test_a_torn_line_is_left_out_and_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "grad_norm": null}\n{"step": 2, "lo')
    assert read_json_lines(path) == [{"step": 1, "grad_norm": None}]
    assert read_json_lines(tmp_path / "none") == []
    path.write_text('{"step": 1}\ngarbage\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl must be JSON"):
        read_json_lines(path)


def test_samples_beyond_the_checkpoint_are_written_again(tmp_path):
    path = tmp_path / "samples.txt"
    first = "--- step 4, validation loss 2.5000\n--- step 9, he said\n\n"
    path.write_text(first + "--- step 8, validation loss 2.4000\ntext\n\n")
    trim_samples(path, 4)
    assert path.read_text() == first
    # Also one of a model whose loss was no number.
    path.write_text(f"{first}--- step 8, validation loss nan\nccc\n\n")
    trim_samples(path, 4)
    assert path.read_text() == first
    trim_samples(tmp_path / "none", 4)


def test_tensorboard_is_an_option(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            written.append("closed")

    settings = [*small_settings(tmp_path), "tensorboard=on", "name=a"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RuntimeError, match=r"tensorboard=on needs its package: run `pip install tensorboard`"):
        train(chosen(settings), quiet=True)
    assert not (tmp_path / "a").exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    train(chosen(settings), quiet=True)
    assert written[0] == (str(tmp_path / "a"), 1) and written[-1] == "closed"
    assert {("loss", 12), ("val_loss", 12), ("grad_norms/block 1", 10)} <= set(written[1:-1])


def test_json_lines_are_json():
    """Also those of a step of fp16 that overflowed."""
    row = {"step": 1, "loss": 2.5, "grad_norm": math.inf, "grad_norms": {"block 0": math.nan, "ln_f": 1.0}}
    found = json.loads(as_json_line(row), parse_constant=pytest.fail)
    assert found == {"step": 1, "loss": 2.5, "grad_norm": None, "grad_norms": {"block 0": None, "ln_f": 1.0}}
    assert 'points=""' in layer_figure([(1, {"block 0": None})])


@pytest.mark.parametrize("count, words", [(1, {"first block"}), (2, {"first block", "last block"}), (4, {"between"})])
def test_the_legend_names_what_is_drawn(count, words):
    rows = [(float(step), {f"block {i}": 1.0 + i for i in range(count)}) for step in range(3)]
    shown = {word for word in ("first block", "last block", "between") if word in layer_figure(rows)}
    assert shown >= words and len(shown) == min(count, 3)


def test_numbers_on_axes_are_short():
    numbers = {
        0.0: "0",
        1e-4: "1e-4",
        1.5e-4: "1.5e-4",
        0.25: "0.25",
        9000.0: "9000",
        2e4: "20k",
        -4e4: "-40k",
        2.5e6: "2.5M",
        1.5e9: "1.5e09",
    }
    assert {number: label(number) for number in numbers} == numbers
