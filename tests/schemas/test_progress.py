"""What is up to date and why not; with whole pipelines it is tested in test_forecast.py and test_submit_jobs.py."""

from pathlib import Path
from typing import Any

import pytest

from cpipe.pipeline import BY_COMMAND, PIPELINE
from schemas.cluster_documents import ClusterConfig
from schemas.failures import UsageFailure
from schemas.progress import MANIFESTS, find_progress, state_of
from schemas.train_experts import ExpertsConfig
from schemas.training import TrainingConfig


@pytest.fixture
def experts(training: TrainingConfig) -> ExpertsConfig:
    """The settings that the experts of the session's run were trained with."""
    return ExpertsConfig(training=training)


def test_every_stage_of_the_pipeline_is_known_by_its_manifest() -> None:
    assert {command: BY_COMMAND[command].manifest for command in (*PIPELINE, "import")} == MANIFESTS


def test_experts_as_asked_for_are_up_to_date(experts: ExpertsConfig, expert_run: Path) -> None:
    ((*_, state, why),) = find_progress([("train-experts", experts)], expert_run)
    assert (state, why) == ("up to date", ())


@pytest.mark.parametrize("removed", [[], ["experts"], ["experts", "experts/001"]])
def test_experts_of_other_settings_are_found_in_the_members_that_are_finished(
    removed: list[str], experts: ExpertsConfig, expert_run: Path, copied_run: Any
) -> None:
    run_dir = copied_run(expert_run)
    for folder in removed:
        (run_dir / folder / "manifest.json").unlink()
    other = experts.model_copy(update={"training": experts.training.model_copy(update={"steps": 9})})
    (step,) = find_progress([("train-experts", other)], run_dir)
    assert (step.state, step.why) == ("again", ("training.steps was 8 and is now 9",))


def test_what_is_so_of_some_members_only_is_told_with_their_names(experts: ExpertsConfig, expert_run: Path) -> None:
    other = experts.model_copy(update={"kind": "lora"})
    (step,) = find_progress([("train-experts", other)], expert_run)
    assert step.state == "again"
    (why,) = [why for why in step.why if "lora.rank" in why]  # the dense baseline has no adapter
    assert why == "experts/000, experts/001, experts/002: lora.rank was null and is now 16"


def test_without_the_dense_baseline_only_what_holds_the_experts_together_is_written_anew(
    experts: ExpertsConfig, expert_run: Path
) -> None:
    (step,) = find_progress([("train-experts", experts.model_copy(update={"dense": False}))], expert_run)
    assert step.state == "run" and step.why[0] == "dense was true and is now false"


def test_a_further_dense_baseline_is_missing_until_it_is_trained(experts: ExpertsConfig, expert_run: Path) -> None:
    asked = experts.model_copy(update={"dense_steps": (9,)})
    (step,) = find_progress([("train-experts", asked)], expert_run)
    assert (step.folder, step.state, step.why) == ("dense-9", "run", ("dense-9 is not finished",))
    (step,) = find_progress([("train-experts", asked.model_copy(update={"expert": "dense-9"}))], expert_run)
    assert (step.folder, step.state) == ("dense-9", "run")


def test_a_share_of_the_batch_follows_from_the_clusters_asked_for(experts: ExpertsConfig, expert_run: Path) -> None:
    asked = [("cluster", ClusterConfig(clusters=2, dimensions=8)), ("train-experts", experts)]
    clusters, members = find_progress(asked, expert_run)
    assert clusters.state == members.state == "again"
    assert "experts/000, experts/001: training.batch_size was 2 and is now 3" in members.why
    with pytest.raises(UsageFailure, match="6 rows does not divide among 4 experts: use --batch-size 8"):
        find_progress([("cluster", ClusterConfig(clusters=4)), ("train-experts", experts)], expert_run)


def test_one_expert_alone_is_a_step(experts: ExpertsConfig, expert_run: Path, copied_run: Any) -> None:
    run_dir = copied_run(expert_run)
    (run_dir / "experts/001/manifest.json").unlink()
    for expert, folder, state in (("0", "experts/000", "up to date"), ("1", "experts/001", "run")):
        (step,) = find_progress([("train-experts", experts.model_copy(update={"expert": expert}))], run_dir)
        assert (step.folder, step.state) == (folder, state)


def test_states_in_words(tmp_path: Path) -> None:
    assert state_of(tmp_path, "experts") == "not finished"
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/samples.json").touch()  # made for the report, which is no stage
    assert state_of(tmp_path, "reports") == "not finished"
    (tmp_path / "experts/001").mkdir(parents=True)
    assert state_of(tmp_path, "experts") == "begun"
    (tmp_path / "experts/001/manifest.json").touch()
    assert state_of(tmp_path, "experts") == "begun (1 members finished)"
    (tmp_path / "experts/manifest.json").touch()
    assert state_of(tmp_path, "experts") == "finished"
