from typing import Annotated, Literal

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from cpipe.options import flags_of
from schemas.strict import Config


class Inner(Config):
    rate: float = Field(0.5, description="How fast.")
    kind: Literal["slow", "fast"] = Field("slow", description="Which kind.")


class Outer(Config):
    """Every type a setting may have."""

    words: tuple[str, ...] = Field((), description="Words.", json_schema_extra={"argument": True})
    count: int = Field(3, description="How many.")
    maybe: int | None = Field(None, description="Perhaps.")
    text: str = Field("x", description="Any text.")
    open_door: bool = Field(True, description="Open or not.")
    numbers: tuple[int, ...] = Field((1, 2), description="Several.")
    modes: tuple[Literal["a", "b"], ...] = Field(("a", "b"), description="Ways.")
    inner: Inner = Field(Inner(rate=0.25), description="Within.")


Run = Annotated[str, typer.Argument(metavar="RUN")]
Loud = Annotated[bool, typer.Option("--loud")]


@pytest.fixture
def call():
    seen = []
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("x")(flags_of(Outer, lambda *args, **named: seen.append((args, named)), {"loud": Loud}, Run))

    def invoke(*words):
        seen.clear()
        result = CliRunner().invoke(app, list(words))
        return result, (seen[0] if seen else None)

    return invoke


def test_only_what_is_given_is_handed_on(call):
    assert call("run")[1] == (("run", {}), {"loud": False})
    assert call("run", "--loud")[1] == (("run", {}), {"loud": True})


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["--count", "0"], {"count": 0}),
        (["--rate", "0"], {"rate": 0.0}),
        (["--text", ""], {"text": ""}),
        (["--open-door"], {"open_door": True}),
        (["--no-open-door"], {"open_door": False}),
        (["--numbers", "3", "--numbers", "4"], {"numbers": [3, 4]}),
        (["--modes", "b"], {"modes": ["b"]}),
        (["--kind", "fast"], {"kind": "fast"}),
        (["--maybe", "5"], {"maybe": 5}),
        (["one", "two"], {"words": ["one", "two"]}),
    ],
)
def test_a_flag_has_its_settings_type(call, words, flags):
    assert call("run", *words)[1] == (("run", flags), {"loud": False})


@pytest.mark.parametrize(
    "words",
    [["--count", "x"], ["--count", "1.5"], ["--rate", "x"], ["--kind", "medium"], ["--numbers", "a"], ["--none", "1"]],
)
def test_a_value_of_another_type_is_refused(call, words):
    result, seen = call("run", *words)
    assert result.exit_code == 2 and seen is None
    assert words[0] in result.stderr


def test_help_has_every_sentence_and_the_defaults_of_the_stage(call):
    text = " ".join(call("--help")[0].stdout.replace("│", " ").split())
    for sentence in ("How many. Default: 3.", "How fast. Default: 0.25.", "Several. Default: 1, 2.", "Perhaps."):
        assert sentence in text
    assert "Perhaps. Default" not in text


def test_two_settings_of_one_name_are_a_bug():
    class Twice(Config):
        rate: float = Field(0.5, description="Clashes.")
        inner: Inner = Field(Inner(), description="Within.")

    with pytest.raises(TypeError, match="rate"):
        flags_of(Twice, lambda: None, {}, Run)


def test_a_type_without_a_flag_is_a_bug():
    class Odd(Config):
        table: dict[str, int] = Field({}, description="No flag.")

    with pytest.raises(TypeError, match="no flag for a setting of type"):
        flags_of(Odd, lambda: None, {}, Run)
