"""Settings and findings of verify, which leaves nothing in the run."""

from typing import Literal

from pydantic import Field

from schemas.strict import Config, Strict


class VerifyConfig(Config):
    """How closely a run is looked at."""

    sizes_only: bool = Field(False, description="Compare sizes and manifests only, and read no large file.")


Fault = Literal["missing", "cut", "longer", "changed", "extra", "stale", "unreadable", "manifest"]


class Problem(Strict):
    """One thing in a run that is not as a manifest says."""

    path: str = Field(description="File or folder, relative to the run.")
    fault: Fault = Field(description="What is wrong with it.")
    message: str = Field(description="What was found, what was expected, what to run: one line.")


class CheckedFolder(Strict):
    """What was found in one folder with a manifest."""

    folder: str = Field(description="Folder in the run.")
    files: int = Field(ge=0, description="Files its manifest lists.")
    bytes: int = Field(ge=0, description="Their size, by the manifest.")
    problems: tuple[Problem, ...] = Field(description="What is wrong; none when all is well.")
