"""Route: which experts the gates would ask for each token of a text, and by which scores.

- a token is routed by the tokens before it: the first by nothing but the separator
- a text longer than the seed's context is read in windows, as evaluate reads it; the gates remember it all
"""

from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
from tokenizers.decoders import DecodeStream

from schemas.failures import UsageFailure
from schemas.route_text import RouteConfig, RoutedToken
from schemas.tokenize_text import TokenizeManifest
from schemas.train_gates import GateMode, GatesManifest
from stages.artifacts.run_models import RunModels
from stages.nn.decoder import Decoder
from stages.nn.gates import ExpertGates


def stream(config: RouteConfig, run_dir: Path) -> Iterator[RoutedToken]:
    """Every token of the text with its weights. Raises UsageFailure when the run has no such gates."""
    tokens, models = TokenizeManifest.read(run_dir), RunModels.find(run_dir)
    manifest = GatesManifest.read(run_dir)
    models.refuse_other_ancestors(folders=[GatesManifest.folder])
    mode, selection = _mode(config, run_dir, manifest), config.selection
    if selection.top_k is not None and selection.top_k > manifest.metrics.experts:
        raise UsageFailure(f"--top-k {selection.top_k} is more than the run's {manifest.metrics.experts} experts")
    gates = ExpertGates.from_tensors(models.gate_tensors(), *manifest.reads(mode))
    seed = Decoder.from_weights(*models.decoder("seed"))
    tokenizer = tokenizers.Tokenizer.from_file(str(tokens.output("tokenizer.json").check(run_dir)))
    tokenizer.encode_special_tokens = True  # the name of a special token in a text is text like any other
    ids = tokenizer.encode(config.text, add_special_tokens=False).ids
    if not ids:
        return
    read = _read(seed, gates, [tokens.metrics.end_of_text, *ids[:-1]])
    decoder = DecodeStream(skip_special_tokens=True)
    for token, read_D in zip(ids, read, strict=True):
        weights = gates.log_weights(read_D[None, None], selection)[0, 0].exp().tolist()
        scores = gates.scores_at_use(read_D[None, None])[0, 0].tolist()
        yield RoutedToken(
            text=decoder.step(tokenizer, token) or "", seed=weights[0], weights=tuple(weights[1:]), scores=tuple(scores)
        )


def _mode(config: RouteConfig, run_dir: Path, manifest: GatesManifest) -> GateMode:
    known = manifest.modes_at_experts(run_dir)
    mode = config.mode or ("joint" if "joint" in known else known[0])
    if mode not in known:
        raise UsageFailure(f"the run's gates were learnt as {', '.join(known)}, not {mode}: give another --mode")
    return mode


@torch.no_grad()
def _read(seed: Decoder, gates: ExpertGates, ids: list[int]) -> Iterator[torch.Tensor]:
    """What the gates read [D] after each of the ids."""
    before_BD = None
    for ids_T in torch.tensor(ids).split(seed.config.max_position_embeddings):
        u_BTD = seed.hidden_states(ids_T[None], depth=gates.layer)[-1]
        read_BTD = gates.remembered(u_BTD, ids_T[None], before_BD)
        before_BD = read_BTD[:, -1]
        yield from read_BTD[0]
