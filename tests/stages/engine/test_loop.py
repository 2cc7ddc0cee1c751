import errno
import json
import math
import os
import random
import signal
import time

import pytest
import torch
from test_engines import ENGINES, assert_close, reference
from torch import nn
from toy_processes import ended, in_two, started, together, wait_for_step, weights_of
from toy_training import VOCAB, Toy, batch_at, batch_with, config, weights

from schemas import launch
from schemas.failures import DivergedFailure, InterruptedFailure, ResourceFailure, UsageFailure
from stages.engine import checkpoints
from stages.engine.loop import train
from stages.engine.precision import LossScale
from stages.engine.processes import bf16_is_fast
from stages.engine.schedule import learning_rate

HALF = bf16_is_fast(torch.device("cpu"))  # whether Muon multiplies in bf16 here
SLOWLY = [pytest.param(name, marks=pytest.mark.slow if name == "zero-3" else ()) for name in ENGINES]


class Killed(Exception):
    """Stands for whatever ends a process without warning."""


def trained(folder, *, module=None, killed_at=None, **settings):
    """Weights and metrics of a training; `killed_at`: a step whose batch never comes."""
    folder.mkdir(exist_ok=True)
    module = module or Toy(dropout=0.2)  # dropout: the random state has to be resumed too

    def batches(step):
        if step == killed_at:
            raise Killed
        return batch_at(step)

    metrics = train(module, batches, config(**settings), folder, "toy")
    return weights(module), metrics


def killed(folder, at, **settings):
    with pytest.raises(Killed):
        trained(folder, killed_at=at, **settings)


def assert_same(found, expected):
    assert_close(found[0], expected[0], 0)
    assert found[1] == expected[1]


@pytest.mark.parametrize("engine", SLOWLY)
@pytest.mark.parametrize("deaths", [(1,), (4,), (3, 7)])
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(engine, deaths, tmp_path):
    expected = trained(tmp_path / "whole", **ENGINES[engine])
    for step in deaths:
        killed(tmp_path / "cut", step, **ENGINES[engine])
    assert_same(trained(tmp_path / "cut", **ENGINES[engine]), expected)


@pytest.mark.parametrize("engine", SLOWLY)
def test_the_loss_scale_is_resumed_to_the_bit(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(LossScale, "START", 2.0**22)  # overflows at first
    monkeypatch.setattr(LossScale, "PATIENCE", 2)
    settings = {**ENGINES[engine], "precision": "fp16", "skipped_steps": 0, "steps": 16}
    expected = trained(tmp_path / "whole", **settings)
    assert 2 <= expected[1].skipped < 12
    for step in (4, 10):
        killed(tmp_path / "cut", step, **settings)
    assert_same(trained(tmp_path / "cut", **settings), expected)


def test_a_resumed_training_repeats_no_step_before_its_checkpoint(tmp_path):
    killed(tmp_path, 7)
    asked = []
    train(Toy(), lambda step: asked.append(step) or batch_at(step), config(), tmp_path, "toy")
    assert asked == [6, 7]


def test_a_resumed_training_leaves_one_line_per_step(tmp_path):
    killed(tmp_path, 7)
    trained(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))


@pytest.mark.parametrize("first, then", [("torch", "zero-0"), ("torch", "zero-2"), ("zero-1", "torch")])
def test_a_checkpoint_of_one_engine_resumes_under_another(first, then, tmp_path):
    expected = trained(tmp_path / "whole")[0]
    killed(tmp_path / "cut", 5, **ENGINES[first])
    assert_close(trained(tmp_path / "cut", **ENGINES[then])[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [("torch", "zero-3"), ("zero-3", "zero-1"), ("zero-2", "zero-3")])
def test_a_checkpoint_of_zero_3_is_like_any_other(first, then, tmp_path):
    expected = trained(tmp_path / "whole")[0]
    killed(tmp_path / "cut", 5, **ENGINES[first])
    assert_close(trained(tmp_path / "cut", **ENGINES[then])[0], expected)


def test_a_damaged_checkpoint_costs_steps_and_nothing_else(tmp_path):
    expected = trained(tmp_path / "whole")
    killed(tmp_path / "cut", 7)
    newest = tmp_path / "cut" / "checkpoints" / "step-0000006.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 4
    newest.write_bytes(data)
    assert_same(trained(tmp_path / "cut"), expected)


def test_checkpoints_are_gone_when_the_training_is_done(tmp_path):
    trained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


class Exploding(nn.Module):
    """At step `at` the loss, or only its gradient, is not finite."""

    def __init__(self, at, loss, gradient):
        super().__init__()
        self.at, self.loss, self.gradient, self.calls = at, loss, gradient, 0
        self.weight = nn.Parameter(torch.ones(3, 3))

    def forward(self, rows):
        self.calls += 1
        loss = self.weight.square().mean()
        if self.calls == self.at:
            loss = (
                loss + (self.weight - self.weight.detach()).sum().abs().pow(0.5) if self.gradient else loss * self.loss
            )
        return {"loss": loss}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("loss, gradient", [(math.nan, False), (math.inf, False), (0, True)])
def test_what_is_not_finite_stops_the_training_and_the_checkpoint_stays(engine, loss, gradient, tmp_path):
    settings = config(**ENGINES[engine], skipped_steps=0)
    with pytest.raises(DivergedFailure, match=r"toy: the (loss|gradient) of step 5 is (nan|inf)") as stopped:
        train(Exploding(5, loss, gradient), batch_at, settings, tmp_path, "toy")
    assert stopped.value.exit_code == 7
    assert "\n" not in str(stopped.value)
    state, progress = checkpoints.newest(tmp_path / "checkpoints")
    assert progress.step == 3
    assert state["weight/weight"].isfinite().all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bad", [(0,), (3, 4, 7)], ids=str)
@pytest.mark.parametrize("micro", [None, 1])
def test_a_step_that_is_not_finite_is_left_out_as_if_it_had_not_been(engine, bad, micro, tmp_path):
    settings = config(**ENGINES[engine], micro_batch_size=micro)
    module = Toy()
    metrics = train(module, batch_with(*bad), settings, tmp_path, "toy")
    assert_close(weights(module), reference(settings, settings.steps, bad))
    assert (metrics.skipped, metrics.steps, metrics.tokens) == (len(bad), 8, (8 - len(bad)) * 4 * 6)
    assert len(metrics.curve) == 8 - len(bad)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] - 1 for line in lines if "loss" not in line] == list(bad)
    assert lines[-1]["skipped"] == len(bad)


@pytest.mark.parametrize("engine", SLOWLY)
def test_resumed_after_a_step_that_was_left_out_it_equals_uninterrupted(engine, tmp_path):
    def run(folder, killed_at=None):
        folder.mkdir(exist_ok=True)
        module, bad = Toy(dropout=0.2), batch_with(1, 2, 5)

        def batches(step):
            if step == killed_at:
                raise Killed
            return bad(step)

        metrics = train(module, batches, config(**ENGINES[engine], skipped_steps=2), folder, "toy")
        return weights(module), metrics

    expected = run(tmp_path / "whole")
    for step in (3, 7):
        with pytest.raises(Killed):
            run(tmp_path / "cut", step)
    assert_same(run(tmp_path / "cut"), expected)


@pytest.mark.parametrize("bad, stopped_at", [((1, 2, 4, 5), None), ((1, 2, 3), 4), ((5, 6, 7), 8)])
def test_steps_left_out_count_in_a_row_over_a_restart_too(bad, stopped_at, tmp_path):
    settings = config(skipped_steps=2, checkpoint_every=1)
    for last in (2, 3, 6, None):  # killed before these steps

        def batches(step, last=last):
            if step == last:
                raise Killed
            return batch_with(*bad)(step)

        try:
            metrics = train(Toy(), batches, settings, tmp_path, "toy")
        except Killed:
            continue
        except DivergedFailure as failure:
            assert f"the loss of step {stopped_at} is inf, and 2 before it were left out" in str(failure)
            return
    assert stopped_at is None
    assert metrics.skipped == len(bad)


def test_what_diverged_names_its_rows(tmp_path):
    class Batches:
        def __call__(self, step):
            return batch_with(2)(step)

        def describe(self, step):
            return f"rows of step {step}"

    with pytest.raises(DivergedFailure, match="the loss of step 3 is inf on rows of step 2: lower --learning-rate"):
        train(Toy(), Batches(), config(skipped_steps=0), tmp_path, "toy")


def test_a_training_without_one_finite_loss_is_no_result(tmp_path):
    with pytest.raises(DivergedFailure, match="the loss of step 2 is inf"):
        train(Toy(), batch_with(0, 1), config(steps=2, skipped_steps=5), tmp_path, "toy")


def test_a_loss_that_is_not_finite_without_any_trace_in_the_gradient_stops_at_once(tmp_path):
    class Detached(Toy):
        def forward(self, rows):
            parts = super().forward(rows)
            return {**parts, "loss": torch.where(parts["loss"].isfinite(), parts["loss"], math.nan)}

    with pytest.raises(DivergedFailure, match="the loss of step 3 is nan"):
        train(Detached(), batch_with(2), config(), tmp_path, "toy")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("engine", ["torch", "zero-1"])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint_to_resume_from(number, engine, tmp_path):
    expected = trained(tmp_path / "whole", **ENGINES[engine])
    before = signal.getsignal(number)

    def batches(step):
        if step == 4:
            os.kill(os.getpid(), number)
        return batch_at(step)

    (tmp_path / "cut").mkdir()
    with pytest.raises(InterruptedFailure, match="toy stopped after step 5: run the same command") as stopped:
        train(Toy(dropout=0.2), batches, config(**ENGINES[engine]), tmp_path / "cut", "toy")
    assert stopped.value.exit_code == 75
    assert signal.getsignal(number) == before
    assert checkpoints.newest(tmp_path / "cut" / "checkpoints")[1].step == 5
    assert_same(trained(tmp_path / "cut", **ENGINES[engine]), expected)


def test_the_time_given_ends_a_training_before_it_is_over(tmp_path, monkeypatch):
    expected = trained(tmp_path / "whole")
    monkeypatch.setattr(launch, "STARTED", time.monotonic() - 60)  # the command began a minute ago
    (tmp_path / "cut").mkdir()

    def batches(step):
        time.sleep(0.3)
        return batch_at(step)

    with pytest.raises(InterruptedFailure, match=r"toy stopped after step [1-6]: run the same command") as stopped:
        train(Toy(dropout=0.2), batches, config(max_minutes=1 + 2 / 60), tmp_path / "cut", "toy")
    assert stopped.value.exit_code == 75
    assert time.monotonic() - launch.STARTED < 62
    assert_same(trained(tmp_path / "cut"), expected)


def test_a_second_signal_is_obeyed_at_once(tmp_path):
    def twice(step):  # not os.kill: another thread may take that, and two that came at once are one
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(Toy(), twice, config(), tmp_path, "toy")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("micro", [3, 8])
def test_a_batch_that_does_not_divide_is_one_line(micro, tmp_path):
    settings = config(micro_batch_size=micro, batch_size=4 if micro == 3 else 12)
    with pytest.raises(UsageFailure, match=r"a batch of .* rows does not divide .* --micro-batch-size") as refused:
        train(Toy(), batch_at, settings, tmp_path, "toy")
    assert "\n" not in str(refused.value)


def test_a_batch_that_does_not_divide_among_processes_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageFailure, match="a batch of 4 rows does not divide into 3 processes"):
        train(Toy(), batch_at, config(), tmp_path, "toy")


def test_metrics_and_log_say_what_happened(tmp_path):
    module = Toy()
    with torch.no_grad():
        first = module(batch_at(0))["loss"].item()
    _, metrics = trained(tmp_path, module=module, steps=40, log_every=10, batch_size=4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert [line["tokens"] for line in lines] == [240, 480, 720, 960]
    assert lines[1]["learning_rate"] == pytest.approx(learning_rate(19, config(steps=40)))
    assert all(line["size"] > 0 and line["gradient_norm"] > 0 for line in lines)
    assert metrics.first_loss == pytest.approx(first, abs=1e-6)
    assert metrics.first_loss == pytest.approx(math.log(VOCAB), rel=0.1)
    assert (metrics.steps, metrics.tokens, metrics.engine, metrics.precision) == (40, 960, "torch", "fp32")
    assert len(metrics.curve) == 40
    assert metrics.final_loss == pytest.approx(sum(metrics.curve[-2:]) / 2)
    assert lines[-1]["loss"] == pytest.approx(metrics.curve[-1])


def test_a_resumed_training_has_each_sample_once_and_the_weights_of_one_without(tmp_path):
    settings = {"sample_every": 2, "sample_prompt": "Ä\u2028\n"}
    expected = trained(tmp_path / "whole")[0]
    module = Toy(dropout=0.2)

    def write(prompt):
        return f"{prompt}{module.embed.weight.sum():.9f}"

    def batches(step):
        if step == 7 and not asked:
            raise Killed
        return batch_at(step)

    (tmp_path / "cut").mkdir()
    asked = []
    with pytest.raises(Killed):
        train(module, batches, config(**settings), tmp_path / "cut", "toy", write)
    with (tmp_path / "cut" / "samples.jsonl").open("a") as file:
        file.write('{"step": 6, "pro')  # cut short
    module, asked = Toy(dropout=0.2), [True]
    train(module, batches, config(**settings), tmp_path / "cut", "toy", write)
    assert_close(weights(module), expected, 0)
    lines = (tmp_path / "cut" / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8]
    assert json.loads(lines[-1])["text"] == write("Ä\u2028\n")


# In processes of their own


@pytest.mark.parametrize(
    "engines", [("zero-0", "zero-1"), pytest.param(("zero-2", "zero-3"), marks=pytest.mark.slow)], ids=str
)
def test_two_processes_give_the_weights_of_one(engines, tmp_path):
    expected = trained(tmp_path / "one", module=Toy())
    processes = in_two(tmp_path / "two", *(config(**ENGINES[engine]) for engine in engines))
    for rank, process in enumerate(processes):
        code, errors = ended(process, tmp_path / "two", rank)
        assert code == 0, errors
    for number in range(len(engines)):
        for rank in (0, 1):
            assert_close(weights_of(tmp_path / "two", rank, number), expected[0], 1e-5)
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_give_the_weights_of_one_with_muon(world, tmp_path):
    """The larger matrix lies in two pieces, or in four. Steps 2 and 5 are left out."""
    expected = Toy()
    train(expected, batch_with(2, 5), config(optimizer="muon"), tmp_path, "toy")
    every = [config(**ENGINES[engine], optimizer="muon") for engine in ("zero-0", "zero-1", "zero-2")]
    for rank, process in enumerate(together(world, tmp_path / "more", *every, environment={"BAD": "2 5"})):
        code, errors = ended(process, tmp_path / "more", rank)
        assert code == 0, errors
    rounding = 1e-4 if HALF else 1e-5
    for number in range(len(every)):
        for rank in range(world):
            assert_close(weights_of(tmp_path / "more", rank, number), weights(expected), rounding)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_give_the_weights_of_one_in_half_precision(precision, optimizer, tmp_path):
    half = {"precision": precision, "optimizer": optimizer}
    expected, _ = trained(tmp_path / "one", module=Toy(), **half)
    every = [config(**ENGINES[engine], **half) for engine in ("zero-0", "zero-1", "zero-2")]
    for rank, process in enumerate(in_two(tmp_path / "two", *every)):
        code, errors = ended(process, tmp_path / "two", rank)
        assert code == 0, errors
    rounding = 2e-3 if HALF and optimizer == "muon" else 1e-3  # a tenth of the rate, or a fifth
    for number in range(len(every)):
        assert_close(weights_of(tmp_path / "two", 0, number), expected, rounding)
        assert_close(weights_of(tmp_path / "two", 1, number), weights_of(tmp_path / "two", 0, number), 0)


@pytest.mark.parametrize(
    "engines", [("zero-0", "zero-1"), pytest.param(("zero-2", "zero-3"), marks=pytest.mark.slow)], ids=str
)
def test_what_is_not_finite_on_one_process_is_left_out_on_all(engines, tmp_path):
    settings = [config(**ENGINES[engine]) for engine in engines]
    for rank, process in enumerate(in_two(tmp_path, *settings, environment={"BAD": "2 5"})):
        code, errors = ended(process, tmp_path, rank)
        assert code == 0, errors
    for number in range(len(engines)):
        for rank in (0, 1):
            assert_close(weights_of(tmp_path, rank, number), reference(config(), 8, (2, 5)), 1e-5)


@pytest.mark.parametrize(
    ("engine", "optimizer"),
    [
        ("zero-0", "adamw"),
        ("zero-1", "muon"),
        *(pytest.param("zero-2", each, marks=pytest.mark.slow) for each in ("adamw", "muon")),
    ],
)
def test_one_two_and_again_one_process_continue_each_others_training(engine, optimizer, tmp_path):
    """To 1e-5 of one process throughout: two sum the gradient in another order."""
    settings = config(**ENGINES[engine], optimizer=optimizer)
    (alone,) = [started(tmp_path, settings, environment={"DEATH": "4"})]
    assert ended(alone, tmp_path)[0] == 9
    assert checkpoints.newest(tmp_path / "checkpoints")[1].step == 3
    assert [ended(process, tmp_path)[0] for process in in_two(tmp_path, settings, environment={"DEATH": "7"})] == [9, 9]
    progress = checkpoints.newest(tmp_path / "checkpoints")[1]
    assert (progress.step, progress.tokens, len(progress.losses)) == (6, 6 * 4 * 6, 6)
    code, errors = ended(started(tmp_path, settings), tmp_path)
    assert code == 0, errors
    expected, _ = trained(tmp_path / "whole", module=Toy(), optimizer=optimizer)
    assert_close(weights_of(tmp_path), expected if optimizer == "muon" else reference(settings, 8), 1e-5)


def test_a_checkpoint_of_another_optimizer_is_refused_in_one_line(tmp_path):
    with pytest.raises(Killed):
        trained(tmp_path, killed_at=5, optimizer="adamw")
    with pytest.raises(UsageFailure, match=r"checkpoints holds a training by adamw, and here it is muon .*: remove"):
        trained(tmp_path, optimizer="muon")


def test_killed_while_a_checkpoint_is_written_beside_the_steps_it_resumes_from_the_one_before(tmp_path):
    settings = config(steps=30, checkpoint_every=4)
    expected = trained(tmp_path / "whole", steps=30, checkpoint_every=4)[0]
    slowly = {"DROPOUT": "0.2", "PAUSE": "0.03", "SLOW_DISK": "0.1"}
    process = started(tmp_path / "cut", settings, environment=slowly)
    saved = tmp_path / "cut" / "checkpoints"
    while not (saved / "step-0000008.json").exists():
        assert process.is_alive(), (tmp_path / "cut/errors-0").read_text()
        time.sleep(0.001)
    while not list(saved.glob(".*.tmp")):
        time.sleep(0.001)
    process.kill()
    assert ended(process, tmp_path / "cut")[0] == -signal.SIGKILL
    assert int((tmp_path / "cut" / "step-0").read_text()) > checkpoints.newest(saved)[1].step
    code, errors = ended(started(tmp_path / "cut", settings, environment={"DROPOUT": "0.2"}), tmp_path / "cut")
    assert code == 0, errors
    assert_close(weights_of(tmp_path / "cut"), expected, 0)


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path):
    environment = {"PAUSE": "0.01", "SLOW_DISK": "0.4"}
    process = started(tmp_path, config(steps=400, checkpoint_every=30), environment=environment)
    wait_for_step(tmp_path, 31, process)  # soon, as a busy machine may take long for a step
    assert [path.suffix for path in (tmp_path / "checkpoints").iterdir()] == [".tmp"]  # of the tensors, still
    process.terminate()
    code, errors = ended(process, tmp_path)
    assert code == 75, errors
    assert f"toy stopped after step {checkpoints.newest(tmp_path / 'checkpoints')[1].step}:" in errors


def test_a_full_disk_ends_the_training_in_one_line(tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(
        ResourceFailure, match=r"no room to write .*step-0000003.safetensors: free some space"
    ) as failed:
        trained(tmp_path)
    assert "\n" not in str(failed.value)


def test_two_processes_stop_together_when_one_gets_the_signal(tmp_path):
    processes = in_two(tmp_path, config(**ENGINES["zero-1"], steps=200), environment={"PAUSE": "0.02"})
    wait_for_step(tmp_path, 5, processes[0])
    processes[1].terminate()
    for rank, process in enumerate(processes):
        code, errors = ended(process, tmp_path, rank)
        assert code == 75, errors
    assert checkpoints.newest(tmp_path / "checkpoints")[1].step >= 5


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_killed_at_any_moment_and_started_again_gives_the_same_weights(engine, tmp_path):
    settings = config(**ENGINES[engine], steps=30, checkpoint_every=1)
    expected = trained(tmp_path / "whole", **ENGINES[engine], steps=30, checkpoint_every=1)[0]
    draw = random.Random(engine)
    for step in sorted(draw.sample(range(1, 29), 2)):
        process = started(tmp_path / "cut", settings, environment={"DROPOUT": "0.2", "PAUSE": "0.02"})
        (tmp_path / "cut" / "step-0").unlink(missing_ok=True)
        wait_for_step(tmp_path / "cut", step, process)
        time.sleep(draw.random() * 0.03)
        process.kill()
        assert ended(process, tmp_path / "cut")[0] == -signal.SIGKILL
    code, errors = ended(started(tmp_path / "cut", settings, environment={"DROPOUT": "0.2"}), tmp_path / "cut")
    assert code == 0, errors
    assert_close(weights_of(tmp_path / "cut"), expected, 0)
