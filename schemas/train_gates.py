"""Settings and manifest of train-gates."""

from typing import ClassVar, Literal

from pydantic import Field

from schemas.manifest import Manifest
from schemas.strict import Config, Strict
from schemas.training import TrainingConfig, TrainingMetrics

GateMode = Literal["independent", "joint"]


class GatesConfig(Config):
    """PHATGOOSE gates at the input of each expert; experts and seed stay frozen."""

    modes: tuple[GateMode, ...] = Field(
        ("independent", "joint"),
        min_length=1,
        description="Ways to learn them: each alone on its own cluster (the paper), or together on all.",
    )
    layer: int | None = Field(
        None, ge=0, description="Seed layer whose hidden state the gates read; default: half of its depth."
    )
    training: TrainingConfig = Field(
        TrainingConfig(steps=100, batch_size=16, learning_rate=5e-3, warmup=0.06, weight_decay=0.0),
        description="How each mode's gates are trained.",
    )


class GateRun(Strict):
    """One training run of gates."""

    mode: GateMode = Field(description="How it was trained.")
    expert: int | None = Field(description="The expert it belongs to; None when trained jointly.")
    openness: tuple[float, ...] = Field(description="Mean weight of the seed (first) and of each expert, at the end.")
    training: TrainingMetrics = Field(description="The training run.")


class GatesMetrics(Strict):
    """What the gates came to."""

    layer: int = Field(description="Seed layer read.")
    experts: int = Field(description="Number of experts.")
    runs: tuple[GateRun, ...] = Field(description="One per training run.")


class GatesManifest(Manifest):
    """Manifest of `gates/`: gates.safetensors holds `<mode>.vectors` [experts, width] and `<mode>.bias` [experts]."""

    command: ClassVar[str] = "train-gates"
    folder: ClassVar[str] = "gates"

    config: GatesConfig
    metrics: GatesMetrics
