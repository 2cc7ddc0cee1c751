"""A small composed model, for tests."""

import torch
from loud_weights import loud

from schemas.central import CentralConfig, CentralShape
from schemas.compose_model import BridgeConfig
from schemas.decoder import DecoderConfig
from stages.nn.central import CentralModel
from stages.nn.composed import ComposedModel
from stages.nn.decoder import Decoder
from stages.nn.gates import ExpertGates, SeedGate

VOCAB = 29
SEED = DecoderConfig(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1,
)  # fmt: skip
OTHER = SEED.model_copy(update={"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3})
SHAPE = CentralShape(
    group_length=4, latents_per_group=2, encoder_layers=2, latent_layers=3, decoder_layers=3, token_window=7,
    plan_horizon=2,
)  # fmt: skip


def composed(
    bridge="stitch", *, experts=(SEED, OTHER), gate=True, memory=0.9, size=1.0, evidence=True, shake=True, std=0.3
):
    """`bridge`: as in "calm", or "stitch of states" for another head. `size`: of the vectors of the gates.

    Without `shake`, central model and bridges are as they begin.
    """
    torch.manual_seed(0)
    central = CentralModel(CentralConfig.beside(SHAPE, SEED))
    frozen = [loud(Decoder(config), std).eval() for config in experts]
    count = len(experts)
    gates = ExpertGates(size * torch.randn(count, SEED.hidden_size), torch.zeros(count), "joint", 2, memory, 0)
    bridge, _, head = bridge.partition(" of ")
    config = BridgeConfig(bridge=bridge, head=head or "predictions", token_sites=2, latent_sites=2, evidence=evidence)
    model = ComposedModel(central, frozen, config, SeedGate(loud(Decoder(SEED), std), gates) if gate else None)
    if shake:
        loud(model.central, std)
        loud(model.bridges, std)
    return model
