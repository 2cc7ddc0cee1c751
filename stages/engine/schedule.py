"""The learning rate as a pure function of the step."""

import math

from schemas.training import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Rate of optimizer step `step` (from 0): a linear rise to the peak, then the schedule down to the final share.

    cosine: half of one, over all steps after the rise (Loshchilov & Hutter 2017); linear: a straight line over them
    wsd: the peak, then over the last steps the peak times 1 - √x (Hägele et al. 2024, "Scaling laws and
    compute-optimal training beyond fixed training durations"); constant: the peak to the end
    """
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - 1 - warmup)
    if config.schedule == "cosine":
        height = (1 + math.cos(math.pi * done)) / 2
    elif config.schedule == "linear":
        height = 1 - done
    elif config.schedule == "wsd":
        falling = min(round(config.decay * config.steps), config.steps - 1 - warmup)
        height = 1 - math.sqrt(max(0, step - (config.steps - 1 - falling)) / max(1, falling))
    else:
        height = 1.0
    share = config.final_learning_rate + (1 - config.final_learning_rate) * height
    return config.learning_rate * share
