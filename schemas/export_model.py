"""Settings and manifest of export."""

import re
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from schemas.manifest import Manifest
from schemas.strict import Config, Strict

Dtype = Literal["fp32", "bf16", "fp16"]
MAX_SHARD_BYTES = 5_000_000_000


class ExportConfig(Config):
    """A model of the run as a folder that transformers, and whatever reads its formats, loads as it is."""

    folder: str = Field(
        "",
        description="Folder to make; it may lie anywhere but over the run.",
        json_schema_extra={"argument": True, "runtime": True},
    )
    model: str = Field(
        "seed",
        description="seed, dense, experts/NUMBER as in experts/003, average: the mean of the experts' weights, or "
        "routed: full experts behind their gates (module-joint, of memory 0), in the format of Mixtral.",
    )
    experts_per_token: int | None = Field(
        None, gt=0, description="Of the routed model, MLPs asked for a token, the seed's among them; default: all."
    )
    adapter: bool = Field(
        False, description="Of a LoRA expert, write the PEFT adapter alone, not the model it makes of the seed."
    )
    base_model: str | None = Field(
        None,
        min_length=1,
        description="What --adapter names as the model it belongs to, word for word, as a name on a hub; default: the "
        "run's seed, by its path relative to the folder.",
    )
    dtype: Dtype = Field("fp32", description="Precision of the weights; the run's own are fp32.")
    max_shard_bytes: int = Field(
        MAX_SHARD_BYTES, gt=0, description="Weights of a model beyond so many bytes come in several files."
    )

    @field_validator("model")
    @classmethod
    def _is_one(cls, model: str) -> str:
        if not re.fullmatch(r"seed|dense(-[0-9]+)?|average|routed|experts/[0-9]{3,}", model):
            raise ValueError(
                f"{model!r} is no model to export: expected seed, dense, average, routed or experts/003 and the like"
            )
        return model

    @model_validator(mode="after")
    def _is_given(self) -> Self:
        if not self.folder:
            raise ValueError("no folder is given: `cpipe export RUN FOLDER`")
        return self

    @model_validator(mode="after")
    def _only_the_routed_asks(self) -> Self:
        if self.experts_per_token is not None and self.model != "routed":
            raise ValueError(f"experts_per_token is of --model routed, and the model is {self.model}")
        return self

    @model_validator(mode="after")
    def _adapter_is_of_an_expert(self) -> Self:
        if self.adapter and not self.model.startswith("experts/"):
            raise ValueError(f"{self.model} has no adapter of its own: give --model experts/003 and the like")
        if self.adapter and self.max_shard_bytes != MAX_SHARD_BYTES:
            raise ValueError("an adapter is one file: max_shard_bytes does not go with --adapter")
        if self.base_model is not None and not self.adapter:
            raise ValueError("base_model is what an adapter belongs to: give --adapter too")
        return self


class ExportMetrics(Strict):
    """What was written."""

    parameters: int = Field(description="Weights, a tied output layer counted once; of an adapter its own.")
    architecture: str = Field(description="Hugging Face's name of it, or of the model it adapts.")
    weight_files: int = Field(description="Files the weights are in.")
    weight_bytes: int = Field(description="Bytes of them.")


class ExportManifest(Manifest):
    """Manifest of an exported folder; its paths are relative to that folder, which is no part of the run."""

    command: ClassVar[str] = "export"
    folder: ClassVar[str] = "."

    config: ExportConfig
    metrics: ExportMetrics
