"""What a run holds that can be scored or continued: manifests, and the models as plain shapes and weights."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from schemas.central import CentralConfig
from schemas.cluster_documents import ClusterManifest
from schemas.compose_model import BridgeConfig, CentralAloneManifest, ComposeManifest
from schemas.decoder import DecoderConfig
from schemas.failures import UsageFailure
from schemas.manifest import FILE_NAME, InputRef, Manifest
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import DENSE, ExpertManifest, ExpertsManifest, flags_of
from schemas.train_gates import GateMode, GatesManifest, Place, label_of
from schemas.train_seed import SeedManifest
from stages.artifacts.adapter_folder import read_adapted, read_adapter
from stages.artifacts.added_domains import added_domains, added_labels, text_of_all
from stages.artifacts.model_folder import WEIGHTS, read_model, read_tensors

Weights = tuple[DecoderConfig, dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class RunModels:
    """The finished models of a run. Compositions and the gates may be missing, seed and experts may not."""

    run_dir: Path
    members: ExpertsManifest
    seed: SeedManifest
    experts: tuple[ExpertManifest, ...]
    dense: ExpertManifest | None
    further_dense: dict[str, ExpertManifest]  # by folder, those of fewer steps first
    gates: GatesManifest | None
    central: CentralAloneManifest | None
    compositions: dict[str, ComposeManifest]

    @classmethod
    def find(cls, run_dir: Path) -> "RunModels":
        """Read the manifests. Raises UsageFailure when there are no experts."""
        members = ExpertsManifest.read(run_dir)
        numbers = range(members.metrics.experts)
        compositions = {}
        for path in sorted(run_dir.glob(f"central*/{FILE_NAME}")):
            if path.parent.name != CentralAloneManifest.folder:
                compositions[path.parent.name] = ComposeManifest.parse(path)
        return cls(
            run_dir,
            members,
            SeedManifest.read(run_dir),
            tuple(ExpertManifest.read(run_dir, expert_folder(number)) for number in numbers),
            _maybe(ExpertManifest, run_dir, DENSE),
            _further_dense(run_dir),
            _maybe(GatesManifest, run_dir, GatesManifest.folder),
            _maybe(CentralAloneManifest, run_dir, CentralAloneManifest.folder),
            compositions,
        )

    def all_dense(self) -> dict[str, ExpertManifest]:
        """The dense baselines by folder, the experts' own first."""
        return ({DENSE: self.dense} if self.dense else {}) | self.further_dense

    def held_out_text(self, tokens: TokenizeManifest) -> list[Path]:
        """The token shards of held-out text, checked, those of added domains last."""
        return text_of_all(self.run_dir, tokens, "valid")

    def with_added_labels(self, labels: np.ndarray) -> np.ndarray:
        """The cluster of each document of `held_out_text`, given those of the run's; added ones have their expert's."""
        return np.append(labels, np.array(added_labels(self.run_dir, "valid"), dtype=np.int64))

    def window_length(self, shape: DecoderConfig) -> int:
        """Tokens to score at a time: what the seed was trained on, but where it came from elsewhere, the experts."""
        longest = shape.max_position_embeddings
        return longest if self.seed.metrics.training else min(longest, self.members.config.training.sequence_length)

    def refuse_other_ancestors(self, before: Sequence[InputRef] = (), folders: Sequence[str] | None = None) -> None:
        """Raise UsageFailure when a model, or one in `folders`, was made from something that was replaced since.

        `before`: the stages before the models, as they are now.
        """
        made = self._by_folder() | {ExpertsManifest.folder: self.members}
        there = {name: manifest.content_digest() for name, manifest in made.items()}
        there |= {ref.name: ref.digest for ref in before}
        for name in folders or made:
            for ref in made[name].inputs:
                if there.get(ref.name, ref.digest) != ref.digest:
                    raise UsageFailure(
                        f"{self.run_dir / name} was made from another {ref.name} than is there now: "
                        f"run `cpipe {made[name].command} {self.run_dir}{flags_of(name)} --force`, or remove the folder"
                    )

    def as_inputs(self) -> list[InputRef]:
        """Every model's manifest, as inputs of a stage."""
        return [manifest.as_input(name) for name, manifest in self._by_folder().items()]

    def _by_folder(self) -> dict[str, Manifest]:
        named: dict[str, Manifest | None] = {
            "seed": self.seed,
            **{expert_folder(number): expert for number, expert in enumerate(self.experts)},
            **self.all_dense(),
            "gates": self.gates,
            CentralAloneManifest.folder: self.central,
            **self.compositions,
        }
        return {name: manifest for name, manifest in named.items() if manifest is not None}

    @cache  # noqa: B019  # a run's models are read once per process, which ends with the command
    def decoder(self, folder: str) -> Weights:
        """Shape and weights of `seed`, `dense`, `dense-2000` or `experts/007`. Raises UsageFailure where it is none.

        See `read_expert` for what a LoRA expert is and costs.
        """
        if folder == "seed":
            return read_model(self.run_dir, self.seed)
        return read_expert(self.run_dir, folder, self.seed, partial(self.decoder, "seed"))

    def gate_tensors(self) -> dict[str, Tensor]:
        """The gates' tensors; empty without gates."""
        if self.gates is None:
            return {}
        return read_tensors(self.gates.output("gates.safetensors").check(self.run_dir))

    def routed(self, place: Place, mode: GateMode) -> dict[str, Any]:
        """All parts of a decoder that asks the experts inside, by the names of the arguments that put them together.

        Raises UsageFailure when the run has no such gates, or was made from something that was replaced since.
        """
        gates, label = self.gates, label_of(place, mode)
        if gates is None or (place, mode) not in gates.config.kinds():
            there = ", ".join(label_of(*kind) for kind in gates.config.kinds()) if gates else "none"
            raise UsageFailure(
                f"{self.run_dir} has no gates {label} (there: {there}): run `cpipe train-gates` for them"
            )
        self.refuse_other_ancestors(folders=[GatesManifest.folder])
        folders = [expert_folder(number) for number in range(len(self.experts))]
        reading = gates.config.reading
        tensors = self.gate_tensors().items()
        return {
            **routed_parts(self.run_dir, folders, self.seed, partial(self.decoder, "seed"), reading.shared),
            "place": place,
            "mode": mode,
            "memory": reading.memory,
            "end_of_text": gates.metrics.end_of_text,
            "tensors": {name.removeprefix(f"{label}."): each for name, each in tensors if name.startswith(f"{label}.")},
        }

    def central_alone(self) -> tuple[CentralConfig, dict[str, Tensor]]:
        """Shape and weights of the central model before it met the experts."""
        if self.central is None:
            raise UsageFailure(f"no central model in {self.run_dir}: run `cpipe compose {self.run_dir}` first")
        shape = CentralConfig.from_json(self.central.output("config.json").check(self.run_dir).read_bytes())
        return shape, read_tensors(self.central.output(WEIGHTS).check(self.run_dir))

    def composition(self, name: str) -> dict[str, Any]:
        """All parts of a composition, by the names of the arguments that put them together.

        Raises UsageFailure when there is no composition of that name, or what it was made from was replaced since.
        """
        manifest = self.compositions.get(name)
        if manifest is None:
            known = ", ".join(self.compositions) or "none"
            raise UsageFailure(f"no composition {name!r} in {self.run_dir} (there: {known}): run `cpipe compose` first")
        self.refuse_other_ancestors(folders=[name])
        shapes = json.loads(manifest.output("config.json").check(self.run_dir).read_text())
        trained = manifest.config.experts == "trained"
        numbers = range(len(self.experts))
        gate = None
        if manifest.config.gates != "none" and self.gates is not None:
            gate = (self.gate_tensors(), *self.gates.reads(manifest.config.gates))
        return {
            "central": CentralConfig.from_mapping(shapes["central"]),
            # Before there was a choice, states were mixed.
            "bridges": BridgeConfig.from_mapping({"head": "states"} | shapes["bridges"]),
            "weights": read_tensors(manifest.output(WEIGHTS).check(self.run_dir)),
            "experts": [self.decoder(expert_folder(number) if trained else "seed") for number in numbers],
            "seed": self.decoder("seed"),
            "gate": gate,
        }


def routing_tensors(run_dir: Path, clusters: ClusterManifest) -> tuple[np.ndarray, np.ndarray]:
    """Token vectors [vocabulary, d] and centroids [experts, d], added ones last, that tell which a text is for."""
    token_vectors = read_tensors(clusters.output("vectorizer.safetensors").check(run_dir))["token_vectors"]
    centroids = read_tensors(clusters.output("centroids.safetensors").check(run_dir))["centroids"]
    added = [domain.output("centroid.safetensors").check(run_dir) for domain in added_domains(run_dir)]
    rows = [read_tensors(path)["centroid"][None].numpy() for path in added]
    return token_vectors.numpy(), np.concatenate([centroids.numpy(), *rows])


def read_expert(run_dir: Path, folder: str, seed: SeedManifest, seed_decoder: Callable[[], Weights]) -> Weights:
    """Shape and weights of a member of `cpipe train-experts`.

    A LoRA expert comes merged, as a decoder like any other: as fast as the seed, and everything that takes decoders
    takes it. That costs memory for the weights that have an adapter, in full, for each expert; all other tensors are
    the seed's own, shared (on the processor: each decoder moved to an accelerator is a copy).

    Raises UsageFailure for an expert of another seed than the run's.
    """
    manifest = ExpertManifest.read(run_dir, folder)
    if manifest.config.lora is not None:
        shape, weights = seed_decoder()
        return shape, read_adapted(run_dir, manifest, seed, weights)
    if seed.as_input() not in manifest.inputs:
        raise UsageFailure(
            f"{run_dir / folder} was trained from another seed than is there now: "
            f"run `cpipe {manifest.command} {run_dir}{flags_of(folder)} --force`"
        )
    return read_model(run_dir, manifest, folder)


def routed_parts(
    run_dir: Path, folders: Sequence[str], seed: SeedManifest, seed_decoder: Callable[[], Weights], shared: str
) -> dict[str, Any]:
    """Experts to be put inside one decoder, by the names of the arguments that do so.

    `shared`: what of full experts is not routed, "seed" or "average" of these experts; of LoRA experts it is the seed.
    """
    shape, weights = seed_decoder()
    manifests = [ExpertManifest.read(run_dir, folder) for folder in folders]
    if manifests[0].config.lora is not None:
        found = [read_adapter(run_dir, manifest, seed, weights) for manifest in manifests]
        scaled = [
            {name: (a_RI, b_OR * (config.lora_alpha / config.r)) for name, (a_RI, b_OR) in each.items()}
            for config, each in found
        ]
        return {"shared": (shape, weights), "seed": weights, "adapters": scaled, "experts": []}
    experts = [read_model(run_dir, manifest, folder)[1] for manifest, folder in zip(manifests, folders, strict=True)]
    between = weights
    if shared == "average":
        between = mean_of(experts)
    return {"shared": (shape, between), "seed": weights, "adapters": [], "experts": experts}


def mean_of(models: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the weights of models of one shape."""
    return {name: torch.stack([weights[name] for weights in models]).mean(0) for name in models[0]}


def expert_folder(number: int) -> str:
    """Folder of an expert in the run."""
    return f"experts/{number:03d}"


def _further_dense(run_dir: Path) -> dict[str, ExpertManifest]:
    found = {path.parent.name: ExpertManifest.parse(path) for path in run_dir.glob(f"{DENSE}-*/{FILE_NAME}")}
    return dict(sorted(found.items(), key=lambda item: item[1].metrics.training.steps))


def _maybe(kind: Any, run_dir: Path, folder: str) -> Any:
    """The manifest of a stage that may not have run."""
    return kind.read(run_dir, folder) if (run_dir / folder / FILE_NAME).is_file() else None
