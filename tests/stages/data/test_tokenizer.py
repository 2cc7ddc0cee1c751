import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from schemas.failures import InputFailure
from stages.data.tokenizer import (
    end_of_text_named,
    is_unchanged,
    keeps_text,
    load_tokenizer,
    separator_of,
    tokenizer_files,
    train_tokenizer,
    uses_pattern_of_gpt2,
)

TEXT = "It's a kind of magic: we'll sing 1234 times,\n\n\tand   they'd  dance.  Größe, naïve, 日本語, 😀!\r\n" * 20
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([TEXT], 400)


def content_of(tokenizer: Tokenizer, **parts: Any) -> dict[str, Any]:
    return json.loads(tokenizer.to_str()) | parts


def like_llama3() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end_of_text|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def test_training_twice_gives_the_same_tokenizer(trained: Tokenizer) -> None:
    assert train_tokenizer([TEXT], 400).to_str() == trained.to_str()


def test_every_byte_has_an_id_and_the_separator_is_first(trained: Tokenizer) -> None:
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(trained.get_vocab())
    assert separator_of(trained) == 0
    assert train_tokenizer(["a"], 300).get_vocab_size() == 257


def test_concept_tokens_are_reserved_after_the_separator() -> None:
    tokenizer = train_tokenizer([TEXT], 300, concept_tokens=3)
    assert [tokenizer.token_to_id(f"<concept_{number}>") for number in range(3)] == [1, 2, 3]
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.encode("a <concept_1> b").ids[2] == 2
    tokenizer.encode_special_tokens = True
    assert not {1, 2, 3} & set(tokenizer.encode("a <concept_1> b").ids)
    with pytest.raises(InputFailure, match="--vocab-size 300 has no room for 256 bytes, a separator and 44 concept"):
        train_tokenizer([TEXT], 300, concept_tokens=44)


def test_byte_level_tokenizers_are_known_to_keep_text(trained: Tokenizer) -> None:
    nfc = content_of(trained, normalizer={"type": "NFC"})
    for content in (content_of(trained), content_of(like_llama3()), nfc):
        assert keeps_text(content)
    assert is_unchanged("e\u0301", content_of(trained))
    assert not is_unchanged("e\u0301", nfc)
    assert is_unchanged("\u00e9", nfc)


PREFIX = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
DROPS = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
STRIPS = {"id": 999, "content": "x", "special": False, "lstrip": True, "rstrip": False}


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": PREFIX},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DROPS, PREFIX | {"add_prefix_space": False}]}},
        {"decoder": None},
        {"added_tokens": [STRIPS]},
    ],
)
def test_tokenizers_that_may_change_text_are_not(trained: Tokenizer, parts: dict[str, Any]) -> None:
    assert not keeps_text(content_of(trained, **parts))


def test_models_that_may_change_text_are_not(trained: Tokenizer) -> None:
    model = content_of(trained)["model"]
    for change in ({"dropout": 0.1}, {"end_of_word_suffix": "</w>"}, {"vocab": {"a": 0}}):
        assert not keeps_text(content_of(trained, model=model | change))
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    assert not keeps_text(content_of(words))


def test_only_the_pattern_of_gpt2_is_cut(trained: Tokenizer) -> None:
    assert uses_pattern_of_gpt2(content_of(trained))
    assert not uses_pattern_of_gpt2(content_of(like_llama3()))
    assert not uses_pattern_of_gpt2(content_of(trained, normalizer={"type": "NFC"}))
    assert not uses_pattern_of_gpt2(content_of(trained, added_tokens=[{"special": False}]))


def test_the_separator_is_a_usual_one_or_the_one_named(trained: Tokenizer) -> None:
    assert separator_of(like_llama3()) == 0
    assert separator_of(trained, "!") == trained.token_to_id("!")
    with pytest.raises(InputFailure, match="no token '<none>' to end a text"):
        separator_of(trained, "<none>")
    with pytest.raises(InputFailure, match=r"no token that ends a text; expected one of <\|endoftext\|>"):
        separator_of(Tokenizer(models.BPE({"a": 0}, [])))


def test_a_model_folder_gives_its_tokenizer_and_what_ends_a_text(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_files(tmp_path / "tokenizer.json") == tokenizer_files(tmp_path) == [tmp_path / "tokenizer.json"]
    assert end_of_text_named(tokenizer_files(tmp_path)) is None
    for eos in ("</done>", {"content": "</done>", "special": True}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert end_of_text_named(tokenizer_files(tmp_path)) == "</done>"
    for nothing in ({}, {"eos_token": None}, {"eos_token": 3}, []):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(nothing))
        assert end_of_text_named(tokenizer_files(tmp_path)) is None


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    for content in (b'{"version":\n', b"\xff", b"{}"):
        with pytest.raises(InputFailure, match=r"a\.json is not a tokenizer\.json") as failure:
            load_tokenizer(content, "a.json")
        assert "\n" not in str(failure.value)
    with pytest.raises(InputFailure, match="no such file"):
        tokenizer_files(tmp_path / "none.json")
    with pytest.raises(InputFailure, match=r"holds no tokenizer\.json"):
        tokenizer_files(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputFailure, match=r"tokenizer_config\.json is not JSON"):
        end_of_text_named(tokenizer_files(tmp_path))
