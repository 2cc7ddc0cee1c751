"""The shape of a Llama-architecture decoder. Field names are Hugging Face's."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from schemas.strict import Config


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
    def _heads_divide(self) -> Self:
        for divisor in ("num_attention_heads", "num_key_value_heads"):
            whole = "hidden_size" if divisor == "num_attention_heads" else "num_attention_heads"
            if getattr(self, whole) % getattr(self, divisor):
                raise ValueError(
                    f"{whole} {getattr(self, whole)} is not divisible by {divisor} {getattr(self, divisor)}"
                )
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError("hidden_size / num_attention_heads must be even, for rotary positions")
        return self


class DecoderConfig(DecoderShape):
    """A decoder complete: shape, vocabulary and longest sequence."""

    vocab_size: int = Field(gt=0, description="Number of token ids.")
    max_position_embeddings: int = Field(512, gt=0, description="Longest sequence trained on, in tokens.")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def to_huggingface(self, end_of_text: int) -> dict[str, Any]:
        """The content of `config.json` for `transformers.LlamaForCausalLM`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_text,
            "dtype": "float32",
            **self.model_dump(),
        }

    @classmethod
    def from_huggingface(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_huggingface`; what a decoder of this architecture does not use is dropped."""
        known = {name: values[name] for name in cls.model_fields if name in values}
        return cls.from_mapping(known)


Precision = Literal["auto", "fp32", "bf16"]
