"""Settings and manifest of evaluate: the table in which all models of a run stand beside each other."""

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field, field_validator

from schemas.manifest import Manifest
from schemas.strict import Config, Strict, runtime_setting
from schemas.train_gates import Selection


class EvaluateConfig(Config):
    """How the held-out text is scored."""

    tokens: int = Field(200_000, gt=0, description="Held-out tokens scored, at most; whole documents of every source.")
    usage_tokens: int = Field(
        20_000, gt=0, description="Held-out tokens, at most, on which models are scored with a part left out."
    )
    switched: bool = Field(
        False,
        description="Score texts that change their subject: the first half of each document, and after it the second "
        "half of one of another source.",
    )
    top_k: tuple[int, ...] = Field((1, 2, 4), description="Numbers of experts that cBTM and the gates may mix.")
    thresholds: tuple[float, ...] = Field(
        (),
        description="How far open a gate must be for its expert to be asked; a row each.",
    )
    top_p: tuple[float, ...] = Field((), description="Shares that the fewest experts asked add up to; a row each.")
    inspected_top_k: int = Field(
        2,
        gt=0,
        description="Experts that gates may ask for a token where the report looks inside them; the nearest of top-k "
        "and all.",
    )
    active_experts: tuple[int, ...] = Field(
        (2,),
        description="Numbers of experts that compositions ask, chosen per text by what is known of it; a row each.",
    )
    forgetting: float = Field(
        0.9, gt=0, le=1, description="Factor per token by which the forgetting Bayes posterior trusts older evidence."
    )
    fit_temperature: bool = Field(
        False, description="Fit cBTM's temperature and the forgetting factor on held-out documents that are not scored."
    )
    fit_tokens: int = Field(20_000, gt=0, description="Tokens, at most, of the documents they are fitted on.")
    score_batch_size: int = runtime_setting(16, "Windows scored at a time.", gt=0)

    @field_validator("active_experts")
    @classmethod
    def _somebody(cls, counts: tuple[int, ...]) -> tuple[int, ...]:
        if min(counts, default=1) < 1:
            raise ValueError(f"a composition asks at least one expert, not {min(counts)}")
        return counts

    @property
    def fitted_tokens(self) -> int:
        """Tokens, at most, that something is fitted on."""
        return self.fit_tokens if self.fit_temperature else 0

    def counts(self, experts: int) -> list[int | None]:
        """The numbers of experts to mix, of so many; None stands for all."""
        return [*(count for count in self.top_k if count < experts), None]

    def inspected(self, experts: int) -> Selection:
        """The way to select experts, of so many, that the report looks inside: nearest to what was asked for."""
        distances = {count: abs((count or experts) - self.inspected_top_k) for count in self.counts(experts)}
        return Selection(top_k=min(distances, key=distances.__getitem__))

    def selections(self, experts: int) -> Iterator[Selection]:
        """Every way to select experts."""
        yield from (Selection(top_k=count) for count in self.counts(experts))
        yield from (Selection(threshold=share) for share in self.thresholds)
        yield from (Selection(top_p=share) for share in self.top_p)


class ModelRow(Strict):
    """One model's line of the table."""

    model: str = Field(description="Which model, or which way to combine the experts.")
    group: str = Field(description="What it belongs to: single, ensemble, gates, central, composed or control.")
    bits_per_byte: float = Field(description="Over all scored text; lower is better.")
    against_dense: float | None = Field(description="Relative difference of bits per byte to dense, in percent.")
    macro_bits_per_byte: float = Field(description="Mean over the sources, each counting the same.")
    perplexity: float = Field(description="Per token.")
    parameters: int = Field(description="Weights that have to be stored.")
    active_parameters: int = Field(description="Weights that work on a token, on average.")
    training_flops: float = Field(
        description="Spent in this run on everything it is made of; an imported seed costs nothing."
    )
    inference_flops: float = Field(description="Per token, caches kept, each model catching up where it joins late.")
    sources: dict[str, float] = Field(description="Bits per byte of each source.")
    clusters: dict[str, float] = Field(description="Bits per byte of each cluster.")


class UsageRow(Strict):
    """What a composed or central model loses without one of its parts."""

    model: str = Field(description="The model.")
    part: str = Field(
        description="What is taken away; with `exchanged`, replaced by another text's; with `static`, by the mean."
    )
    difference: float = Field(description="Bits per byte without it minus with it; positive when it is of use.")
    places: tuple[float, ...] = Field(
        (), description="Nats per token that are lost at each place of a group, its first token first."
    )


class LayerRouting(Strict):
    """Whom one layer's gates ask, mean weights of the seed (first) and of each expert."""

    model: str = Field(description="The gates, and how they select.")
    layer: str = Field(description="Layer of the model; `input` for gates at the input of each expert.")
    sources: dict[str, tuple[float, ...]] = Field(description="On the text of each source.")
    clusters: dict[str, tuple[float, ...]] = Field(description="On the text of each cluster.")
    experts_asked: float = Field(description="Experts of any weight in the layer, mean over tokens.")
    entropy: float = Field(description="Of the weights, in bits, mean over tokens.")
    own: tuple[float, ...] = Field(description="Each expert's mean weight on its own cluster.")
    foreign: tuple[float, ...] = Field(description="Each expert's mean weight on all other clusters.")
    tokens: tuple[tuple[str, ...], ...] = Field(description="For each expert, after which tokens it has most weight.")


class FittedRouting(Strict):
    """How sharply to choose among experts, fitted on held-out documents that are not scored."""

    temperature: float = Field(gt=0, description="cBTM's temperature.")
    forgetting: float = Field(gt=0, le=1, description="The posterior's factor per token for older evidence.")
    documents: int = Field(ge=1, description="Documents fitted on.")
    tokens: int = Field(ge=1, description="Tokens fitted on.")
    gain: float = Field(description="Nats per token that the fitted temperature saves there, over the given one.")
    forgetting_gain: float = Field(description="Nats per token that the fitted factor saves there.")


class EvaluateMetrics(Strict):
    """The table and what it was measured on."""

    rows: tuple[ModelRow, ...] = Field(description="The table, best first.")
    usage: tuple[UsageRow, ...] = Field(description="What each part of a central model contributes.")
    dense_steps: dict[str, int] = Field(
        default_factory=dict,
        description="For each composition, controls too, steps of a dense baseline (`cpipe train-experts "
        "--dense-steps`) whose training costs as many FLOPs, the seed's included.",
    )
    fitted: FittedRouting | None = Field(description="What was fitted, with fit-temperature; its rows say `fitted`.")
    prefix_gap: float = Field(
        ge=0, description="Largest change of a log-probability when the model is given the true prefix only, nats."
    )
    documents: int = Field(description="Documents scored.")
    tokens: int = Field(description="Tokens scored.")
    bytes: int = Field(description="Bytes of text scored.")


class EvaluateManifest(Manifest):
    """Manifest of `reports/`: table.json, table.md, bits_per_byte.png; of gates, routing.json and routing.png."""

    command: ClassVar[str] = "evaluate"
    folder: ClassVar[str] = "reports"

    config: EvaluateConfig
    metrics: EvaluateMetrics
