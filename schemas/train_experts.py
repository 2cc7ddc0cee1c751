"""Settings and manifests of train-experts."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from schemas.failures import UsageFailure
from schemas.manifest import Manifest
from schemas.strict import Config, Strict, runtime_setting
from schemas.training import TrainingConfig, TrainingMetrics

Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEARS: tuple[Linear, ...] = get_args(Linear)  # of a layer, in the order in which they are reached


class LoraConfig(Config):
    """Low-rank adapters beside frozen linear layers: y = W u + alpha / rank · B A u (Hu et al. 2021, section 4.1)."""

    rank: int = Field(16, gt=0, description="Of a LoRA expert's adapters: rows of A, columns of B.")
    alpha: float = Field(32.0, gt=0, description="What a LoRA expert's adapters add is scaled by alpha / rank.")
    targets: tuple[Linear, ...] = Field(
        LINEARS, min_length=1, description="Linear layers with a LoRA adapter; `all`, or names with commas between."
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _each_once_in_order(cls, given: Any) -> Any:
        """The same set is the same setting, however it is written. What is no name is left for pydantic to refuse."""
        if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
            return given
        names = [part.strip() for name in given for part in name.split(",")]
        if "all" in names:
            names += LINEARS
        known = [name for name in LINEARS if name in names]
        return (*known, *(name for name in names if name not in (*LINEARS, "all")))


class ExpertsConfig(Config):
    """Experts branched from the seed, one per cluster, and a dense baseline that sees as many tokens as all of them."""

    kind: Literal["full", "lora"] = Field(
        "full",
        description="Experts with all weights their own, or LoRA adapters over the weights of the seed.",
    )
    lora: LoraConfig = Field(LoraConfig(), description="The adapters, where the kind is lora.")
    training: TrainingConfig = Field(
        TrainingConfig(), description="Of all experts together: each takes its share of the batch, and all the steps."
    )
    dense: bool = Field(
        True,
        description="Also train the dense baseline: one model, all clusters, the whole batch, and all weights its "
        "own, whatever the kind of the experts.",
    )
    expert: str | None = runtime_setting(
        None,
        "Train only this member: a cluster's number, or `dense` (for arrays of jobs).",
        pattern=r"^([0-9]+|dense)$",
    )
    parallel: int | None = runtime_setting(
        None,
        "Members trained at once, each in a process of its own with its share of the threads; default: one per CUDA "
        "device, and one on a processor, where other numbers of threads round differently, so that bytes are equal "
        "only for equal numbers. Under a launcher one at a time.",
        gt=0,
    )

    @model_validator(mode="after")
    def _adapters_are_of_lora(self) -> Self:
        if self.kind == "full" and self.lora != LoraConfig():
            raise ValueError("rank, alpha and targets are settings of --kind lora, and the kind is full")
        return self

    def members(self, clusters: int) -> Iterator[tuple[str, "ExpertConfig"]]:
        """The folder and the settings of every member. Raises UsageFailure where the batch does not divide."""
        whole = self.training
        if whole.batch_size % clusters:
            raise UsageFailure(
                f"a batch of {whole.batch_size} rows does not divide among {clusters} experts: "
                f"use --batch-size {max(1, round(whole.batch_size / clusters)) * clusters}"
            )
        share = whole.model_copy(update={"batch_size": whole.batch_size // clusters})
        lora = self.lora if self.kind == "lora" else None
        for cluster in range(clusters):
            yield f"experts/{cluster:03d}", ExpertConfig(cluster=cluster, lora=lora, training=share)
        if self.dense:
            yield "dense", ExpertConfig(cluster=None, lora=None, training=whole)


class ExpertConfig(Config):
    """One member: what it is trained on, and how."""

    cluster: int | None = Field(ge=0, description="The cluster whose documents it sees; None for all of them.")
    lora: LoraConfig | None = Field(None, description="Its adapters over the seed; None: all its weights are its own.")
    training: TrainingConfig = Field(description="The training settings, with its own share of the batch.")


class ExpertMetrics(Strict):
    """What one expert came to."""

    parameters: int = Field(description="Weights of its own, a tied output layer counted once; of LoRA the adapters'.")
    documents: int = Field(description="Documents it was trained on.")
    epochs: float = Field(description="How often it saw them.")
    training: TrainingMetrics = Field(description="The training run.")


class ExpertManifest(Manifest):
    """Manifest of `experts/007/` or `dense/`, a Hugging Face model folder or a PEFT adapter."""

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
