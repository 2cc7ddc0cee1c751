"""What the user sees: log lines, one progress bar, and failures as one line with an exit code.

- standard output carries results only; everything else goes to standard error and to RUN/logs/<command>.log
- on a terminal training shows a bar; elsewhere a line now and then
- parts report progress as log records with `task`, `done`, `total` and `text`; nothing else ties them to the terminal
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from loguru import logger
from rich.console import Console
from rich.text import Text

from schemas.failures import Failure, UsageFailure, on_one_line
from schemas.launch import launched_as

if TYPE_CHECKING:
    from loguru import Message

ERRORS = Console(stderr=True)
BEGINNERS = ("collect", "tokenize", "run", "slurm", "demo", "init")  # commands that may make the run's folder
TOGETHER = ("train-seed", "train-experts", "train-gates", "compose")  # commands whose processes share one training
LOG_FORMAT = "{time:HH:mm:ss} {level: <7} {message}"


@contextmanager
def session(run_dir: Path, command: str, *, log: bool = True) -> Iterator[None]:
    """Set up logs and the progress bar for one command, and turn its failures into exit codes."""
    logger.remove()
    try:
        if command not in TOGETHER and (world := launched_as().world) > 1:
            raise UsageFailure(f"cpipe {command} is for one process, not for {world}: start it without the launcher")
        if command not in BEGINNERS and not run_dir.is_dir():
            raise UsageFailure(f"no run at {run_dir}: `cpipe tokenize {run_dir} FILES` begins one")
        if log and launched_as().rank == 0:
            (run_dir / "logs").mkdir(parents=True, exist_ok=True)
            logger.add(run_dir / "logs" / f"{command}.log", format=LOG_FORMAT, level="INFO")
        with _terminal():
            yield
    except Failure as failure:
        if os.environ.get("CPIPE_DEBUG"):
            raise
        complain(str(failure))
        raise typer.Exit(failure.exit_code) from failure
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        complain(f"cannot write {error.filename or run_dir}: {error.strerror}; nothing finished was touched")
        raise typer.Exit(6) from error
    finally:
        logger.remove()


def complain(message: str) -> None:
    """One line on standard error."""
    ERRORS.print(Text.assemble(("cpipe:", "bold red"), " ", on_one_line(message)), soft_wrap=True)


@contextmanager
def _terminal() -> Iterator[None]:
    if launched_as().rank:
        yield
    elif ERRORS.is_terminal:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        text = TextColumn("{task.fields[text]}")
        with Progress(*columns, text, TimeRemainingColumn(), console=ERRORS) as progress:
            logger.add(_Bar(progress), level="DEBUG", format="{message}")
            yield
    else:
        logger.add(sys.stderr, level="INFO", format=LOG_FORMAT)
        yield


class _Bar:
    """A log sink that draws a bar for records with `task`, and prints the others, and what a bar ended with, above."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def __call__(self, message: "Message") -> None:
        record, extra = message.record, message.record["extra"]
        if "task" not in extra:
            if record["level"].no >= 20:
                self._progress.console.print(Text(record["message"], "yellow" if record["level"].no > 20 else ""))
            return
        task = extra["task"]
        if task not in self._tasks:
            self._tasks[task] = self._progress.add_task(task, text="")
        self._progress.update(self._tasks[task], completed=extra["done"], total=extra["total"], text=extra["text"])
        if extra["done"] >= extra["total"]:
            self._progress.remove_task(self._tasks.pop(task))
            if record["level"].no >= 20:
                self._progress.console.print(Text(record["message"]))
