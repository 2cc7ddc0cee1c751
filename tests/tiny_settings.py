"""Settings of the whole pipeline that take seconds: `tiny_corpus` in three clusters, a few steps of everything."""

SETTINGS = """\
[tokenize]
vocab_size = 320
valid_fraction = 0.15

[cluster]
clusters = 3
dimensions = 8

[train-seed]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
steps = 3
batch_size = 6
sequence_length = 32
engine = "torch"

[train-experts]
steps = 3
batch_size = 6
sequence_length = 32
engine = "torch"

[train-gates]
steps = 2
batch_size = 6
sequence_length = 32
engine = "torch"

[compose]
group_length = 4
latents_per_group = 2
encoder_layers = 1
latent_layers = 1
decoder_layers = 1
token_window = 8
plan_horizon = 2
steps = 2
batch_size = 6
sequence_length = 32
engine = "torch"
bridge_steps = 2
bridge_batch_size = 6

[evaluate]
tokens = 700
top_k = [1]
"""

COMPOSITION = SETTINGS[SETTINGS.index("[compose]") : SETTINGS.index("[evaluate]")]
CALM = COMPOSITION.replace("[compose]", '[[compose]]\nname = "central-calm"\nbridge = "calm"\ngates = "none"')
WITH_TWO_COMPOSITIONS = SETTINGS.replace(COMPOSITION, COMPOSITION.replace("[compose]", "[[compose]]") + CALM)
