"""What `cpipe run` would do, and why, as a table."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from cpipe.show import OUT
from schemas.progress import Step


def show_forecast(steps: Sequence[Step], run_dir: Path, *, force: bool, as_json: bool) -> None:
    """A line per step, and where the run would stop."""
    if as_json:
        print(json.dumps({"run": str(run_dir), "steps": [step._asdict() for step in steps]}, indent=2))
        return
    table = Table(title=f"{run_dir}, nothing done yet")
    for name in ("stage", "folder", "what", "why"):
        table.add_column(name, overflow="fold")
    words = {"again": "run again" if force else "refuse", "check": "run again if that differs"}
    for step in steps:
        table.add_row(step.stage, step.folder, words.get(step.state, step.state), "; ".join(step.why))
    OUT.print(table)
    refused = [step.stage for step in steps if step.state == "again"]
    if refused and not force:
        OUT.print(f"It would stop at {refused[0]}: with --force it goes on and repeats what has changed.")
    elif all(step.state == "up to date" for step in steps):
        OUT.print("Nothing to do.")
