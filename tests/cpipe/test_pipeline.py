import json
import shutil
import time

import pytest

from cpipe.pipeline import BY_COMMAND, PIPELINE, STAGES, TABLES


def files_of(run_dir):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in run_dir.rglob("*")
        if path.is_file() and not {"logs", ".locks", ".survey.json"} & set(path.parts)  # the last: a cache, made late
    }


@pytest.fixture
def begun(piped_run, tmp_path):
    """A run with settings only."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    shutil.copy(piped_run / "cpipe.toml", run_dir)
    return run_dir


def test_the_pipeline_is_every_stage_but_the_demos_collector():
    assert [stage.command for stage in STAGES if stage.command != "collect"] == list(PIPELINE)
    assert set(TABLES) == {*BY_COMMAND, "generate", "slurm"}


def test_a_run_makes_every_stage_and_every_composition(piped_run):
    for command in PIPELINE:
        assert (piped_run / BY_COMMAND[command].manifest.folder / "manifest.json").is_file()
    assert (piped_run / "central-calm/manifest.json").is_file()
    models = json.loads((piped_run / "reports/table.json").read_text())["rows"]
    assert {"composed stitch", "composed calm"} <= {row["model"] for row in models}
    assert not list(piped_run.rglob("checkpoints"))


def test_the_settings_of_each_table_reach_their_stage(piped_run):
    configs = {command: BY_COMMAND[command].manifest.read(piped_run).config for command in PIPELINE}
    assert configs["cluster"].clusters == 3
    assert configs["train-seed"].training.steps == 3
    assert configs["train-gates"].training.steps == 2
    assert configs["train-gates"].training.weight_decay == 0  # the stage's own default, beside what the table gives
    assert configs["compose"].bridge_training.bridge_steps == 2
    assert configs["evaluate"].top_k == (1,)


def test_the_log_of_a_run_lies_in_it(piped_run):
    lines = (piped_run / "logs/run.log").read_text().splitlines()
    told = [line.split(maxsplit=2)[-1] for line in lines]
    assert [text for text in told if text in PIPELINE] == [
        command for command in PIPELINE for _ in range(2 if command == "compose" else 1)
    ]


def test_a_second_run_does_nothing_and_is_quick(cpipe, piped_run, tiny_corpus, copied_run):
    run_dir = copied_run(piped_run)
    before, start = files_of(run_dir), time.perf_counter()
    result = cpipe("run", run_dir, tiny_corpus)
    assert result.exit_code == 0, result.stderr
    assert time.perf_counter() - start < 5
    assert files_of(run_dir) == before


def test_a_second_run_needs_no_text(cpipe, piped_run, copied_run):
    run_dir = copied_run(piped_run)
    before = files_of(run_dir)
    assert cpipe("run", run_dir).exit_code == 0
    assert files_of(run_dir) == before


def test_a_run_that_stopped_goes_on_where_it_was(cpipe, piped_run, copied_run):
    run_dir = copied_run(piped_run)
    whole = files_of(run_dir)
    for folder in ("experts/001", "gates", "central", "reports"):
        shutil.rmtree(run_dir / folder)
    (run_dir / "experts/manifest.json").unlink()
    assert cpipe("run", run_dir).exit_code == 0
    after = files_of(run_dir)
    assert after.keys() == whole.keys()
    for path, (_, content) in after.items():
        if path.name not in ("manifest.json", "metrics.jsonl") and "tfevents" not in path.name:  # they hold times
            assert content == whole[path][1], path
    untouched = run_dir / "seed/model.safetensors", run_dir / "experts/000/model.safetensors"
    assert all(after[path][0] == whole[path][0] for path in untouched)


def test_until_a_stage(cpipe, begun, tiny_corpus):
    result = cpipe("run", begun, tiny_corpus, "--until", "cluster", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["schema"] == "cpipe.cluster/1"
    assert {path.name for path in begun.iterdir() if path.is_dir()} == {"tokens", "clusters", "logs", ".locks"}


def test_until_no_stage_is_one_line(cpipe, begun, tiny_corpus, line):
    result = cpipe("run", begun, tiny_corpus, "--until", "clusters")
    assert result.exit_code == 2
    assert "--until clusters is no stage; expected one of tokenize, cluster, train-seed" in line(result)


def test_a_run_of_no_text_says_so(cpipe, begun, line):
    result = cpipe("run", begun)
    assert result.exit_code == 2
    assert "no text given" in line(result)


def test_a_changed_setting_stops_the_run_at_its_stage(cpipe, piped_run, copied_run, line):
    run_dir = copied_run(piped_run)
    settings = run_dir / "cpipe.toml"
    settings.write_text(settings.read_text().replace("dimensions = 8", "dimensions = 6"))
    result = cpipe("run", run_dir)
    assert result.exit_code == 2
    assert "dimensions was 8 and is now 6: give --force" in line(result)


@pytest.mark.parametrize("command", [*PIPELINE[1:], "generate", "status"])
def test_a_mistyped_run_is_not_made(cpipe, tmp_path, command, line):
    result = cpipe(command, tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "no run at" in line(result) and "cpipe tokenize" in line(result)
    assert not (tmp_path / "nowhere").exists()


@pytest.fixture
def exported(piped_run, cpipe, tmp_path):
    """The seed of `piped_run` as a folder that could be from anywhere."""
    result = cpipe("export", piped_run, tmp_path / "model")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"export finished in {piped_run}: 5 files\n")
    return tmp_path / "model"


def with_settings(run_dir, *lines):
    """Put lines in the place of what stands between [cluster] and [train-experts]."""
    before, last = "dimensions = 8\n", "[train-experts]"
    text = (run_dir / "cpipe.toml").read_text()
    (run_dir / "cpipe.toml").write_text("\n".join([text.split(before)[0] + before, *lines, last + text.split(last)[1]]))


def seed_command(cpipe, run_dir):
    stages = json.loads(cpipe("status", run_dir, "--json").stdout)["stages"]
    (entry,) = [entry for entry in stages if entry["folder"] == "seed"]
    return entry["stage"]


def test_an_import_takes_the_place_of_training_a_seed(piped_run, copied_run, cpipe, exported):
    run_dir = copied_run(piped_run)
    assert seed_command(cpipe, run_dir) == "train-seed"
    result = cpipe("import", run_dir, f"hf:{exported}", "--force")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"import finished in {run_dir}: 4 files in seed\n")
    assert seed_command(cpipe, run_dir) == "import"


def test_a_run_imports_where_the_settings_say_so(piped_run, copied_run, cpipe, line, exported):
    run_dir = copied_run(piped_run)
    with_settings(run_dir, "[import]", f'source = "hf:{exported}"')
    assert "was made by `cpipe train-seed`: give --force" in line(cpipe("run", run_dir, "--until", "train-seed"))
    result = cpipe("run", run_dir, "--until", "train-seed", "--force")
    assert result.exit_code == 0, result.stderr
    assert seed_command(cpipe, run_dir) == "import"
    assert cpipe("run", run_dir, "--until", "train-seed").exit_code == 0


def test_a_seed_imported_by_hand_is_taken_unless_the_settings_train_one(piped_run, copied_run, cpipe, line, exported):
    run_dir = copied_run(piped_run)
    cpipe("import", run_dir, f"hf:{exported}", "--force")
    assert "was made by `cpipe import`: give --force" in line(cpipe("run", run_dir, "--until", "train-seed"))
    with_settings(run_dir)
    before = files_of(run_dir / "seed")
    assert cpipe("run", run_dir, "--until", "train-seed").exit_code == 0
    assert files_of(run_dir / "seed") == before


def test_a_run_has_one_seed(piped_run, copied_run, cpipe, line):
    run_dir = copied_run(piped_run)
    with_settings(run_dir, "[import]", 'source = "hf:there"', "[train-seed]")
    assert "have [import] and [train-seed], and a run has one seed" in line(cpipe("run", run_dir))


@pytest.mark.parametrize("words", [("import",), ("export",), ("import", "s3:x"), ("export", "x", "--model", "central")])
def test_what_is_missing_or_unknown_is_one_line(words, piped_run, cpipe, line):
    command, *rest = words
    result = cpipe(command, piped_run, *rest)
    assert result.exit_code == 2
    assert "expected" in line(result) or "cpipe " in line(result)


def steps(cpipe, run_dir):
    told = json.loads(cpipe("run", run_dir, "--dry-run", "--json").stdout)["steps"]
    return {step["stage"]: (step["state"], "; ".join(step["why"])) for step in told}


def jobs(cpipe, run_dir):
    result = cpipe("slurm", run_dir, "--json")
    assert result.exit_code == 0, result.stderr
    return {job["job"]: job["state"] for job in json.loads(result.stdout)}


@pytest.fixture
def importing_run(piped_run, copied_run, cpipe, exported):
    """A finished run, up to the seed, whose settings import it."""
    run_dir = copied_run(piped_run)
    with_settings(run_dir, "[import]", f'source = "hf:{exported}"')
    shutil.rmtree(run_dir / "seed")
    return run_dir


def test_an_import_to_come_is_foretold_and_made_a_job(importing_run, cpipe):
    assert list(steps(cpipe, importing_run))[:4] == ["tokenize", "cluster", "import", "train-experts"]
    assert steps(cpipe, importing_run)["import"] == ("run", "not finished")
    assert seed_command(cpipe, importing_run) == "train-seed"
    found = jobs(cpipe, importing_run)
    assert "train-seed" not in found
    assert {job for job, state in found.items() if state == "finished"} == {"tokenize", "cluster"}
    script = (importing_run / "slurm/import.sh").read_text()
    assert script.splitlines()[-1].endswith(f" import {importing_run}") and "--signal" not in script


def test_an_imported_seed_is_finished_in_the_forecast_for_slurm_and_in_the_status(importing_run, cpipe, exported):
    assert cpipe("run", importing_run, "--until", "train-seed").exit_code == 0
    assert seed_command(cpipe, importing_run) == "import"
    for lines in (["[import]", f'source = "hf:{exported}"'], ["[import]"], []):  # named, not named, imported by hand
        with_settings(importing_run, *lines)
        found = steps(cpipe, importing_run)
        assert found["import"][0] == "up to date" and "train-seed" not in found
        assert found["train-experts"] == ("again", "its input seed has changed")
        refused = cpipe("slurm", importing_run).stderr
        assert "experts is finished, but its input seed has changed: give --force" in refused
    for folder in ("experts", "dense", "gates", "central", "central-calm", "reports"):
        shutil.rmtree(importing_run / folder)
    assert {job for job, state in jobs(cpipe, importing_run).items() if state == "finished"} == {
        "tokenize", "cluster", "import",
    }  # fmt: skip


def test_an_imported_seed_is_not_what_training_one_asks_for(importing_run, cpipe, line):
    assert cpipe("run", importing_run, "--until", "train-seed").exit_code == 0
    with_settings(importing_run, "[train-seed]", "steps = 3")
    assert steps(cpipe, importing_run)["train-seed"] == ("again", "it was made by `cpipe import`")
    told = "seed is finished, but it was made by `cpipe import`: give --force"
    assert told in line(cpipe("run", importing_run)) and told in line(cpipe("slurm", importing_run))
    assert cpipe("slurm", importing_run, "--force").exit_code == 0
    assert "--force" in (importing_run / "slurm/train-seed.sh").read_text()
    with_settings(importing_run, "[import]", "[train-seed]")
    for words in (["run", "--dry-run"], ["slurm"]):
        assert "a run has one seed: leave one of them" in line(cpipe(words[0], importing_run, *words[1:]))
