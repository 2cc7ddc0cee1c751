"""The configuration DeepSpeed is started with: cpipe's settings, and those of the user's own file beside them.

- DeepSpeed passes over a top-level key it does not know without a word, so only the keys below are let through
- a key that says what a flag of cpipe says must agree with it, or be "auto": the flag is in the manifest and decides
- checkpoint engines, data samplers, monitors and the like are not let through: they read or write files past cpipe
"""

import difflib
import json
from typing import Any

from schemas.failures import UsageFailure
from schemas.training import TrainingConfig
from stages.engine.precision import LossScale

PASSED = ("communication_data_type", "prescale_gradients", "gradient_predivide_factor")  # and most of zero_optimization
SILENT = ("wall_clock_breakdown", "memory_breakdown", "dump_state")  # DeepSpeed's log, which cpipe does not show
FIXED = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, **dict.fromkeys(SILENT, False)}
SIZES = {"train_batch_size": "--batch-size", "train_micro_batch_size_per_gpu": "--micro-batch-size"}
COMPARED = (*SIZES, "gradient_accumulation_steps", "gradient_clipping", "optimizer", "scheduler", "fp16", "bf16")
KNOWN = (*PASSED, "zero_optimization", *COMPARED, *FIXED, "steps_per_print")
UNPASSED_ZERO = (
    *("offload_param", "cpu_offload_param", "cpu_offload", "zenflow", "elastic_checkpoint", "load_from_fp32_weights"),
    "round_robin_gradients",  # with which DeepSpeed 0.19 gives parameters one another's place
    "compute_grad_norm",  # which clipping needs
    *("stage3_module_granularity_threshold", "module_granularity_threshold"),  # a linear layer is found taken apart
    "legacy_stage1",  # which DeepSpeed has given up
)


def deepspeed_config(config: TrainingConfig, precision: str, optimizer: str, world: int) -> dict[str, Any]:
    """What DeepSpeed is told, for `world` processes; `precision` and `optimizer` as chosen.

    Raises UsageFailure for a key of the user's file that is unknown or says another thing than cpipe's settings.
    """
    given: dict[str, Any] = json.loads(config.deepspeed or "{}")
    own = _own(config, world)
    for key in given:
        if key not in KNOWN:
            close = difflib.get_close_matches(key, KNOWN, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"it may have {', '.join(KNOWN)}"
            raise UsageFailure(f"--deepspeed: the key `{key}` is not one cpipe hands to DeepSpeed; {hint}")
    zero = _table(given, "zero_optimization")
    for key in UNPASSED_ZERO:
        if key in zero:
            raise UsageFailure(f"--deepspeed: `zero_optimization.{key}` is not handed to DeepSpeed: leave it out")
    _compare(given, own, precision, optimizer, config)
    offload = {**_table(zero, "offload_optimizer", "zero_optimization."), "device": config.offload_optimizer}
    passed = {key: given[key] for key in PASSED if key in given}
    zero = {**_without_auto(zero), "stage": config.zero_stage}
    zero.pop("offload_optimizer", None)
    if config.offload_optimizer != "none":
        zero["offload_optimizer"] = _without_auto(offload)
    return {**own, **_without_auto(passed), "zero_optimization": zero}


def _own(config: TrainingConfig, world: int) -> dict[str, Any]:
    rows = config.batch_size // world
    micro = min(config.micro_batch_size or rows, rows)
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": rows // micro,
        # Without ZeRO, DeepSpeed clips but does not tell the norm, so the engine clips.
        "gradient_clipping": config.gradient_clipping if config.zero_stage else 0.0,
        **FIXED,  # no optimizer of DeepSpeed's: the one for processors would be compiled at the start
        "steps_per_print": 10**9,
    }


def _compare(given: dict[str, Any], own: dict[str, Any], precision: str, chosen: str, config: TrainingConfig) -> None:
    """Refuse what contradicts cpipe's settings."""
    _agree(
        given,
        {**own, "gradient_clipping": config.gradient_clipping, "steps_per_print": None},
        "",
        {**SIZES, "gradient_clipping": "--gradient-clipping"},
    )
    zero, optimizer = _table(given, "zero_optimization"), _table(given, "optimizer")
    _agree(zero, {"stage": config.zero_stage}, "zero_optimization.", {"stage": "--zero-stage"})
    offload, path = _table(zero, "offload_optimizer", "zero_optimization."), "zero_optimization.offload_optimizer."
    _agree(offload, {"device": config.offload_optimizer}, path, {"device": "--offload-optimizer"})
    kind = {"adamw": "AdamW", "muon": "Muon"}[chosen]
    _agree(optimizer, {"type": kind, "params": None}, "optimizer.", {"type": "--optimizer"}, strict=True)
    betas = [config.adam_beta1, config.adam_beta2]
    params = {"lr": config.peak, "betas": betas, "eps": 1e-8, "weight_decay": config.weight_decay}
    flags = {
        "lr": "--learning-rate, or the size of the training,",
        "betas": "--adam-beta1 and -2",
        "weight_decay": "--weight-decay",
    }
    _agree(_table(optimizer, "params", "optimizer."), params, "optimizer.params.", flags, strict=True)
    if (scheduler := _table(given, "scheduler")) != {}:
        found = json.dumps(scheduler.get("type"))
        raise UsageFailure(f"--deepspeed: scheduler {found} beside --schedule {config.schedule}: leave it out")
    scale = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": LossScale.PATIENCE, "min_loss_scale": 1}
    for name in ("fp16", "bf16"):
        table, switch = _table(given, name), {"enabled": precision == name}
        strict = table.get("enabled") is True  # what is switched off may say what it likes
        _agree(table, switch | (scale if strict else {}), f"{name}.", {"enabled": "--precision"}, strict=strict)


def _agree(
    given: dict[str, Any], own: dict[str, Any], path: str, flags: dict[str, str], *, strict: bool = False
) -> None:
    """Refuse a value of `given` that is neither "auto" nor cpipe's; `strict`: and a key that cpipe does not have."""
    for key, value in given.items():
        if value == "auto":
            continue
        if strict and key not in own:
            raise UsageFailure(f"--deepspeed: `{path}{key}` is not one of {', '.join(own)}: leave it out")
        mine = own.get(key)
        if mine is not None and (value != mine or isinstance(value, bool) != isinstance(mine, bool)):
            raise UsageFailure(
                f"--deepspeed: {path}{key} is {json.dumps(value):.80}, but {flags.get(key, 'cpipe')} says "
                f'{json.dumps(mine)}: make them equal, or write "auto"'
            )


def _table(given: dict[str, Any], key: str, path: str = "") -> dict[str, Any]:
    value = given.get(key, {})
    if value == "auto":
        return {}
    if not isinstance(value, dict):
        raise UsageFailure(f"--deepspeed: `{path}{key}` must be a table of settings, found {json.dumps(value):.80}")
    return value


def _without_auto(table: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed itself does not know the word."""
    return {key: value for key, value in table.items() if value != "auto"}
