import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from stages.data.tokenizer import train_tokenizer
from stages.data.tokenizer_match import difference_between

TEXTS = ["the cat sat on the mat", "the dog sat on the log, 12345 times"]


@pytest.fixture
def pair():
    text = train_tokenizer(TEXTS * 3, 290).to_str()
    return Tokenizer.from_str(text), Tokenizer.from_str(text)


def test_a_tokenizer_is_itself_whatever_it_cuts_off_or_fills_up(pair):
    one, other = pair
    other.enable_truncation(2)
    other.enable_padding()
    assert difference_between(one, other) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Lowercase()),
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.NFC()),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(use_regex=False)),
    ],
)
def test_another_way_to_cut_is_a_difference(pair, change):
    change(pair[1])
    assert "they cut the text" in difference_between(*pair, texts=["the cat\u0301 sat on the mat"])


def test_a_text_may_tell_what_the_samples_do_not(pair):
    merges = Tokenizer.from_str(pair[1].to_str())
    merges.add_tokens(["the cat"])
    pair[0].add_tokens([AddedToken("the cat", single_word=True)])
    assert difference_between(pair[0], merges) is None
    assert "they cut the text 'the cats'" in difference_between(pair[0], merges, texts=["the cats"])


def test_ids_must_stand_for_the_same_tokens_unless_renamed(pair):
    for tokenizer, names in zip(pair, (["<a>", "<b>"], ["<a>", "<concept_0>"]), strict=True):
        tokenizer.add_special_tokens(names)
    size = pair[0].get_vocab_size()
    assert difference_between(*pair) == f"id {size - 1} is '<b>' in one, '<concept_0>' in the other (1 such ids)"
    assert difference_between(*pair, renamed=(size - 1,), texts=["a <concept_0>, spelled"]) is None


def test_a_token_more_is_a_difference(pair):
    pair[1].add_special_tokens(["<more>"])
    assert "is None in one, '<more>' in the other" in difference_between(*pair)
