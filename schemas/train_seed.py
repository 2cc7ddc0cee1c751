"""Settings and manifest of train-seed."""

from typing import ClassVar

from pydantic import Field

from schemas.decoder import DecoderShape
from schemas.manifest import Manifest
from schemas.strict import Config, Strict
from schemas.training import TrainingConfig, TrainingMetrics


class SeedConfig(Config):
    """The seed: the decoder every expert starts from, trained on everything."""

    model: DecoderShape = Field(DecoderShape(), description="The decoder's shape.")
    training: TrainingConfig = Field(TrainingConfig(), description="How it is trained.")


class SeedMetrics(Strict):
    """What the seed came to."""

    parameters: int = Field(description="Weights, a tied output layer counted once.")
    training: TrainingMetrics = Field(description="The training run.")


class SeedManifest(Manifest):
    """Manifest of `seed/`, a Hugging Face model folder."""

    command: ClassVar[str] = "train-seed"
    folder: ClassVar[str] = "seed"

    config: SeedConfig
    metrics: SeedMetrics
