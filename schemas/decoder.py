"""The shape of a decoder: a Llama, or one that differs from it in a detail. Field names are Hugging Face's.

- `DecoderShape` is what one may choose for a decoder trained here, which is a Llama
- what else `DecoderConfig` holds comes with weights from elsewhere: `schemas.huggingface` reads it from a `config.json`
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from schemas.failures import InputFailure
from schemas.huggingface import as_config_json, settings_of
from schemas.strict import Config, explain

Architecture = Literal["llama", "mistral", "qwen2", "qwen3"]


class DecoderShape(Config):
    """Widths and depth of a decoder; the vocabulary comes from the tokenizer."""

    hidden_size: int = Field(256, gt=0, description="Width of the residual stream.")
    intermediate_size: int = Field(688, gt=0, description="Width of the SwiGLU layer, about 8/3 of hidden-size.")
    num_hidden_layers: int = Field(6, gt=0, description="Number of transformer layers.")
    num_attention_heads: int = Field(4, gt=0, description="Number of query heads.")
    num_key_value_heads: int = Field(4, gt=0, description="Number of key and value heads; fewer than heads is GQA.")
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary position frequencies.")
    rms_norm_eps: float = Field(1e-5, gt=0, description="Added to the mean square before the root.")
    tie_word_embeddings: bool = Field(True, description="Use the token embedding as the output layer too.")

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        self._divides("hidden_size", "num_attention_heads")
        self._divides("num_attention_heads", "num_key_value_heads")
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError("hidden_size / num_attention_heads must be even, for rotary positions")
        return self

    def _divides(self, whole: str, divisor: str) -> None:
        if getattr(self, whole) % getattr(self, divisor):
            raise ValueError(f"{whole} {getattr(self, whole)} is not divisible by {divisor} {getattr(self, divisor)}")


class LinearRope(Config):
    """Positions closer together by one factor (Chen et al. 2023)."""

    rope_type: Literal["linear"] = Field("linear", description="The kind of scaling.")
    factor: float = Field(ge=1, description="How many positions take the place of one.")


class Llama3Rope(Config):
    """Llama 3.1's scaling: slow rotations slower by a factor, fast ones as they were, a ramp between."""

    rope_type: Literal["llama3"] = Field("llama3", description="The kind of scaling.")
    factor: float = Field(ge=1, description="By how much the slow rotations are slowed down.")
    low_freq_factor: float = Field(gt=0, description="Slow: fewer turns than this over the original positions.")
    high_freq_factor: float = Field(gt=0, description="Fast: more turns than this over the original positions.")
    original_max_position_embeddings: int = Field(gt=0, description="Longest sequence before the scaling.")

    @model_validator(mode="after")
    def _ramp_rises(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must be more than low_freq_factor {self.low_freq_factor}"
            )
        return self


RopeScaling = Annotated[LinearRope | Llama3Rope, Field(discriminator="rope_type")]


def share_of_a_head(shape: dict[str, Any]) -> int:
    """The default of `head_dim`: the heads together are as wide as the residual stream."""
    return int(shape["hidden_size"] // shape["num_attention_heads"])


class DecoderConfig(DecoderShape):
    """A decoder complete: shape, vocabulary, longest sequence, and in what it is no Llama."""

    vocab_size: int = Field(gt=0, description="Number of token ids.")
    max_position_embeddings: int = Field(512, gt=0, description="Longest sequence trained on, in tokens.")
    model_type: Architecture = Field("llama", description="Qwen2 has biases on q, k, v; Qwen3 norms each head of q, k.")
    head_dim: int = Field(
        default_factory=share_of_a_head,
        gt=0,
        description="Width of one attention head; default: the heads share the residual stream's.",
    )
    rope_scaling: RopeScaling | None = Field(None, description="How rotary frequencies were changed for longer text.")
    sliding_window: int | None = Field(None, gt=0, description="Positions a query sees, itself included; default: all.")
    bos_token_id: int | None = Field(None, ge=0, description="Token that begins a text; default: the end of text.")
    eos_token_id: int | tuple[int, ...] | None = Field(
        None, description="Token, or tokens, that end a text; default: the end of text."
    )

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.model_type == "llama":  # transformers insists on it for this one
            self._divides("hidden_size", "num_attention_heads")
        self._divides("num_attention_heads", "num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even, for rotary positions")
        if self.sliding_window is not None and self.model_type == "llama":
            raise ValueError("a Llama has no sliding_window; a Mistral has")
        return self

    def to_huggingface(self, end_of_text: int, dtype: str = "float32") -> dict[str, Any]:
        """The content of `config.json` for the class of `transformers` that computes the same."""
        return as_config_json(self.model_dump(mode="json"), end_of_text, dtype)

    @classmethod
    def from_huggingface(cls, values: Mapping[str, Any], where: str = "config.json") -> Self:
        """The inverse of `to_huggingface`. Raises InputFailure for whatever `values` ask for beyond this class."""
        try:
            return cls.from_mapping(settings_of(values, where))
        except ValidationError as error:
            raise InputFailure(explain(error, where)) from error


Precision = Literal["auto", "fp32", "bf16"]
