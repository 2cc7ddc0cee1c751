"""When a training stops before its end, with a checkpoint: a signal came, or the time it was given runs out.

- SIGTERM and SIGINT; SIGUSR1 is what `sbatch --signal=USR1@60` sends before Slurm ends a job or takes its nodes away
- time is kept from the start of the command, as a job's limit is, also where one command trains several models, and
  where each has a process of its own: the monotonic clock is the machine's, not the process's
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from schemas import launch

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Deadline:
    """Says when the step after this one, or the checkpoint, could end too late."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else launch.STARTED + 60 * minutes
        self._last = time.monotonic()
        self._longest = 0.0  # of a step, with whatever else came with it
        self._steps = 0

    def near(self, writing: float) -> bool:
        """To be asked once per step. `writing`: seconds a checkpoint takes to be written, beside the steps.

        The first step also compiles, half a minute that does not come again: it counts until there is a second.
        """
        now = time.monotonic()
        took, self._last = now - self._last, now
        self._longest = took if self._steps < 2 else max(self._longest, took)
        self._steps += 1
        return self._end is not None and now + 2 * (self._longest + writing) >= self._end


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """While inside, the signals are remembered instead of obeyed; a second one is obeyed."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for known, handler in before.items():
            signal.signal(known, handler)

    try:
        for number in before:
            signal.signal(number, remember)
    except ValueError:  # not the main thread: signals are not ours to catch
        before = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
