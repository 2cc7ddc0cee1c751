"""Export: a model of the run out, as a Hugging Face folder that needs nothing of the run.

- seed, dense and experts are decoders with all their weights; so is the average of the experts
- a LoRA expert leaves as the model it makes of the seed, or as the adapter alone, with the tokenizer beside it
- a chat template, and the tokens that end an answer, that the seed was imported with go with all that comes of it
- fp32 and bf16 hold what the run holds, the latter rounded; what is too large for fp16 is refused
"""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from schemas.export_model import ExportConfig, ExportManifest, ExportMetrics
from schemas.failures import InputFailure, UsageFailure
from schemas.files import FileRef, write_bytes
from schemas.manifest import FILE_NAME, InputRef, Manifest, key_of
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import ExpertManifest, ExpertsManifest
from schemas.train_gates import GatesManifest
from schemas.train_seed import SeedManifest
from stages.artifacts.adapter_folder import read_adapter, seed_from, write_adapter
from stages.artifacts.environment import environment
from stages.artifacts.export_folder import ExportFolder
from stages.artifacts.locks import turn_by_turn
from stages.artifacts.mixtral_folder import mixtral_config, mixtral_weights
from stages.artifacts.model_folder import (
    CHAT_TEMPLATE,
    GENERATION,
    WeightType,
    read_model,
    write_as,
    write_tokenizer,
)
from stages.artifacts.run_models import RunModels, Weights, expert_folder, mean_of, read_expert

TYPES: dict[str, WeightType] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LARGEST = torch.finfo(torch.float16).max
TOKENS = ("bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Source:
    """What is exported: a model, or several of which the mean is; and the seed where they are adapters over it, or
    something goes with it.
    """

    run_dir: Path
    tokens: TokenizeManifest
    members: Mapping[str, Manifest]
    seed: SeedManifest | None

    @classmethod
    def find(cls, model: str, run_dir: Path) -> "Source":
        """Read the manifests. Raises UsageFailure when what makes the model has not run."""
        tokens, members = TokenizeManifest.read(run_dir), _members(model, run_dir)
        needed = any(map(_is_lora, members.values()))
        seed = SeedManifest.read(run_dir) if needed or (run_dir / SeedManifest.folder / FILE_NAME).is_file() else None
        return cls(run_dir, tokens, members, seed if needed or _companions(seed) else None)

    def inputs(self) -> list[InputRef]:
        """All it is made from."""
        seed = [self.seed.as_input()] if self.seed and SeedManifest.folder not in self.members else []
        members = [member.as_input(folder) for folder, member in self.members.items()]
        return [self.tokens.as_input(), *members, *seed]

    @cached_property
    def seed_weights(self) -> Weights:
        """Shape and weights of the seed."""
        return read_model(self.run_dir, self.seed or SeedManifest.read(self.run_dir))

    def models(self) -> list[Weights]:
        """Shape and weights of each member, adapters merged into the seed."""
        return [self._model(folder, member) for folder, member in self.members.items()]

    def _model(self, folder: str, member: Manifest) -> Weights:
        if self.seed and _is_lora(member):
            return read_expert(self.run_dir, folder, self.seed, lambda: self.seed_weights)
        return read_model(self.run_dir, member, folder)

    def companions(self) -> dict[str, bytes]:
        """What was imported beside the seed, by name, for all that comes from it."""
        return {name: ref.check(self.run_dir).read_bytes() for name, ref in _companions(self.seed).items()}

    def tokenizer(self) -> bytes:
        """The content of `tokenizer.json`."""
        return self.tokens.output("tokenizer.json").check(self.run_dir).read_bytes()


def _companions(seed: SeedManifest | None) -> dict[str, FileRef]:
    names = {ref.path.rsplit("/", 1)[-1]: ref for ref in seed.outputs} if seed else {}
    return {name: names[name] for name in (CHAT_TEMPLATE, GENERATION) if name in names}


def _members(model: str, run_dir: Path) -> dict[str, Manifest]:
    """The finished models asked for, by folder: one of them, but for the average and the routed model."""
    if model == "seed":
        return {"seed": SeedManifest.read(run_dir)}
    if model not in ("average", "routed"):
        return {model: ExpertManifest.read(run_dir, model)}
    folders = map(expert_folder, range(ExpertsManifest.read(run_dir).metrics.experts))
    found: dict[str, Manifest] = {folder: ExpertManifest.read(run_dir, folder) for folder in folders}
    return found if model == "average" else found | {GatesManifest.folder: GatesManifest.read(run_dir)}


def _is_lora(member: Manifest) -> bool:
    return isinstance(member, ExpertManifest) and member.config.lora is not None


def run(config: ExportConfig, run_dir: Path, *, force: bool = False) -> ExportManifest:
    """Write the model that `config.model` names to `config.folder`."""
    started, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    source = Source.find(config.model, run_dir)
    inputs = source.inputs()
    with turn_by_turn(run_dir, "export"):
        place = ExportFolder(Path(config.folder), run_dir)
        if finished := place.finished(config, inputs, force):
            return finished
        with place.new() as folder:
            write = _write_adapter if config.adapter else _write_routed if config.model == "routed" else _write_model
            outputs, metrics = write(config, folder, source)
            manifest = ExportManifest(
                schema_id=ExportManifest.expected_schema(),
                key=key_of(ExportManifest, config, inputs),
                config=config,
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                metrics=metrics,
                environment=environment(started_at, time.monotonic() - started),
            ).sealed()
            manifest.write(folder)
        logger.info("wrote {} to {}", config.model, place.path)
        return manifest


def _write_model(config: ExportConfig, folder: Path, source: Source) -> tuple[list[FileRef], ExportMetrics]:
    shape, weights = _mean(source.models())
    content = shape.to_huggingface(source.tokens.metrics.end_of_text, TYPES[config.dtype])
    return _write(config, folder, source, content, weights)


def _write_routed(config: ExportConfig, folder: Path, source: Source) -> tuple[list[FileRef], ExportMetrics]:
    """Experts and gates as a model of Mixtral's."""
    parts = RunModels.find(source.run_dir).routed("module", "joint")
    if parts["adapters"]:
        raise UsageFailure(f"the experts of {source.run_dir} are adapters, and Mixtral's are MLPs: export each of them")
    if parts["memory"]:
        raise UsageFailure(
            f"the gates of {source.run_dir} remember (memory {parts['memory']}), and Mixtral's router does not: "
            f"run `cpipe train-gates {source.run_dir} --places module --modes joint --memory 0 --force`"
        )
    (shape, _), experts = parts["shared"], len(parts["experts"]) + 1
    end, dtype = source.tokens.metrics.end_of_text, TYPES[config.dtype]
    content = mixtral_config(shape, experts, config.experts_per_token, end, dtype)
    weights = mixtral_weights(parts["shared"], parts["seed"], parts["experts"], parts["tensors"])
    return _write(config, folder, source, content, weights)


def _write(
    config: ExportConfig,
    folder: Path,
    source: Source,
    content: Mapping[str, Any],
    weights: Mapping[str, Tensor],
) -> tuple[list[FileRef], ExportMetrics]:
    """The folder of a model whose `config.json` has this content, and what goes with it."""
    if config.dtype == "fp16":
        _refuse_overflow(weights.items())
    dtype, limit = TYPES[config.dtype], config.max_shard_bytes
    written = write_as(content, folder, folder, weights, source.tokenizer(), dtype=dtype, max_shard_bytes=limit)
    ids = {name: value for name, value in content.items() if name in TOKENS}
    companions = source.companions()
    ids |= json.loads(companions.get(GENERATION, b"{}"))
    text = json.dumps(ids, indent=2, sort_keys=True)
    written += [write_bytes(folder / GENERATION, text.encode(), folder), *_chat_template(folder, companions)]
    return written, _metrics(written, content["model_type"], weights.values())


def _chat_template(folder: Path, companions: Mapping[str, bytes]) -> list[FileRef]:
    content = companions.get(CHAT_TEMPLATE)
    return [] if content is None else [write_bytes(folder / CHAT_TEMPLATE, content, folder)]


def _mean(models: Sequence[Weights]) -> Weights:
    """The model itself where there is one; else the mean of the weights, as evaluate scores it."""
    shape, first = models[0]
    return shape, first if len(models) == 1 else mean_of([weights for _, weights in models])


def _write_adapter(config: ExportConfig, folder: Path, source: Source) -> tuple[list[FileRef], ExportMetrics]:
    """The files of the adapter; over the seed, wherever that is, they make the expert."""
    (expert,) = source.members.values()
    if not isinstance(expert, ExpertManifest) or expert.config.lora is None or source.seed is None:
        raise UsageFailure(f"{source.run_dir / config.model} is a whole model, not an adapter: leave out --adapter")
    shape, weights = source.seed_weights
    _, found = read_adapter(source.run_dir, expert, source.seed, weights)
    tensors = [(name, tensor) for name, pair in found.items() for tensor in pair]
    if config.dtype == "fp16":
        _refuse_overflow(tensors)
    base = config.base_model or seed_from(folder, Path(os.path.realpath(source.run_dir)))
    written = write_adapter(folder, folder, base, expert.config.lora, found, TYPES[config.dtype])
    end = source.tokens.metrics.end_of_text
    written += write_tokenizer(folder, folder, shape.to_huggingface(end), source.tokenizer())
    written += _chat_template(folder, source.companions())
    return written, _metrics(written, shape.model_type, [tensor for _, tensor in tensors])


def _refuse_overflow(weights: Iterable[tuple[str, Tensor]]) -> None:
    for name, weight in weights:
        largest = float(weight.abs().max())
        if largest > LARGEST:
            raise InputFailure(f"{name} holds {largest:.3g}, and fp16 ends at {LARGEST:.0f}: use --dtype bf16")


def _metrics(written: Sequence[FileRef], architecture: str, weights: Iterable[Tensor]) -> ExportMetrics:
    files = [ref for ref in written if ref.path.endswith(".safetensors")]
    return ExportMetrics(
        parameters=sum(weight.numel() for weight in weights),
        architecture=architecture,
        weight_files=len(files),
        weight_bytes=sum(ref.size for ref in files),
    )
