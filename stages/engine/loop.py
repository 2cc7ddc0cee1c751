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
from stages.engine.engines import Engine, choose_precision, start_engine
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
    first_step, started = progress.step, time.monotonic()
    with _stop_requested() as stopping:
        for step in range(first_step, config.steps):
            torch.manual_seed(config.seed * 1_000_003 + step)
            rate = learning_rate(step, config)
            parts, norm = engine.step(_share(batch_at(step), config, place), rate)
            losses.append(_checked_loss(parts["loss"], norm, step, label, place))
            progress = Progress(step=step + 1, tokens=_tokens(config, step + 1), losses=tuple(losses))
            speed = (step + 1 - first_step) / (time.monotonic() - started)
            _report(label, folder, progress, config, parts, norm, rate, speed, place)
            stop = any_process(stopping(), place)
            if stop or ((step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps):
                _save(engine, saved, progress, place)
            if stop and step + 1 < config.steps:
                raise InterruptedFailure(f"{label} stopped after step {step + 1}: run the same command to resume")
    _load_final(module, engine)
    if place.rank == 0:
        shutil.rmtree(saved, ignore_errors=True)
    return _metrics(progress, config, engine, place)


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


def _tokens(config: TrainingConfig, steps: int) -> int:
    return steps * config.batch_size * config.sequence_length


def _save(engine: Engine, saved: Path, progress: Progress, place: Place) -> None:
    state = engine.state()  # every process takes part: with ZeRO the pieces are gathered
    if place.rank == 0:
        checkpoints.save(saved, state, progress)
    if place.world > 1:
        torch.distributed.barrier()


def _load_final(module: nn.Module, engine: Engine) -> None:
    """Put the whole weights into the module, also where ZeRO had left it only a part of them."""
    state = engine.state()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.data = state[f"weight/{name}"].to(parameter.device).clone()


def _report(
    label: str,
    folder: Path,
    progress: Progress,
    config: TrainingConfig,
    parts: dict[str, Tensor],
    norm: float,
    rate: float,
    steps_per_second: float,
    place: Place,
) -> None:
    """Move the progress bar; every `log_every` steps add a line to the log and to metrics.jsonl."""
    if place.rank:
        return
    tokens_per_second = steps_per_second * config.batch_size * config.sequence_length
    text = f"loss {progress.losses[-1]:.3f} · {tokens_per_second:,.0f} tokens/s"
    logger.bind(task=label, done=progress.step, total=config.steps).debug("{}", text)
    if progress.step % config.log_every and progress.step != config.steps:
        return
    logger.info("{} {}/{} · {} · rate {:.2e}", label, progress.step, config.steps, text, rate)
    numbers = {name: float(value) for name, value in parts.items()}
    line = {
        "step": progress.step,
        "tokens": progress.tokens,
        **numbers,
        "learning_rate": rate,
        "gradient_norm": norm,
        "tokens_per_second": tokens_per_second,
    }
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _metrics(progress: Progress, config: TrainingConfig, engine: Engine, place: Place) -> TrainingMetrics:
    losses = progress.losses
    last = losses[-max(1, len(losses) // 20) :]
    every = max(1, len(losses) // CURVE_POINTS)
    pieces = [losses[start : start + every] for start in range(0, len(losses), every)]
    return TrainingMetrics(
        steps=progress.step,
        tokens=progress.tokens,
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
