"""Settings and manifest of import."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from schemas.strict import Config
from schemas.train_seed import SeedManifest, SeedMetrics


class ImportConfig(Config):
    """A model from elsewhere, as the seed that every expert starts from."""

    source: str = Field(
        "",
        description="hf:FOLDER, a local Hugging Face folder with config.json, tokenizer.json and safetensors.",
        json_schema_extra={"argument": True, "runtime": True},  # what it holds counts: each file's digest is an input
    )

    @model_validator(mode="after")
    def _is_given(self) -> Self:
        if not self.source:
            raise ValueError("no model is given: `cpipe import RUN hf:FOLDER`")
        return self


class ImportMetrics(SeedMetrics):
    """What was taken over."""

    training: None = Field(None, description="None: it was trained elsewhere.")
    architecture: str = Field(description="Hugging Face's name of it.")
    precision: str = Field(description="What the weights were stored in; the seed holds the same values in fp32.")
    context: int = Field(description="Longest sequence it was trained on, in tokens.")
    unnamed_ids: int = Field(description="Ids of its vocabulary that the tokenizer has no token for: padding.")


class ImportManifest(SeedManifest):
    """Manifest of `seed/` where it was imported; to the stages after it, a seed like any other."""

    command: ClassVar[str] = "import"

    config: ImportConfig  # type: ignore[assignment]  # says where the seed is from, in place of how it was trained
    metrics: ImportMetrics
