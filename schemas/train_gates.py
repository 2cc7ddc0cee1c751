"""Settings and manifests of train-gates."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from schemas.failures import UsageFailure
from schemas.manifest import Manifest
from schemas.strict import Config, Strict, runtime_setting
from schemas.training import TrainingConfig, TrainingMetrics

GateMode = Literal["independent", "joint", "contrastive", "mean-activation", "arrow"]
Place = Literal["expert", "layer", "module"]
ALONE: tuple[GateMode, ...] = ("independent", "mean-activation", "arrow")  # modes that know of no other expert


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


class GateReading(Config):
    """What gates read."""

    memory: float = Field(
        0.99,
        ge=0,
        le=1,
        description="Share of what a gate has read of a document that it keeps per token; 0: the paper.",
    )
    layer: int | None = Field(
        None, ge=0, description="Seed layer whose hidden state an expert's gate reads; default: half of its depth."
    )
    shared: Literal["seed", "average"] = Field(
        "seed",
        description="What tokens go through between the gated modules of full experts: the seed's weights, or the mean "
        "of the experts', which of gates that know of one expert is its own.",
    )

    def layer_read(self, depth: int) -> int:
        """The seed layer that gates at the experts' inputs read, of so many. Raises UsageFailure beyond them."""
        layer = (depth + 1) // 2 if self.layer is None else self.layer
        if layer > depth:
            raise UsageFailure(f"--layer {layer} is beyond the seed's {depth} layers")
        return layer


class GatesConfig(Config):
    """PHATGOOSE gates, which tell for each token which experts are worth asking; experts and seed stay frozen."""

    places: tuple[Place, ...] = Field(
        ("expert",),
        min_length=1,
        description="Where gates stand: at the input of each expert; at each module inside the model, which is a "
        "linear layer of LoRA experts and an MLP of full ones (the paper's); or at each layer, for all its modules.",
    )
    modes: tuple[GateMode, ...] = Field(
        ("independent", "joint", "contrastive"),
        min_length=1,
        description="Ways to learn them: each alone on its own cluster (the paper's), together on all, by telling "
        "clusters apart without asking the experts, or not at all: the mean state of the cluster, or the direction a "
        "LoRA expert's module changes most (arrow).",
    )
    reading: GateReading = Field(GateReading(), description="What they read.")
    training: TrainingConfig = Field(
        TrainingConfig(steps=100, batch_size=16, learning_rate=5e-3, warmup=0.06, weight_decay=0.0),
        description="How each mode's gates are trained.",
    )
    expert: int | None = runtime_setting(
        None, "Train only this expert's gates, in the modes that know of no other (for arrays of jobs).", ge=0
    )

    @model_validator(mode="after")
    def _modes_have_a_place(self) -> Self:
        if "arrow" in self.modes and "module" not in self.places:
            raise ValueError("mode arrow reads the weights of modules: add module to places, or leave it out of modes")
        return self

    def kinds(self) -> Iterator[tuple[Place, GateMode]]:
        """Every mode at every place where there is such a thing."""
        return ((place, mode) for place in self.places for mode in self.modes if mode != "arrow" or place == "module")

    @property
    def expert_modes(self) -> tuple[GateMode, ...]:
        """The modes of gates at the input of each expert; none where gates stand inside the model only."""
        return tuple(mode for place, mode in self.kinds() if place == "expert")

    def members(self, experts: range) -> Iterator[tuple[str, "GateConfig"]]:
        """The folder and the settings of every training: of each expert's gates, or of all of a kind together."""
        for place, mode in self.kinds():
            folder = f"{GatesManifest.folder}/{label_of(place, mode)}"
            made = partial(GateConfig, place=place, mode=mode, reading=self.reading, training=self.training)
            if mode in ALONE:
                yield from ((f"{folder}/{expert:03d}", made(expert=expert)) for expert in experts)
            else:
                yield folder, made(expert=None)


class GateConfig(Config):
    """Gates of one kind: of one expert, or of all together."""

    place: Place = Field(description="Where they stand.")
    mode: GateMode = Field(description="How they are learnt.")
    expert: int | None = Field(ge=0, description="The expert they belong to; None: all of them.")
    reading: GateReading = Field(description="What they read.")
    training: TrainingConfig = Field(description="How they are trained.")


class GateRun(Strict):
    """One training run of gates."""

    place: Place = Field(description="Where they stand.")
    mode: GateMode = Field(description="How they were trained.")
    expert: int | None = Field(description="The expert they belong to; None when trained together.")
    openness: tuple[float, ...] = Field(
        description="Mean weight of the seed (first) and of each expert while training, at the end."
    )
    tokens: int = Field(description="Tokens read for them.")
    training: TrainingMetrics | None = Field(description="The training run; None where nothing is trained.")


class GateManifest(Manifest):
    """Manifest of `gates/independent/007/` or `gates/joint/`; of modules, `gates/module-independent/007/` and so on.

    gates.safetensors holds `vectors` [experts, width] and, where one is learnt, `bias` [experts]; of modules
    `<module>.vectors` [experts, width it reads].
    """

    command: ClassVar[str] = "train-gates"
    folder: ClassVar[str] = "gates"

    config: GateConfig
    metrics: GateRun


class GatesMetrics(Strict):
    """What the gates came to."""

    layer: int = Field(description="Seed layer read at the input of experts.")
    end_of_text: int = Field(description="Id of the token before each document, at which the gates begin to read anew.")
    experts: int = Field(description="Number of experts.")
    runs: tuple[GateRun, ...] = Field(description="One per training run.")


class GatesManifest(Manifest):
    """Manifest of `gates/`: gates.safetensors holds those of all, their names after `joint.`, `module-joint.` …"""

    command: ClassVar[str] = "train-gates"
    folder: ClassVar[str] = "gates"

    config: GatesConfig
    metrics: GatesMetrics

    def modes_at_experts(self, run_dir: Path) -> tuple[GateMode, ...]:
        """The modes of gates at the input of each expert. Raises UsageFailure when there are none."""
        if not (modes := self.config.expert_modes):
            there = ", ".join(label_of(*kind) for kind in self.config.kinds())
            raise UsageFailure(
                f"{run_dir / self.folder} holds no gates at the inputs of experts (there: {there}): run `cpipe "
                f"{self.command} {run_dir} --force` with expert among --places, in a mode other than arrow"
            )
        return modes

    def reads(self, mode: GateMode) -> tuple[GateMode, int, float, int]:
        """How an expert's gates of this mode read: mode, layer, memory, and the token that begins a document."""
        return mode, self.metrics.layer, self.config.reading.memory, self.metrics.end_of_text


def label_of(place: Place, mode: GateMode) -> str:
    """What gates of a kind are called: their folder in `gates/`, and what the names of their tensors begin with."""
    return mode if place == "expert" else f"{place}-{mode}"


def inside(label: str) -> tuple[Place, GateMode] | None:
    """Place and mode of gates inside a decoder, of such a label; None of any other."""
    places = (place for place in get_args(Place) if place != "expert")
    return next(
        ((place, mode) for place in places for mode in get_args(GateMode) if label_of(place, mode) == label), None
    )
