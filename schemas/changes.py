"""What differs between a finished stage and the one asked for, in words."""

import json
from collections.abc import Iterator, Mapping, Sequence

from schemas.manifest import InputRef
from schemas.strict import Config
from schemas.version import VERSION


def changed_settings(before: Config, now: Config) -> Iterator[str]:
    """The settings that can change the output and do not agree."""
    for name, old, new in differing(before, now):
        yield f"{name} was {old} and is now {new}"


def differing(one: Config, other: Config) -> Iterator[tuple[str, str, str]]:
    """Names and both values, as JSON, of the settings that can change the output and do not agree."""
    first, second = _flat(one.key_settings()), _flat(other.key_settings())
    for name in sorted(first.keys() | second.keys()):
        if first.get(name) != second.get(name):
            yield name, json.dumps(first.get(name)), json.dumps(second.get(name))


def changed_inputs(before: Sequence[InputRef], now: Sequence[InputRef]) -> Iterator[str]:
    """The inputs that do not agree."""
    old, new = ({ref.name: ref.digest for ref in refs} for refs in (before, now))
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield f"its input {name} is no longer given"
        elif name not in old:
            yield f"its input {name} is new"
        elif old[name] != new[name]:
            yield f"its input {name} has changed"
    if old == new and [*old] != [*new]:
        yield "its inputs stand in another order"


def changed_version(versions: Mapping[str, str]) -> Iterator[str]:
    """That another version of cpipe wrote it."""
    if versions.get("cpipe") != VERSION:
        yield f"it was written by cpipe {versions.get('cpipe')}"


def _flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
