import errno
import io

import pytest
import typer
from loguru import logger
from rich.console import Console

from cpipe.console import complain, session
from schemas import failures

FAILURES = {
    "UsageFailure": 2, "InputFailure": 3, "IntegrityFailure": 4, "LockedFailure": 5, "ResourceFailure": 6,
    "DivergedFailure": 7, "InterruptedFailure": 75,
}  # fmt: skip


def exit_code_of(error, run_dir, **named):
    with pytest.raises(typer.Exit) as left, session(run_dir, "train-seed", **named):
        raise error
    return left.value.exit_code


def test_every_failure_there_is_has_a_code_here():
    found = {kind.__name__: kind.exit_code for kind in failures.Failure.__subclasses__()}
    assert found == FAILURES


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_line_and_its_exit_code(tmp_path, capsys, name):
    message = "no [seed] in runs/a: found `x`, run `cpipe train-seed` first " + "and so on " * 40
    assert exit_code_of(getattr(failures, name)(message), tmp_path) == FAILURES[name]
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"cpipe: {message}\n"


@pytest.mark.parametrize("text", ["[bold]x[/bold]", "a [/] b", "key [compose]", r"back\slash", r"both \[a]"])
def test_brackets_and_slashes_are_printed_as_they_are(capsys, text):
    complain(text)
    assert capsys.readouterr().err == f"cpipe: {text}\n"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_a_failure(tmp_path, capsys, code):
    assert exit_code_of(OSError(code, "the reason", str(tmp_path / "x")), tmp_path) == 6
    assert capsys.readouterr().err == (f"cpipe: cannot write {tmp_path}/x: the reason; nothing finished was touched\n")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), FileNotFoundError(2, "gone"), KeyError("x")])
def test_a_bug_passes_through(tmp_path, capsys, error):
    with pytest.raises(type(error)) as raised, session(tmp_path, "train-seed"):
        raise error
    assert raised.value is error
    assert capsys.readouterr().err == ""


def test_a_failure_keeps_its_traceback_for_those_who_ask(tmp_path, monkeypatch):
    monkeypatch.setenv("CPIPE_DEBUG", "1")
    with pytest.raises(failures.UsageFailure), session(tmp_path, "train-seed"):
        raise failures.UsageFailure("x")


def test_lines_of_the_log_go_to_the_file_and_to_standard_error_only(tmp_path, capsys):
    with session(tmp_path, "train-seed"):
        logger.info("a step of {}", 3)
        logger.debug("too small to tell")
    out, err = capsys.readouterr()
    lines = (tmp_path / "logs/train-seed.log").read_text().splitlines()
    assert [line.split(maxsplit=2)[1:] for line in lines] == [["INFO", "a step of 3"]]
    assert out == "" and err.splitlines() == lines
    with session(tmp_path, "train-seed"):
        logger.info("another start")
    assert len((tmp_path / "logs/train-seed.log").read_text().splitlines()) == 2  # kept, not overwritten


def test_without_log_nothing_is_written(tmp_path):
    with session(tmp_path, "status", log=False):
        logger.info("x")
    assert not list(tmp_path.iterdir())


def test_other_processes_of_a_job_write_no_log(tmp_path, capsys, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with session(tmp_path, "train-seed"):
        logger.info("x")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["tokenize", "run", "evaluate", "generate", "status"])
def test_what_is_no_training_is_for_one_process(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(typer.Exit) as ended, session(tmp_path, command):
        pytest.fail("begun by each of two processes")
    assert ended.value.exit_code == 2
    assert f"cpipe {command} is for one process, not for 2: start it without the launcher" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_terminal_gets_a_bar_that_moves_and_lines_above_it(tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("cpipe.console.ERRORS", Console(file=screen, force_terminal=True, width=120))
    with session(tmp_path, "train-seed"):
        logger.info("reading [x] text")
        for done in (1, 2):
            logger.bind(task="seed", done=done, total=3, text=f"loss 5.{done}").debug("not for people")
        logger.warning("take care")
    shown = screen.getvalue()
    assert "reading [x] text" in shown and "take care" in shown
    assert "seed" in shown and "2/3" in shown and "loss 5.2" in shown
    assert "not for people" not in shown
    assert "loss" not in (tmp_path / "logs/train-seed.log").read_text()


def test_a_bar_that_is_full_gives_way_to_its_last_line(tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("cpipe.console.ERRORS", Console(file=screen, force_terminal=True, width=120))
    with session(tmp_path, "train-seed"):
        for task in ("one", "two"):
            logger.bind(task=task, done=2, total=2, text="loss").info("{} is done", task)
    shown = screen.getvalue()
    assert "one is done" in shown and "two is done" in shown
    assert "2/2" not in shown.rsplit("two is done", 1)[1]
