"""LoRA: linear layers of a frozen decoder, each with a low-rank map of its own beside it (Hu et al. 2021).

Shape letters: R rank, I width a linear layer reads, O width it writes; `...` any number of axes before.

- y = W u + alpha / rank · B A u, as in section 4.1 of the paper and in `peft`: A starts Kaiming-uniform, B zero, so a
  new adapter changes nothing; no dropout, no bias of its own; a layer's own bias stays, frozen
- A is drawn from the training's seed, the same for all experts: they start from one point, as full experts do
- only A and B require a gradient, so they are all that the training loop updates and checkpoints
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.failures import UsageFailure
from schemas.train_experts import LoraConfig
from stages.nn.decoder import Decoder


class LoraLinear(nn.Module):
    """A frozen linear layer and the adapter beside it."""

    def __init__(self, linear: nn.Linear, config: LoraConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.lora_A = nn.Parameter(linear.weight.new_empty(config.rank, linear.in_features))  # [R, I]
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, config.rank))  # [O, R]
        self.scale = config.alpha / config.rank
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)

    def forward(self, u: Tensor) -> Tensor:
        """`u`: [..., I]; returns [..., O]."""
        return self.linear(u) + self.scale * F.linear(F.linear(u, self.lora_A), self.lora_B)


def add_adapters(decoder: Decoder, config: LoraConfig, seed: int) -> Decoder:
    """Freeze `decoder` and put an adapter beside each linear layer that `config` targets, in place.

    Raises UsageFailure when the rank is larger than a layer's narrower side, or the decoder lacks a target.
    """
    decoder.requires_grad_(False)
    on_meta = decoder.model.embed_tokens.weight.is_meta
    generator = None if on_meta else torch.Generator(decoder.model.embed_tokens.weight.device).manual_seed(seed)
    for target in config.targets:
        found = [name for name, _ in decoder.model.layers.named_modules() if name.rsplit(".", 1)[-1] == target]
        if not found:
            raise UsageFailure(f"the seed has no linear layers of the name {target}: leave it out of --targets")
        for name in found:
            parent = decoder.model.layers.get_submodule(name.rsplit(".", 1)[0])
            linear = getattr(parent, target)
            narrower = min(linear.in_features, linear.out_features)
            if config.rank > narrower:
                raise UsageFailure(
                    f"--rank {config.rank} is more than {target}'s narrower side of {narrower}: "
                    "lower it, leave the layer out of --targets, or use --kind full"
                )
            setattr(parent, target, LoraLinear(linear, config, generator))
    return decoder


def adapters(decoder: Decoder) -> dict[str, tuple[Tensor, Tensor]]:
    """A [R, I] and B [O, R] of every adapter, by the name of the linear layer's weight in the decoder."""
    return {
        f"{name}.weight": (module.lora_A.detach(), module.lora_B.detach())
        for name, module in decoder.named_modules()
        if isinstance(module, LoraLinear)
    }
