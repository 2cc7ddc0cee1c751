"""Train the experts: each starts from the seed and sees the documents of one cluster (cBTM).

- tokens are matched by batch size, not by steps: k experts take as many optimizer steps as the dense baseline, with
  1/k of the batch each (Gururangan et al. 2023); with 1/k of the steps instead, they lose to the dense model
- the dense baseline is a member like any other: the same seed, steps and schedule, all documents, the whole batch
- every member is a finished stage of its own, so members can be trained by different jobs, several at once, and only
  missing ones are; one that fails does not stop the others
- a LoRA expert trains and keeps adapters over the seed only; the dense baseline beside it stays a full model
- where `cpipe cluster` wrote token shards for each cluster, an expert reads its own and no others, so it can be trained
  on a machine that has only them, and ends with the same weights
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from schemas.cluster_documents import ClusterManifest
from schemas.failures import UsageFailure
from schemas.files import FileRef
from schemas.manifest import FILE_NAME, InputRef
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import (
    ExpertConfig,
    ExpertManifest,
    ExpertMetrics,
    ExpertsConfig,
    ExpertsManifest,
    ExpertsMetrics,
    LoraConfig,
)
from schemas.train_seed import SeedManifest
from stages.artifacts.adapter_folder import seed_from, write_adapter
from stages.artifacts.model_folder import read_model, write_model
from stages.artifacts.stage_folder import claim_folder
from stages.data.batches import Rows
from stages.data.pieces import over_text
from stages.data.token_store import TokenStore, read_table
from stages.engine.loop import train
from stages.engine.members import Member, members_at_once, train_members
from stages.nn.decoder import Decoder, NextTokenLoss
from stages.nn.lora import adapters, add_adapters
from stages.nn.sampling import likeliest

Upstream = tuple[TokenizeManifest, ClusterManifest, SeedManifest]


def run(config: ExpertsConfig, run_dir: Path, *, force: bool = False) -> ExpertsManifest | ExpertManifest:
    """Train all members that are missing, or the one `config.expert` names."""
    upstream = TokenizeManifest.read(run_dir), ClusterManifest.read(run_dir), SeedManifest.read(run_dir)
    members = dict(config.members(upstream[1].config.clusters))
    if config.expert is not None:
        folder = config.expert if config.expert == "dense" else f"experts/{int(config.expert):03d}"
        if folder not in members:
            raise UsageFailure(f"--expert {config.expert} is not one of {', '.join(members)}")
        return _train_member(folder, members[folder], run_dir, upstream, force)
    missing = [folder for folder in members if force or not _is_finished(folder, members[folder], run_dir, upstream)]
    trainings = [
        Member(folder, partial(_train_member, folder, members[folder], run_dir, upstream, force), _log(run_dir, folder))
        for folder in missing
    ]
    trained = train_members(trainings, min(members_at_once(config.parallel), len(members)))
    finished = {folder: trained.get(folder) or ExpertManifest.read(run_dir, folder) for folder in members}
    return _finish(config, run_dir, finished)


def _is_finished(folder: str, config: ExpertConfig, run_dir: Path, upstream: Upstream) -> bool:
    """Whether there is nothing to do. Raises StaleFailure before anything is trained, where there is something else."""
    if not (run_dir / folder / FILE_NAME).exists():
        return False
    inputs = [manifest.as_input() for manifest in upstream]
    with claim_folder(run_dir, ExpertManifest, config, inputs, folder=folder) as claim:
        return claim.finished is not None


def _log(run_dir: Path, folder: str) -> Path:
    """Where the process of a member writes, when members are trained at once."""
    return run_dir / "logs" / f"{ExpertManifest.command}-{Path(folder).name}.log"


def _train_member(folder: str, config: ExpertConfig, run_dir: Path, upstream: Upstream, force: bool) -> ExpertManifest:
    tokens, clusters, seed = upstream
    inputs = [manifest.as_input() for manifest in upstream]
    with claim_folder(run_dir, ExpertManifest, config, inputs, folder=folder, force=force) as claim:
        if claim.finished:
            return claim.finished
        # The manifest of all members says that each is finished: from here on one is not.
        (run_dir / ExpertsManifest.folder / FILE_NAME).unlink(missing_ok=True)
        training = config.training
        store, documents = _documents(config.cluster, run_dir, tokens, clusters)
        rows = Rows(store, tokens.metrics.end_of_text, training.sequence_length, documents)
        decoder = _from_seed(run_dir, seed, config)
        decoder.separator = tokens.metrics.end_of_text if training.mask_documents else None
        metrics = train(
            NextTokenLoss(decoder),
            # Another order than the seed's: with the same one a member would see the seed's rows again, first of all.
            rows.batches(training.batch_size, training.seed + 1),
            training,
            claim.path,
            folder,
            _sampler(decoder, tokens, run_dir) if training.sample_every else None,
        )
        outputs = _write(decoder, config.lora, claim.path, run_dir, tokens) if claim.leader else []
        return claim.finish(
            outputs,
            ExpertMetrics(
                parameters=sum(weight.numel() for weight in decoder.parameters() if weight.requires_grad),
                documents=len(store) if documents is None else len(documents),
                epochs=round(metrics.tokens / rows.tokens, 4),
                training=metrics,
            ),
        )


def _documents(
    cluster: int | None, run_dir: Path, tokens: TokenizeManifest, clusters: ClusterManifest
) -> tuple[TokenStore, np.ndarray | None]:
    """A store and the numbers in it of the documents of `cluster`, those it shares among them; None for all.

    The shards of the cluster, where it has its own, hold the same documents in the same order as the whole store.
    """
    if cluster is not None and (own := clusters.shards(cluster, "train")):
        return TokenStore.open([ref.check(run_dir) for ref in own]), None
    store = TokenStore.open([ref.check(run_dir) for ref in tokens.shards("train")])
    if cluster is None:
        return store, None
    table = read_table(clusters.output("assignments-train.arrow").check(run_dir))
    return store, np.flatnonzero((table["cluster"] == cluster) | (table["second"] == cluster))


def _from_seed(run_dir: Path, seed: SeedManifest, config: ExpertConfig) -> Decoder:
    decoder = Decoder.from_weights(*read_model(run_dir, seed)).train()
    return add_adapters(decoder, config.lora, config.training.seed) if config.lora else decoder.requires_grad_(True)


def _sampler(decoder: Decoder, tokens: TokenizeManifest, run_dir: Path) -> Callable[[str], str]:
    """Goes on from a prompt with the decoder as it is at the moment."""
    end = tokens.metrics.end_of_text
    return over_text(partial(likeliest, decoder, end), tokens.output("tokenizer.json").check(run_dir), end)


def _write(
    decoder: Decoder, lora: LoraConfig | None, folder: Path, run_dir: Path, tokens: TokenizeManifest
) -> list[FileRef]:
    """The folder of a model, or of an adapter over the seed."""
    if lora:
        return write_adapter(folder, run_dir, seed_from(folder, run_dir), lora, adapters(decoder))
    tokenizer = tokens.output("tokenizer.json").check(run_dir).read_bytes()
    return write_model(folder, run_dir, decoder.config, decoder.weights(), tokens.metrics.end_of_text, tokenizer)


def _finish(config: ExpertsConfig, run_dir: Path, members: dict[str, ExpertManifest]) -> ExpertsManifest:
    """Write the manifest of `experts/`: the digests of its members stand for their content."""
    inputs = [InputRef(name=folder, digest=member.content_digest()) for folder, member in members.items()]
    experts = [member for folder, member in members.items() if folder != "dense"]
    with claim_folder(run_dir, ExpertsManifest, config, inputs, collection=True) as claim:
        return claim.finished or claim.finish(
            [],
            ExpertsMetrics(
                experts=len(experts),
                tokens=sum(expert.metrics.training.tokens for expert in experts),
                dense_tokens=members["dense"].metrics.training.tokens if "dense" in members else 0,
                final_losses=tuple(expert.metrics.training.final_loss for expert in experts),
            ),
        )
