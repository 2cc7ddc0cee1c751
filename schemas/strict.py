"""The base of every config and manifest: frozen, unknown keys refused, no silent conversions.

- JSON is the only door (`from_json`, `from_mapping`): pydantic's strict JSON mode refuses "3" for 3 and true for 1, yet
  takes a list for a tuple, which its strict Python mode would not
- pydantic keeps the last of two equal JSON keys without a word, so duplicates are refused before it sees the text
- a setting that cannot change a stage's output (`runtime_setting`) is left out of the stage's key
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from schemas.failures import IntegrityFailure, UsageFailure, on_one_line


class Strict(BaseModel):
    """A frozen model that refuses unknown keys, NaN and values of the wrong type."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        populate_by_name=True,
        protected_namespaces=(),
    )

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read the model from JSON text.

        Raises IntegrityFailure for duplicate keys, and pydantic's ValidationError for wrong content.
        """
        unique_json(text)
        return cls.model_validate_json(text)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Read the model from plain values, as TOML and command-line flags give them."""
        return cls.model_validate_json(json.dumps(values, default=str))  # a date, which TOML has, is no JSON


def unique_json(text: str | bytes) -> Any:
    """The values in JSON text. Raises IntegrityFailure for what is none, and for a key that stands twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise IntegrityFailure("the JSON is nested too deeply") from error
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise IntegrityFailure(f"not valid JSON: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise IntegrityFailure(f"the JSON key {twice!r:.80} stands twice")
    return dict(pairs)


def runtime_setting(default: Any, description: str, **limits: Any) -> Any:
    """A field that decides how fast or how loud a stage runs, never what it writes."""
    return Field(default, description=description, json_schema_extra={"runtime": True}, **limits)


class Config(Strict):
    """The settings of a stage. Flags, TOML keys, help texts and manifests all come from these fields."""

    def key_settings(self) -> dict[str, Any]:
        """The settings that can change the output, as plain JSON values."""
        return _without_runtime(self)


def key_values(values: Any, kind: Any) -> Any:
    """`key_settings` of a config that is plain JSON, perhaps of an older form of the class `kind`."""
    models = [each for each in (kind, *get_args(kind)) if isinstance(each, type) and issubclass(each, BaseModel)]
    if not models or not isinstance(values, dict):
        return values
    fields = {name: field for name, field in models[0].model_fields.items() if name in values}
    runtime = {name for name, field in fields.items() if _is_runtime(field)}
    return {
        name: key_values(value, fields[name].annotation if name in fields else None)
        for name, value in values.items()
        if name not in runtime
    }


def _is_runtime(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("runtime"))


def _without_runtime(model: BaseModel) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, field in type(model).model_fields.items():
        if _is_runtime(field):
            continue
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            kept[name] = _without_runtime(value)
        else:
            kept[name] = json.loads(json.dumps(value, default=list))
    return kept


def explain(error: ValidationError, where: str) -> str:
    """Turn pydantic's report into one line a user can act on: place, key, problem, value found."""
    return on_one_line(f"{where}: " + "; ".join(_problems(error)))


def _problems(error: ValidationError) -> Iterator[str]:
    found = [each for each in error.errors(include_url=False) if each["type"] != "default_factory_not_called"]
    for problem in found[:4]:  # what was left out follows from others, which are at fault
        key = _short(".".join(str(part) for part in problem["loc"])) or "settings"
        if problem["type"] == "extra_forbidden":
            yield f"unknown key `{key}`"
        elif problem["type"] == "missing":
            yield f"`{key}` is missing"
        elif problem["type"] == "value_error":
            message = _short(problem["msg"].removeprefix("Value error, "), 400)
            yield message if key == "settings" else f"`{key}`: {message}"
        else:
            message = _short(problem["msg"], 400)
            yield f"`{key}`: {message[0].lower()}{message[1:]}, found {problem['input']!r:.80}"


def _short(text: str, longest: int = 120) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"


def validated(model: type[Config], values: Mapping[str, Any], where: str) -> Any:
    """Build a config from plain values; a mistake becomes a one-line UsageFailure that names `where`."""
    try:
        return model.from_mapping(values)
    except ValidationError as error:
        raise UsageFailure(explain(error, where)) from error
