"""Settings of route, and what it finds for each token."""

from pydantic import Field

from schemas.strict import Config, Strict
from schemas.train_gates import GateMode, Selection


class RouteConfig(Config):
    """Which text the gates are shown, and which gates."""

    text: str = Field("", description="Text to route.", json_schema_extra={"argument": True})
    mode: GateMode | None = Field(None, description="How the gates were learnt; default: joint where the run has them.")
    selection: Selection = Field(Selection(top_k=2), description="Which experts are asked for a token.")


class RoutedToken(Strict):
    """A token, and who is asked for it by what stands before it."""

    text: str = Field(description="The characters it completes; none where its bytes are a part of one.")
    seed: float = Field(description="Weight of the seed: of no expert.")
    weights: tuple[float, ...] = Field(description="Weight of each expert; 0 where it is not asked.")
    scores: tuple[float, ...] = Field(description="What the weights are a softmax of, before any selection.")
