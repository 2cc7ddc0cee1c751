import pytest
import torch
import torch._dynamo
from toy_training import Toy, batch_at, config, weights

from schemas.failures import InterruptedFailure, UsageFailure
from stages.engine import loop
from stages.engine.compilation import WORTH_COMPILING, choose_compile
from stages.engine.processes import Place

CPU, CUDA = (Place(0, 0, 1, torch.device(device)) for device in ("cpu", "cuda"))


@pytest.mark.parametrize(
    ("place", "changes", "expected"),
    [
        (CPU, {"steps": WORTH_COMPILING}, False),
        (CUDA, {"steps": WORTH_COMPILING}, True),
        (CUDA, {"steps": WORTH_COMPILING - 1}, False),
        (CUDA, {"steps": WORTH_COMPILING, "zero_stage": 3}, False),
        (CUDA, {"steps": WORTH_COMPILING, "compile": "off"}, False),
        (CUDA, {"compile": "on"}, True),
        (CPU, {"compile": "on"}, True),
    ],
)
def test_auto_compiles_long_runs_on_cuda_only(place, changes, expected):
    assert choose_compile(config(engine="deepspeed", **changes), place) is expected


def test_what_cannot_be_compiled_is_refused_in_one_line(monkeypatch):
    with pytest.raises(UsageFailure, match="--compile on does not go with ZeRO 3"):
        choose_compile(config(engine="deepspeed", zero_stage=3, compile="on"), CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageFailure, match="needs a C\\+\\+ compiler, and there is no no-such-compiler"):
        choose_compile(config(compile="on"), CPU)
    assert choose_compile(config(compile="off"), CPU) is False


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
def test_a_compiled_module_is_compiled(tmp_path):
    graphs = {}
    for compiled in ("off", "on"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        loop.train(Toy(), batch_at, config(compile=compiled, steps=2), tmp_path, "toy")
        graphs[compiled] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs["on"] > graphs["off"] == 0
