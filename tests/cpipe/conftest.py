"""A command line that runs in this process, and a run that it made once per session."""

import pytest
from click.testing import CliRunner
from tiny_settings import WITH_TWO_COMPOSITIONS
from typer.main import get_command

from cpipe.app import build_app


@pytest.fixture(scope="session")
def cpipe():
    """Runs a command; its result has exit_code, stdout, stderr and exception."""
    command = get_command(build_app())  # made once: Typer's own runner makes all commands anew for every call
    return lambda *words: CliRunner().invoke(command, [str(word) for word in words])


@pytest.fixture(scope="session")
def piped_run(cpipe, tiny_corpus, tmp_path_factory):
    """A run of all stages, by `cpipe run`. Read-only: copy it before writing."""
    run_dir = tmp_path_factory.mktemp("runs") / "piped"
    run_dir.mkdir()
    (run_dir / "cpipe.toml").write_text(WITH_TWO_COMPOSITIONS)
    result = cpipe("run", run_dir, tiny_corpus)
    assert result.exit_code == 0, result.stderr
    return run_dir


@pytest.fixture
def line():
    """The one line on standard error with which a failure is told."""

    def only(result):
        told = [text for text in result.stderr.splitlines() if text.startswith("cpipe: ")]
        assert len(told) == 1, result.stderr
        assert result.stderr.endswith(f"{told[0]}\n")  # and nothing after it
        assert "Traceback" not in result.stderr
        return told[0].removeprefix("cpipe: ")

    return only


@pytest.fixture
def configs(monkeypatch):
    """Stages that do nothing: the configs they were called with, in order, as (command, config, force)."""
    from cpipe import show
    from cpipe.pipeline import Stage

    seen = []
    monkeypatch.setattr(
        Stage, "run", lambda stage, config, run_dir, *, force: seen.append((stage.command, config, force))
    )
    monkeypatch.setattr(show, "show_manifest", lambda *args, **named: None)
    return seen
