"""Train the gates: experts and seed frozen, one vector per expert learns when the expert is worth asking (PHATGOOSE).

- `independent` is the paper's way: every gate alone, on its own expert's cluster; `joint` lets the gates see each
  other; `contrastive`, `mean-activation` and `arrow` are learnt without asking the experts
- what knows of one expert only is a finished stage of its own, so an expert's gates can be a job of their own, and
  those of an expert that comes later leave the others' as they are. With `--force` only what is not as asked for is
  done again, or all where nothing is left to do
- an expert equal to its seed would leave its gate without a gradient: refused
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from schemas.cluster_documents import ClusterManifest
from schemas.failures import InputFailure, StaleFailure, UsageFailure
from schemas.manifest import FILE_NAME, InputRef
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import ExpertManifest, ExpertsManifest
from schemas.train_gates import (
    GateConfig,
    GateManifest,
    GateMode,
    GateRun,
    GatesConfig,
    GatesManifest,
    GatesMetrics,
    label_of,
)
from schemas.train_seed import SeedManifest
from stages.artifacts.added_domains import begun_domains, domain_of, text_of_all
from stages.artifacts.model_folder import device, read_model, read_tensors, write_tensors
from stages.artifacts.run_models import Weights, expert_folder, read_expert, routed_parts
from stages.artifacts.stage_folder import claim_folder
from stages.data.batches import LabelledBatches, Rows
from stages.data.token_store import TokenStore, read_table
from stages.engine.loop import train
from stages.engine.processes import meet
from stages.nn.decoder import Decoder
from stages.nn.gate_losses import ContrastiveLoss, GateLoss, RoutedContrastiveLoss, RoutedLoss
from stages.nn.gates import ExpertGates, normalise
from stages.nn.routed import RoutedDecoder

TENSORS = "gates.safetensors"
D = TypeVar("D", bound=Decoder)


def run(config: GatesConfig, run_dir: Path, *, force: bool = False) -> GatesManifest | GateManifest:
    """Train the gates that are missing, of all experts or of `config.expert`, and gather all of them in `gates/`."""
    frozen = Frozen(config, run_dir)
    if config.expert is not None:
        return _train_of_expert(config.expert, config, frozen, force)
    experts = ExpertsManifest.read(run_dir)
    members = dict(config.members(range(experts.metrics.experts)))
    done = {folder: _finished(folder, member, frozen, force) for folder, member in members.items()}
    again = force and all(done.values())
    meet()  # else a late process would not find what the first one has set aside already, and train something else
    for folder, member in members.items():
        if again or not done[folder]:
            done[folder] = _train_member(folder, member, frozen, force)
    return _gather(config, frozen, experts, {folder: manifest for folder, manifest in done.items() if manifest})


class Frozen:
    """What gates are trained over: models and rows of tokens, each read when it is first asked for."""

    def __init__(self, config: GatesConfig, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.tokens, self.clusters = TokenizeManifest.read(run_dir), ClusterManifest.read(run_dir)
        self.seed_manifest = SeedManifest.read(run_dir)
        self.end = self.tokens.metrics.end_of_text
        self._training = config.training
        self._experts: dict[int, Decoder] = {}

    def inputs(self, expert: int | None) -> list[InputRef]:
        """What the gates of an expert, or of all, are made from."""
        before = [self.tokens.as_input(), self.clusters.as_input(), self.seed_manifest.as_input()]
        if expert is None:
            return [*before, ExpertsManifest.read(self.run_dir).as_input()]
        folder = expert_folder(expert)
        return [*before, ExpertManifest.read(self.run_dir, folder).as_input(folder)]

    @cached_property
    def seed(self) -> Decoder:
        """The seed."""
        return self.as_trained(Decoder.from_weights(*read_model(self.run_dir, self.seed_manifest)))

    @cached_property
    def count(self) -> int:
        """How many experts there are."""
        return ExpertsManifest.read(self.run_dir).metrics.experts

    def expert(self, number: int) -> Decoder:
        """An expert. Raises InputFailure when it equals the seed."""
        if number not in self._experts:
            self._experts[number] = self.as_trained(self._read_expert(number))
        return self._experts[number]

    def as_trained(self, decoder: D) -> D:
        """The decoder, seeing of a row what it saw when it was trained."""
        decoder.separator = self.end if self._training.mask_documents else None
        return decoder

    def routed_parts(self, numbers: Sequence[int], shared: str) -> dict[str, Any]:
        """What puts these experts into one decoder. Raises InputFailure when one equals the seed."""
        for number in numbers:
            self.expert(number)
        folders = [expert_folder(number) for number in numbers]
        return routed_parts(self.run_dir, folders, self.seed_manifest, self._seed_weights, shared)

    def _seed_weights(self) -> Weights:
        return self.seed.config, self.seed.weights()

    def _read_expert(self, number: int) -> Decoder:
        seed = self.seed
        weights = read_expert(self.run_dir, expert_folder(number), self.seed_manifest, self._seed_weights)
        expert = Decoder.from_weights(*weights)
        if all(torch.equal(own, other) for own, other in zip(expert.parameters(), seed.parameters(), strict=True)):
            raise InputFailure(
                f"expert {number} equals the seed, so its gate has nothing to learn: train it for longer"
            )
        return expert

    @cached_property
    def _store(self) -> TokenStore:
        return TokenStore.open([ref.check(self.run_dir) for ref in self.tokens.shards("train")])

    @cached_property
    def _assigned(self) -> dict[str, np.ndarray]:
        return read_table(self.clusters.output("assignments-train.arrow").check(self.run_dir))

    def rows(self, expert: int | None) -> Rows:
        """Rows of an expert's documents, those it shares among them, or of all."""
        length, table = self._training.sequence_length, self._assigned
        if expert is None:
            return Rows(TokenStore.open(text_of_all(self.run_dir, self.tokens, "train")), self.end, length)
        if domain := domain_of(self.run_dir, expert_folder(expert)):
            own = TokenStore.open([ref.check(self.run_dir) for ref in domain.shards("train")])
            return Rows(own, self.end, length)
        documents = np.flatnonzero((table["cluster"] == expert) | (table["second"] == expert))
        return Rows(self._store, self.end, length, documents)


def _train_of_expert(expert: int, config: GatesConfig, frozen: Frozen, force: bool) -> GateManifest:
    experts = frozen.clusters.config.clusters + len(begun_domains(frozen.run_dir))
    if expert >= experts:
        raise UsageFailure(f"--expert {expert} is not one of the {experts} experts")
    members = [
        (folder, member) for folder, member in config.members(range(expert, expert + 1)) if member.expert == expert
    ]
    if not members:
        raise UsageFailure(f"gates learnt as {', '.join(config.modes)} know of all experts: leave --expert out")
    return [_train_member(folder, member, frozen, force) for folder, member in members][-1]


def _finished(folder: str, member: GateConfig, frozen: Frozen, force: bool) -> GateManifest | None:
    """The manifest where there is nothing to do. Raises StaleFailure where there is something else, unless forced."""
    if not (frozen.run_dir / folder / FILE_NAME).exists():
        return None
    try:
        with claim_folder(frozen.run_dir, GateManifest, member, frozen.inputs(member.expert), folder=folder) as claim:
            return claim.finished
    except StaleFailure:
        if force:
            return None
        raise


def _train_member(folder: str, member: GateConfig, frozen: Frozen, force: bool) -> GateManifest:
    run_dir = frozen.run_dir
    with claim_folder(run_dir, GateManifest, member, frozen.inputs(member.expert), folder=folder, force=force) as claim:
        if claim.finished:
            return claim.finished
        if claim.leader:  # the manifest of all gates says that each is finished: from here on one is not
            (run_dir / GatesManifest.folder / FILE_NAME).unlink(missing_ok=True)
        tensors, metrics = _make(member, frozen, claim.path)
        written = [write_tensors(claim.path / TENSORS, tensors, run_dir, "gates")] if claim.leader else []
        return claim.finish(written, metrics)


def _make(member: GateConfig, frozen: Frozen, folder: Path) -> tuple[dict[str, Tensor], GateRun]:
    """The gates' tensors, and how they came to be."""
    training, mode = member.training, member.mode
    numbers = range(frozen.count) if member.expert is None else [member.expert]
    gates = _closed(member, frozen, numbers)
    if mode == "arrow" and isinstance(gates, RoutedDecoder):
        directions = {f"{name}.vectors": module.directions() for name, module in gates.routed().items()}
        return directions, _untrained(member, 0)
    if mode == "mean-activation":
        return _take_mean(member, frozen, gates)
    loss = _loss(mode, gates, frozen, numbers)
    order = training.batch_size, training.seed + 2
    if mode == "contrastive":
        batch_at: Callable[[int], Tensor] = LabelledBatches([frozen.rows(number) for number in numbers], *order)
    else:
        batch_at = frozen.rows(member.expert).batches(*order)
    run = _train(member, loss, batch_at, folder)
    return gates.gate_tensors() if isinstance(gates, RoutedDecoder) else gates.tensors(), run


def _closed(member: GateConfig, frozen: Frozen, numbers: Sequence[int]) -> ExpertGates | RoutedDecoder:
    """The gates of these experts at their start: at the experts' inputs, or with the decoder they stand in."""
    reading, shape = member.reading, frozen.seed.config
    if member.place == "expert":
        layer = reading.layer_read(shape.num_hidden_layers)
        return ExpertGates.closed(len(numbers), shape.hidden_size, member.mode, layer, reading.memory, frozen.end)
    routed = RoutedDecoder.from_parts(
        **frozen.routed_parts(numbers, reading.shared),
        place=member.place,
        mode=member.mode,
        memory=reading.memory,
        end_of_text=frozen.end,
    )
    return frozen.as_trained(routed)


def _loss(mode: GateMode, gates: ExpertGates | RoutedDecoder, frozen: Frozen, numbers: Sequence[int]) -> nn.Module:
    if isinstance(gates, RoutedDecoder):
        return RoutedContrastiveLoss(gates) if mode == "contrastive" else RoutedLoss(gates)
    if mode == "contrastive":
        return ContrastiveLoss(gates, frozen.seed)
    return GateLoss(gates, frozen.seed, [frozen.expert(number) for number in numbers])


def _train(member: GateConfig, loss: nn.Module, batch_at: Callable[[int], Tensor], folder: Path) -> GateRun:
    label = label_of(member.place, member.mode) + ("" if member.expert is None else f" {member.expert:03d}")
    metrics = train(loss, batch_at, member.training, folder, f"gates {label}")
    with torch.no_grad():
        parts = loss.cpu()(batch_at(member.training.steps))
    slots = sorted((name for name in parts if name.startswith("open_")), key=lambda name: int(name[len("open_") :]))
    openness = tuple(round(float(parts[name]), 4) for name in slots)
    return _untrained(member, metrics.tokens).model_copy(update={"openness": openness, "training": metrics})


def _untrained(member: GateConfig, tokens: int) -> GateRun:
    place, mode, expert = member.place, member.mode, member.expert
    return GateRun(place=place, mode=mode, expert=expert, openness=(), tokens=tokens, training=None)


def _take_mean(
    member: GateConfig, frozen: Frozen, gates: ExpertGates | RoutedDecoder
) -> tuple[dict[str, Tensor], GateRun]:
    """The mean of what each gate reads in the expert's cluster, over as many rows as it would be trained on jointly."""
    training, rows = member.training, frozen.rows(member.expert)
    share = -(-training.batch_size // frozen.clusters.config.clusters)
    seed = gates if isinstance(gates, RoutedDecoder) else frozen.seed
    seed.to(device())
    means: dict[str, Tensor] = {}
    for step in range(training.steps):
        ids_BT = rows.batch(step, share, training.seed + 2)[:, :-1].to(device())
        with torch.no_grad():
            read = gates.listen(ids_BT) if isinstance(gates, RoutedDecoder) else {"": gates.read(frozen.seed, ids_BT)}
        for name, read_BTD in read.items():
            mean_1D = normalise(read_BTD).mean((0, 1), keepdim=True)[0].cpu() / training.steps
            key = f"{name}.vectors".removeprefix(".")
            means[key] = means[key] + mean_1D if key in means else mean_1D
    seed.cpu()
    return means, _untrained(member, training.steps * share * training.sequence_length)


def _gather(
    config: GatesConfig, frozen: Frozen, experts: ExpertsManifest, members: dict[str, GateManifest]
) -> GatesManifest:
    """Write the manifest of `gates/`, and all tensors in one file beside it."""
    run_dir = frozen.run_dir
    inputs = [*frozen.inputs(None), *(member.as_input(folder) for folder, member in members.items())]
    with claim_folder(run_dir, GatesManifest, config, inputs, collection=True) as claim:
        if claim.finished:
            return claim.finished
        tensors = dict(_all_tensors(run_dir, members.values()))
        metrics = GatesMetrics(
            layer=config.reading.layer_read(frozen.seed.config.num_hidden_layers),
            end_of_text=frozen.end,
            experts=experts.metrics.experts,
            runs=tuple(member.metrics for member in members.values()),
        )
        written = [write_tensors(claim.path / TENSORS, tensors, run_dir, "gates")] if claim.leader else []
        return claim.finish(written, metrics)


def _all_tensors(run_dir: Path, members: Iterable[GateManifest]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by the names they have in `gates/`: those of single experts under each other, in their order."""
    found: dict[str, list[Tensor]] = {}
    for member in members:
        label = label_of(member.config.place, member.config.mode)
        for name, tensor in read_tensors(member.output(TENSORS).check(run_dir)).items():
            found.setdefault(f"{label}.{name}", []).append(tensor)
    return ((name, torch.cat(tensors)) for name, tensors in found.items())
