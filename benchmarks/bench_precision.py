"""What bf16 and compiling cost and gain: validation loss after the same steps, and the CPU time of each.

    python benchmarks/bench_precision.py 'corpus/*.jsonl.zst' [--steps 400] [--seeds 3] [--width 128] [--layers 5]

- decoders, rows and validation as in benchmarks/bench_muon.py; every setting that is not given is cpipe's own, the
  learning rate and the optimizer among them
- of each seed every kind has the same first weights and the same batches; the losses are computed in fp32
- CPU seconds hold what compiling takes
- one thread; 20 minutes on a processor with bf16 instructions, more without
"""

import os
import resource
import statistics
import tempfile
from pathlib import Path

import torch
from bench_muon import BATCH, LENGTH, Text, options_of, shape_of, tokenized, validation_loss

from schemas.decoder import DecoderConfig
from schemas.training import TrainingConfig
from stages.engine.loop import train
from stages.engine.processes import bf16_is_fast, find_place
from stages.nn.decoder import Decoder, NextTokenLoss

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process and what it waits for, so that it is counted
KINDS = {
    "fp32": {"precision": "fp32", "compile": "off"},
    "fp32, compiled": {"precision": "fp32", "compile": "on"},
    "bf16": {"precision": "bf16", "compile": "off"},
    "bf16, compiled": {"precision": "bf16", "compile": "on"},
}


def main() -> None:
    options = options_of(__doc__, steps=400, seeds=3)
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="bench-precision-") as folder:
        text = tokenized(Path(folder), options.inputs, options.bytes_per_source)
        shape = shape_of(options.width, options.layers, text.vocabulary)
        for seed in range(options.seeds):
            for kind in KINDS:
                found[kind].append(_trained(text, shape, kind, options.steps, seed))
    _print(found, shape, options.steps)


def _trained(text: Text, shape: DecoderConfig, kind: str, steps: int, seed: int) -> tuple[float, float]:
    """Validation loss in nats per token, and CPU seconds."""
    fixed = {"engine": "torch", "tensorboard": False, "checkpoint_every": steps, "log_every": steps}
    own = {"steps": steps, "batch_size": BATCH, "sequence_length": LENGTH, "seed": seed, **KINDS[kind]}
    config = TrainingConfig.model_validate({**fixed, **own})
    torch.manual_seed(seed)
    loss = NextTokenLoss(Decoder(shape))
    begun = _spent()
    with tempfile.TemporaryDirectory(prefix="bench-precision-") as folder:
        train(loss, text.rows.batches(BATCH, seed=seed), config, Path(folder), kind)
    seconds = _spent() - begun
    value = validation_loss(loss, text)
    print(f"{kind}, seed {seed}: {steps} steps, {seconds:.0f} CPU s, loss {value:.4f}", flush=True)
    return value, seconds


def _spent() -> float:
    """CPU seconds of this process and of those it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _print(found: dict[str, list[tuple[float, float]]], shape: DecoderConfig, steps: int) -> None:
    weights = sum(parameter.numel() for parameter in Decoder(shape).parameters()) / 1e6
    native = "" if bf16_is_fast(find_place().device) else ", bf16 emulated"
    print(f"\n{weights:.2f} M parameters, {steps} steps, {torch.get_num_threads()} threads{native}\n")
    print("| | validation loss | against fp32 | CPU s, of fp32 |\n|---|--:|--:|--:|")
    exact = found["fp32"]
    for kind, rows in found.items():
        apart = [loss - reference for (loss, _), (reference, _) in zip(rows, exact, strict=True)]
        spread = f" ± {statistics.stdev(apart):.4f}" if len(apart) > 1 and kind != "fp32" else ""
        time_ = statistics.median(own / all_ for (_, own), (_, all_) in zip(rows, exact, strict=True))
        mean = statistics.mean(loss for loss, _ in rows)
        print(f"| {kind} | {mean:.4f} | {statistics.mean(apart):+.4f}{spread} | {time_:.2f} |")


if __name__ == "__main__":
    main()
