"""Bridge training without kept features, keeping them, and with them: seconds a step, and what they take on disk.

    python benchmarks/bench_features.py RUN [--steps 20] [--rounds 3] [--threads 1]

- RUN has tokens, a seed, experts and joint gates; nothing in it is written to. The central model is the seed's width
- one round is the same steps on the same rows in the three ways, in turn; medians over the rounds
- what is found was written a moment ago, so it comes from the system's memory: from a disk it can be slower
- the three must lower the loss by the same bits, or the script fails
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from loguru import logger

from schemas.central import CentralConfig, CentralShape
from schemas.compose_model import BridgeConfig
from schemas.manifest import InputRef
from schemas.tokenize_text import TokenizeManifest
from stages.artifacts.feature_cache import FeatureCache
from stages.artifacts.run_models import RunModels, expert_folder
from stages.data.batches import Rows
from stages.data.token_store import TokenStore
from stages.nn.central import CentralModel
from stages.nn.composed import ComposedModel
from stages.nn.composed_loss import ComposedLoss, Features
from stages.nn.decoder import Decoder
from stages.nn.gates import ExpertGates, SeedGate

ROWS, LENGTH = 8, 256
SHAPE = CentralShape(encoder_layers=2, latent_layers=4, decoder_layers=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    logger.remove()
    tokens, models = TokenizeManifest.read(asked.run), RunModels.find(asked.run)
    shards = [ref.check(asked.run) for ref in tokens.shards("train")]
    rows = Rows(TokenStore.open(shards), tokens.metrics.end_of_text, LENGTH)
    batches = [rows.batches(ROWS, seed=0)(step) for step in range(asked.steps)]
    spent: dict[str, list[float]] = {"not kept": [], "kept for the first time": [], "found": []}
    size = 0
    for number in range(asked.rounds):
        with tempfile.TemporaryDirectory(prefix="bench-features-") as folder:
            inputs = [InputRef(name="round", digest=f"sha256:{number:064x}")]
            losses = set()
            for way, seconds in spent.items():
                features = None if way == "not kept" else FeatureCache(Path(folder), inputs, {}, 1e12)
                took, loss = _train(models, batches, features)
                seconds.append(took / asked.steps)
                losses.add(loss)
                print(f"{way}: {took / asked.steps:.3f} s a step, loss {loss:.6f}", flush=True)
            assert len(losses) == 1, losses
            size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    medians = {way: statistics.median(seconds) for way, seconds in spent.items()}
    print("\n| experts' features | s a step | steps in the time of one |\n|---|--:|--:|")
    for way, median in medians.items():
        print(f"| {way} | {median:.3f} | {medians['not kept'] / median:.2f} |")
    print(f"\n{size / (asked.steps * ROWS * LENGTH) / 1024:.1f} KiB a token; {len(models.experts)} experts")


def _train(models: RunModels, batches: list[torch.Tensor], features: Features | None) -> tuple[float, float]:
    """Seconds of all steps, and the last loss."""
    loss_of = ComposedLoss(_composed(models), features).train()
    trained = [parameter for parameter in loss_of.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    begun, loss = time.perf_counter(), torch.zeros(())
    for batch in batches:
        loss = loss_of(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - begun, float(loss.detach())


def _composed(models: RunModels) -> ComposedModel:
    seed = Decoder.from_weights(*models.decoder("seed"))
    experts = [Decoder.from_weights(*models.decoder(expert_folder(number))) for number in range(len(models.experts))]
    assert models.gates is not None, "the run has no gates"
    gates = ExpertGates.from_tensors(models.gate_tensors(), *models.gates.reads("joint"))
    torch.manual_seed(0)
    central = CentralModel(CentralConfig.beside(SHAPE, seed.config))
    central.start_from(seed)
    return ComposedModel(central, experts, BridgeConfig(), SeedGate(seed, gates))


if __name__ == "__main__":
    main()
