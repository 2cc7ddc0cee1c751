"""Trainings for processes of their own, and a parent for them.

python toy_members.py FOLDER AT-ONCE NAME...: trains toys of these names in FOLDER, each with its trace of steps.
"""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from toy_training import Toy, batch_at, config, weights

from schemas import launch
from schemas.failures import DivergedFailure, Failure
from stages.engine.loop import train
from stages.engine.members import Member, train_members

STEPS = 60


def member(folder: Path, name: str) -> Member:
    """Its name says what it does: train, diverge, crash, be-killed, or else tell of its process."""
    return Member(name, partial(behave, folder, name), folder / f"{name}.log")


def behave(folder: Path, name: str) -> None:
    if name.startswith("train"):
        train_toy(folder / name)
    elif name.startswith("diverge"):
        raise DivergedFailure(f"{name}: the loss of step 3 is nan")
    elif name.startswith("crash"):
        raise ValueError("a bug\nof two lines")
    elif name.startswith("be-killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        tell(folder, name)


def tell(folder: Path, name: str) -> None:
    begun = time.monotonic()
    time.sleep(0.5)
    print("said to nobody")
    content = {
        "pid": os.getpid(),
        "group": os.getpgid(0),
        "threads": torch.get_num_threads(),
        "device": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "counts_from": launch.STARTED,
        "begun": begun,
        "ended": time.monotonic(),
    }
    (folder / f"{name}.json").write_text(json.dumps(content))


def train_toy(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(float(os.environ.get("PAUSE_BEFORE", "0")))

    def batches(step: int) -> torch.Tensor:
        (folder / "step").write_text(str(step))
        time.sleep(float(os.environ.get("PAUSE", "0")))
        return batch_at(step)

    module = Toy(dropout=0.2)
    train(module, batches, config(steps=STEPS, checkpoint_every=1000), folder, folder.name)
    safetensors.torch.save_file(weights(module), folder / "weights.safetensors")


def main() -> None:
    torch.set_num_threads(1)
    folder, at_once, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    try:
        train_members([member(folder, name) for name in names], at_once)
    except Failure as failure:
        print(failure)
        sys.exit(failure.exit_code)


if __name__ == "__main__":
    main()
