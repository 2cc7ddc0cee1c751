"""Settings and manifest of train-gates."""

from typing import ClassVar, Literal

from pydantic import Field

from schemas.manifest import Manifest
from schemas.strict import Config, Strict
from schemas.training import TrainingConfig, TrainingMetrics

GateMode = Literal["independent", "joint", "contrastive", "mean-activation"]


class Selection(Config):
    """Which experts are asked for a token; every limit given must be met."""

    top_k: int | None = Field(None, ge=1, description="At most so many experts, those of highest score.")
    threshold: float | None = Field(
        None, gt=0, lt=1, description="Only experts whose gate is open so far, or whose share is so large: maybe none."
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Only experts among the fewest shares, the seed's too, that add up to so much.",
    )

    def __str__(self) -> str:
        limits = {"top-": self.top_k, "threshold ": self.threshold, "top-p ": self.top_p}
        return ", ".join(f"{name}{limit}" for name, limit in limits.items() if limit is not None) or "all"


class GatesConfig(Config):
    """PHATGOOSE gates at the input of each expert; experts and seed stay frozen."""

    modes: tuple[GateMode, ...] = Field(
        ("independent", "joint", "contrastive"),
        min_length=1,
        description="Ways to learn them: each alone on its own cluster (the paper's), together on all, by telling "
        "clusters apart without asking the experts, or not at all (the mean state of the cluster).",
    )
    memory: float = Field(
        0.99,
        ge=0,
        le=1,
        description="Share of what a gate has read of a document that it keeps per token; 0: the paper.",
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
    openness: tuple[float, ...] = Field(
        description="Mean weight of the seed (first) and of each expert while training, at the end."
    )
    tokens: int = Field(description="Tokens read for it.")
    training: TrainingMetrics | None = Field(description="The training run; None where nothing is trained.")


class GatesMetrics(Strict):
    """What the gates came to."""

    layer: int = Field(description="Seed layer read.")
    end_of_text: int = Field(description="Id of the token before each document, at which the gates begin to read anew.")
    experts: int = Field(description="Number of experts.")
    runs: tuple[GateRun, ...] = Field(description="One per training run.")


class GatesManifest(Manifest):
    """Manifest of `gates/`: gates.safetensors holds `<mode>.vectors` [experts, width] and `<mode>.bias` [experts]."""

    command: ClassVar[str] = "train-gates"
    folder: ClassVar[str] = "gates"

    config: GatesConfig
    metrics: GatesMetrics

    def reading(self, mode: GateMode) -> tuple[GateMode, int, float, int]:
        """How gates trained in this mode read: mode, layer, memory, and the token that begins a document."""
        return mode, self.metrics.layer, self.config.memory, self.metrics.end_of_text
