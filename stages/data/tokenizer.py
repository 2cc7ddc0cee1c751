"""Tokenizers: trained, found in the user's files, and examined for what they do to text.

- ours is byte-level BPE with GPT-2's pattern: no normalizer, nothing added, every text comes back
- whether another's gives every text back is read off its parts; where they leave it open, each document is decoded
"""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from schemas.failures import InputFailure
from stages.data.concept_tokens import CONCEPT

FILE_NAME = "tokenizer.json"
MODEL_FILES = (FILE_NAME, "tokenizer_config.json")  # of a Hugging Face folder, what matters here
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # names of end of text; ours first


def train_tokenizer(texts: Iterable[str], vocab_size: int, concept_tokens: int = 0) -> Tokenizer:
    """Byte-level BPE with GPT-2's pattern; fewer ids than `vocab_size` when the texts offer no more pairs to merge.

    The separator is id 0, `concept_tokens` reserved tokens follow it. Raises InputFailure when they leave no room.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [SEPARATORS[0], *(CONCEPT.format(number) for number in range(concept_tokens))]
    if vocab_size < len(alphabet) + len(special):
        raise InputFailure(
            f"--vocab-size {vocab_size} has no room for 256 bytes, a separator and {concept_tokens} concept tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_files(path: Path) -> list[Path]:
    """The files behind `--tokenizer PATH`: a tokenizer.json, or those of a model folder. Raises InputFailure."""
    if path.is_dir():
        if not (path / FILE_NAME).is_file():
            raise InputFailure(f"{path} holds no {FILE_NAME}: --tokenizer takes one, or a Hugging Face model folder")
        return [path / name for name in MODEL_FILES if (path / name).is_file()]
    if not path.is_file():
        raise InputFailure(f"no such file: {path}; --tokenizer takes a {FILE_NAME} or a Hugging Face model folder")
    return [path]


def load_tokenizer(content: bytes, where: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`. Raises InputFailure when it is none."""
    try:
        return Tokenizer.from_str(content.decode())
    except Exception as error:  # tokenizers raises the bare class
        raise InputFailure(f"{where} is not a {FILE_NAME}: {' '.join(str(error).split())}") from error


def end_of_text_named(files: Sequence[Path]) -> str | None:
    """The separator that a model folder's tokenizer_config.json names, if it does. Raises InputFailure."""
    for path in files[1:]:
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise InputFailure(f"{path} is not JSON: {error}") from error
        token = content.get("eos_token") if isinstance(content, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None
    return None


def separator_of(tokenizer: Tokenizer, name: str | None = None) -> int:
    """Id of the token between documents: the one named, else a usual one. Raises InputFailure when there is none."""
    for candidate in SEPARATORS if name is None else (name,):
        if (token := tokenizer.token_to_id(candidate)) is not None:
            return token
    if name is not None:
        raise InputFailure(f"the tokenizer has no token {name!r} to end a text: name another with --end-of-text")
    raise InputFailure(
        f"the tokenizer has no token that ends a text; expected one of {', '.join(SEPARATORS)}, or --end-of-text"
    )


def keeps_text(content: dict[str, Any]) -> bool:
    """Whether a tokenizer, as `Tokenizer.to_str` writes it, gives every text back that `is_unchanged` leaves.

    It does for byte-level BPE that knows all bytes, when nothing around it drops or changes any.
    """
    model = content["model"]
    if model["type"] != "BPE":
        return False
    plain = not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    bytes_known = set(pre_tokenizers.ByteLevel.alphabet()) <= set(model["vocab"])
    strips = any(token["lstrip"] or token["rstrip"] for token in content["added_tokens"] if not token["special"])
    normalizer = content["normalizer"] is None or content["normalizer"]["type"] == "NFC"
    decoder = (content["decoder"] or {}).get("type") == "ByteLevel"
    cuts = _only_cuts(content["pre_tokenizer"])
    return plain and bytes_known and not strips and normalizer and decoder and cuts


def _only_cuts(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer turns text to bytes once, adds nothing, and otherwise only cuts."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer] if pre_tokenizer else [])
    to_bytes = [step for step in steps if step["type"] == "ByteLevel"]
    cuts = all(step["type"] == "Split" and step["behavior"] != "Removed" for step in steps if step not in to_bytes)
    return cuts and len(to_bytes) == 1 and not to_bytes[0]["add_prefix_space"]


def is_unchanged(text: str, content: dict[str, Any]) -> bool:
    """Whether the normalizer of a tokenizer that `keeps_text` leaves `text` as it is."""
    return content["normalizer"] is None or unicodedata.is_normalized("NFC", text)


def uses_pattern_of_gpt2(content: dict[str, Any]) -> bool:
    """Whether no token reaches over a cut between a non-space and the space after it: nothing but GPT-2's pattern."""
    steps = content["pre_tokenizer"] or {}
    pattern = steps.get("type") == "ByteLevel" and steps.get("use_regex", True) and not steps["add_prefix_space"]
    words = [token for token in content["added_tokens"] if not token["special"]]
    return pattern and content["normalizer"] is None and not words
