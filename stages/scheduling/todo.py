"""Which stages of a run jobs have still to be made for.

- a job cannot be taken back when what it was made from comes out as before, so what comes after a stage that has to be
  done is to be done too; finding it up to date costs little. A further dense baseline is nothing others are made from
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas.failures import StaleFailure
from schemas.progress import Step
from schemas.train_experts import is_further


@dataclass(frozen=True)
class Todo:
    """The stages to be done; of those in `again` all members, and those in `forced` although they are finished."""

    stages: frozenset[str]
    again: frozenset[str]
    forced: frozenset[str]


def find_todo(steps: Sequence[Step], after: Mapping[str, Sequence[str]], run_dir: Path, *, force: bool) -> Todo:
    """Look at the steps in order, `after`: the stages that each has to wait for.

    Raises StaleFailure for one that is finished otherwise than asked for, unless forced.
    """
    todo, again, forced, beside = set[str](), set[str](), set[str](), set[str]()
    for command in dict.fromkeys(step.stage for step in steps):
        states = {step.state for step in steps if step.stage == command}
        if "again" in states and not force:
            step = next(step for step in steps if step.stage == command and step.state == "again")
            raise StaleFailure(
                f"{run_dir / step.folder} is finished, but {'; '.join(step.why)}: "
                "give --force to do it again, or use another run"
            )
        if "again" in states or not (todo - beside).isdisjoint(after[command]):
            again.add(command)
        if command in again or "run" in states:
            todo.add(command)
        if all(is_further(step.folder) for step in steps if step.stage == command):
            beside.add(command)
        if force and command in again:
            forced.add(command)
    return Todo(frozenset(todo), frozenset(again), frozenset(forced))
