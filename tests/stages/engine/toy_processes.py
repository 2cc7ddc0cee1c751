"""Trainings in processes of their own, one or two together: of the toy, or of another module.

`started` is a process that trains in a folder once with each of its settings, and writes weights and metrics there. Its
environment tells it to end at step `DEATH`, with `KILL` by a signal; of bad rows at the steps `BAD`; of the seconds
that every step takes (`PAUSE`), and every fsync (`SLOW_DISK`). Every step leaves its number in FOLDER/step-RANK.

All are forked from one process that has imported the libraries already, which takes longer than they train.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import _forkserver  # type: ignore[attr-defined]
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from toy_training import Toy, batch_with, weights

from schemas.failures import Failure
from schemas.training import TrainingConfig, TrainingMetrics
from stages.engine.loop import train

IMPORTED = (
    "toy_processes", "stages.engine.deepspeed_engine", "torch._dynamo", "torch._inductor.compile_fx", "deepspeed",
    "deepspeed.module_inject", "deepspeed.ops.adam", "deepspeed.runtime.zero.stage_1_and_2",
)  # fmt: skip  # before a process is forked: what takes longest


@cache
def forks() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    _forkserver._stop()  # another test's, which has imported less and would otherwise be taken
    context.set_forkserver_preload([*IMPORTED])
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[3]), before])
    first = context.Process()  # which the server starts with
    first.start()
    first.join()
    os.environ["PYTHONPATH"] = before
    return context


def toy() -> nn.Module:
    """The module that is trained, unless another is asked for."""
    return Toy(dropout=float(os.environ.get("DROPOUT", "0")))


def toy_rows(step: int) -> Tensor:
    """The rows it is trained on."""
    return batch_with(*map(int, os.environ.get("BAD", "").split()))(step)


def started(
    folder: Path,
    *settings: TrainingConfig,
    environment: dict[str, str] | None = None,
    make: Callable[[], nn.Module] = toy,
    rows: Callable[[int], Tensor] = toy_rows,
) -> BaseProcess:
    """A process that trains; what it says of errors is in FOLDER/errors-RANK. `make` and `rows` are imported there."""
    folder.mkdir(exist_ok=True)
    texts = [one.model_dump_json() for one in settings]
    process = forks().Process(target=train_as_told, args=(folder, texts, environment or {}, make, rows))
    process.start()
    return process


def train_as_told(
    folder: Path,
    settings: list[str],
    environment: dict[str, str],
    make: Callable[[], nn.Module],
    rows: Callable[[int], Tensor],
) -> None:
    os.environ.update(environment)
    rank = os.environ.get("RANK", "0")
    with (folder / f"errors-{rank}").open("w") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sync, slow = os.fsync, float(os.environ.get("SLOW_DISK", "0"))
    os.fsync = lambda handle: time.sleep(slow) or sync(handle)  # type: ignore[assignment]

    def rows_with_trace(step):
        half = folder / f".step-{rank}"
        half.write_text(str(step))
        half.replace(folder / f"step-{rank}")  # whole, also for who kills this process now
        if step == int(os.environ.get("DEATH", "-1")):
            os.kill(os.getpid(), signal.SIGKILL) if "KILL" in os.environ else sys.exit(9)
        time.sleep(float(os.environ.get("PAUSE", "0")))
        return rows(step)

    for number, text in enumerate(settings):
        module = make()
        try:
            metrics = train(module, rows_with_trace, TrainingConfig.from_json(text), folder, "toy")
        except Failure as failure:
            print(failure, file=sys.stderr)
            sys.exit(failure.exit_code)
        safetensors.torch.save_file(weights(module), folder / f"weights-{number}-{rank}.safetensors")
        (folder / f"metrics-{number}-{rank}.json").write_text(metrics.model_dump_json())


def ended(process, folder, rank=0, seconds=60):
    process.join(seconds)
    if process.is_alive():
        process.kill()
        pytest.fail("the process does not end")
    return process.exitcode, (folder / f"errors-{rank}").read_text()


def wait_for_step(folder, step, process, rank=0):
    trace = folder / f"step-{rank}"
    for _ in range(3000):
        if trace.is_file() and int(trace.read_text() or 0) >= step:
            return
        assert process.is_alive(), (folder / f"errors-{rank}").read_text()
        time.sleep(0.01)
    pytest.fail("the training does not get on")


def in_two(folder, *settings, **task):
    """Two processes of one training, as a launcher starts them."""
    return together(2, folder, *settings, **task)


def together(world, folder, *settings, environment=None, **task):
    """As many processes of one training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), **(environment or {})}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(world))
    return [started(folder, *settings, environment=one, **task) for one in ranks]


def weights_of(folder, rank=0, number=0):
    return safetensors.torch.load_file(folder / f"weights-{number}-{rank}.safetensors")


def metrics_of(folder, rank=0, number=0):
    return TrainingMetrics.from_json((folder / f"metrics-{number}-{rank}.json").read_bytes())
