"""The commands that are stages, in pipeline order: one line each, and nothing else to keep in sync.

- a stage's schema is imported when it is asked for, and the stage itself, and with it torch, when it runs: so the list
  of commands costs nothing
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.failures import UsageFailure

if TYPE_CHECKING:
    from schemas.manifest import Manifest
    from schemas.strict import Config


@dataclass(frozen=True)
class Stage:
    """A stage as the command line knows it: its verb, its name in `stages/` and `schemas/`, its schema's prefix."""

    command: str
    module: str
    prefix: str
    help: str

    @property
    def config(self) -> "type[Config]":
        """The type of its settings."""
        return getattr(importlib.import_module(f"schemas.{self.module}"), f"{self.prefix}Config")

    @property
    def manifest(self) -> "type[Manifest]":
        """The type of its manifest."""
        return getattr(importlib.import_module(f"schemas.{self.module}"), f"{self.prefix}Manifest")

    def run(self, config: "Config", run_dir: Path, *, force: bool) -> Any:
        """Load the stage and run it. Returns its manifest."""
        return importlib.import_module(f"stages.{self.module}").run(config, run_dir, force=force)


STAGES = (
    Stage("collect", "collect_text", "Collect", "Collect sample text from this Python installation."),
    Stage("tokenize", "tokenize_text", "Tokenize", "Turn text into Arrow token shards."),
    Stage("cluster", "cluster_documents", "Cluster", "Find the domains of the documents (cBTM)."),
    Stage("train-seed", "train_seed", "Seed", "Train the decoder that all experts start from."),
    Stage("train-experts", "train_experts", "Experts", "Train one expert per cluster, and a dense baseline."),
    Stage("train-gates", "train_gates", "Gates", "Learn when each expert is worth asking (PHATGOOSE)."),
    Stage("compose", "compose_model", "Compose", "Bridge experts into a central concept model (CALM)."),
    Stage("evaluate", "evaluate_models", "Evaluate", "Compare all models of the run in bits per byte."),
)
EXCHANGE = (
    Stage("import", "import_model", "Import", "Take a Hugging Face model as the seed, in place of training one."),
    Stage("export", "export_model", "Export", "Write a model of the run as a Hugging Face folder."),
)
BY_COMMAND = {stage.command: stage for stage in (*STAGES, *EXCHANGE)}
PIPELINE = tuple(stage.command for stage in STAGES if stage.command != "collect")
TABLES = (*BY_COMMAND, "generate", "slurm")  # what cpipe.toml may hold


def part_of_pipeline(start: str | None, until: str | None) -> tuple[str, ...]:
    """The stages from `start` to `until`, both included. Raises UsageFailure."""
    for flag, name in (("--from", start), ("--until", until)):
        if name is not None and name not in PIPELINE:
            raise UsageFailure(f"{flag} {name} is no stage; expected one of {', '.join(PIPELINE)}")
    first = PIPELINE.index(start) if start else 0
    last = PIPELINE.index(until) if until else len(PIPELINE) - 1
    if first > last:
        raise UsageFailure(f"--from {start} comes after --until {until}: there is nothing to run")
    return PIPELINE[first : last + 1]
