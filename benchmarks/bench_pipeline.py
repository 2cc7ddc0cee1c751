"""The whole pipeline on a folder of text of several domains, and the comparisons it is built for.

    python benchmarks/bench_pipeline.py RUN 'corpus/*.jsonl.zst' [--seed 0] [--optimizer muon] [--found-rates]

Every stage is a `cpipe` command, so an interrupted benchmark goes on where it stopped. Prints the table and, for each
claim, which row won and by how much, whatever the outcome. `--seed` and `--optimizer` are of all trainings, and
`--found-rates` leaves their learning rates to cpipe, but the gates'; tokens and clusters stay the same, so RUN may
begin as a copy of another run's `tokens` and `clusters`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SETTINGS = """\
[tokenize]
vocab_size = 2048
train_bytes = 20_000_000
limit_bytes_per_source = 13_000_000

[cluster]
clusters = 8

[train-seed]
seed = {seed}
hidden_size = 96
intermediate_size = 256
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 4
sequence_length = 256
batch_size = 16
steps = 1200
optimizer = "{optimizer}"
{rates[0]}

[train-experts]
seed = {seed}
sequence_length = 256
batch_size = 16
steps = 1500
optimizer = "{optimizer}"
{rates[1]}
dense_steps = {dense_steps}

[train-gates]
seed = {seed}
sequence_length = 256
batch_size = 8
steps = 100
learning_rate = 1e-2
modes = ["independent", "joint", "contrastive", "mean-activation"]

[evaluate]
thresholds = [0.1]
top_p = [0.8]
active_experts = [1, 2]
tokens = 60_000
usage_tokens = 10_000
"""

COMPOSITION = """
[[compose]]
name = "{name}"
seed = {seed}
bridge = "{bridge}"
head = "{head}"
experts = "{experts}"
evidence = {evidence}
gates = "{gates}"
encoder_layers = 2
latent_layers = 4
decoder_layers = 2
sequence_length = 256
batch_size = 16
steps = 100
optimizer = "{optimizer}"
{rates[2]}
bridge_steps = 300
bridge_batch_size = 8
{rates[3]}
"""

# Of the seed; of experts and dense; of the central model alone; and with the experts in place.
RATE_NAMES = ("learning_rate", "learning_rate", "learning_rate", "bridge_learning_rate")
RATES = {"muon": (8e-3, 4e-3, 8e-3, 4e-3), "adamw": (4e-3, 2e-3, 2e-3, 3e-3)}

# (name, bridge, what is mixed in the end, experts, whether it is told how well each predicted the tokens so far, gates)
COMPOSITIONS = (
    ("central", "stitch", "predictions", "trained", "true", "joint"),
    ("central-calm", "calm", "predictions", "trained", "true", "joint"),
    ("central-control", "stitch", "predictions", "seed-copies", "true", "joint"),
    ("central-lean", "stitch", "predictions", "trained", "true", "none"),
    ("central-plain", "stitch", "predictions", "trained", "false", "joint"),
    ("central-states", "stitch", "states", "trained", "true", "joint"),
)

# (what should be lower, than what, why it matters)
CLAIMS = (
    ("cBTM top-2", "dense", "experts on discovered domains against one model, at equal training tokens"),
    ("cBTM top-2", "uniform ensemble", "routing by what the text is about against no routing"),
    ("gates joint top-2", "gates independent top-2", "gates that know of each other against the paper's"),
    ("gates joint top-2", "dense", "learned routing against one model"),
    ("gates joint top-2", "cBTM top-2", "learned routing against distance to centroids"),
    ("composed stitch", "central alone", "reading the experts against not having them"),
    ("composed stitch", "composed stitch of seed copies (central-control)", "the experts against as many parameters"),
    ("composed stitch", "composed stitch (central-plain)", "with the experts' evidence against without it"),
    ("composed stitch", "composed stitch (central-states)", "mixed predictions against mixed states"),
    ("composed stitch (central-plain)", "cBTM all", "the composed model without evidence against the ensemble"),
    ("composed stitch", "composed calm", "position-wise mixing against cross-attention"),
    ("composed stitch", "cBTM all", "the composed model against the experts' ensemble"),
    ("composed stitch", "dense, matched", "the composed model against one model of as many FLOPs of training"),
    ("cBTM top-2", "dense, matched", "the ensemble against one model of more FLOPs of training"),
    ("composed stitch, top-2 per text", "cBTM all", "two experts for a text, composed, against the ensemble of all"),
    ("composed stitch (central-lean), top-2 per text", "cBTM all", "the same without gates, for less than half of it"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimizer", choices=RATES, default="muon")
    parser.add_argument("--found-rates", action="store_true")
    asked = parser.parse_args()
    run: Path = asked.run
    run.mkdir(parents=True, exist_ok=True)
    further = sorted(int(path.parent.name.split("-")[1]) for path in run.glob("dense-*/manifest.json"))
    rates = [f"{name} = {rate}" for name, rate in zip(RATE_NAMES, RATES[asked.optimizer], strict=True)]
    rates = [""] * len(rates) if asked.found_rates else rates
    trainings = {"seed": asked.seed, "optimizer": asked.optimizer, "rates": rates}
    metrics = pipeline(run, asked.inputs, further, trainings)
    # One model that gets all the FLOPs of the composed one: how many steps that is, the table tells.
    steps = metrics["dense_steps"]["composed stitch"]
    if steps not in further:
        metrics = pipeline(run, asked.inputs, [*further, steps], trainings)
    rows = {row["model"]: row for row in metrics["rows"]}
    print((run / "reports" / "table.md").read_text())
    print(
        "| claim | should be lower | bits/byte | than | bits/byte | difference | holds |\n|---|---|--:|---|--:|--:|---|"
    )
    for first, second, why in CLAIMS:
        first, second = (name.replace("dense, matched", f"dense, {steps} steps") for name in (first, second))
        low, high = rows[first]["bits_per_byte"], rows[second]["bits_per_byte"]
        holds = "yes" if low < high else "NO"
        print(f"| {why} | {first} | {low:.4f} | {second} | {high:.4f} | {100 * (low / high - 1):+.2f} % | {holds} |")


def pipeline(run: Path, inputs: list[str], dense_steps: list[int], trainings: dict[str, Any]) -> dict[str, Any]:
    """Run what is not up to date; the metrics of the evaluation."""
    compositions = (
        COMPOSITION.format(name=n, bridge=b, head=h, experts=x, evidence=e, gates=g, **trainings)
        for n, b, h, x, e, g in COMPOSITIONS
    )
    (run / "cpipe.toml").write_text(SETTINGS.format(dense_steps=dense_steps, **trainings) + "".join(compositions))
    # What is up to date is left alone; with a further dense model, the evaluation is not.
    subprocess.run([sys.executable, "-m", "cpipe", "run", str(run), *inputs, "--force"], check=True)
    found: dict[str, Any] = json.loads((run / "reports" / "manifest.json").read_text())["metrics"]
    return found


if __name__ == "__main__":
    main()
