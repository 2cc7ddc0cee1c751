"""Concept tokens: unused tokens of a `tokenizer.json`, renamed in place.

- ids, merges, scores and the order of every entry stay, so a model trained with the tokenizer keeps its embeddings; the
  JSON keeps the layout of `Tokenizer.to_str`, so that the two files differ where a token was renamed
- a token that a merge, the model or another part of the tokenizer names is not unused, whatever it is called
- a concept token is found in text where special tokens are allowed, and never where they are not
  (`encode_special_tokens`); some models need one more pre-tokenizer for that, which leaves all other text as it was
- text that spells an old name becomes ordinary text
- run on its own output, it refuses: `<concept_0>` is there already
"""

from bisect import insort
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from schemas.failures import InputFailure

CONCEPT = "<concept_{}>"
# What published tokenizers call the tokens they keep in reserve. T5's sentinels (<extra_id_0>) and the markers of code
# models (<|fim_prefix|>) are trained. A few chat models give meaning to reserved ones outside tokenizer.json, as Phi-4
# pads with <|dummy_85|> and Baichuan 2 marks turns with <reserved_106>: for those, tokens are best listed by name.
UNUSED = "|".join(
    (
        r"\[unused\d+\]",  # BERT, ELECTRA, ModernBERT
        r"<unused\d+>",  # Gemma
        r"<\|(\w+_)?reserved_special_token_\d+\|>",  # Llama 3; Llama 4 puts text_post_train_ or vision_ in front
        r"<\|reserved_(token_)?\d+\|>",  # gpt-oss; Kimi with token_
        r"<\|unused_\d+\|>",  # Granite
        r"<\|placeholder_?\d+\|>",  # Phi-3
        r"<\|dummy_\d+\|>",  # Phi-4
        r"<\|extra_\d+\|>",  # Qwen 1
        r"<SPECIAL_\d+>",  # Mistral from NeMo on, Nemotron
        r"\[control_\d+\]",  # Mistral 7B v0.3
        r"<reserved_\d+>|\[reserved_\d+\]",  # Baichuan, and in BERT's brackets
        r"\[UNUSED_TOKEN_\d+\]",  # InternLM 2
        r">>UNUSED_\d+<<",  # Falcon 3
        r"<｜place▁holder▁no▁\d+｜>",  # DeepSeek
    )
)
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
PARTS = ("padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
# Ends a piece of text inside a concept's name. It comes last of the pre-tokenizers, where it sees what the model would.
CUT = {"type": "Split", "pattern": {"Regex": "<(?=concept_[0-9]+>)"}, "behavior": "MergedWithPrevious", "invert": False}


def rename_unused(
    tokenizer_json: bytes, count: int, listed: Sequence[str] = (), pattern: str | None = None
) -> tuple[bytes, tuple[int, ...]]:
    """The tokenizer with `count` of its unused tokens renamed to <concept_0> … in place, and their ids in that order.

    They are the first of `listed`, or those with the lowest ids among the tokens that `pattern` (RE2, so linear in
    time; default: UNUSED) matches as a whole. Raises InputFailure for what is no tokenizer, for too few unused tokens,
    for a concept that exists, for a bad pattern, and for a listed token that is unknown, in use or listed twice.
    """
    if count < 1:
        raise InputFailure(f"{count} concept tokens were asked for; expected at least 1")
    if listed and pattern is not None:
        raise InputFailure("unused tokens are given by a list and by a pattern; expected one of them")
    try:
        tokenizer = Tokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # tokenizers raises the bare class for some files
        raise InputFailure(f"not a tokenizer.json: {' '.join(str(error).split())}") from error
    content = orjson.loads(tokenizer_json)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    uses = _uses(content, ids)
    unused = _listed(listed, ids, uses) if listed else _matching(UNUSED if pattern is None else pattern, ids, uses)
    names = _names(unused, count, ids)
    reached = _text_reaches(tokenizer, content["model"], names)
    _rename(content, names, ids)
    if reached:
        _cut_names(content)
    layout = orjson.OPT_INDENT_2 if b"\n" in tokenizer_json.strip() else 0
    layout |= orjson.OPT_APPEND_NEWLINE if tokenizer_json.endswith(b"\n") else 0
    return orjson.dumps(content, option=layout), tuple(ids[old] for old in names)


def _uses(content: dict[str, Any], ids: dict[str, int]) -> dict[str, str]:
    """What needs a token, for every token that the tokenizer itself or any text needs."""
    model = content["model"]
    uses = {name: "text, as a single character," for name in ids if len(name) == 1}
    if model.get("byte_fallback"):
        uses |= {f"<0x{byte:02X}>": "byte fallback" for byte in range(256)}
    prefix = len(model.get("continuing_subword_prefix") or "")
    for merge in model.get("merges", ()):
        left, right = merge.split(" ") if isinstance(merge, str) else merge  # before tokenizers 0.20: "left right"
        uses |= dict.fromkeys((left, right, left + right[prefix:]), "a merge")
    name_of = {token: name for name, token in ids.items()}
    parts = {part: content.get(part) for part in PARTS}
    parts["model"] = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    for part, settings in parts.items():
        for named in _named(settings):
            uses[name_of.get(named, named)] = f"its {part}"
    return uses


def _named(settings: Any, key: str = "") -> Iterator[Any]:
    """Every string in the settings of a part, and every number that is an id: those in lists, and two by their key."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            yield from _named(value, name)
    elif isinstance(settings, list):
        for value in settings:
            yield from _named(value, "ids")
    elif isinstance(settings, str) or key in ("ids", "pad_id", "unk_id"):
        yield settings


def _listed(listed: Sequence[str], ids: dict[str, int], uses: dict[str, str]) -> list[str]:
    for number, name in enumerate(listed):
        if name not in ids:
            raise InputFailure(f"the tokenizer has no token {name!r} to make a concept token of")
        if name in uses:
            raise InputFailure(f"token {name!r} is not unused: {uses[name]} needs it")
        if name in listed[:number]:
            raise InputFailure(f"token {name!r} is listed twice")
    return list(listed)


def _matching(pattern: str, ids: dict[str, int], uses: dict[str, str]) -> list[str]:
    names = pa.array(sorted(ids, key=ids.__getitem__), pa.string())
    try:
        pc.match_substring_regex(names, pattern)  # by itself, lest `a)|(b` be well-formed once wrapped
        found = names.filter(pc.match_substring_regex(names, rf"\A(?:{pattern})\z"))
    except (pa.ArrowInvalid, UnicodeError) as error:
        raise InputFailure(f"not a pattern for unused tokens: {' '.join(str(error).split())}") from error
    return [name for name in found.to_pylist() if name not in uses]


def _names(unused: list[str], count: int, ids: dict[str, int]) -> dict[str, str]:
    """The new name of each token that gets one, by the old name, in the order of the concepts."""
    if len(unused) < count:
        examples = ", ".join(map(repr, unused[:3])) + ", …" * (len(unused) > 3)
        raise InputFailure(
            f"{count} concept tokens were asked for, and {len(unused)} unused tokens were found"
            f"{examples and f' ({examples})'}: ask for fewer, or name others"
        )
    names = {old: CONCEPT.format(number) for number, old in enumerate(unused[:count])}
    for name in names.values():
        if name in ids:
            raise InputFailure(f"the tokenizer has a token {name!r} already; concept tokens are made only once")
    return names


def _text_reaches(tokenizer: Tokenizer, model: dict[str, Any], names: dict[str, str]) -> bool:
    """Whether text that spells a concept may come out as it, special tokens or not.

    Plain BPE cannot: it makes a token only by merges. The others find any entry of their vocabulary that is left whole
    by the pre-tokenizer, Unigram even in the middle of a piece.
    """
    if "merges" in model and not model.get("ignore_merges"):
        return False
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    spelled = [name for old, name in names.items() if old in vocabulary]
    texts = [(name, f"{around}{name}{around}") for name in spelled for around in ("", " ", "a", "1", ".", "<", "語")]
    return any(name in piece for name, text in texts for piece in _pieces(tokenizer, text))


def _pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """What the model gets to see of `text`."""
    text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] if tokenizer.pre_tokenizer else [text]


def _rename(content: dict[str, Any], names: dict[str, str], ids: dict[str, int]) -> None:
    """In the vocabulary and among the added tokens, where those that were in the vocabulary only get an entry."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        content["model"]["vocab"] = {names.get(name, name): token for name, token in vocabulary.items()}
    else:  # Unigram: a list of names with scores
        content["model"]["vocab"] = [[names.get(name, name), score] for name, score in vocabulary]
    added = content.setdefault("added_tokens", [])
    for token in added:
        if token["content"] in names:
            token.update(content=names[token["content"]], **FLAGS)
    entered = {token["content"] for token in added}
    for old, name in names.items():
        if name not in entered:
            insort(added, {"id": ids[old], "content": name, **FLAGS}, key=itemgetter("id"))


def _cut_names(content: dict[str, Any]) -> None:
    """Let no piece of text hold a concept's whole name; text that spells none is cut as before."""
    before = content.get("pre_tokenizer")
    if before is None:
        content["pre_tokenizer"] = CUT
    elif before["type"] == "Sequence":
        before["pretokenizers"].append(CUT)
    else:
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [before, CUT]}
