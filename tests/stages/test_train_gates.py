import copy
import shutil
from typing import get_args

import pytest
import torch

from schemas.cluster_documents import ClusterManifest
from schemas.failures import InputFailure, IntegrityFailure, UsageFailure
from schemas.files import digest_of
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import ExpertManifest, ExpertsConfig
from schemas.train_gates import ALONE, GateManifest, GateMode, GateReading, GatesConfig, GatesManifest
from schemas.training import TrainingConfig
from stages import cluster_documents, train_experts, train_gates
from stages.artifacts import stage_folder
from stages.artifacts.model_folder import checksum, read_model, read_tensors
from stages.artifacts.run_models import RunModels
from stages.nn.decoder import Decoder
from stages.nn.gates import Gates
from stages.nn.routed import RoutedDecoder

MODES = tuple(mode for mode in get_args(GateMode) if mode != "arrow")  # which is for modules
TRAINING = TrainingConfig(
    steps=30, batch_size=6, sequence_length=32, learning_rate=0.01, weight_decay=0.0, engine="torch", precision="fp32"
)


@pytest.fixture(scope="module")
def config():
    return GatesConfig(modes=MODES, training=TRAINING)


@pytest.fixture(scope="module")
def gated_run(expert_run, tmp_path_factory, config):
    """`expert_run` with `gates/`. Read-only."""
    run_dir = shutil.copytree(expert_run, tmp_path_factory.mktemp("runs") / "gated")
    train_gates.run(config, run_dir)
    return run_dir


@pytest.fixture
def calls(monkeypatch):
    seen = {}
    real = train_gates.train

    def record(module, batch_at, config, folder, label):
        seen[label] = module, batch_at
        return real(module, batch_at, config, folder, label)

    monkeypatch.setattr(train_gates, "train", record)
    return seen


def gates_of(run_dir):
    return read_tensors(GatesManifest.read(run_dir).output("gates.safetensors").check(run_dir))


def weights_on_disk(run_dir):
    return {path: digest_of(path) for path in sorted(run_dir.rglob("model.safetensors"))}


def test_the_manifest_says_what_was_done(gated_run, config):
    manifest = GatesManifest.read(gated_run)
    assert manifest.config == config
    assert [ref.name for ref in manifest.inputs] == [
        "tokens", "clusters", "seed", "experts", *(f"gates/independent/{number:03d}" for number in range(3)),
        "gates/joint", "gates/contrastive", *(f"gates/mean-activation/{number:03d}" for number in range(3)),
    ]  # fmt: skip
    assert manifest.metrics.layer == 1  # half of two
    assert manifest.metrics.experts == 3
    assert [(run.mode, run.expert) for run in manifest.metrics.runs] == [
        ("independent", 0), ("independent", 1), ("independent", 2), ("joint", None), ("contrastive", None),
        ("mean-activation", 0), ("mean-activation", 1), ("mean-activation", 2),
    ]  # fmt: skip
    for run in manifest.metrics.runs[:4]:
        assert sum(run.openness) == pytest.approx(1, abs=1e-3)
        assert len(run.openness) == (4 if run.mode == "joint" else 2)
    for run in manifest.metrics.runs:
        asked = TRAINING.steps * TRAINING.batch_size * TRAINING.sequence_length
        assert run.tokens == (asked // 3 if run.mode == "mean-activation" else asked)
        assert (run.training is None) == (run.mode == "mean-activation")
    assert {name: tuple(tensor.shape) for name, tensor in gates_of(gated_run).items()} == {
        **{f"{mode}.vectors": (3, 32) for mode in MODES}, "joint.bias": (3,), "contrastive.bias": (3,)
    }  # fmt: skip


def decoders_of(loss):
    return (loss.seed, *getattr(loss, "experts", ()))


def test_gates_learn_on_decoders_that_see_one_document_where_that_is_asked(expert_run, copied_run, config, calls):
    run_dir = copied_run(expert_run)
    train_gates.run(config.model_copy(update={"training": TRAINING.model_copy(update={"steps": 1})}), run_dir)
    assert {decoder.separator for loss, _ in calls.values() for decoder in decoders_of(loss)} == {None}
    masked = TRAINING.model_copy(update={"steps": 1, "mask_documents": True})
    train_gates.run(config.model_copy(update={"training": masked}), run_dir, force=True)
    end = TokenizeManifest.read(run_dir).metrics.end_of_text
    assert {decoder.separator for loss, _ in calls.values() for decoder in decoders_of(loss)} == {end}


def test_trained_gates_mix_better_than_closed_ones(expert_run, copied_run, config, calls):
    manifest = train_gates.run(config, copied_run(expert_run))
    for module, batch_at in calls.values():
        rows = torch.cat([batch_at(step) for step in range(100, 110)])
        with torch.no_grad():
            closed = copy.deepcopy(module)
            for parameter in closed.gates.parameters():
                parameter.zero_()
            assert module(rows)["loss"] < closed(rows)["loss"] - 0.02
    for run in manifest.metrics.runs[:3]:
        assert run.openness[1] > 0.8  # each expert on its own cluster


def test_every_vector_has_learnt_and_independent_gates_have_no_bias(gated_run):
    gates = gates_of(gated_run)
    for mode in MODES:
        assert (gates[f"{mode}.vectors"].abs().amax(1) > 0).all()
        assert mode in ALONE or (gates[f"{mode}.bias"] != 0).all()


def test_seed_and_experts_stay_as_they_are(expert_run, copied_run, config, calls, monkeypatch):
    run_dir = copied_run(expert_run)
    on_disk = weights_on_disk(run_dir)
    assert len(on_disk) == 5
    sums = {}
    real = train_gates.train

    def check(module, batch_at, config, folder, label):
        models = {
            "seed": module.seed,
            **{str(number): expert for number, expert in enumerate(getattr(module, "experts", []))},
        }
        sums[label] = {name: checksum(model.weights()) for name, model in models.items()}
        metrics = real(module, batch_at, config, folder, label)
        assert {name: checksum(model.weights()) for name, model in models.items()} == sums[label]
        return metrics

    monkeypatch.setattr(train_gates, "train", check)
    train_gates.run(config, run_dir)
    assert list(sums) == [
        *(f"gates independent {number:03d}" for number in range(3)),
        "gates joint",
        "gates contrastive",
    ]
    assert weights_on_disk(run_dir) == on_disk


def test_an_independent_gate_is_trained_on_its_own_cluster_and_expert_alone(expert_run, copied_run, config, calls):
    run_dir = copied_run(expert_run)
    train_gates.run(config, run_dir)
    tokens = [
        set(torch.cat([batch_at(step) for step in range(20)]).flatten().tolist()) for _, batch_at in calls.values()
    ]
    for number in range(3):
        assert tokens[3] - tokens[number]
        assert not tokens[number] <= tokens[(number + 1) % 3]  # each kind has words of its own
    for number in range(3):
        (expert,) = calls[f"gates independent {number:03d}"][0].experts
        own = Decoder.from_weights(
            *read_model(run_dir, ExpertManifest.read(run_dir, f"experts/{number:03d}"), f"experts/{number:03d}")
        )
        assert checksum(expert.weights()) == checksum(own.weights())
    assert len(calls["gates joint"][0].experts) == 3


def test_a_second_call_trains_nothing(gated_run, config, calls):
    assert train_gates.run(config, gated_run) == GatesManifest.read(gated_run)
    assert not calls


def test_the_same_settings_give_the_same_bytes(gated_run, copied_run, config):
    run_dir = copied_run(gated_run)
    before = GatesManifest.read(run_dir)
    assert train_gates.run(config, run_dir, force=True).content_digest() == before.content_digest()


def test_a_changed_setting_is_refused_by_name_and_forced(gated_run, copied_run, config, calls):
    run_dir = copied_run(gated_run)
    other = config.model_copy(update={"reading": GateReading(layer=2)})
    with pytest.raises(UsageFailure, match=r"layer was null and is now 2: give --force"):
        train_gates.run(other, run_dir)
    assert not calls
    assert train_gates.run(other, run_dir, force=True).metrics.layer == 2


def test_a_layer_the_seed_does_not_have_is_refused(expert_run, copied_run, config):
    with pytest.raises(UsageFailure, match="--layer 3 is beyond the seed's 2 layers"):
        train_gates.run(config.model_copy(update={"reading": GateReading(layer=3)}), copied_run(expert_run))


def test_one_mode_alone_writes_its_own_gates(gated_run, expert_run, copied_run, config):
    run_dir = copied_run(expert_run)
    train_gates.run(config.model_copy(update={"modes": ("joint",)}), run_dir)
    gates = gates_of(run_dir)
    assert set(gates) == {"joint.bias", "joint.vectors"}
    assert torch.equal(gates["joint.vectors"], gates_of(gated_run)["joint.vectors"])  # whatever was trained before it


def test_an_expert_equal_to_the_seed_is_refused_in_one_line(seeded_run, copied_run, config, training):
    run_dir = copied_run(seeded_run)
    still = training.model_copy(update={"steps": 1, "learning_rate": 1e-30})
    train_experts.run(ExpertsConfig(training=still, dense=False), run_dir)
    with pytest.raises(InputFailure, match="expert 0 equals the seed, so its gate has nothing to learn") as refused:
        train_gates.run(config, run_dir)
    assert "\n" not in str(refused.value)


def test_a_changed_expert_is_refused(expert_run, copied_run, config):
    run_dir = copied_run(expert_run)
    path = run_dir / "experts" / "001" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityFailure, match=r"experts/001/model.safetensors was changed"):
        train_gates.run(config, run_dir)


def test_gates_do_not_pass_for_those_of_an_expert_trained_again(gated_run, copied_run, config, training):
    run_dir = copied_run(gated_run)
    other = ExpertsConfig(training=training.model_copy(update={"seed": 9}))
    train_experts.run(other.model_copy(update={"expert": "1"}), run_dir, force=True)
    with pytest.raises(UsageFailure, match=r"no experts in .*: run `cpipe train-experts"):
        train_gates.run(config, run_dir)
    train_experts.run(other, run_dir, force=True)
    with pytest.raises(UsageFailure, match="its input experts/000 has changed: give --force"):
        train_gates.run(config, run_dir)


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_deepspeed_gives_the_same_gates(stage, gated_run, expert_run, copied_run, config):
    run_dir = copied_run(expert_run)
    training = config.training.model_copy(update={"engine": "deepspeed", "zero_stage": stage})
    manifest = train_gates.run(config.model_copy(update={"training": training}), run_dir)
    for name, tensor in gates_of(gated_run).items():
        torch.testing.assert_close(gates_of(run_dir)[name], tensor, atol=1e-4, rtol=0)
    for own, other in zip(manifest.metrics.runs, GatesManifest.read(gated_run).metrics.runs, strict=True):
        assert own.openness == pytest.approx(other.openness, abs=1e-3)


def test_interrupted_between_gates_it_ends_with_the_same_bytes(gated_run, expert_run, copied_run, config, monkeypatch):
    run_dir = copied_run(expert_run)
    real = train_gates.train

    def interrupted(module, batch_at, config, folder, label):
        if label == "gates independent 002":
            raise KeyboardInterrupt
        return real(module, batch_at, config, folder, label)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train_gates, "train", interrupted)
        train_gates.run(config, run_dir)
    assert train_gates.run(config, run_dir).outputs == GatesManifest.read(gated_run).outputs


def test_contrastive_gates_know_their_clusters_and_mean_vectors_are_means(expert_run, copied_run, config, calls):
    run_dir = copied_run(expert_run)
    train_gates.run(config, run_dir)
    module, batch_at = calls["gates contrastive"]
    rows = torch.cat([batch_at(step) for step in range(100, 110)])
    ids, clusters = rows[:, :-2], rows[:, -1]
    assert clusters.bincount().tolist() == [20, 20, 20]
    with torch.no_grad():
        read = module.gates.read(module.seed, ids)
        found = module.gates.scores(read).argmax(-1)
    assert (found == clusters[:, None]).float().mean() > 0.8
    single = calls["gates independent 001"][1]
    total = torch.zeros(32)
    for step in range(TRAINING.steps):  # a third of the rows that the independent gate saw
        with torch.no_grad():
            total += module.gates.read(module.seed, single(step)[:, :-1].reshape(6, -1)).mean((0, 1))
    expected = total / TRAINING.steps
    found = gates_of(run_dir)["mean-activation.vectors"][1]
    assert torch.cosine_similarity(found, expected, 0) > 0.99


def test_gates_see_the_documents_that_two_experts_share(expert_run, copied_run, config, calls):
    run_dir = copied_run(expert_run)
    clusters = ClusterManifest.read(run_dir)
    cluster_documents.run(clusters.config.model_copy(update={"overlap": 0.3}), run_dir, force=True)
    shared = ClusterManifest.read(run_dir)
    assert shared.config.overlap == 0.3
    frozen, alone = (train_gates.Frozen(config, path) for path in (run_dir, expert_run))
    assert sum(frozen.rows(number).tokens for number in range(3)) > sum(
        alone.rows(number).tokens for number in range(3)
    )
    assert frozen.rows(None).tokens == alone.rows(None).tokens


def test_gates_write_no_text(expert_run, copied_run, config):
    training = config.training.model_copy(update={"sample_every": 5})
    asked = config.model_copy(update={"modes": ("joint",), "training": training})
    with pytest.raises(UsageFailure, match="gates joint cannot write text while it is trained: leave --sample-every"):
        train_gates.run(asked, copied_run(expert_run))


def test_the_gates_of_one_expert_are_a_job_of_their_own(gated_run, expert_run, copied_run, config):
    run_dir = copied_run(expert_run)
    shutil.rmtree(run_dir / "experts/000")  # other machines have them
    (run_dir / "experts/manifest.json").unlink()
    train_gates.run(config.model_copy(update={"expert": 1}), run_dir)
    for mode in ("independent", "mean-activation"):
        own, other = (GateManifest.read(run, f"gates/{mode}/001") for run in (run_dir, gated_run))
        assert own.content_digest() == other.content_digest()
    assert not (run_dir / "gates/manifest.json").exists()
    assert not (run_dir / "gates/independent/000").exists()


def test_one_experts_gates_are_not_asked_for_wrongly(expert_run, copied_run, config):
    run_dir = copied_run(expert_run)
    with pytest.raises(UsageFailure, match="--expert 3 is not one of the 3 experts"):
        train_gates.run(config.model_copy(update={"expert": 3}), run_dir)
    with pytest.raises(UsageFailure, match="gates learnt as joint know of all experts: leave --expert out"):
        train_gates.run(config.model_copy(update={"expert": 1, "modes": ("joint",)}), run_dir)


def test_force_does_again_what_is_not_as_asked_for_and_leaves_the_rest(gated_run, copied_run, config, training, calls):
    run_dir = copied_run(gated_run)
    again = ExpertsConfig(training=training.model_copy(update={"seed": 9}), expert="1")
    train_experts.run(again, run_dir, force=True)
    shutil.copy(gated_run / "experts/manifest.json", run_dir / "experts/manifest.json")
    with pytest.raises(UsageFailure, match="gates/independent/001 is finished, but its input experts/001 has changed"):
        train_gates.run(config, run_dir)
    assert not calls
    train_gates.run(config, run_dir, force=True)
    assert list(calls) == ["gates independent 001"]
    calls.clear()
    train_gates.run(config, run_dir, force=True)
    assert len(calls) == 5  # all of them


@pytest.mark.parametrize("place", ["layer", "module"])
def test_gates_inside_full_experts_stand_at_their_mlps(place, expert_run, copied_run, config):
    run_dir = copied_run(expert_run)
    modes = ("independent", "joint", "mean-activation", *(("arrow",) if place == "module" else ()))
    asked = config.model_copy(update={"places": (place,), "modes": modes})
    manifest = train_gates.run(asked, run_dir)
    gates = gates_of(run_dir)
    path = "model.layers.{}" if place == "layer" else "model.layers.{}.mlp"
    assert set(gates) == {f"{place}-{mode}.{path.format(layer)}.vectors" for mode in modes for layer in (0, 1)}
    assert all(tensor.shape == (3, 32) and (tensor.abs().amax(1) > 0).all() for tensor in gates.values())
    assert [(run.mode, run.expert) for run in manifest.metrics.runs[:4]] == [
        ("independent", 0), ("independent", 1), ("independent", 2), ("joint", None),
    ]  # fmt: skip
    for run in manifest.metrics.runs[:4]:
        assert sum(run.openness) == pytest.approx(1, abs=1e-3)
    parts = RunModels.find(run_dir).routed(place, "joint")
    decoder = RoutedDecoder.from_parts(**parts, weigh=Gates.log_weights)
    for name, found in decoder.gate_tensors().items():
        assert torch.equal(found, gates[f"{place}-joint.{name}"])


def test_an_arrow_is_for_modules():
    with pytest.raises(ValueError, match="mode arrow reads the weights of modules: add module to places"):
        GatesConfig(modes=("arrow",))
    assert list(GatesConfig(modes=("arrow", "joint"), places=("layer", "module")).kinds()) == [
        ("layer", "joint"), ("module", "arrow"), ("module", "joint"),
    ]  # fmt: skip


def test_a_run_without_the_gates_asked_for_tells_which_it_has(gated_run):
    with pytest.raises(UsageFailure, match=r"has no gates module-joint \(there: independent, joint, "):
        RunModels.find(gated_run).routed("module", "joint")


def test_a_process_that_comes_after_the_leader_leaves_the_finished_manifest(expert_run, copied_run, monkeypatch):
    run_dir, config = copied_run(expert_run), GatesConfig(modes=("mean-activation",), training=TRAINING)
    expected = train_gates.run(config, run_dir)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(stage_folder, "WRITING", 1.0)
    assert train_gates.run(config, run_dir, force=True) == expected
    assert GatesManifest.read(run_dir) == expected
