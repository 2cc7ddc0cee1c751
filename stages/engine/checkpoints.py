"""Checkpoints from which a killed training resumes: tensors and a descriptor, no pickle.

- `step-000200.safetensors` first, then `step-000200.json` with its digest: without it there is no checkpoint
- the two newest are kept; one whose bytes do not match is passed over, with a warning, for the one before
- a training waits only for the copy in memory: a thread writes it, one at a time, while the next steps are made
- the same file whatever the engine, ZeRO stage or number of processes, so any of them may change between starts
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

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


class Writer:
    """Writes checkpoints into a folder while the training goes on; on leaving it, the last one is there.

    What a thread raises is raised by the next `check`, `wait` or `save`, as if that had written.
    """

    def __init__(self, folder: Path) -> None:
        self.longest = 0.0  # seconds that one has taken to be written
        self._folder = folder
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait()
        elif self._pending and (failure := self._pending.exception()):
            logger.warning("the last checkpoint was not written: {}", failure)  # what ended the training says more

    def save(self, state: dict[str, Tensor], progress: Progress) -> None:
        """Copy the state, and have it written, with all but the newest ones dropped; first wait for the one before."""
        self.wait()
        data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
        self._pending = self._thread.submit(self._write, data, progress)

    def check(self) -> None:
        """Raise what writing has raised, if it is over."""
        if self._pending and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is written."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _write(self, data: bytes, progress: Progress) -> None:
        begun = time.monotonic()
        path = self._folder / f"step-{progress.step:07d}.safetensors"
        with new_file(path) as file:
            file.write(data)
        descriptor = Descriptor(progress=progress, tensors=file.ref(path, self._folder))
        write_bytes(path.with_suffix(".json"), descriptor.model_dump_json().encode(), self._folder)
        for old in sorted(self._folder.glob("step-*.json"))[:-KEPT]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)
        self.longest = max(self.longest, time.monotonic() - begun)


def newest(folder: Path) -> tuple[dict[str, Tensor], Progress] | None:
    """The newest whole checkpoint in `folder`, or None."""
    for path in sorted(folder.glob("step-*.json"), reverse=True):
        try:
            if not path.is_file():
                raise IntegrityFailure("it is no file")
            descriptor = Descriptor.from_json(path.read_bytes())
            return safetensors.torch.load_file(descriptor.tensors.check(folder)), descriptor.progress
        except (ValidationError, IntegrityFailure) as error:
            logger.warning("passing over the checkpoint {}: {}", path.name, error)
    return None
