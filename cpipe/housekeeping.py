"""The commands that look after a run: settings to begin with, a check of everything in it, room, its report.

- as in `cpipe.app`, what a command needs is imported inside it
"""

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("init")(init)


def init(run: Run) -> None:
    """Write RUN/cpipe.toml: every setting, commented out, with its default and a sentence about it."""
    from cpipe.console import session
    from cpipe.settings import FILE_NAME
    from cpipe.template import settings_template
    from schemas.failures import UsageFailure
    from schemas.files import write_bytes

    path = run / FILE_NAME
    with session(run, "init", log=False):
        if path.exists() or path.is_symlink():
            raise UsageFailure(f"{path} is there already: change it, or remove it and begin anew")
        write_bytes(path, settings_template().encode(), run)
    print(path)
