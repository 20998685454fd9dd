"""A run that is killed at random moments ends as the run that was not, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_case import chosen, same_values, small_settings

from model.checkpoint import BEST, LAST, load
from model.run_files import read_json_lines
from model.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

DRIVER = Path(__file__).with_name("kill_driver.py")
KILLS = 20


def test_killed_twenty_times_and_equal_in_every_bit(tmp_path):
    """Weights, optimizer, average, random state, loader, metrics and samples; a death costs the steps since a checkpoint."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(DRIVER.parent.parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(DRIVER), str(tmp_path), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Four steps between checkpoints, and the one that was told of before its checkpoint was written.
    assert len(found["lost"]) == KILLS and 0 < max(found["lost"]) <= 4 and min(found["lost"]) >= 0
    from kill_driver import SETTINGS

    settings = [*small_settings(tmp_path), *SETTINGS, "sample_tokens=5", "name=straight", f"steps={found['steps']}"]
    train(chosen(settings), quiet=True)
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    for name in (LAST, BEST):
        ours, theirs = load(killed, name), load(straight, name)
        for checkpoint in (ours, theirs):
            del checkpoint["config"]["train.name"], checkpoint["config"]["train.steps"]
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert same_values(ours[key], theirs[key]), f"{name}: {key}"
    rows = [
        [
            {k: v for k, v in row.items() if k not in ("ms", "tokens_per_s")}
            for row in read_json_lines(folder / "metrics.jsonl")
        ]
        for folder in (killed, straight)
    ]
    assert rows[0] == rows[1] and len(rows[0]) > KILLS // 2
    assert (killed / "samples.txt").read_text() == (straight / "samples.txt").read_text()
