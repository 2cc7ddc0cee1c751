"""A model small enough to train in milliseconds, for tests in this process and in others.

`started` is a process that trains in a folder once with each of its settings, and writes the weights there. Its
environment tells it to end at step `DEATH`, with `KILL` by a signal; of bad rows at the steps `BAD`; of the seconds
that every step takes (`PAUSE`), and every fsync (`SLOW_DISK`). Every step leaves its number in FOLDER/step-RANK.

All are forked from one process that has imported the libraries already, which takes longer than they train.
"""

import math
import multiprocessing
import os
import signal
import sys
import time
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import _forkserver  # type: ignore[attr-defined]
from multiprocessing.process import BaseProcess
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from schemas.failures import Failure
from schemas.training import TrainingConfig
from stages.engine.loop import train

IMPORTED = (
    "toy_training", "stages.engine.deepspeed_engine", "torch._dynamo", "torch._inductor.compile_fx", "deepspeed",
    "deepspeed.module_inject", "deepspeed.ops.adam", "deepspeed.runtime.zero.stage_1_and_2",
)  # fmt: skip  # before a process is forked: what takes longest
VOCAB = 17
BAD = VOCAB  # a token with which the loss is infinite, though its gradient is not


class Toy(nn.Module):
    """Next-token loss of an embedding, a hidden layer and a norm: matrices, vectors and something frozen."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCAB, 8)
        self.hidden = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.out = nn.Linear(12, VOCAB, bias=False)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.dropout = dropout

    def forward(self, rows):
        bad, rows = (rows == BAD).any(), rows.clamp(max=VOCAB - 1)
        x = F.gelu(self.hidden(F.dropout(self.embed(rows[:, :-1]), self.dropout)))
        x = self.norm(x + self.frozen(x))
        loss = F.cross_entropy(self.out(x).flatten(0, 1), rows[:, 1:].flatten())
        loss = loss + torch.where(bad, math.inf, 0.0)
        return {"loss": loss, "size": x.detach().square().mean()}


def config(**changes):
    settings = {
        "steps": 8, "batch_size": 4, "sequence_length": 6, "learning_rate": 1e-2, "warmup": 0.25, "log_every": 1,
        "checkpoint_every": 3, "engine": "torch", "optimizer": "adamw", "precision": "fp32",
        "gradient_clipping": 0.85,  # of some steps
    }  # fmt: skip
    return TrainingConfig(**{**settings, **changes})


def batch_at(step):
    return torch.randint(VOCAB, (4, 7), generator=torch.Generator().manual_seed(100 + step))


def batch_with(*bad):
    """`batch_at`, with a bad token in the second row of the steps `bad`; with two processes, the second gets it."""

    def batches(step):
        rows = batch_at(step)
        if step in bad:
            rows[1, 2] = BAD
        return rows

    return batches


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


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


def started(folder: Path, *settings: TrainingConfig, environment: dict[str, str] | None = None) -> BaseProcess:
    """A process that trains; what it says of errors is in FOLDER/errors-RANK."""
    folder.mkdir(exist_ok=True)
    texts = [one.model_dump_json() for one in settings]
    process = forks().Process(target=train_as_told, args=(folder, texts, environment or {}))
    process.start()
    return process


def train_as_told(folder: Path, settings: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    rank = os.environ.get("RANK", "0")
    with (folder / f"errors-{rank}").open("w") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sync, slow = os.fsync, float(os.environ.get("SLOW_DISK", "0"))
    os.fsync = lambda handle: time.sleep(slow) or sync(handle)  # type: ignore[assignment]
    batches = batch_with(*map(int, os.environ.get("BAD", "").split()))

    def batch_with_trace(step):
        half = folder / f".step-{rank}"
        half.write_text(str(step))
        half.replace(folder / f"step-{rank}")  # whole, also for who kills this process now
        if step == int(os.environ.get("DEATH", "-1")):
            os.kill(os.getpid(), signal.SIGKILL) if "KILL" in os.environ else sys.exit(9)
        time.sleep(float(os.environ.get("PAUSE", "0")))
        return batches(step)

    for number, text in enumerate(settings):
        module = Toy(dropout=float(os.environ.get("DROPOUT", "0")))
        try:
            train(module, batch_with_trace, TrainingConfig.from_json(text), folder, "toy")
        except Failure as failure:
            print(failure, file=sys.stderr)
            sys.exit(failure.exit_code)
        safetensors.torch.save_file(weights(module), folder / f"weights-{number}-{rank}.safetensors")
