"""The settings file that `cpipe init` writes: every setting of every command, commented out, with its default.

- made from the schemas, like flags and help: there is no second list
- a sentence begins with `# ` and a setting with `#`, so that taking away every `#` before a setting gives a file that
  says what the defaults say
"""

import json
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, Literal

from cpipe.pipeline import STAGES
from cpipe.settings import Leaf, leaves
from schemas.generate_text import GenerateConfig
from schemas.strict import Config

WIDTH = 118
HEAD = """\
# The settings of this run: a table for each command. Each setting stands here with its default: take away the `#`
# before it and change it. Flags go over this file. `cpipe run` takes the tables in this order.
# Settings marked * are not compared when a finished stage is asked for again: speed, logs, where files lie.
"""
SLURM = """\
# What the jobs of `cpipe slurm` ask for goes into tables [slurm], [slurm.train-seed] and so on; `cpipe schema slurm`
# says what they may hold.
"""


def settings_template() -> str:
    """A `cpipe.toml` in which every setting is commented out."""
    tables = [(stage.command, stage.config, stage.help) for stage in STAGES]
    tables.append(("generate", GenerateConfig, "Continue a prompt with one of the run's models."))
    return "\n".join([HEAD, *(_table(*table) for table in tables), SLURM])


def _table(command: str, config: type[Config], help_text: str) -> str:
    lines = [f"[{command}]", f"# {help_text}"]
    if command == "compose":
        lines.append("# Several compositions: a table [[compose]] for each, every one with a `name` of its own.")
    for leaf in leaves(config):
        lines += ["", *_setting(leaf)]
    return "\n".join([*lines, ""])


def _setting(leaf: Leaf) -> Iterator[str]:
    extra = leaf.field.json_schema_extra
    mark = " *" if isinstance(extra, dict) and extra.get("runtime") else ""
    yield from textwrap.wrap(f"{leaf.field.description}{mark}", WIDTH, initial_indent="# ", subsequent_indent="#   ")
    words = _choices(leaf.field.annotation)
    choices = f"  # of {', '.join(words)}" if words else ""
    if words and len(set(leaf.default or ())) == len(words):
        choices = ""  # all of them stand there already
    if leaf.default is None:  # TOML has no word for it
        yield f"# {leaf.name}: not set ({'one of ' + ', '.join(words) if words else _kind(leaf.field.annotation)})"
    else:
        yield f"#{leaf.name} = {_toml(leaf.default)}{choices}"


def _choices(annotation: Any) -> tuple[str, ...]:
    """The words a setting may take, or a list of them."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    return next((words for part in typing.get_args(annotation) if (words := _choices(part))), ())


def _kind(annotation: Any) -> str:
    """What a setting without a default takes."""
    kinds = {int: "a whole number", float: "a number", bool: "true or false"}
    return next((kinds[part] for part in typing.get_args(annotation) if part in kinds), "a text")


def _toml(value: Any) -> str:
    """A TOML value. JSON's strings, numbers, booleans and lists are TOML's."""
    return json.dumps(value, ensure_ascii=False)
