"""How anything is trained: optimizer, schedule, precision, engine. One set of fields for every model."""

import json
import os
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from schemas.failures import IntegrityFailure
from schemas.strict import Config, Strict, runtime_setting, unique_json


class TrainingConfig(Config):
    """The training loop's settings."""

    steps: int = Field(1000, gt=0, description="Optimizer steps.")
    batch_size: int = Field(32, gt=0, description="Rows in one optimizer step, over all processes.")
    sequence_length: int = Field(256, gt=1, description="Tokens in a row.")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak, after warm-up; where not set, by the size of the training: `cpipe plan` tells it.",
    )
    schedule: Literal["cosine", "wsd", "linear", "constant"] = Field(
        "cosine", description="Of the rate after warm-up; wsd keeps the peak and falls in the last steps only."
    )
    final_learning_rate: float = Field(
        0.1, ge=0, le=1, description="Where the rate ends, as a share of the peak; constant stays at the peak."
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which the rate rises linearly.")
    decay: float = Field(0.2, gt=0, le=1, description="Share of the steps in which the rate of wsd falls.")
    optimizer: Literal["auto", "adamw", "muon"] = Field(
        "auto",
        description="AdamW, or Muon for linear maps inside the model and AdamW for the rest; auto is Muon where such "
        "maps are trained, but not under ZeRO 3, with offloading, or where a --deepspeed file names AdamW.",
    )
    weight_decay: float = Field(0.1, ge=0, description="Of either optimizer, on matrices only.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the gradient average.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the squared-gradient average.")
    gradient_clipping: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    skipped_steps: int = Field(
        3, ge=0, description="Steps in a row that may be left out as loss or gradient is not finite; one more stops."
    )
    mask_documents: bool = Field(
        False, description="Let no token of a row see the documents before its own; positions run on through the row."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of initial weights and of the order of the rows.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Of the weights in the forward pass; auto is bf16 where it is fast, fp16 is for GPUs without it.",
    )
    engine: Literal["auto", "deepspeed", "torch"] = Field(
        "auto", description="DeepSpeed, or plain torch on one device; auto takes DeepSpeed where it is installed."
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="torch.compile, which changes the last bits; auto is on for long trainings of decoders: on CUDA "
        "from 1,000 steps on, on processors from 5e13 FLOPs for each thread on, if there is a C++ compiler.",
    )
    zero_stage: int = Field(0, ge=0, le=3, description="DeepSpeed's ZeRO stage: what is sharded over processes.")
    offload_optimizer: Literal["none", "cpu"] = Field(
        "none", description="Where ZeRO 1 to 3 keep the optimizer's averages and do its steps; cpu frees GPU memory."
    )
    deepspeed: str | None = Field(
        None, description="JSON file of DeepSpeed settings to go with these; its content is kept in its place."
    )
    micro_batch_size: int | None = runtime_setting(
        None, "Rows in one forward pass of one process; default: the whole share of a step.", gt=0
    )
    activation_checkpointing: bool = runtime_setting(
        False, "Compute each layer's inside once more for the gradient, to keep less of it in memory."
    )
    checkpoint_every: int = runtime_setting(
        200,
        "Steps between checkpoints from which a killed run resumes; training waits for a copy of weights and averages "
        "in memory, which a thread writes.",
        gt=0,
    )
    tensorboard: bool = runtime_setting(True, "Write event files for TensorBoard to `tensorboard/` by metrics.jsonl.")
    wandb: bool = runtime_setting(
        False, "Also log to Weights & Biases; its own variables rule: WANDB_MODE=offline needs no network."
    )
    max_minutes: float | None = runtime_setting(
        None,
        "Minutes after the start of the command before which a training stops, to be resumed (exit code 75).",
        gt=0,
    )
    sample_every: int = runtime_setting(
        0, "Steps between short texts of a decoder in training, in the log and in samples.jsonl; 0: none.", ge=0
    )
    sample_prompt: str = runtime_setting("", "What the samples go on from, the likeliest token each time.")
    log_every: int = runtime_setting(50, "Steps between lines of the log and of metrics.jsonl.", gt=0)

    @field_validator("deepspeed")
    @classmethod
    def _content(cls, value: str | None) -> str | None:
        """The file's content in canonical form: it decides what is computed, where it lies does not."""
        if value is None:
            return None
        text = value
        if not value.startswith("{"):
            if os.path.exists(value) and not os.path.isfile(value):
                raise ValueError(f"cannot read {value}: it is no file")
            try:
                text = Path(value).read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"cannot read {value}: {getattr(error, 'strerror', None) or error}") from error
        try:
            unique_json(text)
            content = json.loads(text, parse_constant=_no_number)
            canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (ValueError, IntegrityFailure, RecursionError) as error:
            raise ValueError(f"{value:.400} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{value} must hold a JSON object, found {text:.40}")
        return canonical

    @property
    def peak(self) -> float:
        """The learning rate. Raises ValueError where it is still to be found (`stages.engine.schedule.peak_rate`)."""
        if self.learning_rate is None:
            raise ValueError("the learning rate is not known yet")
        return self.learning_rate

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step learns from, over all processes."""
        return self.batch_size * self.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens that all steps together learn from."""
        return self.steps * self.tokens_per_step

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} are more than all steps: lower one of them")
        return self


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


class TrainingMetrics(Strict):
    """What a training run came to."""

    steps: int = Field(description="Optimizer steps.")
    tokens: int = Field(description="Tokens trained on.")
    first_loss: float = Field(description="Loss of the first step, nats per token; ln(vocabulary) for a new model.")
    final_loss: float = Field(description="Mean loss of the last twentieth of the steps, nats per token.")
    learning_rate: float | None = Field(
        None, description="Its peak, given or found; none in what was written before it was recorded."
    )
    curve: tuple[float, ...] = Field(description="Mean losses of equal stretches of the run.")
    skipped: int = Field(0, description="Steps left out because their loss or gradient was not finite.")
    engine: str = Field(description="deepspeed or torch.")
    precision: str = Field(description="fp32, bf16 or fp16.")
    compiled: bool = Field(False, description="Whether the model was compiled.")

    @model_serializer(mode="wrap")
    def _without_a_rate_that_is_not_there(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """So a manifest that was written without one has the digest it had."""
        return {name: value for name, value in write(self).items() if name != "learning_rate" or value is not None}
