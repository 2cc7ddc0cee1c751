"""Corpora as the user has them: files, folders, globs, Hugging Face `datasets` folders, and standard input.

- a file's suffixes say how it is read: its kind, and the codec it is compressed with
- folders are searched to any depth; hidden files are left out in silence, files of other kinds with a warning
- `save_to_disk` of `datasets` writes a folder of Arrow files, whose list is in `state.json`, and for a DatasetDict a
  folder of such folders, listed in `dataset_dict.json`; the lists are not trusted to stay inside
"""

import glob
import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from loguru import logger

from schemas.failures import InputFailure
from schemas.files import CHUNK, new_file
from stages.data.reading.streams import shown, translated

Kind = Literal["jsonl", "json", "csv", "tsv", "txt", "parquet", "arrow"]
TEXT_SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "txt", ".md": "txt",
}  # fmt: skip
TABLE_SUFFIXES: dict[str, Kind] = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
CODECS = ("gz", "zst", "bz2", "xz")
SUFFIXES: dict[str, tuple[Kind, str | None]] = {
    **{suffix: (kind, None) for suffix, kind in (TEXT_SUFFIXES | TABLE_SUFFIXES).items()},
    **{f"{suffix}.{codec}": (kind, codec) for suffix, kind in TEXT_SUFFIXES.items() for codec in CODECS},
}
READABLE = (
    f"{', '.join(TEXT_SUFFIXES)} (each also {', '.join(f'.{codec}' for codec in CODECS[:-1])} or .{CODECS[-1]}), "
    f"{', '.join(TABLE_SUFFIXES)} and folders that datasets saved"
)
DATASET_INFO, STATE, DATASET_DICT = "dataset_info.json", "state.json", "dataset_dict.json"
MAX_LISTING = 16 << 20  # bytes of such a file

_Found = tuple[Path, str | None]  # a file, and what its documents are from when the file's name does not say it


class TextFile(NamedTuple):
    """A file to read. `label` is its name, with as many parent folders as make it unique in the corpus.

    `source` is what its documents are from when they do not say; `codec`, without a dot, what it is compressed with.
    """

    path: Path
    label: str
    source: str
    kind: Kind
    codec: str | None


def find_files(inputs: Sequence[str]) -> list[TextFile]:
    """The files that `inputs` (files, folders, globs) name, each once, sorted by label.

    Raises InputFailure for what does not exist or cannot be read as text.
    """
    found: set[_Found] = set()
    for pattern in inputs:
        for path in _expand(pattern):
            found.update(_files_in(path) if path.is_dir() else [(_fit(path), None)])
    files: dict[Path, _Found] = {}
    for path, source in sorted(found, key=lambda file: (file[0], file[1] is None, file[1] or "")):
        files.setdefault(path.resolve(), (path, source))
    labels = _labels([path for path, _ in files.values()])
    texts = [
        TextFile(path, labels[path], source or _stem(path), *SUFFIXES[_suffix(path)]) for path, source in files.values()
    ]
    return sorted(texts, key=lambda file: file.label)


def _expand(pattern: str) -> list[Path]:
    if os.path.lexists(pattern):
        return [Path(pattern)]
    if found := sorted(glob.glob(pattern, recursive=True)):
        return [Path(name) for name in found]
    raise InputFailure(f"no such file or folder: {shown(pattern)}")


def _files_in(folder: Path) -> list[_Found]:
    """What can be read in `folder`; of a folder that `datasets` saved, the files it lists and no others."""
    files: list[_Found] = []
    others = Counter[str]()
    folders = [folder]
    while folders:
        here = folders.pop()
        if (dataset := _dataset_files(here)) is not None:
            files += dataset
            continue
        for path in _visible(here):
            if path.is_dir() and not path.is_symlink():
                folders.append(path)
            elif _suffix(path) and path.is_file() and path.name not in (DATASET_INFO, STATE, DATASET_DICT):
                files.append((_fit(path), None))
            else:
                others["links to folders" if path.is_dir() else path.suffix or path.name] += 1
    if not files:
        raise InputFailure(f"{shown(folder)} holds no file that can be read; readable are {READABLE}")
    if others:
        kinds = ", ".join(f"{shown(kind)} ({count})" for kind, count in sorted(others.items())[:8])
        logger.warning("left out in {}, as of other kinds: {}", shown(folder), kinds)
    return files


def _visible(folder: Path) -> list[Path]:
    with translated(folder):
        return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _dataset_files(folder: Path) -> list[_Found] | None:
    """The files of the dataset that `save_to_disk` wrote to `folder`; None when it is no such folder."""
    name = Path(os.path.abspath(folder)).name
    if (listing := folder / DATASET_DICT).is_file():
        splits = _plain_names(listing, _listed(listing).get("splits"))
        logger.info("{} is a DatasetDict; all its splits are read: {}", shown(folder), ", ".join(splits))
        return [(path, name) for split in splits for path in _shards(folder / split)]
    if (folder / DATASET_INFO).is_file() and (folder / STATE).is_file():
        return [(path, name) for path in _shards(folder)]
    return None


def _shards(folder: Path) -> list[Path]:
    listing = folder / STATE
    state = _listed(listing)
    if state.get("_indices_data_files"):
        raise InputFailure(
            f"{shown(folder)} is a selection of its rows: save its flatten_indices() by a newer datasets"
        )
    names = state.get("_data_files")
    if isinstance(names, list):
        names = [entry.get("filename") if isinstance(entry, dict) else entry for entry in names]
    paths = [folder / name for name in _plain_names(listing, names)]
    for path in paths:
        if not path.is_file():
            raise InputFailure(f"{shown(path)} is missing; {STATE} lists it: save the dataset again")
    return [_fit(path) for path in paths]


def _listed(path: Path) -> dict[str, Any]:
    with translated(path), path.open("rb") as file:
        data = file.read(MAX_LISTING + 1)
    try:
        if len(data) > MAX_LISTING:
            raise ValueError(f"longer than {MAX_LISTING >> 20} MiB")
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputFailure(
            f"{shown(path)} is not JSON as datasets writes it ({error}): save the dataset again"
        ) from error
    return content if isinstance(content, dict) else {}


def _plain_names(listing: Path, names: Any) -> list[str]:
    """`names`, found to be a list of names of files or folders beside `listing`."""
    for name in names if isinstance(names, list) else [None]:
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise InputFailure(
                f"{shown(listing)} lists {name!r:.60}, expected names in its folder: save the dataset again"
            )
    return list(names)


def _fit(path: Path) -> Path:
    """`path`, found to be a file that a reader exists for."""
    if not path.exists():
        raise InputFailure(f"{shown(path)} is a link to nothing")
    if not path.is_file():
        raise InputFailure(f"{shown(path)} is not a regular file; write the text to a file first")
    if path.name in (DATASET_INFO, STATE, DATASET_DICT):
        raise InputFailure(f"{shown(path)} describes a dataset and holds no text: give its folder")
    if not _suffix(path):
        raise InputFailure(f"{shown(path)} is of an unknown kind {path.suffix!r}; readable are {READABLE}")
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise InputFailure(f"the file name {shown(path)} is not UTF-8: rename the file") from error
    return path


def _suffix(path: Path) -> str:
    """The part of the name that says how the file is read, in small letters: a key of `SUFFIXES`; or nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((known for known in ("".join(suffixes[-2:]), *suffixes[-1:]) if known in SUFFIXES), "")


def _stem(path: Path) -> str:
    """The file's name without its suffix: `law.v2.jsonl.zst` is `law.v2`."""
    return path.name[: -len(_suffix(path))]


def _labels(paths: Sequence[Path]) -> dict[Path, str]:
    labels = {path: path.name for path in paths}
    for depth in itertools.count(2):
        shared = {label for label, count in Counter(labels.values()).items() if count > 1}
        if not shared:
            break
        labels |= {path: "/".join(path.absolute().parts[-depth:]) for path in paths if labels[path] in shared}
    return labels


def spool(stream: BinaryIO, folder: Path, suffix: str) -> Path:
    """Copy `stream`, which cannot be read twice, to `folder/stdin<suffix>`; the path of it.

    `suffix` is one of `SUFFIXES`, the dot in front of it may be missing. Raises InputFailure for another one, before
    anything is read, and for a stream that holds nothing or cannot be read; then no file is left.
    """
    known = f".{suffix.lower().removeprefix('.')}"
    if known not in SUFFIXES:
        raise InputFailure(f"standard input cannot be read as {suffix!r}; readable are {READABLE}")
    path = folder / f"stdin{known}"
    with new_file(path) as file:
        while data := _received(stream):
            file.write(data)
        if not file.size:
            raise InputFailure("standard input is empty, expected text: is something piped into the command?")
    return path


def _received(stream: BinaryIO) -> bytes:
    with translated(Path("standard input")):
        return stream.read(CHUNK)
