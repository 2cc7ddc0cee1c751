"""Tensors that trainings of a run share, as files up to a size: what frozen models make of training rows.

- a file is there whole, with the digest of its bytes beside it, or not at all; a damaged one is computed again
- once the room is used, nothing more is kept and nothing goes: trainings read their rows in the same order, so the next
  asks for the oldest first
- what is kept serves computations of the same key only, which says the kind of machine too; `cpipe clean` removes it
"""

import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch
from loguru import logger
from pydantic import ValidationError
from torch import Tensor

from schemas.failures import IntegrityFailure, ResourceFailure
from schemas.files import FileRef, new_file, write_bytes
from schemas.manifest import InputRef

FOLDER = "features"
COUNTED = 64  # files after which what there is is counted anew: other processes write, too


class FeatureCache:
    """The tensors of one kind of computation."""

    def __init__(self, run_dir: Path, inputs: list[InputRef], settings: dict[str, object], limit: float) -> None:
        """`inputs` and `settings`: all that decides the tensors of a name. `limit`: bytes, for all of the run's."""
        told = {ref.name: ref.digest for ref in inputs} | settings
        told |= {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "device": _device()}
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        self._run_dir, self._folder, self._limit = run_dir, run_dir / FOLDER / key, limit
        self._used = 0
        self.found, self.missed, self.kept = 0, 0, 0

    def read(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of this name, on the processor; None where they are not kept, or not as they were written."""
        tensors = self._read(self._folder / f"{name}.safetensors")
        self.found += tensors is not None
        self.missed += tensors is None
        return tensors

    def keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write them if there is room; a full disk is no room either."""
        if self.kept % COUNTED == 0 and self._limit:
            self._used = _size(self._run_dir / FOLDER)  # with what others wrote
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._used + size > self._limit:
            self._limit = 0.0
            return
        path = self._folder / f"{name}.safetensors"
        content = safetensors.torch.save({key: each.detach().cpu().contiguous() for key, each in tensors.items()})
        try:
            with new_file(path) as file:
                file.write(content)
            ref = file.ref(path, self._run_dir)
            write_bytes(path.with_suffix(".json"), ref.model_dump_json().encode(), self._run_dir)
        except ResourceFailure as failure:
            logger.warning("no more features are kept: {}", failure)
            self._limit = 0.0
            return
        self._used += len(content)
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
            logger.warning("computing again the features in {}, which are damaged ({})", path, type(error).__name__)
            path.unlink(missing_ok=True)
            descriptor.unlink(missing_ok=True)
            return None


def _device() -> str:
    """What computes: others round differently."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return f"{torch.backends.cpu.get_cpu_capability()} {gpu}"


def _size(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
