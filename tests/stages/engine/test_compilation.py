import math
import os

import pytest
import safetensors.torch
import torch
import torch._dynamo
from loguru import logger
from toy_processes import started
from toy_training import Toy, batch_at, config, weights

from schemas.decoder import DecoderConfig
from schemas.failures import InterruptedFailure, UsageFailure
from stages.engine import compilation, loop
from stages.engine.compilation import LONG_FLOPS, LONG_STEPS, choose_compile, compiler_cache, compiler_works
from stages.engine.processes import Place
from stages.nn.decoder import Decoder, NextTokenLoss

CPU, CUDA = (Place(0, 0, 1, torch.device(device)) for device in ("cpu", "cuda"))
CPU_OF_TWO = Place(0, 0, 2, torch.device("cpu"))


def next_token_loss():
    shape = DecoderConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        vocab_size=9, max_position_embeddings=8,
    )  # fmt: skip
    return NextTokenLoss(Decoder(shape))


FEW = math.ceil(LONG_FLOPS / (6 * sum(p.numel() for p in next_token_loss().parameters()) * config().tokens_per_step))


@pytest.mark.parametrize(
    ("place", "changes", "expected"),
    [
        (CPU, {"steps": FEW - 1}, False),
        (CPU, {"steps": FEW}, True),
        (CPU, {"steps": FEW, "compile": "off"}, False),
        (CPU, {"steps": FEW, "zero_stage": 3}, False),
        (CPU_OF_TWO, {"steps": FEW}, False),
        (CPU_OF_TWO, {"steps": 2 * FEW}, True),
        (CUDA, {"steps": LONG_STEPS}, True),
        (CUDA, {"steps": LONG_STEPS - 1}, False),
        (CUDA, {"steps": LONG_STEPS, "zero_stage": 3}, False),
        (CUDA, {"steps": LONG_STEPS, "compile": "off"}, False),
        (CUDA, {"compile": "on"}, True),
        (CPU, {"compile": "on"}, True),
    ],
)
def test_auto_compiles_long_runs_of_decoders(place, changes, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(compilation, "compiler_works", lambda device: True)
    settings = config(engine="deepspeed", **changes)
    assert choose_compile(settings, place, next_token_loss()) is expected
    assert choose_compile(settings, place, Toy()) is (expected and settings.compile == "on")
    monkeypatch.setattr(compilation, "compiler_works", lambda device: False)
    assert choose_compile(settings, place, next_token_loss()) is (expected and settings.compile == "on")


def test_what_cannot_be_compiled_is_refused_in_one_line(monkeypatch):
    with pytest.raises(UsageFailure, match="--compile on does not go with ZeRO 3"):
        choose_compile(config(engine="deepspeed", zero_stage=3, compile="on"), CPU, Toy())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageFailure, match="needs a C\\+\\+ compiler, and there is no no-such-compiler"):
        choose_compile(config(compile="on"), CPU, Toy())
    assert choose_compile(config(compile="off"), CPU, Toy()) is False


@pytest.mark.parametrize("works", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_compiler_that_is_there_need_not_work(works, monkeypatch):
    def broken(function):
        raise RuntimeError("Python.h: no such file\nand much more")

    if not works:
        monkeypatch.setattr(torch, "compile", broken)
    lines = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="WARNING")
    compiler_works.cache_clear()
    try:
        assert compiler_works(torch.device("cpu")) is works
    finally:
        logger.remove(sink)
        compiler_works.cache_clear()
    told = "training is not compiled, which would be faster: Python.h: no such file"
    assert lines == ([] if works else [told])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_run_equals_an_eager_one_and_resumes_exactly(engine, tmp_path, monkeypatch):
    def trained(name, batches=batch_at, **changes):
        module = Toy()
        metrics = loop.train(module, batches, config(engine=engine, **changes), tmp_path / name, "toy")
        return weights(module), metrics

    for name in ("eager", "whole", "stopped"):
        (tmp_path / name).mkdir()
    eager, plain = trained("eager")
    whole, metrics = trained("whole", compile="on")
    assert metrics.compiled and not plain.compiled
    for name, tensor in eager.items():
        torch.testing.assert_close(whole[name], tensor, atol=1e-5, rtol=0)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "any_process", lambda flag, place: True)
        with pytest.raises(InterruptedFailure):
            trained("stopped", compile="on")
    seen = []
    resumed, _ = trained("stopped", lambda step: seen.append(step) or batch_at(step), compile="on")
    assert seen[0] == 1
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_is_compiled_repeats_itself_on_several_threads(tmp_path, monkeypatch):
    """Few tokens, so that threads add to the same rows of the embedding's gradient."""
    shape = next_token_loss().decoder.config.model_copy(update={"hidden_size": 64, "intermediate_size": 64})
    threads, ids = torch.get_num_threads(), torch.randint(shape.vocab_size, (8, 129))
    found = []
    torch.set_num_threads(2)
    try:
        for name in ("once", "again"):
            (tmp_path / name).mkdir()
            torch.manual_seed(0)
            module = NextTokenLoss(Decoder(shape))
            settings = config(steps=4, batch_size=8, sequence_length=128, compile="on")
            loop.train(module, lambda step: ids, settings, tmp_path / name, "decoder")
            found.append(weights(module))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_module_is_compiled(tmp_path):
    graphs = {}
    for compiled in ("off", "on"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        loop.train(Toy(), batch_at, config(compile=compiled, steps=2), tmp_path, "toy")
        graphs[compiled] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs["on"] > graphs["off"] == 0


CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def test_what_is_compiled_lies_in_a_folder_of_its_own_that_begins_empty_and_goes(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHES[0], str(tmp_path / "shared"))  # absolute, as torch makes it
    monkeypatch.delenv(CACHES[1], raising=False)
    folder = tmp_path / "checkpoints" / "compiled-0"
    folder.mkdir(parents=True)
    (folder / "left.so").write_text("half a f")
    with pytest.raises(RuntimeError, match="stops"), compiler_cache(folder, needed=True):
        assert not (folder / "left.so").exists()
        assert all(os.environ[name].startswith(str(folder)) for name in CACHES)
        raise RuntimeError("stops")
    assert not folder.exists()
    assert (os.environ[CACHES[0]], os.environ.get(CACHES[1])) == (str(tmp_path / "shared"), None)
    with compiler_cache(folder, needed=False):
        assert not folder.exists()


@pytest.mark.slow
def test_half_files_of_a_killed_compiler_do_not_matter(tmp_path):
    shared = tmp_path / "shared"

    def trained(name, **environment):
        own = {CACHES[0]: str(shared), **environment}
        process = started(tmp_path / name, config(compile="on"), environment=own)
        process.join(300)
        return process.exitcode

    assert trained("whole") == 0
    assert trained("killed", DEATH="5", KILL="1") == -9
    left = list((tmp_path / "killed/checkpoints/compiled-0").rglob("*.so"))
    assert left
    for path in left:
        path.write_bytes(path.read_bytes()[:100])
    assert trained("killed") == 0
    assert not (tmp_path / "killed" / "checkpoints").exists()
    whole, resumed = (
        safetensors.torch.load_file(tmp_path / name / "weights-0-0.safetensors") for name in ("whole", "killed")
    )
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert not list(shared.rglob("*.so"))
