"""Muon against AdamW: validation loss after the same steps, and after the same CPU time.

    python benchmarks/bench_muon.py 'corpus/*.jsonl.zst' [--steps 200] [--threads 1]

- the model: 5 layers of width 128, SwiGLU 344, 2,048 tokens, tied (1.25 M parameters), 8 rows of 256 tokens a step
- cpipe's own loop (`stages.engine.loop.train`) on rows of its own token store; the validation rows are of documents
  that are not trained on, and the same for every row of the table
- each optimizer has its own rates, all printed, the best first: a fixed rate would decide by itself who wins
- a step of Muon costs more. So its best rate is trained once more, with as many steps as fit into the CPU time of the
  best AdamW: the row to compare it by
- weights and order of the batches are those of one seed: differences of a few hundredths are noise
- text is tokenized into a temporary folder; 200 steps take less than 12 minutes on one core
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from loguru import logger
from torch import Tensor

from schemas.decoder import DecoderConfig
from schemas.tokenize_text import TokenizeConfig, TokenizeManifest
from schemas.training import TrainingConfig
from stages import tokenize_text
from stages.data.batches import Rows
from stages.data.token_store import TokenStore
from stages.engine.loop import train
from stages.nn.decoder import Decoder, NextTokenLoss

LENGTH, BATCH = 256, 8  # tokens of a row, rows of a step
VALIDATION = 8  # batches
RATES = {"adamw": (1e-3, 2e-3, 4e-3), "muon": (2e-3, 4e-3, 8e-3, 1.6e-2)}
SHAPE = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 5, "max_position_embeddings": LENGTH}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}


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
    batch_at: Callable[[int], Tensor]
    validation: list[Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="+", help="Files, folders or patterns, as for `cpipe tokenize`.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bytes-per-source", type=int, default=3_000_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logger.remove()
    with tempfile.TemporaryDirectory(prefix="bench-muon-") as folder:
        text = _tokenized(Path(folder), options.inputs, options.bytes_per_source)
        best: dict[str, Trained] = {}
        rows = []
        for optimizer, rates in RATES.items():
            found = [_trained(text, optimizer, rate, options.steps) for rate in rates]
            best[optimizer] = min(found)
            rows += found
        fitting = int(options.steps * best["adamw"].seconds / best["muon"].seconds)
        same_time = _trained(text, "muon", best["muon"].rate, max(2, fitting))
        rows.append(same_time._replace(note="in the CPU time of the best AdamW"))
    _print(rows, best["adamw"])


def _tokenized(folder: Path, inputs: list[str], limit: int) -> Text:
    settings = TokenizeConfig(inputs=tuple(inputs), vocab_size=2048, limit_bytes_per_source=limit, valid_fraction=0.05)
    tokenize_text.run(settings, folder)
    tokens = TokenizeManifest.read(folder)
    train_rows, valid_rows = (
        Rows(TokenStore.open([folder / ref.path for ref in tokens.shards(split)]), tokens.metrics.end_of_text, LENGTH)
        for split in ("train", "valid")
    )
    validation = [valid_rows.batch(number, BATCH, seed=0) for number in range(VALIDATION)]
    return Text(tokens.metrics.vocab_size, train_rows.batches(BATCH, seed=0), validation)


def _trained(text: Text, optimizer: str, rate: float, steps: int) -> Trained:
    config = TrainingConfig(
        steps=steps, batch_size=BATCH, sequence_length=LENGTH, learning_rate=rate, optimizer=optimizer, engine="torch",
        precision="fp32", compile="off", checkpoint_every=steps, tensorboard=False, log_every=steps,
    )  # fmt: skip
    torch.manual_seed(0)
    loss = NextTokenLoss(Decoder(DecoderConfig(**SHAPE, **HEADS, vocab_size=text.vocabulary)))
    begun = time.process_time()
    with tempfile.TemporaryDirectory(prefix="bench-muon-") as folder:
        train(loss, text.batch_at, config, Path(folder), optimizer)
    seconds = time.process_time() - begun
    with torch.no_grad():
        found = torch.stack([loss(rows.to(next(loss.parameters()).device))["loss"] for rows in text.validation])
    print(f"{optimizer} at {rate:g}: {steps} steps, {seconds:.0f} CPU s, loss {found.mean():.4f}", flush=True)
    return Trained(float(found.mean()), optimizer, rate, steps, seconds)


def _print(rows: list[Trained], reference: Trained) -> None:
    print(f"\n{BATCH} rows of {LENGTH} tokens a step, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("\n| optimizer | rate | steps | CPU s | validation loss | against the best AdamW | |")
    print("|---|--:|--:|--:|--:|--:|---|")
    for row in sorted(rows):
        difference = "" if row is reference else f"{row.loss - reference.loss:+.3f}"
        cells = (row.optimizer, f"{row.rate:g}", str(row.steps), f"{row.seconds:.0f}", f"{row.loss:.3f}")
        print(f"| {' | '.join(cells)} | {difference} | {row.note} |")


if __name__ == "__main__":
    main()
