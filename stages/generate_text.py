"""Continue a prompt with any model of the run, token by token, with caches.

- cBTM runs only the experts it mixes for a token, and loads an expert when it is first chosen; one that is chosen later
  first reads what it has missed. How many tokens experts read per token of the text is counted
- a context that reaches the length the models were trained on goes on from its second half; which experts a text is for
  is told from all of it
- a decoder, or a composed model with all its experts, is packed for writing where it can be; many prompts are then
  written side by side, each as if alone
"""

from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

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
from schemas.train_gates import Selection, inside, label_of
from stages.artifacts.model_folder import device
from stages.artifacts.run_models import RunModels, expert_folder, routing_tensors
from stages.clustering.features import normalised
from stages.clustering.routing import cluster_weights, prefix_sums
from stages.data.pieces import decoded, has_stopped, until_stop
from stages.data.prompts import read_prompts
from stages.nn.choice import ChosenExperts
from stages.nn.composed import ComposedModel
from stages.nn.composed_batch import ComposedBatch, ComposedPlace, composed_reader
from stages.nn.decoder import Decoder
from stages.nn.decoding import PackedDecoder
from stages.nn.gates import Gates
from stages.nn.readers import DecoderReader, Reader, Restarts
from stages.nn.routed import RoutedDecoder
from stages.nn.sampling import draw
from stages.nn.text_batches import TextBatch


def stream(config: GenerateConfig, run_dir: Path) -> Iterator[str]:
    """Pieces of the continuation, as they are drawn. Raises UsageFailure when the run has no such model."""
    book = Book(config, run_dir)
    return _write(config.prompt, book, _reader(config, run_dir, book.models))


def continuations(config: GenerateConfig, run_dir: Path) -> Iterator[tuple[str, str]]:
    """Every prompt of the file `config.prompts` with its continuation, in their order.

    A continuation is what the prompt alone would get. `config.batch_size` of them are written side by side, where the
    model can. Raises InputFailure, and UsageFailure when the run has no such model.
    """
    prompts = read_prompts(Path(config.prompts or ""))
    book = Book(config, run_dir)
    reader = _reader(config, run_dir, book.models)
    if batch := _batch(reader, min(config.batch_size, len(prompts))):
        yield from zip(prompts, _write_side_by_side(prompts, book, batch), strict=True)
        return
    for prompt in prompts:
        yield prompt, "".join(_write(prompt, book, reader))


class Book:
    """What all texts of a call share."""

    def __init__(self, config: GenerateConfig, run_dir: Path) -> None:
        tokens, self.models = TokenizeManifest.read(run_dir), RunModels.find(run_dir)
        self.config = config
        self.end, self.ids = tokens.metrics.end_of_text, tokens.metrics.vocab_size
        self.limit = self.models.decoder("seed")[0].max_position_embeddings
        self.tokenizer = tokenizers.Tokenizer.from_file(str(tokens.output("tokenizer.json").check(run_dir)))
        self.tokenizer.encode_special_tokens = True  # the name of a special token in a prompt is text like any other

    def begin(self, prompt: str, place: Restarts) -> "Text":
        """A text that its model will read from the start."""
        return Text(self, [self.end, *self.tokenizer.encode(prompt, add_special_tokens=False).ids], place)


class Text:
    """A prompt being continued: what its model has yet to read, and what is drawn from its answer."""

    def __init__(self, book: Book, prompt: list[int], place: Restarts) -> None:
        self.ended = False
        self._book = book
        self._place = place
        self._left = book.config.max_tokens
        self._generator = torch.Generator().manual_seed(book.config.random_seed)
        self._context = self._unread = prompt[-book.limit :]
        place.begin(prompt[: -book.limit])

    def unread(self) -> list[int]:
        """Tokens the model has to be given next; of a full context, its second half is begun anew."""
        if len(self._context) > self._book.limit:
            self._context = self._context[-(self._book.limit // 2) :]
            self._place.restart(self._context[:-1])
        return self._unread

    def draw(self, log_probs: Tensor) -> int | None:
        """The next token; None when that is the end of the text."""
        config = self._book.config
        log_probs = log_probs.float().cpu()[: self._book.ids]  # beyond them is padding of an imported vocabulary
        token = draw(log_probs, config.temperature, config.sample_top_k, config.sample_top_p, self._generator)
        self._left -= 1
        self.ended = token == self._book.end or not self._left
        self._context, self._unread = [*self._context, token], [token]
        return None if token == self._book.end else token


def _write(prompt: str, book: Book, reader: Reader) -> Iterator[str]:
    drawn = _draw_tokens(book.begin(prompt, reader), reader)
    return until_stop(decoded(book.tokenizer, drawn), book.config.stop)


def _draw_tokens(text: Text, reader: Reader) -> Iterator[int]:
    try:
        while not text.ended:
            if (token := text.draw(reader.read(text.unread()))) is not None:
                yield token
    finally:
        if isinstance(reader, ClusterMixReader):
            logger.debug("{}", reader.cost())


def _batch(reader: Reader, rows: int) -> TextBatch | ComposedBatch | None:
    """Rows for texts, if the model can write them side by side."""
    if isinstance(reader, DecoderReader) and isinstance(decoder := reader.decoder(), PackedDecoder):
        return TextBatch(decoder, rows)
    return reader.batch(rows) if isinstance(reader, ComposedPlace) else None


def _write_side_by_side(prompts: list[str], book: Book, batch: TextBatch | ComposedBatch) -> Iterator[str]:
    """Continuations in the order of their prompts; as soon as one ends, the next is begun in its place."""
    waiting = deque(enumerate(prompts))
    texts: dict[int, Text] = {}
    pieces: dict[int, list[str]] = {}
    streams: dict[int, DecodeStream] = {}
    told = 0
    while texts or waiting:
        while waiting and len(texts) < book.config.batch_size:
            number, prompt = waiting.popleft()
            texts[number] = book.begin(prompt, batch.add(number))
            pieces[number], streams[number] = [], DecodeStream(skip_special_tokens=True)
        logits = batch.read({number: text.unread() for number, text in texts.items()})
        for number, text in list(texts.items()):
            token = text.draw(logits[number].log_softmax(-1))
            if token is not None and (piece := streams[number].step(book.tokenizer, token)):
                pieces[number].append(piece)
            if text.ended or has_stopped(pieces[number], book.config.stop):
                batch.remove(number)
                del texts[number]
        while told not in texts and told in pieces:
            yield "".join(until_stop(iter(pieces.pop(told)), book.config.stop))
            told += 1


def _reader(config: GenerateConfig, run_dir: Path, models: RunModels) -> Reader:
    """The model `config.model` names. Raises UsageFailure."""
    name = config.model
    if config.active_experts and name not in models.compositions:
        raise UsageFailure(f"--active-experts is for composed models, and {name} is none here: leave it out")
    if name == "seed" or name in models.all_dense():
        return DecoderReader(partial(_decoder, models, name))
    number = name.removeprefix("expert:")
    if number != name and number.isdecimal() and int(number) < len(models.experts):
        return DecoderReader(partial(_decoder, models, expert_folder(int(number))))
    if name == "cbtm":
        return ClusterMixReader(config, run_dir, models)
    if kind := inside(name):
        weigh = partial(Gates.log_weights, selection=Selection(top_k=_experts_per_token(config, models)))
        return DecoderReader(lambda: RoutedDecoder.from_parts(**models.routed(*kind), weigh=weigh).to(device()))
    if name in models.compositions:
        composed = ComposedModel.from_parts(**models.composition(name)).to(device())
        return composed_reader(ChosenExperts(composed, config.active_experts or len(composed.experts)))
    more = "" if models.compositions else f"; `cpipe compose {run_dir}` makes central"
    raise UsageFailure(f"no model {name} in {run_dir}: there are {', '.join(_names(models))}{more}")


def _names(models: RunModels) -> Iterator[str]:
    """What may be asked for."""
    yield from ("seed", *models.all_dense())
    yield f"expert:0 to expert:{len(models.experts) - 1}"
    yield "cbtm"
    kinds = models.gates.config.kinds() if models.gates else ()
    yield from (label_of(place, mode) for place, mode in kinds if place != "expert")
    yield from models.compositions


def _experts_per_token(config: GenerateConfig, models: RunModels) -> int:
    """How many experts are asked for a token. Raises UsageFailure when there are not so many."""
    there = len(models.experts)
    if config.experts and config.experts > there:
        raise UsageFailure(f"--experts {config.experts} is more than the run's {there} experts: give {there} or fewer")
    return config.experts or min(2, there)


def _decoder(models: RunModels, folder: str) -> Decoder:
    return Decoder.from_weights(*models.decoder(folder)).to(device())


class ClusterMixReader:
    """The experts nearest to the text so far, their probabilities mixed (cBTM)."""

    def __init__(self, config: GenerateConfig, run_dir: Path, models: RunModels) -> None:
        clusters = ClusterManifest.read(run_dir)
        self._vectors, self._centroids = routing_tensors(run_dir, clusters)
        self._temperature = config.routing_temperature or clusters.config.temperature
        self._top_k = _experts_per_token(config, models)
        folders = map(expert_folder, range(len(models.experts)))
        self._experts = [DecoderReader(partial(_decoder, models, folder)) for folder in folders]
        self.begin([])

    def begin(self, skipped: list[int]) -> None:
        """See Restarts. A text is routed by itself alone, and by what is skipped of it too."""
        self._sum = np.zeros(self._vectors.shape[1], np.float32)
        self._text_read = 0
        for expert in self._experts:
            expert.tokens_read = 0
            expert.begin(skipped)
        self._know(skipped)

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

    def restart(self, kept: list[int]) -> None:
        """See Restarts."""
        for expert in self._experts:
            expert.restart(kept)

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
