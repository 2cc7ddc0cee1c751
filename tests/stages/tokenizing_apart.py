"""Tokenizing in processes of their own, which import no more than it takes."""

import os
import signal
from pathlib import Path

from schemas.tokenize_text import TokenizeConfig
from stages import tokenize_text


def tokenize_share(config: TokenizeConfig, run_dir: Path) -> None:
    tokenize_text.run(config, run_dir)


def tokenize_and_die(config: TokenizeConfig, run_dir: Path, renames: int) -> None:
    """Tokenize, but die by SIGKILL after so many files have got their names."""
    original = os.replace
    left = renames

    def replace(source: Path, target: Path) -> None:
        nonlocal left
        original(source, target)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    tokenize_text.run(config, run_dir)
