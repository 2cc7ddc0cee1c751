"""Whether a module is compiled before it is trained, and where what the compiler makes lies.

- compiling takes half a minute and changes the last bits: `auto` does it in long runs only, for modules that say that
  it pays for them. benchmarks/bench_train.py prints what it gains
- a compiler that is there need not work (headers may be missing): `auto` first compiles something small, and trains
  without one where that fails
- torch's cache is shared by all processes of a user, and one that is killed can leave half a file in it, on which every
  later start fails: each training has a cache of its own, that begins empty and ends with it
- the compiled gradient of an embedding is summed by all threads at once, in whatever order they come: torch's
  deterministic mode has one thread do it, and a run repeats itself to the bit. On CUDA attention and products have
  such orders too, compiled or not, and the mode is left as it is
- nothing is loaded from the cache of an earlier start: it holds machine code and pickles, which a run that comes from
  elsewhere could bring along
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import nn

from schemas.failures import UsageFailure
from schemas.training import TrainingConfig
from stages.engine.processes import Place
from stages.engine.schedule import FLOPS

LONG_STEPS = 1000  # of a training on CUDA that is worth compiling
LONG_FLOPS = 5e13  # for each thread of one on processors, to which they are five to ten minutes of plain torch


def choose_compile(config: TrainingConfig, place: Place, module: nn.Module) -> bool:
    """What `auto` stands for on this device, for a module that may say `worth_compiling`.

    Raises UsageFailure where compiling is asked for and cannot be.
    """
    if config.compile == "auto":
        pays = getattr(module, "worth_compiling", False) and config.zero_stage < 3
        return pays and _is_long(config, place, module) and compiler_works(place.device)
    if config.compile == "off":
        return False
    if config.zero_stage == 3:
        raise UsageFailure("--compile on does not go with ZeRO 3, which takes the weights apart while the model runs")
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise UsageFailure(f"--compile on needs a C++ compiler, and there is no {compiler}: install it, or set CXX")
    return True


def _is_long(config: TrainingConfig, place: Place, module: nn.Module) -> bool:
    if place.device.type == "cuda":
        return config.steps >= LONG_STEPS
    flops = FLOPS * sum(p.numel() for p in module.parameters()) * config.tokens / place.world
    return flops >= LONG_FLOPS * torch.get_num_threads()


@cache
def compiler_works(device: torch.device) -> bool:
    """Whether something small can be compiled here; what hinders it is logged."""
    with tempfile.TemporaryDirectory(prefix="cpipe-") as folder, compiler_cache(Path(folder) / "cache", needed=True):
        try:
            torch.compile(lambda x: x.sin())(torch.ones(8, device=device))
        except Exception as error:  # whatever a compiler, its headers or torch's own code generation meet
            reason = str(error).partition("\n")[0]
            logger.warning("training is not compiled, which would be faster: {}", reason)
            return False
    return True


@contextmanager
def repeatable(device: torch.device, *, needed: bool) -> Iterator[None]:
    """Have compiled sums on processors be the same in every run, in the block."""
    if not needed or device.type != "cpu":
        yield
        return
    memory: Any = torch.utils.deterministic  # a module with a property, of which its type knows nothing
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # to find bugs by, and slow
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


@contextmanager
def compiler_cache(folder: Path, *, needed: bool) -> Iterator[None]:
    """Have what is compiled in the block lie in `folder`, which is emptied first and removed at the end."""
    if not needed:
        yield
        return
    from torch._inductor import utils  # slow to import, and for nothing where nothing is compiled

    shutil.rmtree(folder, ignore_errors=True)  # of a training that was killed
    folder.mkdir(parents=True)
    fresh_cache = getattr(utils, "fresh_cache", None) or getattr(utils, "fresh_inductor_cache")  # noqa: B009  # before torch 2.8
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        cache = ExitStack()
        stack.callback(cache.close)  # not told of a failure, for which it would keep the files and say so
        cache.enter_context(fresh_cache(dir=str(folder.resolve()), delete=False))
        yield
