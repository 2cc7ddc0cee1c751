"""Export: a model of the run out, as a Hugging Face folder that needs nothing of the run.

- seed, dense and experts are decoders with all their weights; so is the average of the experts
- fp32 and bf16 hold what the run holds, the latter rounded; what is too large for fp16 is refused
"""

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from loguru import logger
from torch import Tensor

from schemas.decoder import DecoderConfig
from schemas.export_model import ExportConfig, ExportManifest, ExportMetrics
from schemas.failures import InputFailure
from schemas.files import FileRef, write_bytes
from schemas.manifest import InputRef, Manifest, key_of
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import ExpertManifest, ExpertsManifest
from schemas.train_seed import SeedManifest
from stages.artifacts.environment import environment
from stages.artifacts.export_folder import ExportFolder
from stages.artifacts.model_folder import WeightType, read_model, write_model
from stages.artifacts.stage_folder import turn_by_turn

TYPES: dict[str, WeightType] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LARGEST = torch.finfo(torch.float16).max
TOKENS = ("bos_token_id", "eos_token_id")


def run(config: ExportConfig, run_dir: Path, *, force: bool = False) -> ExportManifest:
    """Write the model that `config.model` names to `config.folder`."""
    started, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    tokens, members = TokenizeManifest.read(run_dir), _members(config.model, run_dir)
    inputs = [tokens.as_input(), *(member.as_input(folder) for folder, member in members.items())]
    with turn_by_turn(run_dir, "export"):
        place = ExportFolder(Path(config.folder), run_dir)
        if finished := place.finished(config, inputs, force):
            return finished
        shape, weights = _mean([read_model(run_dir, member, folder) for folder, member in members.items()])
        with place.new() as folder:
            outputs = _write(config, folder, shape, weights, tokens, run_dir)
            manifest = _manifest(config, inputs, outputs, shape, weights, started_at, time.monotonic() - started)
            manifest.write(folder)
        logger.info("wrote {} to {}", config.model, place.path)
        return manifest


def _members(model: str, run_dir: Path) -> dict[str, Manifest]:
    """The finished models whose mean is asked for, by folder: one of them, but for the average."""
    if model == "seed":
        return {"seed": SeedManifest.read(run_dir)}
    if model != "average":
        return {model: ExpertManifest.read(run_dir, model)}
    folders = [f"experts/{number:03d}" for number in range(ExpertsManifest.read(run_dir).metrics.experts)]
    return {folder: ExpertManifest.read(run_dir, folder) for folder in folders}


def _mean(models: Sequence[tuple[DecoderConfig, dict[str, Tensor]]]) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """The model itself where there is one; else the mean of the weights, as evaluate scores it."""
    shape, first = models[0]
    if len(models) == 1:
        return shape, first
    return shape, {name: torch.stack([weights[name] for _, weights in models]).mean(0) for name in first}


def _write(
    config: ExportConfig,
    folder: Path,
    shape: DecoderConfig,
    weights: dict[str, Tensor],
    tokens: TokenizeManifest,
    run_dir: Path,
) -> list[FileRef]:
    if config.dtype == "fp16":
        _refuse_overflow(weights)
    tokenizer = tokens.output("tokenizer.json").check(run_dir).read_bytes()
    end, dtype = tokens.metrics.end_of_text, TYPES[config.dtype]
    limit = config.max_shard_bytes
    written = write_model(folder, folder, shape, weights, end, tokenizer, dtype=dtype, max_shard_bytes=limit)
    ids = {name: value for name, value in shape.to_huggingface(end).items() if name in TOKENS}
    text = json.dumps(ids, indent=2, sort_keys=True)
    return [*written, write_bytes(folder / "generation_config.json", text.encode(), folder)]


def _refuse_overflow(weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        largest = float(weight.abs().max())
        if largest > LARGEST:
            raise InputFailure(f"{name} holds {largest:.3g}, and fp16 ends at {LARGEST:.0f}: use --dtype bf16")


def _manifest(
    config: ExportConfig,
    inputs: Sequence[InputRef],
    outputs: Sequence[FileRef],
    shape: DecoderConfig,
    weights: dict[str, Tensor],
    started_at: str,
    seconds: float,
) -> ExportManifest:
    files = [ref for ref in outputs if ref.path.endswith(".safetensors")]
    return ExportManifest(
        schema_id=ExportManifest.expected_schema(),
        key=key_of(ExportManifest, config, inputs),
        config=config,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        metrics=ExportMetrics(
            parameters=sum(weight.numel() for weight in weights.values()),
            architecture=shape.model_type,
            weight_files=len(files),
            weight_bytes=sum(ref.size for ref in files),
        ),
        environment=environment(started_at, seconds),
    )
