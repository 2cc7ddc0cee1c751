import json
import shutil

import pytest
import torch

from schemas.failures import IntegrityFailure, UsageFailure
from schemas.train_experts import ExpertsConfig
from stages import train_experts
from stages.artifacts.run_models import RunModels, expert_folder
from stages.nn.central import CentralModel
from stages.nn.composed import ComposedModel, SeedGate
from stages.nn.decoder import Decoder

IDS = torch.arange(3, 15)[None]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_all_models_of_a_run_are_found(full_run):
    models = RunModels.find(full_run)
    assert len(models.experts) == 3
    assert models.dense and models.gates and models.central
    assert list(models.compositions) == ["central", "central-calm", "central-control"]
    assert [ref.name for ref in models.as_inputs()] == [
        "seed", "experts/000", "experts/001", "experts/002", "dense", "gates", "central-alone", "central",
        "central-calm", "central-control",
    ]  # fmt: skip
    assert len({ref.digest for ref in models.as_inputs()}) == 10


def test_what_has_not_been_made_is_none(expert_run, copied_run):
    run_dir = copied_run(expert_run)
    shutil.rmtree(run_dir / "dense")
    (run_dir / "central").mkdir()  # begun, not finished
    models = RunModels.find(run_dir)
    assert (models.dense, models.gates, models.central, models.compositions) == (None, None, None, {})
    assert models.gate_tensors() == {}
    assert [ref.name for ref in models.as_inputs()] == ["seed", "experts/000", "experts/001", "experts/002"]


@pytest.mark.parametrize("folder", ["seed", "dense", "experts/001"])
def test_decoders_are_those_on_disk(full_run, folder):
    from safetensors.torch import load_file

    shape, weights = RunModels.find(full_run).decoder(folder)
    saved = load_file(full_run / folder / "model.safetensors")
    assert weights.keys() == saved.keys() and all(torch.equal(weights[name], saved[name]) for name in saved)
    assert Decoder.from_weights(shape, weights)(IDS).shape == (1, 12, shape.vocab_size)


def test_a_model_is_read_once(full_run):
    models = RunModels.find(full_run)
    assert models.decoder("seed") is models.decoder("seed")


def test_a_composition_is_put_together_as_it_was_trained(full_run):
    models = RunModels.find(full_run)
    composed = {name: ComposedModel.from_parts(**models.composition(name)) for name in models.compositions}
    assert {name: model.config.bridge for name, model in composed.items()} == {
        "central": "stitch", "central-calm": "calm", "central-control": "stitch",
    }  # fmt: skip
    assert isinstance(composed["central"].gate, SeedGate) and composed["central"].gate.gates.mode == "joint"
    assert composed["central-control"].gate.gates.mode == "independent"
    assert composed["central-calm"].gate is None
    seed, expert = models.decoder("seed")[1], models.decoder("experts/002")[1]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(composed["central"].decoders[2].state_dict()[name], expert[name])
    assert torch.equal(composed["central-control"].decoders[2].state_dict()[name], seed[name])


def test_a_composition_with_its_bridges_out_is_its_central_model(full_run):
    models = RunModels.find(full_run)
    composed = ComposedModel.from_parts(**models.composition("central"))
    without = composed(IDS, ablate=frozenset({"bridges"})).logits_BTV
    assert torch.equal(composed.central(IDS).logits_BTV, without)
    alone = CentralModel.from_weights(*models.central_alone()).eval()
    assert not torch.equal(alone(IDS).logits_BTV, without)  # it was trained on, with the experts


def test_what_is_not_there_is_refused_in_one_line(full_run, expert_run):
    with pytest.raises(UsageFailure, match=r"'none' .*there: central, central-calm, central-control"):
        RunModels.find(full_run).composition("none")
    with pytest.raises(UsageFailure, match=r"no central model in .*: run `cpipe compose"):
        RunModels.find(expert_run).central_alone()
    with pytest.raises(UsageFailure, match=r"no experts/003 in .*: run `cpipe train-experts"):
        RunModels.find(expert_run).decoder(expert_folder(3))


def test_members_without_their_common_manifest_are_not_enough(expert_run, copied_run):
    run_dir = copied_run(expert_run)
    (run_dir / "experts/manifest.json").unlink()
    with pytest.raises(UsageFailure, match=r"no experts in .*: run `cpipe train-experts"):
        RunModels.find(run_dir)


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("seed/model.safetensors", lambda models: models.decoder("seed")),
        ("experts/001/model.safetensors", lambda models: models.decoder("experts/001")),
        ("gates/gates.safetensors", lambda models: models.gate_tensors()),
        ("central-alone/model.safetensors", lambda models: models.central_alone()),
        ("central/model.safetensors", lambda models: models.composition("central")),
        ("central/config.json", lambda models: models.composition("central")),
    ],
)
def test_a_flipped_bit_is_found_before_the_weights_are_used(full_run, copied_run, file, read):
    run_dir = copied_run(full_run)
    flip_a_bit(run_dir / file)
    with pytest.raises(IntegrityFailure, match=f"{file} was changed after it was written"):
        read(RunModels.find(run_dir))


def test_ancestors_that_are_still_there_are_no_matter(full_run):
    RunModels.find(full_run).refuse_other_ancestors([])


def test_models_made_from_others_are_refused_by_name(full_run, copied_run, training):
    run_dir = copied_run(full_run)
    other = training.model_copy(update={"steps": 2})
    train_experts.run(ExpertsConfig(training=other), run_dir, force=True)
    with pytest.raises(UsageFailure, match=r"gates was made from another experts .*`cpipe train-gates .* --force`"):
        RunModels.find(run_dir).refuse_other_ancestors([])


def test_experts_of_another_clustering_are_refused(full_run, copied_run):
    from schemas.cluster_documents import ClusterManifest
    from schemas.manifest import InputRef

    clusters = ClusterManifest.read(full_run).as_input()
    RunModels.find(full_run).refuse_other_ancestors([clusters])
    other = InputRef(name="clusters", digest="sha256:" + "0" * 64)
    with pytest.raises(UsageFailure, match="experts/000 was made from another clusters"):
        RunModels.find(full_run).refuse_other_ancestors([other])


def test_a_manifest_of_a_newer_version_is_refused(full_run, copied_run):
    run_dir = copied_run(full_run)
    path = run_dir / "gates/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": "cpipe.train-gates/9"}))
    with pytest.raises(IntegrityFailure, match="upgrade cpipe"):
        RunModels.find(run_dir)


def test_a_composition_over_replaced_experts_is_refused_and_the_others_are_not(full_run, copied_run):
    run_dir = copied_run(full_run)
    path = run_dir / "central" / "manifest.json"
    content = json.loads(path.read_text())
    (experts,) = (ref for ref in content["inputs"] if ref["name"] == "experts")
    experts["digest"] = "sha256:" + "0" * 64
    path.write_text(json.dumps(content))
    models = RunModels.find(run_dir)
    with pytest.raises(UsageFailure, match="central was made from another experts than is there now: run `cpipe comp"):
        models.composition("central")
    assert models.composition("central-calm")["experts"]


@pytest.mark.parametrize("folder", ["experts/001", "dense"])
def test_a_model_of_another_seed_is_refused_in_one_line(folder, expert_run, copied_run):
    run_dir = copied_run(expert_run)
    path = run_dir / "seed/manifest.json"
    path.write_text(path.read_text().replace('"parameters": ', '"parameters": 1'))
    with pytest.raises(UsageFailure, match=f"{folder} was trained from another seed than is there now: run `cpipe "):
        RunModels.find(run_dir).decoder(folder)
