"""The whole pipeline on a folder of text of several domains, and the comparisons it is built for.

    python benchmarks/bench_pipeline.py RUN 'corpus/*.jsonl.zst'

Every stage is a `cpipe` command, so an interrupted benchmark goes on where it stopped. Prints the table and, for each
claim, which row won and by how much, whatever the outcome.
"""

import json
import subprocess
import sys
from pathlib import Path

SETTINGS = """\
[tokenize]
vocab_size = 4096
train_bytes = 20_000_000
limit_bytes_per_source = 5_000_000

[cluster]
clusters = 8

[train-seed]
hidden_size = 192
intermediate_size = 512
num_hidden_layers = 4
num_attention_heads = 6
num_key_value_heads = 6
sequence_length = 256
batch_size = 8
steps = 500
learning_rate = 3e-3

[train-experts]
sequence_length = 256
batch_size = 8
steps = 500
learning_rate = 1.5e-3

[train-gates]
sequence_length = 256
batch_size = 8
steps = 100
learning_rate = 1e-2

modes = ["independent", "joint", "contrastive", "mean-activation"]

[evaluate]
thresholds = [0.1, 0.3]
top_p = [0.8]
tokens = 60_000
usage_tokens = 10_000
"""

COMPOSITION = """
[[compose]]
name = "{name}"
bridge = "{bridge}"
experts = "{experts}"
evidence = {evidence}
encoder_layers = 2
latent_layers = 4
decoder_layers = 2
sequence_length = 256
batch_size = 8
steps = 400
learning_rate = 2e-3
bridge_steps = 150
bridge_batch_size = 8
bridge_learning_rate = 1.5e-3
"""

# (name, bridge, experts, whether it is told how well each expert predicted the tokens so far)
COMPOSITIONS = (
    ("central", "stitch", "trained", "true"),
    ("central-calm", "calm", "trained", "true"),
    ("central-control", "stitch", "seed-copies", "true"),
    ("central-plain", "stitch", "trained", "false"),
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
    ("composed stitch (central-plain)", "cBTM all", "the composed model without evidence against the ensemble"),
    ("composed stitch", "composed calm", "position-wise mixing against cross-attention"),
    ("composed stitch", "cBTM all", "the composed model against the experts' ensemble"),
    ("composed stitch", "dense", "the composed model against one model (see the FLOPs columns)"),
)


def main() -> None:
    run, inputs = Path(sys.argv[1]), sys.argv[2:]
    run.mkdir(parents=True, exist_ok=True)
    compositions = (COMPOSITION.format(name=n, bridge=b, experts=x, evidence=e) for n, b, x, e in COMPOSITIONS)
    (run / "cpipe.toml").write_text(SETTINGS + "".join(compositions))
    cpipe = [sys.executable, "-m", "cpipe"]
    subprocess.run([*cpipe, "run", str(run), *inputs], check=True)
    rows = {row["model"]: row for row in json.loads((run / "reports" / "table.json").read_text())["rows"]}
    print((run / "reports" / "table.md").read_text())
    print(
        "| claim | should be lower | bits/byte | than | bits/byte | difference | holds |\n|---|---|--:|---|--:|--:|---|"
    )
    for first, second, why in CLAIMS:
        low, high = rows[first]["bits_per_byte"], rows[second]["bits_per_byte"]
        holds = "yes" if low < high else "NO"
        print(f"| {why} | {first} | {low:.4f} | {second} | {high:.4f} | {100 * (low / high - 1):+.2f} % | {holds} |")


if __name__ == "__main__":
    main()
