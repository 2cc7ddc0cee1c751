"""Weights so large that no path through a model can be left out unnoticed, for tests."""

from torch import nn

from stages.nn.attention import RMSNorm


def loud(module, std=0.3):
    """The module, all its weights drawn anew, norms around one."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    for part in module.modules():
        if isinstance(part, RMSNorm):
            nn.init.normal_(part.weight, mean=1.0, std=0.3)
    return module
