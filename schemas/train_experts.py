"""Settings and manifests of train-experts."""

from typing import ClassVar

from pydantic import Field

from schemas.manifest import Manifest
from schemas.strict import Config, Strict, runtime_setting
from schemas.training import TrainingConfig, TrainingMetrics


class ExpertsConfig(Config):
    """Experts branched from the seed, one per cluster, and a dense baseline that sees as many tokens as all of them."""

    training: TrainingConfig = Field(
        TrainingConfig(), description="Of all experts together: each takes its share of the batch, and all the steps."
    )
    dense: bool = Field(True, description="Also train the dense baseline: one model, all clusters, the whole batch.")
    expert: str | None = runtime_setting(
        None, "Train only this member: a cluster's number, or `dense` (for arrays of jobs).", pattern=r"^(\d+|dense)$"
    )


class ExpertConfig(Config):
    """One member: what it is trained on, and how."""

    cluster: int | None = Field(ge=0, description="The cluster whose documents it sees; None for all of them.")
    training: TrainingConfig = Field(description="The training settings, with its own share of the batch.")


class ExpertMetrics(Strict):
    """What one expert came to."""

    parameters: int = Field(description="Weights, a tied output layer counted once.")
    documents: int = Field(description="Documents it was trained on.")
    epochs: float = Field(description="How often it saw them.")
    training: TrainingMetrics = Field(description="The training run.")


class ExpertManifest(Manifest):
    """Manifest of `experts/007/` or `dense/`, a Hugging Face model folder."""

    command: ClassVar[str] = "train-experts"
    folder: ClassVar[str] = "experts"

    config: ExpertConfig
    metrics: ExpertMetrics


class ExpertsMetrics(Strict):
    """What the experts came to together."""

    experts: int = Field(description="Number of experts.")
    tokens: int = Field(description="Tokens all experts together were trained on.")
    dense_tokens: int = Field(description="Tokens the dense baseline was trained on; 0 without one.")
    final_losses: tuple[float, ...] = Field(description="Each expert's last training loss, nats per token.")


class ExpertsManifest(Manifest):
    """Manifest of `experts/`: written when every member has its own."""

    command: ClassVar[str] = "train-experts"
    folder: ClassVar[str] = "experts"

    config: ExpertsConfig
    metrics: ExpertsMetrics
