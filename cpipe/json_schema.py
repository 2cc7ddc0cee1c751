"""JSON Schema of what people and programs exchange with cpipe: tables of settings, and manifests.

- settings are described as `cpipe.toml` has them, side by side; a manifest holds them nested, as its own schema says
- where a command writes several kinds of manifest (an expert's, and that of all experts) any of them is accepted
"""

from copy import copy
from typing import Any

from pydantic import create_model
from pydantic.json_schema import models_json_schema

from cpipe.settings import leaves
from schemas.run_manifests import manifest_types
from schemas.strict import Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def settings_schema(command: str, config: type[Config]) -> dict[str, Any]:
    """What a table of this command in `cpipe.toml` may hold."""
    title = {"$schema": DIALECT, "title": f"[{command}] of cpipe.toml"}
    if command == "slurm":  # no flags are made of it, so it has tables within the table
        return config.model_json_schema() | title
    fields: dict[str, Any] = {}
    for leaf in leaves(config):
        field = copy(leaf.field)
        field.default = leaf.default
        fields[leaf.name] = (leaf.field.annotation, field)
    flat = create_model(config.__name__, __base__=Config, __doc__=config.__doc__, **fields)
    return flat.model_json_schema() | title


def manifest_schema(command: str) -> dict[str, Any]:
    """What `manifest.json` in a folder of this command holds."""
    kinds = [kind for kind in manifest_types() if kind.command == command]
    names, content = models_json_schema([(kind, "validation") for kind in kinds], by_alias=True)
    for kind in kinds:
        described = content["$defs"][_name(names[kind, "validation"])]
        described["properties"]["schema"]["const"] = kind.expected_schema()
    accepted: list[Any] = [names[kind, "validation"] for kind in kinds]
    return {"$schema": DIALECT, "title": f"manifest.json of cpipe {command}", "anyOf": accepted, **content}


def _name(reference: dict[str, Any]) -> str:
    return str(reference["$ref"]).rsplit("/", 1)[-1]
