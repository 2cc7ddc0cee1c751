"""The learning rate as a pure function of the step."""

import math

from schemas.training import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Rate of optimizer step `step` (from 0): a linear rise, then half a cosine down to the final share."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - 1 - warmup)
    share = config.final_learning_rate + (1 - config.final_learning_rate) * (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * share
