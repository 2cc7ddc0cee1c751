"""Tensors that trainings of a run share, as files up to a size: what frozen models make of training rows.

- a file is there whole, with the digest of its bytes beside it, or not at all; a damaged one is computed again
- once the room is used, nothing more is kept and nothing goes: trainings read their rows in the same order, so the next
  asks for the oldest first
- what is kept serves computations of the same key only; `cpipe clean` removes all of it
"""

import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch
from loguru import logger
from pydantic import ValidationError
from torch import Tensor

from schemas.failures import IntegrityFailure
from schemas.files import FileRef, new_file, write_bytes
from schemas.manifest import InputRef

FOLDER = "features"


class FeatureCache:
    """The tensors of one kind of computation."""

    def __init__(self, run_dir: Path, inputs: list[InputRef], settings: dict[str, object], limit: float) -> None:
        """`inputs` and `settings`: all that decides the tensors of a name. `limit`: bytes, for all of the run's."""
        told = {ref.name: ref.digest for ref in inputs} | settings
        told |= {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        self._run_dir, self._folder, self._limit = run_dir, run_dir / FOLDER / key, limit
        self.found, self.missed, self.kept = 0, 0, 0

    def read(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of this name, on the processor; None where they are not kept, or not as they were written."""
        tensors = self._read(self._folder / f"{name}.safetensors")
        self.found += tensors is not None
        self.missed += tensors is None
        return tensors

    def keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write them if there is room."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if _size(self._run_dir / FOLDER) + size > self._limit:
            return
        path = self._folder / f"{name}.safetensors"
        with new_file(path) as file:
            file.write(safetensors.torch.save({key: each.detach().cpu().contiguous() for key, each in tensors.items()}))
        ref = file.ref(path, self._run_dir)
        write_bytes(path.with_suffix(".json"), ref.model_dump_json().encode(), self._run_dir)
        self.kept += 1

    def tell(self) -> None:
        """Log what it was worth."""
        logger.info(
            "batches whose features were found in {}: {} of {}; {} of the others are kept",
            self._folder,
            self.found,
            self.found + self.missed,
            self.kept,
        )

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        descriptor = path.with_suffix(".json")
        if not descriptor.is_file():
            return None
        try:
            ref = FileRef.from_json(descriptor.read_bytes())
            if ref.path != path.relative_to(self._run_dir).as_posix():
                raise IntegrityFailure(f"{descriptor} is of another file")
            return safetensors.torch.load_file(ref.check(self._run_dir))
        except (ValidationError, IntegrityFailure, OSError, safetensors.SafetensorError) as error:
            logger.warning("computing again what was kept in {}: {}", path.name, error)
            return None


def _size(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
