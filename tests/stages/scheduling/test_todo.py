import json

import pytest

from schemas.cluster_documents import ClusterConfig
from schemas.failures import IntegrityFailure, StaleFailure
from schemas.progress import Step, find_progress
from schemas.tokenize_text import TokenizeConfig
from schemas.train_seed import SeedConfig
from stages.scheduling.todo import Todo, find_todo

AFTER = {"tokenize": (), "cluster": ("tokenize",), "train-seed": ("tokenize",)}


@pytest.fixture
def stages(shape, training):
    """The settings that the session's run was made with."""
    return {
        "tokenize": (TokenizeConfig(vocab_size=320, valid_fraction=0.15),),
        "cluster": (ClusterConfig(clusters=3, dimensions=8),),
        "train-seed": (SeedConfig(model=shape, training=training),),
    }


def find(stages, run_dir, *, force=False):
    asked = [(command, each) for command, configs in stages.items() for each in configs]
    return find_todo(find_progress(asked, run_dir), AFTER, run_dir, force=force)


def todo(*stages, again=(), forced=()):
    return Todo(frozenset(stages), frozenset(again), frozenset(forced))


def test_of_an_empty_run_everything_is_to_be_done(stages, tmp_path):
    found = find(stages, tmp_path)
    assert found == todo("tokenize", "cluster", "train-seed", again=("cluster", "train-seed"))


def test_of_a_finished_run_nothing(stages, seeded_run):
    assert find(stages, seeded_run) == todo()
    assert find(stages, seeded_run, force=True) == todo()


def test_what_is_missing_and_what_comes_after_it(stages, seeded_run, copied_run):
    run_dir = copied_run(seeded_run)
    (run_dir / "clusters/manifest.json").unlink()
    assert find(stages, run_dir) == todo("cluster")
    (run_dir / "tokens/manifest.json").unlink()
    found = find(stages, run_dir)
    assert found == todo("tokenize", "cluster", "train-seed", again=("cluster", "train-seed"))


def test_settings_that_change_nothing_leave_it_finished(stages, seeded_run):
    other = {**stages, "tokenize": (stages["tokenize"][0].model_copy(update={"workers": 7, "inputs": ("x",)}),)}
    assert find(other, seeded_run) == todo()


def test_other_settings_are_refused_or_forced(stages, seeded_run):
    other = {**stages, "cluster": (ClusterConfig(clusters=4, dimensions=8),)}
    with pytest.raises(StaleFailure, match=r"clusters is finished, but clusters was 3 and is now 4: give --force"):
        find(other, seeded_run)
    found = find(other, seeded_run, force=True)
    assert found == todo("cluster", again=("cluster",), forced=("cluster",))


def test_what_another_command_made_is_refused_or_made_again(stages, seeded_run, copied_run):
    run_dir = copied_run(seeded_run)
    path = run_dir / "seed/manifest.json"
    manifest = json.loads(path.read_text())
    imported = {"architecture": "llama", "precision": "fp32", "context": 32, "unnamed_ids": 0}
    metrics = {"parameters": manifest["metrics"]["parameters"], "training": None, **imported}
    path.write_text(
        json.dumps(manifest | {"schema": "cpipe.import/1", "config": {"source": "hf:there"}, "metrics": metrics})
    )
    with pytest.raises(StaleFailure, match=r"seed is finished, but it was made by `cpipe import`: give --force"):
        find(stages, run_dir)
    assert find(stages, run_dir, force=True) == todo("train-seed", again=("train-seed",), forced=("train-seed",))


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_manifest_that_is_none_is_named(stages, seeded_run, copied_run, content):
    run_dir = copied_run(seeded_run)
    (run_dir / "seed/manifest.json").write_text(content)
    with pytest.raises(IntegrityFailure, match=r"seed.manifest\.json(: not valid JSON| has schema '[Nn]one')"):
        find(stages, run_dir)


def test_no_file_but_manifests_is_read(stages, seeded_run, copied_run):
    run_dir = copied_run(seeded_run)
    for path in run_dir.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            path.write_bytes(bytes(path.stat().st_size))
    assert find(stages, run_dir) == todo()


def test_after_a_further_dense_baseline_the_table_alone_is_made_again(tmp_path):
    steps = [
        Step("train-experts", "dense-20", "run", ("dense-20 is not finished",)),
        Step("train-gates", "gates", "up to date", ()),
        Step("evaluate", "reports", "again", ("its input dense-20 is new",)),
    ]
    after = {"train-experts": (), "train-gates": ("train-experts",), "evaluate": ("train-experts", "train-gates")}
    with pytest.raises(StaleFailure, match="its input dense-20 is new: give --force"):
        find_todo(steps, after, tmp_path, force=False)
    found = find_todo(steps, after, tmp_path, force=True)
    assert found == todo("train-experts", "evaluate", again=("evaluate",), forced=("evaluate",))
    of_all = [steps[0]._replace(folder="experts"), *steps[1:]]
    assert "train-gates" in find_todo(of_all, after, tmp_path, force=True).forced
