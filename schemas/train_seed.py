"""Settings and manifest of train-seed."""

import json
from pathlib import Path
from typing import ClassVar, Self, cast

from pydantic import Field

from schemas.decoder import DecoderShape
from schemas.manifest import MAX_BYTES, Manifest
from schemas.strict import Config, Strict
from schemas.training import TrainingConfig, TrainingMetrics


class SeedConfig(Config):
    """The seed: the decoder every expert starts from, trained on everything."""

    model: DecoderShape = Field(DecoderShape(), description="The decoder's shape.")
    training: TrainingConfig = Field(
        # Experts begin where the seed ends: from a rate that has fallen already they learn less (see `--schedule wsd`,
        # whose last part their own schedule is).
        TrainingConfig(schedule="constant"),
        description="How it is trained; at a constant rate, as those that go on from it let the rate fall.",
    )


class SeedMetrics(Strict):
    """What the seed came to."""

    parameters: int = Field(description="Weights, a tied output layer counted once.")
    training: TrainingMetrics | None = Field(description="The training run; None where there was none here.")

    @property
    def seen(self) -> int | None:
        """Tokens it was trained on; None where that was elsewhere."""
        return self.training.tokens if self.training else None


class SeedManifest(Manifest):
    """Manifest of `seed/`, a Hugging Face model folder."""

    command: ClassVar[str] = "train-seed"
    folder: ClassVar[str] = "seed"

    config: SeedConfig
    metrics: SeedMetrics

    @classmethod
    def parse(cls, path: Path) -> Self:
        """Read the manifest of a seed, trained here or imported. Raises IntegrityFailure."""
        from schemas.import_model import ImportManifest  # which is made from this class

        kinds = {kind.command: kind for kind in (SeedManifest, ImportManifest)}
        kind = kinds.get(_command_of(path), cls)
        return super().parse(path) if kind is cls else cast(Self, kind.parse(path))


def _command_of(path: Path) -> str:
    """Which command the manifest says it is of; nothing for what is none, as the one who reads it will find out."""
    with path.open("rb") as file:
        text = file.read(MAX_BYTES)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    return str(found.get("schema")).removeprefix("cpipe.").split("/")[0] if isinstance(found, dict) else ""
