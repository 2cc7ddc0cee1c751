import json
import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from schemas.compose_model import CentralAloneManifest, ComposeManifest
from schemas.decoder import DecoderConfig
from schemas.evaluate_models import EvaluateManifest
from schemas.export_model import ExportConfig
from schemas.failures import UsageFailure
from schemas.import_model import ImportConfig
from schemas.plan_training import PlanConfig
from schemas.train_experts import ExpertManifest, ExpertsConfig, ExpertsManifest, LoraConfig
from schemas.train_gates import GatesManifest
from schemas.train_seed import SeedConfig, SeedManifest
from stages import compose_model, export_model, import_model, plan_training, train_experts
from stages.artifacts.model_folder import read_model
from stages.engine.checkpoints import KEPT
from stages.engine.engines import start_engine
from stages.engine.loop import train
from stages.engine.optimizer import build_optimizer
from stages.engine.schedule import peak_rate
from stages.nn.decoder import Decoder, NextTokenLoss
from stages.nn.lora import add_adapters
from stages.nn.planning import cost_of_pass

FACTOR = 1.5  # between the memory planned and the memory measured
SPEED = 1e9


@pytest.fixture(scope="module")
def config(evaluated_run):
    """What the run was made with."""
    names = ("central", "central-calm", "central-control")
    return PlanConfig(
        seed=SeedManifest.read(evaluated_run).config,
        experts=ExpertsManifest.read(evaluated_run).config,
        gates=GatesManifest.read(evaluated_run).config,
        compositions=tuple(ComposeManifest.read(evaluated_run, name).config for name in names),
        flops_per_second=SPEED,
    )


@pytest.fixture(scope="module")
def planned(config, evaluated_run):
    """What the whole run is planned to cost, by name; the run is found untouched."""
    before = files(evaluated_run)
    found = {each.name: each for each in plan_training.run(config, evaluated_run).trainings}
    assert files(evaluated_run) == before
    return found


def files(run_dir):
    return {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}


def test_every_training_of_the_run_is_planned_and_no_other(planned, evaluated_run):
    modes = ("independent", "joint", "contrastive")
    compositions = ["central-alone", "central", "central-calm", "central-control"]
    assert list(planned) == ["seed", "experts", "dense", *(f"gates {mode}" for mode in modes), *compositions]
    assert (planned["experts"].count, planned["gates independent"].count, planned["gates joint"].count) == (3, 3, 1)


def test_parameters_and_tokens_are_those_that_training_reports(planned, evaluated_run):
    seed, experts = SeedManifest.read(evaluated_run).metrics, ExpertsManifest.read(evaluated_run).metrics
    assert planned["seed"].parameters == planned["seed"].trained_parameters == seed.parameters
    assert planned["seed"].tokens == seed.training.tokens
    assert planned["experts"].tokens * planned["experts"].count == experts.tokens
    assert planned["dense"].tokens == experts.dense_tokens
    for run in GatesManifest.read(evaluated_run).metrics.runs:
        assert planned[f"gates {run.mode}"].tokens == run.training.tokens
    assert planned["central-alone"].parameters == CentralAloneManifest.read(evaluated_run).metrics.parameters
    for name in ("central", "central-calm", "central-control"):
        manifest = ComposeManifest.read(evaluated_run, name)
        found, bias = manifest.metrics, 3 if manifest.config.gates == "joint" else 0
        assert planned[name].trained_parameters == found.trained_parameters
        gate = 0 if name == "central-calm" else seed.parameters + 3 * 32 + bias
        assert planned[name].parameters == found.parameters + found.expert_parameters + gate
        assert planned[name].tokens == found.training.tokens


@pytest.mark.parametrize(("kind", "trained"), [("full", "all"), ("lora", "bridges")])
def test_rates_are_those_that_training_takes(config, evaluated_run, copied_run, monkeypatch, kind, trained):
    """Of the very modules that are trained; the settings of the seed are others than those of the run's."""
    run_dir, found = copied_run(evaluated_run), {}
    free = {"learning_rate": None, "steps": 5}
    experts, first = config.experts, config.compositions[0]
    experts = ExpertsConfig(kind=kind, training=experts.training.model_copy(update=free))
    bridges = first.bridge_training.model_copy(update={"train": trained, "bridge_learning_rate": None})
    changes = {"training": first.training.model_copy(update=free), "bridge_training": bridges, "name": "central-free"}
    composition = first.model_copy(update=changes)
    seed = config.seed.model_copy(update={"training": config.seed.training.model_copy(update=free)})
    asked = config.model_copy(update={"seed": seed, "experts": experts, "compositions": (composition,)})
    planned = {each.name: each.learning_rate for each in plan_training.run(asked, run_dir).trainings}

    def look(module, batch_at, training, folder, label, *_, seen=0):
        found[label] = peak_rate(training, module, seen)
        if label != "central-alone":
            raise KeyboardInterrupt
        return train(module, batch_at, training, folder, label, seen=seen)

    for stage in (compose_model, train_experts):
        monkeypatch.setattr(stage, "train", look)
    for ask in (
        partial(compose_model.run, composition),
        *(partial(train_experts.run, experts.model_copy(update={"expert": name})) for name in ("0", "dense")),
    ):
        with pytest.raises(KeyboardInterrupt):
            ask(run_dir, force=True)
    names = {
        "experts": "experts/000",
        "dense": "dense",
        "central-alone": "central-alone",
        "central-free": "central-free",
    }
    assert {name: planned[name] for name in names} == {name: found[label] for name, label in names.items()}


def test_operations_are_those_that_the_evaluation_reports(planned, evaluated_run):
    rows = {row.model: row for row in EvaluateManifest.read(evaluated_run).metrics.rows}
    assert planned["seed"].flops == pytest.approx(rows["seed"].training_flops, rel=1e-6)
    assert planned["seed"].flops + planned["dense"].flops == pytest.approx(rows["dense"].training_flops, rel=1e-6)
    experts = planned["experts"].count * planned["experts"].flops
    assert planned["seed"].flops + experts == pytest.approx(rows["weight average"].training_flops, rel=1e-6)


def test_epochs_are_those_that_training_reports(planned, evaluated_run):
    dense = ExpertManifest.read(evaluated_run, "dense").metrics
    assert planned["dense"].epochs == pytest.approx(dense.epochs, rel=1e-3)
    experts = [ExpertManifest.read(evaluated_run, f"experts/{number:03d}").metrics.epochs for number in range(3)]
    assert planned["experts"].epochs == pytest.approx(sum(experts) / 3, rel=0.2)


def test_the_time_is_operations_over_speed_and_devices(config, evaluated_run, planned):
    experts = planned["experts"]
    assert experts.seconds == pytest.approx(3 * experts.flops / SPEED)
    assert plan_seed(config, evaluated_run, processes=2).seconds == pytest.approx(planned["seed"].seconds / 2)


def test_the_speed_is_measured_where_none_is_given_and_nothing_is_written(config, evaluated_run):
    before = files(evaluated_run)
    asked = brief(config).model_copy(update={"flops_per_second": None, "seconds": 0.1})
    measured = plan_training.run(asked, evaluated_run)
    assert measured.measured and 1e6 < measured.flops_per_second < 1e15
    assert files(evaluated_run) == before


@pytest.mark.parametrize(
    ("changes", "optimizer", "micro_batches"),
    [
        ({}, "muon", 1),
        ({"zero_stage": 1}, "muon", 1),
        ({"zero_stage": 3}, "adamw", 1),
        ({"micro_batch_size": 2}, "muon", 3),
    ],
)
def test_the_speed_is_that_of_whole_steps_with_the_optimizer_of_the_training(
    config, evaluated_run, monkeypatch, changes, optimizer, micro_batches
):
    def started(module, training, place):
        engine = start_engine(module, training, place)
        monkeypatch.setattr(engine, "step", lambda batch, rate: found.append((training.optimizer, len(batch))))
        return engine

    found: list[tuple[str, int]] = []
    monkeypatch.setattr(plan_training, "start_engine", started)
    training = config.seed.training.model_copy(update=changes)
    seed = config.seed.model_copy(update={"training": training})
    asked = brief(config).model_copy(update={"seed": seed, "flops_per_second": None, "seconds": 0.01})
    plan_training.run(asked, evaluated_run)
    assert set(found) == {(optimizer, micro_batches)}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_disk_holds_the_model_and_the_checkpoints_of_what_the_optimizer_keeps(config, evaluated_run, optimizer):
    found = plan_seed(config, evaluated_run, optimizer=optimizer)
    checkpoint = 4 * found.parameters + found.memory.optimizer
    assert found.disk == 4 * found.parameters + (KEPT + 1) * checkpoint


@pytest.mark.parametrize(
    ("stage", "expected"), [(0, (4, 4, 8)), (1, (4, 4, 4)), (2, (4, 2, 4)), (3, (2, 2, 4))], ids=str
)
def test_zero_divides_what_its_stage_divides(config, evaluated_run, planned, stage, expected):
    memory = plan_seed(config, evaluated_run, processes=2, zero_stage=stage, optimizer="adamw").memory
    count = planned["seed"].parameters
    assert (memory.weights, memory.gradients, memory.optimizer) == tuple(share * count for share in expected)
    assert memory.total == sum(share * count for share in expected) + memory.copies + memory.activations
    assert memory.host == 0


@pytest.mark.parametrize(("stage", "processes"), [(1, 1), (2, 2)])
def test_offloaded_averages_leave_the_device(config, evaluated_run, planned, stage, processes):
    update = {"zero_stage": stage, "offload_optimizer": "cpu"}
    memory = plan_seed(config, evaluated_run, processes=processes, **update).memory
    count = planned["seed"].parameters
    assert memory.optimizer == 0
    assert memory.host == 16 * count // processes
    assert memory.total == memory.weights + memory.gradients + memory.copies + memory.activations


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_the_optimizer_keeps_is_what_it_has_after_a_step(config, evaluated_run, planned, optimizer):
    decoder = Decoder(*read_model(evaluated_run, SeedManifest.read(evaluated_run))[:1])
    chosen = build_optimizer(decoder, config.seed.training.model_copy(update={"optimizer": optimizer}))
    decoder(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    chosen.step()
    held = sum(value.nbytes for state in chosen.state.values() for name, value in state.items() if name != "step")
    assert plan_seed(config, evaluated_run, optimizer=optimizer).memory.optimizer == held
    assert (held == planned["seed"].memory.optimizer) == (optimizer == "muon")  # which is the run's


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_smaller_activations_and_a_copy_of_every_matrix(config, evaluated_run, precision):
    full, half = (plan_seed(config, evaluated_run, precision=name) for name in ("fp32", precision))
    assert (full.precision, half.precision) == ("fp32", precision)
    norms = 5 * 32  # two in each of two layers, and the last one
    assert full.memory.copies == 0
    assert half.memory.copies == 2 * (half.parameters - norms)
    assert half.memory.weights == full.memory.weights
    assert 0.5 * cost_of_deep().kept < cost_of_deep(half=True).kept < 0.85 * cost_of_deep().kept


def test_what_autograd_keeps_of_a_frozen_decoder_has_its_copies_too():
    lora = LoraConfig(rank=2, targets=("q_proj",))
    make = lambda: NextTokenLoss(add_adapters(Decoder(deep()), lora, seed=0))  # noqa: E731
    cost, whole = cost_of_pass(make, 4, 64, half=True), cost_of_deep(half=True)
    assert 0 < cost.copies <= whole.copies + 2 * cost.trained
    assert cost.kept < whole.kept


def test_activation_checkpointing_keeps_less_and_computes_the_layers_twice(config, evaluated_run, planned):
    found = plan_seed(config, evaluated_run, activation_checkpointing=True)
    assert 1.1 < found.flops / planned["seed"].flops < 4 / 3
    once, twice = cost_of_deep(), cost_of_deep(recompute=True)
    assert twice.kept < once.kept / 3
    assert 1.2 < twice.flops / once.flops < 4 / 3
    assert twice.parameters == once.parameters


def test_an_imported_seed_is_not_planned(config, evaluated_run, copied_run, tmp_path):
    model, run_dir = tmp_path / "model", copied_run(evaluated_run)
    export_model.run(ExportConfig(folder=str(model)), run_dir)
    import_model.run(ImportConfig(source=f"hf:{model}"), run_dir, force=True)
    short = brief(config)
    assert [each.name for each in plan_training.run(short, run_dir).trainings] == ["experts", "dense"]
    again = plan_training.run(short.model_copy(update={"imported": False}), run_dir)
    assert [each.name for each in again.trainings] == ["seed", "experts", "dense"]
    measured = short.model_copy(update={"flops_per_second": None, "seconds": 0.1})
    assert plan_training.run(measured, run_dir).flops_per_second > 1e6


def test_before_it_is_imported_the_seed_has_the_shape_of_its_folder(config, evaluated_run, planned, tmp_path):
    model, run_dir = tmp_path / "model", tmp_path / "run"
    export_model.run(ExportConfig(folder=str(model)), evaluated_run)
    other = SeedConfig(model=config.seed.model.model_copy(update={"hidden_size": 64}), training=config.seed.training)
    asked = brief(config).model_copy(update={"imported": f"hf:{model}", "clusters": 3, "seed": other})
    found = {each.name: each for each in plan_training.run(asked, run_dir).trainings}
    assert "seed" not in found
    assert found["experts"].parameters == planned["experts"].parameters
    with pytest.raises(UsageFailure, match=r"no seed in .*run `cpipe import .*/run hf:FOLDER`"):
        plan_training.run(asked.model_copy(update={"imported": True}), run_dir)


def test_smaller_micro_batches_keep_less(config, evaluated_run, planned):
    found = plan_seed(config, evaluated_run, micro_batch_size=2)
    assert 2.5 < planned["seed"].memory.activations / found.memory.activations < 3.5
    assert found.flops == pytest.approx(planned["seed"].flops)


def deep():
    """A shape in which layers count for more than the embedding."""
    return DecoderConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=100, max_position_embeddings=64,
    )  # fmt: skip


@cache
def cost_of_deep(half=False, recompute=False):
    return cost_of_pass(lambda: NextTokenLoss(Decoder(deep())), 4, 64, half=half, recompute=recompute)


def plan_seed(config, run_dir, processes=1, **training):
    """The seed's plan with other settings of its training."""
    seed = config.seed.model_copy(update={"training": config.seed.training.model_copy(update=training)})
    experts = config.experts.model_copy(update={"dense": False})
    asked = brief(config).model_copy(update={"seed": seed, "experts": experts, "processes": processes})
    return plan_training.run(asked, run_dir).trainings[0]


def brief(config):
    """The settings without gates and compositions, whose plans take longest."""
    gates = config.gates.model_copy(update={"modes": ("mean-activation",)})
    return config.model_copy(update={"gates": gates, "compositions": ()})


def test_without_tokens_and_clusters_it_says_what_is_unknown(tmp_path, shape, training):
    experts = ExpertsConfig(training=training.model_copy(update={"batch_size": 10}))
    asked = PlanConfig(
        seed=SeedConfig(model=shape, training=training), experts=experts, vocab_size=400, clusters=5,
        flops_per_second=SPEED,
    )  # fmt: skip
    plan = plan_training.run(brief(asked), tmp_path)
    assert all(each.epochs is None for each in plan.trainings)
    assert plan.trainings[1].count == 5
    assert [line.split(":")[0] for line in plan.unknown] == ["epochs", "experts"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"processes": 4}, "seed: a batch of 6 rows does not divide into 4 processes"),
        ({"clusters": 4}, "a batch of 6 rows does not divide among 4 experts"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused_in_one_line(tmp_path, shape, training, changes, message):
    seed, experts = SeedConfig(model=shape, training=training), ExpertsConfig(training=training)
    asked = PlanConfig(**{"seed": seed, "experts": experts, "clusters": 3, "flops_per_second": SPEED, **changes})
    with pytest.raises(UsageFailure, match=message) as failed:
        plan_training.run(asked, tmp_path)
    assert "\n" not in str(failed.value)


TRAIN = """
import json, sys, torch
from pathlib import Path
from schemas.decoder import DecoderConfig
from schemas.training import TrainingConfig
from stages.engine.loop import train
from stages.nn.decoder import Decoder, NextTokenLoss

torch.set_num_threads(1)
folder, shape, training = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])

def peak_of(**widths):
    decoder = Decoder(DecoderConfig(**{**shape, **widths}))
    config = TrainingConfig(**training)
    rows = torch.zeros(config.batch_size, config.sequence_length + 1, dtype=torch.long)
    train(NextTokenLoss(decoder), lambda step: rows, config, folder, "seed")
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmPeak"))
    return int(peak.split()[1]) * 1024

before = peak_of(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=300)
print(peak_of() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this kernel does not tell what is allocated")
def test_planned_memory_is_near_the_measured_peak(tmp_path):
    """Of what is allocated: a busy system takes pages away, and what is resident tells less than what is needed."""
    sizes = {checkpointed: planned_and_measured(checkpointed, tmp_path) for checkpointed in (False, True)}
    planned, measured = sizes[False]
    assert planned / FACTOR < measured < planned * FACTOR
    planned, measured = sizes[True]
    assert measured < planned  # which adds the gradients of the weights to the activations, as in a second micro-batch
    planned, measured = (plain - spared for plain, spared in zip(*sizes.values(), strict=True))
    assert planned / FACTOR < measured < planned * FACTOR


def planned_and_measured(checkpointed, tmp_path):
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
             "num_key_value_heads": 8, "vocab_size": 8192}  # fmt: skip
    training = {"steps": 2, "batch_size": 8, "sequence_length": 256, "engine": "torch", "precision": "fp32",
                "activation_checkpointing": checkpointed}  # fmt: skip
    model = {name: value for name, value in shape.items() if name != "vocab_size"}
    asked = PlanConfig.from_mapping(
        {
            "seed": {"model": model, "training": training},
            "compositions": [],
            "vocab_size": 8192,
            "flops_per_second": 1.0,
        }
    )
    planned = plan_training.run(asked, tmp_path).trainings[0].memory.total
    command = [sys.executable, "-c", TRAIN, str(tmp_path), json.dumps(shape), json.dumps(training)]
    freed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what the model frees, malloc must not keep
    measured = int(subprocess.run(command, env=freed, capture_output=True, text=True, check=True).stdout)
    print(f"checkpointed {checkpointed}: planned {planned / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    return planned, measured
