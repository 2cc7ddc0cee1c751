"""Settings and manifest of `cpipe collect`, which makes the demo's corpus."""

from typing import ClassVar

from pydantic import Field

from schemas.manifest import Manifest
from schemas.strict import Config, Strict


class CollectConfig(Config):
    """How much text to collect of each kind."""

    bytes_per_kind: int = Field(400_000, ge=20_000, description="UTF-8 bytes of each kind; less where there is less.")
    sampling_seed: int = Field(0, ge=0, lt=2**31, description="Decides which files are taken.")


class KindCounts(Strict):
    """How much text of one kind was found."""

    files: int = Field(ge=0, description="Files the text is from.")
    documents: int = Field(ge=0, description="Pieces of files.")
    bytes: int = Field(ge=0, description="Bytes of the text in UTF-8.")


class CollectMetrics(Strict):
    """What was collected."""

    kinds: dict[str, KindCounts] = Field(description="Per kind of text.")
    dropped: tuple[str, ...] = Field(description="Kinds this installation holds too little of.")


class CollectManifest(Manifest):
    """Manifest of `corpus/`: one <kind>.jsonl per kind, with the keys id, source, group and text."""

    command: ClassVar[str] = "collect"
    folder: ClassVar[str] = "corpus"

    config: CollectConfig
    metrics: CollectMetrics
