"""Settings of generate."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from schemas.strict import Config


class GenerateConfig(Config):
    """What continues which text, and how the next token is drawn."""

    prompt: str = Field("", description="Text to continue; empty: from nothing.")
    prompts: str | None = Field(
        None, description="File of prompts to continue, each as if it were alone: one a line, or .jsonl (prompt)."
    )
    batch_size: int = Field(8, gt=0, description="Texts of --prompts written side by side, where the model can.")
    model: str = Field(
        "central",
        pattern=r"^[A-Za-z0-9_.:/-]+$",
        description="seed, dense, expert:NUMBER, cbtm (mixed experts), layer-joint, module-independent and the like "
        "(the experts inside one decoder, behind its gates), or the name of a composed model.",
    )
    max_tokens: int = Field(100, gt=0, description="Tokens to add, at most; the end-of-text token ends it earlier.")
    temperature: float = Field(0.8, ge=0, description="Flattens or sharpens the distribution; 0 takes the likeliest.")
    sample_top_k: int | None = Field(None, gt=0, description="Draw from the k likeliest tokens only.")
    sample_top_p: float = Field(0.95, gt=0, le=1, description="Draw from the likeliest tokens of so much mass only.")
    experts: int | None = Field(
        None, gt=0, description="Experts that cbtm mixes, or gates ask, for a token; default: 2."
    )
    active_experts: int | None = Field(
        None,
        gt=0,
        description="Experts a composed model asks, at most, chosen every 64 tokens by the text so far; default: all.",
    )
    routing_temperature: float | None = Field(
        None, gt=0, description="How sharply cbtm chooses experts; default: the clusters' temperature."
    )
    stop: tuple[str, ...] = Field((), description="End before the first of these texts.")
    random_seed: int = Field(0, ge=0, lt=2**31, description="Same seed, same text.")

    @field_validator("stop")
    @classmethod
    def _says_something(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty text would end everything at once")
        return stop

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.prompt and self.prompts is not None:
            raise ValueError("prompt and prompts are both given: leave one of them")
        return self
