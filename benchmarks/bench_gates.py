"""Gates of every kind over LoRA experts: at the experts' inputs, at every layer, at every linear layer.

    python benchmarks/bench_gates.py RUN 'corpus/*.jsonl.zst'

Text of several domains goes through the pipeline to LoRA experts and gates of all modes and places. Prints the table on
held-out text, and on the same text with the halves of documents exchanged between sources, so that each changes its
subject in the middle; then what the gates at each layer of the best kind are open to. An interrupted benchmark goes on
where it stopped.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

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
optimizer = "adamw"

[train-experts]
kind = "lora"
rank = 16
alpha = 32
sequence_length = 256
batch_size = 8
steps = 500
learning_rate = 5e-3
optimizer = "adamw"
dense = false

[train-gates]
places = ["expert", "layer", "module"]
modes = ["joint", "contrastive", "mean-activation", "arrow", "independent"]
sequence_length = 256
batch_size = 8
steps = 100
learning_rate = 1e-2

[evaluate]
tokens = 30_000
top_k = [2]
thresholds = [0.3]
"""


def main() -> None:
    run, inputs = Path(sys.argv[1]), sys.argv[2:]
    run.mkdir(parents=True, exist_ok=True)
    (run / "cpipe.toml").write_text(SETTINGS)
    cpipe("run", run, *inputs, "--until", "train-gates")
    tables = {}
    for name, more in (("held-out text", []), ("text that changes its subject", ["--switched"])):
        kept = run / f"table-{len(tables)}.json"
        if not kept.is_file():
            cpipe("evaluate", run, "--force", *more)
            if (run / "reports/routing.json").is_file():
                shutil.copy(run / "reports/routing.json", run / "routing.json")
            shutil.copy(run / "reports/table.json", kept)
        tables[name] = {row["model"]: row for row in json.loads(kept.read_text())["rows"]}
    show(tables, {(row["model"], row["layer"]): row for row in json.loads((run / "routing.json").read_text())})


def cpipe(command: str, run: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "cpipe", command, str(run), *words], check=True)


def show(tables: dict[str, dict[str, Any]], routing: dict[tuple[str, str], Any]) -> None:
    first, second = tables.values()
    oracle, seed = (first[name] for name in ("oracle expert per document", "seed"))
    print(
        "| model | " + " | ".join(f"{name}, bits/byte" for name in tables) + " | to the oracle | FLOPs/token to one |"
    )
    print("|---|--:|--:|--:|--:|")
    for name, row in first.items():
        gap = 100 * (row["bits_per_byte"] / oracle["bits_per_byte"] - 1)
        cost = row["inference_flops"] / seed["inference_flops"]
        other = f"{second[name]['bits_per_byte']:.4f}" if name in second else "–"  # the best single expert may differ
        found = f"{row['bits_per_byte']:.4f} | {other}"
        print(f"| {name} | {found} | {gap:+.2f} % | {cost:.2f} |")
    print("\n| gates | layer | experts asked | entropy, bits | open to own text | to other text |")
    print("|---|---|--:|--:|--:|--:|")
    for (model, layer), row in routing.items():
        own, foreign = (sum(row[side]) / len(row[side]) for side in ("own", "foreign"))
        print(f"| {model} | {layer} | {row['experts_asked']:.2f} | {row['entropy']:.2f} | {own:.2f} | {foreign:.2f} |")


if __name__ == "__main__":
    main()
