"""The shape of the central concept model: token layers, and levels of groups above them.

- `CentralShape` is what one may choose; it is a `LevelShape` itself, that of the first level, and `levels` holds those
  above it
- `CentralConfig` is the model complete: what the shape leaves open comes from the seed
- every setting beyond the first model's is off by default, so that its weights and numbers stay as they were
"""

from math import gcd, prod
from typing import Any, Literal, NamedTuple, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from schemas.decoder import Architecture, DecoderConfig, RopeScaling, share_of_a_head
from schemas.failures import IntegrityFailure
from schemas.strict import Config, explain


class LevelShape(Config):
    """A level: groups of what lies below it (tokens, or the latents of a level), their latents and their plan."""

    group_length: int = Field(8, gt=1, description="Tokens in a group; a group is what one concept stands for.")
    latents_per_group: int = Field(4, gt=0, description="Latent vectors a group is reduced to.")
    latent_width: int | None = Field(None, gt=0, description="Width of latents; default: that of what is grouped.")
    reducer: Literal["perceiver", "last-k"] = Field(
        "perceiver", description="Latents are learned queries on the group, or its last states."
    )
    local_layers: int = Field(0, ge=0, description="Layers among the latents of a group, before the level above.")
    global_layers: int = Field(0, ge=0, description="Layers over latents of all groups so far, before the level above.")
    latent_layers: int = Field(6, gt=0, description="Layers over latents, causal over groups.")
    latent_window: int | None = Field(
        None, gt=0, description="Groups a latent layer sees, its own included; default: all before it."
    )
    latent_local_layers: int = Field(
        0, ge=0, description="Layers among the latents of a group, beside latent-layers, after the level above."
    )
    arrangement: Literal["series", "alternating"] = Field(
        "series", description="Layers inside groups and over groups: first all of the former, or in turn."
    )
    upsampling: Literal["repeat", "attention"] = Field(
        "attention", description="How tokens receive the latents of the group before theirs."
    )
    shared_positions: bool = Field(
        False, description="Add the places in a group that upsampling learns to what is reduced, too."
    )
    plan_horizon: int = Field(4, gt=0, description="Next concepts predicted from every group; the plan tokens read.")


class CentralShape(LevelShape):
    """The central concept model: groups of tokens, latents, plan. Widths not given here are the seed's."""

    levels: tuple[LevelShape, ...] = Field(
        (),
        description="Levels above the first, each of groups of the one below: tables [[compose.levels]], or JSON; its "
        "group-length counts groups of the level below.",
    )
    central_width: int | None = Field(None, gt=0, description="Width of the central model; default: the seed's.")
    encoder_layers: int = Field(3, gt=0, description="Token layers before the latents.")
    decoder_layers: int = Field(3, gt=0, description="Token layers after the latents.")
    token_window: int = Field(64, gt=1, description="Tokens a token layer sees; all longer memory is latents.")
    channels: int = Field(
        1, gt=0, description="Attentions side by side in every latent layer, each with an MLP, and one for all."
    )
    channel_merge: Literal["scalars", "features"] = Field(
        "scalars", description="Channels are averaged by learned weights, or each feature by the softmax of itself."
    )
    depth_weighted: bool = Field(
        False, description="Each latent layer reads a learned average of all states before it (DenseFormer)."
    )
    concept_loss: Literal["cosine", "mse", "both"] = Field(
        "cosine", description="How predicted concepts are compared; both is the sum."
    )
    concept_weight: float = Field(0.1, ge=0, description="Weight of the concept loss beside the token loss.")
    latent_weight: float = Field(0.0, ge=0, description="Weight of a loss for predicting the next group's latents.")
    random_phase: bool = Field(
        False, description="Begin each row of training at a random token of its first group (of the highest level)."
    )
    start_from_seed: bool = Field(
        True, description="Start embedding, norm, head and token layers from the seed's, where the widths are equal."
    )

    @field_validator("levels", mode="before")
    @classmethod
    def _from_flags(cls, value: Any) -> Any:
        """On the command line each level is a JSON object, which a strict model would not read."""
        if not isinstance(value, list):
            return value
        return tuple(_level(level, number) for number, level in enumerate(value, 2))

    @model_validator(mode="after")
    def _latents_fit(self) -> Self:
        below = 1
        for number, shape in enumerate(self.all_levels, 1):
            if shape.latents_per_group > shape.group_length * below:
                where = "" if number == 1 else f" groups of {below} latents, of level {number}"
                raise ValueError(
                    f"latents_per_group {shape.latents_per_group} is more than group_length {shape.group_length}{where}"
                )
            below = shape.latents_per_group
        return self

    @property
    def all_levels(self) -> tuple[LevelShape, ...]:
        """The first level, which is this shape, and those above it."""
        return (self, *self.levels)

    def span(self, level: int) -> int:
        """Tokens in a group of a level; levels count from 1."""
        return prod(shape.group_length for shape in self.all_levels[:level])

    def shortest_row(self) -> int:
        """Tokens in which every level finds two groups, so that all of it is trained."""
        longest = self.span(len(self.all_levels))
        return 2 * longest + (longest - 1 if self.random_phase else 0)

    def units(self, level: int) -> int:
        """States in a group of a level: tokens, or latents of the level below."""
        below = self.all_levels[level - 2].latents_per_group if level > 1 else 1
        return self.all_levels[level - 1].group_length * below


def _level(given: Any, number: int) -> LevelShape:
    where = f"level {number}"
    if not isinstance(given, str | dict):
        raise ValueError(f"{where} must be a table of settings, found {given!r:.40}")
    try:
        return LevelShape.from_json(given) if isinstance(given, str) else LevelShape.from_mapping(given)
    except ValidationError as error:
        raise ValueError(explain(error, where)) from error
    except IntegrityFailure as error:
        raise ValueError(f"{where}: {error}") from error


class Widths(NamedTuple):
    """Of the layers of a level."""

    width: int
    inner: int  # of the SwiGLU
    heads: int
    key_value_heads: int


class CentralConfig(CentralShape):
    """The central model complete: what `config.json` beside its weights holds."""

    vocab_size: int = Field(gt=0, description="Number of token ids.")
    hidden_size: int = Field(gt=0, description="Width of the residual streams of tokens and latents.")
    intermediate_size: int = Field(gt=0, description="Width of the SwiGLU layers.")
    num_attention_heads: int = Field(gt=0, description="Number of query heads.")
    num_key_value_heads: int = Field(gt=0, description="Number of key and value heads.")
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary position frequencies.")
    rms_norm_eps: float = Field(1e-5, gt=0, description="Added to the mean square before the root.")
    tie_word_embeddings: bool = Field(True, description="Use the token embedding as the output layer too.")
    model_type: Architecture = Field("llama", description="The seed's architecture, whose layers these are like.")
    head_dim: int = Field(
        default_factory=share_of_a_head,
        gt=0,
        description="Width of one attention head of the layers; default: the heads share the residual stream's.",
    )
    rope_scaling: RopeScaling | None = Field(None, description="How rotary frequencies were changed for longer text.")

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What sets the layers apart from a plain Llama's is written where something does."""
        values: dict[str, Any] = dump(self)
        plain = {
            "model_type": "llama",
            "head_dim": self.hidden_size // self.num_attention_heads,
            "rope_scaling": None,
        }
        return {name: value for name, value in values.items() if name not in plain or value != plain[name]}

    def widths(self, level: int) -> Widths:
        """Of a level, tokens being level 0: in the tokens' proportions. Raises ValueError when heads do not fit."""
        given = [shape.latent_width for shape in self.all_levels[:level] if shape.latent_width]
        width = given[-1] if given else self.hidden_size
        step = self.hidden_size // gcd(self.hidden_size, self.num_key_value_heads)
        heads = width * self.num_attention_heads // self.hidden_size
        if width % step or width % heads:
            raise ValueError(f"latent_width {width} is not a multiple of {step}, so no number of heads fits")
        return Widths(
            width,
            width * self.intermediate_size // self.hidden_size,
            heads,
            width * self.num_key_value_heads // self.hidden_size,
        )

    @classmethod
    def beside(cls, shape: CentralShape, seed: DecoderConfig) -> Self:
        """The shape completed by the seed's; another width keeps the seed's proportions and its width of a head.

        Raises ValueError when that is impossible.
        """
        width = shape.central_width or seed.hidden_size
        # Heads in proportion to the width, and as many queries to a key as the seed has.
        step = seed.hidden_size // gcd(seed.hidden_size, seed.num_key_value_heads)
        if width % step:
            raise ValueError(f"central_width {width} is not a multiple of {step}, the seed's head width")
        heads = width * seed.num_attention_heads // seed.hidden_size
        if width % heads:
            raise ValueError(f"central_width {width} does not divide among {heads} heads")
        config = cls(
            **(dict(shape) | {"central_width": width}),
            vocab_size=seed.vocab_size,
            hidden_size=width,
            intermediate_size=width * seed.intermediate_size // seed.hidden_size,
            num_attention_heads=heads,
            num_key_value_heads=width * seed.num_key_value_heads // seed.hidden_size,
            rope_theta=seed.rope_theta,
            rms_norm_eps=seed.rms_norm_eps,
            tie_word_embeddings=seed.tie_word_embeddings,
            model_type=seed.model_type,
            head_dim=seed.head_dim,
            rope_scaling=seed.rope_scaling,
        )
        for level in range(len(config.all_levels)):
            config.widths(level + 1)
        return config
