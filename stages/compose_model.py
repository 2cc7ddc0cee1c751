"""Compose: the central concept model learns to read the frozen experts.

- two trainings in one command: the central model alone (`central-alone/`, shared by all compositions of the run with
  the same settings), then bridges, with or without the central model, with the experts in place
- experts are read only: their weights are summed before and after, and a difference is a bug that stops the stage
- `--experts seed-copies` is the control: as many parameters and as much computation, none of the experts' knowledge
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from loguru import logger
from torch import Tensor, nn

from schemas.central import CentralConfig
from schemas.compose_model import (
    CentralAloneConfig,
    CentralAloneManifest,
    CentralAloneMetrics,
    ComposeConfig,
    ComposeManifest,
    ComposeMetrics,
    Usage,
)
from schemas.failures import UsageFailure
from schemas.files import FileRef, write_bytes
from schemas.manifest import FILE_NAME, InputRef, Manifest, key_of
from schemas.strict import Config
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import ExpertsManifest
from schemas.train_gates import GatesManifest
from schemas.train_seed import SeedManifest
from schemas.training import TrainingMetrics
from stages.artifacts.added_domains import text_of_all
from stages.artifacts.feature_cache import FeatureCache
from stages.artifacts.model_folder import WEIGHTS, checksum, read_model, read_tensors, write_tensors
from stages.artifacts.run_models import expert_folder, read_expert
from stages.artifacts.stage_folder import claim_folder
from stages.data.batches import Rows
from stages.data.token_store import TokenStore
from stages.engine.loop import train
from stages.nn.central import CentralLoss, CentralModel
from stages.nn.composed import ComposedModel
from stages.nn.composed_loss import ComposedLoss
from stages.nn.decoder import Decoder
from stages.nn.gates import ExpertGates, SeedGate


@dataclass(frozen=True)
class Upstream:
    """The manifests a composition is made from."""

    tokens: TokenizeManifest
    seed: SeedManifest
    experts: ExpertsManifest
    gates: GatesManifest | None

    def as_inputs(self) -> list[InputRef]:
        """All of them as inputs of the composition."""
        found = [self.tokens.as_input(), self.seed.as_input(), self.experts.as_input()]
        return [*found, self.gates.as_input()] if self.gates else found


def run(config: ComposeConfig, run_dir: Path, *, force: bool = False) -> ComposeManifest:
    """Train the central model alone unless that is done, then with the experts, and write it to `config.name`."""
    upstream = _read_upstream(config, run_dir)
    alone = _train_alone(config.alone(), run_dir, upstream, force)
    inputs = [*upstream.as_inputs(), alone.as_input()]
    with claim_folder(run_dir, ComposeManifest, config, inputs, folder=config.name, force=force) as claim:
        if claim.finished:
            return claim.finished
        composed = _compose(config, run_dir, upstream, alone)
        frozen = _sum_of_frozen(composed)
        usage, training = _train_with_experts(composed, config, run_dir, upstream, claim.path)
        if _sum_of_frozen(composed) != frozen:
            raise RuntimeError("the experts' weights changed while the bridges were trained")
        parts = {"central": composed.central.config, "bridges": composed.config}
        outputs = _write(claim.path, run_dir, parts, composed.weights()) if claim.leader else []
        return claim.finish(outputs, _metrics(composed, frozen, usage, training))


def _read_upstream(config: ComposeConfig, run_dir: Path) -> Upstream:
    # In the order of the pipeline, so that what is missing is named from the front.
    tokens, seed, experts = TokenizeManifest.read(run_dir), SeedManifest.read(run_dir), ExpertsManifest.read(run_dir)
    gates = None
    if config.gates != "none":
        gates = GatesManifest.read(run_dir)
        if config.gates not in (known := gates.modes_at_experts(run_dir)):
            raise UsageFailure(
                f"{run_dir / gates.folder} holds gates trained as {', '.join(known)}, not {config.gates}: "
                f"use --gates {known[0]}, or run `cpipe train-gates` for {config.gates} too"
            )
    return Upstream(tokens, seed, experts, gates)


def _train_alone(config: CentralAloneConfig, run_dir: Path, upstream: Upstream, force: bool) -> CentralAloneManifest:
    """The central model without experts. `force` repeats it only where it is not what is asked for."""
    inputs = [upstream.tokens.as_input(), upstream.seed.as_input()]
    force = force and not _is_finished(CentralAloneManifest, config, inputs, run_dir)
    with claim_folder(run_dir, CentralAloneManifest, config, inputs, force=force) as claim:
        if claim.finished:
            return claim.finished
        training = config.training
        central = _new_central(config, run_dir, upstream.seed)
        shards = [ref.check(run_dir) for ref in upstream.tokens.shards("train")]
        rows = Rows(TokenStore.open(shards), upstream.tokens.metrics.end_of_text, training.sequence_length)
        metrics = train(  # as a new model, also where it begins with the seed's layers: most of it is
            CentralLoss(central),
            rows.batches(training.batch_size, training.seed + 3),
            training,
            claim.path,
            claim.folder,
        )
        outputs = _write(claim.path, run_dir, central.config, central.weights()) if claim.leader else []
        return claim.finish(outputs, CentralAloneMetrics(parameters=_count(central), training=metrics))


def _is_finished(kind: type[Manifest], config: Config, inputs: list[InputRef], run_dir: Path) -> bool:
    if not (run_dir / kind.folder / FILE_NAME).is_file():
        return False
    return kind.read(run_dir).key == key_of(kind, config, inputs)


def _new_central(config: CentralAloneConfig, run_dir: Path, seed_manifest: SeedManifest) -> CentralModel:
    shape, training = config.central, config.training
    if training.mask_documents:
        raise UsageFailure("--mask-documents is for decoders: the central model's groups reach over documents")
    if training.sequence_length < shape.shortest_row():
        raise UsageFailure(
            f"rows of {training.sequence_length} tokens hold less than two groups of "
            f"{shape.span(len(shape.all_levels))}: use --sequence-length {shape.shortest_row()} or more"
        )
    seed = Decoder.from_weights(*read_model(run_dir, seed_manifest))
    try:
        full = CentralConfig.beside(shape, seed.config)
    except ValueError as error:
        raise UsageFailure(str(error)) from error
    torch.manual_seed(training.seed)
    central = CentralModel(full)
    if shape.start_from_seed and full.hidden_size == seed.config.hidden_size:
        central.start_from(seed)
    return central


def _compose(config: ComposeConfig, run_dir: Path, upstream: Upstream, alone: CentralAloneManifest) -> ComposedModel:
    shape = CentralConfig.from_json(alone.output("config.json").check(run_dir).read_bytes())
    central = CentralModel.from_weights(shape, read_tensors(alone.output(WEIGHTS).check(run_dir)))
    seed = Decoder.from_weights(*read_model(run_dir, upstream.seed))
    numbers = range(upstream.experts.metrics.experts)
    experts = [_read_expert(config, run_dir, upstream, number, seed) for number in numbers]
    gate = None
    if upstream.gates is not None and config.gates != "none":
        vectors = read_tensors(upstream.gates.output("gates.safetensors").check(run_dir))
        gate = SeedGate(seed, ExpertGates.from_tensors(vectors, *upstream.gates.reads(config.gates)))
    torch.manual_seed(config.training.seed)
    composed = ComposedModel(central, experts, config.bridges, gate)
    if config.bridge_training.train == "bridges":
        composed.central.requires_grad_(False)
    return composed


def _read_expert(config: ComposeConfig, run_dir: Path, upstream: Upstream, number: int, seed: Decoder) -> Decoder:
    if config.experts == "seed-copies":
        return Decoder.from_weights(*read_model(run_dir, upstream.seed))
    weights = read_expert(run_dir, expert_folder(number), upstream.seed, lambda: (seed.config, seed.weights()))
    return Decoder.from_weights(*weights)


def _train_with_experts(
    composed: ComposedModel, config: ComposeConfig, run_dir: Path, upstream: Upstream, folder: Path
) -> tuple[Usage, TrainingMetrics]:
    training = config.with_experts()
    shards = text_of_all(run_dir, upstream.tokens, "train")
    rows = Rows(TokenStore.open(shards), upstream.tokens.metrics.end_of_text, training.sequence_length)
    batches = rows.batches(training.batch_size, training.seed + 4)
    features = _features(composed, config, run_dir, upstream) if config.feature_cache else None
    loss = ComposedLoss(composed, features)
    metrics = train(loss, batches, training, folder, config.name, seen=config.seen)
    if features:
        features.tell()
    return _usage(composed.cpu(), batches(training.steps)), metrics


def _features(composed: ComposedModel, config: ComposeConfig, run_dir: Path, upstream: Upstream) -> FeatureCache:
    """What is known of training rows, of these experts and gates, by bridges that read them at the same depths."""
    depths = sorted(composed.bridges.depths_read())
    told: dict[str, object] = {"experts": config.experts, "gates": config.gates, "depths": depths}
    told |= config.bridges.model_dump(include={"evidence", "head"})
    return FeatureCache(run_dir, upstream.as_inputs(), told, config.feature_cache * 1e9)


def _write(
    folder: Path, run_dir: Path, config: Config | dict[str, Config], weights: dict[str, Tensor]
) -> list[FileRef]:
    """config.json and model.safetensors."""
    if isinstance(config, dict):
        plain = {name: part.model_dump(mode="json") for name, part in config.items()}
    else:
        plain = config.model_dump(mode="json")
    text = json.dumps(plain, indent=2, sort_keys=True) + "\n"
    return [
        write_bytes(folder / "config.json", text.encode(), run_dir),
        write_tensors(folder / WEIGHTS, weights, run_dir, "central model"),
    ]


def _usage(composed: ComposedModel, row_BT: Tensor) -> Usage:
    """Losses of the next token on rows that come after those trained on, with parts left out."""
    composed.eval()

    @torch.no_grad()
    def loss(*parts: str) -> float:
        logits = composed(row_BT[:, :-1], ablate=frozenset(parts)).logits_BTV
        return round(float(nn.functional.cross_entropy(logits.flatten(0, 1), row_BT[:, 1:].flatten())), 6)

    usage = Usage(
        whole=loss(),
        without_bridges=loss("bridges"),
        experts_exchanged=loss("experts"),
        without_latents=loss("latents"),
        without_plan=loss("plan"),
    )
    logger.info("loss with one part left out: {}", usage)
    return usage


def _metrics(composed: ComposedModel, frozen: float, usage: Usage, training: TrainingMetrics) -> ComposeMetrics:
    return ComposeMetrics(
        parameters=_count(composed.central) + _count(composed.bridges),
        bridge_parameters=_count(composed.bridges),
        trained_parameters=sum(p.numel() for p in composed.parameters() if p.requires_grad),
        expert_parameters=_count(composed.experts),
        experts=len(composed.experts),
        frozen_checksum=frozen,
        usage=usage,
        training=training,
    )


def _sum_of_frozen(composed: ComposedModel) -> float:
    return checksum(composed.experts.state_dict())


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
