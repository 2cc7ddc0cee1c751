import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from cpipe import show, watch
from cpipe.pipeline import PIPELINE, STAGES

PAIRS = [(stage.command, stage.manifest) for stage in STAGES]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PERIOD", 0.02)


def test_of_a_finished_run_each_folder_is_told_once_and_it_ends(piped_run: Path, cpipe: Any) -> None:
    result = cpipe("status", piped_run, "--watch")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d [a-z-]+ [a-z-]+: (not )?finished", line) for line in lines), lines
    assert len(lines) == len({line.split()[2] for line in lines}) == len(list(piped_run.glob("*/manifest.json"))) + 1


def test_changes_are_told_when_they_come(piped_run: Path, copied_run: Any, capsys: Any) -> None:
    run_dir = copied_run(piped_run)
    shutil.move(run_dir / "gates", run_dir.parent / "gates")
    shutil.move(run_dir / "reports", run_dir.parent / "reports")
    watching = threading.Thread(target=watch.watch_status, args=(run_dir, PAIRS, PIPELINE), daemon=True)
    watching.start()
    told = ""

    def wait_for(text: str) -> None:
        nonlocal told
        for _ in range(500):
            told += capsys.readouterr().out
            if text in told:
                return
            watching.join(0.02)
        pytest.fail(f"{text!r} was not told: {told}")

    wait_for("evaluate reports: not finished")
    (run_dir / "gates/gates-joint").mkdir(parents=True)
    wait_for("train-gates gates: begun\n")
    (run_dir / "gates/gates-joint/metrics.jsonl").write_text('{"step": 7}\n{"step": 1234}\n{"st')
    wait_for("train-gates gates: begun, step 1,234\n")
    shutil.rmtree(run_dir / "gates")
    shutil.move(run_dir.parent / "gates", run_dir / "gates")
    wait_for("train-gates gates: finished\n")
    assert watching.is_alive()
    shutil.move(run_dir.parent / "reports", run_dir / "reports")
    wait_for("evaluate reports: finished\n")
    watching.join(10)
    assert not watching.is_alive()


def test_ctrl_c_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    watch.watch_status(tmp_path, PAIRS, PIPELINE)
    assert len(capsys.readouterr().out.splitlines()) == len(STAGES)


def test_on_a_terminal_the_table_is_drawn_again(piped_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from rich.console import Console

    monkeypatch.setattr(watch, "OUT", Console(force_terminal=True, width=120))
    watch.watch_status(piped_run, PAIRS, PIPELINE)
    out = capsys.readouterr().out
    assert "train-seed" in out and "\x1b[" in out


@pytest.mark.parametrize("content", [b"", b"\n", b"x\n", b"[]\n", b'{"step": null}\n', b"\xff\n", b"[" * 9000 + b"\n"])
def test_metrics_that_are_none_are_no_step(content: bytes, tmp_path: Path) -> None:
    assert watch._last_step(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert watch._last_step(tmp_path) is None


def test_the_experts_together_took_what_each_of_them_took(piped_run: Path) -> None:
    found = {entry["folder"]: entry for entry in show.run_state(piped_run, PAIRS)}
    members = [
        json.loads(path.read_bytes())["environment"]["seconds"] for path in piped_run.glob("experts/*/manifest.json")
    ]
    assert len(members) == 3
    assert found["experts"]["seconds"] == pytest.approx(sum(members), abs=0.1)
    assert found["experts"]["seconds"] > max(members)


def test_a_report_alone_does_not_begin_the_evaluation(tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/report.html").write_text("x")
    assert {entry["state"] for entry in show.run_state(tmp_path, PAIRS)} == {"not finished"}
    (tmp_path / "reports/.claim").write_text("x")
    assert "begun" in {entry["state"] for entry in show.run_state(tmp_path, PAIRS)}
