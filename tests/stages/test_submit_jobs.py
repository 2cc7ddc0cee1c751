"""With a Slurm of a few lines: which words sbatch is given, what waits for what, what is left alone.

A real one is in test_slurm_cluster.py.
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from loguru import logger

from cpipe.pipeline import PIPELINE
from schemas.cluster_documents import ClusterConfig
from schemas.compose_model import ComposeConfig
from schemas.evaluate_models import EvaluateConfig
from schemas.failures import IntegrityFailure, ResourceFailure, StaleFailure, UsageFailure
from schemas.submit_jobs import SlurmConfig, SubmitConfig
from schemas.tokenize_text import TokenizeConfig
from schemas.train_experts import ExpertsConfig
from schemas.train_gates import GatesConfig
from schemas.train_seed import SeedConfig
from stages import train_experts
from stages.submit_jobs import AFTER, job_rows, run

# Notes its words and its environment; sbatch counts, the others answer what they were told to.
COMMAND = """#!{python}
import json, os, sys
folder, name = os.path.split(sys.argv[0])
with open(folder + "/calls.jsonl", "a") as file:
    file.write(json.dumps([name, sys.argv[1:], dict(os.environ)]) + "\\n")
if os.path.exists(folder + "/" + name + ".reply"):
    code, _, text = open(folder + "/" + name + ".reply").read().partition("\\n")
    (sys.stderr if int(code) else sys.stdout).write(text)
    sys.exit(int(code))
if name == "sbatch":
    print(100 + sum(json.loads(line)[0] == name for line in open(folder + "/calls.jsonl")), end=";cluster\\n")
if name == "srun":
    os.execvp(sys.argv[-1], sys.argv[-1:]) if sys.argv[-1].endswith("-inner") else None
"""
JOBS = [
    "tokenize-shards", "tokenize", "cluster", "train-seed", "experts", "dense", "train-experts", "gates",
    "train-gates", "compose", "evaluate",
]  # fmt: skip


class FakeSlurm:
    """Slurm's commands on PATH."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("sbatch", "squeue", "scancel", "sacct", "sacctmgr", "srun", "scontrol"):
            (folder / name).write_text(COMMAND.format(python=sys.executable))
            (folder / name).chmod(0o755)

    def says(self, name, text, code=0):
        (self.folder / f"{name}.reply").write_text(f"{code}\n{text}")

    def queue(self, run_dir, **states):
        """What squeue lists: states by job's key, as `_104_2="RUNNING"`, of the jobs in the run's record."""
        names = {key: record["name"] for record in recorded(run_dir) for key in keys(record)}
        self.says("squeue", "".join(f"{key[1:]}|{state}|{names[key[1:]]}\n" for key, state in states.items()))

    def calls(self, name):
        path = self.folder / "calls.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [(words, environment) for called, words, environment in found if called == name]

    def submitted(self, since=0):
        """By job: its number, what it waits for, its tasks."""
        return {job: (number, waits, array) for job, number, waits, array, _ in self._submitted()[since:]}

    def parts(self, job):
        """Of one job, each array that was submitted: number, what it waits for, tasks, where it begins."""
        return [tuple(rest) for name, *rest in self._submitted() if name == job]

    def _submitted(self):
        found = []
        for number, (words, _) in enumerate(self.calls("sbatch"), 101):
            begin = None if words[-1].endswith(".sh") else words[-1]
            script = words[-1] if begin is None else words[-2]
            options = dict(
                word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word
            )
            kinds = dict(kind.split(":", 1) for kind in options.get("dependency", "").split(",") if kind)
            waits = kinds.get("afterok", "").split(":")
            found.append((Path(script).stem, number, [w for w in waits if w], options.get("array"), begin))
        return found

    def dependencies(self, job):
        """Of one job, by array that was submitted: its dependency as sbatch is given it."""
        words = [words for words, _ in self.calls("sbatch") if f"/{job}.sh" in "".join(words)]
        return [next((word.split("=", 1)[1] for word in each if word.startswith("--dep")), "") for each in words]


def recorded(run_dir):
    return json.loads((run_dir / "slurm/jobs.json").read_bytes())["jobs"]


def keys(record):
    return [f"{record['number']}_{task - record['begin']}" for task in record["tasks"]] or [str(record["number"])]


def states(rows):
    return {row.job: row.state for row in rows}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return FakeSlurm(folder)


@pytest.fixture
def config(tiny_corpus, shape, training):
    """Makes a config that agrees with the runs of the session; `[slurm]` as TOML."""

    def make(until="evaluate", slurm="", submit=True, clusters=3, compose=({},), inputs=(str(tiny_corpus),), **changes):
        # A row for each expert, where there are many.
        whole = training if clusters == 3 else training.model_copy(update={"batch_size": clusters})
        stages = {
            "tokenize": (TokenizeConfig(vocab_size=320, valid_fraction=0.15),),
            "cluster": (ClusterConfig(clusters=clusters, dimensions=8),),
            "train-seed": (SeedConfig(model=shape, training=training),),
            "train-experts": (ExpertsConfig(training=whole, dense=changes.pop("dense", True)),),
            "train-gates": (GatesConfig(),),
            "compose": tuple(ComposeConfig(**table) for table in compose),
            "evaluate": (EvaluateConfig(),),
        }
        given = {command: stages[command] for command in PIPELINE[: PIPELINE.index(until) + 1]}
        given |= {command.replace("_", "-"): (change,) for command, change in changes.items()}
        table = SlurmConfig.from_mapping(tomllib.loads(slurm))
        return SubmitConfig(program=("cpipe",), inputs=inputs, stages=given, slurm=table, submit=submit)

    return make


def test_the_stages_are_those_of_the_pipeline(config):
    assert tuple(config().stages) == PIPELINE == tuple(command for command in AFTER if command != "import")


def test_each_job_waits_for_those_it_needs(slurm, config, tmp_path):
    rows = run(config(slurm="shards = 4"), tmp_path / "run")
    found = slurm.submitted()
    assert list(found) == JOBS == [row.job for row in rows]
    number = {job: str(found[job][0]) for job in found}
    assert [row.number for row in rows] == [found[job][0] for job in JOBS]
    waits = {job: after for job, (_, after, _) in found.items()}
    assert waits == {
        "tokenize-shards": [],
        "tokenize": [number["tokenize-shards"]],
        "cluster": [number["tokenize"]],
        "train-seed": [number["tokenize"]],
        "experts": [number["cluster"], number["train-seed"]],
        "dense": [number["cluster"], number["train-seed"]],
        "train-experts": [number["experts"], number["dense"]],
        "gates": [number["train-experts"]],
        "train-gates": [number["train-experts"], number["gates"]],
        "compose": [number["train-gates"]],
        "evaluate": [number["train-experts"], number["compose"]],
    }
    arrays = {job: tasks for job, (_, _, tasks) in found.items() if tasks}
    assert arrays == {"tokenize-shards": "1-4", "experts": "0-2", "gates": "0-2"}


def test_until_a_stage_no_dense_one_shard(slurm, config, tmp_path):
    run(config(until="train-experts", dense=False), tmp_path / "run")
    assert list(slurm.submitted()) == ["tokenize", "cluster", "train-seed", "experts", "train-experts"]


def test_every_further_dense_baseline_is_a_job_of_its_own(slurm, config, training, tmp_path):
    experts = ExpertsConfig(training=training, dense_steps=(20, 30))
    run(config(until="train-experts", train_experts=experts), tmp_path / "run")
    found = slurm.submitted()
    baselines = [job for job in found if job.startswith("dense")]
    assert baselines == ["dense", "dense-20", "dense-30"]
    assert found["train-experts"][1] == [str(found[job][0]) for job in ("experts", *baselines)]
    assert "--expert dense-20" in (tmp_path / "run/slurm/dense-20.sh").read_text()


def test_a_further_dense_baseline_of_finished_experts_is_all_that_is_missing(
    slurm, config, expert_run, copied_run, training
):
    longer = ExpertsConfig(training=training, dense_steps=(20,))
    rows = states(run(config(until="train-experts", train_experts=longer, submit=False), copied_run(expert_run)))
    assert [job for job, state in rows.items() if state == "to submit"] == ["dense-20", "train-experts"]


def test_without_submit_scripts_are_written_and_nothing_is_called(slurm, config, tmp_path):
    rows = run(config(submit=False), tmp_path / "run")
    assert set(states(rows).values()) == {"to submit"}
    assert not (slurm.folder / "calls.jsonl").exists() and not (tmp_path / "run/slurm/jobs.json").exists()
    written = {path.stem for path in (tmp_path / "run/slurm").glob("*.sh")}
    assert written == {job for job in JOBS if job != "tokenize-shards"}
    for path in (tmp_path / "run/slurm").glob("*.sh"):
        subprocess.run(["bash", "-n", path], check=True)


def test_what_is_in_the_queue_is_left_there(slurm, config, tmp_path):
    run_dir = tmp_path / "run"
    run(config(), run_dir)
    jobs = {f"_{key}": "PENDING" for record in recorded(run_dir) for key in keys(record)}
    slurm.queue(run_dir, **jobs)
    before = recorded(run_dir)
    rows = run(config(), run_dir)
    assert len(slurm.calls("sbatch")) == 10 and not slurm.calls("scancel")
    assert recorded(run_dir) == before
    assert {row.state for row in rows} == {"pending"}


def test_a_cancelled_chain_is_submitted_again_from_where_it_broke(slurm, config, tmp_path):
    run_dir = tmp_path / "run"
    run(config(), run_dir)
    first = slurm.submitted()
    seed, cluster = first["train-seed"][0], first["cluster"][0]
    slurm.queue(run_dir, **{f"_{seed}": "CANCELLED", f"_{cluster}": "RUNNING", "_101": "RUNNING"})
    rows = run(config(), run_dir)
    again = slurm.submitted(since=10)
    assert list(again) == [
        "train-seed", "experts", "dense", "train-experts", "gates", "train-gates", "compose", "evaluate",
    ]  # fmt: skip
    assert again["train-seed"][1] == ["101"]
    assert again["experts"][1] == [str(cluster), str(again["train-seed"][0])]
    assert states(rows)["cluster"] == "running" and states(rows)["train-seed"] == "submitted"
    assert [record["number"] for record in recorded(run_dir)] == [101, cluster, *range(111, 119)]


def test_of_an_array_only_what_is_missing_is_submitted_and_waited_for(slurm, config, expert_run, copied_run):
    run_dir = copied_run(expert_run)
    for path in ("experts", "experts/001", "experts/002"):
        (run_dir / path / "manifest.json").unlink()
    run(config(until="train-experts"), run_dir)
    assert slurm.submitted() == {"experts": (101, [], "1-2"), "train-experts": (102, ["101"], None)}
    slurm.queue(run_dir, _101_1="FAILED", _101_2="RUNNING", _102="PENDING")
    run(config(until="train-experts", slurm="[train-experts]\nat_once = 2"), run_dir)
    again = slurm.submitted(since=2)
    assert again == {"experts": (103, [], "1%2"), "train-experts": (104, ["101_2", "103"], None)}
    assert slurm.dependencies("experts") == ["", "afterany:101"]
    assert [words for words, _ in slurm.calls("scancel")] == [["--quiet", "102"]]  # it would have waited for ever
    assert [record["number"] for record in recorded(run_dir)] == [101, 103, 104]


def test_a_job_that_waits_in_vain_is_replaced_and_a_running_one_is_not(slurm, config, tmp_path):
    run_dir = tmp_path / "run"
    run(config(until="train-seed"), run_dir)
    slurm.queue(run_dir, _101="FAILED", _102="RUNNING", _103="PENDING")
    run(config(until="train-seed"), run_dir)
    assert [words for words, _ in slurm.calls("scancel")] == [["--quiet", "103"]]
    assert slurm.submitted(since=3) == {"tokenize": (104, [], None), "train-seed": (105, ["104"], None)}


def test_finished_stages_are_not_submitted(slurm, config, expert_run, copied_run):
    run_dir = copied_run(expert_run)
    rows = run(config(until="train-gates"), run_dir)
    assert slurm.submitted() == {"gates": (101, [], "0-2"), "train-gates": (102, ["101"], None)}
    assert states(rows) == {
        "tokenize": "finished", "cluster": "finished", "train-seed": "finished", "experts": "finished",
        "dense": "finished", "train-experts": "finished", "gates": "submitted",
        "train-gates": "submitted",
    }  # fmt: skip
    assert set(states(run(config(until="train-experts"), run_dir)).values()) == {"finished"}


def test_of_the_gates_only_experts_with_one_missing_are_submitted(slurm, config, full_run, copied_run, training):
    run_dir = copied_run(full_run)
    asked = GatesConfig(training=training.model_copy(update={"steps": 4, "weight_decay": 0.0}))
    assert set(states(run(config(until="train-gates", train_gates=asked), run_dir)).values()) == {"finished"}
    (run_dir / "gates/manifest.json").unlink()
    (run_dir / "gates/independent/001/manifest.json").unlink()
    run(config(until="train-gates", train_gates=asked), run_dir)
    assert slurm.submitted() == {"gates": (101, [], "1"), "train-gates": (102, ["101"], None)}
    both = asked.model_copy(update={"modes": ("mean-activation", "independent", "joint")})
    run(config(until="train-gates", train_gates=both), run_dir)
    assert slurm.submitted(since=2)["gates"] == (103, [], "0-2")  # each has a mode that is not finished


def test_gates_that_all_know_of_all_experts_are_one_job(slurm, config, expert_run, copied_run):
    asked = GatesConfig(modes=("joint", "contrastive"))
    run(config(until="train-gates", train_gates=asked), copied_run(expert_run))
    assert slurm.submitted() == {"train-gates": (101, [], None)}


@pytest.mark.parametrize(("modes", "forced"), [(("independent", "joint"), True), (("independent",), False)])
def test_forced_gates_are_trained_once(slurm, config, full_run, copied_run, training, modes, forced):
    run_dir = copied_run(full_run)
    asked = GatesConfig(training=training.model_copy(update={"steps": 5, "weight_decay": 0.0}), modes=modes)
    run(config(until="train-gates", train_gates=asked, submit=False), run_dir, force=True)
    scripts = {path.stem for path in (run_dir / "slurm").glob("*.sh") if "--force" in path.read_text()}
    assert scripts == ({"gates", "train-gates"} if forced else {"gates"})


def test_an_added_expert_has_tasks_too_and_is_not_added_by_an_array(slurm, config, expert_run, copied_run, training):
    run_dir, text = copied_run(expert_run), expert_run.parent / "added.jsonl"
    text.write_text("".join(f'{{"id": "{n}", "text": "{"fever dose pulse " * 30}"}}\n' for n in range(9)))
    asked = ExpertsConfig(training=training, add="medicine", data=(str(text),))
    with pytest.raises(UsageFailure, match=r"\[train-experts\] adds medicine, which is no array of jobs: run `cpipe "):
        run(config(train_experts=asked), run_dir)
    train_experts.run(asked, run_dir)
    run(config(until="train-gates"), run_dir)
    assert slurm.submitted() == {"gates": (101, [], "0-3"), "train-gates": (102, ["101"], None)}
    assert "#SBATCH --array=0-3\n" in (run_dir / "slurm/experts.sh").read_text()


def test_finished_shards_are_not_submitted(slurm, config, tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "tokens/shares/002-of-003").mkdir(parents=True)
    (run_dir / "tokens/shares/002-of-003/manifest.json").write_text("{}")
    run(config(until="tokenize", slurm="shards = 3"), run_dir)
    assert slurm.submitted()["tokenize-shards"][2] == "1,3"


def test_what_comes_after_a_missing_stage_is_submitted_too(slurm, config, expert_run, copied_run):
    run_dir = copied_run(expert_run)
    (run_dir / "seed/manifest.json").unlink()
    run(config(until="train-experts"), run_dir)
    assert list(slurm.submitted()) == ["train-seed", "experts", "dense", "train-experts"]
    assert slurm.submitted()["experts"] == (102, ["101"], "0-2")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"clusters": 6}, "clusters is finished, but clusters was 3 and is now 6: give --force"),
        ({"tokenize": TokenizeConfig(vocab_size=320)}, "tokens is finished, but valid_fraction was 0.15 and is now"),
    ],
)  # fmt: skip
def test_a_stage_finished_otherwise_is_refused_by_name(slurm, config, expert_run, changes, told):
    with pytest.raises(StaleFailure, match=told):
        run(config(**changes), expert_run)
    assert not slurm.calls("sbatch")


def test_what_holds_the_experts_together_is_written_anew_without_the_dense_one(slurm, config, expert_run, copied_run):
    rows = run(config(until="train-gates", dense=False, submit=False), copied_run(expert_run))
    assert states(rows) == {
        "tokenize": "finished", "cluster": "finished", "train-seed": "finished", "experts": "finished",
        "train-experts": "to submit", "gates": "to submit", "train-gates": "to submit",
    }  # fmt: skip


def test_an_expert_finished_otherwise_is_refused_by_name(slurm, config, expert_run, copied_run, training):
    run_dir = copied_run(expert_run)
    (run_dir / "experts/manifest.json").unlink()
    other = ExpertsConfig(training=training.model_copy(update={"steps": 9}))
    with pytest.raises(StaleFailure, match=r"experts is finished, but training\.steps was 8 and is now 9"):
        run(config(train_experts=other), run_dir)


def test_a_stage_made_of_other_inputs_is_refused_by_name(slurm, config, expert_run, copied_run):
    run_dir = copied_run(expert_run)
    path = run_dir / "seed/manifest.json"
    path.write_text(path.read_text().replace('"parameters": ', '"parameters": 1'))
    with pytest.raises(StaleFailure, match="experts is finished, but its input seed has changed"):
        run(config(), run_dir)


def test_force_repeats_what_is_stale_and_what_follows(slurm, config, expert_run, copied_run, shape, training):
    run_dir = copied_run(expert_run)
    other = SeedConfig(model=shape, training=training.model_copy(update={"steps": 9}))
    run(config(until="train-experts", train_seed=other, submit=False), run_dir, force=True)
    forced = {path.stem for path in (run_dir / "slurm").glob("*.sh") if "--force" in path.read_text()}
    assert forced == {"train-seed", "experts", "dense"}
    run(config(until="train-experts", train_seed=other), run_dir, force=True)
    assert list(slurm.submitted()) == ["train-seed", "experts", "dense", "train-experts"]


def test_tokens_are_taken_as_they_are_where_no_text_is_named(slurm, config, clustered_run, copied_run, tmp_path):
    other = TokenizeConfig(vocab_size=400)
    rows = run(config(until="cluster", inputs=(), tokenize=other), copied_run(clustered_run))
    assert set(states(rows).values()) == {"finished"}
    with pytest.raises(UsageFailure, match=r"no tokens, and no text .* is given: name the files"):
        run(config(inputs=()), tmp_path / "empty")


def test_standard_input_is_no_text_for_a_job(slurm, config, tmp_path):
    with pytest.raises(UsageFailure, match="a job has no standard input: give files"):
        run(config(inputs=("-",)), tmp_path / "run")


def test_a_job_that_does_something_else_is_not_taken_for_ours(slurm, config, tmp_path):
    run_dir = tmp_path / "run"
    run(config(until="tokenize", slurm="shards = 3"), run_dir)
    slurm.queue(run_dir, _101_1="RUNNING")
    with pytest.raises(
        UsageFailure, match=r"job 101_1 \(tokenize-shards\) is running and runs .*: `scancel 101` first"
    ):
        run(config(until="tokenize", slurm="shards = 4"), run_dir)


def test_a_number_used_again_by_another_job_is_not_ours(slurm, config, tmp_path):
    run_dir = tmp_path / "run"
    run(config(until="tokenize"), run_dir)
    slurm.says("squeue", "101|RUNNING|something-else\n")
    run(config(until="tokenize"), run_dir)
    assert len(slurm.calls("sbatch")) == 2


def test_what_squeue_has_forgotten_sacct_may_know(slurm, config, tmp_path):
    run_dir = tmp_path / "run"
    run(config(until="cluster"), run_dir)
    slurm.queue(run_dir, _102="PENDING")
    slurm.says("sacct", "101|CANCELLED by 0|cpipe-tokenize-run\n")
    assert [(row.job, row.number, row.state) for row in job_rows(run_dir)] == [
        ("tokenize", 101, "cancelled"),
        ("cluster", 102, "pending"),
    ]
    slurm.says("sacct", "Slurm accounting storage is disabled\n", code=1)
    assert [row.state for row in job_rows(run_dir)] == ["over", "pending"]


def test_states_of_an_array_are_gathered(slurm, config, tmp_path):
    run_dir = tmp_path / "run"
    run(config(until="tokenize", slurm="shards = 5"), run_dir)
    slurm.queue(run_dir, _101_1="COMPLETED", _101_2="RUNNING", _101_3="RUNNING", _101_5="RUNNING", _101_4="PENDING")
    rows = [(row.tasks, row.state) for row in job_rows(run_dir) if row.job == "tokenize-shards"]
    assert rows == [("1", "completed"), ("2-3,5", "running"), ("4", "pending")]


def test_without_slurm_status_is_silent_and_submitting_is_one_line(config, tmp_path, monkeypatch, slurm):
    run_dir = tmp_path / "run"
    run(config(), run_dir)
    slurm.says("squeue", "slurm_load_jobs error: Unable to contact slurm controller\n", code=1)
    assert job_rows(run_dir) == []
    with pytest.raises(
        ResourceFailure, match=r"cannot ask Slurm for its queue: .*Unable to contact .*: try again later"
    ):
        run(config(), run_dir)
    monkeypatch.setenv("PATH", "/nowhere")
    assert job_rows(run_dir) == []
    with pytest.raises(UsageFailure, match="there is no `sbatch` here: run this where jobs are submitted"):
        run(config(), tmp_path / "other")


def test_when_sbatch_refuses_a_job_those_before_it_are_on_record(slurm, config, tmp_path):
    run_dir = tmp_path / "run"
    run(config(until="tokenize"), run_dir)
    slurm.queue(run_dir, _101="PENDING")
    slurm.says("sbatch", "sbatch: error: x\nsbatch: error: invalid partition specified: gpu\n", code=1)
    with pytest.raises(UsageFailure, match=r"sbatch refused .*cluster\.sh: sbatch: error: invalid partition .*gpu"):
        run(config(), run_dir)
    assert [record["job"] for record in recorded(run_dir)] == ["tokenize"]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"schema": "cpipe.slurm/2"}', '{"schema": "cpipe.slurm/1", "jobs": [{}]}']
)
def test_a_record_that_is_none_is_one_line(slurm, config, tmp_path, content):
    (tmp_path / "run/slurm").mkdir(parents=True)
    (tmp_path / "run/slurm/jobs.json").write_text(content)
    with pytest.raises(IntegrityFailure, match=r"jobs\.json: .*: remove it when none") as failed:
        run(config(), tmp_path / "run")
    assert "\n" not in str(failed.value)


def test_inside_a_job_its_variables_are_not_handed_on(slurm, config, tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_MEM_PER_NODE", "RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    run(config(until="tokenize"), tmp_path / "run")
    ((_, environment),) = slurm.calls("sbatch")
    assert {name for name in environment if name.startswith("SLURM_")} == {"SLURM_CONF"}
    assert not {"RANK", "MASTER_ADDR"} & set(environment)


@pytest.mark.parametrize(
    ("settings", "said", "job", "arrays"),
    [
        ("shards = 1002", "", "tokenize-shards", {("1-1000", None), ("0-1", "1001")}),
        ("shards = 4", "MaxArraySize = 4", "tokenize-shards", {("1-3", None), ("0", "4")}),
        ("", "MaxArraySize = 2", "experts", {("0-1", None), ("0", "2")}),
        ("max_array = 2", "", "experts", {("0-1", None), ("0", "2")}),
        ("max_array = 2", "MaxArraySize = 5", "experts", {("0-2", None)}),
        (
            "",
            "MaxArraySize = 9\nSchedulerParameters = max_array_tasks=1",
            "gates",
            {("0", None), ("0", "1"), ("0", "2")},
        ),
    ],
)
def test_an_array_longer_than_slurm_takes_is_submitted_in_parts(slurm, config, tmp_path, settings, said, job, arrays):
    run_dir = tmp_path / "run"
    slurm.says("scontrol", said)
    rows = run(config(slurm=settings), run_dir)
    parts = slurm.parts(job)
    assert {(array, begin) for _, _, array, begin in parts} == arrays
    after = slurm.submitted()[{"tokenize-shards": "tokenize", "experts": "train-experts", "gates": "train-gates"}[job]][
        1
    ]
    assert {str(number) for number, *_ in parts} <= set(after)
    assert len({tuple(waits) for _, waits, _, _ in parts}) == 1
    assert [row.number for row in rows if row.job == job] == [number for number, *_ in parts]


def test_parts_are_one_job_to_whoever_asks_and_are_found_in_the_queue(slurm, config, expert_run, copied_run):
    run_dir = copied_run(expert_run)
    (run_dir / "experts/manifest.json").unlink()
    for expert in range(3):
        (run_dir / f"experts/00{expert}/manifest.json").unlink()
    slurm.says("scontrol", "MaxArraySize = 2")
    asked = config(until="train-experts")
    rows = run(asked, run_dir)
    assert [(row.job, row.tasks, row.number) for row in rows[3:]] == [
        ("experts", "0-1", 101), ("experts", "2", 102), ("dense", "", None), ("train-experts", "", 103),
    ]  # fmt: skip
    assert slurm.submitted()["train-experts"][1] == ["101", "102"]
    slurm.queue(run_dir, _101_0="COMPLETED", _101_1="RUNNING", _102_0="PENDING", _103="PENDING")
    assert [(row.tasks, row.state) for row in job_rows(run_dir) if row.job == "experts"] == [
        ("0", "completed"), ("1", "running"), ("2", "pending"),
    ]  # fmt: skip
    (run_dir / "experts/000/manifest.json").write_bytes((expert_run / "experts/000/manifest.json").read_bytes())
    run(asked, run_dir)
    slurm.says("scontrol", "MaxArraySize = 1001")  # a change of the limit changes nothing for what waits already
    run(asked, run_dir)
    assert len(slurm.calls("sbatch")) == 3 and not slurm.calls("scancel")
    slurm.queue(run_dir, _101_0="COMPLETED", _101_1="FAILED", _102_0="RUNNING", _103="PENDING")
    run(asked, run_dir)
    assert slurm.parts("experts")[2:] == [(104, [], "1", None)]
    assert slurm.submitted(since=4)["train-experts"][1] == ["102", "104"]
    assert [(one["number"], one["tasks"], one["begin"]) for one in recorded(run_dir) if one["job"] == "experts"] == [
        (102, [2], 2), (104, [1], 0),
    ]  # fmt: skip


def test_parts_of_an_array_that_must_not_run_all_at_once_run_one_after_the_other(slurm, config, tmp_path):
    slurm.says("scontrol", "MaxArraySize = 2")
    run(config(until="train-experts", slurm="[train-experts]\nat_once = 1"), tmp_path / "run")
    first, second = (words for words, _ in slurm.calls("sbatch") if "/experts.sh" in "".join(words))
    assert "--array=0-1%1" in first and "--array=0%1" in second
    assert "--dependency=afterok:102:103" in first and "--dependency=afterok:102:103,afterany:104" in second


def test_parts_that_must_not_run_all_at_once_wait_for_those_of_earlier_commands(slurm, config, expert_run, copied_run):
    run_dir = copied_run(expert_run)
    for path in ("experts", *(f"experts/00{expert}" for expert in range(3))):
        (run_dir / path / "manifest.json").unlink()
    slurm.says("scontrol", "MaxArraySize = 1")
    asked = config(until="train-experts", slurm="[train-experts]\nat_once = 1")
    for most in (1, 2):  # each command submits one part: the second's waits for the first's
        slurm.says("sacctmgr", f"lab|{most}\n")
        run(asked, run_dir)
        slurm.queue(run_dir, _101_0="RUNNING")
    slurm.queue(run_dir, _101_0="RUNNING", _102_0="PENDING")
    slurm.says("sacctmgr", "lab|9\n")
    run(asked, run_dir)
    assert [part[2:] for part in slurm.parts("experts")] == [("0%1", None), ("0%1", "1"), ("0%1", "2")]
    assert slurm.dependencies("experts") == ["", "afterany:101", "afterany:102"]
    assert slurm.submitted()["train-experts"][1] == ["101", "102", "103"]
    slurm.queue(run_dir, _101_0="FAILED", _102_0="FAILED", _103_0="FAILED")
    run(asked, run_dir)
    assert slurm.dependencies("experts")[3:] == [
        "",
        "afterany:105",
        "afterany:106",
    ]  # nothing of it is left to wait for


def test_where_slurm_takes_so_many_jobs_no_more_are_submitted_and_later_the_rest(slurm, config, expert_run, copied_run):
    run_dir = copied_run(expert_run)
    slurm.says("sacctmgr", "lab|4\n")
    slurm.says("squeue", "7|RUNNING|not ours\n")
    asked = config(until="train-gates")
    (run_dir / "experts/manifest.json").unlink()
    for expert in range(3):
        (run_dir / f"experts/00{expert}/manifest.json").unlink()
    rows = run(asked, run_dir)
    assert [(row.job, row.tasks, row.state) for row in rows[3:]] == [
        ("experts", "0-2", "submitted"), ("dense", "", "finished"), ("train-experts", "", "to submit"),
        ("gates", "0-2", "to submit"), ("train-gates", "", "to submit"),
    ]  # fmt: skip
    assert [word for words, _ in slurm.calls("sbatch") for word in words if "array" in word] == ["--array=0-2"]
    slurm.queue(run_dir, _101_2="RUNNING")
    for expert in (0, 1):
        path = f"experts/00{expert}/manifest.json"
        (run_dir / path).write_bytes((expert_run / path).read_bytes())
    rows = run(asked, run_dir)
    assert [(row.job, row.tasks, row.state) for row in rows[3:]] == [
        ("experts", "2", "running"), ("dense", "", "finished"), ("train-experts", "", "submitted"),
        ("gates", "0-1", "submitted"), ("gates", "2", "to submit"), ("train-gates", "", "to submit"),
    ]  # fmt: skip
    assert slurm.submitted(since=1)["train-experts"] == (102, ["101_2"], None)
    slurm.says("squeue", "7|RUNNING|x\n" * 9)
    rows = run(asked, run_dir)
    assert {row.state for row in rows} == {"finished", "to submit"} and len(slurm.calls("sbatch")) == 3


@pytest.mark.parametrize(
    ("settings", "counted", "of"), [("", "", ""), ('account = "lab"', "--account=lab", " of account lab")]
)
def test_what_is_held_back_is_told_in_one_line(slurm, config, tmp_path, settings, counted, of):
    lines = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="WARNING")
    slurm.says("sacctmgr", "other|2\nlab|5\n")
    slurm.says("squeue", "7\n8\n")
    run(config(slurm=settings), tmp_path / "run")  # 14 jobs and tasks
    slurm.says("sacctmgr", "other|2\nlab|\n")
    run(config(slurm=settings), tmp_path / "free")
    logger.remove(sink)
    assert lines == [
        f"11 jobs and tasks are held back: Slurm takes 5 at a time (MaxSubmitJobs{of}), and 2 were in the queue: "
        "when some have ended, give the same command again"
    ]
    ((words, _),) = slurm.calls("squeue")
    assert counted in words if counted else not any("account" in word for word in words)


HOSTILE = [
    "a b", "it's", 'say "x"', "$(touch owned)", "`touch owned`", "line\nbreak; touch owned", "-x", "%j%%",
    "#SBATCH --wrap=x", "a&b;c|d>owned", "~", "*", "ünïcode", "\n#SBATCH --partition=owned\n", "!x", "{a,b}",
    "--wrap=touch owned", "-", " ", "a\rb\tc", "$SLURM_ARRAY_TASK_ID", "${IFS}", "'; touch owned; '",
    '"; touch owned; "', "\x1b[31m", "\u202e\u2028", "a\x7fb", "[x]?", "=x",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_words(slurm, config, tmp_path, name, monkeypatch):
    place = tmp_path / f"cwd {name}".replace("/", "_")
    place.mkdir()
    monkeypatch.chdir(place)
    run_dir, text = Path(name), f"{name}.txt"
    one = config("train-experts", slurm="shards = 2", inputs=(text, f"$(touch owned) {name}")).model_copy(
        update={"program": (f"/opt/{name}/python", "-m", "cpipe"), "settings_file": name}
    )
    run(one, run_dir)
    monkeypatch.chdir("/")
    tidy = f"./{name}" if name.startswith("-") else name
    files = [f"{tidy}.txt", f"$(touch owned) {name}"]
    for (words, _), job in zip(slurm.calls("sbatch"), JOBS[:7], strict=True):
        assert words[-1] == str(place / name / "slurm" / f"{job}.sh")
        log = str(place / name / "slurm/logs").replace("%", "%%")
        assert (
            f"--output={log}/{job}-{'%A_%a' if job in ('tokenize-shards', 'experts', 'gates') else '%j'}.log" in words
        )
        if job in ("train-seed", "train-experts"):  # as cluster is
            continue
        before = len(slurm.calls("srun"))
        path = f"{slurm.folder}:/usr/bin:/bin"
        environment = {"PATH": path, "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "9", "SLURM_JOB_ID": "9"}
        subprocess.run(["bash", words[-1]], env=environment, cwd="/", check=True, timeout=30)
        ((called, seen),) = slurm.calls("srun")[before:]
        assert seen["PWD"] == str(place)
        start = called.index(f"/opt/{name}/python")
        command = {"experts": "train-experts", "dense": "train-experts", "gates": "train-gates"}.get(job, job)
        command = command.removesuffix("-shards")
        expected = [f"/opt/{name}/python", "-m", "cpipe", command, tidy]
        expected += files if command == "tokenize" else []
        expected += {
            "tokenize-shards": ["--shard", "2/2"], "tokenize": ["--merge"], "experts": ["--expert", "2"],
            "dense": ["--expert", "dense"], "gates": ["--expert", "2"],
        }.get(job, [])  # fmt: skip
        assert called[start:] == [*expected, "--settings", name]
    assert not list(tmp_path.rglob("owned*"))


def test_a_path_with_a_backslash_is_refused_before_anything_is_submitted(slurm, config, tmp_path):
    with pytest.raises(UsageFailure, match=r"Slurm writes no log below .*a\\b.slurm: a path must not hold a backslash"):
        run(config(), tmp_path / "a\\b")
    assert not slurm.calls("sbatch")


@pytest.mark.parametrize("changes", [{"settings_file": "\udcff"}, {"inputs": ("a\udcff",)}, {"program": ("\udcff",)}])
def test_a_name_that_is_no_text_is_refused_before_anything_is_submitted(slurm, config, tmp_path, changes):
    with pytest.raises(UsageFailure, match="holds what is no UTF-8, so no job can be made of it") as failed:
        run(config().model_copy(update=changes), tmp_path / "run")
    str(failed.value).encode()
    assert not slurm.calls("sbatch")


def test_headers_of_hostile_runs_hold_only_what_was_meant(slurm, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = Path("x\n#SBATCH --partition=owned\ny")
    run(config(), run_dir)
    for path in (run_dir / "slurm").glob("*.sh"):
        head = path.read_text().split("\n\n")[0]
        assert "owned" not in [line for line in head.splitlines() if "job-name" not in line]
        assert f"--job-name=cpipe-{path.stem}-x__SBATCH_--partition_owned_y" in head


def test_it_runs_where_it_was_asked_for(slurm, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(config(until="tokenize"), Path("runs/a"))
    assert f"cd -- {os.getcwd()} || exit" in Path("runs/a/slurm/tokenize.sh").read_text()
    assert " tokenize runs/a " in Path("runs/a/slurm/tokenize.sh").read_text()
