import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from schemas.failures import InputFailure
from stages.data import tokenizer as tokenizer_module
from stages.data.readers import Document
from stages.data.tokenizer import Encoder, load_tokenizer, pieces, train_tokenizer

TEXT = "It's a kind of magic: we'll sing 1234 times,\n\n\tand   they'd  dance.  Größe, naïve, 日本語, 😀!\r\n" * 20
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([TEXT], 400)


def document(text: str) -> Document:
    return Document("a", "s", "a", text, len(text.encode()))


def encode(encoder: Encoder, text: str) -> list[int]:
    ((_, tokens),) = encoder.encode([document(text)])
    return tokens.tolist()


def changed(tokenizer: Tokenizer, folder: Path, **parts: object) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(tokenizer.to_str()) | parts))
    return path


def test_training_twice_gives_the_same_tokenizer(trained: Tokenizer) -> None:
    assert train_tokenizer([TEXT], 400).to_str() == trained.to_str()


def test_every_byte_has_an_id_and_the_separator_is_first(trained: Tokenizer) -> None:
    encoder = Encoder(trained, exact=True)
    assert encoder.vocab_size == len(trained.get_vocab()) == 327
    assert encoder.end_of_text == 0
    assert len(Encoder(train_tokenizer(["a"], 300), exact=True).tokenizer.get_vocab()) == 257


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_tokens_decode_to_the_text(trained: Tokenizer, text: str) -> None:
    encoder = Encoder(trained, exact=True)
    assert trained.decode(encode(encoder, text), skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["<|endoftext|>", "a <|endoftext|> b", "<|endoftext|>" * 3])
def test_text_that_spells_the_separator_is_ordinary_text(trained: Tokenizer, text: str) -> None:
    encoder = Encoder(trained, exact=True)
    tokens = encode(encoder, text)
    assert encoder.end_of_text not in tokens
    assert trained.decode(tokens, skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab'st1 \n\t\r.,é日\u00a0\u2028"), max_size=60), length=st.integers(1, 10))
def test_pieces_encode_as_the_whole(trained: Tokenizer, text: str, length: int) -> None:
    cut = list(pieces(text, length))
    assert "".join(cut) == text
    together = [token for piece in cut for token in trained.encode(piece, add_special_tokens=False).ids]
    assert together == trained.encode(text, add_special_tokens=False).ids


def test_long_and_many_documents_encode_as_one_by_one(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [TEXT[start:] * repeat for start, repeat in [(0, 1), (3, 2), (5, 0), (7, 3), (9, 1)]]
    expected = [trained.encode(text, add_special_tokens=False).ids for text in texts]
    monkeypatch.setattr(tokenizer_module, "BATCH_CHARACTERS", 2500)
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 700)
    found = list(Encoder(trained, exact=True).encode(document(text) for text in texts))
    assert [tokens.tolist() for _, tokens in found] == expected
    assert [item.text for item, _ in found] == texts
    assert all(tokens.dtype == np.uint32 for _, tokens in found)


def test_truncation_and_padding_of_a_given_tokenizer_are_ignored(trained: Tokenizer, tmp_path: Path) -> None:
    cut = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    given_one = load_tokenizer(changed(trained, tmp_path, truncation=cut))
    expected = encode(Encoder(trained, exact=True), TEXT)
    assert encode(Encoder(given_one, exact=False), TEXT) == expected


def test_a_tokenizer_that_loses_text_is_refused(trained: Tokenizer, tmp_path: Path) -> None:
    encoder = Encoder(load_tokenizer(changed(trained, tmp_path, normalizer={"type": "Lowercase"})), exact=False)
    assert encode(encoder, "all lower") == encode(Encoder(trained, exact=True), "all lower")
    with pytest.raises(InputFailure, match="does not give document 'a' back"):
        encode(encoder, "Upper")


def test_a_tokenizer_that_writes_its_separator_into_text_is_refused(trained: Tokenizer, tmp_path: Path) -> None:
    added = json.loads(trained.to_str())["added_tokens"]
    added[0]["special"] = False
    encoder = Encoder(load_tokenizer(changed(trained, tmp_path, added_tokens=added)), exact=False)
    with pytest.raises(InputFailure, match="separator inside document"):
        encode(encoder, "a <|endoftext|> b")


def test_a_tokenizer_without_separator_is_refused(trained: Tokenizer, tmp_path: Path) -> None:
    content = json.loads(trained.to_str())
    del content["model"]["vocab"]["<|endoftext|>"]
    without = load_tokenizer(changed(trained, tmp_path, model=content["model"], added_tokens=[]))
    with pytest.raises(InputFailure, match=r"no token that ends a text; expected one of <\|endoftext\|>"):
        Encoder(without, exact=False)


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"version":\n')
    with pytest.raises(InputFailure, match=r"a\.json is not a tokenizer\.json") as failure:
        load_tokenizer(tmp_path / "a.json")
    assert "\n" not in str(failure.value)
    with pytest.raises(InputFailure, match="no such file"):
        load_tokenizer(tmp_path / "none.json")
