import json

import pytest

from cpipe import show
from cpipe.pipeline import STAGES
from schemas.evaluate_models import EvaluateManifest, UsageRow
from schemas.failures import IntegrityFailure


def manifests(run_dir):
    return [stage.manifest.read(run_dir) for stage in STAGES if stage.command != "collect"]


def test_every_stages_manifest_can_be_shown(piped_run, capsys):
    for manifest in manifests(piped_run):
        show.show_manifest(manifest, piped_run, as_json=False)
        out, err = capsys.readouterr()
        assert err == "" and len(out.splitlines()) > 2
        if manifest.command != "evaluate":
            assert out.startswith(f"{manifest.command} finished in {piped_run}")


def test_as_json_it_is_the_manifest(piped_run, capsys):
    for manifest in manifests(piped_run):
        show.show_manifest(manifest, piped_run, as_json=True)
        assert json.loads(capsys.readouterr().out) == manifest.to_json()


def test_the_evaluation_has_a_line_per_model_and_says_where_the_files_are(piped_run, capsys):
    manifest = EvaluateManifest.read(piped_run)
    show.show_evaluation(manifest, piped_run)
    out = capsys.readouterr().out
    for row in manifest.metrics.rows:
        assert any(row.model in line and f"{row.bits_per_byte:.4f}" in line for line in out.splitlines())
    for name in ("table.json", "table.md", "bits_per_byte.png"):
        assert str(piped_run / "reports" / name) in out.splitlines()


def states(run_dir, capsys):
    pairs = [(stage.command, stage.manifest) for stage in STAGES]
    show.show_status(run_dir, pairs, as_json=False)
    table = capsys.readouterr().out
    show.show_status(run_dir, pairs, as_json=True)
    content = json.loads(capsys.readouterr().out)
    assert content["run"] == str(run_dir)
    found = {entry["stage"]: entry["state"] for entry in content["stages"][: len(STAGES)]}
    for command, state in found.items():
        assert any(command in line and state in line for line in table.splitlines())
    assert list(found) == [stage.command for stage in STAGES]
    return found


def test_of_several_processes_only_the_first_prints(piped_run, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    show.show_manifest(EvaluateManifest.read(piped_run), piped_run, as_json=True)
    assert capsys.readouterr().out == ""


def test_status_of_an_empty_run(tmp_path, capsys):
    assert set(states(tmp_path, capsys).values()) == {"not finished"}


def test_status_of_a_finished_run(piped_run, capsys):
    found = states(piped_run, capsys)
    assert found.pop("collect") == "not finished"
    assert set(found.values()) == {"finished"}


def test_status_of_a_run_that_stands_halfway(piped_run, copied_run, capsys):
    run_dir = copied_run(piped_run)
    (run_dir / "experts/manifest.json").unlink()
    (run_dir / "experts/002/manifest.json").unlink()
    (run_dir / "gates/manifest.json").unlink()
    found = states(run_dir, capsys)
    assert found["train-experts"] == "begun (2 members finished)"
    assert found["train-gates"] == "begun (5 members finished)"  # joint, contrastive, and independent of each expert
    assert found["train-seed"] == "finished"


def test_status_shows_what_stages_wrote_beside_their_own_folder(piped_run, capsys):
    show.show_status(piped_run, [(stage.command, stage.manifest) for stage in STAGES], as_json=True)
    folders = {entry["folder"] for entry in json.loads(capsys.readouterr().out)["stages"]}
    assert {path.parent.name for path in piped_run.glob("*/manifest.json")} <= folders
    assert {"dense", "central-alone"} <= folders


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 3, "environment": {}}', '{"schema": "x"}'])
def test_status_names_a_manifest_that_is_none(content, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "manifest.json").write_text(content)
    with pytest.raises(IntegrityFailure, match=r"odd.manifest\.json is no manifest"):
        show.show_status(tmp_path, [], as_json=True)


def test_status_reads_manifests_only(piped_run, copied_run, capsys):
    run_dir = copied_run(piped_run)
    for path in run_dir.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            path.unlink()
    assert states(run_dir, capsys) == states(piped_run, capsys)


def test_columns_that_are_empty_everywhere_are_left_out(capsys):
    show.show_rows("some_rows", (UsageRow(model="a", part="", difference=0.5),))
    out = capsys.readouterr().out
    assert "some rows" in out and "0.5" in out


def test_long_tables_are_cut(capsys):
    show.show_rows("many", tuple(UsageRow(model=f"m{n}", part="x", difference=n / 7) for n in range(100)))
    out = capsys.readouterr().out
    assert "m39" in out and "m40" not in out


def test_samples_are_printed_as_they_are(capsys):
    show.show_samples({"seed": "x [bold]y[/bold] [/z]", "central": "b"})
    assert capsys.readouterr().out == "seed\nx [bold]y[/bold] [/z]\ncentral\nb\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (True, "yes"), (False, "no"), (1234567, "1,234,567"), (0.123456, "0.1235"), (12345.6, "12,346"),
        ({"a": 1, "b": 2.5}, "a 1, b 2.5"), (("x", "y"), "x, y"), ("plain", "plain"), ("z" * 80, "z" * 59 + "…"),
    ],
)  # fmt: skip
def test_values_read_as_people_write_them(value, text):
    assert show.cell(value) == text


def test_brackets_in_a_value_are_no_markup(capsys):
    show.show_rows("terms", (UsageRow(model="[bold]", part="[/x]", difference=1.0),))
    out = capsys.readouterr().out
    assert "[bold]" in out and "[/x]" in out


def test_what_was_fitted_is_said(piped_run, capsys):
    from schemas.evaluate_models import FittedRouting

    manifest = EvaluateManifest.read(piped_run)
    fitted = FittedRouting(
        temperature=0.043, forgetting=0.97, documents=30, tokens=12_345, gain=0.01, forgetting_gain=0.02
    )
    metrics = manifest.metrics.model_copy(update={"fitted": fitted})
    show.show_evaluation(manifest.model_copy(update={"metrics": metrics}), piped_run)
    assert (
        "fitted on 12,345 tokens of 30 other documents: temperature 0.043, forgetting 0.97" in capsys.readouterr().out
    )


def test_a_sweep_has_a_line_per_number_and_says_where_it_lies(piped_run, copied_run, cpipe):
    run_dir = copied_run(piped_run)
    result = cpipe("cluster", run_dir, "--sweep", "2,3", "--dimensions", "4")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"cluster finished in {run_dir}: 2 files in clusters-sweep")
    for name in ("clusters", "spread", "stability"):
        assert name in result.stdout
    result = cpipe("cluster", run_dir, "--sweep", "2,3", "--dimensions", "4", "--json")
    assert [row["clusters"] for row in json.loads(result.stdout)["metrics"]["rows"]] == [2, 3]
    result = cpipe("status", run_dir, "--json")
    folders = {entry["folder"]: entry for entry in json.loads(result.stdout)["stages"]}
    assert folders["clusters-sweep"]["state"] == folders["clusters"]["state"] == "finished"
