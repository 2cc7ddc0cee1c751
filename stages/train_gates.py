"""Train the gates: experts and seed frozen, one vector per expert learns when the expert is worth asking (PHATGOOSE).

- `independent` is the paper's way: every gate alone, on its own expert's cluster; `joint` lets the gates see each
  other; `contrastive` and `mean-activation` ask no expert, only the seed
- an expert equal to its seed would leave its gate without a gradient: refused
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from schemas.cluster_documents import ClusterManifest
from schemas.failures import InputFailure, UsageFailure
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import ExpertsManifest
from schemas.train_gates import GateMode, GateRun, GatesConfig, GatesManifest, GatesMetrics
from schemas.train_seed import SeedManifest
from stages.artifacts.model_folder import device, read_model, write_tensors
from stages.artifacts.run_models import expert_folder, read_expert
from stages.artifacts.stage_folder import claim_folder
from stages.data.batches import LabelledBatches, Rows
from stages.data.token_store import TokenStore, read_table
from stages.engine.loop import train
from stages.nn.decoder import Decoder
from stages.nn.gates import ContrastiveLoss, ExpertGates, GateLoss


def run(config: GatesConfig, run_dir: Path, *, force: bool = False) -> GatesManifest:
    """Train the gates of all experts in the asked modes and write them to `gates/`."""
    tokens, clusters = TokenizeManifest.read(run_dir), ClusterManifest.read(run_dir)
    seed_manifest, experts_manifest = SeedManifest.read(run_dir), ExpertsManifest.read(run_dir)
    inputs = [tokens.as_input(), clusters.as_input(), seed_manifest.as_input(), experts_manifest.as_input()]
    with claim_folder(run_dir, GatesManifest, config, inputs, force=force) as claim:
        if claim.finished:
            return claim.finished
        seed = Decoder.from_weights(*read_model(run_dir, seed_manifest))
        numbers = range(experts_manifest.metrics.experts)
        experts = [_read_expert(run_dir, number, seed_manifest, seed) for number in numbers]
        layer, end = _layer(config, seed), tokens.metrics.end_of_text
        for decoder in (seed, *experts):
            decoder.separator = end if config.training.mask_documents else None
        rows = _rows_of_clusters(config, run_dir, tokens, clusters)
        tensors: dict[str, torch.Tensor] = {}
        runs: list[GateRun] = []
        for mode in config.modes:
            gates = ExpertGates.closed(len(experts), seed.config.hidden_size, mode, layer, config.memory, end)
            runs += _make_mode(mode, config, gates, seed, experts, rows, claim.path)
            tensors |= gates.tensors()
        metrics = GatesMetrics(layer=layer, end_of_text=end, experts=len(experts), runs=tuple(runs))
        written = [write_tensors(claim.path / "gates.safetensors", tensors, run_dir, "gates")] if claim.leader else []
        return claim.finish(written, metrics)


def _read_expert(run_dir: Path, number: int, manifest: SeedManifest, seed: Decoder) -> Decoder:
    weights = read_expert(run_dir, expert_folder(number), manifest, lambda: (seed.config, seed.weights()))
    expert = Decoder.from_weights(*weights)
    equal = all(torch.equal(own, other) for own, other in zip(expert.parameters(), seed.parameters(), strict=True))
    if equal:
        raise InputFailure(f"expert {number} equals the seed, so its gate has nothing to learn: train it for longer")
    return expert


def _layer(config: GatesConfig, seed: Decoder) -> int:
    depth = seed.config.num_hidden_layers
    layer = (depth + 1) // 2 if config.layer is None else config.layer
    if layer > depth:
        raise UsageFailure(f"--layer {layer} is beyond the seed's {depth} layers")
    return layer


def _rows_of_clusters(
    config: GatesConfig, run_dir: Path, tokens: TokenizeManifest, clusters: ClusterManifest
) -> dict[int | None, Rows]:
    """Rows of each cluster's documents, those it shares among them, and under None those of all."""
    store = TokenStore.open([ref.check(run_dir) for ref in tokens.shards("train")])
    table = read_table(clusters.output("assignments-train.arrow").check(run_dir))
    end, length = tokens.metrics.end_of_text, config.training.sequence_length
    rows: dict[int | None, Rows] = {None: Rows(store, end, length)}
    for cluster in range(clusters.config.clusters):
        rows[cluster] = Rows(
            store, end, length, np.flatnonzero((table["cluster"] == cluster) | (table["second"] == cluster))
        )
    return rows


def _make_mode(
    mode: GateMode,
    config: GatesConfig,
    gates: ExpertGates,
    seed: Decoder,
    experts: list[Decoder],
    rows: dict[int | None, Rows],
    folder: Path,
) -> list[GateRun]:
    """Fill the gates: all in one run, one run per expert (`independent`), or by a mean (`mean-activation`)."""
    order = config.training.batch_size, config.training.seed + 2
    if mode == "mean-activation":
        return [_take_mean(gates, seed, expert, rows[expert], config) for expert in range(len(experts))]
    if mode == "contrastive":
        batches = LabelledBatches([rows[cluster] for cluster in range(len(experts))], *order)
        return [_train_run(mode, None, ContrastiveLoss(gates, seed), batches, config, folder, "gates contrastive")]
    owners: list[int | None] = [None] if mode == "joint" else list(range(len(experts)))
    runs = []
    for own in owners:
        for number, vector in enumerate(gates.vectors):
            vector.requires_grad_(own in (None, number))
        loss = GateLoss(gates, seed, experts if own is None else [experts[own]], own)
        label = "gates joint" if own is None else f"gate {own:03d}"
        runs.append(_train_run(mode, own, loss, rows[own].batches(*order), config, folder, label))
    return runs


def _train_run(
    mode: GateMode,
    own: int | None,
    loss: GateLoss | ContrastiveLoss,
    batch_at: Callable[[int], torch.Tensor],
    config: GatesConfig,
    folder: Path,
    label: str,
) -> GateRun:
    place = folder / label.replace(" ", "-")
    place.mkdir(exist_ok=True)
    metrics = train(loss, batch_at, config.training, place, label)
    with torch.no_grad():
        parts = loss.cpu()(batch_at(config.training.steps))
    openness = tuple(round(float(parts[name]), 4) for name in sorted(parts, key=_slot) if name != "loss")
    return GateRun(mode=mode, expert=own, openness=openness, tokens=metrics.tokens, training=metrics)


def _take_mean(gates: ExpertGates, seed: Decoder, expert: int, rows: Rows, config: GatesConfig) -> GateRun:
    """Set a vector to the mean of what the gates read in the expert's cluster, over as many rows as others train on."""
    training = config.training
    share = -(-training.batch_size // len(gates.vectors))
    total = torch.zeros(seed.config.hidden_size)
    seed.to(device())
    for step in range(training.steps):
        ids_BT = rows.batch(step, share, training.seed + 2)[:, :-1]
        with torch.no_grad():
            total += gates.read(seed, ids_BT.to(device())).mean((0, 1)).cpu() / training.steps
    seed.cpu()
    gates.vectors[expert].data.copy_(total)
    tokens = training.steps * share * training.sequence_length
    return GateRun(mode="mean-activation", expert=expert, openness=(), tokens=tokens, training=None)


def _slot(name: str) -> int:
    return int(name.removeprefix("open_")) if name.startswith("open_") else -1
