"""Stages on the pretended accelerator: `on_an_accelerator.py RUN` with `[[stage, settings], …]` as JSON on stdin.

Prints a JSON list of the texts that stages wrote.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

sys.path.insert(0, str(Path(__file__).parents[1]))

import pretended_device
import torch
from pretended_device import DEVICE

from stages.artifacts import model_folder
from stages.engine import processes


def main() -> None:
    torch.set_num_threads(1)
    # Before any stage is imported: they take these functions by name.
    processes.find_place = lambda: processes.Place(0, 0, 1, DEVICE)
    model_folder.device = lambda: DEVICE
    texts = []
    for name, settings in json.load(sys.stdin):
        stage = import_module(f"stages.{name}")
        start = getattr(stage, "run", None) or stage.stream
        before = len(pretended_device.COMPUTED)
        found = start(get_type_hints(start)["config"].model_validate_json(json.dumps(settings)), Path(sys.argv[1]))
        if start is not getattr(stage, "run", None):
            texts.append("".join(map(str, found)))
        assert len(pretended_device.COMPUTED) > before + 100, f"{name} does not use the device"
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
