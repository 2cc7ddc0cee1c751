"""The one training loop: seed, dense baseline, experts, central model and bridges all run through it.

- the batch of a step is a function of the step, and so is torch's random state: a resumed run repeats nothing, skips
  nothing, and ends with the weights of an uninterrupted one
- a step whose loss or gradient is not finite is left out, on all processes alike; too many in a row stop the training,
  and the last checkpoint stays
- SIGTERM, SIGINT, SIGUSR1 and the end of `max_minutes` end the step, write a checkpoint and stop with exit code 75:
  the same command resumes
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from loguru import logger
from torch import Tensor, nn

from schemas.failures import InterruptedFailure, UsageFailure
from schemas.training import TrainingConfig, TrainingMetrics
from stages.engine import checkpoints
from stages.engine.checkpoints import Progress, Writer
from stages.engine.compilation import choose_compile, compiler_cache, repeatable
from stages.engine.course import Course
from stages.engine.engines import Engine, start_engine
from stages.engine.optimizer import choose_optimizer
from stages.engine.precision import choose_precision
from stages.engine.processes import Place, any_process, find_place, mean_over_processes
from stages.engine.reporter import Reporter
from stages.engine.schedule import learning_rate, peak_rate
from stages.engine.stopping import Deadline, stop_requested

CURVE_POINTS = 100


def train(
    module: nn.Module,
    batch_at: Callable[[int], Tensor],
    config: TrainingConfig,
    folder: Path,
    label: str,
    write: Callable[[str], str] | None = None,
    *,
    seen: int | None = 0,
) -> TrainingMetrics:
    """Train the parameters of `module` that require a gradient; on return they hold the final weights.

    module: gives losses in nats, `module(rows)["loss"]` being optimised; the others are logged
    batch_at: int64 [batch_size, sequence_length + 1] for a step from 0 on, a pure function; where it has a method
        `describe(step)`, that names the rows when the loss is not finite
    folder: where `checkpoints/`, `metrics.jsonl`, `samples.jsonl` and `tensorboard/` go
    write: continues a prompt with the module as it is, for samples; must leave it as it is
    seen: tokens that what is trained was trained on before, None if that was elsewhere; for a rate that is not given

    Raises DivergedFailure, InterruptedFailure, and UsageFailure when the batch cannot be divided, samples cannot be
    written, or the checkpoint is another optimizer's.
    """
    place = find_place()
    _check_division(config, place)
    _check_samples(config, write, label)
    config = _with_rate(config, module, seen, label)
    engine = start_engine(module, config, place)
    saved, compiled = folder / "checkpoints", choose_compile(config, place, module)
    course = Course(_resume(engine, saved, label, choose_optimizer(config, module)), config, label, batch_at)
    deadline = Deadline(config.max_minutes)
    with (
        compiler_cache(saved / f"compiled-{place.rank}", needed=compiled),
        repeatable(place.device, needed=compiled),
        Reporter(label, folder, config, course.step, place) as reporter,
        Writer(saved) as writer,
        stop_requested() as stopping,
    ):
        for step in range(course.step, config.steps):
            torch.manual_seed(config.seed * 1_000_003 + step)
            rate = learning_rate(step, config)
            outcome = engine.step(_share(batch_at(step), config, place), rate)
            loss = float(mean_over_processes(outcome.parts["loss"], place))
            course.advance(loss, outcome)
            reporter.report(course.step, loss, outcome, rate, course.skipped)
            done = course.step
            if write and config.sample_every and course.step % config.sample_every == 0:
                reporter.show(course.step, write)
            writer.check()
            stop = any_process(deadline.near(writer.longest) or stopping(), place) and done < config.steps
            if stop or (done % config.checkpoint_every == 0 and done < config.steps):
                _save(engine, writer, course, place)
            if stop:
                _finish_writing(writer, place)
                raise InterruptedFailure(f"{label} stopped after step {done}: run the same command to resume")
    _load_final(module, engine)
    if place.rank == 0:
        shutil.rmtree(saved, ignore_errors=True)
    return _metrics(course, config, engine, choose_precision(config, place), compiled)


def _check_division(config: TrainingConfig, place: Place) -> None:
    rows = config.batch_size // place.world
    micro = min(config.micro_batch_size or rows, rows)
    if rows * place.world != config.batch_size or rows % micro:
        raise UsageFailure(
            f"a batch of {config.batch_size} rows does not divide into {place.world} processes with micro-batches of "
            f"{config.micro_batch_size or 'any number of'} rows: change --batch-size or --micro-batch-size"
        )


def _check_samples(config: TrainingConfig, write: Callable[[str], str] | None, label: str) -> None:
    if config.sample_every and write is None:
        raise UsageFailure(f"{label} cannot write text while it is trained: leave --sample-every out")
    if config.sample_every and config.zero_stage == 3:
        raise UsageFailure("--zero-stage 3 takes apart the weights that --sample-every needs: leave one of them out")


def _with_rate(config: TrainingConfig, module: nn.Module, seen: int | None, label: str) -> TrainingConfig:
    """The settings with a learning rate: where none is given, that which fits the size of the training."""
    rate = peak_rate(config, module, seen)
    if config.learning_rate is None:
        logger.info("{}: learning rate {:g}, by the size of the training", label, rate)
    return config.model_copy(update={"learning_rate": rate})


def _resume(engine: Engine, saved: Path, label: str, optimizer: str) -> Progress:
    if (found := checkpoints.newest(saved)) is None:
        return Progress(step=0, tokens=0, losses=())
    state, progress = found
    written_by = "muon" if any(name.startswith("momentum_buffer/") for name in state) else "adamw"
    if written_by != optimizer:
        raise UsageFailure(
            f"{saved} holds a training by {written_by}, and here it is {optimizer} that trains: remove it to begin anew"
        )
    engine.load_state(state, progress.step - progress.skipped)
    logger.info("{}: resuming after step {}", label, progress.step)
    return progress


def _share(rows: Tensor, config: TrainingConfig, place: Place) -> list[Tensor]:
    """This process's rows of the batch, in micro-batches, on its device."""
    own = rows[place.rank :: place.world].to(place.device)
    return list(own.split(min(config.micro_batch_size or len(own), len(own))))


def _save(engine: Engine, writer: Writer, course: Course, place: Place) -> None:
    state = engine.state()  # every process takes part: with ZeRO the pieces are gathered
    if place.rank == 0:
        writer.save(state, course.progress())


def _finish_writing(writer: Writer, place: Place) -> None:
    """Let no process end before the checkpoint is there: a launcher ends all when one ends."""
    writer.wait()
    if place.world > 1:
        torch.distributed.barrier()


def _load_final(module: nn.Module, engine: Engine) -> None:
    """Put the whole weights into the module, also where ZeRO had left it only a part of them."""
    state = engine.state()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.data = state[f"weight/{name}"].to(parameter.device).clone()


def _metrics(course: Course, config: TrainingConfig, engine: Engine, precision: str, compiled: bool) -> TrainingMetrics:
    losses = course.losses
    last = losses[-max(1, len(losses) // 20) :]
    every = max(1, len(losses) // CURVE_POINTS)
    pieces = [losses[start : start + every] for start in range(0, len(losses), every)]
    return TrainingMetrics(
        steps=course.step,
        tokens=course.tokens,
        first_loss=losses[0],
        final_loss=sum(last) / len(last),
        learning_rate=config.learning_rate,
        curve=tuple(sum(piece) / len(piece) for piece in pieces),
        skipped=course.skipped,
        engine=engine.name,
        precision=precision,
        compiled=compiled,
    )
