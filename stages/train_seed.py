"""Train the seed: token shards in, a Hugging Face model folder out.

- the common ancestor of all experts: what they share is learnt once, and their hidden states stay comparable
- trained on all documents alike; the loss of the first step should be close to ln(vocabulary), and is in the manifest
"""

from collections.abc import Callable
from functools import partial
from math import log
from pathlib import Path

import torch
from loguru import logger

from schemas.decoder import DecoderConfig
from schemas.tokenize_text import TokenizeManifest
from schemas.train_seed import SeedConfig, SeedManifest, SeedMetrics
from stages.artifacts.model_folder import write_model
from stages.artifacts.stage_folder import claim_folder
from stages.data.batches import Rows
from stages.data.pieces import over_text
from stages.data.token_store import TokenStore
from stages.engine.loop import train
from stages.nn.decoder import Decoder, NextTokenLoss
from stages.nn.sampling import likeliest


def run(config: SeedConfig, run_dir: Path, *, force: bool = False) -> SeedManifest:
    """Train the decoder of `config` on the tokens of the run and write it to `seed/`."""
    tokens = TokenizeManifest.read(run_dir)
    with claim_folder(run_dir, SeedManifest, config, [tokens.as_input()], force=force) as claim:
        if claim.finished:
            return claim.finished
        training = config.training
        store = TokenStore.open([ref.check(run_dir) for ref in tokens.shards("train")])
        rows = Rows(store, tokens.metrics.end_of_text, training.sequence_length)
        decoder = _new_decoder(config, tokens)
        decoder.separator = tokens.metrics.end_of_text if training.mask_documents else None
        metrics = train(
            NextTokenLoss(decoder),
            rows.batches(training.batch_size, training.seed),
            training,
            claim.path,
            "seed",
            _sampler(decoder, tokens, run_dir) if training.sample_every else None,
        )
        _doubt(metrics.first_loss, tokens.metrics.vocab_size)
        tokenizer = tokens.output("tokenizer.json").check(run_dir).read_bytes()
        weights = decoder.weights()
        end = tokens.metrics.end_of_text
        outputs = write_model(claim.path, run_dir, decoder.config, weights, end, tokenizer) if claim.leader else []
        parameters = sum(weight.numel() for weight in weights.values())
        return claim.finish(outputs, SeedMetrics(parameters=parameters, training=metrics))


def _new_decoder(config: SeedConfig, tokens: TokenizeManifest) -> Decoder:
    torch.manual_seed(config.training.seed)
    return Decoder(
        DecoderConfig(
            **config.model.model_dump(),
            vocab_size=tokens.metrics.vocab_size,
            max_position_embeddings=config.training.sequence_length,
        )
    )


def _sampler(decoder: Decoder, tokens: TokenizeManifest, run_dir: Path) -> Callable[[str], str]:
    """Goes on from a prompt with the decoder as it is at the moment."""
    end = tokens.metrics.end_of_text
    return over_text(partial(likeliest, decoder, end), tokens.output("tokenizer.json").check(run_dir), end)


def _doubt(first_loss: float, vocab_size: int) -> None:
    """A new model knows nothing, so it must start near a uniform guess."""
    if abs(first_loss - log(vocab_size)) > 0.1 * log(vocab_size):
        logger.warning("the first loss was {:.2f}, expected about ln V = {:.2f}", first_loss, log(vocab_size))
