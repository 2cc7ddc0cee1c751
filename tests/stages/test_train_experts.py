import json
import shutil

import numpy as np
import pytest

from schemas.cluster_documents import ClusterManifest
from schemas.failures import IntegrityFailure, LockedFailure, UsageFailure
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import ExpertManifest, ExpertsConfig, ExpertsManifest
from schemas.train_seed import SeedManifest
from stages import train_experts
from stages.data.token_store import read_table

FOLDERS = ("experts/000", "experts/001", "experts/002", "dense")


@pytest.fixture
def config(training):
    return ExpertsConfig(training=training)


@pytest.fixture
def calls(monkeypatch):
    """The labels of the trainings, with what each was given."""
    seen = {}
    real = train_experts.train

    def record(module, batch_at, config, folder, label, write, **more):
        seen[label] = [batch_at(step) for step in range(config.steps)]
        return real(module, batch_at, config, folder, label, write, **more)

    monkeypatch.setattr(train_experts, "train", record)
    return seen


def changed(config, **training):
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def members(run_dir):
    return {folder: ExpertManifest.read(run_dir, folder) for folder in FOLDERS}


def test_every_member_is_a_finished_stage_and_all_together_too(expert_run):
    upstream = [kind.read(expert_run).as_input() for kind in (TokenizeManifest, ClusterManifest, SeedManifest)]
    together = ExpertsManifest.read(expert_run)
    for folder, member in members(expert_run).items():
        assert list(member.inputs) == upstream
        assert {ref.path.rsplit("/", 1)[0] for ref in member.outputs} == {folder}
        assert all(ref.check(expert_run) for ref in member.outputs)
    assert [(ref.name, ref.digest) for ref in together.inputs] == [
        (folder, member.content_digest()) for folder, member in members(expert_run).items()
    ]
    assert together.metrics.experts == 3
    assert together.metrics.final_losses == tuple(
        member.metrics.training.final_loss for folder, member in members(expert_run).items() if folder != "dense"
    )


def test_the_experts_together_see_as_many_tokens_as_the_dense_model_in_as_many_steps(expert_run):
    experts, found = ExpertsManifest.read(expert_run).metrics, members(expert_run)
    assert experts.tokens == experts.dense_tokens == 8 * 6 * 32
    assert [member.config.training.batch_size for member in found.values()] == [2, 2, 2, 6]
    assert {member.metrics.training.steps for member in found.values()} == {8}
    assert [member.config.cluster for member in found.values()] == [0, 1, 2, None]


def test_an_expert_sees_the_documents_of_its_cluster_and_dense_sees_all(seeded_run, copied_run, config, calls):
    run_dir = copied_run(seeded_run)
    train_experts.run(changed(config, steps=30), run_dir)
    tokens, clusters = TokenizeManifest.read(run_dir), ClusterManifest.read(run_dir)
    store = train_experts.TokenStore.open([ref.check(run_dir) for ref in tokens.shards("train")])
    assigned = np.asarray(read_table(clusters.output("assignments-train.arrow").check(run_dir))["cluster"])
    vocabulary = [
        {int(token) for document in np.flatnonzero(assigned == cluster) for token in store.tokens(document)}
        for cluster in range(3)
    ]
    end = tokens.metrics.end_of_text
    seen = [{int(token) for rows in calls[folder] for token in rows.flatten()} - {end} for folder in FOLDERS]
    for cluster in range(3):
        assert seen[cluster] <= vocabulary[cluster]
        assert not seen[cluster] <= vocabulary[(cluster + 1) % 3]  # the kinds differ, so this can fail
        assert seen[3] - vocabulary[cluster]
    assert [ExpertManifest.read(run_dir, folder).metrics.documents for folder in FOLDERS] == [
        *np.bincount(assigned), len(store),
    ]  # fmt: skip


def test_every_member_starts_from_the_seed(expert_run, seeded_run, copied_run, training):
    run_dir = copied_run(seeded_run)
    still = training.model_copy(update={"steps": 1, "learning_rate": 1e-30})
    train_experts.run(ExpertsConfig(training=still), run_dir)
    seed = SeedManifest.read(run_dir).output("model.safetensors").digest
    for folder in FOLDERS:
        assert ExpertManifest.read(run_dir, folder).output("model.safetensors").digest == seed
        assert ExpertManifest.read(expert_run, folder).output("model.safetensors").digest != seed


def test_a_rate_that_is_not_given_is_half_of_what_new_weights_would_take(seeded_run, copied_run, training):
    training = training.model_copy(update={"learning_rate": None})
    dense = train_experts.run(ExpertsConfig(training=training, expert="dense"), copied_run(seeded_run)).metrics
    tokens = SeedManifest.read(seeded_run).metrics.training.tokens + dense.training.tokens
    as_new = 0.3118 * (6 * dense.parameters * tokens) ** (-1 / 8)
    assert dense.training.learning_rate == pytest.approx(as_new / 2, rel=0.05)


def test_an_expert_is_better_on_its_kind_than_the_dense_model_was_at_the_start(expert_run):
    for member in members(expert_run).values():
        assert member.metrics.training.final_loss < member.metrics.training.first_loss - 0.3


def test_a_second_call_trains_nothing(expert_run, config, calls):
    assert train_experts.run(config, expert_run) == ExpertsManifest.read(expert_run)
    assert not calls


def test_one_expert_alone_then_the_rest(expert_run, seeded_run, copied_run, config, calls):
    run_dir = copied_run(seeded_run)
    one = train_experts.run(config.model_copy(update={"expert": "1"}), run_dir)
    assert isinstance(one, ExpertManifest)
    assert list(calls) == ["experts/001"]
    assert not (run_dir / "experts" / "manifest.json").exists()
    dense = train_experts.run(config.model_copy(update={"expert": "dense"}), run_dir)
    assert dense.config.cluster is None
    calls.clear()
    together = train_experts.run(config, run_dir)
    assert list(calls) == ["experts/000", "experts/002"]
    assert together.content_digest() == ExpertsManifest.read(expert_run).content_digest()
    for folder in FOLDERS:
        assert ExpertManifest.read(run_dir, folder).outputs == ExpertManifest.read(expert_run, folder).outputs


def test_a_further_dense_baseline_takes_its_own_steps_and_leaves_the_rest_as_it_is(
    expert_run, copied_run, config, calls
):
    run_dir, before = copied_run(expert_run), ExpertsManifest.read(expert_run)
    asked = config.model_copy(update={"dense_steps": (11,)})
    assert train_experts.run(asked, run_dir) == before
    assert list(calls) == ["dense-11"]
    longer, dense = ExpertManifest.read(run_dir, "dense-11"), ExpertManifest.read(run_dir, "dense")
    assert longer.metrics.training.steps == 11
    assert longer.config == dense.config.model_copy(update={"training": longer.config.training})
    assert ExpertsManifest.read(run_dir) == before
    calls.clear()
    assert train_experts.run(asked.model_copy(update={"expert": "dense-11"}), run_dir) == longer
    assert train_experts.run(asked, run_dir) == before
    assert not calls


@pytest.mark.parametrize("steps", [(0,), (-3,), (9, 9)])
def test_steps_of_further_dense_baselines_are_positive_and_differ(steps):
    with pytest.raises(ValueError, match="must be positive, and each another"):
        ExpertsConfig(dense_steps=steps)
    with pytest.raises(ValueError, match="1000 is what the dense baseline takes anyway"):
        ExpertsConfig(dense_steps=(1000,))
    assert ExpertsConfig(dense_steps=(1000,), dense=False).all_dense() == {"dense-1000": 1000}


def test_a_further_dense_baseline_that_is_not_in_the_settings_is_refused_with_what_to_give(expert_run, config):
    with pytest.raises(UsageFailure, match=r"--expert dense-12 is not one of .*; give --dense-steps 12 too"):
        train_experts.run(config.model_copy(update={"expert": "dense-12"}), expert_run)


@pytest.mark.parametrize("dense, expert", [(True, "3"), (True, "17"), (False, "dense")])
def test_a_member_that_is_none_is_refused(dense, expert, seeded_run, copied_run, config, calls):
    asked = config.model_copy(update={"expert": expert, "dense": dense})
    with pytest.raises(UsageFailure, match=f"--expert {expert} is not one of experts/000, experts/001, experts/002"):
        train_experts.run(asked, copied_run(seeded_run))
    assert not calls


@pytest.mark.parametrize("size, suggested", [(7, 6), (8, 9), (1, 3)])
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(size, suggested, seeded_run, copied_run, config):
    expected = f"a batch of {size} rows does not divide among 3 experts: use --batch-size {suggested}"
    with pytest.raises(UsageFailure, match=expected):
        train_experts.run(changed(config, batch_size=size), copied_run(seeded_run))


def test_without_the_dense_model_only_experts_are_trained(seeded_run, copied_run, config, calls):
    run_dir = copied_run(seeded_run)
    together = train_experts.run(config.model_copy(update={"dense": False}), run_dir)
    assert list(calls) == list(FOLDERS[:3])
    assert together.metrics.dense_tokens == 0
    assert not (run_dir / "dense").exists()


def test_a_changed_setting_is_refused_by_name(expert_run, config, calls):
    with pytest.raises(UsageFailure, match=r"training.weight_decay was 0.1 and is now 0.2: give --force"):
        train_experts.run(changed(config, weight_decay=0.2), expert_run)
    assert not calls


def test_force_trains_all_again(expert_run, copied_run, config, calls):
    run_dir = copied_run(expert_run)
    together = train_experts.run(changed(config, weight_decay=0.2), run_dir, force=True)
    assert list(calls) == list(FOLDERS)
    assert together == ExpertsManifest.read(run_dir)
    assert together.config.training.weight_decay == 0.2


def test_force_on_one_expert_leaves_the_others(expert_run, copied_run, config, calls):
    run_dir = copied_run(expert_run)
    train_experts.run(config.model_copy(update={"expert": "2"}), run_dir, force=True)
    assert list(calls) == ["experts/002"]
    assert not (run_dir / "experts" / "manifest.json").exists()  # until all members are seen to be finished
    assert train_experts.run(config, run_dir).content_digest() == ExpertsManifest.read(expert_run).content_digest()
    assert list(calls) == ["experts/002"]


def test_a_new_seed_makes_the_experts_stale(expert_run, copied_run, config, shape, training):
    from schemas.train_seed import SeedConfig
    from stages import train_seed

    run_dir = copied_run(expert_run)
    other = training.model_copy(update={"seed": 5})
    train_seed.run(SeedConfig(model=shape, training=other), run_dir, force=True)
    with pytest.raises(UsageFailure, match="its input seed has changed"):
        train_experts.run(config, run_dir)


def test_a_changed_seed_file_is_refused(seeded_run, copied_run, config):
    run_dir = copied_run(seeded_run)
    path = run_dir / "seed" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityFailure, match=r"model.safetensors was changed"):
        train_experts.run(config, run_dir)


def test_a_lost_member_is_trained_again(expert_run, copied_run, config, calls):
    run_dir = copied_run(expert_run)
    shutil.rmtree(run_dir / "experts" / "001")
    train_experts.run(config, run_dir)
    assert list(calls) == ["experts/001"]
    assert ExpertManifest.read(run_dir, "experts/001").outputs == ExpertManifest.read(expert_run, "experts/001").outputs


def clustered_anew(run_dir, **settings):
    """`run_dir` with other clusters; the seed is not made from them."""
    from schemas.cluster_documents import ClusterConfig
    from stages import cluster_documents

    return cluster_documents.run(ClusterConfig(clusters=3, dimensions=8, **settings), run_dir, force=True)


def test_a_document_near_a_border_is_seen_by_two_experts(seeded_run, copied_run, config, calls):
    run_dir = copied_run(seeded_run)
    clusters = clustered_anew(run_dir, overlap=0.3)
    train_experts.run(config, run_dir)
    counts = [cluster.documents + cluster.shared_documents for cluster in clusters.metrics.clusters]
    found = [ExpertManifest.read(run_dir, folder).metrics.documents for folder in FOLDERS]
    total = sum(cluster.documents for cluster in clusters.metrics.clusters)
    assert found == [*counts, total]
    assert sum(counts) == total + round(0.3 * total)


def test_an_expert_of_materialised_shards_has_the_weights_of_one_by_the_index(seeded_run, tmp_path, config):
    weights = {}
    for kind in ("index", "shards"):
        run_dir = shutil.copytree(seeded_run, tmp_path / kind)
        clustered_anew(run_dir, overlap=0.2, materialise=kind == "shards")
        train_experts.run(config, run_dir)
        weights[kind] = {
            folder: (member.output("model.safetensors").digest, member.metrics)
            for folder, member in members(run_dir).items()
        }
    assert weights["index"] == weights["shards"]


def test_an_expert_needs_no_shards_but_its_own(seeded_run, copied_run, config):
    run_dir = copied_run(seeded_run)
    clustered_anew(run_dir, materialise=True)
    one = config.model_copy(update={"expert": "1"})
    whole = train_experts.run(one, run_dir)
    shutil.rmtree(run_dir / "experts")
    for path in [*run_dir.glob("tokens/*.arrow"), *run_dir.glob("clusters/*.*")]:
        if path.name != "manifest.json":
            path.unlink()
    shutil.rmtree(run_dir / "clusters/000")
    assert train_experts.run(one, run_dir).content_digest() == whole.content_digest()
    with pytest.raises(IntegrityFailure, match=r"clusters/000/train-00000.arrow is missing"):
        train_experts.run(config.model_copy(update={"expert": "0"}), run_dir)


def test_experts_see_one_document_where_that_is_asked(expert_run, copied_run, monkeypatch):
    run_dir, seen = copied_run(expert_run), []

    def look(module, *_, **__):
        seen.append(module.decoder.separator)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_experts, "train", look)
    config = ExpertsManifest.read(run_dir).config.model_copy(update={"expert": "1"})
    for masked in (True, False):
        with pytest.raises(KeyboardInterrupt):
            train_experts.run(changed(config, mask_documents=masked), run_dir, force=True)
    assert seen == [TokenizeManifest.read(run_dir).metrics.end_of_text, None]


def digests(run_dir):
    return {folder: member.outputs for folder, member in members(run_dir).items()}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_members_trained_at_once_have_the_bytes_of_those_trained_in_turn(engine, seeded_run, tmp_path, config):
    config = changed(config, engine=engine)
    in_turn, at_once = (shutil.copytree(seeded_run, tmp_path / name) for name in ("in-turn", "at-once"))
    one = train_experts.run(config, in_turn)
    other = train_experts.run(config.model_copy(update={"parallel": 2}), at_once)
    assert digests(at_once) == digests(in_turn)
    assert other.content_digest() == one.content_digest()
    assert {path.name for path in (at_once / "logs").iterdir()} == {
        "train-experts-000.log", "train-experts-001.log", "train-experts-002.log", "train-experts-dense.log",
    }  # fmt: skip


@pytest.mark.parametrize("parallel", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_member_that_fails_stops_no_other_and_only_it_is_trained_again(
    parallel, expert_run, seeded_run, copied_run, config, calls
):
    from stages.artifacts.stage_folder import claim_folder

    run_dir = copied_run(seeded_run)
    config = config.model_copy(update={"parallel": parallel})
    with (
        claim_folder(run_dir, ExpertManifest, config, [], folder="experts/001"),  # as another job would
        pytest.raises(LockedFailure, match=r"^experts/001: .*experts/001 is being worked on by process \d+") as failed,
    ):
        train_experts.run(config, run_dir)
    assert ("train-experts-001.log" in str(failed.value)) == (parallel == 2)
    assert not (run_dir / "experts/manifest.json").exists()
    calls.clear()
    train_experts.run(config.model_copy(update={"parallel": 1}), run_dir)
    assert list(calls) == ["experts/001"]
    assert digests(run_dir) == digests(expert_run)


def test_nothing_is_trained_where_a_later_member_is_of_other_settings(expert_run, copied_run, config, calls):
    run_dir = copied_run(expert_run)
    for number in range(3):
        shutil.rmtree(run_dir / f"experts/{number:03d}")
    with pytest.raises(UsageFailure, match=r"dense is finished, but training.steps was 8 and is now 9"):
        train_experts.run(changed(config, steps=9), run_dir)
    assert not calls


def test_a_member_writes_samples_beside_its_metrics(expert_run, copied_run, config):
    run_dir = copied_run(expert_run)
    asked = changed(config, sample_every=4, sample_prompt="flour").model_copy(update={"expert": "1"})
    train_experts.run(asked, run_dir, force=True)
    (path,) = run_dir.rglob("samples.jsonl")
    assert path.parent == run_dir / "experts/001"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [(4, "flour"), (8, "flour")]
    assert all(line["text"] for line in lines)
