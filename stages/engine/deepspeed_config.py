"""The configuration DeepSpeed is started with."""

from typing import Any

from schemas.training import TrainingConfig


def deepspeed_config(config: TrainingConfig, world: int) -> dict[str, Any]:
    """What DeepSpeed must know of cpipe's settings, for `world` processes."""
    rows = config.batch_size // world
    micro = min(config.micro_batch_size or rows, rows)
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": config.offload_optimizer}
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": rows // micro,
        # Without ZeRO, DeepSpeed clips but does not tell the norm, so the engine clips.
        "gradient_clipping": config.gradient_clipping if config.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW everywhere: DeepSpeed's for CPUs is compiled at the start
        "steps_per_print": 10**9,
    }
