"""Every config, manifest and record there is, found by itself, against JSON of all kinds: a value, or one line."""

import importlib
import json
import pkgutil
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import schemas
import stages
from schemas.failures import IntegrityFailure, UsageFailure
from schemas.manifest import Manifest
from schemas.strict import Config, Strict, explain, validated

LONGEST = 2000  # characters of one line about what is wrong


def below(kind: type[Strict]) -> Iterator[type[Strict]]:
    for child in kind.__subclasses__():
        yield child
        yield from below(child)


def every_class() -> list[type[Strict]]:
    for package in (schemas, stages):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found = {kind for kind in below(Strict) if kind.__module__.split(".")[0] in ("schemas", "stages")}
    return sorted(found - {Config, Manifest}, key=lambda kind: (kind.__module__, kind.__name__))


CLASSES = every_class()

HOSTILE = st.sampled_from(
    [
        None, True, -1, 0, 10**30, -(10**400), 2**63, 1e308, -0.0, float("nan"), float("inf"), "", "\0", "a\nb",
        "\x1b[2J", "\ud800", "../x", "/etc/passwd", "a/../../b", "C:\\x", "x" * 3000, "sha256:" + "0" * 64, "٣", [], {},
        [[]], [None], {"": None}, {"a\nb": 1}, {"\0": {}}, {"x" * 3000: 1}, "cpipe.train-seed/1", "-", "$(id)", "NaN",
    ]
)  # fmt: skip
TEXT = st.text(st.characters(), max_size=8)  # half surrogate pairs too
SCALARS = st.one_of(HOSTILE, st.integers(), st.floats(), TEXT)
ANY = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=8,
)


def text_of(value: Any) -> str:
    return json.dumps(value)  # NaN and Infinity as such, surrogates escaped


@cache
def alike(kind: type[Strict]) -> st.SearchStrategy[Any]:
    """JSON of the form that the class's own schema describes, more or less."""
    schema = kind.model_json_schema(by_alias=True)
    defined = schema.get("$defs", {})

    def values(part: dict[str, Any]) -> st.SearchStrategy[Any]:
        if "$ref" in part:
            return st.deferred(lambda: values(defined[part["$ref"].rsplit("/", 1)[-1]]))
        if "anyOf" in part:
            return st.one_of([values(one) for one in part["anyOf"]])
        if "const" in part:
            return st.just(part["const"])
        if "enum" in part:
            return st.sampled_from(part["enum"])
        return FORMS.get(part.get("type", ""), lambda _part, _values: ANY)(part, values)

    return values(schema)


def number(part: dict[str, Any], _: Any) -> st.SearchStrategy[Any]:
    low = part.get("minimum", part.get("exclusiveMinimum", -5) + (1 if part["type"] == "integer" else 0.001))
    high = max(low, part.get("maximum", low + 5))
    return st.integers(low, min(high, low + 5)) if part["type"] == "integer" else st.floats(low, min(high, low + 5))


def string(part: dict[str, Any], _: Any) -> st.SearchStrategy[Any]:
    return st.from_regex(part["pattern"], fullmatch=True) if "pattern" in part else st.sampled_from(["a", "b/c.d"])


def array(part: dict[str, Any], values: Any) -> st.SearchStrategy[Any]:
    if "prefixItems" in part:
        return st.tuples(*map(values, part["prefixItems"])).map(list)
    return st.lists(values(part.get("items", {})), min_size=part.get("minItems", 0), max_size=2)


def table(part: dict[str, Any], values: Any) -> st.SearchStrategy[Any]:
    named = {name: values(one) for name, one in part.get("properties", {}).items()}
    if not named:
        return st.dictionaries(TEXT, values(part.get("additionalProperties") or {}), max_size=2)
    needed = {name: one for name, one in named.items() if name in part.get("required", ())}
    return st.fixed_dictionaries(needed, optional={name: one for name, one in named.items() if name not in needed})


FORMS = {"integer": number, "number": number, "string": string, "array": array, "object": table}
FORMS |= {"boolean": lambda _part, _values: st.booleans(), "null": lambda _part, _values: st.none()}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@st.composite
def mutated(draw: Any, kind: type[Strict]) -> str:
    """Text of the right form with something wrong in it."""
    value = draw(alike(kind))
    place = draw(st.sampled_from(sorted(places(value), key=len)))
    how = draw(
        st.sampled_from(["as it is", "other value", "one more key", "key twice", "cut", "deep", "changed character"])
    )
    if how == "other value":
        value = replaced(value, place, draw(ANY))
    elif how == "deep":
        return text_of(replaced(value, place, "HERE")).replace('"HERE"', "[" * 3000 + "]" * 3000)
    elif how == "one more key" and isinstance(value, dict):
        value = {**value, draw(TEXT): draw(ANY)}
    text = text_of(value)
    if how == "key twice" and isinstance(value, dict) and value:
        name = draw(st.sampled_from(sorted(value)))
        return text[:-1] + f", {json.dumps(name)}: {json.dumps(value[name])}}}"
    if how == "cut":
        return text[: draw(st.integers(0, len(text)))]
    if how == "changed character":
        index = draw(st.integers(0, len(text) - 1))
        return text[:index] + draw(st.characters(exclude_categories=["Cs"])) + text[index + 1 :]
    return text


def is_one_line(message: str) -> bool:
    """So that a terminal shows it as one, and nothing else."""
    return message.isprintable() and 0 < len(message) <= LONGEST


def check(kind: type[Strict], text: str | bytes) -> bool:
    """Whether the class takes the text. What it takes it writes and reads again; what it refuses it says in a line."""
    try:
        found = kind.from_json(text)
    except IntegrityFailure as failure:
        assert is_one_line(str(failure)), str(failure)[:500]
        return False
    except ValidationError as error:
        assert is_one_line(explain(error, "a file")), explain(error, "a file")[:500]
        return False
    again = kind.from_json(found.model_dump_json(by_alias=True))
    assert again == found
    return True


def examples(number: int) -> Any:
    """Not made smaller where one fails: that takes minutes, and the line that is wrong says enough."""
    phases = (Phase.explicit, Phase.generate)
    return settings(max_examples=number, deadline=None, database=None, phases=phases, suppress_health_check=HealthCheck)


def test_the_classes_are_found() -> None:
    names = {kind.__name__ for kind in CLASSES}
    assert {"TokenizeConfig", "SeedManifest", "FileRef", "Descriptor", "PeftConfig", "Segment", "SlurmConfig"} <= names
    assert len(CLASSES) > 60


def test_the_forms_drawn_are_mostly_taken() -> None:
    """Else what is changed in them would be rubbish to begin with."""
    taken: list[bool] = []

    @examples(100)
    @given(st.sampled_from(CLASSES).flatmap(lambda kind: st.tuples(st.just(kind), alike(kind))))
    def draw(drawn: tuple[type[Strict], Any]) -> None:
        taken.append(check(drawn[0], text_of(drawn[1])))

    draw()
    assert sum(taken) > 0.4 * len(taken)


@examples(20)
@given(st.one_of(ANY.map(text_of), st.binary(max_size=40), st.text(max_size=40)))
def test_any_json_is_a_value_or_one_line(text: str | bytes) -> None:
    for kind in CLASSES:
        check(kind, text)


@examples(150)
@given(st.sampled_from(CLASSES).flatmap(lambda kind: st.tuples(st.just(kind), mutated(kind))))
def test_nearly_right_json_is_a_value_or_one_line(drawn: tuple[type[Strict], str]) -> None:
    check(*drawn)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_much_nearly_right_json_is_a_value_or_one_line(kind: type[Strict]) -> None:
    @examples(300)
    @given(mutated(kind))
    def draw(text: str) -> None:
        check(kind, text)

    draw()


CONFIGS = [kind for kind in CLASSES if issubclass(kind, Config)]


@examples(10)
@given(values=st.dictionaries(TEXT, ANY, max_size=4), draw=st.randoms())
def test_any_settings_are_a_config_or_one_line(values: dict[str, Any], draw: random.Random) -> None:
    for kind in CONFIGS:
        named = {draw.choice([*kind.model_fields, name]): value for name, value in values.items()}
        try:
            validated(kind, named, "cpipe.toml [x]")
        except UsageFailure as failure:
            assert is_one_line(str(failure)), str(failure)[:500]


HUGE = {
    "deep arrays": b"[" * 2_000_000,
    "deep objects": b'{"a":' * 500_000,
    "a long number": b'{"a": ' + b"9" * 2_000_000 + b"}",
    "a long string": b'{"schema": "' + b"z" * 2_000_000 + b'"}',
    "a long key": b'{"' + b"k" * 2_000_000 + b'": 1}',
    "a long key twice": b'{"' + b"k" * 500_000 + b'": 1, "' + b"k" * 500_000 + b'": 2}',
    "many keys": json.dumps(dict.fromkeys(map(str, range(20_000)), 0)).encode(),
    "many values": b"[" + b"0," * 200_000 + b"0]",
}


@pytest.mark.parametrize("name", HUGE)
def test_what_is_huge_is_one_short_line(name: str) -> None:
    for kind in (CLASSES[0], Config, Manifest):
        assert not check(kind, HUGE[name])
