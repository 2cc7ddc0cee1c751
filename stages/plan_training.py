"""What the settings would cost, before anything is trained. Writes nothing.

- shapes come from what the run holds already, else from the settings; every model is built without content, and one
  step of it is counted: so FLOPs, frozen parts and activations are those of the code that will run
- memory, fp32 throughout: 4 bytes a weight, 4 a gradient, 8 for AdamW's averages, of Muon 4, divided among devices by
  ZeRO's stage 1, 2 and 3 (Rajbhandari et al. 2020, section 3), and what autograd and autocast keep of one micro-batch.
  What the libraries take comes on top, and beside the processor a copy of a checkpoint while it is written, or of an
  offloaded optimizer 16 bytes for each weight: weight, gradient, averages (Ren et al. 2021, section 4.1)
- time: FLOPs over what this device does with a few real steps of the seed, or over a speed that is given
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from schemas.central import CentralConfig
from schemas.cluster_documents import ClusterManifest
from schemas.compose_model import ComposeConfig
from schemas.decoder import DecoderConfig
from schemas.failures import UsageFailure
from schemas.manifest import FILE_NAME, Manifest
from schemas.plan_training import Memory, Plan, PlanConfig, PlannedTraining
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import DENSE, ExpertsManifest, LoraConfig
from schemas.train_gates import ALONE, GateMode, GatesConfig, Place, label_of
from schemas.train_seed import SeedManifest
from schemas.training import TrainingConfig
from stages.artifacts.added_domains import added_domains
from stages.artifacts.huggingface_folder import HuggingFaceFolder, local_folder
from stages.engine.checkpoints import KEPT
from stages.engine.engines import start_engine
from stages.engine.optimizer import choose_optimizer, numbers_kept
from stages.engine.precision import choose_precision
from stages.engine.processes import find_place
from stages.engine.schedule import peak_rate
from stages.nn.central import CentralLoss, CentralModel
from stages.nn.composed import ComposedModel
from stages.nn.composed_loss import ComposedLoss
from stages.nn.decoder import Decoder, NextTokenLoss
from stages.nn.gate_losses import ContrastiveLoss, GateLoss, RoutedContrastiveLoss, RoutedLoss
from stages.nn.gates import ExpertGates, SeedGate
from stages.nn.lora import adapters, add_adapters
from stages.nn.planning import PassCost, cost_of_pass, hollow
from stages.nn.routed import RoutedDecoder

M = TypeVar("M", bound=Manifest)

FP32 = 4  # bytes
LOGITS = 3  # copies of a micro-batch's logits while a loss is computed: as they come, in fp32, their logarithms


@dataclass(frozen=True)
class Job:
    """A training, or `count` alike."""

    name: str
    count: int
    make: Callable[[], nn.Module]  # the module that gives its loss
    training: TrainingConfig
    share: float = 1.0  # of the text that one of them sees
    seen: int | None = 0  # tokens that what is trained has seen before; None: some, elsewhere


def run(config: PlanConfig, run_dir: Path) -> Plan:
    """Count the trainings that `config` asks for. Raises UsageFailure for a batch that cannot be divided."""
    tokens, clusters = _maybe(TokenizeManifest, run_dir), _maybe(ClusterManifest, run_dir)
    seed = _seed(config, run_dir)
    shape = _seed_shape(config, run_dir, seed, tokens)
    first = config.experts.training if _is_imported(config, seed) else config.seed.training
    experts = clusters.config.clusters if clusters else config.clusters
    text = tokens.metrics.train.tokens + tokens.metrics.train.documents if tokens else None  # an end after each
    speed = config.flops_per_second or _measure(first, shape, config.seconds)
    added = added_domains(run_dir) if _maybe(ExpertsManifest, run_dir) else []
    parts = ((domain.config.name, domain.metrics.train) for domain in added)
    shares = {name: (part.tokens + part.documents) / (text or 1) for name, part in parts}
    trained = None if _is_imported(config, seed) else config.seed.training.tokens
    found = jobs(config, shape, experts, shares, seen=seed.metrics.seen if seed else trained)
    return Plan(
        trainings=tuple(_plan(job, config.processes, shape, text, speed) for job in found),
        flops_per_second=speed,
        measured=config.flops_per_second is None,
        unknown=tuple(_unknown(run_dir, tokens, clusters, experts)),
    )


def _maybe(kind: type[M], run_dir: Path) -> M | None:
    """The manifest of a stage that may not have run."""
    return kind.read(run_dir) if (run_dir / kind.folder / FILE_NAME).is_file() else None


def _unknown(
    run_dir: Path, tokens: TokenizeManifest | None, clusters: ClusterManifest | None, experts: int
) -> Iterator[str]:
    if tokens is None:
        yield f"epochs: no tokens in {run_dir} yet, and the vocabulary is taken from the settings"
    if clusters is None:
        yield f"experts: no clusters in {run_dir} yet, so {experts} are taken from the settings"


def _seed(config: PlanConfig, run_dir: Path) -> SeedManifest | None:
    """The run's seed, but not one that was imported where it is to be trained, nor the other way round."""
    seed = _maybe(SeedManifest, run_dir)
    if seed and config.imported is not None and bool(config.imported) != (seed.metrics.training is None):
        return None
    return seed


def _is_imported(config: PlanConfig, seed: SeedManifest | None) -> bool:
    return bool(config.imported) or (seed is not None and seed.metrics.training is None)


def _seed_shape(
    config: PlanConfig, run_dir: Path, seed: SeedManifest | None, tokens: TokenizeManifest | None
) -> DecoderConfig:
    if seed:
        return DecoderConfig.from_huggingface(json.loads(seed.output("config.json").check(run_dir).read_text()))
    if isinstance(config.imported, str):
        return HuggingFaceFolder(local_folder(config.imported)).config()
    if config.imported:
        raise UsageFailure(
            f"no seed in {run_dir}, and no model to import is named: run `cpipe import {run_dir} hf:FOLDER`"
        )
    return DecoderConfig(
        **config.seed.model.model_dump(),
        vocab_size=tokens.metrics.vocab_size if tokens else config.vocab_size,
        max_position_embeddings=config.seed.training.sequence_length,
    )


def jobs(
    config: PlanConfig, shape: DecoderConfig, experts: int, added: Mapping[str, float], *, seen: int | None
) -> Iterator[Job]:
    """The trainings, of a seed and experts of that shape.

    `added`: the text of each added domain, as a share of the run's. `seen`: the seed's tokens; None: it is imported.
    """
    decoder = partial(_next_token, shape)
    members = dict(config.experts.members(experts))
    if seen is not None:
        yield Job("seed", 1, decoder, config.seed.training)
    member = partial(_adapted, shape, config.experts.lora) if config.experts.kind == "lora" else decoder
    yield Job("experts", experts, member, members["experts/000"].training, share=1 / experts, seen=seen)
    for name, part in added.items():
        yield Job(f"expert {name}", 1, member, members["experts/000"].training, share=part, seen=seen)
    for name in (name for name in members if name.startswith(DENSE)):
        yield Job(name, 1, decoder, members[name].training, seen=seen)
    experts += len(added)
    for place, mode in config.gates.kinds():
        if mode in ("mean-activation", "arrow"):
            continue  # nothing is trained
        count, part = (experts, 1 / experts) if mode in ALONE else (1, 1.0)
        make = partial(_gate_loss, shape, experts // count, place, mode, config)
        yield Job(f"gates {label_of(place, mode)}", count, make, config.gates.training, share=part)
    told = set()
    for composition in config.compositions:
        central = CentralConfig.beside(composition.central, shape)
        if (alone_settings := composition.alone()) not in told:
            told.add(alone_settings)
            yield Job("central-alone", 1, partial(_central_loss, central), composition.training)
        make = partial(_composed_loss, composition, central, shape, experts, config.gates)
        yield Job(composition.name, 1, make, composition.with_experts(), seen=composition.seen)


def _next_token(shape: DecoderConfig) -> nn.Module:
    return NextTokenLoss(Decoder(shape))


def _adapted(shape: DecoderConfig, lora: LoraConfig) -> nn.Module:
    return NextTokenLoss(add_adapters(Decoder(shape), lora, seed=0))


def _central_loss(shape: CentralConfig) -> nn.Module:
    return CentralLoss(CentralModel(shape))


def _frozen(shape: DecoderConfig) -> Decoder:
    return Decoder(shape).requires_grad_(False)


def _gate_loss(shape: DecoderConfig, experts: int, place: Place, mode: GateMode, config: PlanConfig) -> nn.Module:
    if place != "expert":
        decoder = _routed(shape, experts, place, mode, config)
        return RoutedContrastiveLoss(decoder) if mode == "contrastive" else RoutedLoss(decoder)
    gates = _gates(shape, experts, mode, config.gates)
    if mode == "contrastive":
        return ContrastiveLoss(gates, _frozen(shape))
    return GateLoss(gates, _frozen(shape), [_frozen(shape) for _ in range(experts)])


def _routed(shape: DecoderConfig, experts: int, place: Place, mode: GateMode, config: PlanConfig) -> RoutedDecoder:
    seed, lora = Decoder(shape).weights(), config.experts.lora
    adapted = [adapters(add_adapters(Decoder(shape), lora, seed=0)) for _ in range(experts)]
    full = [Decoder(shape).weights() for _ in range(experts)]
    return RoutedDecoder.from_parts(
        (shape, seed),
        seed,
        adapted if config.experts.kind == "lora" else [],
        full if config.experts.kind == "full" else [],
        place=place,
        mode=mode,
        memory=config.gates.reading.memory,
        end_of_text=0,
    )


def _gates(shape: DecoderConfig, experts: int, mode: GateMode, config: GatesConfig) -> ExpertGates:
    layer = config.reading.layer_read(shape.num_hidden_layers)
    return ExpertGates.closed(experts, shape.hidden_size, mode, layer, config.reading.memory, end_of_text=0)


def _composed_loss(
    config: ComposeConfig, central: CentralConfig, shape: DecoderConfig, experts: int, gates: GatesConfig
) -> nn.Module:
    gate = None
    if config.gates != "none":
        gate = SeedGate(_frozen(shape), _gates(shape, experts, config.gates, gates))
    composed = ComposedModel(CentralModel(central), [_frozen(shape) for _ in range(experts)], config.bridges, gate)
    if config.bridge_training.train == "bridges":
        composed.central.requires_grad_(False)
    return ComposedLoss(composed)


def _plan(job: Job, processes: int, shape: DecoderConfig, text: int | None, speed: float) -> PlannedTraining:
    training = job.training
    rows = training.batch_size // processes
    micro = min(training.micro_batch_size or rows, rows)
    if rows * processes != training.batch_size or rows % micro:
        raise UsageFailure(
            f"{job.name}: a batch of {training.batch_size} rows does not divide into {processes} processes with "
            f"micro-batches of {micro} rows"
        )
    precision = choose_precision(training, find_place())
    length, recompute = training.sequence_length, training.activation_checkpointing
    half, kept = precision != "fp32", partial(numbers_kept, config=training)
    cost = cost_of_pass(job.make, micro, length, half=half, recompute=recompute, numbers_kept=kept)
    tokens = training.tokens
    flops = cost.flops / (micro * length) * tokens
    return PlannedTraining(
        name=job.name,
        count=job.count,
        parameters=cost.parameters,
        trained_parameters=cost.trained,
        tokens=tokens,
        epochs=None if text is None else tokens / (text * job.share),
        flops=flops,
        learning_rate=training.learning_rate or peak_rate(training, hollow(job.make), job.seen),
        precision=precision,
        zero_stage=training.zero_stage,
        micro_batch_size=micro,
        memory=_memory(cost, training, processes, LOGITS * micro * length * shape.vocab_size * FP32),
        disk=FP32 * (cost.trained + (cost.trained + cost.optimizer) * (KEPT + 1)),  # one comes before another goes
        seconds=job.count * flops / (speed * processes),
    )


def _memory(cost: PassCost, training: TrainingConfig, processes: int, logits: int) -> Memory:
    """Bytes on one device."""
    stage, offloaded = training.zero_stage, training.offload_optimizer != "none"
    weights = FP32 * cost.parameters // (processes if stage == 3 else 1)
    gradients = FP32 * cost.trained // (processes if stage >= 2 else 1)
    share = processes if stage >= 1 else 1
    optimizer = FP32 * cost.optimizer // share
    activations = max(cost.kept, logits)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=0 if offloaded else optimizer,
        copies=cost.copies,
        activations=activations,
        total=weights + gradients + (0 if offloaded else optimizer) + cost.copies + activations,
        host=2 * FP32 * cost.trained // share + optimizer if offloaded else 0,
    )


def _measure(asked: TrainingConfig, shape: DecoderConfig, seconds: float) -> float:
    """FLOP/s of real steps of the seed on this device, measured for so long."""
    seed = _next_token(shape)
    alone = {"zero_stage": 0, "offload_optimizer": "none", "deepspeed": None, "engine": "torch", "compile": "off"}
    training = asked.model_copy(update={**alone, "optimizer": choose_optimizer(asked, seed)})
    place = find_place()
    micro = min(training.micro_batch_size or training.batch_size, training.batch_size)
    engine = start_engine(seed, training, place)
    ids = torch.randint(shape.vocab_size, (micro, training.sequence_length + 1), device=place.device)
    batch = [ids] * (training.batch_size // micro)
    engine.step(batch, 0.0)  # what only the first step does is not measured
    started, done = time.monotonic(), 0
    while not done or time.monotonic() - started < seconds:
        engine.step(batch, 0.0)  # reads the gradient's norm, so the device has finished
        done += 1
    taken, recompute = (time.monotonic() - started) / done, training.activation_checkpointing
    cost = cost_of_pass(partial(_next_token, shape), micro, training.sequence_length, half=False, recompute=recompute)
    return cost.flops * len(batch) / taken
