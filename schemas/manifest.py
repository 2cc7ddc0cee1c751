"""The manifest of a stage: what was run, on what, with what result. A stage is finished when, and only when, it exists.

- `key` says which computation this is: stage, schema, settings that matter, digests of the inputs, version of cpipe
- `content_digest` covers everything but `environment`, so a stage repeated on another day or machine with the same
  result does not make the stages after it stale
- an input is the content digest of the manifest before it: checking the last manifest checks the whole history
- `digest` covers every other value of the file, so that `cpipe verify` finds a changed one in any manifest
- an older form is converted as it is read, where its class knows how; the file is never rewritten
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, PrivateAttr, ValidationError

from schemas.failures import IntegrityFailure, UsageFailure
from schemas.files import Digest, FileRef, write_bytes
from schemas.strict import Config, Strict, explain, key_values, unique_json
from schemas.version import VERSION

FILE_NAME = "manifest.json"
MAX_BYTES = 64 << 20  # a manifest is untrusted input; no honest one comes near this

Conversion = Callable[[dict[str, Any]], dict[str, Any]]  # a manifest's JSON in one form, to that of the next


class InputRef(Strict):
    """What a stage read: a manifest of the run, by its folder, or a user's file, by its name without the path."""

    name: str = Field(max_length=1024, description="Folder in the run, or file name.")
    digest: Digest = Field(description="Content digest of the manifest, or sha256 of the file.")


class Environment(Strict):
    """Where and when a stage ran. Recorded, never compared."""

    versions: dict[str, str] = Field(description="Versions of cpipe, Python and the libraries that compute.")
    machine: str = Field(description="Operating system, processor and accelerator.")
    threads: int = Field(ge=1, description="Threads torch computed with; other counts may round differently.")
    processes: int = Field(1, ge=1, description="Processes that trained together.")
    started: str = Field(description="Start, UTC, ISO 8601.")
    seconds: float = Field(ge=0, description="Duration of the last start of the stage, wall clock.")
    peak_memory: int = Field(ge=0, description="Largest resident memory of the process, bytes.")


class Manifest(Strict):
    """Base of the stages' manifests. Each sets `command`, `folder`, `version` and the types of config and metrics.

    `conversions`: by the version they convert from, to the next.
    """

    command: ClassVar[str]
    folder: ClassVar[str]
    version: ClassVar[int] = 1
    conversions: ClassVar[Mapping[int, Conversion]] = {}

    schema_id: str = Field(alias="schema", description="cpipe.<command>/<version of the manifest's form>.")
    key: Digest = Field(description="Hash of stage, schema, settings, inputs and version of cpipe.")
    config: Config = Field(description="The settings, fully resolved.")
    inputs: tuple[InputRef, ...] = Field(description="What was read.")
    outputs: tuple[FileRef, ...] = Field(description="What was written.")
    metrics: Strict = Field(description="What was measured.")
    environment: Environment = Field(description="Where and when; outside the digest that later stages see.")
    digest: Digest | None = Field(None, description="Hash of everything else here; none in what was written before it.")

    _converted_from: str | None = PrivateAttr(None)  # content digest of the older form, which later stages know

    @classmethod
    def expected_schema(cls) -> str:
        """The `schema` value this version of cpipe writes and reads."""
        return f"cpipe.{cls.command}/{cls.version}"

    @classmethod
    def read(cls, run_dir: Path, folder: str | None = None) -> Self:
        """Read a finished stage's manifest.

        Raises UsageFailure when the stage has not finished, IntegrityFailure when the file is not a manifest of this
        stage and version.
        """
        path = run_dir / (folder or cls.folder) / FILE_NAME
        if not path.is_file():
            raise UsageFailure(f"no {folder or cls.folder} in {run_dir}: run `cpipe {cls.command} {run_dir}` first")
        return cls.parse(path)

    @classmethod
    def parse(cls, path: Path) -> Self:
        """Read the manifest at `path`, one of an older form converted. Raises IntegrityFailure."""
        if not os.path.isfile(path):  # to read a pipe would be to wait for ever
            raise IntegrityFailure(f"{path} is no file: rerun `cpipe {cls.command}` with --force")
        if path.stat().st_size > MAX_BYTES:
            raise IntegrityFailure(f"{path} is larger than {MAX_BYTES >> 20} MiB; that is no manifest of cpipe")
        text = path.read_bytes()
        try:
            manifest = cls._from_older(path, text) or cls.from_json(text)
        except ValidationError as error:
            raise IntegrityFailure(cls._refusal(path, text) or explain(error, str(path))) from error
        except IntegrityFailure as failure:
            raise IntegrityFailure(f"{path}: {failure}; rerun `cpipe {cls.command}` with --force") from failure
        if not manifest._converted_from and (refusal := cls._refusal(path, text)):
            raise IntegrityFailure(refusal)
        return manifest

    @classmethod
    def _from_older(cls, path: Path, text: bytes) -> Self | None:
        """The manifest converted step by step, where it is of an older form and there is a conversion for each."""
        if cls.version == 1:
            return None
        content = unique_json(text)
        found = cls._version_of(content)
        if found is None or not all(step in cls.conversions for step in range(found, cls.version)):
            return None
        if content.pop("digest", None) not in (None, digest_of_json(content)):
            raise IntegrityFailure("was changed after it was written (its digest differs)")
        before = {name: value for name, value in content.items() if name != "environment"}
        before["config"] = key_values(before.get("config"), cls.model_fields["config"].annotation)
        try:
            for step in range(found, cls.version):
                content = cls.conversions[step](content)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityFailure(f"has not the form of cpipe.{cls.command}/{found}, which it claims") from error
        manifest = cls.from_mapping({**content, "schema": cls.expected_schema()})
        manifest._converted_from = digest_of_json(before)
        return manifest

    @classmethod
    def _version_of(cls, content: Any) -> int | None:
        """The version of an older form of this manifest; None of any other."""
        older = {f"cpipe.{cls.command}/{number}": number for number in range(1, cls.version)}
        return older.get(str(content.get("schema"))) if isinstance(content, dict) else None

    @classmethod
    def _refusal(cls, path: Path, text: bytes) -> str | None:
        """Why a manifest of another stage or version is refused; None when both are as expected."""
        found = json.loads(text)
        schema = found.get("schema") if isinstance(found, dict) else None
        if schema == cls.expected_schema():
            return None
        command, _, version = str(schema).removeprefix("cpipe.").partition("/")
        if command == cls.command and version.isdecimal() and len(version) < 10 and int(version) > cls.version:
            return (
                f"{path} was written by cpipe {_writer(found)} as {schema}; this is cpipe {VERSION}, which reads "
                f"{cls.expected_schema()}: upgrade cpipe, or rerun `cpipe {cls.command}` into another run"
            )
        if cls._version_of(found):
            return (
                f"{path} was written by cpipe {_writer(found)} as {schema}; this is cpipe {VERSION}, which reads "
                f"{cls.expected_schema()}: `cpipe {cls.command} {cls._run_of(path)} --force` makes it anew"
            )
        return f"{path} has schema {schema!r:.80}, expected {cls.expected_schema()!r}"

    @classmethod
    def _run_of(cls, path: Path) -> Path:
        """The run that the manifest at `path` lies in; folders may lie in one another, as those of experts do."""
        first, *_ = parts = Path(cls.folder).parts or ("",)
        around = [folder for folder in path.parents[: len(parts) + 1] if folder.name == first]
        return (around[0] if around else path.parent).parent

    def write(self, run_dir: Path, folder: str | None = None) -> None:
        """Write the manifest: the last act of a stage."""
        text = json.dumps(self.to_json(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_bytes(run_dir / (folder or self.folder) / FILE_NAME, text.encode(), run_dir)

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values."""
        return self.model_dump(mode="json", by_alias=True, serialize_as_any=True)

    def sealed(self) -> Self:
        """This manifest with its `digest`."""
        return self.model_copy(update={"digest": self._digest()})

    def is_as_sealed(self) -> bool:
        """Whether nothing was changed since; true of what has no digest, and of what was converted."""
        return self.digest in (None, self._digest())

    def _digest(self) -> str:
        content = self.to_json()
        del content["digest"]
        return digest_of_json(content)

    def content_digest(self) -> str:
        """sha256 of the manifest without its environment and settings that cannot change the result."""
        if self._converted_from:
            return self._converted_from
        content = self.to_json()
        del content["environment"], content["digest"]
        content["config"] = self.config.key_settings()
        return digest_of_json(content)

    def as_input(self, folder: str | None = None) -> InputRef:
        """This manifest as the input of a later stage."""
        return InputRef(name=folder or self.folder, digest=self.content_digest())

    def output(self, name: str) -> FileRef:
        """The output whose file name is `name`. Raises IntegrityFailure when there is none."""
        for ref in self.outputs:
            if ref.path.rsplit("/", 1)[-1] == name:
                return ref
        raise IntegrityFailure(f"the manifest of `cpipe {self.command}` lists no {name}: rerun it with --force")


def _writer(found: dict[str, Any]) -> str:
    """The version of cpipe that wrote a manifest whose form is unknown."""
    for name in ("environment", "versions", "cpipe"):
        found = found.get(name, {}) if isinstance(found, dict) else {}
    return found if isinstance(found, str) else "of a newer version"


def key_of(manifest_type: type[Manifest], config: Config, inputs: Sequence[InputRef]) -> str:
    """The key of a computation: equal keys, equal outputs."""
    return digest_of_json(
        {
            "schema": manifest_type.expected_schema(),
            "config": config.key_settings(),
            "inputs": [[ref.name, ref.digest] for ref in inputs],
            "cpipe": VERSION,
        }
    )


def digest_of_json(value: Any) -> str:
    """sha256 of a JSON value in canonical form: sorted keys, no spaces."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"
