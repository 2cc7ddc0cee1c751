"""Full experts behind gates at their MLPs, in the format of Mixtral, which many programs run.

- experts of Mixtral are the seed's MLP and then each expert's; its router has the gates' vectors as rows, and zeros for
  the seed, whose score is 0. Attention, norms and embeddings are what the experts share
- a router of Mixtral reads the MLP's input as it is: so do gates trained together with a memory of 0
- asked for all experts, Mixtral weighs them as the gates do; asked for fewer, the seed competes with the others, where
  here it is asked beside them
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from schemas.decoder import DecoderConfig
from schemas.failures import UsageFailure

PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # an MLP's layers, by Mixtral's names


def mixtral_config(
    shape: DecoderConfig, experts: int, asked: int | None, end_of_text: int, dtype: str
) -> dict[str, Any]:
    """The content of `config.json` for so many experts, the seed's among them.

    Raises UsageFailure for a seed whose layers Mixtral does not have, and for more asked than there are.
    """
    plain = shape.to_huggingface(end_of_text, dtype)
    if shape.model_type not in ("llama", "mistral") or shape.rope_scaling is not None:
        raise UsageFailure(f"a seed of type {shape.model_type}, or of scaled positions, has no form of Mixtral")
    if asked is not None and asked > experts:
        raise UsageFailure(f"--experts-per-token {asked} is more than the {experts} there are, the seed's among them")
    kept = {name: value for name, value in plain.items() if name not in ("attention_bias", "mlp_bias")}
    return {
        **kept,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": asked or experts,
        "sliding_window": shape.sliding_window,
    }


def mixtral_weights(
    shared: tuple[DecoderConfig, Mapping[str, Tensor]],
    seed: Mapping[str, Tensor],
    experts: list[Mapping[str, Tensor]],
    gates: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """All weights by Mixtral's names. `gates`: `model.layers.0.mlp.vectors` [experts, width] and so on."""
    config, weights = shared
    found = {name: tensor for name, tensor in weights.items() if ".mlp." not in name}
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        vectors_XD = gates[f"{layer}.mlp.vectors"]
        router_SD = torch.cat([torch.zeros_like(vectors_XD[:1]), vectors_XD])
        found[f"{layer}.block_sparse_moe.gate.weight"] = router_SD
        for slot, slot_weights in enumerate([seed, *experts]):
            for part, name in PARTS.items():
                tensor = slot_weights[f"{layer}.mlp.{part}.weight"]
                found[f"{layer}.block_sparse_moe.experts.{slot}.{name}.weight"] = tensor
    return found
