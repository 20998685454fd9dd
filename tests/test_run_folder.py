"""The folder of a run: one process writes it, and a disk that is full says so and loses nothing."""

import json
import os
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest
from training_case import chosen, small_settings

from model import train as training
from model.checkpoint import LAST, load
from model.files import hold
from model.run_files import Metrics
from model.train import resume, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(tmp_path):
    return [*small_settings(tmp_path), "eval_every=4", "sample_tokens=20"]


def test_a_resume_reads_what_the_last_writer_left(settings, tmp_path, monkeypatch):
    """It holds the folder before it looks into it: a checkpoint of another process is not written over by an older one."""
    train(chosen(settings, "name=a", "steps=4"), quiet=True)
    real = training.load

    def watched(folder, *args, **kwargs):
        with pytest.raises(RuntimeError, match="another process is writing"), hold(folder):
            pass
        return real(folder, *args, **kwargs)

    monkeypatch.setattr(training, "load", watched)
    assert resume(tmp_path / "a", ["steps=8"], quiet=True)["step"] == 8
    assert not (tmp_path / "a" / ".lock").exists()


def test_a_forked_process_does_not_keep_the_folder(tmp_path):
    with hold(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
    with hold(tmp_path):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_end_of_a_run_that_its_disk_does_not_take(settings, tmp_path, monkeypatch, capsys):
    """The figures are kept where the weights are not exported; an error of the disk's own names the way on."""

    def full(*_):
        raise RuntimeError("cannot write model.safetensors: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_weights", full)
        assert train(chosen(settings, "name=a", "steps=4"))["step"] == 4
    out = capsys.readouterr().out
    assert f"No space left on device): write it with  gptkernels convert {tmp_path}/a FILE.safetensors" in out
    assert "next:" in out and json.loads((tmp_path / "a" / "result.json").read_text())["step"] == 4

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(training, "draw", broken)
    with pytest.raises(OSError, match="Input/output error"):
        resume(tmp_path / "a", ["steps=8"])
    assert "go on from the last checkpoint with  gptkernels train --resume" in capsys.readouterr().out


def test_one_process_writes_a_run(settings, tmp_path, monkeypatch):
    """A second one, of the same name or that resumes, is refused; a run that has ended lets go."""
    train(chosen(settings, "name=a", "steps=4"), quiet=True)
    with hold(tmp_path / "a"), pytest.raises(RuntimeError, match=f"another process is writing {tmp_path}/a: wait"):
        resume(tmp_path / "a", ["steps=8"], quiet=True)
    assert load(tmp_path / "a", LAST)["config"]["train.steps"] == 4
    (tmp_path / "b").mkdir()
    with hold(tmp_path / "b"), pytest.raises(RuntimeError, match="another process is writing"):
        train(chosen(settings, "name=b"), quiet=True)
    assert resume(tmp_path / "a", ["steps=8"], quiet=True)["step"] == 8


def test_a_full_disk_is_told_with_the_way_on(settings, tmp_path, capsys):
    """Linux's /dev/full takes nothing: neither a sample nor a row of the metrics."""
    train(chosen(settings, "name=a", "steps=4"), quiet=True)
    (tmp_path / "a" / "samples.txt").unlink()
    (tmp_path / "a" / "samples.txt").symlink_to("/dev/full")
    with pytest.raises(RuntimeError, match=r"cannot write .*samples.txt: No space left on device: make room there"):
        resume(tmp_path / "a", ["steps=8"])
    assert f"go on from the last checkpoint with  gptkernels train --resume {tmp_path}/a" in capsys.readouterr().out
    metrics = Metrics(tmp_path / "a")
    for file in metrics.files:
        file.close()
    metrics.files = [Path("/dev/full").open("a")]  # noqa: SIM115 (closed by Metrics)
    with pytest.raises(RuntimeError, match="cannot write /dev/full: No space left"), closing(metrics):
        metrics.write({"step": 1, "loss": 1.0})
