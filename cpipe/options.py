"""From a config to a Typer command: one flag per setting, with its type, default and sentence of help."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cpipe.settings import Leaf, leaves
from schemas.strict import Config


def flags_of(
    config_type: type[Config], act: Callable[..., None], shared: Mapping[str, Any], run_argument: Any
) -> Callable[..., None]:
    """A function Typer can read, with a flag for every setting, that calls `act(run, flags, **shared)`.

    `flags` holds the settings given on the command line, `shared` the annotated options all commands have.
    """
    settings = list(leaves(config_type))
    names = [leaf.name for leaf in settings]
    if len(set(names)) < len(names):
        raise TypeError(f"{config_type.__name__} has two settings of one name: {sorted(names)}")

    def command(run: Path, **given: Any) -> None:
        rest = {name: given.pop(name) for name in shared}
        act(run, {name: value for name, value in given.items() if value not in (None, [])}, **rest)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("run", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=run_argument)]
    for leaf in settings:
        parameters.append(inspect.Parameter(leaf.name, keyword, default=None, annotation=_annotation(leaf)))
    for name, annotation in shared.items():
        default = None if name == "settings" else False
        parameters.append(inspect.Parameter(name, keyword, default=default, annotation=annotation))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # Typer reads the flags from it
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _annotation(leaf: Leaf) -> Any:
    extra = leaf.field.json_schema_extra
    kind = _flag_type(leaf.field.annotation)
    if isinstance(extra, dict) and extra.get("argument"):
        return Annotated[kind | None, typer.Argument(help=leaf.field.description, show_default=False)]
    help_text = f"{leaf.field.description}{_default(leaf.default)}"
    return Annotated[kind | None, typer.Option(help=help_text, show_default=False)]


def _flag_type(annotation: Any) -> Any:
    """The type Typer converts to: optional and tuple types reduced to what they hold."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return _flag_type(next(part for part in typing.get_args(annotation) if part is not type(None)))
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return str  # as JSON
    if origin is tuple:  # of literals, Typer knows only single ones: the config checks the words
        kind = _flag_type(typing.get_args(annotation)[0])
        return list[kind] if kind in (int, float) else list[str]  # type: ignore[valid-type]
    if origin is Literal or annotation in (int, float, str, bool):
        return annotation
    raise TypeError(f"no flag for a setting of type {annotation}")


def _default(value: Any) -> str:
    if value is None or value == () or value == "":
        return ""
    return f" Default: {', '.join(map(str, value)) if isinstance(value, tuple) else value}."
