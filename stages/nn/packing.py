"""A decoder's weights laid out for writing text: each is read as fast as it can be, and for few products.

Shape letters: R rows, O out, D model width, W = D + 1, Q queries, keys and values, E heads' width together, F MLP's.

- stored as (in, out), which a product with one row reads faster than nn.Linear's (out, in); q, k and v are one product,
  and so are the two halves of the MLP's first layer
- the weights of a norm go into those of the product after it
- a decoder with a part or a setting unknown here is not packed (`packable`)
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stages.nn.attention import Layer, RMSNorm
from stages.nn.decoder import Decoder

# What `PackedLayer` reads; a layer with anything else needs the general code.
PARTS = frozenset(
    f"{part}.weight"
    for part in (
        "input_layernorm",
        *(f"self_attn.{side}_proj" for side in "qkvo"),
        "post_attention_layernorm",
        *(f"mlp.{side}_proj" for side in ("gate", "up", "down")),
    )
)
BIASES = frozenset(f"self_attn.{side}_proj.bias" for side in "qkv")
# Settings it follows, or that show in the parts; any other must be at its default.
SETTINGS = frozenset(
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rope_theta",
        "rms_norm_eps",
        "tie_word_embeddings",
        "vocab_size",
        "max_position_embeddings",
        "model_type",
        "bos_token_id",
        "eos_token_id",
    ]
)


def packable(decoder: Decoder) -> bool:
    """Whether this module knows everything the decoder does: plain Llama layers, with or without q/k/v biases."""
    config = decoder.config
    for name, field in type(config).model_fields.items():
        if name not in SETTINGS and getattr(config, name) != field.get_default():
            return False
    return packable_layers(decoder.model.layers)


def packable_layers(layers: Iterable[nn.Module]) -> bool:
    """Whether `PackedLayer` reads every part that there is, fp32 all of them."""
    found = [dict(layer.named_parameters()) for layer in layers]
    return all(
        parts.keys() - BIASES == PARTS
        and (parts.keys() & BIASES) in (BIASES, frozenset())
        and all(weight.dtype is torch.float32 for weight in parts.values())  # there are no complex numbers of two bf16
        for parts in found
    )


class PackedLayer:
    """Weights of one layer, as (in, out)."""

    def __init__(self, layer: Layer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        turned, rest = (attention.q_proj, attention.k_proj), (attention.v_proj,)
        qkv = [_paired(each.weight, attention.head_dim) for each in turned] + [each.weight for each in rest]
        self.qkv_DQ = across(layer.input_layernorm, *qkv)
        biases = [_paired(each.bias, attention.head_dim) for each in turned if each.bias is not None]
        biases += [each.bias for each in rest if each.bias is not None]
        self.bias_Q = torch.cat(biases).detach() if biases else None
        self.out_ED = across(None, attention.o_proj.weight)
        self.gate_up_DF = across(layer.post_attention_layernorm, mlp.gate_proj.weight, mlp.up_proj.weight)
        self.down_FD = across(None, mlp.down_proj.weight)


def _paired(weight: Tensor, head_dim: int) -> Tensor:
    """What makes queries or keys, in another order: the two numbers that are rotated together become neighbours.

    Both in the same order, so that their products are as before.
    """
    return weight.detach().unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)


def across(norm: RMSNorm | None, *weights: Tensor) -> Tensor:
    """The weights side by side, [in, out], with what `decoding` leaves out of the norm before them."""
    weight_OD = torch.cat([weight.detach() for weight in weights])
    if norm is not None:
        weight_OD = weight_OD * (norm.weight.detach() * weight_OD.shape[1] ** 0.5)
    return weight_OD.T.contiguous()


def unit(x_RD: Tensor, x_RW: Tensor) -> Tensor:
    """States [..., D] over their length: RMSNorm without weights and without sqrt(D).

    `x_RW`: the same with sqrt(eps D) as one more number, so that their length is one norm.
    """
    return x_RD / torch.linalg.vector_norm(x_RW, dim=-1, keepdim=True)
