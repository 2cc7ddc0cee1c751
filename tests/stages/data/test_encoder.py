import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers

from schemas.failures import InputFailure, UsageFailure
from stages.data import encoder as encoder_module
from stages.data.encoder import Encoder, pieces
from stages.data.reading.readers import Document
from stages.data.tokenizer import train_tokenizer

TEXT = "It's a kind of magic: we'll sing 1234 times,\n\n\tand   they'd  dance.  Größe, naïve, 日本語, 😀!\r\n" * 20
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
LIBRARIES = ("fastokens", "tokenizers")


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([TEXT], 400)


@pytest.fixture(scope="module", params=LIBRARIES)
def encoder(request: pytest.FixtureRequest, trained: Tokenizer) -> Encoder:
    return Encoder(trained.to_str().encode(), None, request.param)


def document(text: str, name: str = "a") -> Document:
    return Document(name, "s", name, text, len(text.encode()), 1)


def encode(encoder: Encoder, text: str) -> list[int]:
    ((_, tokens, _),) = encoder.encode([document(text)])
    return tokens.tolist()


def changed(tokenizer: Tokenizer, **parts: Any) -> bytes:
    return json.dumps(json.loads(tokenizer.to_str()) | parts).encode()


def test_it_names_the_library_that_encodes(trained: Tokenizer) -> None:
    names = {library: Encoder(trained.to_str().encode(), None, library).name for library in (*LIBRARIES, "auto")}
    assert names["tokenizers"].startswith("tokenizers 0.")
    assert names["auto"] == names["fastokens"]
    assert names["fastokens"].startswith("fastokens 0.")


def test_it_knows_the_separator_and_the_number_of_ids(encoder: Encoder, trained: Tokenizer) -> None:
    assert encoder.vocab_size == trained.get_vocab_size() == 327
    assert encoder.end_of_text == 0
    assert encoder.ids(["<|endoftext|>", "a"]) == (0, trained.token_to_id("a"))


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_tokens_decode_to_the_text(encoder: Encoder, trained: Tokenizer, text: str) -> None:
    assert trained.decode(encode(encoder, text), skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["<|endoftext|>", "a <|endoftext|> b", "<|endoftext|>" * 3])
def test_text_that_spells_the_separator_is_ordinary_text(encoder: Encoder, trained: Tokenizer, text: str) -> None:
    tokens = encode(encoder, text)
    assert encoder.end_of_text not in tokens
    assert trained.decode(tokens, skip_special_tokens=False) == text


def strange_strings(count: int) -> Iterator[str]:
    """Strings out of every plane of Unicode, in runs and mixtures that trip encoders."""
    draw = random.Random(0)
    spaces = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2003", "\u3000", "\u2028", "\x0b", "\x1c", "\u200b", "\ufeff"]
    words = [
        "'s",
        "'LL",
        "don't",
        "x",
        "été",
        "e\u0301",
        "日本",
        "한국",
        "😀",
        "👩\u200d👧",
        "123",
        "½",
        "<|endoftext|>",
        "_",
        "--",
    ]
    for _ in range(count):
        parts = draw.choices([*spaces, *words], k=draw.randrange(1, 12))
        code = draw.randrange(0x110000)
        parts.append(chr(code) * draw.randrange(1, 4) if not 0xD800 <= code < 0xE000 else "\ufffd")
        yield "".join(draw.sample(parts, len(parts)))


@pytest.mark.parametrize("pattern", [None, r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+|\p{L}+"])
def test_both_libraries_give_the_same_ids(trained: Tokenizer, pattern: str | None) -> None:
    tokenizer = Tokenizer.from_str(trained.to_str())
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    fast, slow = (Encoder(tokenizer.to_str().encode(), None, library) for library in LIBRARIES)
    texts = [*strange_strings(2000), TEXT, "", "a" * 5000, " " * 5000]
    found = zip(fast.encode(map(document, texts)), slow.encode(map(document, texts)), strict=True)
    assert [a.document.text for a, b in found if a.tokens.tolist() != b.tokens.tolist()] == []


def test_a_fast_library_that_gives_other_ids_is_not_used(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(tokenizer_json: str) -> Any:
        return (lambda texts: (np.zeros(len(texts), np.uint32), np.arange(len(texts) + 1))), ""

    monkeypatch.setattr(encoder_module, "_fast", wrong)
    assert Encoder(trained.to_str().encode(), None, "auto").name.startswith("tokenizers")
    with pytest.raises(UsageFailure, match=r"fastokens cannot encode here \(gives other ids for"):
        Encoder(trained.to_str().encode(), None, "fastokens")


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab'st1 \n\t\r.,é日\u00a0\u2028"), max_size=60), length=st.integers(1, 10))
def test_pieces_encode_as_the_whole(trained: Tokenizer, text: str, length: int) -> None:
    cut = list(pieces(text, length))
    assert "".join(cut) == text
    together = [token for piece in cut for token in trained.encode(piece, add_special_tokens=False).ids]
    assert together == trained.encode(text, add_special_tokens=False).ids


def test_long_and_many_documents_encode_as_one_by_one(
    encoder: Encoder, trained: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [TEXT[start:] * repeat for start, repeat in [(0, 1), (3, 2), (5, 0), (7, 3), (9, 1)]]
    expected = [trained.encode(text, add_special_tokens=False).ids for text in texts]
    monkeypatch.setattr(encoder_module, "BATCH_CHARACTERS", 2500)
    monkeypatch.setattr(encoder_module, "PIECE_CHARACTERS", 700)
    found = list(encoder.encode(document(text) for text in texts))
    assert [item.tokens.tolist() for item in found] == expected
    assert [item.document.text for item in found] == texts
    assert all(item.tokens.dtype == np.uint32 and not item.lossy for item in found)


def test_no_documents_encode_to_nothing(encoder: Encoder) -> None:
    assert list(encoder.encode([])) == []


def test_a_fault_while_reading_comes_through(encoder: Encoder) -> None:
    def reading() -> Iterator[Document]:
        yield document("a")
        raise InputFailure("line 2 is bad")

    with pytest.raises(InputFailure, match="line 2 is bad"):
        list(encoder.encode(reading()))


@pytest.mark.parametrize("library", LIBRARIES)
def test_truncation_and_padding_of_a_given_tokenizer_are_ignored(trained: Tokenizer, library: Any) -> None:
    cut = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    given_one = Encoder(changed(trained, truncation=cut), None, library)
    assert encode(given_one, TEXT) == trained.encode(TEXT, add_special_tokens=False).ids


@pytest.mark.parametrize("normalizer", ["Lowercase", "NFC"])
def test_a_tokenizer_that_loses_text_is_refused_or_its_losses_are_counted(trained: Tokenizer, normalizer: str) -> None:
    content = changed(trained, normalizer={"type": normalizer})
    encoder = Encoder(content, None, "auto")
    assert encode(encoder, "all lower") == trained.encode("all lower").ids
    with pytest.raises(InputFailure, match="does not give document 'a' back"):
        encode(encoder, "Uppe\u0301r")
    lossy = Encoder(content, None, "auto", allow_lossy=True)
    found = list(lossy.encode([document("lower"), document("Uppe\u0301r")]))
    assert [item.lossy for item in found] == [False, True]


def test_a_tokenizer_that_writes_its_separator_into_text_is_refused(trained: Tokenizer) -> None:
    added = json.loads(trained.to_str())["added_tokens"]
    added[0]["special"] = False
    encoder = Encoder(changed(trained, added_tokens=added), None, "auto")
    texts = ["a", "", "b <|endoftext|> c", "d"]
    with pytest.raises(InputFailure, match="separator inside document '2'"):
        list(encoder.encode(document(text, str(number)) for number, text in enumerate(texts)))
