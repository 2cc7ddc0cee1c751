import json
import re
import string
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from schemas.failures import InputFailure
from stages.data.concept_tokens import CONCEPT, rename_unused

COUNT = 3
TEXTS = (
    "",
    "It's a kind of magic: we'll sing 1234 times,\n\n\tand   they'd  dance. ",
    "Größe, naïve, Ελληνικά, Русский, עברית, العربية, हिन्दी, 日本語の文, 한국어",
    "👩‍👩‍👧 🇨🇭 😀!\r\n\u200bzero\u00a0width \ufb01",
    "def f(x: list[int]) -> str:\n    return x[0] << 2 if x else '<|end|>'  # <b>[unused]</b>",
    "<concept> <concept_> <concept_a> concept_0 [CLS]",
)
LLAMA_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(string.printable), max_size=60)


def bert() -> Tokenizer:
    """The unused tokens are in the vocabulary only."""
    names = ["[PAD]", *(f"[unused{number}]" for number in range(5)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused5]"]
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*letters, *(f"##{letter}" for letter in letters), "magic", "##ing", "日", "concept"]
    vocabulary = {name: number for number, name in enumerate([*names, *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tokenizer


def gemma() -> Tokenizer:
    """The unused tokens are in the vocabulary, with scores, and are added tokens that are not special."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    unused = [f"<unused{number}>" for number in range(5)]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *unused]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"][4:]:
        token["special"] = False
    return with_bos(Tokenizer.from_str(json.dumps(content)), "<bos>")


def llama3() -> Tokenizer:
    """The unused tokens are added tokens only, with ids after the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    content = json.loads(tokenizer.to_str())
    content["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(content))
    reserved = [f"<|reserved_special_token_{number}|>" for number in range(5)]
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", *reserved[:2], "<|eot_id|>", *reserved[2:]])
    return with_bos(tokenizer, "<|begin_of_text|>")


def sentencepiece() -> Tokenizer:
    """The unused tokens are in the vocabulary only, before the bytes and the merges."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(TEXTS * 5, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<unused{number}>" for number in range(5))]
    names += [f"<0x{byte:02X}>" for byte in range(256)]
    names += list(model["vocab"])
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [(left, right) for left, right in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return with_bos(tokenizer, "<s>")


def with_bos(tokenizer: Tokenizer, name: str) -> Tokenizer:
    special = [(name, tokenizer.token_to_id(name))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{name} $A", special_tokens=special)
    return tokenizer


def whole_words(model: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def words() -> Tokenizer:
    vocabulary = {name: number for number, name in enumerate(["[UNK]", "a", *unused_names("[unused{}]")])}
    return whole_words(models.WordLevel(vocabulary, unk_token="[UNK]"))


def unsplit_wordpiece() -> Tokenizer:
    vocabulary = {name: number for number, name in enumerate(["[UNK]", "a", "##a", *unused_names("[unused{}]")])}
    return whole_words(models.WordPiece(vocabulary, unk_token="[UNK]"))


def unsplit_bpe() -> Tokenizer:
    names = [*unused_names("<unused{}>"), *sorted(set("".join(TEXTS) + "<concept_012>"))]
    vocabulary = {name: number for number, name in enumerate(names)}
    return Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))


def unused_names(name: str) -> list[str]:
    return [name.format(number) for number in range(5)]


PUBLISHED = (bert, gemma, llama3, sentencepiece)
UNGUARDED = (gemma, words, unsplit_wordpiece, unsplit_bpe)  # of these, text could spell an entry of the vocabulary
every_published = pytest.mark.parametrize("shape", PUBLISHED)
every_shape = pytest.mark.parametrize("shape", (*PUBLISHED, *UNGUARDED[1:]))
Shape = Callable[[], Tokenizer]


@cache
def renamed(shape: Shape, *, pretty: bool = False) -> tuple[bytes, bytes, tuple[int, ...]]:
    """The tokenizer.json before and after, and the ids of the concepts."""
    before = shape().to_str(pretty).encode()
    return before, *rename_unused(before, COUNT)


@cache
def pair(shape: Shape) -> tuple[Tokenizer, Tokenizer]:
    before, after, _ = renamed(shape)
    return Tokenizer.from_buffer(before), Tokenizer.from_buffer(after)


def old_names(shape: Shape) -> list[str]:
    before, _, ids = renamed(shape)
    name_of = {token: name for name, token in Tokenizer.from_buffer(before).get_vocab().items()}
    return [name_of[token] for token in ids]


def encode(tokenizer: Tokenizer, text: str, *, special: bool, post: bool = False) -> list[int]:
    tokenizer.encode_special_tokens = not special
    return tokenizer.encode(text, add_special_tokens=post).ids


@every_shape
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("post", [True, False])
def test_ordinary_text_gets_the_same_ids(shape: Shape, special: bool, post: bool) -> None:
    before, after = pair(shape)
    for text in (*TEXTS, "\n".join(TEXTS)):
        assert encode(after, text, special=special, post=post) == encode(before, text, special=special, post=post)


@every_shape
@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT, special=st.booleans(), post=st.booleans())
def test_any_other_text_gets_the_same_ids(shape: Shape, text: str, special: bool, post: bool) -> None:
    before, after = pair(shape)
    assume(not re.search(r"unused|reserved|concept", text, re.IGNORECASE))
    assert encode(after, text, special=special, post=post) == encode(before, text, special=special, post=post)


@every_shape
def test_the_vocabulary_is_the_same_but_for_the_names(shape: Shape) -> None:
    before, after = pair(shape)
    ids = renamed(shape)[2]
    new = {name: CONCEPT.format(number) for number, name in enumerate(old_names(shape))}
    assert ids == tuple(sorted(ids))
    assert list(new.values()) == ["<concept_0>", "<concept_1>", "<concept_2>"]
    assert [after.token_to_id(name) for name in new.values()] == list(ids)
    assert after.get_vocab() == {new.get(name, name): token for name, token in before.get_vocab().items()}
    assert after.get_vocab_size(with_added_tokens=False) == before.get_vocab_size(with_added_tokens=False)


@every_published
def test_the_unused_tokens_with_the_lowest_ids_are_taken(shape: Shape) -> None:
    expected = {bert: (1, 2, 3), gemma: (4, 5, 6), llama3: (402, 403, 405), sentencepiece: (3, 4, 5)}
    assert renamed(shape)[2] == expected[shape]


@every_shape
@pytest.mark.parametrize("pretty", [True, False])
def test_the_model_is_the_same_text_with_other_names(shape: Shape, pretty: bool) -> None:
    """Merges, scores and places included."""
    before, after, _ = renamed(shape, pretty=pretty)
    start = b'"model":'
    assert after.partition(start)[2] == with_new_names(before, shape).partition(start)[2]


def with_new_names(content: bytes, shape: Shape) -> bytes:
    for number, name in enumerate(old_names(shape)):
        content = content.replace(json.dumps(name).encode(), f'"{CONCEPT.format(number)}"'.encode())
    return content


@pytest.mark.parametrize("pretty", [True, False])
def test_where_the_unused_tokens_are_special_nothing_but_the_names_changes(pretty: bool) -> None:
    before, after, _ = renamed(llama3, pretty=pretty)
    assert after == with_new_names(before, llama3)
    assert after != before
    assert rename_unused(before + b"\n", COUNT)[0] == after + b"\n"


@pytest.mark.parametrize("shape", (bert, llama3, sentencepiece, words, unsplit_wordpiece, unsplit_bpe))
@pytest.mark.parametrize("pretty", [True, False])
def test_the_file_is_what_tokenizers_would_write(shape: Shape, pretty: bool) -> None:
    """But for a Unigram model, of which `tokenizers` rounds the scores whenever it reads them."""
    _, after, _ = renamed(shape, pretty=pretty)
    assert after == Tokenizer.from_buffer(after).to_str(pretty).encode()


@every_shape
def test_the_other_parts_are_left_alone(shape: Shape) -> None:
    before, after, ids = renamed(shape)
    old, new = json.loads(before), json.loads(after)
    assert list(new) == list(old)
    changed = {"model", "added_tokens"} | ({"pre_tokenizer"} if shape in UNGUARDED else set())
    assert {part for part in old if new[part] != old[part]} <= changed
    others = [token for token in new["added_tokens"] if token["id"] not in ids]
    assert others == [token for token in old["added_tokens"] if token["id"] not in ids]


@every_shape
def test_concepts_are_special_tokens_in_the_order_of_their_ids(shape: Shape) -> None:
    _, after, ids = renamed(shape)
    added = json.loads(after)["added_tokens"]
    numbers = [token["id"] for token in added]
    assert numbers == sorted(set(numbers))
    concepts = [token for token in added if token["id"] in ids]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    assert concepts == [{"id": token, "content": CONCEPT.format(number), **flags} for number, token in enumerate(ids)]


@every_shape
def test_a_concept_is_one_token_where_special_tokens_are_allowed(shape: Shape) -> None:
    _, after = pair(shape)
    ids = renamed(shape)[2]
    for number, token in enumerate(ids):
        name = CONCEPT.format(number)
        assert encode(after, name, special=True) == [token]
        around = encode(after, f"a{name}{name}a", special=True)
        assert [other for other in around if other in ids] == [token, token]


@every_shape
@pytest.mark.parametrize("around", ["", " ", "a", "1", "<", ">", "\n", "語", "😀", "<concept_0>"])
def test_text_never_becomes_a_concept_where_special_tokens_are_not_allowed(shape: Shape, around: str) -> None:
    before, after = pair(shape)
    ids = set(renamed(shape)[2])
    for name in map(CONCEPT.format, range(COUNT)):
        for text in (name, f"{around}{name}{around}", f"{around}{name}", f"{name}{around}", name.upper()):
            assert not ids & set(encode(after, text, special=False))
            assert not ids & set(encode(before, text, special=False))


@every_shape
@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["<concept_0>", "<concept_", "1", ">", "<", " ", "＜", "a", "concept_2", "\u200b"]))
)
def test_text_made_of_parts_of_names_never_becomes_a_concept(shape: Shape, parts: list[str]) -> None:
    _, after = pair(shape)
    assert not set(renamed(shape)[2]) & set(encode(after, "".join(parts), special=False))


@pytest.mark.parametrize("shape", UNGUARDED)
def test_without_the_added_pre_tokenizer_text_would_become_a_concept(shape: Shape) -> None:
    before, after, ids = renamed(shape)
    bare = json.loads(after) | {"pre_tokenizer": json.loads(before)["pre_tokenizer"]}
    assert ids[0] in encode(Tokenizer.from_str(json.dumps(bare)), "<concept_0>", special=False)


def test_a_pre_tokenizer_is_added_at_the_end_of_those_there_are() -> None:
    tokenizer = words()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits()])
    content = json.loads(rename_unused(tokenizer.to_str().encode(), 1)[0])
    kinds = [step["type"] for step in content["pre_tokenizer"]["pretokenizers"]]
    assert kinds == ["WhitespaceSplit", "Digits"]  # digits are cut off, so no piece holds a name
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit()])
    content = json.loads(rename_unused(tokenizer.to_str().encode(), 1)[0])
    assert [step["type"] for step in content["pre_tokenizer"]["pretokenizers"]] == ["WhitespaceSplit", "Split"]


def test_no_pre_tokenizer_is_added_for_tokens_outside_the_vocabulary() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, [], ignore_merges=True))
    tokenizer.add_special_tokens(["<unused0>"])
    out, ids = rename_unused(tokenizer.to_str().encode(), 1)
    assert ids == (1,)
    assert json.loads(out)["pre_tokenizer"] is None
    assert encode(Tokenizer.from_buffer(out), "a<concept_0>", special=False) == [0]


@pytest.mark.parametrize("shape", (gemma, llama3, sentencepiece))
def test_text_that_spells_a_concept_comes_back(shape: Shape) -> None:
    _, after = pair(shape)
    text = "a<concept_0> <concept_1>"
    assert after.decode(encode(after, text, special=False), skip_special_tokens=False) == text
    assert after.decode(encode(after, text, special=True), skip_special_tokens=False).split() == text.split()
    assert after.decode(encode(after, text, special=True), skip_special_tokens=True).strip() == "a"


@every_shape
def test_transformers_takes_the_tokenizer(shape: Shape) -> None:
    ids = renamed(shape)[2]
    names = [CONCEPT.format(number) for number in range(COUNT)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_buffer(renamed(shape)[1]))
    assert tokenizer.convert_tokens_to_ids(names) == list(ids)
    assert tokenizer.convert_ids_to_tokens(list(ids)) == names
    assert tokenizer(names[1], add_special_tokens=False)["input_ids"] == [ids[1]]
    assert tokenizer.decode(list(ids), skip_special_tokens=True) == ""


def vocabulary(*names: str) -> bytes:
    """A tokenizer of nothing but names."""
    return Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)})).to_str().encode()


@pytest.mark.parametrize(
    "name",
    [
        *("[unused0]", "[unused99]", "<unused0>", "<unused6241>", "<|unused_1|>", "[UNUSED_TOKEN_12]", ">>UNUSED_7<<"),
        *("<|reserved_special_token_0|>", "<|reserved_200000|>", "<|reserved_token_163600|>", "<SPECIAL_20>"),
        *("<|text_post_train_reserved_special_token_3|>", "<|vision_reserved_special_token_1021|>", "[control_8]"),
        *("<|extra_0|>", "<|dummy_0|>", "<|placeholder_1|>", "<|placeholder6|>", "<reserved_0>", "[reserved_0]"),
        "<｜place▁holder▁no▁0｜>",
    ],
)
def test_names_of_reserved_tokens_are_known(name: str) -> None:
    assert rename_unused(vocabulary("word", name), 1)[1] == (1,)


@pytest.mark.parametrize(
    "name",
    [
        *("<extra_id_0>", "<|fim_prefix|>", "<pad_0>", "<unused>", "<unused0", "a<unused0>", "<unused0>\n", "[MASK]"),
        *("<|reserved_x|>", "<|eot_id|>", "<0x0A>", "unused0", "<UNUSED0>", "<unused٣>", "<|begin_of_text|>"),
    ],
)
def test_names_of_tokens_in_use_are_left_alone(name: str) -> None:
    with pytest.raises(InputFailure, match="0 unused tokens were found"):
        rename_unused(vocabulary("word", name), 1)


def test_a_pattern_is_matched_as_a_whole_and_taken_by_id() -> None:
    tokenizer = vocabulary("<x_2>", "x_1", "y<x_3>", "<x_4>z", "<x_1>", "<unused0>")
    assert rename_unused(tokenizer, 2, pattern=r"<x_\d>")[1] == (0, 4)
    assert rename_unused(tokenizer, 2, pattern=r"<x_1>|x_1")[1] == (1, 4)


def test_a_pattern_that_backtracking_never_finishes_is_no_trouble() -> None:
    tokenizer = vocabulary("x" * 500, "xxy")
    assert rename_unused(tokenizer, 1, pattern="(x+x+)+y")[1] == (1,)


@pytest.mark.parametrize("pattern", ["(", "a)|(b", "[z-a]", "(?<=a)b", r"(a)\1", "a{9999}", "x\n(", "\udcff"])
def test_a_bad_pattern_is_refused(pattern: str) -> None:
    refuse("not a pattern for unused tokens", vocabulary("ab", "cd"), 1, pattern=pattern)


def refuse(why: str, tokenizer: bytes, count: int, **choice: Any) -> None:
    with pytest.raises(InputFailure, match=why) as failure:
        rename_unused(tokenizer, count, **choice)
    assert "\n" not in str(failure.value)


def test_listed_tokens_are_taken_in_their_order() -> None:
    tokenizer = vocabulary("word", "<a>", "<b>", "<unused0>", "<c>")
    out, ids = rename_unused(tokenizer, 2, listed=["<c>", "<a>", "<b>"])
    assert ids == (4, 1)
    assert Tokenizer.from_buffer(out).token_to_id("<concept_0>") == 4
    assert [token["id"] for token in json.loads(out)["added_tokens"]] == [1, 4]


def test_a_listed_token_that_is_unknown_or_listed_twice_is_refused() -> None:
    tokenizer = vocabulary("word", "<a>", "<b>\n")
    refuse("no token '<z>'", tokenizer, 1, listed=["<a>", "<z>"])
    refuse("'<a>' is listed twice", tokenizer, 1, listed=["<a>", "<a>"])
    refuse("list and by a pattern", tokenizer, 1, listed=["<a>"], pattern="a")
    refuse("2 concept tokens were asked for, and 1 unused tokens", tokenizer, 2, listed=["<b>\n"])


def bert_with(**parts: Any) -> bytes:
    return json.dumps(json.loads(bert().to_str()) | parts).encode()


TEMPLATE_WITH_UNUSED = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "start", "type_id": 2}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"start": {"id": "start", "ids": [1], "tokens": ["start"]}},
}
PADDING = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
REPLACE = {"type": "Replace", "pattern": {"String": "x"}, "content": "[unused0]"}


@pytest.mark.parametrize(
    "parts",
    [
        {"post_processor": TEMPLATE_WITH_UNUSED},
        {"post_processor": {"type": "BertProcessing", "sep": ["x", 1], "cls": ["[CLS]", 7]}},
        {"padding": PADDING | {"pad_id": 1, "pad_type_id": 2, "pad_token": "x"}},
        {"padding": PADDING | {"pad_id": 0, "pad_type_id": 0, "pad_token": "[unused0]"}},
        {"normalizer": {"type": "Sequence", "normalizers": [REPLACE]}},
        {"decoder": REPLACE},
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"String": "[unused0]"},
                "behavior": "Removed",
                "invert": False,
            }
        },
        {"model": json.loads(bert().to_str())["model"] | {"unk_token": "[unused0]"}},
    ],
)
def test_a_token_that_a_part_names_is_not_unused(parts: dict[str, Any]) -> None:
    tokenizer = bert_with(**parts)
    assert rename_unused(tokenizer, 5)[1] == (2, 3, 4, 5, 10)
    refuse(rf"'\[unused0\]' is not unused: its {next(iter(parts))} needs it", tokenizer, 1, listed=["[unused0]"])


def test_the_unknown_token_of_a_unigram_model_is_not_unused() -> None:
    tokenizer = Tokenizer(models.Unigram([("<unused0>", 0.0), ("<unused1>", 0.0), ("aa", -1.5)], unk_id=0))
    assert rename_unused(tokenizer.to_str().encode(), 1)[1] == (1,)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(("name", "expected"), [("<un", (4, 5)), ("used0>", (4, 5)), ("<unused0>", (4, 5))])
def test_a_token_that_takes_part_in_a_merge_is_not_unused(legacy: bool, name: str, expected: tuple[int, ...]) -> None:
    vocabulary = {
        name: number for number, name in enumerate(["zz", "<un", "used0>", "<unused0>", "<unused1>", "<un1>"])
    }
    content = json.loads(Tokenizer(models.BPE(vocabulary, [("<un", "used0>")])).to_str())
    if legacy:
        content["model"]["merges"] = ["<un used0>"]
    tokenizer = json.dumps(content).encode()
    assert rename_unused(tokenizer, 2, pattern=r"<un\w*>?|used0>")[1] == expected
    refuse("is not unused: a merge needs it", tokenizer, 1, listed=[name])


def test_what_a_merge_makes_of_a_continued_word_is_not_unused() -> None:
    vocabulary = {"a": 0, "##b": 1, "ab": 2, "ac": 3}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "##b")], continuing_subword_prefix="##"))
    assert rename_unused(tokenizer.to_str().encode(), 1, pattern="a.")[1] == (3,)


def test_characters_and_bytes_are_not_unused() -> None:
    refuse("'<0x0A>' is not unused: byte fallback", sentencepiece().to_str().encode(), 1, listed=["<0x0A>"])
    refuse("'a' is not unused: text, as a single character", unsplit_bpe().to_str().encode(), 1, listed=["a"])


def test_too_few_unused_tokens_are_refused_with_examples() -> None:
    examples = r"\('\[unused0\]', '\[unused1\]', '\[unused2\]', …\)"
    refuse(rf"7 concept tokens were asked for, and 6 unused tokens were found {examples}: ask", bert_with(), 7)
    refuse("1 concept tokens were asked for, and 0 unused tokens were found: ", vocabulary("a"), 1)


@pytest.mark.parametrize("count", [0, -1])
def test_no_concept_tokens_are_refused(count: int) -> None:
    refuse("expected at least 1", bert_with(), count)


def test_a_concept_that_exists_is_refused() -> None:
    tokenizer = vocabulary("<unused0>", "<unused1>", "<concept_1>")
    assert rename_unused(tokenizer, 1)[1] == (0,)
    refuse("has a token '<concept_1>' already", tokenizer, 2)


@every_published
def test_it_refuses_its_own_output(shape: Shape) -> None:
    refuse("has a token '<concept_0>' already", renamed(shape)[1], 1)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe", b'{"version":\n', b'{"model":{}}'])
def test_what_is_no_tokenizer_is_refused(content: bytes) -> None:
    refuse("not a tokenizer.json", content, 1)


def test_a_tokenizer_without_vocabulary_is_refused() -> None:
    content = json.loads(bert().to_str())
    del content["model"]["vocab"]
    refuse("not a tokenizer.json", json.dumps(content).encode(), 1)


def test_an_unused_token_loses_the_flags_it_had() -> None:
    tokenizer = gemma()
    tokenizer.add_tokens([AddedToken("<unused9>", lstrip=True, rstrip=True, single_word=True, normalized=True)])
    out, (token,) = rename_unused(tokenizer.to_str().encode(), 1, listed=["<unused9>"])
    assert encode(Tokenizer.from_buffer(out), "a <concept_0>a", special=True).count(token) == 1
    assert Tokenizer.from_buffer(out).get_added_tokens_decoder()[token] == AddedToken(
        "<concept_0>", special=True, normalized=False
    )


def test_a_file_that_says_no_more_than_it_must_is_taken() -> None:
    content = b'{"model": {"vocab": {"a": 0, "<unused0>": 1}, "unk_token": "a"}}'
    out, ids = rename_unused(content, 1)
    assert ids == (1,)
    assert encode(Tokenizer.from_buffer(out), "<concept_0>", special=True) == [1]
    assert encode(Tokenizer.from_buffer(out), "<concept_0>", special=False) == [0, 0]
