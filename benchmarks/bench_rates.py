"""Learning rates around the one cpipe finds by itself: validation loss at a quarter, half, one and two times the law's.

    python benchmarks/bench_rates.py 'corpus/*.jsonl.zst' [--seeds 1] [--shorter]

- the law: 0.3118 C^(-1/8), C being the FLOPs of all training that the weights have had in the end
  (`stages.engine.schedule.peak_rate`); cpipe takes the whole for Muon, half for AdamW, and half of that for what was
  trained before. The table has shares of the whole
- decoders as in benchmarks/bench_muon.py, from nothing, with a cosine: 0.3, 1.3 and 5.2 M parameters, each with Muon
  and the smaller two with AdamW
- then what goes on from a seed at a constant rate, its optimizer Muon: all text (dense), and three sources, each by a
  model of its own and an eighth of the batch (experts), whose mean is printed
- --shorter: without the largest and AdamW's second. One thread; about 70 minutes, 35 with --shorter
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from bench_muon import BATCH, LENGTH, VALIDATION, Text, shape_of, tokenized
from loguru import logger
from torch import nn

from schemas.decoder import DecoderConfig
from schemas.tokenize_text import TokenizeManifest
from schemas.training import TrainingConfig
from stages.data.batches import Rows
from stages.data.token_store import TokenStore
from stages.engine.loop import train
from stages.engine.schedule import GOES_ON, OF_ADAMW, peak_rate
from stages.nn.decoder import Decoder, NextTokenLoss

SHARES = (0.25, 0.5, 1.0, 2.0)
SOURCES = 3  # that experts are trained on


class Case(NamedTuple):
    """A training from nothing."""

    optimizer: str
    width: int
    layers: int
    steps: int
    longer: bool = False  # left out of a shorter benchmark


CASES = (
    Case("muon", 64, 3, 1000),
    Case("muon", 128, 5, 600),
    Case("muon", 256, 6, 300, longer=True),
    Case("adamw", 64, 3, 1000),
    Case("adamw", 128, 5, 600, longer=True),
)
SEED = Case("muon", 64, 3, 1600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="+", help="Files, folders or patterns, as for `cpipe tokenize`.")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--shorter", action="store_true")
    parser.add_argument("--bytes-per-source", type=int, default=3_000_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logger.remove()
    with tempfile.TemporaryDirectory(prefix="bench-rates-") as folder:
        text = tokenized(Path(folder), options.inputs, options.bytes_per_source)
        sources = list(_by_source(Path(folder)))
        _head()
        for case in CASES:
            if not (case.longer and options.shorter):
                shape = shape_of(case.width, case.layers, text.vocabulary)
                _print_row(f"{case.optimizer}, {case.steps} steps", *_from_nothing(case, shape, text, options.seeds))
        _go_on(text, sources)
    print(f"\ncpipe takes 1 for Muon, {OF_ADAMW:g} for AdamW, and {GOES_ON:g} of that for what goes on")


def _by_source(run_dir: Path) -> Iterator[Text]:
    """The sources with most text, each as a text of its own."""
    tokens = TokenizeManifest.read(run_dir)
    stores = {
        split: TokenStore.open([run_dir / ref.path for ref in tokens.shards(split)]) for split in ("train", "valid")
    }
    names = np.array(stores["train"].sources)
    for name in sorted(set(names), key=lambda name: -(names == name).sum())[:SOURCES]:
        train_rows, valid_rows = (
            Rows(store, tokens.metrics.end_of_text, LENGTH, np.flatnonzero(np.array(store.sources) == name))
            for store in stores.values()
        )
        few = min(VALIDATION, valid_rows.count // BATCH)
        yield Text(
            tokens.metrics.vocab_size, train_rows, [valid_rows.batch(number, BATCH, seed=0) for number in range(few)]
        )


def _from_nothing(case: Case, shape: DecoderConfig, text: Text, seeds: int) -> tuple[float, list[float]]:
    """The law's rate, and at each share of it the mean loss over the seeds."""
    law, losses = _law(_new(shape, 0), case.steps, BATCH), []
    for share in SHARES:
        found = []
        for seed in range(seeds):
            module = _new(shape, seed)
            _train(module, text, case.optimizer, law * share, case.steps, BATCH, seed=seed)
            found.append(_loss(module, text))
        losses.append(statistics.mean(found))
    return law, losses


def _go_on(text: Text, sources: list[Text]) -> None:
    shape = shape_of(SEED.width, SEED.layers, text.vocabulary)
    seed = _new(shape, 0)
    _train(seed, text, "muon", _law(seed, SEED.steps, BATCH), SEED.steps, BATCH, schedule="constant")
    for name, texts, batch in (("dense", [text], BATCH), ("experts", sources, 1)):
        law, losses = _law(seed, SEED.steps, batch, SEED.steps * BATCH * LENGTH) / GOES_ON, []
        for share in SHARES:
            found = []
            for each in texts:
                module = copy.deepcopy(seed)
                _train(module, each, "muon", law * share, SEED.steps, batch, seed=1)
                found.append(_loss(module, each))
            losses.append(statistics.mean(found))
        _print_row(f"{name}, {SEED.steps} steps from a seed of as many", law, losses)


def _law(module: nn.Module, steps: int, batch: int, seen: int = 0) -> float:
    return peak_rate(_settings("muon", None, steps, batch), module, seen)


def _new(shape: DecoderConfig, seed: int) -> NextTokenLoss:
    torch.manual_seed(seed)
    return NextTokenLoss(Decoder(shape))


def _settings(optimizer: str, rate: float | None, steps: int, batch: int, **changes: object) -> TrainingConfig:
    fixed = {"engine": "torch", "precision": "fp32", "compile": "off", "tensorboard": False, "sequence_length": LENGTH}
    own = {"optimizer": optimizer, "learning_rate": rate, "steps": steps, "batch_size": batch, **changes}
    return TrainingConfig.model_validate({**fixed, "checkpoint_every": steps, "log_every": steps, **own})


def _train(
    module: nn.Module, text: Text, optimizer: str, rate: float, steps: int, batch: int, seed: int = 0, **changes: object
) -> None:
    config = _settings(optimizer, rate, steps, batch, seed=seed, **changes)
    with tempfile.TemporaryDirectory(prefix="bench-rates-") as folder:
        train(module, text.rows.batches(batch, seed=seed), config, Path(folder), optimizer)


@torch.no_grad()
def _loss(module: nn.Module, text: Text) -> float:
    """Mean over the validation rows, nats per token."""
    device = next(module.parameters()).device
    return float(torch.stack([module(rows.to(device))["loss"] for rows in text.validation]).mean())


def _head() -> None:
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {BATCH} rows of {LENGTH} tokens a step\n")
    print(f"| training | the law's rate | {' | '.join(f'{share:g} of it' for share in SHARES)} |")
    print(f"|---|--:|{'--:|' * len(SHARES)}", flush=True)


def _print_row(name: str, law: float, losses: list[float]) -> None:
    best = min(losses)
    cells = (f"**{loss:.3f}**" if loss == best else f"{loss:.3f}" for loss in losses)
    print(f"| {name} | {law:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
