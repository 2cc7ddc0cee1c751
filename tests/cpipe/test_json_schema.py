"""What the printed schemas accept, by another implementation of JSON Schema than ours."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cpipe.json_schema import manifest_schema, settings_schema
from cpipe.pipeline import BY_COMMAND, PIPELINE, TABLES
from cpipe.settings import leaves
from schemas.generate_text import GenerateConfig
from schemas.run_manifests import manifest_types
from schemas.submit_jobs import SlurmConfig

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install '.[dev]'")
CONFIGS = {command: stage.config for command, stage in BY_COMMAND.items()} | {"generate": GenerateConfig}


def problems(schema: dict[str, Any], value: Any) -> list[str]:
    jsonschema.Draft202012Validator.check_schema(schema)
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(value)]


def test_the_schema_of_a_manifest_accepts_what_the_stages_wrote(piped_run: Path) -> None:
    seen = set()
    for path in piped_run.rglob("manifest.json"):
        content = json.loads(path.read_bytes())
        command = content["schema"].removeprefix("cpipe.").split("/")[0].removesuffix("-alone")
        assert problems(manifest_schema(command), content) == [], path
        seen.add(command)
    assert seen == set(PIPELINE)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": "cpipe.train-seed/2"}, "cpipe.train-seed/2"),
        ({"extra": 1}, "extra"),
        ({"key": "sha256:0"}, "sha256:0"),
        ({"outputs": 3}, "3"),
        ({"metrics": {}}, "{}"),
    ],
)
def test_and_refuses_what_is_none(piped_run: Path, change: dict[str, Any], told: str) -> None:
    content = json.loads((piped_run / "seed/manifest.json").read_bytes())
    schema = manifest_schema("train-seed")
    assert problems(schema, content) == []
    assert told in " ".join(problems(schema, content | change))


def test_every_kind_of_manifest_has_a_schema_with_its_version() -> None:
    for kind in manifest_types():
        described = manifest_schema(kind.command)["$defs"][kind.__name__]
        assert described["properties"]["schema"]["const"] == kind.expected_schema()
    assert {"ExpertManifest", "ExpertsManifest", "SweepManifest", "CentralAloneManifest", "ShareManifest"} <= {
        kind.__name__ for kind in manifest_types()
    }


@pytest.mark.parametrize("command", CONFIGS)
def test_the_schema_of_a_table_accepts_the_defaults_and_refuses_what_is_no_setting(command: str) -> None:
    schema = settings_schema(command, CONFIGS[command])
    defaults = {leaf.name: leaf.default for leaf in leaves(CONFIGS[command])}
    plain = json.loads(json.dumps({name: value for name, value in defaults.items() if value is not None}))
    assert problems(schema, plain) == problems(schema, {}) == []
    assert list(schema["properties"]) == list(defaults)
    assert {name: entry["default"] for name, entry in schema["properties"].items()} == json.loads(json.dumps(defaults))
    assert problems(schema, {"no_such_setting": 1})
    validator = jsonschema.Draft202012Validator(schema)  # which itself was checked above
    for name, entry in schema["properties"].items():
        assert entry["description"] and not validator.is_valid({name: {"a": "table"}})


def test_the_schema_of_slurms_table_knows_the_tables_in_it() -> None:
    schema = settings_schema("slurm", SlurmConfig)
    assert problems(schema, {"partition": "gpu", "train-seed": {"nodes": 2}, "tokenize": {"at_once": 4}}) == []
    for wrong in ({"tokenize": {"nodes": 2}}, {"train-sed": {}}, {"gpus": -1}):
        assert problems(schema, wrong)
    assert CONFIGS.keys() == set(TABLES) - {"slurm"}


def test_the_schema_of_a_table_accepts_the_settings_of_a_run(piped_run: Path) -> None:
    for command, tables in tomllib.loads((piped_run / "cpipe.toml").read_text()).items():
        for table in tables if isinstance(tables, list) else [tables]:
            assert problems(settings_schema(command, CONFIGS[command]), table) == []
    assert problems(settings_schema("train-seed", CONFIGS["train-seed"]), {"steps": 0})
    assert problems(settings_schema("cluster", CONFIGS["cluster"]), {"tree": "4y4"})


def test_the_command_prints_both_and_knows_what_has_neither(cpipe: Any, line: Any) -> None:
    assert json.loads(cpipe("schema", "cluster").stdout) == settings_schema("cluster", CONFIGS["cluster"])
    assert json.loads(cpipe("schema", "cluster", "--manifest").stdout) == manifest_schema("cluster")
    result = cpipe("schema", "clusters")
    assert result.exit_code == 2 and "clusters is no command with settings; expected one of collect" in line(result)
    result = cpipe("schema", "generate", "--manifest")
    assert result.exit_code == 2 and "generate has no manifest; expected one of collect" in line(result)
