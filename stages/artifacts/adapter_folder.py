"""A LoRA expert on disk: the folder in which `peft` keeps an adapter, and the weights it stands for.

- `adapter_config.json`, which in a run names the seed's folder by its relative path, and `adapter_model.safetensors`,
  which `peft.PeftModel.from_pretrained` loads over the seed
- read strictly: only what `write_adapter` writes passes, every tensor by name and shape; no pickle, no code
- the adapter belongs to one seed: its manifest holds that seed's digest, and over another it is refused
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from torch import Tensor

from schemas.failures import IntegrityFailure, UsageFailure
from schemas.files import FileRef, write_bytes
from schemas.strict import Strict, explain
from schemas.train_experts import LINEARS, ExpertManifest, LoraConfig
from schemas.train_seed import SeedManifest
from stages.artifacts.model_folder import WeightType, read_tensors, write_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # what `peft` puts before the names of the model it wraps

Adapters = Mapping[str, tuple[Tensor, Tensor]]  # A [R, I] and B [O, R] by the name of the weight [O, I] they change


class PeftConfig(Strict):
    """The content of `adapter_config.json`, by the names `peft` gives it."""

    peft_type: Literal["LORA"] = Field("LORA", description="Kind of adapter.")
    task_type: Literal["CAUSAL_LM"] = Field("CAUSAL_LM", description="Kind of model.")
    base_model_name_or_path: str = Field(description="The seed: a path relative to this folder, or a name.")
    r: int = Field(gt=0, description="Rank.")
    lora_alpha: float = Field(gt=0, description="Scale times rank.")
    target_modules: tuple[str, ...] = Field(min_length=1, description="Names of the linear layers.")
    lora_dropout: Literal[0] = Field(0, description="None.")
    bias: Literal["none"] = Field("none", description="No biases are trained.")
    inference_mode: Literal[True] = Field(True, description="Loaded frozen.")


def seed_from(folder: Path, run_dir: Path) -> str:
    """How the run's seed is named in `folder`: by its path relative to it."""
    return Path(os.path.relpath(run_dir / SeedManifest.folder, folder)).as_posix()


def write_adapter(
    folder: Path, run_dir: Path, base: str, config: LoraConfig, found: Adapters, dtype: WeightType = "float32"
) -> list[FileRef]:
    """Write the adapter's two files into `folder`. `base`: what they name as the model that is adapted."""
    content = PeftConfig(
        base_model_name_or_path=base,
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.targets,
    )
    tensors: dict[str, Tensor] = {}
    for name, (a_RI, b_OR) in found.items():
        tensors |= dict(zip(_tensor_names(name), (a_RI, b_OR), strict=True))
    # `peft` declares alpha as a whole number.
    alpha = int(config.alpha) if config.alpha.is_integer() else config.alpha
    text = json.dumps({**content.model_dump(), "lora_alpha": alpha}, indent=2, sort_keys=True)
    return [
        write_bytes(folder / CONFIG, text.encode(), run_dir),
        write_tensors(folder / WEIGHTS, tensors, run_dir, "adapter", dtype),
    ]


def read_adapted(
    run_dir: Path, manifest: ExpertManifest, seed: SeedManifest, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of a LoRA expert, W + alpha / rank · B A, made from the seed's `weights`.

    What no adapter changes is the seed's own tensor, not a copy of it. Raises as `read_adapter`.
    """
    config, found = read_adapter(run_dir, manifest, seed, weights)
    scale = config.lora_alpha / config.r
    changed = {name: weights[name] + scale * (b_OR @ a_RI) for name, (a_RI, b_OR) in found.items()}
    return {**weights, **changed}


def read_adapter(
    run_dir: Path, manifest: ExpertManifest, seed: SeedManifest, weights: Mapping[str, Tensor]
) -> tuple[PeftConfig, Adapters]:
    """The adapter itself, compared with the seed's `weights`.

    Raises UsageFailure when it was trained over another seed, IntegrityFailure when its files are not what they should
    be.
    """
    config_path, weights_path = (manifest.output(name).check(run_dir) for name in (CONFIG, WEIGHTS))
    if seed.as_input() not in manifest.inputs:
        raise UsageFailure(
            f"{config_path.parent} is an adapter of another seed than is there now: "
            f"run `cpipe {manifest.command} {run_dir} --force`"
        )
    config = _read_config(config_path)
    return config, _read_adapters(weights_path, config, weights)


def _read_config(path: Path) -> PeftConfig:
    try:
        config = PeftConfig.from_json(path.read_bytes())
    except ValidationError as error:
        raise IntegrityFailure(explain(error, str(path))) from error
    if unknown := set(config.target_modules) - set(LINEARS):
        raise IntegrityFailure(f"{path}: `target_modules` holds {min(unknown)!r}, expected of {', '.join(LINEARS)}")
    return config


def _read_adapters(path: Path, config: PeftConfig, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs of A and B, one for every weight that is targeted and no others, all of the right shape."""
    tensors = read_tensors(path)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    expected = dict(_expected_shapes(config, weights))
    if shapes != expected:
        name = min(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        raise IntegrityFailure(
            f"{path}: {name} has shape {shapes.get(name)}, expected {expected.get(name)}: rerun with --force"
        )
    return {name: (tensors[name_A], tensors[name_B]) for name, name_A, name_B in _targeted(config, weights)}


def _expected_shapes(config: PeftConfig, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, list[int]]]:
    for name, name_A, name_B in _targeted(config, weights):
        written, read = weights[name].shape
        yield name_A, [config.r, read]
        yield name_B, [written, config.r]


def _targeted(config: PeftConfig, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, str, str]]:
    """Every weight that has an adapter, with the names of its A and B."""
    for name in weights:
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer.rpartition(".")[-1] in config.target_modules:
            yield name, *_tensor_names(name)


def _tensor_names(name: str) -> tuple[str, str]:
    """Names of A and B in the file, for the weight of a linear layer."""
    layer = PREFIX + name.removesuffix(".weight")
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"


def adapter_files(manifest: ExpertManifest) -> dict[str, FileRef]:
    """The files that are the adapter, by name: all that `peft` needs beside the seed."""
    return {name: manifest.output(name) for name in (CONFIG, WEIGHTS)}
