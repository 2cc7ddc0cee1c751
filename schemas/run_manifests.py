"""Every manifest that lies in a run, whatever stage wrote it, and whether they still follow from each other.

- types are found among the schemas: a new stage's manifests are known here without being listed
- nothing in a run is trusted: only regular files inside it are opened, and none is opened before its size is known
"""

import json
import os
import pkgutil
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import schemas
from schemas.failures import IntegrityFailure
from schemas.manifest import FILE_NAME, MAX_BYTES, Manifest
from schemas.version import VERSION

FROM_OUTSIDE = ("collect", "tokenize")  # commands whose inputs are the user's own files, whatever they are called


def manifest_folders(run_dir: Path) -> list[str]:
    """Folders of the run that hold a manifest; hidden ones, and what links lead to, are not looked at."""
    found = []
    for path, folders, files in os.walk(run_dir):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if FILE_NAME in files and Path(path) != run_dir:
            found.append(Path(path).relative_to(run_dir).as_posix())
    return sorted(found)


def read_manifest(run_dir: Path, folder: str) -> Manifest:
    """The manifest in `folder`, of whatever stage. Raises IntegrityFailure."""
    path = run_dir / folder / FILE_NAME
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(run_dir)) or not os.path.isfile(path):
        raise IntegrityFailure(f"{path} leads out of the run or is no file: rerun the stage")
    return _type_of(path).parse(path)


def _type_of(path: Path) -> type[Manifest]:
    """The type that reads the manifest at `path`, or would tell best what is wrong with it."""
    if path.stat().st_size > MAX_BYTES:
        raise IntegrityFailure(f"{path} is larger than {MAX_BYTES >> 20} MiB; that is no manifest of cpipe")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise IntegrityFailure(f"{path}: not valid JSON: {why}; rerun its stage with --force") from error
    schema = str(found.get("schema")) if isinstance(found, dict) else "none"
    alike = [kind for kind in manifest_types() if kind.expected_schema().split("/")[0] == schema.split("/")[0]]
    if not alike:
        raise IntegrityFailure(f"{path} has schema {schema!r:.80}, which cpipe {VERSION} does not know")
    # Several manifests go by one name, as those of an expert and of all experts do: their fields tell them apart.
    return min(alike, key=lambda kind: sum(len(_keys(found, part) ^ _fields(kind, part)) for part in PARTS))


PARTS = ("config", "metrics")


def _keys(found: dict[str, Any], part: str) -> set[str]:
    value = found.get(part)
    return set(value) if isinstance(value, dict) else set()


def _fields(kind: type[Manifest], part: str) -> set[str]:
    annotation: Any = kind.model_fields[part].annotation
    return set(annotation.model_fields)


@cache
def manifest_types() -> tuple[type[Manifest], ...]:
    """Every type of manifest that the schemas define, by the name of its folder."""
    for module in pkgutil.iter_modules(schemas.__path__):
        pkgutil.resolve_name(f"schemas.{module.name}")
    found = {kind for kind in _below(Manifest) if kind.__module__.startswith("schemas.")}
    return tuple(sorted(found, key=lambda kind: (kind.folder, kind.__name__)))


def _below(kind: type[Manifest]) -> Iterator[type[Manifest]]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


def broken_links(folder: str, there: Mapping[str, Manifest], unknown: Collection[str] = ()) -> Iterator[str]:
    """What the manifest of `folder` was made from that is not what lies in the run now, in words.

    `unknown`: folders whose manifests cannot be read, and are not judged.
    """
    manifest = there[folder]
    if manifest.command in FROM_OUTSIDE:
        return
    for ref in manifest.inputs:
        if ref.name in there:
            if there[ref.name].content_digest() != ref.digest:
                yield f"was made from another {ref.name} than is there now"
        elif (
            ref.name not in unknown and "." not in Path(ref.name).name
        ):  # a file of the user's has a suffix, a folder of a run has none
            yield f"was made from {ref.name}, which is there no more"
