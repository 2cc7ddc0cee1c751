"""Compare all models of a run on held-out text, in bits per byte.

- every model is run once and leaves one log-probability per token; every way to combine the experts is then arithmetic
  on these arrays, so that all rows stand on the same tokens and the same forward passes
- each row says what it cost: training of everything it is made of, and inference per token, a model that joins late
  catching up on what it has missed
- "oracle" picks each document's best expert in hindsight: a bound, not a method
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from loguru import logger
from torch import Tensor

from schemas.cluster_documents import ClusterManifest
from schemas.evaluate_models import EvaluateConfig, EvaluateManifest, EvaluateMetrics, ModelRow, UsageRow
from schemas.files import write_bytes
from schemas.tokenize_text import TokenizeManifest
from schemas.train_gates import GateMode
from stages.artifacts.model_folder import device, read_tensors
from stages.artifacts.run_models import RunModels, expert_folder
from stages.artifacts.stage_folder import claim_folder
from stages.clustering.routing import cluster_weights, prefix_vectors
from stages.data.token_store import TokenStore, read_table
from stages.data.windows import Windows, choose_documents
from stages.nn.central import CentralModel
from stages.nn.composed import ComposedModel
from stages.nn.decoder import Decoder, token_log_probs
from stages.nn.flops import BACKWARD_AND_FORWARD, forward_flops
from stages.nn.gates import ExpertGates
from stages.nn.leaks import gap_to_prefix
from stages.nn.mixture import mean_models_run, mixed_log_probs, oracle_log_weights, posterior_log_weights
from stages.reporting.scores import ScoreTable
from stages.reporting.table import as_json, markdown, plot

Forward = Callable[[Tensor], Tensor]  # ids [B, T] -> logits [B, T, V]


def run(config: EvaluateConfig, run_dir: Path, *, force: bool = False) -> EvaluateManifest:
    """Score every model the run holds and write the table to `reports/`."""
    tokens, clusters, models = TokenizeManifest.read(run_dir), ClusterManifest.read(run_dir), RunModels.find(run_dir)
    before = [tokens.as_input(), clusters.as_input()]
    models.refuse_other_ancestors(before)
    inputs = [*before, *models.as_inputs()]
    with claim_folder(run_dir, EvaluateManifest, config, inputs, force=force) as claim:
        if claim.finished:
            return claim.finished
        evaluation = Evaluation(config, run_dir, tokens, clusters, models)
        evaluation.add_single_models()
        evaluation.add_ensembles()
        evaluation.add_gates()
        evaluation.add_central_models()
        rows = evaluation.table.rows()
        usage = tuple(evaluation.usage)
        outputs = [
            write_bytes(claim.path / "table.json", as_json(rows, usage), run_dir),
            write_bytes(claim.path / "table.md", markdown(rows, usage).encode(), run_dir),
            write_bytes(claim.path / "bits_per_byte.png", plot(rows), run_dir),
        ]
        return claim.finish(outputs, evaluation.metrics(rows, usage))


class Evaluation:
    """The scored text, the log-probabilities of the decoders on it, and the table as it grows."""

    def __init__(
        self,
        config: EvaluateConfig,
        run_dir: Path,
        tokens: TokenizeManifest,
        clusters: ClusterManifest,
        models: RunModels,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.clusters = clusters
        self.models = models
        store = TokenStore.open([ref.check(run_dir) for ref in tokens.shards("valid")])
        self.shape = models.decoder("seed")[0]
        length = self.shape.max_position_embeddings
        documents = choose_documents(store, config.tokens)
        self.windows = Windows(store, documents, tokens.metrics.end_of_text, length)
        few = choose_documents(store, min(config.tokens, config.usage_tokens))
        self.usage_windows = Windows(store, few, tokens.metrics.end_of_text, length)
        assigned = np.asarray(read_table(clusters.output("assignments-valid.arrow").check(run_dir))["cluster"])
        self.table = ScoreTable(
            [store.sources[document] for document in documents],
            [f"cluster {assigned[document]:03d}" for document in documents],
            store.bytes[documents],
            self.windows.starts,
        )
        self.usage: list[UsageRow] = []
        self.prefix_gap = 0.0
        self._count_cost(length)

    def _count_cost(self, length: int) -> None:
        """Parameters and FLOPs of one decoder, and the training FLOPs of seed and experts."""
        models = self.models
        decoder = Decoder.from_weights(*models.decoder("seed"))
        self.parameters = models.seed.metrics.parameters
        self.forward_flops = forward_flops(decoder, length)
        self.gate_flops = 0.0
        if models.gates:
            layer = models.gates.metrics.layer
            self.gate_flops = forward_flops(lambda ids: decoder.hidden_states(ids, depth=layer), length)
        train = BACKWARD_AND_FORWARD * self.forward_flops
        self.seed_training = train * models.seed.metrics.training.tokens
        self.experts_training = self.seed_training + train * sum(e.metrics.training.tokens for e in models.experts)
        self.dense_training = self.seed_training
        if models.dense:
            self.dense_training += train * models.dense.metrics.training.tokens

    def score(self, forward: Forward, label: str, windows: Windows | None = None) -> Tensor:
        """Log-probability [N], in nats, that `forward` gives to every token of `windows` (all that are scored)."""
        windows = windows or self.windows
        size, place = self.config.score_batch_size, device()
        found = windows.collect(
            lambda ids, targets: token_log_probs(forward(ids), targets), size, f"score {label}", place
        )
        logger.info("scored {}: {:.4f} nats per token", label, -float(found.mean()))
        return found

    def _decoder(self, folder: str) -> Decoder:
        return Decoder.from_weights(*self.models.decoder(folder)).to(device())

    def add_single_models(self) -> None:
        """Seed, dense, the weight average and the best expert; keeps the experts' scores for what follows."""
        size, flops = self.parameters, self.forward_flops
        folders = [expert_folder(number) for number in range(len(self.models.experts))]
        self.seed_scores = self.score(self._decoder("seed"), "seed")
        self.expert_scores = torch.stack([self.score(self._decoder(folder), folder) for folder in folders], -1)
        self.table.add("seed", "single", self.seed_scores, size, size, self.seed_training, flops)
        if self.models.dense:
            scores = self.score(self._decoder("dense"), "dense")
            self.table.add("dense", "single", scores, size, size, self.dense_training, flops)
        weights = [self.models.decoder(folder)[1] for folder in folders]
        mean = {name: torch.stack([each[name] for each in weights]).mean(0) for name in weights[0]}
        average = self.score(Decoder.from_weights(self.shape, mean).to(device()), "weight average")
        self.table.add("weight average", "single", average, size, size, self.experts_training, flops)
        best = int(self.expert_scores.sum(0).argmax())
        name = f"best single expert ({best:03d})"
        self.table.add(name, "single", self.expert_scores[:, best], size, size, self.experts_training, flops)

    def _add_mixture(self, name: str, group: str, log_weight_NX: Tensor, training: float | None = None) -> None:
        """A row that mixes models with these weights, at the cost of those it asks.

        One slot more than there are experts means gates: the first is the seed, which they read up to their layer in
        any case.
        """
        count = len(self.models.experts)
        gated = log_weight_NX.shape[1] > count
        scores = torch.cat([self.seed_scores[:, None], self.expert_scores], -1) if gated else self.expert_scores
        asked = (log_weight_NX > -torch.inf).numpy()
        flops = mean_models_run(asked[:, -count:], self.windows.window_starts()) * self.forward_flops
        if gated:
            flops += self.forward_flops if asked[:, 0].any() else self.gate_flops
        stored = asked.shape[1] * self.parameters
        active = round(float(asked.sum(-1).mean()) * self.parameters)
        mixed = mixed_log_probs(log_weight_NX, scores)
        self.table.add(name, group, mixed, stored, active, training or self.experts_training, flops)

    def _spans(self) -> Iterator[slice]:
        """Where each document's tokens lie."""
        return itertools.starmap(slice, itertools.pairwise(self.windows.starts.tolist()))

    def add_ensembles(self) -> None:
        """Oracle, uniform, cBTM by distance to the centroids, and the two posteriors."""
        scores = self.expert_scores
        by_document = [scores[span] for span in self._spans()]
        oracle = torch.cat([oracle_log_weights(each) for each in by_document])
        self._add_mixture("oracle expert per document", "ensemble", oracle)
        self._add_mixture("uniform ensemble", "ensemble", torch.zeros_like(scores).log_softmax(-1))
        for top_k in self._counts():
            self._add_mixture(f"cBTM {_top(top_k)}", "ensemble", self._cluster_weights(top_k))
        for name, forgetting in (("Bayes posterior", 1.0), ("forgetting posterior", self.config.forgetting)):
            posterior = torch.cat([posterior_log_weights(each, forgetting) for each in by_document])
            self._add_mixture(name, "ensemble", posterior)

    def _counts(self) -> list[int | None]:
        """The numbers of experts to mix; None stands for all."""
        return [*(count for count in self.config.top_k if count < len(self.models.experts)), None]

    def _cluster_weights(self, top_k: int | None) -> Tensor:
        """cBTM's log-weights [N, experts], each from the document's tokens before."""
        clusters = self.clusters
        tensors = {
            name: read_tensors(clusters.output(f"{file}.safetensors").check(self.run_dir))[name].numpy()
            for file, name in (("vectorizer", "token_vectors"), ("centroids", "centroids"))
        }
        found = []
        for number in range(len(self.windows.documents)):
            prefix = prefix_vectors(self.windows.document_tokens(number), tensors["token_vectors"])
            found.append(cluster_weights(prefix, tensors["centroids"], clusters.config.temperature, top_k))
        return torch.from_numpy(np.concatenate(found)).log()

    def add_gates(self) -> None:
        """PHATGOOSE at the input of each expert: every mode the run has, for every number of experts."""
        gates = self.models.gates
        if gates is None:
            return
        tensors = self.models.gate_tensors()
        seed = self._decoder("seed")
        for mode in gates.config.modes:
            training = self.experts_training + self._gate_training(mode)
            reader = ExpertGates.from_tensors(tensors, gates.metrics.layer, mode).to(device())
            for top_k in self._counts():
                weights = self._gate_weights(seed, reader, top_k)
                self._add_mixture(f"gates {mode} {_top(top_k)}", "gates", weights, training)

    def _gate_training(self, mode: GateMode) -> float:
        """FLOPs of training the gates: forward passes of the seed and of the experts each run consults."""
        runs = self.models.gates.metrics.runs if self.models.gates else ()
        models_run = 1 + (len(self.models.experts) if mode == "joint" else 1)
        return models_run * self.forward_flops * sum(run.training.tokens for run in runs if run.mode == mode)

    def _gate_weights(self, seed: Decoder, gates: ExpertGates, top_k: int | None) -> Tensor:
        def weights(ids_BT: Tensor, _: Tensor) -> Tensor:
            return gates.log_weights(seed.hidden_states(ids_BT, depth=gates.layer)[-1], top_k)

        return self.windows.collect(weights, self.config.score_batch_size, "gates", device())

    def add_central_models(self) -> None:
        """The central model alone, every composition, and what both lose without their parts."""
        central_training = 0.0
        if self.models.central:
            shape, weights = self.models.central_alone()
            central = CentralModel.from_weights(shape, weights).eval().requires_grad_(False)
            flops = forward_flops(central, self.shape.max_position_embeddings)
            central.to(device())
            tokens = self.models.central.metrics.training.tokens
            central_training = BACKWARD_AND_FORWARD * flops * tokens
            begun = self.seed_training if shape.start_from_seed else 0.0
            size = self.models.central.metrics.parameters
            scores = self.score(lambda ids: central(ids).logits_BTV, "central alone")
            self.table.add("central alone", "central", scores, size, size, central_training + begun, flops)
            self._add_usage("central alone", central, ("latents", "plan"))
        for name in self.models.compositions:
            self._add_composition(name, central_training)

    def _add_composition(self, name: str, central_training: float) -> None:
        manifest = self.models.compositions[name]
        composed = ComposedModel.from_parts(**self.models.composition(name))
        flops = forward_flops(lambda ids: composed(ids), self.shape.max_position_embeddings)
        frozen = forward_flops(
            lambda ids: composed.consult(ids, composed.new_cache()), self.shape.max_position_embeddings
        )
        composed.to(device())
        tokens = manifest.metrics.training.tokens
        training = tokens * (frozen + BACKWARD_AND_FORWARD * (flops - frozen)) + central_training
        if manifest.config.gates != "none":
            training += self._gate_training(manifest.config.gates)
        copies = manifest.config.experts == "seed-copies"
        training += self.seed_training if copies else self.experts_training
        size = manifest.metrics.parameters + len(self.models.experts) * self.parameters
        label = f"composed {manifest.config.bridges.bridge}" + (" of seed copies" if copies else "")
        label += "" if name in ("central", f"central-{manifest.config.bridges.bridge}") else f" ({name})"
        scores = self.score(lambda ids: composed(ids).logits_BTV, label)
        self.table.add(label, "control" if copies else "composed", scores, size, size, training, flops)
        self._add_usage(label, composed, ("bridges", "experts", "latents", "plan"))

    def _add_usage(self, label: str, model: torch.nn.Module, parts: tuple[str, ...]) -> None:
        windows = self.usage_windows
        whole = self.score(partial(_logits, model, frozenset()), label, windows)
        for part in parts:
            without = self.score(partial(_logits, model, frozenset({part})), f"{label} without {part}", windows)
            difference = float((whole - without).double().sum()) / math.log(2) / windows.bytes
            self.usage.append(UsageRow(model=label, part=part, difference=round(difference, 6)))
        ids = next(windows.batches(4)).ids.to(device())
        self.prefix_gap = max(self.prefix_gap, gap_to_prefix(partial(_logits, model, frozenset()), ids))

    def metrics(self, rows: tuple[ModelRow, ...], usage: tuple[UsageRow, ...]) -> EvaluateMetrics:
        """What goes into the manifest."""
        return EvaluateMetrics(
            rows=rows,
            usage=usage,
            prefix_gap=self.prefix_gap,
            documents=len(self.windows.documents),
            tokens=self.windows.tokens,
            bytes=self.windows.bytes,
        )


def _logits(model: torch.nn.Module, ablate: frozenset[str], ids: Tensor) -> Tensor:
    return model(ids, ablate=ablate).logits_BTV


def _top(count: int | None) -> str:
    return "all" if count is None else f"top-{count}"
