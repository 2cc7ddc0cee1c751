import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from schemas.failures import Failure, IntegrityFailure, UsageFailure
from schemas.files import digest_of
from schemas.train_experts import ExpertManifest, ExpertsConfig, LoraConfig
from schemas.train_seed import SeedConfig, SeedManifest
from schemas.training import TrainingConfig
from stages import train_experts, train_seed
from stages.artifacts.adapter_folder import adapter_files
from stages.artifacts.run_models import RunModels
from stages.nn.decoder import Decoder

IDS = torch.arange(3, 35)[None]
LORA = LoraConfig(rank=4, alpha=6.0, targets=("q_proj", "v_proj", "down_proj"))
FOLDER = "experts/000"


@pytest.fixture(scope="module")
def adapted_run(seeded_run: Path, training: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`seeded_run` with LoRA experts, that have left the seed far enough to tell. Read-only."""
    run_dir = Path(shutil.copytree(seeded_run, tmp_path_factory.mktemp("runs") / "adapted"))
    config = ExpertsConfig(
        kind="lora", lora=LORA, dense=False, training=training.model_copy(update={"learning_rate": 0.05})
    )
    train_experts.run(config, run_dir)
    return run_dir


def merged(run_dir: Path, folder: str = FOLDER) -> Decoder:
    return Decoder.from_weights(*RunModels.find(run_dir).decoder(folder))


def disguise(run_dir: Path, name: str, data: bytes) -> None:
    """Replace an output of the expert and describe the new bytes in its manifest, as an attacker would."""
    path = run_dir / FOLDER / name
    path.write_bytes(data)
    manifest = run_dir / FOLDER / "manifest.json"
    content = json.loads(manifest.read_text())
    for ref in content["outputs"]:
        if ref["path"] == f"{FOLDER}/{name}":
            ref |= {"size": len(data), "digest": digest_of(path)}
    manifest.write_text(json.dumps(content))


def test_the_folder_holds_an_adapter_and_no_model(adapted_run: Path) -> None:
    manifest = ExpertManifest.read(adapted_run, FOLDER)
    assert sorted(ref.path for ref in manifest.outputs) == [
        f"{FOLDER}/adapter_config.json", f"{FOLDER}/adapter_model.safetensors",
    ]  # fmt: skip
    assert {name: ref.path for name, ref in adapter_files(manifest).items()} == {
        "adapter_config.json": f"{FOLDER}/adapter_config.json",
        "adapter_model.safetensors": f"{FOLDER}/adapter_model.safetensors",
    }
    config = json.loads((adapted_run / FOLDER / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert (adapted_run / FOLDER / config["base_model_name_or_path"]).resolve() == (adapted_run / "seed").resolve()
    tensors = safetensors.torch.load_file(adapted_run / FOLDER / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == manifest.metrics.parameters
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in tensors
    assert len(tensors) == 2 * 2 * 3


@pytest.mark.slow
def test_peft_loads_the_adapter_over_the_seed_and_gives_the_same_logits(adapted_run: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    seed = AutoModelForCausalLM.from_pretrained(adapted_run / "seed")
    with torch.no_grad():
        alone = seed(IDS).logits
        for number in range(3):
            base = AutoModelForCausalLM.from_pretrained(adapted_run / "seed")
            adapted = PeftModel.from_pretrained(base, adapted_run / f"experts/{number:03d}")
            theirs = adapted(IDS).logits
            torch.testing.assert_close(merged(adapted_run, f"experts/{number:03d}")(IDS), theirs, atol=1e-5, rtol=0)
            assert (theirs - alone).abs().max() > 0.03


@pytest.mark.slow
def test_peft_writes_what_is_written_here(adapted_run: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(adapted_run / "seed")
    PeftModel.from_pretrained(base, adapted_run / FOLDER).save_pretrained(tmp_path, save_embedding_layers=False)
    theirs, ours = (
        safetensors.torch.load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, adapted_run / FOLDER)
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    known = json.loads((tmp_path / "adapter_config.json").read_text())
    written = json.loads((adapted_run / FOLDER / "adapter_config.json").read_text())
    assert {name: known[name] for name in written if name not in ("target_modules", "base_model_name_or_path")} == {
        name: value for name, value in written.items() if name not in ("target_modules", "base_model_name_or_path")
    }
    assert sorted(known["target_modules"]) == sorted(written["target_modules"])


def test_what_no_adapter_changes_is_the_seeds_own_tensor(adapted_run: Path) -> None:
    models = RunModels.find(adapted_run)
    seed, expert = models.decoder("seed")[1], models.decoder(FOLDER)[1]
    assert seed.keys() == expert.keys()
    changed = {name for name in seed if expert[name].data_ptr() != seed[name].data_ptr()}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj", "down_proj"}
    assert len(changed) == 6
    assert not any(torch.equal(expert[name], seed[name]) for name in changed)


def test_an_adapter_of_zero_is_the_seed(adapted_run: Path, copied_run: Callable[[Path], Path]) -> None:
    run_dir = copied_run(adapted_run)
    path = run_dir / FOLDER / "adapter_model.safetensors"
    zeros = {name: tensor * ("lora_A" in name) for name, tensor in safetensors.torch.load_file(path).items()}
    disguise(run_dir, path.name, safetensors.torch.save(zeros))
    assert torch.equal(merged(run_dir)(IDS), merged(run_dir, "seed")(IDS))
    assert not torch.equal(merged(run_dir, "experts/001")(IDS), merged(run_dir, "seed")(IDS))


def refused(run_dir: Path, kind: type[Failure], match: str) -> None:
    with pytest.raises(kind, match=match) as failure:
        merged(run_dir)
    assert "\n" not in str(failure.value)


def test_an_adapter_of_another_seed_is_refused(
    adapted_run: Path, copied_run: Callable[[Path], Path], shape: Any, training: TrainingConfig
) -> None:
    run_dir = copied_run(adapted_run)
    train_seed.run(SeedConfig(model=shape, training=training.model_copy(update={"seed": 5})), run_dir, force=True)
    refused(run_dir, UsageFailure, r"experts/000 is an adapter of another seed than is there now: run `cpipe train-exp")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_flipped_bit_is_found(name: str, adapted_run: Path, copied_run: Callable[[Path], Path]) -> None:
    run_dir = copied_run(adapted_run)
    data = bytearray((run_dir / FOLDER / name).read_bytes())
    data[-3] ^= 1
    (run_dir / FOLDER / name).write_bytes(data)
    refused(run_dir, IntegrityFailure, f"{name} was changed after it was written")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "`peft_type`: input should be 'LORA'"),
        ({"r": 0}, "`r`: input should be greater than 0"),
        ({"lora_alpha": "6"}, "`lora_alpha`: input should be a valid number"),
        ({"bias": "all"}, "`bias`: input should be 'none'"),
        ({"use_dora": True}, "unknown key `use_dora`"),
        ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, "`target_modules` holds 'lm_head', expected of q_proj"),
        ({"r": 3}, r"layers.0.mlp.down_proj.lora_A.weight has shape \[4, 64\], expected \[3, 64\]"),
        ({"target_modules": ["q_proj", "v_proj"]}, r"down_proj.lora_A.weight has shape \[4, 64\], expected None"),
        ({"target_modules": ["q_proj", "v_proj", "down_proj", "up_proj"]}, r"up_proj.lora_A.weight has shape None, ex"),
    ],
)
def test_a_config_that_is_not_of_this_adapter_is_refused(
    change: dict[str, Any], match: str, adapted_run: Path, copied_run: Callable[[Path], Path]
) -> None:
    run_dir = copied_run(adapted_run)
    content = json.loads((run_dir / FOLDER / "adapter_config.json").read_text()) | change
    disguise(run_dir, "adapter_config.json", json.dumps(content).encode())
    refused(run_dir, IntegrityFailure, match)


def test_a_pickle_in_place_of_the_tensors_is_refused_unread(
    adapted_run: Path, copied_run: Callable[[Path], Path], tmp_path: Path
) -> None:
    run_dir = copied_run(adapted_run)
    trap = f"cos\nsystem\n(S'touch {tmp_path / 'sprung'}'\ntR.".encode()
    disguise(run_dir, "adapter_model.safetensors", trap)
    refused(run_dir, IntegrityFailure, "is not a safetensors file")
    assert not (tmp_path / "sprung").exists()


def test_the_seed_an_adapter_belongs_to_is_an_input_of_its_manifest(adapted_run: Path) -> None:
    assert SeedManifest.read(adapted_run).as_input() in ExpertManifest.read(adapted_run, FOLDER).inputs
