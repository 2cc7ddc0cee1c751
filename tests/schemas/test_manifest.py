import json
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field

from schemas import manifest as manifest_module
from schemas.failures import IntegrityFailure, UsageFailure
from schemas.files import write_bytes
from schemas.manifest import Environment, InputRef, Manifest, digest_of_json, key_of
from schemas.strict import Config, Strict, runtime_setting


class ToyConfig(Config):
    width: int = Field(4, description="Width.")
    workers: int = runtime_setting(1, "Workers.")


class ToyMetrics(Strict):
    loss: float = Field(description="Loss.")


class ToyManifest(Manifest):
    command: ClassVar[str] = "toy"
    folder: ClassVar[str] = "toys"

    config: ToyConfig
    metrics: ToyMetrics


INPUT = InputRef(name="text.jsonl", digest=digest_of_json("text"))
ENVIRONMENT = Environment(versions={"cpipe": "9.9"}, machine="m", threads=1, started="2026", seconds=1.0, peak_memory=1)


def written(run_dir: Path, **changes: Any) -> ToyManifest:
    ref = write_bytes(run_dir / "toys" / "a.bin", b"data", run_dir)
    config = changes.pop("config", ToyConfig())
    values = {
        "schema": ToyManifest.expected_schema(),
        "key": key_of(ToyManifest, config, [INPUT]),
        "config": config,
        "inputs": (INPUT,),
        "outputs": (ref,),
        "metrics": ToyMetrics(loss=0.5),
        "environment": ENVIRONMENT,
    }
    manifest = ToyManifest(**(values | changes))
    manifest.write(run_dir)
    return manifest


def edited(run_dir: Path, **changes: Any) -> None:
    path = run_dir / "toys" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(run_dir: Path) -> str:
    with pytest.raises(IntegrityFailure) as failure:
        ToyManifest.read(run_dir)
    assert "\n" not in str(failure.value)
    assert str(run_dir / "toys" / "manifest.json") in str(failure.value)
    return str(failure.value)


def test_a_manifest_comes_back_as_written(tmp_path: Path) -> None:
    manifest = written(tmp_path)
    assert ToyManifest.read(tmp_path) == manifest
    assert json.loads((tmp_path / "toys/manifest.json").read_text())["schema"] == "cpipe.toy/1"
    assert manifest.output("a.bin").check(tmp_path).read_bytes() == b"data"


def test_a_stage_that_has_not_run_is_named_with_its_command(tmp_path: Path) -> None:
    with pytest.raises(UsageFailure, match=r"no toys in .*: run `cpipe toy .*` first"):
        ToyManifest.read(tmp_path)


@pytest.mark.parametrize("environment", [{"versions": {"cpipe": "9.9"}}, {"versions": {}}, {}, [], None, "new form"])
def test_a_newer_manifest_is_refused_with_both_versions(tmp_path: Path, environment: Any) -> None:
    written(tmp_path)
    edited(tmp_path, schema="cpipe.toy/2", environment=environment, something_new=1)
    message = refusal(tmp_path)
    assert "as cpipe.toy/2" in message
    assert "which reads cpipe.toy/1: upgrade cpipe" in message
    assert ("by cpipe 9.9 " in message) == (environment == {"versions": {"cpipe": "9.9"}})


def test_a_newer_manifest_of_the_same_shape_is_refused_too(tmp_path: Path) -> None:
    written(tmp_path)
    edited(tmp_path, schema="cpipe.toy/12")
    assert "as cpipe.toy/12" in refusal(tmp_path)


@pytest.mark.parametrize("schema", ["cpipe.other/1", "cpipe.toy/0", "cpipe.toy/²", "cpipe.toy", "", None, 3, [], {}])
def test_another_stages_manifest_is_refused(tmp_path: Path, schema: Any) -> None:
    written(tmp_path)
    edited(tmp_path, schema=schema)
    assert f"has schema {schema!r}, expected 'cpipe.toy/1'" in refusal(tmp_path)


def test_a_version_of_thousands_of_digits_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    edited(tmp_path, schema=f"cpipe.toy/{'9' * 5000}")
    assert "has schema 'cpipe.toy/999" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", "{", "\x00", "[" * 100_000, '{"a": 1, "a": 2}', '{"schema": "cpipe.toy/1"}']
)
def test_rubbish_is_refused(tmp_path: Path, text: str) -> None:
    written(tmp_path)
    (tmp_path / "toys/manifest.json").write_text(text)
    refusal(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    text = (tmp_path / "toys/manifest.json").read_text()
    for length in range(0, len(text) - 2, 7):
        (tmp_path / "toys/manifest.json").write_text(text[:length])
        refusal(tmp_path)


def test_a_duplicated_key_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    text = (tmp_path / "toys/manifest.json").read_text()
    (tmp_path / "toys/manifest.json").write_text(text.replace('"loss": 0.5', '"loss": 0.5, "loss": 0.1'))
    assert "'loss' stands twice; rerun `cpipe toy` with --force" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"extra": 1}, "unknown key `extra`"),
        ({"key": "sha256:0"}, "`key`"),
        ({"metrics": {"loss": float("nan")}}, "`metrics.loss`"),
        ({"metrics": {"loss": "0.5"}}, "`metrics.loss`"),
        ({"outputs": [{"path": "../a", "size": 1, "digest": INPUT.digest}]}, "leaves the run"),
        ({"outputs": [{"path": "/a", "size": 1, "digest": INPUT.digest}]}, "leaves the run"),
        ({"outputs": [{"path": "a", "size": -1, "digest": INPUT.digest}]}, "`outputs.0.size`"),
    ],
)
def test_wrong_content_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    written(tmp_path)
    edited(tmp_path, **changes)
    assert expected in refusal(tmp_path)


class NewerConfig(Config):
    size: int = Field(4, description="Width, by its new name.")
    workers: int = runtime_setting(1, "Workers.")


class NewerManifest(Manifest):
    """The third form of `ToyManifest`'s: its width has another name, its loss another unit."""

    command: ClassVar[str] = "toy"
    folder: ClassVar[str] = "toys"
    version: ClassVar[int] = 3
    conversions: ClassVar[Any] = {
        1: lambda found: found | {"config": {"size": found["config"]["width"], "workers": found["config"]["workers"]}},
        2: lambda found: found | {"metrics": {"loss": found["metrics"]["loss"] / 2}},
    }

    config: NewerConfig
    metrics: ToyMetrics


class StrictManifest(NewerManifest):
    """The same without a way from the first form to the second."""

    conversions: ClassVar[Any] = {2: NewerManifest.conversions[2]}


def test_an_older_manifest_is_converted_step_by_step_and_the_file_is_not_touched(tmp_path: Path) -> None:
    before = written(tmp_path, config=ToyConfig(width=7, workers=3)).sealed()
    before.write(tmp_path)
    text = (tmp_path / "toys/manifest.json").read_bytes()
    found = NewerManifest.read(tmp_path)
    assert (found.schema_id, found.config, found.metrics.loss) == ("cpipe.toy/3", NewerConfig(size=7, workers=3), 0.25)
    assert (found.key, found.outputs, found.environment) == (before.key, before.outputs, before.environment)
    assert found.content_digest() == before.content_digest()  # what was made from it still is
    assert found.is_as_sealed()
    assert (tmp_path / "toys/manifest.json").read_bytes() == text


def test_only_the_steps_that_are_needed_are_taken(tmp_path: Path) -> None:
    written(tmp_path)
    edited(tmp_path, schema="cpipe.toy/2", config={"size": 5, "workers": 1})
    assert NewerManifest.read(tmp_path).metrics.loss == StrictManifest.read(tmp_path).metrics.loss == 0.25
    edited(tmp_path, schema="cpipe.toy/3")
    assert NewerManifest.read(tmp_path).metrics.loss == 0.5


def test_an_older_manifest_that_cannot_be_converted_is_refused_with_the_command_to_run(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(IntegrityFailure) as failure:
        StrictManifest.read(tmp_path)
    assert str(failure.value) == (
        f"{tmp_path}/toys/manifest.json was written by cpipe 9.9 as cpipe.toy/1; this is cpipe "
        f"{manifest_module.VERSION}, which reads cpipe.toy/3: `cpipe toy {tmp_path} --force` makes it anew"
    )


@pytest.mark.parametrize(("folder", "run"), [("toys/007", "."), ("toys", "."), ("other", ".")])
def test_the_command_names_the_run_wherever_in_it_the_folder_lies(tmp_path: Path, folder: str, run: str) -> None:
    written(tmp_path).write(tmp_path, folder)
    with pytest.raises(IntegrityFailure, match=f"`cpipe toy {tmp_path / run} --force` makes it anew"):
        StrictManifest.read(tmp_path, folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"config": {"width": 5, "workers": 1}}, "was changed after it was written (its digest differs)"),
        ({"metrics": {}, "digest": None}, "has not the form of cpipe.toy/1, which it claims"),
        ({"config": [], "digest": None}, "has not the form of cpipe.toy/1, which it claims"),
        ({"config": {"width": "5", "workers": 1}, "digest": None}, "--force` makes it anew"),
        ({"extra": 1, "digest": None}, "--force` makes it anew"),
    ],
)
def test_an_older_manifest_that_is_not_as_it_was_written_is_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    written(tmp_path).sealed().write(tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(IntegrityFailure, match=re.escape(told)) as failure:
        NewerManifest.read(tmp_path)
    assert "\n" not in str(failure.value) and f"{tmp_path}/toys/manifest.json" in str(failure.value)


def test_a_manifest_knows_when_it_was_changed_and_its_digest_is_no_part_of_its_content(tmp_path: Path) -> None:
    manifest = written(tmp_path)
    sealed = manifest.sealed()
    sealed.write(tmp_path)
    assert ToyManifest.read(tmp_path) == sealed
    assert sealed.content_digest() == manifest.content_digest()
    assert manifest.is_as_sealed() and sealed.is_as_sealed()
    for changes in (
        {"metrics": {"loss": 0.25}}, {"config": {"width": 4, "workers": 2}}, {"outputs": []}, {"inputs": []},
        {"environment": json.loads((tmp_path / "toys/manifest.json").read_text())["environment"] | {"threads": 2}},
    ):  # fmt: skip
        sealed.write(tmp_path)
        edited(tmp_path, **changes)
        assert not ToyManifest.read(tmp_path).is_as_sealed()


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    monkeypatch.setattr(manifest_module, "MAX_BYTES", 100)
    assert "that is no manifest of cpipe" in refusal(tmp_path)


def test_the_content_digest_leaves_out_where_and_how_fast(tmp_path: Path) -> None:
    digest = written(tmp_path).content_digest()
    elsewhere = ENVIRONMENT.model_copy(update={"seconds": 9.0, "machine": "other"})
    assert written(tmp_path, environment=elsewhere, config=ToyConfig(workers=7)).content_digest() == digest
    assert written(tmp_path, config=ToyConfig(width=5)).content_digest() != digest
    assert written(tmp_path, metrics=ToyMetrics(loss=0.6)).content_digest() != digest
    assert ToyManifest.read(tmp_path).as_input().name == "toys"


def test_the_key_depends_on_settings_that_matter_and_on_inputs() -> None:
    key = key_of(ToyManifest, ToyConfig(), [INPUT])
    changed = InputRef(name="text.jsonl", digest=digest_of_json("other"))
    assert key_of(ToyManifest, ToyConfig(workers=9), [INPUT]) == key
    keys = {key_of(ToyManifest, ToyConfig(width=5), [INPUT]), key_of(ToyManifest, ToyConfig(), [changed])}
    assert len(keys | {key, key_of(ToyManifest, ToyConfig(), [])}) == 4


def test_a_run_can_be_moved(tmp_path: Path) -> None:
    manifest = written(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert ToyManifest.read(tmp_path / "there").output("a.bin").check(tmp_path / "there").is_file()
    assert ToyManifest.read(tmp_path / "there").content_digest() == manifest.content_digest()


def test_an_output_that_is_not_listed_is_an_integrity_failure(tmp_path: Path) -> None:
    with pytest.raises(IntegrityFailure, match=r"lists no b\.bin"):
        written(tmp_path).output("b.bin")
