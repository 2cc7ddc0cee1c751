"""Settings and findings of clean."""

from pydantic import Field

from schemas.strict import Config, Strict


class CleanConfig(Config):
    """What is removed beside what no stage needs any more."""

    unfinished: bool = Field(
        False, description="Also what begun stages would resume from: checkpoints, and encoded parts of the text."
    )
    dry_run: bool = Field(False, description="Say what would be removed, and remove nothing.")


class Removed(Strict):
    """One file or folder that was removed, or would be."""

    path: str = Field(description="Relative to the run.")
    bytes: int = Field(ge=0, description="What it took.")
    why: str = Field(description="Why nothing needs it.")
