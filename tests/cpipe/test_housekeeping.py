import json
import random
import shutil

import pytest


def test_verify_of_a_whole_run_says_so(cpipe, piped_run):
    result = cpipe("verify", piped_run)
    assert result.exit_code == 0, result.stderr
    assert "experts/002" in result.stdout and ", 0 problems" in result.stdout
    found = json.loads(cpipe("verify", piped_run, "--json").stdout)
    assert found["problems"] == [] and found["files"] > 30 and found["bytes"] > 100_000
    assert {"folder": "experts", "files": 0, "bytes": 0} in found["folders"]


def test_verify_names_what_is_wrong_and_leaves_with_4(cpipe, piped_run, copied_run, line):
    run_dir = copied_run(piped_run)
    path = run_dir / "experts/001/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 16
    path.write_bytes(content)
    (run_dir / "seed/extra.bin").write_bytes(b"x")
    result = cpipe("verify", run_dir)
    assert result.exit_code == 4
    assert f"{path} was changed after it was written" in line(result) and "; and 1 more" in line(result)
    assert f"changed: {path} was changed" in result.stdout and f"extra: {run_dir}/seed/extra.bin" in result.stdout
    result = cpipe("verify", run_dir, "--json")
    assert result.exit_code == 4
    assert [entry["path"] for entry in json.loads(result.stdout)["problems"]] == [
        "experts/001/model.safetensors", "seed/extra.bin",
    ]  # fmt: skip
    assert cpipe("verify", run_dir, "--sizes-only").stdout.count("changed") == 0


def test_clean_says_what_it_freed(cpipe, piped_run, copied_run, line):
    run_dir = copied_run(piped_run)
    (run_dir / "seed/checkpoints").mkdir()
    (run_dir / "seed/checkpoints/step-1.json").write_bytes(b"x" * 1234)
    (run_dir / ".survey.json").write_bytes(b"x" * 56)
    size = 1290
    dry, wet = cpipe("clean", run_dir, "--dry-run", "--json"), cpipe("clean", run_dir)
    found = json.loads(dry.stdout)
    assert (found["dry_run"], found["bytes"]) == (True, size)
    assert [entry["path"] for entry in found["removed"]] == ["seed/checkpoints", ".survey.json"]
    assert f"{run_dir}/seed/checkpoints  1,234 bytes, left by a stage that is finished\n" in wet.stdout
    assert wet.stdout.endswith(f"1,290 bytes freed in {run_dir}\n")
    assert cpipe("clean", run_dir).stdout == f"0 bytes freed in {run_dir}\n"
    assert cpipe("verify", run_dir).exit_code == 0


def test_report_says_where_it_is_and_keeps_its_samples(cpipe, piped_run, copied_run):
    run_dir = copied_run(piped_run)
    result = cpipe("report", run_dir, "--prompt", "the <b>oven")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{run_dir}/reports/report.html\n"
    samples = json.loads((run_dir / "reports/samples.json").read_text())["samples"]
    assert [sample["model"] for sample in samples] == ["seed", "cbtm", "central", "central-calm"]
    text = cpipe("generate", run_dir, "--model", "cbtm", "--prompt", "the <b>oven", "--max-tokens", "60").stdout
    assert (samples[1]["text"] + "\n").replace("\r\n", "\n") == text  # as click's runner has it
    first = (run_dir / "reports/report.html").read_bytes()
    assert b"<b>the &lt;b&gt;oven</b>" in first
    assert cpipe("report", run_dir).exit_code == 0
    assert (run_dir / "reports/report.html").read_bytes() == first
    assert cpipe("verify", run_dir).exit_code == 0
    assert cpipe("status", run_dir).exit_code == 0


@pytest.fixture(scope="module")
def added_run(cpipe, piped_run, tmp_path_factory):
    """`piped_run` with an expert added later, for the domain `med-icine`. Read-only: copy it before writing."""
    folder = tmp_path_factory.mktemp("added")
    rows = [{"id": str(number), "text": "fever dose pulse nurse ward " * 12} for number in range(9)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir = shutil.copytree(piped_run, folder / "run")
    result = cpipe("train-experts", run_dir, folder / "text.jsonl", "--add", "med-icine")
    assert result.exit_code == 0, result.stderr
    return run_dir


def test_status_lists_what_was_added_later(cpipe, added_run, copied_run):
    entries = {each["folder"]: each for each in json.loads(cpipe("status", added_run, "--json").stdout)["stages"]}
    assert entries["added/med-icine"]["state"] == "finished" and entries["added/med-icine"]["stage"] == "train-experts"
    assert not any(folder.startswith(("experts/", "gates/")) for folder in entries)
    assert "added/med-icine" in cpipe("status", added_run).stdout
    told = cpipe("status", added_run, "--watch").stdout.splitlines()
    assert sum(line.endswith("train-experts added/med-icine: finished") for line in told) == 1
    run_dir = copied_run(added_run)
    (run_dir / "added/med-icine/manifest.json").unlink()
    states = {each["folder"]: each["state"] for each in json.loads(cpipe("status", run_dir, "--json").stdout)["stages"]}
    assert states["added/med-icine"] == "begun"


def test_the_seconds_of_gates_are_those_of_each_experts_too(cpipe, piped_run):
    entries = {each["folder"]: each for each in json.loads(cpipe("status", piped_run, "--json").stdout)["stages"]}
    paths = [*piped_run.glob("gates/**/manifest.json")]
    seconds = [json.loads(path.read_bytes())["environment"]["seconds"] for path in paths]
    assert len(seconds) == 6 and entries["gates"]["seconds"] == pytest.approx(sum(seconds), abs=0.01)


def test_verify_looks_at_what_was_added_later(cpipe, added_run, copied_run):
    run_dir = copied_run(added_run)
    found = json.loads(cpipe("verify", run_dir, "--json").stdout)
    assert "added/med-icine" in [each["folder"] for each in found["folders"]]
    # The gates were made from the experts there were.
    assert {each["fault"] for each in found["problems"]} == {"stale"}
    assert not any(each["path"].startswith(("added", "experts")) for each in found["problems"])
    path = run_dir / "added/med-icine/centroid.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    found = json.loads(cpipe("verify", run_dir, "--json").stdout)
    told = {each["path"]: each["message"] for each in found["problems"] if each["fault"] == "changed"}
    assert told.keys() == {"added/med-icine/centroid.safetensors"}
    assert "run `cpipe train-experts --add med-icine TEXT` with --force" in told[path.relative_to(run_dir).as_posix()]


def test_the_report_shows_what_was_added_later(cpipe, added_run, copied_run):
    run_dir = copied_run(added_run)
    assert cpipe("report", run_dir).exit_code == 0
    page = (run_dir / "reports/report.html").read_text()
    assert "added/med-icine" in page and "added/med-icine was made from another" not in page


def test_clean_knows_what_was_added_later(cpipe, added_run, copied_run):
    run_dir = copied_run(added_run)
    (run_dir / "added/med-icine/parts").mkdir()
    (run_dir / "added/med-icine/parts/00000.arrow").write_bytes(b"x" * 7)
    for name in (".added-med-icine.replaced", ".gates-independent-001.replaced", ".gates-module-joint.replaced"):
        (run_dir / name).mkdir()
        (run_dir / name / "a").write_bytes(b"x")
    removed = {each["path"]: each["bytes"] for each in json.loads(cpipe("clean", run_dir, "--json").stdout)["removed"]}
    removed.pop(".survey.json", None)
    assert removed == {
        "added/med-icine/parts": 7, ".added-med-icine.replaced": 1, ".gates-independent-001.replaced": 1,
    }  # fmt: skip
    assert (run_dir / ".gates-module-joint.replaced").is_dir()  # its new one is not there
    assert (run_dir / "experts/003/manifest.json").is_file()


def test_a_report_of_nothing_is_one_line(cpipe, tmp_path, line):
    result = cpipe("report", tmp_path)
    assert result.exit_code == 2 and "is finished yet" in line(result)
    result = cpipe("report", tmp_path, "--prompt", "x")
    assert result.exit_code == 2 and "run `cpipe tokenize" in line(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["verify", "clean", "report"])
def test_nothing_is_done_to_a_run_that_is_not_there(cpipe, tmp_path, line, command):
    result = cpipe(command, tmp_path / "nowhere")
    assert result.exit_code == 2 and "no run at" in line(result)
    assert not (tmp_path / "nowhere").exists()


def test_verify_writes_nothing(cpipe, piped_run, copied_run):
    run_dir = copied_run(piped_run)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert cpipe("verify", run_dir).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


VALUES = [None, True, 0, -1, 10**400, 1e308, -1e308, "", "x" * 5000, "../..", "\0", {}, [[]], {"": 1}, [{}], "tokens"]


def places(value, path=()):
    """The way to every value in a piece of JSON."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.mark.parametrize(
    "command", [["verify", "--sizes-only"], ["report"], ["clean", "--dry-run"], ["run", "--dry-run"]]
)
def test_no_manifest_however_it_was_changed_ends_in_a_traceback(cpipe, piped_run, copied_run, line, command):
    run_dir = copied_run(piped_run)
    draw = random.Random(command[0])
    paths = sorted(run_dir.rglob("manifest.json"))
    refused = 0
    for _ in range(40):
        path = draw.choice(paths)
        before = path.read_bytes()
        content = json.loads(before)
        *way, last = draw.choice(list(places(content)))
        inner = content
        for key in way:
            inner = inner[key]
        inner[last] = draw.choice(VALUES)
        path.write_text(json.dumps(content))
        result = cpipe(command[0], run_dir, *command[1:])
        assert result.exit_code in (0, 2, 4), (path, way, last, inner[last], result.exception)
        if result.exit_code:
            refused += 1
            assert line(result)
        path.write_bytes(before)
    assert refused
