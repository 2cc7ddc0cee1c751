"""What a training says while it runs: the progress bar, the log, metrics.jsonl.

- metrics.jsonl is the table of the run, a row per logged step: polars, pandas and duckdb read it as it is
- a step that was left out always has a line; what is not finite has no place in JSON and is left out of it
"""

import json
import math
import time
from pathlib import Path

from loguru import logger

from schemas.training import TrainingConfig
from stages.engine.optimizer import Outcome
from stages.engine.processes import Place


class Reporter:
    """Moves the progress bar; every `log_every` steps adds a line to the log and to metrics.jsonl."""

    def __init__(self, label: str, folder: Path, config: TrainingConfig, first_step: int, place: Place) -> None:
        self._label = label
        self._path = folder / "metrics.jsonl"
        self._config = config
        self._first_step = first_step
        self._started = time.monotonic()
        self._silent = place.rank > 0
        if not self._silent:
            self._forget_after(first_step)

    def _forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run does again."""
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        self._path.write_text("".join(kept))

    def report(self, step: int, loss: float, outcome: Outcome, rate: float, skipped: int) -> None:
        """Tell of step number `step`, from 1; `skipped`: steps left out so far."""
        if self._silent:
            return
        config = self._config
        steps_per_second = (step - self._first_step) / (time.monotonic() - self._started)
        tokens_per_second = steps_per_second * config.batch_size * config.sequence_length
        text = f"loss {loss:.3f} · {tokens_per_second:,.0f} tokens/s"
        logged = step % config.log_every == 0 or step == config.steps or not outcome.applied
        progress = logger.bind(task=self._label, done=step, total=config.steps, text=text)
        line = f"{self._label} {step}/{config.steps} · {text} · rate {rate:.2e}"
        progress.log("INFO" if logged else "DEBUG", "{}", line)
        if not logged:
            return
        numbers = {
            "step": step,
            "tokens": step * config.batch_size * config.sequence_length,
            **{name: float(value) for name, value in outcome.parts.items()},
            "learning_rate": rate,
            "gradient_norm": outcome.norm,
            "tokens_per_second": tokens_per_second,
            "skipped": skipped,
        }
        with self._path.open("a") as file:
            file.write(json.dumps({name: value for name, value in numbers.items() if math.isfinite(value)}) + "\n")
