"""The central model's options, each against the default at equal tokens, and the default against plain decoders.

    python benchmarks/bench_central.py RUN [--steps 400] [--seeds 3] [--rows '*'] [--threads 1] [--results FILE]

- RUN is a run of cpipe with tokens and a seed; nothing in it is written to. Every model starts from that seed: the
  central models its first and last layers, the plain decoders all of them
- rows of 512 tokens and a token window of 32: what is further back than the token layers together reach comes by
  latents or not at all
- one row for each option; all rows of one seed see the same text in the same order, and the differences are means and
  standard deviations of the differences between pairs of one seed
- the plain decoders have as many training FLOPs as the default, not as many tokens: one sees its whole row, the other
  32 tokens a layer. A third has as many tokens: what the default is better than it, is what it has besides token layers
- loss in nats per token on held-out rows of 512 tokens. Bits per byte are those nats over the held-out bytes per token
- last columns: how much higher the loss is on half of these rows with the latents left out, with the plan left out, and
  with latents and plan of another row
- 400 steps of all rows and three seeds take about an hour on one core with 0.6 M parameters. After so few the latents
  are hardly read, as the last columns say, and options cannot differ by much
- `--results` keeps a line of JSON for every model trained; the same command goes on where it was stopped
"""

import argparse
import fnmatch
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loguru import logger
from torch import Tensor, nn

from schemas.central import CentralConfig, CentralShape, LevelShape
from schemas.decoder import DecoderConfig
from schemas.tokenize_text import TokenizeManifest
from schemas.train_seed import SeedManifest
from schemas.training import TrainingConfig
from stages.artifacts.model_folder import read_model
from stages.data.batches import Rows
from stages.data.token_store import TokenStore
from stages.engine.loop import train
from stages.nn.central import CentralLoss, CentralModel
from stages.nn.decoder import Decoder, NextTokenLoss
from stages.nn.flops import BACKWARD_AND_FORWARD, forward_flops

LENGTH, BATCH, WINDOW = 512, 2, 32
HELD_OUT = 32  # rows
PARTS = ("latents", "plan", "latents exchanged")  # what it is tried without
RATE = 2e-3
BASE = {"encoder_layers": 2, "latent_layers": 2, "decoder_layers": 2, "token_window": WINDOW}
ABOVE = LevelShape(group_length=4, latents_per_group=4, latent_layers=2)
LOCAL = {"latent_local_layers": 2}
DEFAULT, WINDOWED, WHOLE = "default", f"plain decoder, window {WINDOW}", "plain decoder, whole row"
EQUAL_TOKENS = f"{WINDOWED}, equal tokens"
OPTIONS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "last-k": {"reducer": "last-k"},
    "repeat": {"upsampling": "repeat"},
    "shared positions": {"shared_positions": True},
    "wider latents": {"latent_width": "wider"},
    "2 local layers, series": LOCAL,
    "2 local layers, alternating": LOCAL | {"arrangement": "alternating"},
    "2 latent layers more": {"latent_layers": 4},
    "two levels": {"levels": (ABOVE,)},
    "three levels": {"levels": (ABOVE, ABOVE)},
    "two levels, 1 global layer below": {"levels": (ABOVE,), "global_layers": 1},
    "3 channels": {"channels": 3},
    "3 channels, by features": {"channels": 3, "channel_merge": "features"},
    "depth-weighted": {"depth_weighted": True},
    "latent loss 0.1": {"latent_weight": 0.1},
    "no concept loss": {"concept_weight": 0.0},
    "concept loss mse": {"concept_loss": "mse"},
    "concept loss both": {"concept_loss": "both"},
    "horizon 1": {"plan_horizon": 1},
    "random phase": {"random_phase": True},
}
Result = dict[str, Any]


class Text(NamedTuple):
    """The run's: the seed, and rows to train on and to score."""

    shape: DecoderConfig
    weights: dict[str, Tensor]
    rows: Rows
    held_out: Tensor
    bytes_per_token: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default="*", help="pattern of the options' names; the default is always there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logger.remove()
    text, found = _text(options.run), _found(options.results)
    chosen = [
        name
        for name in (*OPTIONS, WINDOWED, EQUAL_TOKENS, WHOLE)
        if name == DEFAULT or fnmatch.fnmatch(name, options.rows)
    ]
    for seed in range(options.seeds):
        for name in chosen:
            if (name, seed) not in found:
                found[name, seed] = _trained(text, name, seed, options.steps)
                _keep(options.results, found[name, seed])
    _print(text, found, chosen, options)


def _text(run: Path) -> Text:
    tokens = TokenizeManifest.read(run)
    train_rows, valid_rows = (
        Rows(TokenStore.open([ref.check(run) for ref in tokens.shards(split)]), tokens.metrics.end_of_text, LENGTH)
        for split in ("train", "valid")
    )
    held_out = valid_rows.batch(0, min(HELD_OUT, valid_rows.count // 2 * 2), seed=0)
    valid = tokens.metrics.valid
    return Text(*read_model(run, SeedManifest.read(run)), train_rows, held_out, valid.bytes / valid.tokens)


def _found(results: Path | None) -> dict[tuple[str, int], Result]:
    if results is None or not results.is_file():
        return {}
    lines = (json.loads(line) for line in results.read_text().splitlines())
    return {(line["name"], line["seed"]): line for line in lines}


def _keep(results: Path | None, result: Result) -> None:
    print(f"{result['name']}, seed {result['seed']}: {result['loss']:.4f}, {result['seconds']:.0f} CPU s", flush=True)
    if results is not None:
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")


def _central(text: Text, name: str) -> CentralModel:
    seed = Decoder.from_weights(text.shape, text.weights)
    changes = dict(OPTIONS[name])
    if changes.get("latent_width") == "wider":  # by a head
        changes["latent_width"] = text.shape.hidden_size + text.shape.hidden_size // text.shape.num_attention_heads
    model = CentralModel(CentralConfig.beside(CentralShape(**(BASE | changes)), text.shape))
    model.start_from(seed)
    return model


def _plain(text: Text, name: str) -> Decoder:
    shape = text.shape
    if name.startswith(WINDOWED):
        shape = DecoderConfig(**(shape.model_dump() | {"model_type": "mistral", "sliding_window": WINDOW}))
    return Decoder.from_weights(shape, {n: weight.clone() for n, weight in text.weights.items()}).requires_grad_(True)


def _trained(text: Text, name: str, seed: int, steps: int) -> Result:
    torch.manual_seed(seed)
    if name in OPTIONS:
        central = _central(text, name)
        loss: nn.Module = CentralLoss(central)
        logits: Callable[..., Tensor] = lambda ids, *parts: central(ids, ablate=frozenset(parts)).logits_BTV  # noqa: E731
    else:
        decoder = _plain(text, name)
        loss, logits = NextTokenLoss(decoder), decoder
        if name != EQUAL_TOKENS:
            steps = round(steps * forward_flops(_central(text, DEFAULT), LENGTH) / forward_flops(decoder, LENGTH))
    flops = forward_flops(logits, LENGTH)
    config = TrainingConfig(
        steps=steps, batch_size=BATCH, sequence_length=LENGTH, learning_rate=RATE, engine="torch", precision="fp32",
        optimizer="adamw", compile="off", checkpoint_every=steps, tensorboard=False, log_every=steps, seed=seed,
    )  # fmt: skip
    begun = time.process_time()
    with tempfile.TemporaryDirectory(prefix="bench-central-") as folder:
        train(loss.train(), text.rows.batches(BATCH, seed), config, Path(folder), name)
    seconds = time.process_time() - begun
    loss.eval()
    half = text.held_out[::2]
    result = {
        "name": name, "seed": seed, "steps": steps, "seconds": seconds, "flops": flops,
        "parameters": sum(parameter.numel() for parameter in loss.parameters()),
        "loss": _loss(logits, text.held_out),
    }  # fmt: skip
    if name in OPTIONS:
        whole = _loss(logits, half)
        usage = {part: _loss(logits, half, part) - whole for part in PARTS}
        result |= usage
    return result


@torch.no_grad()
def _loss(logits: Callable[..., Tensor], row_BT: Tensor, *parts: str) -> float:
    """Nats per token."""
    losses = []
    for row_2T in row_BT.split(2):  # exchanging takes two rows
        logits_BTV = logits(row_2T[:, :-1], *parts)
        losses.append(float(nn.functional.cross_entropy(logits_BTV.flatten(0, 1), row_2T[:, 1:].flatten())))
    return statistics.mean(losses)


def _print(text: Text, found: dict[tuple[str, int], Result], chosen: list[str], options: argparse.Namespace) -> None:
    seeds = range(options.seeds)
    before = _loss(Decoder.from_weights(text.shape, text.weights), text.held_out)
    print(f"\n{BATCH} rows of {LENGTH} tokens a step, {options.steps} steps at equal tokens, {options.seeds} seeds,")
    print(
        f"{options.threads} threads, torch {torch.__version__}; the run's seed, whole row: {before:.4f} nats per token"
    )
    print(
        "\n| model | nats/token | sd | bits/byte | against default | sd | parameters | FLOPs/token, training |", end=""
    )
    print(" no latents | no plan | another text's latents |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    rows = [(_mean([found[name, seed]["loss"] for seed in seeds]), name) for name in chosen]
    for (loss, deviation), name in sorted(rows):
        own = [found[name, seed] for seed in seeds]
        gap, gap_deviation = _mean([each["loss"] - found[DEFAULT, each["seed"]]["loss"] for each in own])
        against = "" if name == DEFAULT else f"{gap:+.4f} | {gap_deviation:.4f}"
        bits = loss / math.log(2) / text.bytes_per_token
        usage = " | ".join(_usage(own, part) for part in PARTS)
        print(f"| {name} | {loss:.4f} | {deviation:.4f} | {bits:.4f} | {against or ' | '} |", end="")
        print(f" {own[0]['parameters'] / 1e6:.2f} M | {BACKWARD_AND_FORWARD * own[0]['flops'] / 1e6:.1f} M | {usage} |")
    print("\nsteps of the plain decoders:", {name: found[name, 0]["steps"] for name in chosen if name not in OPTIONS})
    print(f"CPU seconds of training: {sum(result['seconds'] for result in found.values()):.0f}")


def _mean(values: list[float]) -> tuple[float, float]:
    """With the standard deviation."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _usage(own: list[Result], part: str) -> str:
    if part not in own[0]:
        return ""
    mean, deviation = _mean([each[part] for each in own])
    return f"{mean:+.4f} ± {deviation:.4f}"


if __name__ == "__main__":
    main()
