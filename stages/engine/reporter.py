"""What a training says while it runs: the progress bar, the log, metrics.jsonl, samples.jsonl, TensorBoard, W&B.

- metrics.jsonl is the table of the run, a row per logged step: polars, pandas and duckdb read it as it is
- all of it is said by the first process only, and none of it is in a manifest
- a step that was left out always has a line; what is not finite has no place in JSON and is left out of it
"""

import json
import math
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loguru import logger

from schemas.failures import UsageFailure
from schemas.training import TrainingConfig
from stages.engine.event_file import EventFile
from stages.engine.optimizer import Outcome
from stages.engine.processes import Place


class Reporter:
    """Moves the progress bar; every `log_every` steps adds a line to the log and to metrics.jsonl."""

    def __init__(self, label: str, folder: Path, config: TrainingConfig, first_step: int, place: Place) -> None:
        self._label = label
        self._path = folder / "metrics.jsonl"
        self._samples = folder / "samples.jsonl"
        self._config = config
        self._first_step = first_step
        self._started = time.monotonic()
        self._silent = place.rank > 0
        self._events: EventFile | None = None
        self._wandb: Any = None
        if self._silent:
            return
        _forget_after(first_step, self._path)
        if self._samples.exists():
            _forget_after(first_step, self._samples)
        if config.wandb:
            self._wandb = _start_wandb(label, folder, config)
        if config.tensorboard:
            self._events = EventFile(folder / "tensorboard", first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._events:
            self._events.close()
        if self._wandb:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def report(self, step: int, loss: float, outcome: Outcome, rate: float, skipped: int) -> None:
        """Tell of step number `step`, from 1; `skipped`: steps left out so far."""
        if self._silent:
            return
        config = self._config
        steps_per_second = (step - self._first_step) / (time.monotonic() - self._started)
        tokens_per_second = steps_per_second * config.tokens_per_step
        text = f"loss {loss:.3f} · {tokens_per_second:,.0f} tokens/s"
        logged = step % config.log_every == 0 or step == config.steps or not outcome.applied
        progress = logger.bind(task=self._label, done=step, total=config.steps, text=text)
        line = f"{self._label} {step}/{config.steps} · {text} · rate {rate:.2e}"
        progress.log("INFO" if logged else "DEBUG", "{}", line)
        if not logged:
            return
        numbers = {
            "step": step,
            "tokens": step * config.tokens_per_step,
            **{name: float(value) for name, value in outcome.parts.items()},
            "learning_rate": rate,
            "gradient_norm": outcome.norm,
            "tokens_per_second": tokens_per_second,
            "skipped": skipped,
        }
        numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}
        with self._path.open("a") as file:
            file.write(json.dumps(numbers) + "\n")
        rest = {name: value for name, value in numbers.items() if name != "step"}
        if self._events:
            self._events.write(step, rest)
        if self._wandb:
            self._wandb.log(rest, step=step)

    def show(self, step: int, write: Callable[[str], str]) -> None:
        """Show how the model goes on from the prompt after step number `step`."""
        if self._silent:
            return
        prompt = self._config.sample_prompt
        text = write(prompt)
        logger.info("{} {}/{} · {!r} goes on {!r}", self._label, step, self._config.steps, prompt, text)
        with self._samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")


def _forget_after(step: int, path: Path) -> None:
    """Drop the lines of steps that a resumed run does again."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")


def _start_wandb(label: str, folder: Path, config: TrainingConfig) -> Any:
    """A run of Weights & Biases, the same one when the training is resumed. Raises UsageFailure without the package."""
    try:
        import wandb
    except ImportError as error:
        raise UsageFailure(f"--wandb: {error}: pip install 'cpipe[wandb]', or leave the flag out") from error
    place = folder / "wandb"
    place.mkdir(exist_ok=True)
    name = place / "run-id"
    if not name.exists():
        name.write_text(uuid.uuid4().hex[:16])
    return wandb.init(
        project="cpipe", name=label, id=name.read_text(), resume="allow", dir=str(folder), config=config.key_settings()
    )
