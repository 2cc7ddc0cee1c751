import errno
import json
import os
import pickle
import threading
import time

import pytest
import safetensors.torch
import torch

from schemas.failures import ResourceFailure
from stages.engine import checkpoints
from stages.engine.checkpoints import Progress, Writer


def progress_at(step):
    return Progress(step=step, tokens=step * 10, losses=(1.5,) * step)


def state_at(step):
    return {"weight/w": torch.full((2, 3), float(step)), "exp_avg/w": torch.zeros(2, 3)}


def saved(folder, *steps):
    with Writer(folder) as writer:
        for step in steps:
            writer.save(state_at(step), progress_at(step))


def step_found(folder):
    found = checkpoints.newest(folder)
    if found is None:
        return None
    state, progress = found
    assert torch.equal(state["weight/w"], torch.full((2, 3), float(progress.step)))
    assert progress == progress_at(progress.step)
    return progress.step


def test_the_newest_is_found_and_two_are_kept(tmp_path):
    saved(tmp_path, 2, 4, 10, 6)
    assert step_found(tmp_path) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-0000006.json", "step-0000006.safetensors", "step-0000010.json", "step-0000010.safetensors",
    ]  # fmt: skip


def test_none_is_found_where_there_is_none(tmp_path):
    assert checkpoints.newest(tmp_path) is None
    assert checkpoints.newest(tmp_path / "missing") is None


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped byte of the tensors": lambda folder: flip(folder / "step-0000004.safetensors"),
    "a flipped byte of the header": lambda folder: flip(folder / "step-0000004.safetensors", 9),
    "cut tensors": lambda folder: (folder / "step-0000004.safetensors").write_bytes(b"cut"),
    "no tensors": lambda folder: (folder / "step-0000004.safetensors").unlink(),
    "a cut descriptor": lambda folder: (folder / "step-0000004.json").write_text('{"progress"'),
    "an empty descriptor": lambda folder: (folder / "step-0000004.json").write_text(""),
    "a descriptor of something else": lambda folder: (folder / "step-0000004.json").write_text("{}"),
    "no descriptor": lambda folder: (folder / "step-0000004.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, tmp_path):
    saved(tmp_path, 2, 4)
    DAMAGE[damage](tmp_path)
    assert step_found(tmp_path) == 2


def test_a_descriptor_cannot_point_out_of_the_folder(tmp_path):
    saved(tmp_path / "other", 9)
    saved(tmp_path / "own", 2)
    path = tmp_path / "own" / "step-0000002.json"
    descriptor = json.loads(path.read_text())
    descriptor["tensors"]["path"] = "../other/step-0000009.safetensors"
    path.write_text(json.dumps(descriptor))
    assert checkpoints.newest(tmp_path / "own") is None


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_never_opened(tmp_path):
    went_off = tmp_path / "went-off"
    bomb = pickle.dumps(Bomb(went_off))
    pickle.loads(bomb).close()
    assert went_off.exists()  # it works
    went_off.unlink()
    saved(tmp_path, 2, 4)
    for name in ("latest", "step-0000009.pt", "step-0000009.bin", "mp_rank_00_model_states.pt"):
        (tmp_path / name).write_bytes(bomb)
    assert step_found(tmp_path) == 4
    (tmp_path / "step-0000004.safetensors").write_bytes(bomb)
    (tmp_path / "step-0000007.json").write_bytes(bomb)
    assert step_found(tmp_path) == 2
    assert not went_off.exists()


def test_a_checkpoint_is_plain_safetensors(tmp_path):
    saved(tmp_path, 3)
    assert set(safetensors.torch.load_file(tmp_path / "step-0000003.safetensors")) == {"weight/w", "exp_avg/w"}


# Written beside the training


@pytest.fixture
def disk(monkeypatch):
    """A disk that writes nothing through until it is told to."""
    go, sync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: go.wait(20) and sync(handle))
    yield go
    go.set()


def test_what_is_written_is_the_state_when_it_was_saved_and_saving_waits_for_no_disk(disk, tmp_path):
    state = state_at(4)
    with Writer(tmp_path) as writer:
        writer.save(state, progress_at(4))
        state["weight/w"] += 1  # the next step
        assert step_found(tmp_path) is None
        writer.check()
        disk.set()
        writer.wait()
        assert step_found(tmp_path) == 4
        assert writer.longest > 0


def test_one_is_written_at_a_time_and_the_next_waits_for_it(disk, tmp_path):
    with Writer(tmp_path) as writer:
        writer.save(state_at(2), progress_at(2))
        threading.Timer(0.3, disk.set).start()
        writer.save(state_at(4), progress_at(4))
        assert disk.is_set()
        assert step_found(tmp_path) in (2, 4)
    assert step_found(tmp_path) == 4


def test_leaving_waits_whatever_the_reason(disk, tmp_path):
    with pytest.raises(KeyError), Writer(tmp_path) as writer:
        writer.save(state_at(2), progress_at(2))
        threading.Timer(0.3, disk.set).start()
        raise KeyError
    assert step_found(tmp_path) == 2


@pytest.fixture
def full_disk(monkeypatch):
    def refuse(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)


def checked(writer):
    for _ in range(1000):
        writer.check()
        time.sleep(0.01)


@pytest.mark.parametrize(
    "then", [checked, Writer.wait, lambda writer: writer.save(state_at(4), progress_at(4)), lambda writer: None]
)
def test_a_full_disk_is_told_in_one_line_at_the_next_opportunity(then, full_disk, tmp_path):
    with (
        pytest.raises(ResourceFailure, match=r"no room to write .*0002.safetensors") as failed,
        Writer(tmp_path) as writer,
    ):
        writer.save(state_at(2), progress_at(2))
        then(writer)
    assert "\n" not in str(failed.value)
    assert list(tmp_path.iterdir()) == []


def test_what_ended_the_training_is_not_hidden_by_a_full_disk(full_disk, tmp_path):
    with pytest.raises(KeyError), Writer(tmp_path) as writer:
        writer.save(state_at(2), progress_at(2))
        raise KeyError
