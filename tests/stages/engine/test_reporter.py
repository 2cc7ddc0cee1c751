import sys
import types
import warnings
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from toy_training import Toy, batch_at, batch_with, config

from schemas.failures import UsageFailure
from stages.engine.loop import train


class Killed(Exception):
    """Stands for whatever ends a process without warning."""


def run(folder: Path, *, killed_at: int | None = None, bad: tuple[int, ...] = (), **settings: Any) -> None:
    def batches(step: int) -> Any:
        if step == killed_at:
            raise Killed
        return batch_with(*bad)(step)

    train(Toy(), batches, config(**settings), folder, "toy")


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """As TensorBoard itself reads them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        read = EventAccumulator(str(folder / "tensorboard"))
        read.Reload()
    return {tag: {event.step: event.value for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


def test_tensorboard_and_polars_read_the_same_numbers(tmp_path: Path) -> None:
    run(tmp_path, bad=(2,))
    table = pl.read_ndjson(tmp_path / "metrics.jsonl")
    assert table["step"].to_list() == list(range(1, 9))
    found = curves(tmp_path)
    assert set(found) == set(table.columns) - {"step"}
    assert {"loss", "size", "learning_rate", "gradient_norm", "tokens", "tokens_per_second", "skipped"} == set(found)
    for name, curve in found.items():
        expected = {step: value for step, value in table.select("step", name).iter_rows() if value is not None}
        assert curve == pytest.approx(expected, rel=1e-6)
    assert 3 not in found["loss"] and found["skipped"][3] == 1


def test_a_resumed_curve_has_every_step_once(tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", killed_at=5)
    run(tmp_path / "cut")
    assert len(list((tmp_path / "cut" / "tensorboard").iterdir())) == 2
    assert curves(tmp_path / "cut")["loss"] == curves(tmp_path / "whole")["loss"]


def test_without_tensorboard_there_is_no_such_folder(tmp_path: Path) -> None:
    run(tmp_path, tensorboard=False)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class FakeWandb(types.ModuleType):
    """Remembers what it is given."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended: list[int] = []

    def init(self, **settings: Any) -> "FakeWandb":
        self.runs.append(settings)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((step, numbers))

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)


def test_wandb_gets_one_run_over_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    with pytest.raises(Killed):
        run(tmp_path, killed_at=4, wandb=True)
    run(tmp_path, wandb=True)
    assert fake.runs[0]["id"] == fake.runs[1]["id"] and fake.runs[1]["resume"] == "allow"
    assert fake.runs[0]["config"]["learning_rate"] == 1e-2
    assert [step for step, _ in fake.logged] == [1, 2, 3, 4, *range(4, 9)]
    assert fake.ended == [1, 0]


def test_wandb_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageFailure, match=r"--wandb: import of wandb .*: pip install 'cpipe\[wandb\]'"):
        train(Toy(), batch_at, config(wandb=True), tmp_path, "toy")
