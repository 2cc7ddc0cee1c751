"""A Hugging Face model folder from elsewhere: nothing in it is trusted, and nothing in it can run.

- weights are safetensors: a pickle is refused, whatever its name, and no library that could read it is asked to
- what config.json, the index and the headers of the weights say must agree before a tensor is read
- no file outside the folder is read, wherever an index or a link points; of Hugging Face's cache, whose snapshots are
  links, the blobs belong to the folder
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from schemas.decoder import DecoderConfig
from schemas.failures import InputFailure, UsageFailure
from schemas.files import digest_of
from schemas.manifest import InputRef
from stages.artifacts.model_folder import CHAT_TEMPLATE, END, GENERATION, INDEX, WEIGHTS

SCHEME = "hf"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_JSON = 64 << 20  # bytes; the index of the largest published models has a few
PRECISIONS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
DERIVED = "rotary_emb.inv_freq"  # a buffer that early Llamas were stored with; it follows from config.json
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
CONVERT = "from transformers import AutoModelForCausalLM as M; M.from_pretrained('{0}').save_pretrained('{0}-safe')"


def local_folder(source: str) -> Path:
    """The folder `hf:FOLDER` names. Raises UsageFailure for any other source."""
    scheme, colon, rest = source.partition(":")
    if not colon:
        raise UsageFailure(f"{source!r} names no kind of model: expected {SCHEME}:FOLDER, a Hugging Face model folder")
    if scheme != SCHEME:
        raise UsageFailure(f"{source!r} has an unknown scheme: expected {SCHEME}:FOLDER, a Hugging Face model folder")
    folder = Path(rest)
    if not rest or not folder.is_dir():
        raise UsageFailure(
            f"{rest!r} is no folder here, and only local ones are read: download the model first, as with "
            "`hf download ORGANISATION/MODEL --local-dir FOLDER`"
        )
    return folder


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a weight file says of one tensor."""

    path: Path
    shape: tuple[int, ...]
    precision: str


class HuggingFaceFolder:
    """The files of a model: `config.json`, `tokenizer.json`, weights in one file or in shards with an index."""

    def __init__(self, folder: Path) -> None:
        """Raises InputFailure when a file is missing, or the weights are not safetensors."""
        self.folder = folder
        self._config_path = _member(folder, "config.json")
        self.tokenizer_path = _member(folder, "tokenizer.json")
        self._index_path: Path | None = None
        self._index: dict[str, str] = {}
        if os.path.lexists(folder / WEIGHTS):
            self._weight_paths = [_member(folder, WEIGHTS)]
        elif os.path.lexists(folder / INDEX):
            self._index_path = _member(folder, INDEX)
            self._index = _weight_map(self._index_path)
            self._weight_paths = [_member(folder, name, self._index_path) for name in sorted({*self._index.values()})]
        else:
            raise _no_weights(folder)

    def config(self) -> DecoderConfig:
        """The decoder that config.json describes. Raises InputFailure for what is not computed."""
        return DecoderConfig.from_huggingface(_read_json(self._config_path), str(self._config_path))

    def as_inputs(self) -> list[InputRef]:
        """All files that matter, with their digests."""
        index = [self._index_path] if self._index_path else []
        paths = [self._config_path, self.tokenizer_path, *index, *self._weight_paths]
        return [InputRef(name=path.name, digest=digest_of(path)) for path in paths]

    def companions(self, end_of_text: int, ids: int) -> dict[str, bytes]:
        """Files that go with the model wherever it goes, by name: its chat template, and which tokens end an answer.

        Both are text that nothing here runs. Of the latter there is none where it is `end_of_text` alone.
        ids: how many the model has. Raises InputFailure for what is neither.
        """
        found = {}
        if (template := self._chat_template()) is not None:
            found[CHAT_TEMPLATE] = template
        if (path := self._optional(GENERATION)) and (ends := _read_json(path).get(END)) is not None:
            listed = ends if isinstance(ends, list) else [ends]
            if not listed or not all(type(end) is int and 0 <= end < ids for end in listed):
                raise InputFailure(f"{path}: {END} is {ends!r:.80}; expected ids of tokens below {ids}")
            if set(listed) != {end_of_text}:
                found[GENERATION] = (json.dumps({END: listed}, indent=2) + "\n").encode()
        return found

    def _chat_template(self) -> bytes | None:
        """In a file of its own, or as older folders have it, in tokenizer_config.json; of several the default one."""
        if path := self._optional(CHAT_TEMPLATE):
            content = _read_text(path)
            try:
                content.decode()
            except UnicodeDecodeError as error:
                raise InputFailure(f"{path} is not UTF-8 text") from error
            return content
        if not (path := self._optional("tokenizer_config.json")):
            return None
        found = _read_json(path).get("chat_template")
        if isinstance(found, list):
            found = next((each.get("template") for each in found if isinstance(each, dict) and _is_default(each)), None)
        if found is None:
            return None
        if not isinstance(found, str):
            raise InputFailure(f"{path}: chat_template is {found!r:.80}; expected text")
        try:
            return found.encode()
        except UnicodeEncodeError as error:
            raise InputFailure(f"{path}: chat_template is no text that UTF-8 can hold") from error

    def _optional(self, name: str) -> Path | None:
        return _member(self.folder, name) if os.path.lexists(self.folder / name) else None

    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors stored, from the headers alone. Raises InputFailure when shards and index disagree."""
        found: dict[str, StoredTensor] = {}
        for path in self._weight_paths:
            for name, tensor in _header(path):
                if name in found:
                    raise InputFailure(f"{self.folder}: {name} stands in {found[name].path.name} and in {path.name}")
                if self._index and self._index.get(name) != path.name:
                    said = self._index.get(name, "no file")
                    raise InputFailure(f"{self._index_path}: {name} is in {path.name}, and the index names {said}")
                found[name] = tensor
        if absent := [name for name in self._index if name not in found]:
            raise InputFailure(f"{self._index_path}: {_listed(absent)} not in the file the index names")
        return {name: tensor for name, tensor in found.items() if not name.endswith(DERIVED)}

    def check(self, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, Sequence[int]]) -> None:
        """Raises InputFailure unless `tensors` are those of `shapes`; a tied output layer may be stored as well."""
        more = {HEAD: shapes[EMBEDDING]} if HEAD not in shapes else {}
        if missing := [name for name in shapes if name not in tensors]:
            raise InputFailure(f"{self.folder}: {_listed(missing)} missing from the weights")
        if extra := [name for name in tensors if name not in {**shapes, **more}]:
            raise InputFailure(f"{self.folder}: {_listed(extra)} in the weights, and not in such a model")
        for name, tensor in tensors.items():
            expected = tuple({**shapes, **more}[name])
            if tensor.shape != expected:
                raise InputFailure(f"{tensor.path}: {name} is {tensor.shape}, and config.json makes it {expected}")
            if tensor.precision not in PRECISIONS:
                raise InputFailure(
                    f"{tensor.path}: {name} is stored as {tensor.precision}; expected {', '.join(PRECISIONS)}"
                )

    def weights(self, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """The tensors of `shapes` in fp32, in which any of the stored precisions is exact. Raises InputFailure."""
        weights = {}
        for path in self._weight_paths:
            with safetensors.safe_open(path, "pt") as file:
                for name in (name for name, tensor in tensors.items() if tensor.path == path):
                    weights[name] = file.get_tensor(name).float()
                    if not torch.isfinite(weights[name]).all():
                        raise InputFailure(f"{path}: {name} holds values that are not finite")
        if HEAD in weights and HEAD not in shapes and not torch.equal(weights.pop(HEAD), weights[EMBEDDING]):
            raise InputFailure(
                f"{self.folder}: {HEAD} is another matrix than {EMBEDDING}, though tie_word_embeddings is true"
            )
        return weights


def _member(folder: Path, name: str, named_by: Path | None = None) -> Path:
    """A file of the folder. Raises InputFailure when it is none, or lies elsewhere."""
    where = f"{named_by} names {name!r}, which" if named_by else f"{folder / name}"
    if "/" in name or "\\" in name or "\0" in name or name in ("", ".", ".."):
        raise InputFailure(f"{where} is not a plain file name: weights lie beside their index")
    root = Path(os.path.realpath(folder))
    places = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    path = folder / name
    if not any(Path(os.path.realpath(path)).is_relative_to(place) for place in places):
        raise InputFailure(f"{where} leads out of the folder: replace the link by the file itself, as `cp -L` does")
    if not os.path.isfile(path):
        raise InputFailure(f"{where} is missing: download or copy the whole model")
    return path


def _no_weights(folder: Path) -> InputFailure:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles:
        return InputFailure(f"{folder} holds neither {WEIGHTS} nor {INDEX}")
    return InputFailure(
        f"{folder} holds its weights as pickle ({pickles[0]}), which can run code when it is read: where you trust it, "
        f'convert it with `python -c "{CONVERT.format(folder)}"`'
    )


def _is_default(template: Mapping[str, Any]) -> bool:
    return template.get("name") == "default"


def _read_text(path: Path) -> bytes:
    if path.stat().st_size > MAX_JSON:
        raise InputFailure(f"{path} is larger than {MAX_JSON >> 20} MiB; that is no {path.name}")
    return path.read_bytes()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputFailure(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputFailure(f"{path} is not a JSON object")
    return content


def _weight_map(path: Path) -> dict[str, str]:
    content = _read_json(path).get("weight_map")
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content.values()):
        raise InputFailure(f"{path} has no `weight_map` from names of tensors to names of files")
    return content


def _header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping, though it has keys
                part = file.get_slice(name)
                yield name, StoredTensor(path, tuple(part.get_shape()), part.get_dtype())
    except safetensors.SafetensorError as error:
        raise InputFailure(f"{path} is not a safetensors file ({error}); a pickle by that name is not read") from error


def _listed(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors are"
