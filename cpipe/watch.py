"""`cpipe status --watch`: how far a run has got, again every second.

- on a terminal the table is drawn anew; elsewhere there is a line for what has changed, so that a log stays readable
- of a training it also tells the step, from the last line of its metrics.jsonl; all else is read from manifests
"""

import json
import time
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.live import Live

from cpipe.show import OUT, run_state, status_table
from schemas.manifest import Manifest

PERIOD = 1.0  # seconds
TAIL = 1 << 14  # bytes read of metrics.jsonl; a line has a few hundred


def watch_status(run_dir: Path, stages: Sequence[tuple[str, type[Manifest]]], expected: Collection[str]) -> None:
    """Show the state of the run until all `expected` stages are finished, or Ctrl-C."""
    try:
        if OUT.is_terminal:
            with Live(console=OUT, auto_refresh=False) as live:
                while not _show_table(run_dir, stages, expected, live):
                    time.sleep(PERIOD)
        else:
            seen: dict[str, str] = {}
            while not _print_changes(run_dir, stages, expected, seen):
                time.sleep(PERIOD)
    except KeyboardInterrupt:
        return


def _show_table(
    run_dir: Path, stages: Sequence[tuple[str, type[Manifest]]], expected: Collection[str], live: Live
) -> bool:
    found = _state(run_dir, stages)
    live.update(status_table(run_dir, found), refresh=True)
    return _is_over(found, expected)


def _print_changes(
    run_dir: Path, stages: Sequence[tuple[str, type[Manifest]]], expected: Collection[str], seen: dict[str, str]
) -> bool:
    """A line for each folder whose state is another than `seen`."""
    found = _state(run_dir, stages)
    for entry in found:
        if seen.get(entry["folder"]) != entry["state"]:
            seen[entry["folder"]] = entry["state"]
            print(f"{datetime.now():%H:%M:%S} {entry['stage']} {entry['folder']}: {entry['state']}", flush=True)
    return _is_over(found, expected)


def _state(run_dir: Path, stages: Sequence[tuple[str, type[Manifest]]]) -> list[dict[str, Any]]:
    found = run_state(run_dir, stages)
    for entry in found:
        if entry["state"].startswith("begun") and (step := _last_step(run_dir / entry["folder"])) is not None:
            entry["state"] += f", step {step:,}"
    return found


def _is_over(found: Sequence[dict[str, Any]], expected: Collection[str]) -> bool:
    unfinished = {entry["stage"] for entry in found if entry["state"] != "finished"}
    return unfinished.isdisjoint(expected)  # a seed may have been imported, which is another stage


def _last_step(folder: Path) -> int | None:
    """The last step that a training in the folder, or in one of its members, has told of."""
    try:
        newest = max(folder.glob("**/metrics.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        with newest.open("rb") as file:
            file.seek(max(0, newest.stat().st_size - TAIL))
            lines = file.read().split(b"\n")
        return int(json.loads(lines[-2])["step"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None  # none yet, half a line, or a folder that is being cleared
