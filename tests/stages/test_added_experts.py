import json
import random
import shutil

import numpy as np
import pytest
from pydantic import ValidationError

from schemas.clean_run import CleanConfig
from schemas.cluster_documents import ClusterConfig, ClusterManifest
from schemas.evaluate_models import EvaluateConfig, EvaluateManifest
from schemas.failures import InputFailure, StaleFailure, UsageFailure
from schemas.files import digest_of
from schemas.plan_training import PlanConfig
from schemas.report_run import ReportConfig
from schemas.tokenize_text import TokenizeConfig, TokenizeManifest
from schemas.train_experts import AddedManifest, ExpertManifest, ExpertsConfig, ExpertsManifest
from schemas.train_gates import GateManifest, GatesManifest
from schemas.train_seed import SeedConfig
from schemas.verify_run import VerifyConfig
from stages import (
    clean_run,
    cluster_documents,
    compose_model,
    evaluate_models,
    plan_training,
    report_run,
    tokenize_text,
    train_experts,
    train_gates,
    verify_run,
)
from stages.artifacts.model_folder import read_tensors
from stages.artifacts.run_models import RunModels, routing_tensors
from stages.clustering.features import document_vectors
from stages.data.token_store import TokenStore

WORDS = "pulse fever dose tablet nurse symptom blood liver acute chronic vaccine surgeon flour the until"


def write_text(path, count=40, seed=0):
    draw = random.Random(seed)
    rows = [
        {"id": f"case-{number}", "source": f"ward {number % 2}", "text": " ".join(draw.choices(WORDS.split(), k=60))}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "medicine.jsonl")


@pytest.fixture(scope="module")
def config(training, text):
    return ExpertsConfig(training=training, add="medicine", data=(str(text),))


@pytest.fixture(scope="module")
def plain(training):
    return ExpertsConfig(training=training)


@pytest.fixture(scope="module")
def gates(full_run):
    return GatesManifest.read(full_run).config


@pytest.fixture(scope="module")
def added_run(full_run, tmp_path_factory, config):
    """`full_run` with experts/003 for one more domain. Read-only."""
    run_dir = shutil.copytree(full_run, tmp_path_factory.mktemp("runs") / "added")
    train_experts.run(config, run_dir)
    return run_dir


@pytest.fixture
def calls(monkeypatch):
    """The labels of the trainings, with the rows each was given."""
    seen = {}
    for stage in (train_experts, train_gates):

        def record(module, batch_at, config, folder, label, *rest, real=stage.train, **more):
            seen[label] = [batch_at(step) for step in range(config.steps)]
            return real(module, batch_at, config, folder, label, *rest, **more)

        monkeypatch.setattr(stage, "train", record)
    return seen


def digests(run_dir):
    files = (path for path in run_dir.rglob("*") if path.is_file())
    names = {path.relative_to(run_dir).as_posix(): digest_of(path) for path in files}
    return {name: digest for name, digest in names.items() if not name.startswith((".", "logs/"))}


def own_tokens(run_dir, split="train"):
    domain = AddedManifest.read(run_dir, "added/medicine")
    return TokenStore.open([ref.check(run_dir) for ref in domain.shards(split)])


def test_nothing_but_the_new_expert_and_the_list_of_all_is_written(added_run, full_run):
    before, after = digests(full_run), digests(added_run)
    assert {name for name in before if after.get(name) != before[name]} == {"experts/manifest.json"}
    assert {"/".join(name.split("/")[:2]) for name in after.keys() - before.keys()} == {"experts/003", "added/medicine"}
    assert {name for name in after if name.startswith("added/")} == {
        f"added/medicine/{name}"
        for name in ("manifest.json", "train-00000.arrow", "valid-00000.arrow", "centroid.safetensors")
    }


def test_it_is_a_member_with_the_settings_of_the_others(added_run, full_run):
    added, other = (ExpertManifest.read(added_run, f"experts/{number:03d}") for number in (3, 0))
    assert (added.config.cluster, added.config.added) == (None, "medicine")
    assert (added.config.training, added.config.lora) == (other.config.training, other.config.lora)
    together = ExpertsManifest.read(added_run)
    assert [ref.name for ref in together.inputs] == [*(f"experts/{number:03d}" for number in range(4)), "dense"]
    assert together.metrics.experts == 4
    assert together.config.key_settings() == ExpertsManifest.read(full_run).config.key_settings()


def test_experts_of_clusters_have_the_keys_they_had_before_there_were_others(expert_run):
    assert set(ExpertManifest.read(expert_run, "experts/000").config.key_settings()) == {"cluster", "lora", "training"}


def test_its_text_is_tokenized_as_the_runs_own_would_be(added_run, text, tmp_path):
    tokens = TokenizeManifest.read(added_run)
    tokenizer = str(tokens.output("tokenizer.json").check(added_run))
    alone = TokenizeConfig(inputs=(str(text),), tokenizer=tokenizer, valid_fraction=tokens.config.valid_fraction)
    expected = tokenize_text.run(alone, tmp_path / "run")
    domain = AddedManifest.read(added_run, "added/medicine")
    assert (domain.metrics.train, domain.metrics.valid) == (expected.metrics.train, expected.metrics.valid)
    assert expected.metrics.valid.documents > 0
    for split in ("train", "valid"):
        found = own_tokens(added_run, split)
        same = TokenStore.open([ref.check(tmp_path / "run") for ref in expected.shards(split)])
        assert found.ids == same.ids
        assert all(np.array_equal(found.tokens(n), same.tokens(n)) for n in range(len(same)))
        assert set(found.sources) == {"medicine"}


def test_it_starts_from_the_seed_and_sees_its_own_text_alone(full_run, copied_run, config, calls):
    run_dir = copied_run(full_run)
    train_experts.run(config, run_dir)
    assert list(calls) == ["experts/003"]
    store, end = own_tokens(run_dir), TokenizeManifest.read(run_dir).metrics.end_of_text
    known = {int(token) for number in range(len(store)) for token in store.tokens(number)} | {end}
    assert {int(token) for rows in calls["experts/003"] for token in rows.flatten()} <= known
    metrics = ExpertManifest.read(run_dir, "experts/003").metrics
    assert metrics.documents == len(store)
    first, last = metrics.training.first_loss, metrics.training.final_loss
    assert last < first - 0.3


def test_a_second_call_trains_nothing_and_a_plain_one_keeps_it(added_run, config, plain, calls):
    together = ExpertsManifest.read(added_run)
    assert train_experts.run(config, added_run) == together
    assert train_experts.run(plain, added_run).content_digest() == together.content_digest()
    assert not calls


def test_killed_in_its_training_it_is_finished_by_the_same_call_or_a_plain_one(
    added_run, full_run, tmp_path, config, plain, monkeypatch
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    expected = ExpertManifest.read(added_run, "experts/003").outputs
    for number, again in enumerate((config, plain, plain.model_copy(update={"expert": "3"}))):
        run_dir = shutil.copytree(full_run, tmp_path / str(number))
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(train_experts, "train", interrupted)
            train_experts.run(config, run_dir)
        train_experts.run(again, run_dir)
        assert ExpertManifest.read(run_dir, "experts/003").outputs == expected


def test_killed_while_it_is_tokenized_the_run_is_as_it_was_and_the_same_call_finishes_it(
    added_run, full_run, copied_run, config, monkeypatch
):
    run_dir = copied_run(full_run)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train_experts, "centroid_of", interrupted)
        train_experts.run(config, run_dir)
    assert RunModels.find(run_dir).members.metrics.experts == 3
    assert len(routing_tensors(run_dir, ClusterManifest.read(run_dir))[1]) == 3
    train_experts.run(config, run_dir)
    assert (
        AddedManifest.read(run_dir, "added/medicine").outputs == AddedManifest.read(added_run, "added/medicine").outputs
    )
    assert not (run_dir / "added/medicine/parts").exists()


def test_other_text_under_its_name_is_refused_and_forced_for_it_alone(added_run, copied_run, config, tmp_path, calls):
    run_dir = copied_run(added_run)
    other = write_text(tmp_path / "medicine.jsonl", seed=1)
    changed = config.model_copy(update={"data": (str(other),)})
    with pytest.raises(StaleFailure, match=r"added/medicine is finished, but its input medicine\.jsonl has changed"):
        train_experts.run(changed, run_dir)
    assert not calls
    train_experts.run(changed, run_dir, force=True)
    assert list(calls) == ["experts/003"]
    with pytest.raises(StaleFailure, match=r"medicine\.jsonl has changed: give --force"):
        train_experts.run(config, run_dir)


def test_with_other_settings_than_the_others_it_is_refused(full_run, copied_run, config, calls):
    run_dir = copied_run(full_run)
    other = config.model_copy(update={"training": config.training.model_copy(update={"steps": 9})})
    told = r"experts/000 is finished, but training.steps was 8 and is now 9: an expert is added with the settings of"
    for force in (False, True):
        with pytest.raises(StaleFailure, match=told):
            train_experts.run(other, run_dir, force=force)
    assert not calls and not (run_dir / "added").exists()


def test_a_forced_run_trains_it_too_without_the_users_files(added_run, copied_run, plain, calls):
    run_dir = copied_run(added_run)
    before = ExpertManifest.read(run_dir, "experts/003")
    train_experts.run(plain, run_dir, force=True)
    assert list(calls) == [*(f"experts/{number:03d}" for number in range(4)), "dense"]
    assert ExpertManifest.read(run_dir, "experts/003").outputs == before.outputs


def test_beside_adapters_it_is_an_adapter(seeded_run, copied_run, config, plain):
    run_dir = copied_run(seeded_run)
    lora = {"kind": "lora", "dense": False}
    train_experts.run(plain.model_copy(update=lora), run_dir)
    train_experts.run(config.model_copy(update=lora), run_dir)
    added, other = (ExpertManifest.read(run_dir, f"experts/{number:03d}") for number in (3, 0))
    names = [{ref.path.rsplit("/", 1)[1] for ref in member.outputs} for member in (added, other)]
    assert names[0] == names[1] and "adapter_model.safetensors" in names[0]
    shape, weights = RunModels.find(run_dir).decoder("experts/003")
    assert shape == RunModels.find(run_dir).decoder("seed")[0] and weights


def test_on_a_run_without_experts_it_is_trained_with_them(seeded_run, copied_run, config, calls, added_run):
    run_dir = copied_run(seeded_run)
    together = train_experts.run(config, run_dir)
    assert list(calls) == [*(f"experts/{number:03d}" for number in range(4)), "dense"]
    assert together.content_digest() == ExpertsManifest.read(added_run).content_digest()


def test_the_next_one_has_the_next_number(added_run, copied_run, config, tmp_path, calls):
    run_dir = copied_run(added_run)
    second = config.model_copy(update={"add": "ward", "data": (str(write_text(tmp_path / "ward.jsonl", seed=2)),)})
    assert train_experts.run(second, run_dir).metrics.experts == 5
    assert list(calls) == ["experts/004"]
    assert ExpertManifest.read(run_dir, "experts/004").config.added == "ward"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"add": "a b", "data": ("x",)}, r"--add 'a b' is no name: expected letters, digits, - and _"),
        ({"add": "../law", "data": ("x",)}, "is no name"),
        ({"add": "-x", "data": ("x",)}, "is no name"),
        ({"add": "", "data": ("x",)}, "is no name"),
        ({"add": "law\n", "data": ("x",)}, "is no name"),
        ({"add": "law"}, "--add law names no text: give files"),
        ({"data": ("x.txt",)}, r"text is given \(x.txt\) and no domain to add"),
        ({"add": "law", "data": ("x",), "expert": "3"}, "--add trains the expert it adds, and --expert names another"),
    ],
)
def test_what_cannot_be_added_is_refused_by_name(given, told):
    with pytest.raises(ValidationError, match=told):
        ExpertsConfig.from_mapping(given)


def test_text_that_holds_nothing_is_one_line(full_run, copied_run, config, tmp_path, calls):
    run_dir = copied_run(full_run)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputFailure, match=r"no text to add as medicine: 1 file.* no document to train on") as refused:
        train_experts.run(config.model_copy(update={"data": (str(tmp_path / "empty.txt"),)}), run_dir)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputFailure):
        train_experts.run(config.model_copy(update={"data": (str(tmp_path / "none.txt"),)}), run_dir)
    assert not calls and RunModels.find(run_dir).members.metrics.experts == 3


def test_several_processes_do_not_add(full_run, copied_run, config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageFailure, match="--add medicine is for one process: start it without the launcher"):
        train_experts.run(config, copied_run(full_run))


@pytest.mark.parametrize("clusters", [2, 4])
def test_after_another_clustering_it_is_refused_until_it_is_added_again(added_run, copied_run, config, plain, clusters):
    run_dir = copied_run(added_run)
    cluster_documents.run(ClusterConfig(clusters=clusters, dimensions=8), run_dir, force=True)
    size = {"training": plain.training.model_copy(update={"batch_size": 4})}
    with pytest.raises(StaleFailure, match=r"added/medicine is finished, but its input clusters has changed: give "):
        train_experts.run(plain.model_copy(update=size), run_dir, force=True)
    for path in [*run_dir.glob("experts/*"), run_dir / "dense"]:
        path.unlink() if path.is_file() else shutil.rmtree(path)
    together = train_experts.run(config.model_copy(update=size), run_dir, force=True)
    assert together.metrics.experts == clusters + 1
    assert AddedManifest.read(run_dir, "added/medicine").config.expert == clusters


def test_a_text_of_the_domain_is_routed_to_it(added_run):
    clusters = ClusterManifest.read(added_run)
    vectors, centroids = routing_tensors(added_run, clusters)
    own = read_tensors(clusters.output("centroids.safetensors").check(added_run))["centroids"].numpy()
    assert np.array_equal(centroids[:3], own) and len(centroids) == 4
    train, valid = (own_tokens(added_run, split) for split in ("train", "valid"))
    documents = document_vectors([train.tokens(number) for number in range(len(train))], vectors)
    np.testing.assert_allclose(centroids[3], documents.astype(np.float64).mean(0), atol=1e-6)
    held_out = document_vectors([valid.tokens(number) for number in range(len(valid))], vectors)
    nearest = ((held_out[:, None] - centroids[None]) ** 2).sum(-1).argmin(1)
    assert (nearest == 3).mean() > 0.8


def test_only_its_own_gate_is_trained_and_then_what_knows_of_all(added_run, copied_run, gates, calls):
    run_dir = copied_run(added_run)
    before = digests(run_dir)
    train_gates.run(gates.model_copy(update={"expert": 3}), run_dir)
    assert list(calls) == ["gates independent 003"]
    store, end = own_tokens(run_dir), TokenizeManifest.read(run_dir).metrics.end_of_text
    known = {int(token) for number in range(len(store)) for token in store.tokens(number)} | {end}
    assert {int(token) for rows in calls["gates independent 003"] for token in rows.flatten()} <= known
    alone = digests(run_dir)
    assert {name for name in before if alone.get(name) != before[name]} == {"gates/manifest.json"}
    calls.clear()
    with pytest.raises(StaleFailure, match="gates/joint is finished, but its input experts has changed"):
        train_gates.run(gates, run_dir)
    together = train_gates.run(gates, run_dir, force=True)
    assert list(calls) == ["gates joint", "gates contrastive"]
    after = digests(run_dir)
    changed = {name for name in before if after.get(name) != before[name]}
    assert {name for name in changed if not name.startswith(("gates/joint/", "gates/contrastive/"))} == {
        "gates/manifest.json", "gates/gates.safetensors",
    }  # fmt: skip
    assert together.metrics.experts == 4
    joined = read_tensors(together.output("gates.safetensors").check(run_dir))
    alone_vectors = GateManifest.read(run_dir, "gates/independent/003").output("gates.safetensors").check(run_dir)
    assert np.array_equal(joined["independent.vectors"][3], read_tensors(alone_vectors)["vectors"][0])
    assert all(tensor.shape[0] == 4 for tensor in joined.values())


def test_gates_of_a_number_that_no_expert_has_are_refused(added_run, copied_run, gates):
    with pytest.raises(UsageFailure, match="--expert 4 is not one of the 4 experts"):
        train_gates.run(gates.model_copy(update={"expert": 4}), copied_run(added_run))


def test_joint_gates_see_the_text_of_all_and_a_clusters_gate_its_own(added_run, full_run, gates):
    with_added, without = (train_gates.Frozen(gates, run_dir) for run_dir in (added_run, full_run))
    own = AddedManifest.read(added_run, "added/medicine").metrics.train
    assert with_added.rows(None).tokens == without.rows(None).tokens + own.tokens + own.documents
    assert with_added.rows(3).tokens == own.tokens + own.documents
    assert with_added.rows(0).tokens == without.rows(0).tokens


@pytest.fixture(scope="module")
def joined_run(added_run, tmp_path_factory, gates, training):
    """`added_run` with gates and one composition of all experts, and its evaluation. Read-only."""
    run_dir = shutil.copytree(added_run, tmp_path_factory.mktemp("runs") / "joined")
    for name in ("central", "central-calm", "central-control"):
        composition = compose_model.ComposeManifest.read(run_dir, name).config
        shutil.rmtree(run_dir / name)
    train_gates.run(gates, run_dir, force=True)
    compose_model.run(composition.model_copy(update={"name": "central", "experts": "trained"}), run_dir)
    evaluate_models.run(EvaluateConfig(tokens=1600, top_k=(1, 2), fit_temperature=False), run_dir)
    return run_dir


def test_its_domain_is_scored_and_it_is_the_best_there(joined_run):
    rows = {row.model: row for row in EvaluateManifest.read(joined_run).metrics.rows}
    for row in rows.values():
        assert "medicine" in row.sources and "cluster 003" in row.clusters
    assert rows["cBTM top-1"].sources["medicine"] < rows["dense"].sources["medicine"] - 0.05
    assert rows["oracle expert per document"].sources["medicine"] <= rows["cBTM top-1"].sources["medicine"]


def test_a_composition_reads_all_experts_and_its_rows_hold_the_added_text(joined_run, full_run):
    manifest = compose_model.ComposeManifest.read(joined_run, "central")
    assert manifest.metrics.experts == 4
    alone = "central-alone/manifest.json"  # knows of no experts, so it is as it was
    assert digest_of(joined_run / alone) == digest_of(full_run / alone)


def test_verify_finds_every_file_as_it_was_written(joined_run):
    checked = list(verify_run.stream(VerifyConfig(), joined_run))
    assert {problem.message for folder in checked for problem in folder.problems} == set()
    assert "added/medicine" in {folder.folder for folder in checked}


def test_the_commands_about_a_run_know_of_it(joined_run, copied_run, plain, gates, shape):
    run_dir = copied_run(joined_run)
    (run_dir / "experts/009").mkdir()
    removed = [found.path for found in clean_run.stream(CleanConfig(dry_run=True), run_dir)]
    assert "experts/009" in removed and not {"experts/003", "added/medicine"} & set(removed)
    asked = PlanConfig(
        seed=SeedConfig(model=shape, training=plain.training),
        experts=plain,
        gates=gates,
        compositions=(),
        vocab_size=320,
        clusters=3,
        flops_per_second=1e9,
    )
    planned = {each.name: each for each in plan_training.run(asked, run_dir).trainings}
    assert planned["expert medicine"].count == 1 and planned["experts"].count == 3
    assert planned["gates independent"].count == 4
    epochs = ExpertManifest.read(run_dir, "experts/003").metrics.epochs
    assert planned["expert medicine"].epochs == pytest.approx(epochs, rel=1e-3)
    assert [ref.path for ref in report_run.stream(ReportConfig(), run_dir)] == ["reports/report.html"]


def test_replaced_text_makes_its_expert_refused_where_it_is_read(joined_run, copied_run, config, tmp_path):
    run_dir = copied_run(joined_run)
    path = run_dir / "added/medicine/manifest.json"
    path.write_text(path.read_text().replace('"lossy": 0', '"lossy": 1'))
    told = r"experts/003 was made from another added/medicine than is there now: run `cpipe train-experts .* --expert 3"
    with pytest.raises(UsageFailure, match=told):
        evaluate_models.run(EvaluateConfig(tokens=1600), run_dir, force=True)
