"""The one training loop: seed, dense baseline, experts, central model and bridges all run through it.

- the batch of a step is a function of the step, and so is torch's random state: a resumed run repeats nothing, skips
  nothing, and ends with the weights of an uninterrupted one
- a loss or gradient that is not finite stops the training at once, on all processes; the last checkpoint stays
- SIGTERM and SIGINT end the step, write a checkpoint and stop with exit code 75: the same command resumes
"""

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from loguru import logger
from torch import Tensor, nn

from schemas.failures import DivergedFailure, InterruptedFailure, UsageFailure
from schemas.training import TrainingConfig, TrainingMetrics
from stages.engine import checkpoints
from stages.engine.checkpoints import Progress
from stages.engine.engines import Engine, start_engine
from stages.engine.precision import choose_precision
from stages.engine.processes import Place, any_process, find_place, mean_over_processes
from stages.engine.schedule import learning_rate

CURVE_POINTS = 100


def train(
    module: nn.Module, batch_at: Callable[[int], Tensor], config: TrainingConfig, folder: Path, label: str
) -> TrainingMetrics:
    """Train the parameters of `module` that require a gradient; on return they hold the final weights.

    module: gives losses in nats, `module(rows)["loss"]` being optimised; the others are logged
    batch_at: int64 [batch_size, sequence_length + 1] for a step from 0 on, a pure function
    folder: where `checkpoints/` and `metrics.jsonl` go

    Raises DivergedFailure, InterruptedFailure, and UsageFailure when the batch cannot be divided.
    """
    place = find_place()
    _check_division(config, place)
    engine = start_engine(module, config, place)
    saved = folder / "checkpoints"
    progress = _resume(engine, saved, label)
    losses = list(progress.losses)
    reporter = Reporter(label, folder, config, progress.step, place)
    with _stop_requested() as stopping:
        for step in range(progress.step, config.steps):
            torch.manual_seed(config.seed * 1_000_003 + step)
            rate = learning_rate(step, config)
            parts, norm = engine.step(_share(batch_at(step), config, place), rate)
            losses.append(_checked_loss(parts["loss"], norm, step, label, place))
            done = step + 1
            reporter.report(done, losses[-1], parts, norm, rate)
            stop = any_process(stopping(), place) and done < config.steps
            if stop or (done % config.checkpoint_every == 0 and done < config.steps):
                _save(engine, saved, losses, config, place)
            if stop:
                raise InterruptedFailure(f"{label} stopped after step {done}: run the same command to resume")
    _load_final(module, engine)
    if place.rank == 0:
        shutil.rmtree(saved, ignore_errors=True)
    return _metrics(losses, config, engine, place)


def _check_division(config: TrainingConfig, place: Place) -> None:
    rows = config.batch_size // place.world
    micro = min(config.micro_batch_size or rows, rows)
    if rows * place.world != config.batch_size or rows % micro:
        raise UsageFailure(
            f"a batch of {config.batch_size} rows does not divide into {place.world} processes with micro-batches of "
            f"{config.micro_batch_size or 'any number of'} rows: change --batch-size or --micro-batch-size"
        )


def _resume(engine: Engine, saved: Path, label: str) -> Progress:
    if (found := checkpoints.newest(saved)) is None:
        return Progress(step=0, tokens=0, losses=())
    state, progress = found
    engine.load_state(state, progress.step)
    logger.info("{}: resuming after step {}", label, progress.step)
    return progress


def _share(rows: Tensor, config: TrainingConfig, place: Place) -> list[Tensor]:
    """This process's rows of the batch, in micro-batches, on its device."""
    own = rows[place.rank :: place.world].to(place.device)
    return list(own.split(min(config.micro_batch_size or len(own), len(own))))


def _checked_loss(loss: Tensor, norm: float, step: int, label: str, place: Place) -> float:
    """The loss over all processes. A gradient must be finite too: the loss would show it only a step later."""
    value = float(mean_over_processes(loss, place))
    for name, number in (("loss", value), ("gradient", norm)):
        if not math.isfinite(number):
            raise DivergedFailure(
                f"{label}: the {name} of step {step + 1} is {number}: lower --learning-rate; "
                "the last checkpoint is kept"
            )
    return value


def _save(engine: Engine, saved: Path, losses: list[float], config: TrainingConfig, place: Place) -> None:
    state = engine.state()  # every process takes part: with ZeRO the pieces are gathered
    if place.rank == 0:
        done = len(losses)
        progress = Progress(step=done, tokens=done * config.batch_size * config.sequence_length, losses=tuple(losses))
        checkpoints.save(saved, state, progress)
    if place.world > 1:
        torch.distributed.barrier()


def _load_final(module: nn.Module, engine: Engine) -> None:
    """Put the whole weights into the module, also where ZeRO had left it only a part of them."""
    state = engine.state()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.data = state[f"weight/{name}"].to(parameter.device).clone()


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

    def report(self, step: int, loss: float, parts: dict[str, Tensor], norm: float, rate: float) -> None:
        """Tell of step number `step`, from 1."""
        if self._silent:
            return
        config = self._config
        steps_per_second = (step - self._first_step) / (time.monotonic() - self._started)
        tokens_per_second = steps_per_second * config.batch_size * config.sequence_length
        text = f"loss {loss:.3f} · {tokens_per_second:,.0f} tokens/s"
        logged = step % config.log_every == 0 or step == config.steps
        progress = logger.bind(task=self._label, done=step, total=config.steps, text=text)
        line = f"{self._label} {step}/{config.steps} · {text} · rate {rate:.2e}"
        progress.log("INFO" if logged else "DEBUG", "{}", line)
        if not logged:
            return
        numbers = {
            "step": step,
            "tokens": step * config.batch_size * config.sequence_length,
            **{name: float(value) for name, value in parts.items()},
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_second": tokens_per_second,
        }
        with self._path.open("a") as file:
            file.write(json.dumps(numbers) + "\n")


def _metrics(losses: list[float], config: TrainingConfig, engine: Engine, place: Place) -> TrainingMetrics:
    last = losses[-max(1, len(losses) // 20) :]
    every = max(1, len(losses) // CURVE_POINTS)
    pieces = [losses[start : start + every] for start in range(0, len(losses), every)]
    return TrainingMetrics(
        steps=len(losses),
        tokens=len(losses) * config.batch_size * config.sequence_length,
        first_loss=losses[0],
        final_loss=sum(last) / len(last),
        curve=tuple(sum(piece) / len(piece) for piece in pieces),
        engine=engine.name,
        precision=choose_precision(config, place),
    )


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """While inside, SIGTERM and SIGINT are remembered instead of obeyed; a second one is obeyed."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

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
