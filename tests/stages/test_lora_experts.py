"""LoRA experts through the stages: trained, killed, gated, composed, scored, continued."""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tokenizers
import torch

from schemas.decoder import DecoderShape
from schemas.evaluate_models import EvaluateConfig
from schemas.failures import InputFailure, UsageFailure
from schemas.generate_text import GenerateConfig
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import ExpertManifest, ExpertsConfig, ExpertsManifest, LoraConfig
from schemas.train_gates import GatesConfig, Selection
from schemas.train_seed import SeedConfig, SeedManifest
from schemas.training import TrainingConfig
from stages import compose_model, evaluate_models, train_experts, train_gates, train_seed
from stages.artifacts.run_models import RunModels
from stages.data.token_store import TokenStore
from stages.data.windows import Windows, choose_documents
from stages.generate_text import stream
from stages.nn.decoder import Decoder, token_log_probs
from stages.nn.gates import Gates
from stages.nn.routed import RoutedDecoder

WEIGHTS = "adapter_model.safetensors"
LORA = LoraConfig(rank=4, alpha=8.0)
IDS = torch.arange(3, 35)[None]

Copied = Callable[[Path], Path]


@pytest.fixture(scope="module")
def config(training: TrainingConfig) -> ExpertsConfig:
    training = training.model_copy(update={"learning_rate": 0.02, "steps": 30})
    return ExpertsConfig(kind="lora", lora=LORA, training=training)


@pytest.fixture(scope="module")
def grown_run(
    clustered_run: Path, shape: DecoderShape, training: TrainingConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run whose seed has embeddings of some use, without which adapters can do nothing. Read-only."""
    run_dir = Path(shutil.copytree(clustered_run, tmp_path_factory.mktemp("runs") / "grown"))
    longer = training.model_copy(update={"steps": 100, "learning_rate": 0.02})
    train_seed.run(SeedConfig(model=shape, training=longer), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def lora_run(
    grown_run: Path, config: ExpertsConfig, training: TrainingConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`grown_run` with LoRA experts, a dense baseline and gates. Read-only."""
    run_dir = Path(shutil.copytree(grown_run, tmp_path_factory.mktemp("runs") / "lora"))
    train_experts.run(config, run_dir)
    train_gates.run(GatesConfig(training=training.model_copy(update={"steps": 4, "weight_decay": 0.0})), run_dir)
    return run_dir


def digests(run_dir: Path) -> dict[str, str]:
    folders = [f"experts/{number:03d}" for number in range(3)]
    return {folder: ExpertManifest.read(run_dir, folder).output(WEIGHTS).digest for folder in folders}


def test_experts_are_adapters_and_the_dense_baseline_is_a_whole_model(lora_run: Path) -> None:
    whole = SeedManifest.read(lora_run).metrics.parameters
    dense = ExpertManifest.read(lora_run, "dense")
    assert dense.config.lora is None and dense.metrics.parameters == whole
    assert dense.output("model.safetensors").check(lora_run)
    widths = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32), "gate": (64, 32), "up": (64, 32)}
    own = 2 * sum(4 * (write + read) for write, read in [*widths.values(), (32, 64)])
    for number in range(3):
        expert = ExpertManifest.read(lora_run, f"experts/{number:03d}")
        assert expert.config.lora == LORA
        assert expert.metrics.parameters == own
    metrics = ExpertsManifest.read(lora_run).metrics
    assert metrics.tokens == metrics.dense_tokens


def test_every_cluster_has_an_adapter_of_its_own(lora_run: Path) -> None:
    assert len(set(digests(lora_run).values())) == 3


@pytest.mark.parametrize("changes", [{"rank": 2}, {"alpha": 4.0}, {"targets": ("q_proj",)}])
def test_another_adapter_than_asked_for_is_refused_by_name(
    changes: dict[str, object], lora_run: Path, config: ExpertsConfig
) -> None:
    (name,) = changes
    other = config.model_copy(update={"lora": LORA.model_copy(update=changes)})
    with pytest.raises(UsageFailure, match=rf"lora.{name} was .* and is now .*: give --force"):
        train_experts.run(other, lora_run)


def test_full_experts_are_no_lora_experts(expert_run: Path, config: ExpertsConfig, training: TrainingConfig) -> None:
    with pytest.raises(UsageFailure, match=r"lora was null .*lora.rank was null and is now 4|lora.rank was null"):
        train_experts.run(config.model_copy(update={"training": training}), expert_run)


def train_slowly(config: ExpertsConfig, run_dir: Path) -> None:
    """In a process of its own, with time for a signal between two steps."""
    torch.set_num_threads(1)
    real = train_experts.Rows.batch

    def batch(*arguments: object) -> torch.Tensor:
        (run_dir / "step").touch()
        time.sleep(0.02)
        return real(*arguments)  # type: ignore[arg-type]

    train_experts.Rows.batch = batch  # type: ignore[method-assign]
    train_experts.run(config, run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_killed_at_random_moments_the_adapters_have_the_bytes_of_an_uninterrupted_run(
    engine: str, seeded_run: Path, config: ExpertsConfig, tmp_path: Path
) -> None:
    training = config.training.model_copy(update={"engine": engine, "steps": 16, "checkpoint_every": 1})
    config = config.model_copy(update={"training": training, "dense": False})
    whole, cut = (Path(shutil.copytree(seeded_run, tmp_path / name)) for name in ("whole", "cut"))
    train_experts.run(config, whole)
    draw = random.Random(engine)
    for _ in range(2):
        process = multiprocessing.get_context("spawn").Process(target=train_slowly, args=(config, cut))
        (cut / "step").unlink(missing_ok=True)
        process.start()
        while not (cut / "step").exists():
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(0.1 + 0.3 * draw.random())
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    train_experts.run(config, cut)
    assert digests(cut) == digests(whole)


def test_gates_refuse_adapters_that_are_zero(seeded_run: Path, copied_run: Copied, config: ExpertsConfig) -> None:
    run_dir = copied_run(seeded_run)
    still = config.training.model_copy(update={"steps": 1, "learning_rate": 1e-30})
    train_experts.run(config.model_copy(update={"training": still, "dense": False}), run_dir)
    with pytest.raises(InputFailure, match="expert 0 equals the seed, so its gate has nothing to learn"):
        train_gates.run(GatesConfig(training=still), run_dir)


def test_the_table_says_what_lora_experts_cost(lora_run: Path, copied_run: Copied) -> None:
    run_dir = copied_run(lora_run)
    rows = {
        row.model: row for row in evaluate_models.run(EvaluateConfig(tokens=1200, top_k=(1,)), run_dir).metrics.rows
    }
    seed, adapter = rows["seed"], ExpertManifest.read(run_dir, "experts/000").metrics.parameters
    assert seed.parameters == rows["weight average"].parameters == SeedManifest.read(run_dir).metrics.parameters
    uniform, top_1 = rows["uniform ensemble"], rows["cBTM top-1"]
    assert uniform.parameters == uniform.active_parameters == seed.parameters + 3 * adapter
    assert uniform.inference_flops == pytest.approx(3 * seed.inference_flops)
    assert rows["oracle expert per document"].active_parameters == seed.parameters + adapter
    assert top_1.active_parameters < top_1.parameters == uniform.parameters
    assert rows["gates joint top-1"].parameters == uniform.parameters  # the seed is stored once
    assert rows["gates joint top-1"].active_parameters == seed.parameters + adapter
    # The experts together saw what the dense model saw, and each step was shorter.
    ratio = (uniform.training_flops - seed.training_flops) / (rows["dense"].training_flops - seed.training_flops)
    assert 2 / 3 < ratio < 1


def test_every_decoder_the_stages_load_is_the_seed_with_its_adapter(lora_run: Path, copied_run: Copied) -> None:
    from schemas.central import CentralShape
    from schemas.compose_model import BridgeTraining, ComposeConfig

    run_dir = copied_run(lora_run)
    models = RunModels.find(run_dir)
    experts = [Decoder.from_weights(*models.decoder(f"experts/{number:03d}")) for number in range(3)]
    logits = [expert(IDS) for expert in experts]
    assert not any(torch.equal(one, Decoder.from_weights(*models.decoder("seed"))(IDS)) for one in logits)
    central = CentralShape(
        group_length=4, latents_per_group=2, encoder_layers=1, latent_layers=1, decoder_layers=1, token_window=8
    )
    training = ExpertManifest.read(run_dir, "dense").config.training.model_copy(update={"steps": 2})
    compose = ComposeConfig(
        central=central, training=training, bridge_training=BridgeTraining(bridge_steps=2, bridge_batch_size=6)
    )
    manifest = compose_model.run(compose, run_dir)
    assert manifest.metrics.experts == 3
    composed = RunModels.find(run_dir).composition("central")["experts"]
    for own, (shape, weights) in zip(logits, composed, strict=True):
        assert torch.equal(Decoder.from_weights(shape, weights)(IDS), own)
    for model in ("expert:1", "cbtm", "central"):
        text = "".join(stream(GenerateConfig(prompt="butter flour", model=model, max_tokens=5), run_dir))
        assert isinstance(text, str)


def test_a_lora_expert_says_what_its_adapter_makes_likely(lora_run: Path) -> None:
    config = GenerateConfig(prompt="butter flour", max_tokens=12, temperature=0.0)
    texts = {
        model: "".join(stream(config.model_copy(update={"model": model}), lora_run))
        for model in ("seed", "expert:0", "expert:1", "expert:2")
    }
    assert len(set(texts.values())) > 2


def test_gates_inside_are_scored_as_they_predict(lora_run: Path, copied_run: Copied, training: TrainingConfig) -> None:
    run_dir = copied_run(lora_run)
    gates = GatesConfig(
        places=("layer", "module"),
        modes=("joint", "arrow"),
        training=training.model_copy(update={"steps": 4, "weight_decay": 0.0, "learning_rate": 0.05}),
    )
    train_gates.run(gates, run_dir, force=True)
    config = EvaluateConfig(tokens=2_000, usage_tokens=2_000, thresholds=(0.3,))
    found = {row.model: row for row in evaluate_models.run(config, run_dir).metrics.rows}
    selections = ("top-1", "top-2", "all", "threshold 0.3")
    labels = {
        f"gates {label} {chosen}" for label in ("layer-joint", "module-joint", "module-arrow") for chosen in selections
    }
    assert labels <= set(found) and not any(name.startswith("gates joint") for name in found)
    costs = [found[f"gates module-joint {chosen}"].inference_flops for chosen in ("top-1", "top-2", "all")]
    assert found["seed"].inference_flops < costs[0] < costs[1] < costs[2]
    assert found["gates module-joint top-1"].parameters == found["gates module-joint all"].parameters
    for label, place in (("layer-joint", "layer"), ("module-joint", "module")):
        weigh = partial(Gates.log_weights, selection=Selection(top_k=1))
        decoder = RoutedDecoder.from_parts(**RunModels.find(run_dir).routed(place, "joint"), weigh=weigh)
        windows = windows_of(run_dir, config)
        scored = windows.collect(partial(scores_of, decoder), 4, "x", torch.device("cpu"))
        total = float(scored.sum())
        bits = -total / math.log(2) / windows.bytes
        assert found[f"gates {label} top-1"].bits_per_byte == pytest.approx(bits, abs=1e-4)
    greedy = GenerateConfig(model="layer-joint", prompt="the", temperature=0.0, max_tokens=12, experts=1)
    weigh = partial(Gates.log_weights, selection=Selection(top_k=1))
    decoder = RoutedDecoder.from_parts(**RunModels.find(run_dir).routed("layer", "joint"), weigh=weigh)
    assert "".join(stream(greedy, run_dir)) == likeliest_text(run_dir, decoder, "the", 12)
    with pytest.raises(UsageFailure, match="has no gates layer-contrastive \\(there: layer-joint, "):
        "".join(stream(greedy.model_copy(update={"model": "layer-contrastive"}), run_dir))
    routing = json.loads((run_dir / "reports/routing.json").read_text())
    assert {(row["model"], row["layer"]) for row in routing} == {
        (f"gates {label} top-2", f"layer {layer}")
        for label in ("layer-joint", "module-joint", "module-arrow")
        for layer in (0, 1)
    }
    assert all(row["experts_asked"] <= 2.0 for row in routing if row["model"].startswith("gates layer"))


def scores_of(decoder: Decoder, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return token_log_probs(decoder(ids), targets)


def likeliest_text(run_dir: Path, decoder: Decoder, prompt: str, count: int) -> str:
    """The likeliest token, one after the other, each from the whole text anew."""
    tokens = TokenizeManifest.read(run_dir)
    tokenizer = tokenizers.Tokenizer.from_file(str(run_dir / "tokens/tokenizer.json"))
    ids = [tokens.metrics.end_of_text, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    start = len(ids)
    for _ in range(count):
        ids.append(int(decoder(torch.tensor([ids]))[0, -1, : tokens.metrics.vocab_size].argmax()))
        if ids[-1] == tokens.metrics.end_of_text:
            return str(tokenizer.decode(ids[start:-1]))
    return str(tokenizer.decode(ids[start:]))


def windows_of(run_dir: Path, config: EvaluateConfig) -> Windows:
    tokens = TokenizeManifest.read(run_dir)
    store = TokenStore.open([ref.check(run_dir) for ref in tokens.shards("valid")])
    length = Decoder.from_weights(*RunModels.find(run_dir).decoder("seed")).config.max_position_embeddings
    return Windows(store, choose_documents(store, config.tokens), tokens.metrics.end_of_text, length)
