"""cBTM's claim on a laptop: bits per byte against the number of clusters, the mixing, and the share of the seed.

    python benchmarks/bench_cbtm.py FOLDER 'corpus/*.jsonl.zst' [--tokens 2_400_000] [--threads N] [--no-shares]

- every model is trained on the same number of tokens in all: the seed's share first, the rest by the experts together,
  each with 1/k of the batch (Gururangan et al. 2023, section 3)
- one decoder, one tokenizer, one seed per share; clusters 1 (dense), 2, 4, 8 and 16 at a share of one half, and shares
  0, 25, 50 and 75 % for 8 clusters; random clusters are the control
- a share of 0 is experts that begin from the same random weights, after one step
- the seed's rate falls to a tenth, as all others do, so that every model has the same two schedules; in one variant
  it stays constant, which is what `cpipe train-seed` does by default
- --no-shares leaves the shares other than one half out, which take most of the time
- every variant is a run of `cpipe` commands in a folder of its own, so an interrupted benchmark goes on where it
  stopped; prints the tables, the claims with whether they hold, and draws cbtm.png
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

BATCH, LENGTH = 16, 256  # rows of a step, so that 16 experts have one each, and tokens of a row
TOP_K = (1, 2, 4)
SETTINGS = """\
[tokenize]
vocab_size = 4096
train_bytes = 20_000_000
limit_bytes_per_source = 5_000_000

[cluster]
clusters = {clusters}
method = "{method}"

[train-seed]
hidden_size = 128
intermediate_size = 344
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 4
sequence_length = {length}
batch_size = {batch}
steps = {seed_steps}
learning_rate = 4e-3
optimizer = "adamw"
schedule = "{schedule}"

[train-experts]
sequence_length = {length}
batch_size = {batch}
steps = {steps}
learning_rate = 2e-3
optimizer = "adamw"
dense = {dense}

[evaluate]
tokens = 60_000
usage_tokens = 1_000
"""


class Variant(NamedTuple):
    """A run: the seed's share of the tokens in percent, the number of clusters, how they are made, the seed's rate."""

    share: int
    clusters: int
    method: str = "balanced"
    schedule: str = "cosine"

    @property
    def name(self) -> str:
        return f"{self.seed}-{self.method}-{self.clusters}"

    @property
    def seed(self) -> str:
        return f"share-{self.share}" if self.schedule == "cosine" else f"{self.schedule}-{self.share}"

    @property
    def label(self) -> str:
        rate = "" if self.schedule == "cosine" else f", seed's rate {self.schedule}"
        return f"{self.clusters}{' random' if self.method == 'random' else ''}{rate}"


HALF = [Variant(50, 8), Variant(50, 2), Variant(50, 4), Variant(50, 16), Variant(50, 8, "random")]
CONSTANT = Variant(50, 8, schedule="constant")
SHARES = [Variant(0, 8), Variant(25, 8), Variant(75, 8)]
DENSE = (Variant(50, 8), Variant(0, 8), CONSTANT)  # where a dense model is trained beside the experts

Scores = dict[str, float]


def main() -> None:
    options = _options()
    variants = [*HALF, CONSTANT, *([] if options.no_shares else SHARES)]
    scores = {variant: _run(variant, options) for variant in variants}
    _print_scores(scores)
    _print_claims(scores)
    _draw(scores, options.folder / "cbtm.png")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("--tokens", type=int, default=2_400_000, help="of training, for each model in all")
    parser.add_argument("--no-shares", action="store_true", help="vary the clusters only")
    parser.add_argument("--threads", help="of torch; other counts may round differently")
    return parser.parse_args()


def _run(variant: Variant, options: argparse.Namespace) -> Scores:
    """Bits per byte of the variant's models by name, trained as far as they are not yet."""
    run = options.folder / variant.name
    run.mkdir(parents=True, exist_ok=True)
    steps = options.tokens // (BATCH * LENGTH)
    seed_steps = max(1, steps * variant.share // 100)
    dense = str(variant in DENSE).lower()
    shape = {"batch": BATCH, "length": LENGTH, "seed_steps": seed_steps, "steps": steps - seed_steps, "dense": dense}
    made = {"clusters": variant.clusters, "method": variant.method, "schedule": variant.schedule}
    settings = SETTINGS.format(**made, **shape)
    (run / "cpipe.toml").write_text(settings)
    _take(options.folder, run, "tokens", "*")
    _take(options.folder, run, "seed", f"{variant.seed}-*")
    environment = os.environ | ({"OMP_NUM_THREADS": options.threads} if options.threads else {})
    for command in ("tokenize", "cluster", "train-seed", "train-experts", "evaluate"):
        inputs = options.inputs if command == "tokenize" else []
        print(f"{variant.name}: {command}", file=sys.stderr, flush=True)
        call = [sys.executable, "-m", "cpipe", command, str(run), *inputs]
        subprocess.run(call, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = json.loads((run / "reports" / "table.json").read_text())["rows"]
    return {row["model"]: row["bits_per_byte"] for row in rows}


def _take(folder: Path, run: Path, stage: str, runs: str) -> None:
    """Copy a finished stage from another run of the benchmark, where it is the same."""
    if (run / stage).exists():
        return
    for manifest in sorted(folder.glob(f"{runs}/{stage}/manifest.json")):
        shutil.copytree(manifest.parent, run / stage)
        return


def _mixed(scores: Scores, kept: int) -> float:
    """Of cBTM with the best `kept` experts; with all, when there are no more than these."""
    return scores.get(f"cBTM top-{kept}", scores["cBTM all"])


def _print_scores(scores: dict[Variant, Scores]) -> None:
    dense = scores[HALF[0]]["dense"]
    columns = [*(f"cBTM top-{kept}" for kept in TOP_K), "cBTM all", "uniform ensemble", "seed"]
    print(f"| seed's share | clusters | {' | '.join(columns)} |\n|--:|---|{'--:|' * len(columns)}")
    print(f"| 50 % | 1 (dense) | {dense:.4f} |{' |' * (len(columns) - 1)}")
    print(f"| 50 % | 1 (dense, seed's rate constant) | {scores[CONSTANT]['dense']:.4f} |{' |' * (len(columns) - 1)}")
    if Variant(0, 8) in scores:
        print(f"| 0 % | 1 (dense, one schedule) | {scores[Variant(0, 8)]['dense']:.4f} |{' |' * (len(columns) - 1)}")
    for variant in sorted(scores):
        found = scores[variant]
        cells = [*(_mixed(found, kept) for kept in TOP_K), *(found[name] for name in columns[len(TOP_K) :])]
        print(f"| {variant.share} % | {variant.label} | {' | '.join(f'{cell:.4f}' for cell in cells)} |")
    print()


def _print_claims(scores: dict[Variant, Scores]) -> None:
    eight, random = scores[Variant(50, 8)], scores[Variant(50, 8, "random")]
    dense = min(found["dense"] for found in scores.values() if "dense" in found)
    best = min(_mixed(scores[variant], 2) for variant in HALF if variant.method != "random")
    constant, both = scores[CONSTANT], scores[Variant(50, 8)]["dense"]
    claims = [
        ("the best number of clusters, top-2, beats the dense model of the same two schedules", best, both),
        (
            "8 clusters, top-2, from a seed of constant rate beat that from one whose rate fell",
            constant["cBTM top-2"],
            best,
        ),
        ("the same beat the dense model that went on from that seed", constant["cBTM top-2"], constant["dense"]),
        ("the same beat the best dense model of all", constant["cBTM top-2"], dense),
        ("the best number of clusters from a seed whose rate fell beats the best dense model of all", best, dense),
        ("found clusters beat random ones (8, top-2)", eight["cBTM top-2"], random["cBTM top-2"]),
        ("routing beats a uniform ensemble (8, top-2)", eight["cBTM top-2"], eight["uniform ensemble"]),
        ("two experts are as good as all, within 0.5 % (8)", eight["cBTM top-2"], eight["cBTM all"] * 1.005),
    ]
    if scratch := scores.get(Variant(0, 8)):
        claim = "a seed of 50 % beats experts from scratch (8, top-2)"
        claims.append((claim, eight["cBTM top-2"], scratch["cBTM top-2"]))
    print("| claim | bits/byte | against | holds |\n|---|--:|--:|---|")
    for claim, low, high in claims:
        print(f"| {claim} | {low:.4f} | {high:.4f} | {'yes' if low < high else 'NO'} |")


def _draw(scores: dict[Variant, Scores], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dense = scores[HALF[0]]["dense"]
    shares = sorted({variant for variant in scores if variant.clusters == 8} - {Variant(50, 8, "random"), CONSTANT})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    found = sorted((variant for variant in HALF if variant.method != "random"), key=lambda variant: variant.clusters)
    counts = [1, *(variant.clusters for variant in found)]
    for kept in TOP_K:
        left.plot(counts, [dense, *(_mixed(scores[variant], kept) for variant in found)], "o-", label=f"top-{kept}")
    left.plot(counts, [dense, *(scores[variant]["cBTM all"] for variant in found)], "o-", label="all")
    left.plot([8], [scores[Variant(50, 8, "random")]["cBTM top-2"]], "kx", label="random clusters, top-2")
    left.set(xscale="log", xticks=counts, xticklabels=counts, xlabel="clusters", ylabel="bits per byte")
    left.legend()
    right.plot([variant.share for variant in shares], [scores[variant]["cBTM top-2"] for variant in shares], "o-")
    right.axhline(dense, color="gray", linestyle="--", label="dense")
    right.set(xlabel="seed's share of the tokens, %", title="8 clusters, top-2")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
