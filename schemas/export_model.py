"""Settings and manifest of export."""

import re
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from schemas.manifest import Manifest
from schemas.strict import Config, Strict

Dtype = Literal["fp32", "bf16", "fp16"]


class ExportConfig(Config):
    """A model of the run as a folder that transformers, and whatever reads its formats, loads as it is."""

    folder: str = Field(
        "",
        description="Folder to make; it may lie anywhere but over the run.",
        json_schema_extra={"argument": True, "runtime": True},
    )
    model: str = Field(
        "seed",
        description="seed, dense, experts/NUMBER as in experts/003, or average: the mean of the experts' weights.",
    )
    dtype: Dtype = Field("fp32", description="Precision of the weights; the run's own are fp32.")
    max_shard_bytes: int = Field(5_000_000_000, gt=0, description="Weights beyond so many bytes come in several files.")

    @field_validator("model")
    @classmethod
    def _is_one(cls, model: str) -> str:
        if not re.fullmatch(r"seed|dense|average|experts/\d{3,}", model):
            raise ValueError(
                f"{model!r} is no model to export: expected seed, dense, average or experts/003 and the like"
            )
        return model

    @model_validator(mode="after")
    def _is_given(self) -> Self:
        if not self.folder:
            raise ValueError("no folder is given: `cpipe export RUN FOLDER`")
        return self


class ExportMetrics(Strict):
    """What was written."""

    parameters: int = Field(description="Weights, a tied output layer counted once.")
    architecture: str = Field(description="Hugging Face's name of it.")
    weight_files: int = Field(description="Files the weights are in.")
    weight_bytes: int = Field(description="Bytes of them.")


class ExportManifest(Manifest):
    """Manifest of an exported folder; its paths are relative to that folder, which is no part of the run."""

    command: ClassVar[str] = "export"
    folder: ClassVar[str] = "."

    config: ExportConfig
    metrics: ExportMetrics
