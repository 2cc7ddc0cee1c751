import pytest
import torch
from torch import nn
from toy_training import VOCAB, Toy, batch_at, batch_with, config, weights

from schemas.central import CentralConfig
from schemas.decoder import DecoderConfig
from schemas.failures import UsageFailure
from stages.engine import engines, muon
from stages.engine.engines import start_engine
from stages.engine.loop import train
from stages.engine.optimizer import build_optimizer, choose_optimizer
from stages.engine.precision import LossScale, choose_precision
from stages.engine.processes import Place
from stages.engine.schedule import learning_rate
from stages.nn.central import CentralLoss, CentralModel
from stages.nn.decoder import Decoder, NextTokenLoss

ENGINES = {
    "torch": {"engine": "torch"},
    "zero-0": {"engine": "deepspeed", "zero_stage": 0},
    "zero-1": {"engine": "deepspeed", "zero_stage": 1},
    "zero-2": {"engine": "deepspeed", "zero_stage": 2},
    "zero-3": {"engine": "deepspeed", "zero_stage": 3},
}
ALONE = Place(0, 0, 1, torch.device("cpu"))


def trained(folder, module=None, **settings):
    module = module or Toy()
    train(module, batch_at, config(**settings), folder, "toy")
    return weights(module)


def reference(settings, steps, left_out=()):
    """AdamW as in torch.optim, clipping and decay written out; as if the steps `left_out` had never been."""
    module = Toy()
    matrices = [p for p in module.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in module.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(settings.adam_beta1, settings.adam_beta2), foreach=False)
    for step in sorted({*range(steps)} - {*left_out}):
        module(batch_at(step))["loss"].backward()
        norm = torch.cat([p.grad.flatten() for p in matrices + vectors]).norm()
        for parameter in matrices + vectors:
            parameter.grad *= min(1.0, settings.gradient_clipping / norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.step()
        optimizer.zero_grad()
    return weights(module)


def assert_close(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_one_process_without_zero_gathers_no_gradients(tmp_path, monkeypatch):
    from deepspeed.runtime.engine import DeepSpeedEngine

    monkeypatch.setattr(DeepSpeedEngine, "allreduce_gradients", None)
    trained(tmp_path, **ENGINES["zero-0"])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("micro", [None, 2, 1])
def test_every_engine_and_micro_batch_gives_the_weights_of_a_plain_adamw_loop(engine, micro, tmp_path):
    settings = config(**ENGINES[engine], micro_batch_size=micro)
    found = trained(tmp_path, **ENGINES[engine], micro_batch_size=micro)
    assert_close(found, reference(settings, settings.steps))
    assert not torch.equal(found["out.weight"], Toy().out.weight)


@pytest.mark.parametrize("engine", ENGINES)
def test_only_what_requires_a_gradient_moves(engine, tmp_path):
    before, after = weights(Toy()), trained(tmp_path, **ENGINES[engine])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if not name.startswith("frozen")}


@pytest.mark.parametrize("engine", ENGINES)
def test_weight_decay_shrinks_matrices_only(engine, tmp_path):
    class Still(nn.Module):
        """Everything takes part and nothing has a gradient but zero."""

        def __init__(self):
            super().__init__()
            self.matrix, self.vector = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))

        def forward(self, rows):
            return {"loss": 0 * (self.matrix.sum() + self.vector.sum())}

    settings = {**ENGINES[engine], "steps": 4, "weight_decay": 0.5, "warmup": 0.0, "learning_rate": 0.1}
    found = trained(tmp_path, Still(), **settings)
    rates = [learning_rate(step, config(**settings)) for step in range(4)]
    expected = torch.tensor([1 - 0.5 * rate for rate in rates]).prod().item()
    torch.testing.assert_close(found["matrix"], torch.full((2, 3), expected))
    assert torch.equal(found["vector"], torch.ones(3))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_module_is_whole_after_training(engine, tmp_path):
    module, again = Toy(), Toy()
    found = trained(tmp_path, module, **ENGINES[engine])
    with torch.no_grad():
        loss = module(batch_at(0))["loss"]
        again.load_state_dict(module.state_dict())
        assert torch.equal(again(batch_at(0))["loss"], loss)
    assert_close(weights(module), found, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_parts_of_a_trained_module_can_be_trained_again(engine, tmp_path):
    """The gates meet the same frozen models in one run after another; a central model is trained twice."""

    def twice(folder, **settings):
        module = Toy()
        trained(folder, module, **settings)
        module.frozen.requires_grad_(True)
        module.embed.requires_grad_(False)
        return trained(folder, module, **settings)

    assert_close(twice(tmp_path, **ENGINES[engine]), twice(tmp_path), 2e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_norm_of_the_gradient_is_given_before_clipping(engine):
    module, settings = Toy(), config(**ENGINES[engine], gradient_clipping=1e-3)
    module(batch_at(0))["loss"].backward()
    expected = torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad]).norm().item()
    module.zero_grad()
    outcome = start_engine(module, settings, ALONE).step([batch_at(0)], 1e-3)
    assert outcome.norm == pytest.approx(expected, rel=1e-4)
    assert outcome.parts["loss"].item() == pytest.approx(Toy()(batch_at(0))["loss"].item(), abs=1e-6)


def test_bf16_trains_nearly_like_fp32_and_keeps_fp32_weights(tmp_path):
    exact, rounded = trained(tmp_path), trained(tmp_path, precision="bf16")
    assert all(tensor.dtype == torch.float32 for tensor in rounded.values())
    assert not torch.equal(exact["out.weight"], rounded["out.weight"])
    start = Toy().out.weight
    assert (rounded["out.weight"] - exact["out.weight"]).norm() < 0.2 * (exact["out.weight"] - start).norm()


def test_auto_chooses_deepspeed_and_what_is_fast(tmp_path):
    assert start_engine(Toy(), config(engine="auto"), ALONE).name == "deepspeed"
    assert choose_precision(config(precision="bf16"), ALONE) == "bf16"
    assert choose_precision(config(precision="auto"), ALONE) in ("fp32", "bf16")


@pytest.mark.parametrize("settings, world", [({"zero_stage": 1}, 1), ({}, 2)])
def test_torch_alone_neither_shards_nor_joins(settings, world):
    with pytest.raises(UsageFailure, match=r"--engine torch trains on one device.*--engine deepspeed"):
        start_engine(Toy(), config(engine="torch", **settings), Place(0, 0, world, torch.device("cpu")))


@pytest.mark.parametrize("error", [ImportError("no module"), RuntimeError("no nvcc\nfound"), OSError("libaio")])
def test_auto_falls_back_to_torch_where_deepspeed_cannot_be_imported(error, monkeypatch):
    def refuse(place):
        raise error

    said = []
    monkeypatch.setattr(engines.logger, "warning", lambda text, *values: said.append(text.format(*values)))
    monkeypatch.setattr(engines, "load_deepspeed", refuse)
    assert start_engine(Toy(), config(engine="auto"), ALONE).name == "torch"
    assert said == [
        f"DeepSpeed cannot be imported here ({type(error).__name__}: {' '.join(str(error).split())}): "
        "training with plain torch"
    ]
    for settings, place in [({"engine": "deepspeed"}, ALONE), ({"engine": "auto", "zero_stage": 1}, ALONE)]:
        with pytest.raises(UsageFailure, match=r"cannot be imported here .*: mend it, or train in one") as refused:
            start_engine(Toy(), config(**settings), place)
        assert "\n" not in str(refused.value)


def test_fp16_trains_nearly_like_fp32_under_every_engine(tmp_path):
    exact = trained(tmp_path)
    start = Toy().out.weight
    for engine in ENGINES:
        rounded = trained(tmp_path, precision="fp16", **ENGINES[engine])
        assert all(tensor.dtype == torch.float32 for tensor in rounded.values())
        assert (rounded["out.weight"] - exact["out.weight"]).norm() > 0
        assert (rounded["out.weight"] - exact["out.weight"]).norm() < 0.1 * (exact["out.weight"] - start).norm()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_loss_scale_of_fp16_is_halved_by_overflow_and_doubled_by_patience(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(LossScale, "START", 2.0**24)
    monkeypatch.setattr(LossScale, "PATIENCE", 3)
    started = start_engine(Toy(), config(**ENGINES[engine], precision="fp16"), ALONE)
    outcomes, scales = [], []
    for step in range(24):
        before = {name: tensor.clone() for name, tensor in started.state().items() if name != "loss_scale"}
        scales.append(started.state()["loss_scale"][0].item())
        outcomes.append(started.step([batch_at(step)], 1e-3))
        after = started.state()
        assert outcomes[-1].applied != all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert outcomes[-1].rescaled == (not outcomes[-1].applied)
    applied = [outcome.applied for outcome in outcomes]
    assert applied[0] is False and applied.count(True) >= 12
    clean = 0
    for number in range(1, 24):
        clean = clean + 1 if applied[number - 1] else 0
        factor = 0.5 if not applied[number - 1] else 2 if clean and clean % 3 == 0 else 1
        assert scales[number] == scales[number - 1] * factor
    norms = [outcome.norm for outcome in outcomes if outcome.applied]
    assert max(norms) < 10  # of the gradient itself, not of the scaled one


def test_fp16_on_a_processor_is_doubted(monkeypatch):
    said = []
    monkeypatch.setattr(engines.logger, "warning", said.append)
    start_engine(Toy(), config(precision="fp16"), ALONE)
    assert said == ["fp16 is emulated on this processor, and slower than fp32: it is of use on GPUs only"]


@pytest.mark.parametrize(
    "engine, loss", [*((engine, "decoder") for engine in ENGINES), ("torch", "central"), ("zero-2", "central")]
)
def test_layers_computed_twice_train_to_the_same_bits(engine, loss, tmp_path):
    def module():
        torch.manual_seed(1)
        shape = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        if loss == "decoder":
            config = DecoderConfig(**shape, num_hidden_layers=2, num_key_value_heads=1)
            return NextTokenLoss(Decoder(config))
        layers = {"encoder_layers": 1, "latent_layers": 2, "decoder_layers": 2, "group_length": 2}
        config = CentralConfig(**shape, **layers, num_key_value_heads=2, latents_per_group=1, plan_horizon=1)
        return CentralLoss(CentralModel(config))

    kept, again = (
        trained(tmp_path, module(), **ENGINES[engine], steps=3, precision="bf16", activation_checkpointing=twice)
        for twice in (False, True)
    )
    assert_close(again, kept, 0)
    assert not torch.equal(kept[next(iter(kept))], weights(module())[next(iter(kept))])


@pytest.mark.parametrize("stage", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_an_optimizer_kept_on_the_processor_skips_stops_and_resumes_like_any(stage, tmp_path):
    class Killed(Exception):
        pass

    def batches(step):
        if step == killed_at:
            raise Killed
        return batch_with(2)(step)

    settings = {"engine": "deepspeed", "zero_stage": stage, "offload_optimizer": "cpu", "precision": "fp16"}
    for name in ("whole", "cut", "exact"):
        (tmp_path / name).mkdir()
    whole, cut = Toy(), Toy()
    train(whole, batch_with(2), config(**settings), tmp_path / "whole", "toy")
    killed_at = 4
    with pytest.raises(Killed):
        train(Toy(), batches, config(**settings), tmp_path / "cut", "toy")
    killed_at = None
    train(cut, batches, config(**settings), tmp_path / "cut", "toy")
    assert_close(weights(cut), weights(whole), 0)
    exact = Toy()
    train(exact, batch_with(2), config(**settings | {"precision": "fp32"}), tmp_path / "exact", "toy")
    assert_close(weights(exact), reference(config(), 8, (2,)))


def test_there_is_nothing_to_offload_without_zero():
    for settings in ({"engine": "torch"}, {"engine": "auto"}, {"engine": "deepspeed"}):
        with pytest.raises(UsageFailure, match="--offload-optimizer cpu needs --zero-stage 1, 2 or 3"):
            start_engine(Toy(), config(**settings, offload_optimizer="cpu"), ALONE)


def muon_update(momentum, gradient):
    """Keller Jordan's Muon in ten lines: Nesterov momentum made nearly orthogonal, as large as AdamW's update."""
    momentum.lerp_(gradient, 1 - 0.95)
    x = gradient.lerp(momentum, 0.95)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return (x.T if tall else x) * 0.2 * max(x.shape) ** 0.5


@pytest.mark.parametrize(
    ("engine", "half"),
    [("torch", False), ("zero-0", False), ("zero-1", False), ("zero-2", False), ("torch", True), ("zero-1", True)],
)
def test_muon_moves_the_matrices_of_layers_and_adamw_the_rest(engine, half, tmp_path, monkeypatch):
    monkeypatch.setattr(muon, "bf16_is_fast", lambda device: half)
    settings = config(optimizer="muon")
    module = Toy()
    inside = [module.hidden.weight, module.out.weight]
    others = {True: [module.embed.weight], False: [module.hidden.bias, module.norm.weight, module.norm.bias]}
    groups = [{"params": p, "weight_decay": settings.weight_decay * decayed} for decayed, p in others.items()]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
    momenta = [torch.zeros_like(p) for p in inside]
    for step in range(8):
        module(batch_at(step))["loss"].backward()
        parameters = [p for p in module.parameters() if p.requires_grad]
        nn.utils.clip_grad_norm_(parameters, settings.gradient_clipping)
        rate = learning_rate(step, settings)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        with torch.no_grad():
            for parameter, momentum in zip(inside, momenta, strict=True):
                parameter.mul_(1 - rate * settings.weight_decay)
                parameter.sub_(rate * muon_update(momentum, parameter.grad))
        module.zero_grad()
    found = trained(tmp_path, optimizer="muon", **ENGINES[engine])
    assert_close(found, weights(module), 1e-3 if half else 1e-6)
    far = (weights(module)["out.weight"] - trained(tmp_path)["out.weight"]).abs().max()
    assert far > 1e-2


def test_tables_of_the_central_model_are_not_muons():
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    central = CentralModel(CentralConfig(**shape, num_key_value_heads=2))
    inside = {id(p) for p in build_optimizer(central, config(optimizer="muon")).param_groups[0]["params"]}
    others = {name for name, p in central.named_parameters() if p.dim() == 2 and id(p) not in inside}
    tables = {"start_KD", "start_HD", "reducer.slot_KD", "upsampler.place_GD", "plan_reader.distance_HD"}
    assert others == {"embed_tokens.weight", *tables}


def test_embeddings_and_the_output_layer_are_not_muons():
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    for tied in (True, False):
        config_ = DecoderConfig(**shape, num_hidden_layers=1, num_key_value_heads=1, tie_word_embeddings=tied)
        decoder = Decoder(config_)
        first, *adamw = build_optimizer(decoder, config(optimizer="muon")).param_groups
        inside = {id(p) for p in first["params"]}
        named = {name for name, p in decoder.named_parameters() if id(p) in inside}
        assert named == {name for name in decoder.state_dict() if "proj" in name}
        assert sum(len(group["params"]) for group in adamw) == 3 + 1 + (not tied)


@pytest.mark.parametrize("engine", ["torch", "zero-0", "zero-1", "zero-2"])
def test_muon_skips_stops_and_resumes_to_the_bit(engine, tmp_path):
    class Killed(Exception):
        pass

    def batches(step):
        if step == 5 and not again:
            raise Killed
        return batch_with(1)(step)

    settings = config(optimizer="muon", **ENGINES[engine])
    whole, cut, again = Toy(), Toy(), False
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    train(whole, batch_with(1), settings, tmp_path / "whole", "toy")
    with pytest.raises(Killed):
        train(Toy(), batches, settings, tmp_path / "cut", "toy")
    again = True
    train(cut, batches, settings, tmp_path / "cut", "toy")
    assert_close(weights(cut), weights(whole), 0)


@pytest.mark.parametrize(
    ("engine", "expected"), [("torch", "muon"), ("zero-0", "muon"), ("zero-1", "muon"), ("zero-3", "adamw")]
)
def test_auto_is_muon_unless_zero_takes_the_matrices_apart(engine, expected, tmp_path):
    found, named = Toy(), Toy()
    train(found, batch_at, config(**ENGINES[engine], optimizer="auto"), tmp_path, "toy")
    train(named, batch_at, config(**ENGINES[engine], optimizer=expected), tmp_path, "toy")
    assert choose_optimizer(config(**ENGINES[engine], optimizer="auto"), Toy()) == expected
    assert_close(weights(found), weights(named), 0)


def test_auto_is_adamw_where_there_is_no_linear_map():
    vectors = nn.ParameterList([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 4))])
    assert choose_optimizer(config(optimizer="auto"), vectors) == "adamw"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"zero_stage": 3}, "--optimizer muon needs whole matrices, .*: use --zero-stage 2, or use --optimizer adamw"),
        ({"zero_stage": 1, "offload_optimizer": "cpu"}, "--optimizer muon .*: leave out --offload-optimizer cpu, or"),
    ],
)
def test_muon_is_refused_where_it_cannot_work_and_auto_is_adamw(settings, told):
    with pytest.raises(UsageFailure, match=told):
        start_engine(Toy(), config(engine="auto", optimizer="muon", **settings), ALONE)
    assert choose_optimizer(config(engine="auto", optimizer="auto", **settings), Toy()) == "adamw"


def test_muon_needs_matrices():
    vectors = nn.ParameterList([nn.Parameter(torch.ones(3))])
    with pytest.raises(UsageFailure, match="--optimizer muon: what is trained has no linear maps inside"):
        start_engine(vectors, config(engine="torch", optimizer="muon"), ALONE)


def test_zero_3_leaves_torch_as_it_was():
    linear = nn.functional.linear
    engine = start_engine(Toy(), config(**ENGINES["zero-3"]), ALONE)
    assert nn.functional.linear is linear
    engine.step([batch_at(0)], 0.01)
    assert nn.functional.linear is linear
