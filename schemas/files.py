"""Files of a run: how one is described, written so that no crash can leave a half, and checked before use.

- `new_file` writes to a temporary name beside the target, hashes while writing, syncs, then renames, then syncs the
  folder: under the final name there is either the whole file or nothing
- a `FileRef` may not point out of the run: no absolute path, no `..`, no backslash, no NUL, no symlink that leads away
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, BinaryIO

from pydantic import AfterValidator, Field

from schemas.failures import IntegrityFailure, ResourceFailure
from schemas.strict import Strict

CHUNK = 1 << 20  # bytes read at a time when hashing


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path or ":" in parts[0]:
        raise ValueError(f"the path {path!r} leaves the run; it must be relative and stay inside")
    return path


RelativePath = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_inside)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class FileRef(Strict):
    """Descriptor of one file: where it is in the run, how long it is, what its bytes hash to."""

    path: RelativePath = Field(description="POSIX path relative to the run.")
    size: int = Field(ge=0, description="Length in bytes.")
    digest: Digest = Field(description="sha256 of the bytes.")
    rows: int | None = Field(None, ge=0, description="Documents or rows, for tables.")
    tokens: int | None = Field(None, ge=0, description="Tokens, for token shards.")

    def locate(self, run_dir: Path) -> Path:
        """The file under `run_dir`, found to exist with the right size; its bytes are not read.

        Raises IntegrityFailure when it is missing, of another size, or a link out of the run.
        """
        path = run_dir / self.path
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(run_dir)):
            raise IntegrityFailure(f"{path} leads out of the run; replace the link by the file itself")
        if not os.path.isfile(path):  # unlike Path.is_file, false for a name too long or a link to itself
            raise IntegrityFailure(f"{path} is missing; its manifest lists it: rerun the stage with --force")
        if path.stat().st_size != self.size:
            raise IntegrityFailure(
                f"{path} has {path.stat().st_size} bytes, its manifest says {self.size}: rerun the stage with --force"
            )
        return path

    def check(self, run_dir: Path) -> Path:
        """`locate`, and the bytes hashed and compared. Raises IntegrityFailure."""
        path = self.locate(run_dir)
        if digest_of(path) != self.digest:
            raise IntegrityFailure(f"{path} was changed after it was written (sha256 differs): rerun with --force")
        return path


def digest_of(path: Path) -> str:
    """`sha256:…` of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


class NewFile:
    """A file being written: takes bytes, hashes and counts them. Anything that wants a binary sink can write to it."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._digest = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append `data`; returns the number of bytes taken."""
        view = memoryview(data).cast("B")
        self._raw.write(view)
        self._digest.update(view)
        self.size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Hand buffered bytes to the operating system."""
        self._raw.flush()

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size

    def writable(self) -> bool:
        """Arrow asks."""
        return True

    def readable(self) -> bool:
        """Arrow asks."""
        return False

    def seekable(self) -> bool:
        """Arrow asks."""
        return False

    def close(self) -> None:
        """Arrow closes its sink; `new_file` closes the real file after syncing it."""

    def ref(self, path: Path, run_dir: Path, rows: int | None = None, tokens: int | None = None) -> FileRef:
        """The descriptor of what was written, to be called when everything is."""
        relative = path.relative_to(run_dir).as_posix()
        digest = f"sha256:{self._digest.hexdigest()}"
        return FileRef(path=relative, size=self.size, digest=digest, rows=rows, tokens=tokens)


@contextmanager
def new_file(path: Path) -> Iterator[NewFile]:
    """Write `path` durably: it appears whole, under its name, or not at all.

    Raises ResourceFailure when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as raw:
            yield NewFile(raw)
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceFailure(f"no room to write {path}: free some space and run the same command again") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, run_dir: Path) -> FileRef:
    """Write a small file durably and describe it."""
    with new_file(path) as file:
        file.write(data)
    return file.ref(path, run_dir)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
