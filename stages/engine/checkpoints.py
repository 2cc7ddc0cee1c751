"""Checkpoints from which a killed training resumes: tensors and a descriptor, no pickle.

- `step-000200.safetensors` first, then `step-000200.json` with its digest: without it there is no checkpoint
- the two newest are kept; one whose bytes do not match is passed over, with a warning, for the one before
- the same file whatever the engine, ZeRO stage or number of processes, so any of them may change between starts
"""

from pathlib import Path

import safetensors.torch
from loguru import logger
from pydantic import Field, ValidationError
from torch import Tensor

from schemas.failures import IntegrityFailure
from schemas.files import FileRef, new_file, write_bytes
from schemas.strict import Strict

KEPT = 2


class Progress(Strict):
    """Where a training stands."""

    step: int = Field(ge=0, description="Optimizer steps done, those left out included.")
    tokens: int = Field(ge=0, description="Tokens trained on.")
    losses: tuple[float, ...] = Field(description="Loss of every step so far that had a finite one, nats per token.")
    skipped: int = Field(0, ge=0, description="Steps left out because their loss or gradient was not finite.")
    skipped_in_a_row: int = Field(0, ge=0, description="Those among them since the last step that was not.")


class Descriptor(Strict):
    """What lies beside a checkpoint's tensors."""

    progress: Progress = Field(description="Where the training stood.")
    tensors: FileRef = Field(description="The tensors.")


def save(folder: Path, state: dict[str, Tensor], progress: Progress) -> None:
    """Write a checkpoint into `folder` and drop all but the newest ones."""
    path = folder / f"step-{progress.step:07d}.safetensors"
    with new_file(path) as file:
        file.write(safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in state.items()}))
    descriptor = Descriptor(progress=progress, tensors=file.ref(path, folder))
    write_bytes(path.with_suffix(".json"), descriptor.model_dump_json().encode(), folder)
    for old in sorted(folder.glob("step-*.json"))[:-KEPT]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def newest(folder: Path) -> tuple[dict[str, Tensor], Progress] | None:
    """The newest whole checkpoint in `folder`, or None."""
    for path in sorted(folder.glob("step-*.json"), reverse=True):
        try:
            descriptor = Descriptor.from_json(path.read_bytes())
            return safetensors.torch.load_file(descriptor.tensors.check(folder)), descriptor.progress
        except (ValidationError, IntegrityFailure) as error:
            logger.warning("passing over the checkpoint {}: {}", path.name, error)
    return None
