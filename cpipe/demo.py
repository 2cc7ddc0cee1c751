"""The settings of `cpipe demo`: for two processor cores and a few minutes, and large enough to show the effect."""

from pathlib import Path

from schemas.files import write_bytes

PROMPT = "This function returns"
SAMPLED = ("seed", "cbtm", "central")  # models that write a few lines at the end

SETTINGS = """\
# The demo's settings. Change them and run `cpipe run RUN --force`, or copy them for text of your own.

[collect]
bytes_per_kind = 600_000

[tokenize]
vocab_size = 2048
group_column = "group"
valid_fraction = 0.1

[cluster]
clusters = 6

[train-seed]
hidden_size = 128
intermediate_size = 344
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 4
sequence_length = 128
batch_size = 24
steps = 200
learning_rate = 8e-3

[train-experts]
sequence_length = 128
batch_size = 24
steps = 200
learning_rate = 4e-3

[train-gates]
sequence_length = 128
batch_size = 8
steps = 40
learning_rate = 1e-2

[compose]
encoder_layers = 2
latent_layers = 2
decoder_layers = 2
sequence_length = 128
batch_size = 24
steps = 120
learning_rate = 8e-3
bridge_steps = 120
bridge_batch_size = 12
bridge_learning_rate = 4e-3

[evaluate]
tokens = 30_000
usage_tokens = 6_000
"""


def write_settings(run_dir: Path) -> None:
    """Put the settings where the stages look for them, unless a file is there already."""
    path = run_dir / "cpipe.toml"
    if not path.exists():
        write_bytes(path, SETTINGS.encode(), run_dir)
