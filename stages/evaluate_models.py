"""Compare all models of a run on held-out text, in bits per byte.

- every model is run once and leaves one log-probability per token; every way to combine the experts is then arithmetic
  on these arrays, so that all rows stand on the same tokens and the same forward passes
- each row says what it cost: training of all it is made of, and inference per token, catching up late included
- "oracle" picks each document's best expert in hindsight: a bound, not a method
- "fitted" rows choose among experts as sharply as is best on other held-out documents, which no row is scored on
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from loguru import logger
from tokenizers import Tokenizer
from torch import Tensor

from schemas.cluster_documents import ClusterManifest
from schemas.compose_model import ComposeManifest
from schemas.evaluate_models import EvaluateConfig, EvaluateManifest, EvaluateMetrics, FittedRouting, ModelRow, UsageRow
from schemas.files import write_bytes
from schemas.tokenize_text import TokenizeManifest
from schemas.train_gates import GateMode, GatesManifest, Place, Selection, label_of
from stages.artifacts.model_folder import device
from stages.artifacts.run_models import RunModels, expert_folder, mean_of, routing_tensors
from stages.artifacts.stage_folder import claim_folder
from stages.clustering.routing import Router
from stages.data.token_store import TokenStore, read_table
from stages.data.windows import Windows, choose_windows
from stages.nn.central import CentralModel
from stages.nn.choice import ChosenExperts
from stages.nn.composed import ComposedModel
from stages.nn.composed_costs import ComposedCosts
from stages.nn.decoder import Decoder, token_log_probs
from stages.nn.ensembles import ensembles
from stages.nn.flops import BACKWARD_AND_FORWARD, DecoderCosts, forward_flops
from stages.nn.gates import ExpertGates, Gates
from stages.nn.leaks import gap_to_prefix
from stages.nn.levels import ways_to_ablate
from stages.nn.memory import DocumentReader
from stages.nn.mixture import mixed_log_probs
from stages.nn.mixture_fit import fit_routing
from stages.nn.routed import RoutedDecoder
from stages.nn.watching import Watched
from stages.reporting.routing import RoutingTable
from stages.reporting.scores import ScoreTable, usage_row
from stages.reporting.table import as_json, markdown, plot

TOGETHER = 16  # windows among which one gets what a part gives another
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
        evaluation.fit_routing()
        evaluation.add_ensembles()
        evaluation.add_gates()
        evaluation.add_central_models()
        rows = evaluation.table.rows()
        outputs = [write_bytes(claim.path / name, data, run_dir) for name, data in evaluation.files(rows)]
        return claim.finish(outputs, evaluation.metrics(rows))


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
        self.models = models
        self.router = Router(*routing_tensors(run_dir, clusters), clusters.config.temperature)
        self.shape = models.decoder("seed")[0]
        self.length = length = models.window_length(self.shape)
        store, self.end = TokenStore.open(models.held_out_text(tokens)), tokens.metrics.end_of_text
        self.windows, self.usage_windows, self.fit_windows = choose_windows(
            store, self.end, length, config.tokens, config.usage_tokens, config.fitted_tokens, switched=config.switched
        )
        documents = self.windows.documents
        table = read_table(clusters.output("assignments-valid.arrow").check(run_dir))
        assigned = models.with_added_labels(table["cluster"])[documents]
        sources = self.windows.names([store.sources[document] for document in documents])
        labels, starts = self.windows.names([f"cluster {number:03d}" for number in assigned]), self.windows.starts
        self.table = ScoreTable(sources, labels, store.bytes[documents], starts)
        read = torch.cat(list(self.windows.inputs())).numpy()
        self.routing = RoutingTable(sources, assigned, starts, read, self.shape.vocab_size)
        self.tokenizer = Tokenizer.from_file(str(tokens.output("tokenizer.json").check(run_dir)))
        self.selections = [*config.selections(len(models.experts))]
        self.usage: list[UsageRow] = []
        self.fitted: FittedRouting | None = None
        self.prefix_gap, self.dense_steps = 0.0, dict[str, int]()
        self.parameters = models.seed.metrics.parameters
        self.costs = DecoderCosts(
            Decoder.from_weights(*models.decoder("seed")),
            length,
            models.gates.metrics.layer if models.gates else None,
            models.seed.metrics.seen or 0,
            sum(expert.metrics.training.tokens for expert in models.experts),
            models.experts[0].config.lora,
        )

    def score(self, forward: Forward, label: str, windows: Windows | None = None, size: int = 0) -> Tensor:
        """Log-probability [N], in nats, that `forward` gives to every token of `windows` (all that are scored)."""
        begin = forward.begin if isinstance(forward, DocumentReader) else None
        size = size or self.config.score_batch_size
        found = (windows or self.windows).collect(
            lambda ids, targets: token_log_probs(forward(ids), targets), size, f"score {label}", device(), begin
        )
        logger.info("scored {}: {:.4f} nats per token", label, -float(found.mean()))
        return found

    def _decoder(self, folder: str) -> Decoder:
        return Decoder.from_weights(*self.models.decoder(folder)).to(device())

    def add_single_models(self) -> None:
        """Seed, dense, the weight average and the best expert; keeps the experts' scores for what follows."""
        self.seed_scores = self.score(self._decoder("seed"), "seed")
        self.expert_scores = self._score_experts(self.windows)
        self._add_single("seed", self.seed_scores, self.costs.seed)
        for folder, manifest in self.models.all_dense().items():
            training = manifest.metrics.training
            label = f"dense, {training.steps} steps" if folder in self.models.further_dense else folder
            self._add_single(label, self.score(self._decoder(folder), label), self.costs.from_seed(training.tokens))
        mean = mean_of([self.models.decoder(expert_folder(number))[1] for number in range(len(self.models.experts))])
        average = self.score(Decoder.from_weights(self.shape, mean).to(device()), "weight average")
        self._add_single("weight average", average, self.costs.experts)
        best = int(self.expert_scores.sum(0).argmax())
        self._add_single(f"best single expert ({best:03d})", self.expert_scores[:, best], self.costs.experts)

    def _add_single(self, label: str, scores: Tensor, training: float) -> None:
        self.table.add(label, "single", scores, self.parameters, self.parameters, training, self.costs.forward)

    def _score_experts(self, windows: Windows) -> Tensor:
        """Log-probabilities [N, experts] of every token of the windows."""
        folders = map(expert_folder, range(len(self.models.experts)))
        return torch.stack([self.score(self._decoder(folder), folder, windows) for folder in folders], -1)

    def fit_routing(self) -> None:
        """Fit what cBTM and the forgetting posterior choose by, on held-out documents that are not scored."""
        if (windows := self.fit_windows).tokens:
            distances = torch.from_numpy(self.router.distances(windows.texts()))
            documents = windows.split(self._score_experts(windows))
            self.fitted = fit_routing(distances, documents, self.router.temperature, self.config.forgetting)
            logger.info("temperature {:.4g}, forgetting {:.4g}", self.fitted.temperature, self.fitted.forgetting)

    def _add_mixture(self, name: str, group: str, log_weight_NX: Tensor, training: float | None = None) -> None:
        """A row that mixes models with these weights, at the cost of those it asks.

        One slot more than there are experts means gates: the first is the seed.
        """
        experts = len(self.models.experts)
        gated = log_weight_NX.shape[1] > experts
        scores = torch.cat([self.seed_scores[:, None], self.expert_scores], -1) if gated else self.expert_scores
        costs = self.costs.mixture(log_weight_NX > -torch.inf, experts, self.windows.window_starts(), training)
        self.table.add(name, group, mixed_log_probs(log_weight_NX, scores), *costs)

    def add_ensembles(self) -> None:
        """Oracle, uniform, cBTM by distance to the centroids, and the posteriors."""
        pairs = [("", self.router.temperature, self.config.forgetting)]
        if self.fitted:
            pairs.append((" fitted", self.fitted.temperature, self.fitted.forgetting))
        counts = self.config.counts(len(self.models.experts))
        for name, log_weight_NX in ensembles(self.windows.split(self.expert_scores), self._routed, counts, pairs):
            self._add_mixture(name, "ensemble", log_weight_NX)

    def _routed(self, top_k: int | None, temperature: float) -> Tensor:
        return torch.from_numpy(self.router.weights(self.windows.texts(), top_k, temperature)).log()

    def add_gates(self) -> None:
        """PHATGOOSE: every kind of gates the run has, for every way to select experts."""
        if (gates := self.models.gates) is None:
            return
        states_ND = self._states_of_seed(gates.metrics.layer) if gates.config.expert_modes else torch.empty(0)
        for place, mode in gates.config.kinds():
            if place != "expert":
                self._add_routed_decoder(gates, place, mode)
                continue
            training = self.costs.experts + self.costs.gate_training(gates.metrics, mode)
            reader = ExpertGates.from_tensors(self.models.gate_tensors(), *gates.reads(mode))
            for selection in self.selections:
                weights = torch.cat(list(self._gate_weights(reader, states_ND, selection)))
                self._add_mixture(f"gates {mode} {selection}", "gates", weights, training)
                self._inspect(f"gates {mode} {selection}", selection, weights.exp())

    def _states_of_seed(self, depth: int) -> Tensor:
        """What gates at the experts' inputs read [N, D]."""
        seed, size = self._decoder("seed"), self.config.score_batch_size
        return self.windows.collect(lambda ids, _: seed.hidden_states(ids, depth=depth)[-1], size, "gates", device())

    def _gate_weights(self, gates: ExpertGates, states_ND: Tensor, selection: Selection) -> Iterator[Tensor]:
        """Log weights [tokens, experts + 1] of each document, which the gates read from its first token on."""
        for states_TD, ids_T in zip(self.windows.split(states_ND), self.windows.inputs(), strict=True):
            yield gates.log_weights(gates.remembered(states_TD[None], ids_T[None]), selection)[0]

    def _add_routed_decoder(self, gates: GatesManifest, place: Place, mode: GateMode) -> None:
        """Gates inside one decoder; what they have read of a document they forget with each window."""
        parts, size = self.models.routed(place, mode), self.config.score_batch_size
        for selection in self.selections:
            decoder = RoutedDecoder.from_parts(**parts, weigh=partial(Gates.log_weights, selection=selection))
            watched, label = Watched(decoder.to(device())), f"gates {label_of(place, mode)} {selection}"
            found = self.windows.collect(watched.scores_and_weights, size, label, device())
            costs = self.costs.routed(decoder.cpu(), watched.asked(), gates.metrics, place, mode)
            self.table.add(label, "gates", found[:, 0], *costs)
            self._inspect(label, selection, found[:, 1:].unflatten(1, (decoder.config.num_hidden_layers, -1)))

    def _inspect(self, label: str, selection: Selection, weights: Tensor) -> None:
        if selection == self.config.inspected(len(self.models.experts)) and not self.config.switched:
            self.routing.add(label, weights.numpy(), lambda token: self.tokenizer.decode([token]))

    def add_central_models(self) -> None:
        """The central model alone, every composition, and what both lose without their parts."""
        central_training = 0.0
        if self.models.central:
            shape, weights = self.models.central_alone()
            central = CentralModel.from_weights(shape, weights).eval().requires_grad_(False)
            flops = forward_flops(central, self.length)
            central.to(device())
            size, tokens = self.models.central.metrics.parameters, self.models.central.metrics.training.tokens
            central_training = BACKWARD_AND_FORWARD * flops * tokens
            begun = self.costs.seed if shape.start_from_seed else 0.0
            scores = self.score(lambda ids: central(ids).logits_BTV, "central alone")
            self.table.add("central alone", "central", scores, size, size, central_training + begun, flops)
            self._add_usage("central alone", central, *ways_to_ablate("latents", "plan"))
        for name, manifest in self.models.compositions.items():
            self._add_composition(name, manifest, central_training)

    def _add_composition(self, name: str, manifest: ComposeManifest, central_training: float) -> None:
        composed = ComposedModel.from_parts(**self.models.composition(name))
        costs = ComposedCosts(composed, self.length)
        composed.to(device())
        training = costs.training(manifest.metrics.training.tokens) + central_training
        if manifest.config.gates != "none" and self.models.gates:
            training += self.costs.gate_training(self.models.gates.metrics, manifest.config.gates)
        copies, count = manifest.config.experts == "seed-copies", len(self.models.experts)
        training += self.costs.seed if copies else self.costs.experts
        size = manifest.metrics.parameters + self.costs.weights(count, 0 if copies else count)
        label = manifest.config.label(name)
        scores = self.score(DocumentReader(ChosenExperts(composed, count)), label)
        self.table.add(label, "control" if copies else "composed", scores, size, size, training, costs.forward)
        self._add_usage(label, composed, "experts", *ways_to_ablate("bridges", "latents", "plan"))
        self.dense_steps[label] = self.costs.steps_of(training, self.models.members.config.training.tokens_per_step)
        for few in (few for few in self.config.active_experts if few < count and not copies):
            chosen, row = ChosenExperts(composed, few), f"{label}, top-{few} per text"
            scores = self.score(DocumentReader(chosen), row, size=1)  # texts alone, so that nothing counted is padding
            read = chosen.read_per_token
            active = manifest.metrics.parameters + self.costs.weights(read, read)
            self.table.add(row, "composed", scores, size, active, training, costs.with_few(read))

    def _add_usage(self, label: str, model: ComposedModel | CentralModel, *parts: str) -> None:
        windows = self.usage_windows
        score = partial(self.score, windows=windows, size=TOGETHER)
        place_N = windows.places() % (model if isinstance(model, CentralModel) else model.central).config.group_length
        whole = score(partial(_logits, model, frozenset()), label)
        for part in parts:
            lost = whole - score(partial(_logits, model, frozenset({part})), f"{label} without {part}")
            self.usage.append(usage_row(label, part, lost, windows.bytes, place_N))
        ids = next(windows.batches(4)).ids.to(device())
        self.prefix_gap = max(self.prefix_gap, gap_to_prefix(partial(_logits, model, frozenset()), ids))

    def files(self, rows: tuple[ModelRow, ...]) -> Iterator[tuple[str, bytes]]:
        """What goes into the folder, by name."""
        yield "table.json", as_json(rows, self.usage)
        yield "table.md", markdown(rows, self.usage, self.fitted).encode()
        yield "bits_per_byte.png", plot(rows)
        if self.routing.rows:
            yield "routing.json", self.routing.as_json()
            yield "routing.png", self.routing.plot()

    def metrics(self, rows: tuple[ModelRow, ...]) -> EvaluateMetrics:
        """What goes into the manifest."""
        return EvaluateMetrics(
            rows=rows,
            usage=tuple(self.usage),
            dense_steps=self.dense_steps,
            fitted=self.fitted,
            prefix_gap=self.prefix_gap,
            documents=len(self.windows.documents),
            tokens=self.windows.tokens,
            bytes=self.windows.bytes,
        )


def _logits(model: torch.nn.Module, ablate: frozenset[str], ids: Tensor) -> Tensor:
    return model(ids, ablate=ablate).logits_BTV
