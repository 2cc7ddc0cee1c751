"""A small decoder with experts inside, for tests."""

from functools import partial

import torch
from torch import nn

from schemas.decoder import DecoderConfig
from schemas.train_experts import LoraConfig
from schemas.train_gates import Selection
from stages.nn.decoder import Decoder
from stages.nn.gates import Gates
from stages.nn.lora import adapters, add_adapters
from stages.nn.routed import RoutedDecoder

VOCAB, WIDTH, END = 19, 16, 3
CONFIG = DecoderConfig(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1,
)  # fmt: skip
LORA = LoraConfig(rank=4, alpha=8.0)


def loud(seed):
    torch.manual_seed(seed)
    decoder = Decoder(CONFIG)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return decoder.eval().requires_grad_(False)


def loud_adapters(count, config=LORA):
    found = []
    for number in range(count):
        adapted = add_adapters(loud(0), config, seed=number)
        draw = torch.Generator().manual_seed(number)
        scale = config.alpha / config.rank
        each = adapters(adapted)
        found.append({name: (a, scale * torch.randn(b.shape, generator=draw) * 0.2) for name, (a, b) in each.items()})
    return found


def rows(count=3, tokens=11, seed=5):
    ids = torch.randint(VOCAB, (count, tokens), generator=torch.Generator().manual_seed(seed))
    ids[0, 5] = END
    return ids


def vectors(decoder, count, size=1.0):
    draw = torch.Generator().manual_seed(8)
    return {
        f"{name}.vectors": torch.randn(count, gates.stacked().shape[1], generator=draw) * size
        for name, gates in decoder.gates.by_name.items()
    }


def routed(kind="lora", count=3, place="module", mode="joint", memory=0.9, size=1.0, selection=None, tensors=None):
    seed = loud(0)
    parts = {
        "shared": (CONFIG, seed.weights()),
        "seed": seed.weights(),
        "adapters": loud_adapters(count) if kind == "lora" else [],
        "experts": [loud(number + 1).weights() for number in range(count)] if kind == "full" else [],
    }
    build = partial(RoutedDecoder.from_parts, **parts, place=place, mode=mode, memory=memory, end_of_text=END)
    if size is None:
        return build()
    tensors = vectors(build(), count, size) if tensors is None else tensors
    weigh = partial(Gates.log_weights, selection=selection or Selection())
    return build(tensors=tensors, weigh=weigh)
