"""Every stage on a device whose tensors the processor cannot touch, and no GPU needed for it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.backend_registration
from tiny_models import CALM, CENTRAL, COMPOSE, CONTROL, EVALUATE, GATES, SHAPE, TRAINING

from schemas.evaluate_models import EvaluateManifest
from schemas.generate_text import GenerateConfig
from schemas.strict import Config
from schemas.train_experts import ExpertsConfig, LoraConfig
from schemas.train_seed import SeedConfig
from stages import generate_text
from stages.engine.processes import bf16_is_fast

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
SCRIPT = Path(__file__).with_name("on_an_accelerator.py")
TRAININGS = (
    ("train_seed", SeedConfig(model=SHAPE, training=TRAINING)),
    ("train_experts", ExpertsConfig(training=TRAINING)),
    ("train_gates", GATES),
    *(("compose_model", config) for config in (COMPOSE, CALM, CONTROL)),
)


def on_an_accelerator(run_dir: Path, *stages: tuple[str, Config]) -> list[str]:
    """The texts that the stages wrote."""
    recipe = json.dumps([[name, config.model_dump(mode="json")] for name, config in stages])
    command = [sys.executable, str(SCRIPT), str(run_dir)]
    done = subprocess.run(command, input=recipe, capture_output=True, text=True, timeout=600, cwd=SCRIPT.parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    texts: list[str] = json.loads(done.stdout.splitlines()[-1])
    return texts


def curves(run_dir: Path) -> dict[str, list[float]]:
    """Losses of every training, by its manifest's path."""
    found = {}
    for path in sorted(run_dir.glob("**/manifest.json")):
        for number, curve in enumerate(re.findall(r'"curve":\s*(\[[^]]*\])', path.read_text())):
            found[f"{path.relative_to(run_dir)} {number}"] = json.loads(curve)
    return found


def test_whatever_is_trained_has_on_an_accelerator_the_losses_of_the_processor(clustered_run, full_run, copied_run):
    run_dir = copied_run(clustered_run)
    on_an_accelerator(run_dir, *TRAININGS)
    found, expected = curves(run_dir), curves(full_run)
    assert len(expected) > 10
    assert found.keys() == expected.keys()
    rounding = 1e-3 if bf16_is_fast(torch.device("cpu")) else 1e-5  # Muon's products are in bf16 then
    for name, curve in expected.items():
        assert found[name] == pytest.approx(curve, rel=rounding), name


def test_every_model_writes_on_an_accelerator_what_it_does_on_the_processor(full_run):
    models = ("seed", "expert:0", "cbtm", "central", "central-calm")
    configs = [GenerateConfig(model=model, prompt="whisk the", max_tokens=40, temperature=0) for model in models]
    found = on_an_accelerator(full_run, *(("generate_text", config) for config in configs))
    assert found == ["".join(generate_text.stream(config, full_run)) for config in configs]


@pytest.mark.slow
def test_every_model_is_scored_on_an_accelerator_as_on_the_processor(full_run, evaluated_run, copied_run):
    run_dir = copied_run(full_run)
    on_an_accelerator(run_dir, ("evaluate_models", EVALUATE))
    found, expected = (
        {row.model: row.bits_per_byte for row in EvaluateManifest.read(each).metrics.rows}
        for each in (run_dir, evaluated_run)
    )
    assert found == pytest.approx(expected, rel=1e-5)


LORA = ExpertsConfig(training=TRAINING, kind="lora", lora=LoraConfig(rank=2))
INSIDE = GATES.model_copy(update={"places": ("layer", "module"), "modes": ("joint",)})
DEEP = CENTRAL.model_copy(
    update={"channels": 2, "depth_weighted": True, "latent_window": 2, "latent_local_layers": 1, "latent_weight": 0.1}
)
ALONE = COMPOSE.model_copy(update={"gates": "none"})
ROUGH = TRAINING.model_copy(update={"optimizer": "muon", "activation_checkpointing": True, "micro_batch_size": 2})
VARIANTS = {
    "LoRA": [("train_experts", LORA), ("train_gates", INSIDE), ("compose_model", ALONE)],
    "inside": [("train_experts", ExpertsConfig(training=TRAINING)), ("train_gates", INSIDE)],
    "central": [
        ("train_experts", ExpertsConfig(training=ROUGH)),
        ("compose_model", ALONE.model_copy(update={"central": DEEP, "training": ROUGH})),
        ("generate_text", GenerateConfig(model="central", prompt="whisk the", temperature=0, active_experts=2)),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_trained_and_scored_on_an_accelerator(variant, seeded_run, copied_run):
    run_dir = copied_run(seeded_run)
    on_an_accelerator(run_dir, *VARIANTS[variant], ("evaluate_models", EVALUATE))
    rows = EvaluateManifest.read(run_dir).metrics.rows
    best = min(row.bits_per_byte for row in rows)
    assert best < next(row.bits_per_byte for row in rows if row.model == "seed")


MIXED = """
import torch
from pretended_device import DEVICE
far, near = torch.ones(2, device=DEVICE), torch.ones(2)
print((far + 1).device, far[near.long()].device)
for mixed in (lambda: far + near, lambda: near[far.long()], lambda: torch.cat([near, far]), lambda: near.add_(far)):
    try:
        print(mixed())
    except (RuntimeError, IndexError):
        print("refused")
"""


def test_a_tensor_left_on_the_processor_is_refused():
    """Else the tests above could not fail."""
    command = [sys.executable, "-c", MIXED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[1], timeout=60)
    assert done.stdout.splitlines() == ["pretend:0 pretend:0", *["refused"] * 4], done.stderr
