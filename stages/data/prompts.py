"""Prompts from a file: a line each, or JSON lines.

- a `.jsonl` line is a string, or an object whose "prompt" is one: so a prompt can hold line breaks, and be empty
"""

import json
from pathlib import Path

from schemas.failures import InputFailure


def read_prompts(path: Path) -> list[str]:
    """The prompts in their order; blank lines are none. Raises InputFailure."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputFailure(f"cannot read prompts from {path}: {reason}") from error
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_prompt(line, f"{path}, line {number}") for number, line in numbered]
    else:
        prompts = [line for _, line in numbered]
    if not prompts:
        raise InputFailure(f"no prompts in {path}: expected one on each line")
    return prompts


def _prompt(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputFailure(f"{where} is not JSON: {error}") from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise InputFailure(f'{where} is neither a string nor an object with a string "prompt"')
    return prompt
