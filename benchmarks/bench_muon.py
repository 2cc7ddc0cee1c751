"""Muon against AdamW: validation loss after the same steps, and after the same CPU time.

    python benchmarks/bench_muon.py 'corpus/*.jsonl.zst' [--steps 200] [--seeds 3] [--width 128] [--layers 5]

- the model: layers of one width, SwiGLU of 8/3 of it, heads of 32, 2,048 tokens, tied (by default 1.25 M parameters);
  8 rows of 256 tokens a step
- cpipe's own loop (`stages.engine.loop.train`) on rows of its own token store; the validation rows are of documents
  that are not trained on, and the same for every row of the table
- each optimizer has its own rates, all printed, the best first: a fixed rate would decide by itself who wins. Where the
  best is the first or the last tried, one more is tried beyond it
- a step of Muon costs more. So its best rate is trained once more, with as many steps as fit into the CPU time of
  AdamW (medians of what the rates took): the row to compare it by
- the rates are chosen with one seed of weights and order; with further ones the best are trained again, and the
  second table has their differences
- first a step of the optimizer alone, of the model's matrices, against torch.optim.Muon's, in turn: medians of CPU time
- text is tokenized into a temporary folder; 200 steps with one seed take less than 12 minutes on one core
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from loguru import logger
from torch import Tensor, nn

from schemas.decoder import DecoderConfig
from schemas.tokenize_text import TokenizeConfig, TokenizeManifest
from schemas.training import TrainingConfig
from stages import tokenize_text
from stages.data.batches import Rows
from stages.data.token_store import TokenStore
from stages.engine.loop import train
from stages.engine.muon import Muon
from stages.nn.decoder import Decoder, NextTokenLoss

LENGTH, BATCH = 256, 8  # tokens of a row, rows of a step
VALIDATION = 8  # batches
HEAD = 32  # width of one
RATES = {"adamw": (1e-3, 2e-3, 4e-3), "muon": (4e-3, 8e-3, 1.6e-2)}


class Trained(NamedTuple):
    """One row of the table; the loss in nats per token on the validation rows, the time in CPU seconds."""

    loss: float
    optimizer: str
    rate: float
    steps: int
    seconds: float
    note: str = ""


class Text(NamedTuple):
    """What is trained and validated on."""

    vocabulary: int
    rows: Rows
    validation: list[Tensor]


def main() -> None:
    options = options_of(__doc__, steps=200, seeds=1)
    with tempfile.TemporaryDirectory(prefix="bench-muon-") as folder:
        text = tokenized(Path(folder), options.inputs, options.bytes_per_source)
        shape = shape_of(options.width, options.layers, text.vocabulary)
        _print_step(shape)
        adamw, muon = (_searched(text, shape, optimizer, options.steps) for optimizer in RATES)
        cost = statistics.median(row.seconds for row in adamw) / statistics.median(row.seconds for row in muon)
        fitting = max(2, int(options.steps * cost))
        best = min(adamw), min(muon)
        same_time = _trained(text, shape, "muon", best[1].rate, fitting)
        _print([*adamw, *muon, same_time._replace(note="in the CPU time of AdamW")], best[0], shape)
        again = [(*best, same_time)]
        for seed in range(1, options.seeds):
            pair = [_trained(text, shape, one.optimizer, one.rate, options.steps, seed) for one in best]
            again.append((*pair, _trained(text, shape, "muon", best[1].rate, fitting, seed)))
    _print_seeds(again)


def options_of(about: str, *, steps: int, seeds: int) -> argparse.Namespace:
    """What the command line asks for; `about`: the script's documentation, of whose first line help is made."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("inputs", nargs="+", help="Files, folders or patterns, as for `cpipe tokenize`.")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--bytes-per-source", type=int, default=3_000_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logger.remove()
    return options


def shape_of(width: int, layers: int, vocabulary: int) -> DecoderConfig:
    """Of the decoders compared."""
    heads = {"num_attention_heads": width // HEAD, "num_key_value_heads": width // HEAD}
    widths = {"hidden_size": width, "intermediate_size": 8 * round(width / 3), "num_hidden_layers": layers, **heads}
    return DecoderConfig(**widths, vocab_size=vocabulary, max_position_embeddings=LENGTH)


def _searched(text: Text, shape: DecoderConfig, optimizer: str, steps: int) -> list[Trained]:
    """Trainings at the optimizer's rates, and at further ones until the best lies between two others."""
    found = {rate: _trained(text, shape, optimizer, rate, steps) for rate in RATES[optimizer]}
    while (best := min(found, key=lambda rate: found[rate].loss)) in (min(found), max(found)):
        beyond = best / 2 if best == min(found) else best * 2
        found[beyond] = _trained(text, shape, optimizer, beyond, steps)
    return list(found.values())


def tokenized(folder: Path, inputs: list[str], limit: int) -> Text:
    """So many bytes of each source, in the run `folder`."""
    settings = TokenizeConfig(inputs=tuple(inputs), vocab_size=2048, limit_bytes_per_source=limit, valid_fraction=0.05)
    tokenize_text.run(settings, folder)
    tokens = TokenizeManifest.read(folder)
    train_rows, valid_rows = (
        Rows(TokenStore.open([folder / ref.path for ref in tokens.shards(split)]), tokens.metrics.end_of_text, LENGTH)
        for split in ("train", "valid")
    )
    validation = [valid_rows.batch(number, BATCH, seed=0) for number in range(VALIDATION)]
    return Text(tokens.metrics.vocab_size, train_rows, validation)


def _trained(text: Text, shape: DecoderConfig, optimizer: str, rate: float, steps: int, seed: int = 0) -> Trained:
    config = TrainingConfig(
        steps=steps, batch_size=BATCH, sequence_length=LENGTH, learning_rate=rate, optimizer=optimizer, engine="torch",
        precision="fp32", compile="off", checkpoint_every=steps, tensorboard=False, log_every=steps, seed=seed,
    )  # fmt: skip
    torch.manual_seed(seed)
    loss = NextTokenLoss(Decoder(shape))
    begun = time.process_time()
    with tempfile.TemporaryDirectory(prefix="bench-muon-") as folder:
        train(loss, text.rows.batches(BATCH, seed=seed), config, Path(folder), optimizer)
    seconds = time.process_time() - begun
    found = validation_loss(loss, text)
    print(f"{optimizer} at {rate:g}, seed {seed}: {steps} steps, {seconds:.0f} CPU s, loss {found:.4f}", flush=True)
    return Trained(found, optimizer, rate, steps, seconds)


@torch.no_grad()
def validation_loss(module: nn.Module, text: Text) -> float:
    """Mean over the validation rows, nats per token."""
    device = next(module.parameters()).device
    return float(torch.stack([module(rows.to(device))["loss"] for rows in text.validation]).mean())


def _print_step(shape: DecoderConfig, rounds: int = 20) -> None:
    """How long cpipe's Muon and torch's take for one step."""
    ours, theirs = _matrices(shape), _matrices(shape)
    optimizers = (
        Muon(ours, lr=1e-3, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for optimizer, taken in zip(optimizers, seconds, strict=True):
            begun = time.process_time()
            optimizer.step()
            taken.append(time.process_time() - begun)
    own, peer = (1000 * statistics.median(taken) for taken in seconds)
    print(f"a step of Muon: {own:.0f} ms, of torch.optim.Muon {peer:.0f} ms: {peer / own:.1f} times\n", flush=True)


def _matrices(shape: DecoderConfig) -> list[nn.Parameter]:
    """Of the layers, with gradients."""
    torch.manual_seed(0)
    matrices = [parameter for parameter in Decoder(shape).model.layers.parameters() if parameter.dim() == 2]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    return matrices


def _print(rows: list[Trained], reference: Trained, shape: DecoderConfig) -> None:
    about = f"{shape.num_hidden_layers} layers of width {shape.hidden_size}, {BATCH} rows of {LENGTH} tokens a step"
    print(f"\n{about}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("\n| optimizer | rate | steps | CPU s | validation loss | against the best AdamW | |")
    print("|---|--:|--:|--:|--:|--:|---|")
    for row in sorted(rows):
        difference = "" if row is reference else f"{row.loss - reference.loss:+.3f}"
        cells = (row.optimizer, f"{row.rate:g}", str(row.steps), f"{row.seconds:.0f}", f"{row.loss:.3f}")
        print(f"| {' | '.join(cells)} | {difference} | {row.note} |")
    print(flush=True)


def _print_seeds(rows: list[tuple[Trained, ...]]) -> None:
    """Of every seed AdamW, Muon after as many steps, and Muon after as much time."""
    print("\n| seed | AdamW | Muon, same steps | Muon, same CPU time |\n|--:|--:|--:|--:|")
    for seed, (adamw, *muon) in enumerate(rows):
        cells = (f"{row.loss:.3f} ({row.loss - adamw.loss:+.3f})" for row in muon)
        print(f"| {seed} | {adamw.loss:.3f} | {' | '.join(cells)} |")
    steps, time_ = (statistics.mean(row[kind].loss - row[0].loss for row in rows) for kind in (1, 2))
    print(f"| mean | | {steps:+.3f} | {time_:+.3f} |")


if __name__ == "__main__":
    main()
