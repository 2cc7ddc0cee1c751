"""Tokens back to text, piece by piece: each piece whole characters, and none of a stop text."""

from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


def decoded(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text of the tokens, each piece as soon as its bytes are whole characters."""
    decoder = DecodeStream(skip_special_tokens=True)
    for token in tokens:
        if piece := decoder.step(tokenizer, token):
            yield piece


def until_stop(pieces: Iterator[str], stop: tuple[str, ...]) -> Iterator[str]:
    """The pieces up to the first stop text, holding back what may become one."""
    if not stop:
        yield from pieces
        return
    held = ""
    longest = max(map(len, stop))
    for piece in pieces:
        held += piece
        found = [held.index(text) for text in stop if text in held]
        if found:
            yield held[: min(found)]
            return
        ready = max(0, len(held) - longest + 1)
        if ready:
            yield held[:ready]
            held = held[ready:]
    yield held


def has_stopped(pieces: list[str], stop: tuple[str, ...]) -> bool:
    """Whether the last piece completes a stop text; a piece is a character at least."""
    if not stop or not pieces:
        return False
    recent = "".join(pieces[-max(map(len, stop)) :])
    return any(text in recent for text in stop)


def over_text(write: Callable[[list[int]], list[int]], path: Path, end_of_text: int) -> Callable[[str], str]:
    """What `write` does with the tokens of a new document, done with text; `path`: its tokenizer.json."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True  # the name of a special token is text like any other

    def write_text(prompt: str) -> str:
        ids = write([end_of_text, *tokenizer.encode(prompt, add_special_tokens=False).ids])
        return tokenizer.decode(ids)

    return write_text
