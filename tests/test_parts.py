"""Checkpoints in parts: of ranks that are killed, for other numbers of ranks, for one process, with no code, on bad disks."""

import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_checkpoint import Trap, small_disk
from training_case import assert_same_run, driver_environment, same_values, same_weights

from model import cli
from model.checkpoint import BEST, FORMAT, LAST, load, load_model, save_atomically
from model.parts import Reader, read_whole, write_parts
from model.ranks import Ranks
from model.weights_file import load_weights, read_safetensors

pytestmark = pytest.mark.usefixtures("one_thread")

DRIVER = Path(__file__).with_name("parts_driver.py")
INDEX, PART = ".metadata", "__0_0.distcp"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, what the deaths left): one start for all tests."""
    folder = tmp_path_factory.mktemp("parts")
    command = [sys.executable, str(DRIVER), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=driver_environment())
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.fixture
def parts(tmp_path):
    """A checkpoint in parts by one process."""
    write(tmp_path / "last.0", {"model.a": torch.arange(6.0).view(2, 3)})
    save_atomically({"format": FORMAT, "config": {"model.tie": False}, "parts": "last.0"}, tmp_path / LAST)
    return tmp_path / "last.0"


def write(folder, tensors):
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        write_parts(folder, tensors, Ranks())


def test_killed_before_every_event_of_a_save(made):
    """What is left is whole (the driver looks), of the save before until the file names the new parts."""
    for rank, least in ((0, 8), (1, 1)):
        found = [death for death in made[1]["deaths"] if death[0] == rank]
        taken = [after == number for _, _, number, after in found]
        # The first rank makes the folder, brings its part, the index, the folder and the file to the disk, removes the rest.
        assert len(found) > least and taken == sorted(taken) and not taken[0] and taken[-1]
    assert sorted(path.name for path in (made[0] / "deaths").iterdir()) in (["last.0", LAST], ["last.1", LAST])


def test_a_run_killed_in_a_save_is_the_one_that_was_not_in_every_bit(made):
    folder, found = made
    assert found["killed_at"] == 4
    assert_same_run(folder / "killed", folder / "unbroken")
    for run in ("killed", "unbroken"):
        assert [len(list((folder / run).glob(f"{name}.[01]"))) for name in ("last", "best")] == [1, 1]


def test_each_rank_writes_its_part(made):
    folder = made[0] / "unbroken"
    payload = load(folder, LAST, tensors=())
    assert not {"model", "optimizer", "average"} & payload.keys()
    sizes = [path.stat().st_size for path in sorted(payload["parts"].glob("*.distcp"))]
    assert len(sizes) == 2 and 0.7 < sizes[0] / sizes[1] < 1.4


def test_three_ranks_read_what_two_wrote(made):
    again, unbroken = (load(made[0] / name, LAST) for name in ("again", "unbroken"))
    assert again.keys() == unbroken.keys() and all(map(same_values, again.values(), unbroken.values()))


def test_commands_take_such_a_run(made, tmp_path, capsys):
    folder = made[0] / "unbroken"
    assert cli.main(["sample", str(folder), "the ", "--tokens", "3", "--last"]) == 0
    assert cli.main(["convert", str(folder), str(tmp_path / "w.safetensors")]) == 0
    assert cli.main(["check", str(folder), "--steps", "2", "--band", "2"]) == 0
    assert len(capsys.readouterr().out) > 100
    best, last = (load_model(folder, name)[0] for name in (BEST, LAST))
    assert not same_weights(best, last)  # the best one's are averaged
    state, _ = read_safetensors(tmp_path / "w.safetensors")
    assert all(torch.equal(x, best.state_dict()[name]) for name, x in state.items())
    assert same_weights(load_weights(folder / LAST, [])[0], last)


def test_parts_can_hold_no_code(parts, monkeypatch):
    monkeypatch.chdir(parts)
    index = Reader(parts).read_metadata()
    torch.save(Trap(), parts / PART)
    for place in index.storage_data.values():
        place.offset, place.length = 0, (parts / PART).stat().st_size
    for content, reason in (
        (index, "weights_only"),
        (Trap(), "must not name .*mkdir"),
        ({"model.a": torch.distributed.checkpoint.metadata.BytesStorageMetadata()}, "must not name .*BytesStorage"),
        (torch.nn.Module.__call__, "must not name"),
    ):
        (parts / INDEX).write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=rf"(?s)last\.0 must be whole, .*{reason}"):
            load(parts.parent)
    assert not (parts / "sprung").exists()


@pytest.mark.parametrize("name", [INDEX, PART])
@pytest.mark.parametrize("harm", ["cut", "empty", "gone"])
def test_damaged_parts_are_named(parts, name, harm):
    path = parts / name
    assert torch.equal(load(parts.parent)["model"]["a"], torch.arange(6.0).view(2, 3))
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-30] if harm == "cut" else b"")
    with pytest.raises(ValueError, match=r"last\.0 must be whole, the tensors of the checkpoint beside it"):
        load(parts.parent)


def test_a_full_disk_is_told(parts):
    with small_disk(100_000), pytest.raises(RuntimeError, match=r"cannot write .*last\.1: File too large: make room"):
        write(parts.with_name("last.1"), {"model.a": torch.zeros(200_000)})
    assert read_whole(parts, ("model",)).keys() == {"model.a"}
