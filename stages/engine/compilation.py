"""Whether a module is compiled before it is trained.

- compiling takes tens of seconds and changes the last bits: `auto` does it on CUDA in long runs only; on CPU somebody
  has to say so. benchmarks/bench_train.py prints what it gains
"""

import os
import shutil

from schemas.failures import UsageFailure
from schemas.training import TrainingConfig
from stages.engine.processes import Place

WORTH_COMPILING = 1000  # steps


def choose_compile(config: TrainingConfig, place: Place) -> bool:
    """What `auto` stands for on this device. Raises UsageFailure where compiling is asked for and cannot be."""
    if config.compile == "auto":
        return place.device.type == "cuda" and config.steps >= WORTH_COMPILING and config.zero_stage < 3
    if config.compile == "off":
        return False
    if config.zero_stage == 3:
        raise UsageFailure("--compile on does not go with ZeRO 3, which takes the weights apart while the model runs")
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise UsageFailure(f"--compile on needs a C++ compiler, and there is no {compiler}: install it, or set CXX")
    return True
