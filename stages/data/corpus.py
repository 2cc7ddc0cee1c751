"""The text a user names, found and looked at once, before any of it is encoded.

- a column that holds the text is guessed where none is named, and said
- what would fail hours later fails here: a file that cannot be opened, names that begin anew in every file
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from schemas.failures import InputFailure, UsageFailure
from schemas.manifest import InputRef
from schemas.tokenize_text import SurveyedFile, TokenizeConfig
from stages.data.parts import Part, part_bytes, parts_of, survey
from stages.data.reading.readers import Columns, Document, Rejected, guess_text_column, read_documents
from stages.data.reading.sources import TextFile, find_files, spool

STDIN = ".stdin"  # folder of the run that standard input is written to, until the stage is finished
CACHE = ".survey.json"


@dataclass(frozen=True)
class Corpus:
    """The text: its files, what was found out about them, and how to read them."""

    config: TokenizeConfig
    files: tuple[TextFile, ...]
    surveyed: tuple[SurveyedFile, ...]
    text_columns: tuple[str | None, ...]
    parts: tuple[Part, ...]
    shard_bytes: int
    unreadable: tuple[Rejected, ...]  # files left out as a whole

    def inputs(self) -> list[InputRef]:
        """The files by name and digest."""
        return [
            InputRef(name=file.label, digest=found.digest)
            for file, found in zip(self.files, self.surveyed, strict=True)
        ]


def find_corpus(config: TokenizeConfig, run_dir: Path) -> Corpus:
    """The corpus that `config.inputs` names, cut into parts.

    Raises UsageFailure when it names nothing, InputFailure for what cannot be read, unless that is to be skipped.
    """
    if not config.inputs:
        raise UsageFailure("no text given: name files, folders or globs after the run, or - for standard input")
    named = [_spooled(config, run_dir) if name == "-" else name for name in config.inputs]
    found = {file: _look(file, config) for file in find_files(named)}
    unreadable = tuple(look for look in found.values() if isinstance(look, Rejected))
    if unreadable and config.on_error == "stop":
        raise InputFailure(unreadable[0].message)
    files = [file for file, look in found.items() if not isinstance(look, Rejected)]
    logger.info("reading {} file(s) of text", len(files))
    columns = [look for look in found.values() if not isinstance(look, Rejected)]
    _say_columns(columns, config)
    if config.on_error == "stop":
        _check_first_names(files, columns, config)
    size = part_bytes(files, config.shard_bytes)
    surveyed = survey([file.path for file in files], size, run_dir / CACHE)
    parts = parts_of(files, surveyed, size)
    return Corpus(config, tuple(files), tuple(surveyed), tuple(columns), tuple(parts), size, unreadable)


def _spooled(config: TokenizeConfig, run_dir: Path) -> str:
    return str(spool(sys.stdin.buffer, run_dir / STDIN, config.stdin))


def _look(file: TextFile, config: TokenizeConfig) -> str | Rejected | None:
    """The column of the text, where the file has columns; or why it cannot be read."""
    try:
        with file.path.open("rb"):
            pass
        return config.text_column or guess_text_column(file)
    except InputFailure as failure:
        return Rejected(file.label, None, str(failure))
    except OSError as error:
        return Rejected(file.label, None, f"{file.path} cannot be read: {error.strerror}")


def _say_columns(columns: Sequence[str | None], config: TokenizeConfig) -> None:
    for column in sorted({column for column in columns if column not in (None, "text", config.text_column)}):
        count = sum(other == column for other in columns)
        logger.info("{} file(s) have no column `text`: theirs is taken to be `{}`", count, column)


def _check_first_names(files: Sequence[TextFile], text_columns: Sequence[str | None], config: TokenizeConfig) -> None:
    """Raise InputFailure when two files begin with documents of one name, as numbered ones do."""
    first: dict[str, tuple[TextFile, Document]] = {}
    for file, text_column in zip(files, text_columns, strict=True):
        columns = Columns(text_column, config.id_column, config.source_column, config.group_column)
        document = next(_documents(file, columns), None) if file.kind != "txt" else None
        if document is None:
            continue
        if document.id in first:
            other, earlier = first[document.id]
            raise InputFailure(repetition(file, document.line, other, earlier.line))
        first[document.id] = file, document


def _documents(file: TextFile, columns: Columns) -> Iterator[Document]:
    return (record for record in read_documents(file, columns) if isinstance(record, Document))


def repetition(file: TextFile, line: int, other: TextFile, other_line: int) -> str:
    """The message about two documents of one name."""
    return (
        f"{file.path} line {line} has the id of {other.path} line {other_line}, and ids must differ: name another "
        "--id-column, or - to go by file and line, or keep the first with --on-error skip"
    )
