import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from schemas.failures import IntegrityFailure, UsageFailure
from schemas.strict import Config, Strict, runtime_setting, validated


class Inner(Config):
    depth: int = Field(2, gt=0, description="Depth.")


class Toy(Config):
    width: int = Field(4, gt=0, description="Width.")
    rate: float = Field(0.5, description="Rate.")
    names: tuple[str, ...] = Field((), description="Names.")
    kind: Literal["a", "b"] = Field("a", description="Kind.")
    inner: Inner = Field(Inner(), description="Inner.")
    workers: int = runtime_setting(1, "Workers.", gt=0)


def test_plain_values_make_a_config() -> None:
    values = {"width": 8, "rate": 1, "names": ["x", "y"], "inner": {"depth": 3}}
    assert Toy.from_mapping(values) == Toy(width=8, rate=1.0, names=("x", "y"), inner=Inner(depth=3))


@given(width=st.integers(1, 10**9), rate=st.floats(allow_nan=False, allow_infinity=False), names=st.lists(st.text()))
def test_a_config_survives_json(width: int, rate: float, names: list[str]) -> None:
    try:
        toy = Toy(width=width, rate=rate, names=tuple(names))
    except ValidationError:  # half a surrogate pair is no string to pydantic
        assert any("\ud800" <= character <= "\udfff" for name in names for character in name)
        return
    assert Toy.from_json(toy.model_dump_json()) == toy


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"width": "8"}, "`width`: input should be a valid integer, found '8'"),
        ({"width": True}, "`width`: input should be a valid integer, found True"),
        ({"width": 0}, "`width`: input should be greater than 0, found 0"),
        ({"widht": 8}, "unknown key `widht`"),
        ({"inner": {"depht": 8}}, "unknown key `inner.depht`"),
        ({"kind": "c"}, "`kind`: input should be 'a' or 'b', found 'c'"),
        ({"rate": float("nan")}, "`rate`: input should be a finite number"),
        ({"rate": float("inf")}, "`rate`: input should be a finite number"),
    ],
)
def test_a_mistake_is_one_line_with_place_key_and_value(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageFailure) as failure:
        validated(Toy, values, "cpipe.toml [toy]")
    assert str(failure.value).startswith(f"cpipe.toml [toy]: {expected}")
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("text", ['{"width": 1, "width": 2}', '{"inner": {"depth": 1, "depth": 1}}'])
def test_a_key_that_stands_twice_is_refused(text: str) -> None:
    with pytest.raises(IntegrityFailure, match=r"key '(width|depth)' stands twice"):
        Toy.from_json(text)


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe", "[" * 100_000, '{"width": ' + "9" * 5000 + "}"])
def test_what_is_not_json_is_an_integrity_failure(text: str | bytes) -> None:
    with pytest.raises(IntegrityFailure, match=r"not valid JSON|nested too deeply"):
        Toy.from_json(text)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Toy().width = 5  # type: ignore[misc]


def test_defaults_are_validated_too() -> None:
    class Wrong(Strict):
        width: int = Field(-1, gt=0)

    with pytest.raises(ValidationError):
        Wrong()


def test_runtime_settings_stay_out_of_the_key() -> None:
    settings = Toy(workers=8, names=("x",)).key_settings()
    assert settings == {"width": 4, "rate": 0.5, "names": ["x"], "kind": "a", "inner": {"depth": 2}}
    assert json.loads(json.dumps(settings)) == settings
