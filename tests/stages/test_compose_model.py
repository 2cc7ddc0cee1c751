import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from schemas.central import CentralConfig, CentralShape
from schemas.compose_model import BridgeConfig, BridgeTraining, CentralAloneManifest, ComposeConfig, ComposeManifest
from schemas.failures import InterruptedFailure, UsageFailure
from schemas.files import FileRef
from schemas.progress import find_progress
from schemas.train_gates import GatesConfig
from schemas.training import TrainingConfig
from stages import compose_model, train_gates
from stages.artifacts.run_models import RunModels
from stages.nn.composed import ComposedModel

TRAINING = TrainingConfig(
    steps=6, batch_size=6, sequence_length=32, learning_rate=5e-3, engine="torch", precision="fp32", log_every=3,
    checkpoint_every=2,
)  # fmt: skip
CENTRAL = CentralShape(
    group_length=4, latents_per_group=2, encoder_layers=1, latent_layers=2, decoder_layers=2, token_window=8,
    plan_horizon=2,
)  # fmt: skip


def settings(**changes):
    values = {
        "central": CENTRAL,
        "training": TRAINING,
        "gates": "none",
        "bridge_training": BridgeTraining(bridge_steps=5, bridge_batch_size=6, bridge_learning_rate=5e-3),
    }
    return ComposeConfig(**(values | changes))


@pytest.fixture(scope="module")
def gated_run(expert_run, tmp_path_factory):
    run_dir = shutil.copytree(expert_run, tmp_path_factory.mktemp("runs") / "gated")
    training = TRAINING.model_copy(update={"steps": 3, "weight_decay": 0.0})
    train_gates.run(GatesConfig(modes=("joint",), training=training), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def composed_run(gated_run, tmp_path_factory):
    run_dir = shutil.copytree(gated_run, tmp_path_factory.mktemp("runs") / "composed")
    compose_model.run(settings(gates="joint"), run_dir)
    return run_dir


def weights(run_dir, folder="central"):
    return load_file(run_dir / folder / "model.safetensors")


def test_both_trainings_are_finished_stages_that_say_what_they_came_to(composed_run):
    alone, composed = CentralAloneManifest.read(composed_run), ComposeManifest.read(composed_run)
    assert alone.metrics.training.steps == 6 and composed.metrics.training.steps == 5
    assert alone.schema_id == "cpipe.compose-alone/1" and composed.schema_id == "cpipe.compose/2"
    assert composed.metrics.experts == 3
    assert composed.metrics.parameters == alone.metrics.parameters + composed.metrics.bridge_parameters
    assert composed.metrics.trained_parameters == composed.metrics.parameters
    assert composed.metrics.usage.without_bridges != composed.metrics.usage.whole
    assert {ref.name for ref in composed.inputs} == {"tokens", "seed", "experts", "gates", "central-alone"}
    assert not list(composed_run.rglob("checkpoints"))


def test_what_is_written_is_the_model_without_experts_and_loads(composed_run):
    from stages.nn.decoder import Decoder

    saved = weights(composed_run)
    assert not [name for name in saved if not name.startswith(("central.", "bridges."))]
    shapes = json.loads((composed_run / "central/config.json").read_text())
    central, bridges = CentralConfig.from_mapping(shapes["central"]), BridgeConfig.from_mapping(shapes["bridges"])
    from schemas.decoder import DecoderConfig

    seed = DecoderConfig.from_huggingface(json.loads((composed_run / "seed/config.json").read_text()))
    saved = {name: tensor for name, tensor in saved.items() if "prior.weight_F" not in name}
    with pytest.raises(RuntimeError, match="weight_F"):  # the gate is a prior: the model says when it is missing
        ComposedModel.from_weights(central, bridges, saved, [Decoder(seed)] * 3)


def test_up_to_date_means_nothing_is_done(composed_run):
    before = (composed_run / "central/model.safetensors").stat().st_mtime_ns
    compose_model.run(settings(gates="joint"), composed_run)
    assert (composed_run / "central/model.safetensors").stat().st_mtime_ns == before


def test_a_second_composition_lies_beside_the_first_and_shares_the_central_model(composed_run, copied_run):
    run_dir = copied_run(composed_run)
    before = (run_dir / "central-alone/manifest.json").stat().st_mtime_ns
    compose_model.run(settings(name="central-calm", bridges=BridgeConfig(bridge="calm")), run_dir)
    control = compose_model.run(settings(name="central-control", experts="seed-copies"), run_dir)
    assert (run_dir / "central-alone/manifest.json").stat().st_mtime_ns == before
    first, second = ComposeManifest.read(run_dir), ComposeManifest.read(run_dir, "central-calm")
    assert second.metrics.frozen_checksum == first.metrics.frozen_checksum != control.metrics.frozen_checksum
    assert any("q_proj" in name for name in weights(run_dir, "central-calm") if name.startswith("bridges."))


def test_forcing_a_composition_keeps_a_central_model_that_is_as_asked(composed_run, copied_run):
    run_dir = copied_run(composed_run)
    before = (run_dir / "central-alone/manifest.json").stat().st_mtime_ns
    own = BridgeTraining(bridge_steps=2, bridge_batch_size=6, train="bridges")
    again = compose_model.run(settings(bridge_training=own), run_dir, force=True)
    assert (run_dir / "central-alone/manifest.json").stat().st_mtime_ns == before
    assert again.metrics.trained_parameters == again.metrics.bridge_parameters
    alone, composed = weights(run_dir, "central-alone"), weights(run_dir)
    assert all(torch.equal(composed[f"central.{name}"], tensor) for name, tensor in alone.items())
    other = settings(central=CENTRAL.model_copy(update={"plan_horizon": 1}))
    with pytest.raises(UsageFailure, match="plan_horizon was 2 and is now 1"):
        compose_model.run(other, run_dir)


def test_interrupted_and_resumed_ends_with_the_same_bytes(composed_run, gated_run, copied_run, monkeypatch):
    run_dir = copied_run(gated_run)
    real, calls = compose_model.train, []

    def stops_halfway(module, batch_at, training, folder, label, **more):
        calls.append(label)

        def batch(step):
            if len(calls) in (1, 3) and step == 3:  # each of the two trainings once
                raise InterruptedFailure(label)
            return batch_at(step)

        return real(module, batch, training, folder, label, **more)

    monkeypatch.setattr(compose_model, "train", stops_halfway)
    for _ in range(2):
        with pytest.raises(InterruptedFailure):
            compose_model.run(settings(gates="joint"), run_dir)
    compose_model.run(settings(gates="joint"), run_dir)
    assert calls == ["central-alone", "central-alone", "central", "central"]
    for name in ("central-alone", "central"):
        assert (run_dir / name / "model.safetensors").read_bytes() == (
            composed_run / name / "model.safetensors"
        ).read_bytes()


def test_the_central_model_starts_from_the_seed(gated_run, copied_run):
    run_dir = copied_run(gated_run)
    slow = TRAINING.model_copy(update={"steps": 1, "learning_rate": 1e-9})
    compose_model.run(settings(training=slow), run_dir)
    own, seed = weights(run_dir, "central-alone"), weights(run_dir, "seed")
    torch.testing.assert_close(own["embed_tokens.weight"], seed["model.embed_tokens.weight"])
    torch.testing.assert_close(own["decoder.1.mlp.up_proj.weight"], seed["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gates": "independent"}, "--gates joint"),
        ({"central": CENTRAL.model_copy(update={"group_length": 20})}, "--sequence-length 40"),
        ({"central": CENTRAL.model_copy(update={"central_width": 12})}, "central_width 12"),
        ({"training": TRAINING.model_copy(update={"mask_documents": True})}, "--mask-documents is for decoders"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(gated_run, copied_run, changes, message):
    with pytest.raises(UsageFailure, match=message) as caught:
        compose_model.run(settings(**changes), copied_run(gated_run))
    assert "\n" not in str(caught.value)


def test_gates_inside_the_model_alone_weigh_no_experts(layer_gated_run, copied_run):
    run_dir = copied_run(layer_gated_run)
    with pytest.raises(UsageFailure, match=r"no gates at the inputs of experts \(there: layer-joint\): run `cpipe tr"):
        compose_model.run(settings(gates="joint"), run_dir)
    assert not (run_dir / "central-alone").exists()
    assert compose_model.run(settings(), run_dir).metrics.experts == 3  # which asks for none


@pytest.mark.parametrize("name", ["tokens", "central-alone", "central/x", "..", "central-", "centralist"])
def test_a_composition_cannot_take_another_stages_folder(name):
    with pytest.raises(ValueError, match="central-<word>"):
        ComposeConfig(name=name)


def test_a_central_model_writes_no_text_while_it_is_trained(gated_run, composed_run, copied_run, tmp_path):
    asked = settings(gates="joint", name="central-b", training=TRAINING.model_copy(update={"sample_every": 2}))
    with pytest.raises(UsageFailure, match=r"^central-alone cannot write text .*: leave --sample-every out"):
        compose_model.run(asked, copied_run(gated_run))
    with pytest.raises(UsageFailure, match=r"^central-b cannot write text while it is trained"):
        compose_model.run(asked, shutil.copytree(composed_run, tmp_path / "composed"))


def test_a_composition_from_before_there_was_a_head_is_one_of_states(composed_run, copied_run):
    run_dir = copied_run(composed_run)
    shutil.rmtree(run_dir / "central")
    asked = settings(gates="joint", bridges=BridgeConfig(head="states"))
    new = compose_model.run(asked, run_dir)
    path = run_dir / "central/manifest.json"
    content = json.loads(path.read_bytes())
    del content["config"]["bridges"]["head"], content["digest"]
    path.write_text(json.dumps(content | {"schema": "cpipe.compose/1"}))
    old = ComposeManifest.read(run_dir)
    assert old.config == asked and old.schema_id == new.schema_id
    (step,) = find_progress([("compose", settings(gates="joint"))], run_dir)
    assert 'bridges.head was "states" and is now "predictions"' in step.why
    shapes = json.loads((run_dir / "central/config.json").read_text())
    del shapes["bridges"]["head"]
    (run_dir / "central/config.json").write_text(json.dumps(shapes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileRef, "check", lambda self, folder: folder / self.path)  # it is not the file that was written
        assert RunModels.find(run_dir).composition("central")["bridges"] == BridgeConfig(head="states")


def test_kept_features_change_no_byte_and_spare_the_experts_of_the_next_composition(gated_run, tmp_path, monkeypatch):
    bridges = {"stitch": "central", "calm": "central-calm"}
    expected, found = {}, {}
    for cached, result in ((0.0, expected), (1.0, found)):
        run_dir = shutil.copytree(gated_run, tmp_path / f"run-{cached}")
        for bridge, name in bridges.items():
            asked = settings(gates="joint", name=name, bridges=BridgeConfig(bridge=bridge), feature_cache=cached)
            if result and cached:  # nothing is left to ask the experts: the files are there
                monkeypatch.setattr(ComposedModel, "consult", consulted_after_training(ComposedModel.consult))
            compose_model.run(asked, run_dir)
            result[name] = (run_dir / name / "model.safetensors").read_bytes()
    assert found == expected
    assert not (tmp_path / "run-0.0" / "features").exists()
    assert len([*(run_dir / "features").rglob("*.safetensors")]) == 5  # a batch a step, of both compositions


def consulted_after_training(consult):
    def refused(self, *args):
        assert not self.training, "the experts run in training"
        return consult(self, *args)

    return refused


@pytest.mark.parametrize(("change", "told"), [({"compile": "on"}, "--compile on"), ({"zero_stage": 3}, "ZeRO 3")])
def test_kept_features_are_refused_where_they_cannot_be_the_same(change, told):
    training = TRAINING.model_copy(update={"engine": "deepspeed"} | change)
    with pytest.raises(ValueError, match=f"--feature-cache does not go with {told}"):
        settings(training=training, feature_cache=1.0)
