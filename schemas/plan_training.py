"""What plan is asked, and what it answers. It has no manifest: it writes nothing into the run."""

from pydantic import Field

from schemas.compose_model import ComposeConfig
from schemas.strict import Config, Strict
from schemas.train_experts import ExpertsConfig
from schemas.train_gates import GatesConfig
from schemas.train_seed import SeedConfig


class PlanConfig(Config):
    """The settings of all stages that train, and of the machine."""

    seed: SeedConfig = Field(SeedConfig(), description="The seed's settings; the seed itself, once it is trained.")
    experts: ExpertsConfig = Field(ExpertsConfig(), description="The experts' and the dense baseline's.")
    gates: GatesConfig = Field(GatesConfig(), description="The gates'.")
    compositions: tuple[ComposeConfig, ...] = Field((ComposeConfig(),), description="The central models'.")
    imported: str | bool | None = Field(
        None,
        description="Whether the seed is imported, so that no training of it is planned; or hf:FOLDER, which it is. "
        "Default: as the run has it.",
    )
    vocab_size: int = Field(8192, gt=0, description="Token ids, where there are no tokens yet.")
    clusters: int = Field(8, gt=0, description="Experts, where there are no clusters yet.")
    processes: int = Field(1, gt=0, description="Devices that train together.")
    flops_per_second: float | None = Field(
        None, gt=0, description="Speed of one device, of another machine; default: measured here."
    )
    seconds: float = Field(5.0, gt=0, description="How long that is measured.")


class Memory(Strict):
    """Bytes on one device."""

    weights: int = Field(description="fp32; those that are frozen too.")
    gradients: int = Field(description="fp32.")
    optimizer: int = Field(description="AdamW's two averages, Muon's one, fp32; none where they are offloaded.")
    copies: int = Field(description="Weights in half precision, which autocast keeps for the backward pass.")
    activations: int = Field(description="Of one micro-batch, kept for the backward pass.")
    total: int = Field(description="All of them.")
    host: int = Field(description="What goes to the processor's memory instead, with all an offloaded optimizer needs.")


class PlannedTraining(Strict):
    """One training, or several alike."""

    name: str = Field(description="Folder in the run.")
    count: int = Field(description="Trainings alike.")
    parameters: int = Field(description="Weights of one that are saved, a tied output layer counted once.")
    trained_parameters: int = Field(description="Those that change.")
    tokens: int = Field(description="Tokens one is trained on.")
    epochs: float | None = Field(description="How often it sees its text, on average; null while there is none.")
    flops: float = Field(
        description="Floating point operations of one, forward and backward, and forward again where activations are "
        "checkpointed."
    )
    learning_rate: float = Field(description="Peak, as given or found.")
    precision: str = Field(description="fp32, bf16 or fp16, on this machine where it is auto.")
    zero_stage: int = Field(description="DeepSpeed's ZeRO stage.")
    micro_batch_size: int = Field(description="Rows in one forward pass of one device.")
    memory: Memory = Field(description="On each device.")
    disk: int = Field(description="Bytes of the result of one, and of its checkpoints while it is trained.")
    seconds: float | None = Field(description="Estimated duration of all of them, one after the other.")


class Plan(Strict):
    """Everything the settings say would be trained."""

    trainings: tuple[PlannedTraining, ...] = Field(description="In the order of the pipeline.")
    flops_per_second: float | None = Field(description="Of one device, given or measured.")
    measured: bool = Field(description="Whether that was measured here, with the seed.")
    unknown: tuple[str, ...] = Field(description="What cannot be told yet, and why.")
