"""The compose stage: the central concept model, its bridges to the experts, and what was measured.

- two manifests: the central model alone (`central-alone`, shared by every composition with the same settings) and the
  composition (one folder per `name`, so that controls and bridge kinds live beside each other in a run)
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from schemas.central import CentralShape
from schemas.changes import differing
from schemas.failures import UsageFailure
from schemas.manifest import Conversion, Manifest
from schemas.strict import Config, Strict, runtime_setting
from schemas.training import TrainingConfig, TrainingMetrics


class BridgeConfig(Config):
    """How the central model reads the experts."""

    bridge: Literal["stitch", "calm"] = Field(
        "stitch",
        description="Position-wise mixing of hidden states, or cross-attention; in the end it is mixing.",
    )
    head: Literal["predictions", "states"] = Field(
        "predictions",
        description="What is mixed in the end: the predictions of the central model and the experts, each through its "
        "own output layer, or their last states, for the central model's.",
    )
    token_sites: int = Field(2, gt=0, description="Places where tokens read; the last is in the end.")
    latent_sites: int = Field(2, ge=0, description="Places where latents read; the last is after their last layer.")
    evidence: bool = Field(
        True, description="Weigh experts by how well each predicted the tokens so far, with a memory that fades."
    )


class BridgeTraining(Config):
    """How the bridges are trained; what is not here is as in the training of the central model alone."""

    train: Literal["bridges", "all"] = Field("all", description="Train the bridges only, or the central model too.")
    bridge_steps: int = Field(1000, gt=0, description="Optimizer steps with the experts in place.")
    bridge_batch_size: int = Field(32, gt=0, description="Rows in one of these steps.")
    bridge_learning_rate: float | None = Field(
        None, gt=0, description="Peak, after warm-up, of these steps; where not set, by their size."
    )


class CentralAloneConfig(Config):
    """The central model trained alone: what every composition with the same settings starts from."""

    central: CentralShape = Field(CentralShape(), description="The central model's shape.")
    training: TrainingConfig = Field(TrainingConfig(), description="How it is trained before it meets the experts.")


class ComposeConfig(CentralAloneConfig):
    """A central concept model that reads frozen experts (CALM): first trained alone, then with the experts in place."""

    name: str = runtime_setting(
        "central", "Folder of this composition; controls and other bridges get their own.", max_length=64
    )
    experts: Literal["trained", "seed-copies"] = Field(
        "trained", description="What the bridges read; copies of the seed are the control: parameters, no knowledge."
    )
    gates: Literal["none", "independent", "joint"] = Field(
        "joint", description="Gates that weigh the experts, by the way they were trained."
    )
    bridges: BridgeConfig = Field(BridgeConfig(), description="Kind and places of the bridges.")
    bridge_training: BridgeTraining = Field(BridgeTraining(), description="How the bridges are trained.")
    feature_cache: float = runtime_setting(
        0.0,
        "Gigabytes in which the run keeps what experts and gates make of training rows, for other compositions that "
        "read the same rows: they run neither again. 0: none.",
        ge=0,
    )

    @field_validator("name")
    @classmethod
    def _own_folder(cls, name: str) -> str:
        words = name.split("-")
        if words[0] != "central" or name == CentralAloneManifest.folder or not all(w.isalnum() for w in words):
            raise ValueError(f"{name!r} must be `central` or `central-<word>`, and not {CentralAloneManifest.folder!r}")
        return name

    @model_validator(mode="after")
    def _features_are_the_same(self) -> Self:
        if self.feature_cache and self.training.compile == "on":
            raise ValueError("--feature-cache does not go with --compile on, which computes other last bits")
        if self.feature_cache and self.training.zero_stage == 3:
            raise ValueError("--feature-cache does not go with ZeRO 3, where all processes run the experts together")
        return self

    def label(self, folder: str) -> str:
        """What a table calls the composition in `folder`, no two the same: of each kind, one goes by the kind alone."""
        kind = self.bridges.bridge
        label = f"composed {kind}" + (" of seed copies" if self.experts == "seed-copies" else "")
        return label + ("" if folder == ("central" if kind == "stitch" else f"central-{kind}") else f" ({folder})")

    def alone(self) -> CentralAloneConfig:
        """The part that does not depend on experts."""
        return CentralAloneConfig(central=self.central, training=self.training)

    @property
    def seen(self) -> int:
        """Tokens that what is trained with the experts in place has seen before; bridges alone have seen none."""
        return self.training.tokens if self.bridge_training.train == "all" else 0

    def with_experts(self) -> TrainingConfig:
        """The training settings of the bridges."""
        own = self.bridge_training
        return self.training.model_copy(
            update={
                "steps": own.bridge_steps,
                "batch_size": own.bridge_batch_size,
                "learning_rate": own.bridge_learning_rate,
            }
        )


def check_together(compositions: Sequence[ComposeConfig], where: str) -> None:
    """That one run can hold all of them, which share the central model alone. Raises UsageFailure."""
    first, names = compositions[0], set[str]()
    for each in compositions:
        if each.name in names:
            raise UsageFailure(f"{where}: two compositions have the name {each.name}: give one of them another")
        names.add(each.name)
        for setting, one, other in differing(first.alone(), each.alone()):
            raise UsageFailure(
                f"{where}: {setting} is {one} for {first.name} and {other} for {each.name}, but a run trains the "
                "central model alone once, for all compositions: make them the same, or compose one in another run"
            )


class CentralAloneMetrics(Strict):
    """What the central model came to alone."""

    parameters: int = Field(description="Weights, a tied output layer counted once.")
    training: TrainingMetrics = Field(description="The training run; its loss includes the concepts'.")


class CentralAloneManifest(Manifest):
    """Manifest of `central-alone/`: config.json (a CentralConfig), model.safetensors."""

    command: ClassVar[str] = "compose"
    folder: ClassVar[str] = "central-alone"

    config: CentralAloneConfig
    metrics: CentralAloneMetrics

    @classmethod
    def expected_schema(cls) -> str:
        """Of its own: a composition is something else, by the same command."""
        return f"cpipe.{cls.command}-alone/{cls.version}"


class Usage(Strict):
    """Loss of the next token on training rows not yet seen, whole and with one part left out; nats per token."""

    whole: float = Field(description="With everything in place.")
    without_bridges: float = Field(description="The experts unread.")
    experts_exchanged: float = Field(description="Each expert's states in the place of another's.")
    without_latents: float = Field(description="Tokens get no latents of the groups before.")
    without_plan: float = Field(description="Tokens get no predicted concepts.")


class ComposeMetrics(Strict):
    """What a composition came to."""

    parameters: int = Field(description="Weights of central model and bridges, a tied output layer counted once.")
    bridge_parameters: int = Field(description="Those of the bridges.")
    trained_parameters: int = Field(description="Those that were trained with the experts in place.")
    expert_parameters: int = Field(description="Frozen weights of all experts together; each runs on every token.")
    experts: int = Field(description="Number of experts.")
    frozen_checksum: float = Field(
        description="Of the experts' weights, the same before and after training (under ZeRO 3 it trains copies)."
    )
    usage: Usage = Field(description="What each part is worth.")
    training: TrainingMetrics = Field(description="The training run; its loss includes the concepts'.")


def _of_states(manifest: dict[str, Any]) -> dict[str, Any]:
    """From the first form, in which the experts' states were mixed in the end: there was no choice."""
    config = manifest["config"]
    return manifest | {"config": config | {"bridges": {"head": "states"} | config["bridges"]}}


class ComposeManifest(Manifest):
    """Manifest of `central/`: config.json (`central` and `bridges`), model.safetensors (names begin likewise)."""

    command: ClassVar[str] = "compose"
    folder: ClassVar[str] = "central"
    version: ClassVar[int] = 2
    conversions: ClassVar[Mapping[int, Conversion]] = {1: _of_states}

    config: ComposeConfig
    metrics: ComposeMetrics
