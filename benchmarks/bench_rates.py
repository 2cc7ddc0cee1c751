"""Learning rates around the one cpipe finds by itself: validation loss at a quarter, half, one and two times the law's.

    python benchmarks/bench_rates.py 'corpus/*.jsonl.zst' [--seeds 1] [--longer]

- the law: 0.3118 C^(-1/8), C being 6 FLOPs for each weight and each token it has seen in the end; the table has shares
  of it, and which one cpipe takes (`stages.engine.schedule.peak_rate`)
- decoders as in benchmarks/bench_muon.py, from nothing, with a cosine: 0.3 and 1.3 M parameters with Muon, the smaller
  one with AdamW; --longer also 5.2 M with Muon and 1.3 M with AdamW. --seeds: mean losses over so many
- then what goes on from a seed of 0.3 M at a constant rate: all text (dense), and the three sources with most
  documents, each by a model of its own with an eighth of the batch (experts), whose mean is printed; by Muon, by AdamW,
  and by adapters of rank 16
- one thread; about 35 minutes, or 70
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
from bench_muon import BATCH, LENGTH, VALIDATION, Text, shape_of, tokenized, validation_loss
from loguru import logger
from torch import nn

from schemas.decoder import DecoderConfig
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import LoraConfig
from schemas.training import TrainingConfig
from stages.data.batches import Rows
from stages.data.token_store import TokenStore
from stages.engine.loop import train
from stages.engine.schedule import GOES_ON, OF_ADAMW, peak_rate
from stages.nn.decoder import Decoder, NextTokenLoss
from stages.nn.lora import add_adapters

SHARES = (0.25, 0.5, 1.0, 2.0)
SOURCES = 3  # that experts are trained on


class Case(NamedTuple):
    """A training from nothing."""

    optimizer: str
    width: int
    layers: int
    steps: int
    longer: bool = False  # left out unless --longer


CASES = (
    Case("muon", 64, 3, 1000),
    Case("muon", 128, 5, 600),
    Case("muon", 256, 6, 300, longer=True),
    Case("adamw", 64, 3, 1000),
    Case("adamw", 128, 5, 600, longer=True),
)
SEED, ON = Case("muon", 64, 3, 1600), 800  # what goes on, and for so many steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="+", help="Files, folders or patterns, as for `cpipe tokenize`.")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--longer", action="store_true")
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
            if options.longer or not case.longer:
                _from_nothing(case, text, options.seeds)
        _go_on(text, sources)


def _by_source(run_dir: Path) -> Iterator[Text]:
    """The sources with most documents, each as a text of its own."""
    tokens = TokenizeManifest.read(run_dir)
    stores = {
        split: TokenStore.open([run_dir / ref.path for ref in tokens.shards(split)]) for split in ("train", "valid")
    }
    names = np.array(stores["train"].sources)
    for name in sorted(set(names), key=lambda name: (-(names == name).sum(), name))[:SOURCES]:
        train_rows, valid_rows = (
            Rows(store, tokens.metrics.end_of_text, LENGTH, np.flatnonzero(np.array(store.sources) == name))
            for store in stores.values()
        )
        few = max(1, min(VALIDATION, valid_rows.count // BATCH))
        yield Text(
            tokens.metrics.vocab_size, train_rows, [valid_rows.batch(number, BATCH, seed=0) for number in range(few)]
        )


def _from_nothing(case: Case, text: Text, seeds: int) -> None:
    shape, losses = shape_of(case.width, case.layers, text.vocabulary), []
    law = _law(_new(shape, 0), case.steps, BATCH, 0)
    for share in SHARES:
        found = []
        for seed in range(seeds):
            module = _new(shape, seed)
            _train(module, text, case.optimizer, law * share, case.steps, BATCH, seed=seed)
            found.append(validation_loss(module, text))
        losses.append(statistics.mean(found))
    size = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    _print_row(f"{size:.1f} M, {case.optimizer}", law, OF_ADAMW if case.optimizer == "adamw" else 1.0, losses)


def _go_on(text: Text, sources: list[Text]) -> None:
    seed = _new(shape_of(SEED.width, SEED.layers, text.vocabulary), 0)
    law = _law(seed, SEED.steps, BATCH, 0)
    _train(seed, text, "muon", law, SEED.steps, BATCH, schedule="constant")
    for name, texts, batch, optimizer, taken in (
        ("dense, muon", [text], BATCH, "muon", GOES_ON),
        ("experts, muon", sources, 1, "muon", GOES_ON),
        ("experts, adamw", sources, 1, "adamw", GOES_ON * OF_ADAMW),
        ("experts, adapters by adamw", sources, 1, "adamw", OF_ADAMW),
    ):
        law, losses = _law(seed, ON, batch, SEED.steps * BATCH * LENGTH), []
        for share in SHARES:
            found = []
            for each in texts:
                module = copy.deepcopy(seed)
                if "adapters" in name:
                    add_adapters(module.decoder, LoraConfig(), seed=0)
                _train(module, each, optimizer, law * share, ON, batch, seed=1)
                found.append(validation_loss(module, each))
            losses.append(statistics.mean(found))
        _print_row(f"from a seed: {name}", law, taken, losses)


def _law(module: nn.Module, steps: int, batch: int, seen: int) -> float:
    """The whole of it."""
    return peak_rate(_settings("muon", None, steps, batch), module, seen) / (GOES_ON if seen else 1.0)


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


def _head() -> None:
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {BATCH} rows of {LENGTH} tokens a step\n")
    print(f"| training | the law's rate | {' | '.join(f'× {share:g}' for share in SHARES)} | cpipe takes |")
    print(f"|---|--:|{'--:|' * len(SHARES)}--:|", flush=True)


def _print_row(name: str, law: float, taken: float, losses: list[float]) -> None:
    best = min(losses)
    cells = (f"**{loss:.3f}**" if loss == best else f"{loss:.3f}" for loss in losses)
    print(f"| {name} | {law:g} | {' | '.join(cells)} | × {taken:g} |", flush=True)


if __name__ == "__main__":
    main()
