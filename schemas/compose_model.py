"""The compose stage: the central concept model, its bridges to the experts, and what was measured.

- two manifests: the central model alone (`central-alone`, shared by every composition with the same settings) and the
  composition (one folder per `name`, so that controls and bridge kinds live beside each other in a run)
"""

from math import gcd
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from schemas.decoder import Architecture, DecoderConfig, RopeScaling, share_of_a_head
from schemas.manifest import Manifest
from schemas.strict import Config, Strict, runtime_setting
from schemas.training import TrainingConfig, TrainingMetrics


class CentralShape(Config):
    """The central concept model: groups of tokens, latents, plan. Widths not given here are the seed's."""

    central_width: int | None = Field(None, gt=0, description="Width of the central model; default: the seed's.")
    group_length: int = Field(8, gt=1, description="Tokens in a group; a group is what one concept stands for.")
    latents_per_group: int = Field(4, gt=0, description="Latent vectors a group is reduced to.")
    encoder_layers: int = Field(3, gt=0, description="Token layers before the latents.")
    latent_layers: int = Field(6, gt=0, description="Layers over latents, causal over groups.")
    decoder_layers: int = Field(3, gt=0, description="Token layers after the latents.")
    latent_window: int | None = Field(
        None, gt=0, description="Groups a latent layer sees, its own included; default: all before it."
    )
    token_window: int = Field(64, gt=1, description="Tokens a token layer sees; all longer memory is latents.")
    reducer: Literal["perceiver", "last-k"] = Field(
        "perceiver", description="Latents are learned queries on the group, or its last states."
    )
    upsampling: Literal["repeat", "attention"] = Field(
        "attention", description="How tokens receive the latents of the group before theirs."
    )
    plan_horizon: int = Field(4, gt=0, description="Next concepts predicted from every group; the plan tokens read.")
    concept_loss: Literal["cosine", "mse"] = Field("cosine", description="How predicted concepts are compared.")
    concept_weight: float = Field(0.1, ge=0, description="Weight of the concept loss beside the token loss.")
    start_from_seed: bool = Field(
        True, description="Start embedding, norm, head and token layers from the seed's, where the widths are equal."
    )

    @model_validator(mode="after")
    def _latents_fit(self) -> Self:
        if self.latents_per_group > self.group_length:
            raise ValueError(
                f"latents_per_group {self.latents_per_group} is more than group_length {self.group_length}"
            )
        return self


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
        return cls(
            **(shape.model_dump() | {"central_width": width}),
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


class BridgeConfig(Config):
    """How the central model reads the experts."""

    bridge: Literal["stitch", "calm"] = Field(
        "stitch",
        description="Position-wise mixing of hidden states, or cross-attention; before the output layer it is mixing.",
    )
    token_sites: int = Field(2, gt=0, description="Places where tokens read; the last is before the output layer.")
    latent_sites: int = Field(2, ge=0, description="Places where latents read; the last is after their last layer.")
    evidence: bool = Field(
        True, description="Weigh experts by how well each predicted the tokens so far, with a memory that fades."
    )


class BridgeTraining(Config):
    """How the bridges are trained; what is not here is as in the training of the central model alone."""

    train: Literal["bridges", "all"] = Field("all", description="Train the bridges only, or the central model too.")
    bridge_steps: int = Field(1000, gt=0, description="Optimizer steps with the experts in place.")
    bridge_batch_size: int = Field(32, gt=0, description="Rows in one of these steps.")
    bridge_learning_rate: float = Field(1e-3, gt=0, description="Peak, after warm-up, of these steps.")


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

    @field_validator("name")
    @classmethod
    def _own_folder(cls, name: str) -> str:
        words = name.split("-")
        if words[0] != "central" or name == CentralAloneManifest.folder or not all(w.isalnum() for w in words):
            raise ValueError(f"{name!r} must be `central` or `central-<word>`, and not {CentralAloneManifest.folder!r}")
        return name

    def alone(self) -> CentralAloneConfig:
        """The part that does not depend on experts."""
        return CentralAloneConfig(central=self.central, training=self.training)

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
    frozen_checksum: float = Field(description="Of the experts' weights, the same before and after training.")
    usage: Usage = Field(description="What each part is worth.")
    training: TrainingMetrics = Field(description="The training run; its loss includes the concepts'.")


class ComposeManifest(Manifest):
    """Manifest of `central/`: config.json (`central` and `bridges`), model.safetensors (names begin likewise)."""

    command: ClassVar[str] = "compose"
    folder: ClassVar[str] = "central"

    config: ComposeConfig
    metrics: ComposeMetrics
