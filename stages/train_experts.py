"""Train the experts: each starts from the seed and sees the documents of one cluster (cBTM).

- tokens are matched by batch size, not by steps: k experts take as many optimizer steps as the dense baseline, with
  1/k of the batch each (Gururangan et al. 2023); with 1/k of the steps instead, they lose to the dense model
- the dense baseline is a member like any other: the same seed, steps and schedule, all documents, the whole batch.
  Further ones take more steps: what the FLOPs of a composed model come to when one model gets them all
- every member is a finished stage of its own, so members can be trained by different jobs, several at once, and only
  missing ones are; one that fails does not stop the others
- a LoRA expert trains and keeps adapters over the seed only; the dense baseline beside it stays a full model
- where `cpipe cluster` wrote token shards for each cluster, an expert reads its own and no others, so it can be trained
  on a machine that has only them, and ends with the same weights
- an expert can come later, for a domain with text of its own (`added/law/`): it has the number after the others, and
  nothing of theirs is touched. Its text is kept as tokens, so that it can be trained again without the user's files
"""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch

from schemas.changes import changed_inputs
from schemas.cluster_documents import ClusterManifest
from schemas.failures import StaleFailure, UsageFailure
from schemas.files import FileRef
from schemas.launch import launched_as
from schemas.manifest import FILE_NAME, InputRef
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import (
    DENSE,
    AddedConfig,
    AddedManifest,
    ExpertConfig,
    ExpertManifest,
    ExpertMetrics,
    ExpertsConfig,
    ExpertsManifest,
    ExpertsMetrics,
    LoraConfig,
    is_further,
)
from schemas.train_seed import SeedManifest
from stages.artifacts.adapter_folder import seed_from, write_adapter
from stages.artifacts.added_domains import added_folder, begun_domains
from stages.artifacts.model_folder import read_model, read_tensors, write_model, write_tensors
from stages.artifacts.stage_folder import claim_folder
from stages.clustering.routing import centroid_of
from stages.data.added_text import drop_work, encode_added
from stages.data.batches import Rows
from stages.data.corpus import STDIN, find_corpus
from stages.data.pieces import over_text
from stages.data.token_store import TokenStore, read_table
from stages.engine.loop import train
from stages.engine.members import Member, members_at_once, train_members
from stages.nn.decoder import Decoder, NextTokenLoss
from stages.nn.lora import adapters, add_adapters
from stages.nn.sampling import likeliest

Upstream = tuple[TokenizeManifest, ClusterManifest, SeedManifest]


def run(config: ExpertsConfig, run_dir: Path, *, force: bool = False) -> ExpertsManifest | ExpertManifest:
    """Train all members that are missing, or the one `config.expert` names; with `config.add` there is one more.

    force: train again what is asked for, which with `config.add` is the added expert alone
    """
    upstream = TokenizeManifest.read(run_dir), ClusterManifest.read(run_dir), SeedManifest.read(run_dir)
    if config.add:
        _check_others(config, run_dir, upstream)
        _add(config.add, config.data, run_dir, upstream, force)
    members = dict(config.members(upstream[1].config.clusters, _domains(run_dir, upstream)))
    forced = {folder for folder, member in members.items() if force and config.add in (None, member.added)}
    if config.expert is not None:
        folder = config.folder_of(config.expert)
        if folder not in members:
            more = f"; give --dense-steps {folder.removeprefix(f'{DENSE}-')} too" if is_further(folder) else ""
            raise UsageFailure(f"--expert {config.expert} is not one of {', '.join(members)}{more}")
        return _train_member(folder, members[folder], run_dir, upstream, force)
    missing = [
        folder for folder in members if folder in forced or not _is_finished(folder, members[folder], run_dir, upstream)
    ]
    trainings = [
        Member(
            folder,
            partial(_train_member, folder, members[folder], run_dir, upstream, folder in forced),
            _log(run_dir, folder),
        )
        for folder in missing
    ]
    trained = train_members(trainings, min(members_at_once(config.parallel), len(members)))
    finished = {folder: trained.get(folder) or ExpertManifest.read(run_dir, folder) for folder in members}
    return _finish(config, run_dir, finished)


def _check_others(config: ExpertsConfig, run_dir: Path, upstream: Upstream) -> None:
    """Raise StaleFailure where the experts of clusters are finished with other settings or inputs."""
    for folder, member in config.members(upstream[1].config.clusters):
        try:
            _is_finished(folder, member, run_dir, upstream)
        except StaleFailure as failure:
            why = str(failure).split(": give --force")[0]
            raise StaleFailure(f"{why}: an expert is added with the settings of the others") from failure


def _add(name: str, data: Sequence[str], run_dir: Path, upstream: Upstream, force: bool) -> None:
    """Write the tokens of the domain and its centroid to `added/<name>`."""
    tokens, clusters, _ = upstream
    if launched_as().world > 1:
        raise UsageFailure(f"--add {name} is for one process: start it without the launcher")
    corpus = find_corpus(tokens.config.model_copy(update={"inputs": data}), run_dir)
    inputs = [tokens.as_input(), clusters.as_input(), *corpus.inputs()]
    config = AddedConfig(name=name, expert=_number(name, run_dir, clusters.config.clusters))
    with claim_folder(run_dir, AddedManifest, config, inputs, folder=added_folder(name), force=force) as claim:
        manifest = claim.finished
        if manifest is None:
            tokenizer = tokens.output("tokenizer.json").check(run_dir)
            shards, metrics = encode_added(corpus, claim.path, run_dir, tokenizer, tokens.metrics.end_of_text, name)
            manifest = claim.finish([*shards, _write_centroid(shards, claim.path, run_dir, clusters)], metrics)
        drop_work(claim.path, manifest.outputs)
    shutil.rmtree(run_dir / STDIN, ignore_errors=True)


def _write_centroid(shards: Sequence[FileRef], folder: Path, run_dir: Path, clusters: ClusterManifest) -> FileRef:
    """The mean vector of the training documents, among those of the clusters."""
    store = TokenStore.open([ref.check(run_dir) for ref in shards if Path(ref.path).name.startswith("train")])
    vectors = read_tensors(clusters.output("vectorizer.safetensors").check(run_dir))["token_vectors"].numpy()
    centroid = centroid_of((store.tokens(number) for number in range(len(store))), vectors)
    return write_tensors(folder / "centroid.safetensors", {"centroid": torch.from_numpy(centroid)}, run_dir, "centroid")


def _number(name: str, run_dir: Path, clusters: int) -> int:
    """The number that the domain has, if it is one that follows on the clusters, or the first that no other has."""
    taken = {domain.config.name: domain.config.expert for domain in begun_domains(run_dir)}
    own = taken.pop(name, -1)
    if clusters <= own <= clusters + len(taken):
        return own
    return next(number for number in count(clusters) if number not in taken.values())


def _domains(run_dir: Path, upstream: Upstream) -> list[tuple[int, str]]:
    """Number and name of the added domains. Raises StaleFailure when one was made for other clusters or tokens."""
    tokens, clusters, _ = upstream
    found = begun_domains(run_dir)
    for number, domain in enumerate(found, clusters.config.clusters):
        changed = [*changed_inputs(domain.inputs[:2], [tokens.as_input(), clusters.as_input()])]
        if domain.config.expert != number:
            changed.append(f"it is for expert {domain.config.expert} where {number} comes next")
        if changed:
            name = domain.config.name
            raise StaleFailure(
                f"{run_dir / added_folder(name)} is finished, but {changed[0]}: "
                f"give --add {name} with its text and --force to do it again, or remove the folder"
            )
    return [(domain.config.expert, domain.config.name) for domain in found]


def _is_finished(folder: str, config: ExpertConfig, run_dir: Path, upstream: Upstream) -> bool:
    """Whether there is nothing to do. Raises StaleFailure before anything is trained, where there is something else."""
    if not (run_dir / folder / FILE_NAME).exists():
        return False
    inputs = _inputs(config, run_dir, upstream)
    with claim_folder(run_dir, ExpertManifest, config, inputs, folder=folder) as claim:
        return claim.finished is not None


def _inputs(config: ExpertConfig, run_dir: Path, upstream: Upstream) -> list[InputRef]:
    found = [manifest.as_input() for manifest in upstream]
    if config.added is None:
        return found
    name = added_folder(config.added)
    return [*found, AddedManifest.read(run_dir, name).as_input(name)]


def _log(run_dir: Path, folder: str) -> Path:
    """Where the process of a member writes, when members are trained at once."""
    return run_dir / "logs" / f"{ExpertManifest.command}-{Path(folder).name}.log"


def _train_member(folder: str, config: ExpertConfig, run_dir: Path, upstream: Upstream, force: bool) -> ExpertManifest:
    tokens, clusters, seed = upstream
    inputs = _inputs(config, run_dir, upstream)
    with claim_folder(run_dir, ExpertManifest, config, inputs, folder=folder, force=force) as claim:
        if claim.finished:
            return claim.finished
        if claim.leader and not is_further(folder):
            # The manifest of all members says that each is finished: from here on one is not.
            (run_dir / ExpertsManifest.folder / FILE_NAME).unlink(missing_ok=True)
        training = config.training
        store, documents = _documents(config, run_dir, tokens, clusters)
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
            seen=seed.metrics.seen,
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
    config: ExpertConfig, run_dir: Path, tokens: TokenizeManifest, clusters: ClusterManifest
) -> tuple[TokenStore, np.ndarray | None]:
    """A store and the numbers in it of the documents of the cluster, those it shares among them; None for all.

    The shards of the cluster, where it has its own, hold the same documents in the same order as the whole store.
    """
    cluster = config.cluster
    if config.added:
        domain = AddedManifest.read(run_dir, added_folder(config.added))
        return TokenStore.open([ref.check(run_dir) for ref in domain.shards("train")]), None
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
    """Write the manifest of `experts/`: the digests of its members stand for their content.

    Further dense baselines are none of them: nothing that is made from the experts has to be made again for one.
    """
    members = {folder: member for folder, member in members.items() if not is_further(folder)}
    inputs = [InputRef(name=folder, digest=member.content_digest()) for folder, member in members.items()]
    experts = [member for folder, member in members.items() if folder != DENSE]
    with claim_folder(run_dir, ExpertsManifest, config, inputs, collection=True) as claim:
        return claim.finished or claim.finish(
            [],
            ExpertsMetrics(
                experts=len(experts),
                tokens=sum(expert.metrics.training.tokens for expert in experts),
                dense_tokens=members[DENSE].metrics.training.tokens if DENSE in members else 0,
                final_losses=tuple(expert.metrics.training.final_loss for expert in experts),
            ),
        )
