"""Settings of a stage: defaults, over them the stage's table in cpipe.toml, over it the flags.

- a stage's config may be nested; on the command line and in TOML its leaves stand side by side under their own names
- `[[compose]]` instead of `[compose]` runs the stage once per table
"""

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from schemas.failures import UsageFailure
from schemas.strict import Config, validated

if TYPE_CHECKING:
    from cpipe.pipeline import Stage
    from schemas.plan_training import PlanConfig

FILE_NAME = "cpipe.toml"


@dataclass(frozen=True)
class Leaf:
    """One setting: the names that lead to it, its field, its default."""

    path: tuple[str, ...]
    field: FieldInfo
    default: Any

    @property
    def name(self) -> str:
        """Its name in TOML; with dashes, its flag."""
        return self.path[-1]


def leaves(config_type: type[BaseModel], path: tuple[str, ...] = (), defaults: Any = None) -> Iterator[Leaf]:
    """All settings of a config, nested ones included, in the order of their definition."""
    for name, field in config_type.model_fields.items():
        default = getattr(defaults, name) if defaults is not None else field.get_default()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, (*path, name), default)
        else:
            yield Leaf((*path, name), field, default)


def read_settings(run_dir: Path, file: Path | None, commands: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """The tables of the settings file, one list per command.

    Raises UsageFailure for a file that is missing, is not TOML, or has a table that is no command.
    """
    path = file or run_dir / FILE_NAME
    if not path.is_file():
        if file:
            raise UsageFailure(f"no settings file {path}")
        return {}
    try:
        content = tomllib.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number of thousands of digits, too deep
        raise UsageFailure(f"{path} is not valid TOML: {error}") from error
    tables = {}
    for command, value in content.items():
        if command not in commands:
            raise UsageFailure(f"{path}: unknown table [{command}]{_suggestion(command, commands)}")
        tables[command] = value if isinstance(value, list) else [value]
        if not tables[command] or not all(isinstance(table, dict) for table in tables[command]):
            raise UsageFailure(f"{path}: [{command}] must be a table of settings")
    return tables


def resolve(config_type: type[Config], table: Mapping[str, Any], flags: Mapping[str, Any], where: str) -> Any:
    """The config from a TOML table and the flags given. Raises UsageFailure in one line."""
    known = {leaf.name: leaf for leaf in leaves(config_type)}
    nested: dict[str, Any] = {}
    for leaf in known.values():  # start from the defaults of this stage, which may differ from the nested model's own
        _place(nested, leaf.path, leaf.default)
    for name, value in {**table, **flags}.items():
        if name not in known:
            raise UsageFailure(f"{where}: unknown setting `{name}`{_suggestion(name, known)}")
        _place(nested, known[name].path, value)
    return validated(config_type, nested, where)


def asked_for(
    run_dir: Path, file: Path | None, commands: Sequence[str], texts: Sequence[str]
) -> "list[tuple[Stage, Config | None]]":
    """The stages of these commands, each with its settings, and once for every table of them. Raises UsageFailure.

    None in place of settings: what it was made of is not named now, and what is finished is taken as it is.
    """
    from cpipe.pipeline import BY_COMMAND, TABLES
    from schemas.progress import is_finished

    tables = read_settings(run_dir, file, TABLES)
    found = []
    for command in commands:
        stage = BY_COMMAND[_maker_of_seed(run_dir, tables) if command == "train-seed" else command]
        flags = {"inputs": list(texts)} if command == "tokenize" and texts else {}
        source = {"tokenize": "inputs", "import": "source"}.get(stage.command)
        for table in tables.get(stage.command, [{}]):
            if source and not {**table, **flags}.get(source) and is_finished(run_dir, stage.manifest.folder):
                config = None
            else:
                config = resolve(stage.config, table, flags, f"{file or run_dir / FILE_NAME} [{stage.command}]")
            found.append((stage, config))
    _check_compositions([config for stage, config in found if stage.command == "compose"], run_dir, file)
    return found


def _check_compositions(found: "Sequence[Config | None]", run_dir: Path, file: Path | None) -> None:
    from schemas.compose_model import ComposeConfig, check_together

    if compositions := [config for config in found if isinstance(config, ComposeConfig)]:
        check_together(compositions, f"{file or run_dir / FILE_NAME} [[compose]]")


def _maker_of_seed(run_dir: Path, tables: Mapping[str, Any]) -> str:
    """`import` where the settings have a table for it, or none for training and the seed was imported."""
    from schemas.progress import is_finished
    from schemas.train_seed import SeedManifest

    if "import" in tables and "train-seed" in tables:
        raise UsageFailure("the settings have [import] and [train-seed], and a run has one seed: leave one of them")
    if "import" in tables or "train-seed" in tables:
        return "import" if "import" in tables else "train-seed"
    return SeedManifest.read(run_dir).command if is_finished(run_dir, SeedManifest.folder) else "train-seed"


def plan_settings(run_dir: Path, file: Path | None, flags: Mapping[str, Any]) -> "PlanConfig":
    """The settings of all stages that train, as `cpipe run` would give them to each. Raises UsageFailure."""
    from cpipe.pipeline import BY_COMMAND, TABLES
    from schemas.plan_training import PlanConfig

    tables = read_settings(run_dir, file, TABLES)
    found = {
        command: [
            resolve(BY_COMMAND[command].config, table, {}, f"{file or run_dir / FILE_NAME} [{command}]")
            for table in tables.get(command, [{}])
        ]
        for command in ("tokenize", "cluster", "train-seed", "train-experts", "train-gates", "compose")
    }
    _check_compositions(found["compose"], run_dir, file)
    imported = _maker_of_seed(run_dir, tables) == "import"
    return validated(
        PlanConfig,
        {
            **flags,
            "imported": (tables.get("import", [{}])[-1].get("source") or True) if imported else False,
            "seed": found["train-seed"][-1].model_dump(mode="json"),
            "experts": found["train-experts"][-1].model_dump(mode="json"),
            "gates": found["train-gates"][-1].model_dump(mode="json"),
            "compositions": [composition.model_dump(mode="json") for composition in found["compose"]],
            "vocab_size": found["tokenize"][-1].vocab_size,
            "clusters": found["cluster"][-1].clusters,
        },
        "cpipe plan",
    )


def _place(nested: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        nested = nested.setdefault(name, {})
    nested[path[-1]] = value


def _suggestion(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1) or difflib.get_close_matches(
        name, list(known), n=1
    )
    return f"; did you mean `{close[0]}`?" if close else f"; expected one of {', '.join(known)}"
