import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cpipe.pipeline import PIPELINE


@pytest.fixture
def run_dir(piped_run: Path, copied_run: Any) -> Path:
    copied: Path = copied_run(piped_run)
    return copied


def edit(run_dir: Path, old: str, new: str) -> None:
    path = run_dir / "cpipe.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.fixture
def steps(cpipe: Any) -> Any:
    """The forecast of `cpipe run` with these words, by folder; the run is found untouched."""

    def told(run_dir: Path, *words: Any) -> dict[str, tuple[str, str]]:
        before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
        result = cpipe("run", run_dir, *words, "--dry-run", "--json")
        assert result.exit_code == 0, result.stderr
        assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
        return {step["folder"]: (step["state"], "; ".join(step["why"])) for step in json.loads(result.stdout)["steps"]}

    return told


def states(steps: dict[str, tuple[str, str]]) -> dict[str, str]:
    return {folder: state for folder, (state, _) in steps.items() if state != "up to date"}


def test_of_a_finished_run_nothing_is_to_do(run_dir: Path, steps: Any, tiny_corpus: Path, cpipe: Any) -> None:
    folders = ["tokens", "clusters", "seed", "experts", "gates", "central", "central-calm", "reports"]
    assert list(steps(run_dir)) == folders
    assert states(steps(run_dir)) == states(steps(run_dir, tiny_corpus)) == {}
    assert "Nothing to do." in cpipe("run", run_dir, "--dry-run").stdout


def test_of_a_run_not_begun_everything_is_to_do_and_it_is_not_made(tmp_path: Path, cpipe: Any) -> None:
    result = cpipe("run", tmp_path / "new", "a.txt", "--dry-run", "--json")
    found = json.loads(result.stdout)["steps"]
    assert [(step["stage"], step["state"]) for step in found] == [(command, "run") for command in PIPELINE]
    assert found[0]["why"] == ["not finished"]
    assert not (tmp_path / "new").exists()
    found = json.loads(cpipe("run", tmp_path / "new", "--dry-run", "--json").stdout)["steps"]
    assert found[0]["why"][1] == "and its text is to be named after the run"


def test_a_changed_setting_is_named_with_what_follows_from_it(run_dir: Path, steps: Any, cpipe: Any) -> None:
    edit(run_dir, "[train-gates]\nsteps = 2", "[train-gates]\nsteps = 3")
    found = steps(run_dir)
    assert found["gates"] == ("again", "training.steps was 2 and is now 3")
    assert found["central"] == ("check", "its input gates is made before it")
    assert states(found) == {"gates": "again", "central": "check", "reports": "check"}  # central-calm has no gates
    shown = cpipe("run", run_dir, "--dry-run").stdout
    assert "refuse" in shown and "It would stop at train-gates: with --force" in shown
    assert "run again" in cpipe("run", run_dir, "--dry-run", "--force").stdout


def test_what_is_missing_is_to_be_made_and_what_follows_from_it_looked_at(run_dir: Path, steps: Any) -> None:
    (run_dir / "experts/manifest.json").unlink()
    (run_dir / "experts/002/manifest.json").unlink()
    found = steps(run_dir)
    assert found["experts"] == ("run", "begun (2 members finished)")
    assert states(found) == {"experts": "run"} | dict.fromkeys(["gates", "central", "central-calm", "reports"], "check")
    shutil.rmtree(run_dir / "seed")
    assert steps(run_dir)["seed"] == ("run", "not finished")


def test_a_member_that_is_missing_or_was_made_from_something_else_is_found(run_dir: Path, steps: Any) -> None:
    (run_dir / "experts/002/manifest.json").unlink()
    assert steps(run_dir)["experts"] == ("run", "experts/002 is not finished")
    manifest = run_dir / "seed/manifest.json"
    manifest.write_text(manifest.read_text().replace('"parameters": ', '"parameters": 1'))
    assert steps(run_dir)["central"] == ("again", "its input seed has changed")
    shutil.copy(run_dir / "experts/001/manifest.json", run_dir / "experts/002")
    assert "its input seed has changed" in steps(run_dir)["experts"][1]


def test_a_new_composition_is_new_to_the_evaluation(run_dir: Path, steps: Any) -> None:
    edit(run_dir, 'name = "central-calm"', 'name = "central-other"')
    found = steps(run_dir)
    assert found["central-other"] == ("run", "not finished")
    assert found["reports"] == ("again", "its input central-other is new")


def test_a_manifest_of_another_version_is_told(run_dir: Path, steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("schemas.changes.VERSION", "9.9")
    assert states(steps(run_dir, "x.txt")).keys() == steps(run_dir).keys()
    assert "it was written by cpipe" in steps(run_dir)["seed"][1]


def test_only_a_part_of_the_pipeline(run_dir: Path, steps: Any, cpipe: Any, line: Any) -> None:
    assert list(steps(run_dir, "--from", "train-gates", "--until", "compose")) == ["gates", "central", "central-calm"]
    assert list(steps(run_dir, "--until", "cluster")) == ["tokens", "clusters"]
    result = cpipe("run", run_dir, "--from", "compose", "--until", "cluster")
    assert result.exit_code == 2 and "--from compose comes after --until cluster" in line(result)
    result = cpipe("run", run_dir, "--from", "nothing")
    assert result.exit_code == 2 and "--from nothing is no stage; expected one of tokenize" in line(result)


def test_from_a_stage_on_those_before_are_left_alone(run_dir: Path, cpipe: Any) -> None:
    edit(run_dir, "dimensions = 8", "dimensions = 6")  # cluster would refuse
    (run_dir / "reports/manifest.json").unlink()
    assert cpipe("run", run_dir).exit_code == 2
    result = cpipe("run", run_dir, "--from", "evaluate", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["schema"] == "cpipe.evaluate/1"


def test_a_damaged_output_stops_it_as_it_would_the_run(run_dir: Path, cpipe: Any, line: Any) -> None:
    (run_dir / "seed/model.safetensors").unlink()
    for words in (["--dry-run"], []):
        result = cpipe("run", run_dir, *words)
        assert result.exit_code == 4 and "model.safetensors is missing" in line(result)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[evaluate]\ntokens = 700", "[evaluate]\ntokens = 650"),
        ("[train-gates]\nsteps = 2", "[train-gates]\nsteps = 3"),
    ],
)
def test_what_was_up_to_date_is_not_done_and_the_rest_is(
    run_dir: Path, steps: Any, cpipe: Any, old: str, new: str
) -> None:
    edit(run_dir, old, new)
    foretold = states(steps(run_dir))
    before = {path.parent.name: path.read_bytes() for path in run_dir.glob("*/manifest.json")}
    assert cpipe("run", run_dir).exit_code == 2
    assert cpipe("run", run_dir, "--force").exit_code == 0
    done = {
        folder for folder, content in before.items() if (run_dir / folder / "manifest.json").read_bytes() != content
    }
    assert done <= foretold.keys()
    assert {folder for folder, state in foretold.items() if state == "again"} <= done
    assert states(steps(run_dir)) == {}
