"""A run that is killed at random moments ends as the run that was not, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kill_driver import SETTINGS
from training_case import assert_same_run, chosen, driver_environment, rows_of, small_settings

from model.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

DRIVER = Path(__file__).with_name("kill_driver.py")
KILLS = 20


def test_killed_twenty_times_and_equal_in_every_bit(tmp_path):
    """Weights, optimizer, average, random state, loader, metrics and samples; a death costs the steps since a checkpoint."""
    command = [sys.executable, str(DRIVER), str(tmp_path), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=driver_environment())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Four steps between checkpoints, and the one that was told of before its checkpoint was written.
    assert len(found["lost"]) == KILLS and 0 < max(found["lost"]) <= 4 and min(found["lost"]) >= 0
    settings = [*small_settings(tmp_path), *SETTINGS, "sample_tokens=5", "name=straight", f"steps={found['steps']}"]
    train(chosen(settings), quiet=True)
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    assert_same_run(killed, straight, but=("train.name", "train.steps"))
    assert len(rows_of(killed)) > KILLS // 2
