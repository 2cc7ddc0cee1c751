"""Settings and manifest of `cpipe tokenize`.

- where the text and the tokenizer lie is not in the key; what they hold is: each file's sha256 is an input
- who encodes, with how many processes, on which machine and in how many goes is not in the key: the bytes are the same
- `on_error` is not either: a start that stopped at a bad line goes on with `--on-error skip` where it stopped
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from schemas.files import FileRef
from schemas.manifest import Manifest
from schemas.strict import Config, Strict, runtime_setting

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")
Library = Literal["auto", "fastokens", "tokenizers"]
OnError = Literal["stop", "skip"]


class TokenizeConfig(Config):
    """What text to read, how to split it, and which tokenizer to train or to take."""

    inputs: tuple[str, ...] = Field(
        (),
        description="Files, folders or globs of .jsonl, .json, .csv, .tsv, .txt, .md (each also .gz, .zst, .bz2, .xz), "
        ".parquet, .arrow and .feather, folders of Hugging Face datasets, or - for standard input.",
        json_schema_extra={"argument": True, "runtime": True},
    )
    stdin: str = runtime_setting("jsonl", "What standard input holds, as a file's suffix would say: txt, csv.gz, ….")
    text_column: str | None = Field(
        None, min_length=1, description="Column or JSON key that holds the text; default: found out, and said."
    )
    source_column: str | None = Field(
        None, min_length=1, description="Column that says where a document is from; default: `source`, else the file."
    )
    id_column: str | None = Field(
        None, min_length=1, description="Column that names a document; default: `id`, else file and line, as with `-`."
    )
    group_column: str | None = Field(
        None, min_length=1, description="Column whose equal values stay in one split; default: the document's id."
    )
    txt_documents: Literal["file", "block", "line"] = Field(
        "file", description="A document of .txt and .md: the file, a block between blank lines, or a line."
    )
    vocab_size: int = Field(8192, ge=257, le=1 << 20, description="Ids of the tokenizer that is trained.")
    tokenizer: str | None = runtime_setting(
        None, "A tokenizer.json, or a Hugging Face model folder, to use; default: train one on the text."
    )
    train_bytes: int = Field(50_000_000, gt=0, description="Bytes of text the tokenizer is trained on, at most.")
    end_of_text: str | None = Field(
        None, min_length=1, description="Token that separates documents; default: the one the tokenizer has for it."
    )
    allow_lossy: bool = Field(
        False, description="Take a tokenizer that does not give every text back, and count what it loses."
    )
    concept_tokens: int = Field(
        0, ge=0, le=1 << 16, description="Tokens to reserve, or of a given tokenizer to rename, as <concept_0>, …."
    )
    unused_tokens: tuple[str, ...] = Field((), description="Tokens to rename, in this order; default: found by name.")
    unused_pattern: str | None = Field(
        None, min_length=1, description="Regular expression (RE2) that matches the names of tokens to rename."
    )
    valid_fraction: float = Field(0.02, gt=0, lt=1, description="Share of the groups held out for evaluation.")
    limit_bytes_per_source: int | None = Field(
        None, gt=0, description="Read at most so many bytes of text of each source; default: everything."
    )
    deduplicate: bool = Field(False, description="Keep only the first of documents with equal text.")
    min_characters: int | None = Field(None, gt=0, description="Leave out shorter documents.")
    max_characters: int | None = Field(None, gt=0, description="Leave out longer documents.")
    max_symbol_share: float | None = Field(
        None, ge=0, lt=1, description="Leave out documents with a larger share of punctuation and symbols."
    )
    shard_bytes: int | None = Field(
        None,
        ge=1 << 10,
        le=1 << 30,
        description="Bytes of text of a shard, about; default: 32 to 256 MiB, by the input.",
    )
    on_error: OnError = runtime_setting(
        "stop", "At a document that cannot be read: stop, or skip it and list it in skipped.jsonl."
    )
    encoder: Library = runtime_setting("auto", "Library that encodes; both give the same ids.")
    workers: int | None = runtime_setting(None, "Processes that encode at once; default: one per core.", gt=0)
    shard: str | None = runtime_setting(
        None, "Do only the i-th of n shares of the work, as in `3/8`.", pattern=r"^[1-9][0-9]{0,4}/[1-9][0-9]{0,4}$"
    )
    merge: bool = runtime_setting(False, "Only join what the shares have done; refuse when some of it is missing.")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.unused_tokens or self.unused_pattern) and not (self.concept_tokens and self.tokenizer):
            raise ValueError("unused tokens are renamed with --tokenizer and --concept-tokens only")
        if self.unused_tokens and self.unused_pattern:
            raise ValueError("give --unused-tokens or --unused-pattern, not both")
        if self.shard and int(self.shard.split("/")[0]) > int(self.shard.split("/")[1]):
            raise ValueError(f"--shard {self.shard}: the first number is at most the second")
        if self.shard and self.merge:
            raise ValueError("--shard does a share of the work, --merge joins all: give one of them")
        return self


class Counts(Strict):
    """How much text."""

    documents: int = Field(ge=0, description="Documents.")
    tokens: int = Field(ge=0, description="Tokens, without separators.")
    bytes: int = Field(ge=0, description="Bytes of the text in UTF-8.")

    @classmethod
    def total(cls, counts: Sequence[Self]) -> Self:
        """All of them together."""
        return cls(**{name: sum(getattr(count, name) for count in counts) for name in cls.model_fields})


class LeftOut(Strict):
    """Documents that were read and not kept, by reason."""

    empty: int = Field(0, ge=0, description="Nothing but white space.")
    too_short: int = Field(0, ge=0, description="Shorter than min-characters.")
    too_long: int = Field(0, ge=0, description="Longer than max-characters.")
    symbols: int = Field(0, ge=0, description="More punctuation and symbols than max-symbol-share.")
    over_limit: int = Field(0, ge=0, description="Beyond limit-bytes-per-source.")
    duplicates: int = Field(0, ge=0, description="Of equal text as an earlier one, with deduplicate.")
    faulty: int = Field(0, ge=0, description="Skipped as unreadable; listed in skipped.jsonl.")


class TokenizeMetrics(Strict):
    """What was read and what came out."""

    vocab_size: int = Field(gt=0, description="Number of token ids, special tokens included.")
    end_of_text: int = Field(ge=0, description="Id of the token that separates documents; never inside one.")
    concept_tokens: tuple[int, ...] = Field(description="Ids of <concept_0>, …, in that order.")
    train: Counts = Field(description="The training split.")
    valid: Counts = Field(description="The held-out split.")
    sources: dict[str, Counts] = Field(description="Both splits together, per source.")
    left_out: LeftOut = Field(description="Documents read and not kept.")
    lossy: int = Field(ge=0, description="Documents the tokenizer does not give back as they were.")
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


class ShareMetrics(Strict):
    """How much one share of the work came to."""

    parts: int = Field(ge=0, description="Parts of the corpus in this share.")
    documents: int = Field(ge=0, description="Documents encoded; duplicates between shares are still among them.")
    tokens: int = Field(ge=0, description="Tokens of them.")


class ShareManifest(Manifest):
    """Manifest of one share, `tokens/shares/003-of-008/`; its files lie with those of the others, to be merged."""

    command: ClassVar[str] = "tokenize"
    folder: ClassVar[str] = "tokens/shares"

    config: TokenizeConfig
    metrics: ShareMetrics


class Segment(Strict):
    """Finished work inside `tokens/parts/`: the documents of one shard of each split, and how they came about."""

    part: int = Field(ge=0, description="Which part of the corpus.")
    number: int = Field(ge=0, description="Which segment of the part.")
    last: bool = Field(description="Whether the part ends with it.")
    documents: int = Field(ge=0, description="Documents of the part encoded up to here.")
    shards: tuple[FileRef, ...] = Field(description="At most one shard of each split.")
    table: FileRef = Field(description="A row per document: what merging needs to know.")
    left_out: LeftOut = Field(description="Of the whole part; counted in the last segment, zero in others.")
    skipped: FileRef | None = Field(description="The list of skipped records of the part; in the last segment only.")
    lossy: int = Field(ge=0, description="Documents of this segment that do not come back as they were.")
    encoder: str = Field(description="Library that made the token ids, with its version.")


class SurveyedFile(Strict):
    """What is known of one file of text without reading it again."""

    path: str = Field(description="Where it was found.")
    size: int = Field(ge=0, description="Length in bytes.")
    changed: tuple[int, int] = Field(description="Times of its last change, of content and of inode, ns.")
    digest: str = Field(description="sha256 of its bytes.")
    cut_bytes: int = Field(gt=0, description="Distance of the cuts.")
    cuts: tuple[tuple[int, int], ...] = Field(description="Where lines begin that a part can begin with: byte, line.")


class Survey(Strict):
    """The files of a corpus as they were last found: `RUN/.survey.json`, a cache."""

    files: tuple[SurveyedFile, ...] = Field(description="One entry a file.")
