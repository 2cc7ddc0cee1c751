"""Training: cpipe's loop beside a minimal torch loop, transformers and litgpt, the same batches, in turn.

    python benchmarks/bench_train.py [--rounds 4] [--steps 1] [--rows fp32]
    torchrun --nproc-per-node 2 benchmarks/bench_train.py     # the minimal loop becomes DDP; with ZeRO 0, 1, 2
    pip install litgpt                                        # or its rows say that it is not there

- the model: 6 layers of width 256, SwiGLU 688, 8,192 tokens, untied (8.9 M parameters). The minimal loop trains cpipe's
  own module with fused AdamW and clipping, and nothing else
- cpipe's rows run `stages.engine.loop.train` as it is: each in a thread of its own, which goes on when it is its turn,
  since the loop asks for the batch of every step. Start-up, compiling included, is over before the first turn
- a turn is --steps steps; rows take turns, backwards every other round; a ratio is the median over the rounds of
  (row / minimal fp32 loop in the same round), by wall time and by CPU time of the process
- rows of the same weights and precision must end with the minimal loop's weights, up to rounding, or the script fails
- with CUDA it also prints the share of the peak (MFU) that decoders of 120 M and 1 B reach in bf16, compiled
"""

import argparse
import fnmatch
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from schemas.decoder import DecoderConfig
from schemas.training import TrainingConfig
from stages.engine.loop import train
from stages.engine.processes import Place, bf16_is_fast, find_place, join_processes
from stages.engine.schedule import learning_rate
from stages.nn.decoder import Decoder, NextTokenLoss
from stages.nn.flops import BACKWARD_AND_FORWARD, forward_flops

SHAPE = DecoderConfig(vocab_size=8192, max_position_embeddings=512, tie_word_embeddings=False)
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, from the makers' data sheets
LARGE = {
    "120 M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1 B": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 18, "num_attention_heads": 16},
}


class Stopped(Exception):
    """Ends a loop that has had its last turn."""


class Row:
    """A training in a thread that makes steps only when it is told to."""

    model: nn.Module  # what it trains

    def __init__(self, name: str, start: "Start", same: bool) -> None:
        """`start(row)` trains until `batch_at` raises; `same`: its weights have to be the minimal loop's."""
        self.name = name
        self.same = same
        self.spent: list[tuple[float, float]] = []
        self.failure: BaseException | None = None
        self._start = start
        self._allowed = 0
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._start(self)
        except Stopped:
            pass
        except BaseException as failure:  # is raised where the turn was given
            self.failure = failure
        self._done.release()

    def batch_at(self, step: int) -> Tensor:
        """The batch of a step, when it is its turn."""
        if not self._allowed:
            self._done.release()
            self._go.acquire()
        if self._allowed < 0:
            raise Stopped
        self._allowed -= 1
        return batch_at(step)

    def begin(self) -> None:
        """Wait until the loop asks for its first batch."""
        self._wait()

    def turn(self, steps: int) -> tuple[float, float]:
        """Let it make so many steps; wall and CPU seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        self._allowed = steps
        self._go.release()
        self._wait()
        return time.perf_counter() - wall, time.process_time() - cpu

    def end(self) -> None:
        """Stop it."""
        self._allowed = -1
        self._go.release()
        self._thread.join()

    def _wait(self) -> None:
        self._done.acquire()
        if self.failure:
            raise self.failure


Start = Callable[[Row], None]
OPTIONS = argparse.Namespace()


def batch_at(step: int) -> Tensor:
    """Random tokens, the same for every row."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(SHAPE.vocab_size, (OPTIONS.batch, OPTIONS.length + 1), generator=generator)


def settings(**changes: Any) -> TrainingConfig:
    known = {"steps": 10_000, "checkpoint_every": 10_000, "precision": "fp32", "engine": "torch", "optimizer": "adamw"}
    known |= {"learning_rate": 1e-3, "compile": "off"}
    return TrainingConfig(**{**known, "batch_size": OPTIONS.batch, "sequence_length": OPTIONS.length, **changes})


def cpipe(**changes: Any) -> Start:
    """cpipe's loop over its decoder."""

    def start(row: Row) -> None:
        row.model = _decoder()
        with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
            train(NextTokenLoss(row.model), row.batch_at, settings(**changes), Path(folder), row.name)

    return start


def minimal(make: Callable[[], "Loss"], precision: str, *, compiled: bool = False) -> Start:
    """The loop one would write by hand; `make`: a module that gives the loss of rows."""

    def start(row: Row) -> None:
        config, place = settings(), find_place()
        loss_of = make().to(place.device)
        row.model, module = loss_of.model, loss_of
        if compiled:
            module.compile()
        if place.world > 1:
            join_processes(place)
            module = nn.parallel.DistributedDataParallel(module)
        optimizer = torch.optim.AdamW(_groups(module), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        step = 0
        while True:
            rows = row.batch_at(step)[place.rank :: place.world].to(place.device)
            with torch.autocast(place.device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = module(rows)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), config.gradient_clipping)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

    return start


def _groups(module: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    return [{"params": matrices}, {"params": [p for p in module.parameters() if p.dim() < 2], "weight_decay": 0.0}]


class Loss(nn.Module):
    """Mean cross-entropy of the next token by any model of logits."""

    def __init__(self, model: nn.Module, logits: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.logits = logits

    def forward(self, rows: Tensor) -> Tensor:
        out = self.logits(self.model(rows[:, :-1])).float()
        return nn.functional.cross_entropy(out.flatten(0, 1), rows[:, 1:].flatten())


def _decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(SHAPE)


def _own() -> Loss:
    return Loss(_decoder(), lambda out: out)


def _transformers() -> Loss:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SHAPE.to_huggingface(0), use_cache=False))
    model.load_state_dict(_decoder().weights())
    return Loss(model.train(), lambda out: out.logits)


def _litgpt() -> Loss:
    from litgpt import GPT, Config

    shape = {"n_layer": 6, "n_head": 4, "n_embd": 256, "intermediate_size": 688, "block_size": OPTIONS.length}
    llama = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "rotary_percentage": 1.0, "bias": False}
    return Loss(GPT(Config(padded_vocab_size=8192, parallel_residual=False, **shape, **llama)), lambda out: out)


def all_rows(world: int) -> dict[str, tuple[Start, bool]]:
    """By name: how to start it, and whether its weights have to end as the first row's."""
    by_hand = "minimal loop" if world == 1 else "minimal loop, DDP"
    rows = {f"{by_hand}, fp32": (minimal(_own, "fp32"), True)}
    if world == 1:
        rows["cpipe, torch, fp32"] = (cpipe(), True)
    for stage in (0, 1, 2):
        rows[f"cpipe, DeepSpeed ZeRO {stage}, fp32"] = (cpipe(engine="deepspeed", zero_stage=stage), True)
    rows["transformers, fp32"] = (minimal(_transformers, "fp32"), True)
    rows["litgpt, fp32"] = (minimal(_litgpt, "fp32"), False)
    rows[f"{by_hand}, bf16"] = (minimal(_own, "bf16"), False)
    if world > 1:
        return rows
    rows["cpipe, torch, bf16"] = (cpipe(precision="bf16"), False)
    rows["transformers, bf16"] = (minimal(_transformers, "bf16"), False)
    rows["litgpt, bf16"] = (minimal(_litgpt, "bf16"), False)
    rows["minimal loop, fp32 compiled"] = (minimal(_own, "fp32", compiled=True), False)
    rows["cpipe, torch, fp32 compiled"] = (cpipe(compile="on"), False)
    for name, make in (("minimal loop", _own), ("transformers", _transformers), ("litgpt", _litgpt)):
        rows[f"{name}, bf16 compiled"] = (minimal(make, "bf16", compiled=True), False)
    for engine in ("torch", "deepspeed"):  # with the second, what `auto` is for a long training with bf16 instructions
        rows[f"cpipe, {engine}, bf16 compiled"] = (cpipe(engine=engine, precision="bf16", compile="on"), False)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1, help="Steps of a turn.")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", default="*", help="Pattern of names; the first row is always there.")
    parser.parse_args(namespace=OPTIONS)
    torch.set_num_threads(OPTIONS.threads)
    warnings.filterwarnings("ignore")
    logger.remove()
    place = find_place()
    rows = _started(all_rows(place.world), place.rank)
    for number in range(OPTIONS.rounds + 1):
        for row in rows[:: 1 if number % 2 else -1]:
            spent = row.turn(OPTIONS.steps)
            if number:  # the first round warms up
                row.spent.append(spent)
    if place.rank == 0:
        _print(rows, place)
    for row in rows:
        row.end()
    if place.device.type == "cuda" and place.world == 1:
        _print_shares_of_peak(place.device)
    os._exit(0)  # DeepSpeed's and gloo's threads would have to be waited for


def _started(rows: dict[str, Any], rank: int) -> list[Row]:
    started = []
    for number, (name, (start, same)) in enumerate(rows.items()):
        if number and not fnmatch.fnmatch(name, f"*{OPTIONS.rows}*"):
            continue
        row = Row(name, start, same)
        try:
            row.begin()
        except ImportError as error:
            if rank == 0:
                print(f"{name}: skipped, {error}")
            continue
        started.append(row)
    return started


def _print(rows: list[Row], place: Place) -> None:
    first, tokens = rows[0], OPTIONS.steps * OPTIONS.batch * OPTIONS.length
    device = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "cpu"
    about = f"{place.world} processes of {OPTIONS.threads} threads, {device}, torch {torch.__version__}"
    print(f"\n{about}, {OPTIONS.batch} rows of {OPTIONS.length} tokens a step")
    if not bf16_is_fast(place.device):
        print("bf16 is emulated here (neither avx512_bf16 nor amx): its rows say nothing of machines that have it")
    print("\n| row | tokens/s, best | x first row, wall | by CPU |\n|---|--:|--:|--:|")
    for row in rows:
        pairs = list(zip(first.spent, row.spent, strict=True))
        wall, cpu = (statistics.median(base[kind] / own[kind] for base, own in pairs) for kind in (0, 1))
        print(f"| {row.name} | {tokens / min(row.spent)[0]:,.0f} | {wall:.3f} | {cpu:.3f} |")
    expected = first.model.state_dict()
    for row in rows:
        if row.same:
            for name, tensor in row.model.state_dict().items():
                torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=0, msg=f"{row.name}: {name}")
    print(f"\nsame weights as the first row's: {', '.join(row.name for row in rows[1:] if row.same)}")


def _print_shares_of_peak(device: torch.device) -> None:
    """Share of the device's bf16 peak that cpipe's loop reaches with larger decoders, compiled."""
    name = torch.cuda.get_device_name(device)
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    if peak is None:
        print(f"no peak is known for {name}: no MFU")
        return
    print("\n| decoder, bf16 compiled | tokens/s | MFU |\n|---|--:|--:|")
    OPTIONS.batch, OPTIONS.length = 16, 2048
    for size, widths in LARGE.items():
        heads = widths["num_attention_heads"]
        shape = SHAPE.model_copy(update={**widths, "num_key_value_heads": heads, "vocab_size": 32_000})

        def start(row: Row, shape: DecoderConfig = shape) -> None:
            row.model = Decoder(shape)
            config = settings(precision="bf16", compile="on", micro_batch_size=8)
            with tempfile.TemporaryDirectory() as folder:
                train(NextTokenLoss(row.model), row.batch_at, config, Path(folder), row.name)

        row = Row(size, start, same=False)
        row.begin()
        row.turn(5)
        rate = 10 * OPTIONS.batch * OPTIONS.length / row.turn(10)[0]
        row.end()
        with torch.device("meta"):
            flops = BACKWARD_AND_FORWARD * forward_flops(Decoder(shape), OPTIONS.length)
        print(f"| {size} | {rate:,.0f} | {100 * rate * flops / peak:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
