"""Weights on disk: safetensors and nothing else, and the folder of a decoder as Hugging Face lays it out.

- one metadata key: safetensors writes two or more in random order, and equal weights get unequal bytes
- written tensor by tensor, the bytes are those of `safetensors.torch.save`, which needs memory for all of them twice
- tensors of a run are stored in fp32; other precisions and shards are for folders that leave it
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor

from schemas.decoder import DecoderConfig
from schemas.failures import IntegrityFailure
from schemas.files import FileRef, new_file, write_bytes
from schemas.manifest import Manifest

MODEL = "model"  # begins the names of a model's weight files
WEIGHTS = f"{MODEL}.safetensors"
INDEX = f"{WEIGHTS}.index.json"
CHAT_TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"  # may go with a model
END = "eos_token_id"
WeightType = Literal["float32", "bfloat16", "float16"]
# In the order of safetensors, which begins a file with those that come last here.
TYPES = (torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.int32, torch.float32, torch.int64)
CODES = ("BOOL", "U8", "F16", "BF16", "I32", "F32", "I64")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], run_dir: Path, description: str, dtype: WeightType = "float32"
) -> FileRef:
    """Write tensors durably, floating ones as `dtype`; `description` goes into the file's metadata."""
    # Readers of Hugging Face models insist on the key `format`, so that one key is all the metadata there is.
    metadata = {"format": "pt"} if path.name.startswith(MODEL) else {"cpipe": description}
    stored = {name: _stored_type(tensor, dtype) for name, tensor in tensors.items()}
    order = sorted(stored, key=lambda name: (-TYPES.index(stored[name]), name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * stored[name].itemsize
        code = CODES[TYPES.index(stored[name])]
        header[name] = {"dtype": code, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            plain = tensors[name].detach().to(stored[name]).cpu().contiguous().reshape(-1)
            if plain.numel():
                file.write(plain.view(torch.uint8).numpy().data)
    return file.ref(path, run_dir)


def _stored_type(tensor: Tensor, dtype: WeightType) -> torch.dtype:
    return getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype


def write_weights(
    folder: Path, weights: Mapping[str, Tensor], run_dir: Path, dtype: WeightType, max_shard_bytes: int
) -> list[FileRef]:
    """Write a model's weights as Hugging Face does: one file, or shards and an index."""
    shards = list(_shards(weights, dtype, max_shard_bytes))
    if len(shards) == 1:
        return [write_tensors(folder / WEIGHTS, weights, run_dir, "decoder", dtype)]
    files = [f"{MODEL}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    refs = [
        write_tensors(folder / file, {name: weights[name] for name in names}, run_dir, "decoder", dtype)
        for file, names in zip(files, shards, strict=True)
    ]
    total = sum(weight.numel() * _stored_type(weight, dtype).itemsize for weight in weights.values())
    named = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": named}
    return [*refs, write_bytes(folder / INDEX, _json(index), run_dir)]


def _shards(weights: Mapping[str, Tensor], dtype: WeightType, max_bytes: int) -> Iterator[list[str]]:
    """Names of the tensors of each shard; one that is larger than a shard may be has its own."""
    names: list[str] = []
    filled = 0
    for name in sorted(weights):
        size = weights[name].numel() * _stored_type(weights[name], dtype).itemsize
        if names and filled + size > max_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


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
    *,
    dtype: WeightType = "float32",
    max_shard_bytes: int | None = None,
) -> list[FileRef]:
    """Write `config.json`, the weights and the tokenizer: a folder `transformers` loads as it is."""
    shape = config.to_huggingface(end_of_text, dtype)
    return write_as(shape, folder, run_dir, weights, tokenizer_json, dtype=dtype, max_shard_bytes=max_shard_bytes)


def write_as(
    shape: Mapping[str, Any],
    folder: Path,
    run_dir: Path,
    weights: Mapping[str, Tensor],
    tokenizer_json: bytes,
    *,
    dtype: WeightType = "float32",
    max_shard_bytes: int | None = None,
) -> list[FileRef]:
    """As `write_model`, of a model whose `config.json` is `shape`."""
    if max_shard_bytes is None:
        written = [write_tensors(folder / WEIGHTS, weights, run_dir, "decoder", dtype)]
    else:
        written = write_weights(folder, weights, run_dir, dtype, max_shard_bytes)
    return [
        write_bytes(folder / "config.json", _json(shape, sort_keys=True), run_dir),
        *written,
        *write_tokenizer(folder, run_dir, shape, tokenizer_json),
    ]


def write_tokenizer(folder: Path, run_dir: Path, shape: Mapping[str, Any], tokenizer_json: bytes) -> list[FileRef]:
    """Write the tokenizer of the model whose `config.json` is `shape`, so that `transformers` loads it."""
    return [
        write_bytes(folder / "tokenizer.json", tokenizer_json, run_dir),
        write_bytes(folder / "tokenizer_config.json", _json(_tokenizer_config(shape, tokenizer_json)), run_dir),
    ]


def _tokenizer_config(shape: Mapping[str, Any], tokenizer_json: bytes) -> dict[str, Any]:
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    end = shape["eos_token_id"]
    names = {
        "eos_token": tokenizer.id_to_token(end[0] if isinstance(end, list) else end),
        "bos_token": tokenizer.id_to_token(shape["bos_token_id"]),
    }
    known = {key: name for key, name in names.items() if name is not None}  # a model's vocabulary may be larger
    return {"tokenizer_class": "PreTrainedTokenizerFast", **known}


def _json(content: Any, sort_keys: bool = False) -> bytes:
    return json.dumps(content, indent=2, sort_keys=sort_keys).encode()


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
