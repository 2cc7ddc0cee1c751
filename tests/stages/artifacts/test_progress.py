import json
import shutil

import pytest

from schemas.cluster_documents import ClusterConfig
from schemas.failures import IntegrityFailure, StaleFailure
from schemas.tokenize_text import TokenizeConfig
from schemas.train_seed import SeedConfig
from stages.artifacts.progress import Todo, find_todo

AFTER = {"tokenize": (), "cluster": ("tokenize",), "train-seed": ("tokenize",)}


@pytest.fixture
def stages(shape, training):
    """The settings that the session's run was made with."""
    return {
        "tokenize": (TokenizeConfig(vocab_size=320, valid_fraction=0.15),),
        "cluster": (ClusterConfig(clusters=3, dimensions=8),),
        "train-seed": (SeedConfig(model=shape, training=training),),
    }


def todo(*stages, again=(), forced=()):
    return Todo(frozenset(stages), frozenset(again), frozenset(forced))


def test_of_an_empty_run_everything_is_to_be_done(stages, tmp_path):
    found = find_todo(stages, AFTER, tmp_path, force=False)
    assert found == todo("tokenize", "cluster", "train-seed", again=("cluster", "train-seed"))


def test_of_a_finished_run_nothing(stages, seeded_run):
    assert find_todo(stages, AFTER, seeded_run, force=False) == todo()
    assert find_todo(stages, AFTER, seeded_run, force=True) == todo()


def test_what_is_missing_and_what_comes_after_it(stages, seeded_run, copied_run):
    run_dir = copied_run(seeded_run)
    (run_dir / "clusters/manifest.json").unlink()
    assert find_todo(stages, AFTER, run_dir, force=False) == todo("cluster")
    (run_dir / "tokens/manifest.json").unlink()
    found = find_todo(stages, AFTER, run_dir, force=False)
    assert found == todo("tokenize", "cluster", "train-seed", again=("cluster", "train-seed"))


def test_settings_that_change_nothing_leave_it_finished(stages, seeded_run):
    other = {**stages, "tokenize": (stages["tokenize"][0].model_copy(update={"workers": 7, "inputs": ("x",)}),)}
    assert find_todo(other, AFTER, seeded_run, force=False) == todo()


def test_other_settings_are_refused_or_forced(stages, seeded_run):
    other = {**stages, "cluster": (ClusterConfig(clusters=4, dimensions=8),)}
    with pytest.raises(StaleFailure, match=r"clusters is finished, but clusters was 3 and is now 4: give --force"):
        find_todo(other, AFTER, seeded_run, force=False)
    found = find_todo(other, AFTER, seeded_run, force=True)
    assert found == todo("cluster", again=("cluster",), forced=("cluster",))


def test_what_another_command_made_is_taken_as_it_is(stages, seeded_run, copied_run):
    run_dir = copied_run(seeded_run)
    path = run_dir / "seed/manifest.json"
    path.write_text(json.dumps({"schema": "cpipe.import/1"}))
    assert find_todo(stages, AFTER, run_dir, force=False) == todo()


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_manifest_that_is_none_is_named(stages, seeded_run, copied_run, content):
    run_dir = copied_run(seeded_run)
    (run_dir / "seed/manifest.json").write_text(content)
    with pytest.raises(IntegrityFailure, match=r"seed.manifest\.json is no manifest of cpipe"):
        find_todo(stages, AFTER, run_dir, force=False)


def test_no_file_but_manifests_is_read(stages, seeded_run, copied_run):
    run_dir = copied_run(seeded_run)
    for path in run_dir.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            path.unlink()
    shutil.rmtree(run_dir / ".locks", ignore_errors=True)
    assert find_todo(stages, AFTER, run_dir, force=False) == todo()
