"""Settings and manifest of `cpipe tokenize`.

- where the text and the tokenizer lie is not in the key; what they hold is: each file's sha256 is an input
"""

from typing import ClassVar, Literal

from pydantic import Field

from schemas.files import FileRef
from schemas.manifest import Manifest
from schemas.strict import Config, Strict, runtime_setting

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")


class TokenizeConfig(Config):
    """What text to read, how to split it, and which tokenizer to train or to take."""

    inputs: tuple[str, ...] = Field(
        (),
        description="Files, folders or globs of .jsonl, .ndjson, .txt, .md (each also .gz or .zst) and .parquet.",
        json_schema_extra={"argument": True, "runtime": True},
    )
    text_column: str = Field("text", min_length=1, description="Column or JSON key that holds the text.")
    source_column: str | None = Field(
        None, min_length=1, description="Column that says where a document is from; default: `source`, else the file."
    )
    id_column: str | None = Field(
        None, min_length=1, description="Column that names a document; default: `id`, else file and line."
    )
    group_column: str | None = Field(
        None, min_length=1, description="Column whose equal values stay in one split; default: the document's id."
    )
    vocab_size: int = Field(8192, ge=257, le=1 << 20, description="Ids of the tokenizer that is trained.")
    tokenizer: str | None = runtime_setting(None, "A tokenizer.json to use; default: train one on the text.")
    train_bytes: int = Field(50_000_000, gt=0, description="Bytes of text the tokenizer is trained on, at most.")
    valid_fraction: float = Field(0.02, gt=0, lt=1, description="Share of the groups held out for evaluation.")
    limit_bytes_per_source: int | None = Field(
        None, gt=0, description="Read at most so many bytes of text of each source; default: everything."
    )


class Counts(Strict):
    """How much text."""

    documents: int = Field(ge=0, description="Documents.")
    tokens: int = Field(ge=0, description="Tokens, without separators.")
    bytes: int = Field(ge=0, description="Bytes of the text in UTF-8.")


class TokenizeMetrics(Strict):
    """What was read and what came out."""

    vocab_size: int = Field(gt=0, description="Number of token ids, special tokens included.")
    end_of_text: int = Field(ge=0, description="Id of the token that separates documents; never inside one.")
    train: Counts = Field(description="The training split.")
    valid: Counts = Field(description="The held-out split.")
    sources: dict[str, Counts] = Field(description="Both splits together, per source.")
    skipped_empty: int = Field(ge=0, description="Documents left out because they hold nothing but white space.")
    skipped_by_limit: int = Field(ge=0, description="Documents left out by limit-bytes-per-source.")
    bytes_per_token: float = Field(gt=0, description="Over both splits.")
    encoder: str = Field(description="Library that made the token ids, with its version.")


class TokenizeManifest(Manifest):
    """Manifest of `tokens/`: tokenizer.json, train-00000.arrow …, valid-00000.arrow …."""

    command: ClassVar[str] = "tokenize"
    folder: ClassVar[str] = "tokens"

    config: TokenizeConfig
    metrics: TokenizeMetrics

    def shards(self, split: Split) -> list[FileRef]:
        """The token shards of `split`, in the order of the documents."""
        return [ref for ref in self.outputs if ref.path.rsplit("/", 1)[-1].startswith(f"{split}-")]
