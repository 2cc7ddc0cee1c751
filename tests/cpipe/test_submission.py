import json
import sys

import pytest

from cpipe import submission
from cpipe.pipeline import PIPELINE
from schemas.submit_jobs import JobRow


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    """A real Slurm on this machine must not get jobs of tests."""
    monkeypatch.setenv("PATH", "/nowhere")


def test_the_settings_of_the_stages_are_those_of_the_file(tmp_path):
    (tmp_path / "cpipe.toml").write_text(
        "[cluster]\nclusters = 5\n[[compose]]\nsteps = 1\n[[compose]]\nname = 'central-b'\nsteps = 1\n"
        "[slurm]\nshards = 7\n[slurm.train-seed]\nnodes = 2\n"
    )
    config = submission.submission(tmp_path, ["a.txt"], None, None, submit=False)
    assert tuple(config.stages) == PIPELINE
    assert config.stages["cluster"][0].clusters == 5
    assert [one.name for one in config.stages["compose"]] == ["central", "central-b"]
    assert (config.slurm.shards, config.slurm.train_seed.nodes) == (7, 2)
    assert (config.inputs, config.settings_file, config.submit) == (("a.txt",), None, False)
    config = submission.submission(tmp_path, [], "cluster", tmp_path / "cpipe.toml", submit=True)
    assert tuple(config.stages) == ("tokenize", "cluster")
    assert config.settings_file == str(tmp_path / "cpipe.toml")


def test_jobs_start_cpipe_as_it_was_started_here(tmp_path, monkeypatch):
    assert submission._program() == (sys.executable, "-m", "cpipe")
    (tmp_path / "cpipe").touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "cpipe"), "slurm"])
    assert submission._program() == (str(tmp_path / "cpipe"),)


def test_scripts_are_written_and_it_says_how_to_submit_them(cpipe, tmp_path):
    run_dir = tmp_path / "run"
    result = cpipe("slurm", run_dir, "a.txt", "--until", "train-seed")
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in (run_dir / "slurm").glob("*.sh")} == {"tokenize.sh", "cluster.sh", "train-seed.sh"}
    assert f"scripts and logs in {run_dir / 'slurm'}" in result.stdout
    assert "submit them with the same command and --submit" in result.stdout
    result = cpipe("slurm", run_dir, "a.txt", "--until", "tokenize", "--json")
    (row,) = json.loads(result.stdout)
    assert JobRow(**row) == JobRow(job="tokenize", tasks="", number=None, state="to submit")


@pytest.mark.parametrize(
    ("settings", "words", "code", "told"),
    [
        ("[slurm]\ngpu = 1", (), 2, "cpipe.toml [slurm]: unknown key `gpu`"),
        ("[[slurm]]\n[[slurm]]", (), 2, "[slurm] stands 2 times: leave one"),
        ("slurm = 3", (), 2, "[slurm] must be a table of settings"),
        ("[cluster]\ncluster = 1", (), 2, "[cluster]: unknown setting `cluster`; did you mean `clusters`?"),
        ("", ("--until", "clusters"), 2, "--until clusters is no stage; expected one of tokenize, cluster"),
        ("", ("--settings", "none.toml"), 2, "no settings file none.toml"),
        ("", ("--submit",), 2, "there is no `sbatch` here: run this where jobs are submitted"),
    ],
)
def test_a_mistake_is_one_line(cpipe, line, tmp_path, settings, words, code, told):
    (tmp_path / "cpipe.toml").write_text(settings)
    result = cpipe("slurm", tmp_path, "a.txt", *words)
    assert result.exit_code == code
    assert told in line(result)


def test_no_text_is_one_line(cpipe, line, tmp_path):
    result = cpipe("slurm", tmp_path / "run")
    assert result.exit_code == 2
    assert "run has no tokens, and no text to make them of is given: name the files" in line(result)


def test_the_table_of_slurm_is_nothing_to_a_run(cpipe, tmp_path, configs):
    (tmp_path / "cpipe.toml").write_text("[slurm]\nshards = 7\n")
    assert cpipe("cluster", tmp_path).exit_code == 0
    assert len(configs) == 1


def test_status_shows_the_jobs_that_slurm_tells_of(cpipe, tmp_path, monkeypatch):
    from stages import submit_jobs

    jobs = [JobRow(job="experts", tasks="0-2", number=12, state="running")]
    monkeypatch.setattr(submit_jobs, "job_rows", lambda run_dir: jobs)
    shown = cpipe("status", tmp_path).stdout
    assert [part.strip() for part in shown.splitlines()[-2].split("│")[1:-1]] == ["experts", "0-2", "12", "running"]
    assert json.loads(cpipe("status", tmp_path, "--json").stdout)["jobs"] == [jobs[0].model_dump()]
    monkeypatch.setattr(submit_jobs, "job_rows", lambda run_dir: [])
    assert "│ job " not in cpipe("status", tmp_path).stdout
    assert "jobs" not in json.loads(cpipe("status", tmp_path, "--json").stdout)
