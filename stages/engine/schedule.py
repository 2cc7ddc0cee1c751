"""The learning rate: its peak, by the size of the training, and a pure function of the step."""

import math

from torch import nn

from schemas.training import TrainingConfig
from stages.engine.optimizer import choose_optimizer, trained

FLOPS = 6  # of a step, for each weight that is trained and each token (Kaplan et al. 2020, section 2.1)
OF_ADAMW = 0.5  # of the law's rate, with which a small training by AdamW does best (benchmarks/bench_rates.py)
GOES_ON = 0.5  # of the rate of new weights, for what was trained before (likewise)
ELSEWHERE = 20  # tokens for each weight that a model from elsewhere has seen, at least (Hoffmann et al. 2022)


def peak_rate(config: TrainingConfig, module: nn.Module, seen: int | None) -> float:
    """The peak, as given, or by the law of DeepSeek LLM (Bi et al. 2024, section 3.1): 0.3118 C^(-1/8).

    C: FLOPS for each weight and each token it has seen when this training ends. The law was found with AdamW for 1e17
    to 2e19 of them; Muon's updates are as large. Adapters are new, and count with the weights they stand beside.

    module: before any of it is taken apart
    seen: tokens that the weights were trained on before; None: some, elsewhere
    """
    if config.learning_rate is not None:
        return config.learning_rate
    moving = trained(module)
    adapters = any(name.endswith(".lora_A") for name in moving)
    weights = sum(p.numel() for p in (module.parameters() if adapters else moving.values()))
    before = ELSEWHERE * weights if seen is None else seen
    share = GOES_ON if before and not adapters else 1.0
    share *= OF_ADAMW if choose_optimizer(config, module) == "adamw" else 1.0
    flops = FLOPS * weights * (before + config.tokens)
    return float(f"{0.3118 * flops**-0.125 * share:.2g}")  # as one would write it


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Rate of optimizer step `step` (from 0): a linear rise to the peak, then the schedule down to the final share.

    cosine: half of one, over all steps after the rise (Loshchilov & Hutter 2017); linear: a straight line over them
    wsd: the peak, then over the last steps the peak times 1 - √x (Hägele et al. 2024, "Scaling laws and
    compute-optimal training beyond fixed training durations"); constant: the peak to the end
    """
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.peak * (step + 1) / warmup
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
    return config.peak * share
