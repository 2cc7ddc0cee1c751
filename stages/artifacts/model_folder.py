"""Weights on disk: safetensors and nothing else, and the folder of a decoder as Hugging Face lays it out.

- one metadata key (`cpipe`): safetensors writes two or more in random order, and equal weights get unequal bytes
- tensors are stored in fp32, contiguous, in the order of their names
"""

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from schemas.decoder import DecoderConfig
from schemas.failures import IntegrityFailure
from schemas.files import FileRef, new_file, write_bytes
from schemas.manifest import Manifest

WEIGHTS = "model.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], run_dir: Path, description: str) -> FileRef:
    """Write tensors durably, floating ones as fp32; `description` goes into the file's metadata."""
    plain = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous().clone()
        for name, tensor in sorted(tensors.items())
    }
    # Readers of Hugging Face models insist on the key `format`, so that one key is all the metadata there is.
    metadata = {"format": "pt"} if path.name == WEIGHTS else {"cpipe": description}
    with new_file(path) as file:
        file.write(safetensors.torch.save(plain, metadata))
    return file.ref(path, run_dir)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises IntegrityFailure when it is not one."""
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise IntegrityFailure(f"{path} is not a safetensors file ({error}): rerun the stage that wrote it") from error


def write_model(
    folder: Path,
    run_dir: Path,
    config: DecoderConfig,
    weights: Mapping[str, Tensor],
    end_of_text: int,
    tokenizer_json: bytes,
) -> list[FileRef]:
    """Write `config.json`, `model.safetensors` and the tokenizer: a folder `transformers` loads as it is."""
    shape = json.dumps(config.to_huggingface(end_of_text), indent=2, sort_keys=True)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    return [
        write_bytes(folder / "config.json", shape.encode(), run_dir),
        write_tensors(folder / WEIGHTS, weights, run_dir, "decoder"),
        write_bytes(folder / "tokenizer.json", tokenizer_json, run_dir),
        write_bytes(folder / "tokenizer_config.json", json.dumps(names, indent=2).encode(), run_dir),
    ]


def read_model(run_dir: Path, manifest: Manifest, folder: str | None = None) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """Read what `write_model` wrote into `folder` (the manifest's own by default), after checking its digests."""
    for ref in manifest.outputs:
        ref.check(run_dir)
    path = run_dir / (folder or manifest.folder)
    config = DecoderConfig.from_huggingface(json.loads((path / "config.json").read_text()))
    return config, read_tensors(path / WEIGHTS)


def checksum(weights: Mapping[str, Tensor]) -> float:
    """A number that moves when any weight does: to show that what is frozen stayed so."""
    return sum(float(tensor.double().abs().sum()) for tensor in weights.values() if tensor.is_floating_point())


def device() -> torch.device:
    """Where models run: the first accelerator, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
