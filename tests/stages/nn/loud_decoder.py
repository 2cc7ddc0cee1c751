"""A decoder whose weights are all large enough that nothing in it can be left out unnoticed."""

import loud_weights
import torch
from torch import nn

from schemas.decoder import DecoderConfig
from stages.nn.attention import SelfAttention
from stages.nn.decoder import Decoder

VOCAB = 61


def shape(**changes):
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-3,
        "max_position_embeddings": 64,
    }
    return DecoderConfig(**{**settings, **changes})


def loud(config, seed=0, std=0.3):
    torch.manual_seed(seed)
    decoder = loud_weights.loud(Decoder(config), std).eval().requires_grad_(False)
    for part in decoder.modules():
        if isinstance(part, SelfAttention) and decoder.config.model_type == "qwen2":
            nn.init.normal_(part.q_proj.bias)  # beside products this large a small one would do nothing
            nn.init.normal_(part.k_proj.bias)
            nn.init.normal_(part.v_proj.bias)
    return decoder


def some_ids(count, seed=1):
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def whole_pass(decoder, ids):
    """Logits [V] after the last of them, read at once."""
    return decoder(torch.tensor([ids]))[0, -1]


def close(found, expected):
    assert expected.abs().mean() > 0.3  # else anything would be close
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
