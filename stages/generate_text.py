"""Continue a prompt with any model of the run, token by token, with caches.

- cBTM runs only the experts it mixes for a token, and loads an expert when it is first chosen; one that is chosen later
  first reads what it has missed. How many tokens experts read per token of the text is counted
- a context that reaches the length the models were trained on goes on from its second half; which experts a text is for
  is told from all of it
- text comes out as soon as its bytes are complete, but for what may still become a stop text
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
import torch
from loguru import logger
from tokenizers.decoders import DecodeStream
from torch import Tensor

from schemas.cluster_documents import ClusterManifest
from schemas.failures import UsageFailure
from schemas.generate_text import GenerateConfig
from schemas.tokenize_text import TokenizeManifest
from stages.artifacts.model_folder import device
from stages.artifacts.run_models import RunModels, expert_folder, routing_tensors
from stages.clustering.features import normalised
from stages.clustering.routing import cluster_weights, prefix_sums
from stages.nn.attention import StackCache
from stages.nn.composed import ComposedModel
from stages.nn.decoder import Decoder
from stages.nn.sampling import draw


class Reader(Protocol):
    """A model in the middle of a text."""

    def read(self, ids: list[int]) -> Tensor:
        """Take further tokens; log-probabilities [V] of the next one."""

    def restart(self, skipped: list[int], kept: list[int]) -> None:
        """Begin a new context that holds `kept`; `skipped` were never read and belong to the text before it."""


def stream(config: GenerateConfig, run_dir: Path) -> Iterator[str]:
    """Pieces of the continuation, as they are drawn. Raises UsageFailure when the run has no such model."""
    tokens, models = TokenizeManifest.read(run_dir), RunModels.find(run_dir)
    tokenizer = tokenizers.Tokenizer.from_file(str(tokens.output("tokenizer.json").check(run_dir)))
    tokenizer.encode_special_tokens = True  # the name of a special token in a prompt is text like any other
    end = tokens.metrics.end_of_text
    prompt = [end, *tokenizer.encode(config.prompt, add_special_tokens=False).ids]
    drawn = _draw_tokens(config, run_dir, models, prompt, end, tokens.metrics.vocab_size)
    return _until_stop(_decode(tokenizer, drawn), config.stop)


def _draw_tokens(
    config: GenerateConfig, run_dir: Path, models: RunModels, prompt: list[int], end: int, ids: int
) -> Iterator[int]:
    limit = models.decoder("seed")[0].max_position_embeddings
    generator = torch.Generator().manual_seed(config.random_seed)
    reader = _reader(config, run_dir, models)
    context = unread = prompt[-limit:]
    reader.restart(prompt[:-limit], [])
    try:
        for _ in range(config.max_tokens):
            if len(context) > limit:
                context = context[-(limit // 2) :]
                reader.restart([], context[:-1])
            log_probs = reader.read(unread).float().cpu()[:ids]  # beyond them is padding of an imported vocabulary
            token = draw(log_probs, config.temperature, config.sample_top_k, config.sample_top_p, generator)
            if token == end:
                return
            yield token
            context, unread = [*context, token], [token]
    finally:
        if isinstance(reader, ClusterMixReader):
            logger.debug("{}", reader.cost())


def _reader(config: GenerateConfig, run_dir: Path, models: RunModels) -> Reader:
    """The model `config.model` names. Raises UsageFailure."""
    name = config.model
    if name == "seed" or (name == "dense" and models.dense):
        return DecoderReader(partial(_decoder, models, name))
    number = name.removeprefix("expert:")
    if number != name and number.isdecimal() and int(number) < len(models.experts):
        return DecoderReader(partial(_decoder, models, expert_folder(int(number))))
    if name == "cbtm":
        return ClusterMixReader(config, run_dir, models)
    if name in models.compositions:
        return ComposedReader(ComposedModel.from_parts(**models.composition(name)).to(device()))
    dense = ["dense"] if models.dense else []
    there = ["seed", *dense, f"expert:0 to expert:{len(models.experts) - 1}", "cbtm", *models.compositions]
    more = "" if models.compositions else f"; `cpipe compose {run_dir}` makes central"
    raise UsageFailure(f"no model {name} in {run_dir}: there are {', '.join(there)}{more}")


def _decoder(models: RunModels, folder: str) -> Decoder:
    return Decoder.from_weights(*models.decoder(folder)).to(device())


def _batch(ids: list[int]) -> Tensor:
    return torch.tensor([ids], dtype=torch.long, device=device())


class DecoderReader:
    """One decoder with its cache, loaded when it is first asked; `pending` tokens wait until it is."""

    def __init__(self, load: Callable[[], Decoder]) -> None:
        self.pending: list[int] = []
        self.tokens_read = 0
        self._load = load
        self._decoder: Decoder | None = None
        self._cache: StackCache | None = None

    @torch.no_grad()
    def read(self, ids: list[int]) -> Tensor:
        """See Reader."""
        decoder = self._decoder = self._decoder or self._load()
        self._cache = self._cache or decoder.new_cache()
        self.pending += ids
        states = decoder.hidden_states(_batch(self.pending), self._cache)
        self.tokens_read += len(self.pending)
        self.pending = []
        return decoder.lm_head(states[-1][0, -1]).float().log_softmax(-1)

    def restart(self, skipped: list[int], kept: list[int]) -> None:
        """See Reader."""
        self.pending = [*kept]
        self._cache = None


class ClusterMixReader:
    """The experts nearest to the text so far, their probabilities mixed (cBTM)."""

    def __init__(self, config: GenerateConfig, run_dir: Path, models: RunModels) -> None:
        clusters = ClusterManifest.read(run_dir)
        self._vectors, self._centroids = routing_tensors(run_dir, clusters)
        self._temperature = config.routing_temperature or clusters.config.temperature
        self._top_k = config.experts
        self._sum = np.zeros(self._vectors.shape[1], np.float32)
        self._text_read = 0
        folders = map(expert_folder, range(len(models.experts)))
        self._experts = [DecoderReader(partial(_decoder, models, folder)) for folder in folders]

    def read(self, ids: list[int]) -> Tensor:
        """See Reader."""
        self._know(ids)
        self._text_read += len(ids)
        weights = cluster_weights(normalised(self._sum[None]), self._centroids, self._temperature, self._top_k)[0]
        mixed = []
        for weight, expert in zip(weights.tolist(), self._experts, strict=True):
            if weight > 0:
                mixed.append(expert.read(ids) + np.log(weight))
            else:
                expert.pending += ids
        return torch.stack(mixed).logsumexp(0)

    def restart(self, skipped: list[int], kept: list[int]) -> None:
        """See Reader."""
        self._know(skipped)
        for expert in self._experts:
            expert.restart(skipped, kept)

    def _know(self, ids: list[int]) -> None:
        self._sum = prefix_sums(np.array(ids, np.int64), self._vectors, before=self._sum)[-1]

    def cost(self) -> str:
        """How much the experts read for what there is of the text."""
        read = sum(expert.tokens_read for expert in self._experts)
        asked = sum(expert.tokens_read > 0 for expert in self._experts)
        return (
            f"{asked} of {len(self._experts)} experts read {read} tokens for {self._text_read} of the text: "
            f"{read / max(1, self._text_read):.2f} a token"
        )


class ComposedReader:
    """A composed model with all its caches."""

    def __init__(self, model: ComposedModel) -> None:
        self._model = model
        self._pending: list[int] = []
        self._cache = model.new_cache()

    @torch.no_grad()
    def read(self, ids: list[int]) -> Tensor:
        """See Reader."""
        unread, self._pending = [*self._pending, *ids], []
        return self._model(_batch(unread), self._cache).logits_BTV[0, -1].log_softmax(-1)

    def restart(self, skipped: list[int], kept: list[int]) -> None:
        """See Reader."""
        self._pending = [*kept]
        self._cache = self._model.new_cache()


def _decode(tokenizer: tokenizers.Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text of the tokens, each piece as soon as its bytes are whole characters."""
    decoder = DecodeStream(skip_special_tokens=True)
    for token in tokens:
        if piece := decoder.step(tokenizer, token):
            yield piece


def _until_stop(pieces: Iterator[str], stop: tuple[str, ...]) -> Iterator[str]:
    """The pieces up to the first stop text, holding back what may become one."""
    if not stop:
        yield from pieces
        return
    held = ""
    longest = max(map(len, stop))
    for piece in pieces:
        held += piece
        found = [held.index(text) for text in stop if text in held]
        if found:
            yield held[: min(found)]
            return
        ready = max(0, len(held) - longest + 1)
        if ready:
            yield held[:ready]
            held = held[ready:]
    yield held
