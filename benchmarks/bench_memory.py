"""Memory: the peak of real training steps beside what `cpipe plan` says of them.

    python benchmarks/bench_memory.py [--rows '*'] [--experts 4] [--threads 1] [--steps 3]

- the decoder has 6 layers of width 256 and 8,192 tokens (8.9 M parameters); every training that plan lists for it is
  really made, at 8 rows of 256 tokens, and the seed's in other settings too
- each row is a process of its own. It trains a tiny model first, so that libraries have what they take, and the peak of
  what comes after is measured: resident memory on a processor, what torch had of a GPU where there is one
- plan knows weights, gradients, the optimizer and what a backward pass needs; not what an allocator
  holds on to, so glibc is told to hold on to little
"""

import argparse
import fnmatch
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from schemas.compose_model import BridgeTraining, ComposeConfig
from schemas.decoder import DecoderConfig, DecoderShape
from schemas.plan_training import PlanConfig, PlannedTraining
from schemas.train_experts import ExpertsConfig
from schemas.train_gates import GatesConfig
from schemas.train_seed import SeedConfig
from schemas.training import TrainingConfig
from stages import plan_training
from stages.engine.loop import train
from stages.engine.processes import find_place

VOCAB, ROWS, LENGTH = 8192, 8, 256
MIB = 2**20
STATUS, PEAK_AGAIN = Path("/proc/self/status"), Path("/proc/self/clear_refs")
AS_IT_COMES = "seed"
# The seed's training in other settings.
SETTINGS: dict[str, dict[str, Any]] = {
    "micro-batches of 2 rows": {"micro_batch_size": 2},
    "activation checkpointing": {"activation_checkpointing": True},
    "bf16": {"precision": "bf16"},
    "Muon": {"optimizer": "muon"},
    "DeepSpeed, ZeRO 0": {"engine": "deepspeed"},
    "DeepSpeed, ZeRO 2": {"engine": "deepspeed", "zero_stage": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="*", help="pattern of the rows' names")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--measure", metavar="ROW", help="only train this row and print its peak")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    logger.remove()
    configs = dict(_configs(asked.experts, asked.steps))
    if asked.measure:
        print(_peak(configs[asked.measure], asked.measure))
        return
    print("| training | planned, MiB | weights | gradients | optimizer | backward pass | peak, MiB | peak / planned |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, config in configs.items():
        if fnmatch.fnmatch(name, asked.rows):
            peak = _measured(name, asked)
            _print(name, _planned(config, name), peak)
    place = find_place()
    device = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "cpu"
    print(f"\n{ROWS} rows of {LENGTH} tokens, an expert's {ROWS // asked.experts}; {asked.experts} experts; {device},")
    print(f"torch {torch.__version__}")


def _configs(experts: int, steps: int) -> Iterator[tuple[str, PlanConfig]]:
    """For every row, settings in which the training of its name stands; a seed in other settings is named by them."""
    plain = _config(experts, steps)
    for planned in plan_training.run(plain, Path("nowhere")).trainings:
        yield planned.name, plain
    for name, changes in SETTINGS.items():
        yield f"{AS_IT_COMES}, {name}", _config(experts, steps, **changes)


def _config(experts: int, steps: int, **changes: Any) -> PlanConfig:
    known = {
        "steps": steps, "checkpoint_every": steps, "precision": "fp32", "engine": "torch", "compile": "off",
        "optimizer": "adamw",
    }  # fmt: skip
    training = TrainingConfig(
        **{**known, "batch_size": ROWS, "sequence_length": LENGTH, "tensorboard": False, **changes}
    )
    return PlanConfig(
        seed=SeedConfig(model=DecoderShape(tie_word_embeddings=False), training=training),
        experts=ExpertsConfig(training=training),
        gates=GatesConfig(modes=("joint",), training=training),
        compositions=(
            ComposeConfig(
                training=training, bridge_training=BridgeTraining(bridge_steps=steps, bridge_batch_size=ROWS)
            ),
        ),
        vocab_size=VOCAB, clusters=experts, flops_per_second=1.0,
    )  # fmt: skip


def _planned(config: PlanConfig, name: str) -> PlannedTraining:
    found = {planned.name: planned for planned in plan_training.run(config, Path("nowhere")).trainings}
    return found[name.partition(",")[0]]


def _measured(name: str, asked: argparse.Namespace) -> int:
    numbers = [f"--{key}={getattr(asked, key)}" for key in ("experts", "threads", "steps")]
    command = [sys.executable, __file__, "--measure", name, *numbers]
    freed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed, glibc must not keep
    done = subprocess.run(command, env=freed, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def _peak(config: PlanConfig, name: str) -> int:
    """Bytes above what there was before."""
    wanted = name.partition(",")[0]
    shape = DecoderConfig(**config.seed.model.model_dump(), vocab_size=VOCAB, max_position_embeddings=LENGTH)
    tiny = shape.model_copy(
        update={"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    )
    _train(config, tiny, wanted)
    place = find_place()
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place.device)
        before = torch.cuda.memory_allocated(place.device)
        _train(config, shape, wanted)
        return torch.cuda.max_memory_allocated(place.device) - before
    PEAK_AGAIN.write_text("5")  # proc(5): the peak starts from what there is now
    before = _resident("VmRSS")
    _train(config, shape, wanted)
    return _resident("VmHWM") - before


def _train(config: PlanConfig, shape: DecoderConfig, wanted: str) -> None:
    job = next(job for job in plan_training.jobs(config, shape, config.clusters, {}, seen=0) if job.name == wanted)
    size = (job.training.batch_size, LENGTH + 1)
    batch = torch.randint(shape.vocab_size, size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as folder:
        train(job.make(), lambda _: batch, job.training, Path(folder), wanted)


def _resident(kind: str) -> int:
    found = re.search(rf"{kind}:\s+(\d+) kB", STATUS.read_text())
    assert found, f"{STATUS} has no {kind}"
    return 1024 * int(found[1])


def _print(name: str, planned: PlannedTraining, peak: int) -> None:
    memory = planned.memory
    parts = (memory.total, memory.weights, memory.gradients, memory.optimizer, memory.copies + memory.activations, peak)
    numbers = " | ".join(f"{part / MIB:.0f}" for part in parts)
    print(f"| {name} | {numbers} | {peak / memory.total:.2f} |", flush=True)


if __name__ == "__main__":
    main()
