"""Whether fastokens gives the same ids as tokenizers: on every document of a corpus, and on strings made to trip it.

- three tokenizers: with GPT-2's pattern as cpipe trains it, one laid out as GPT-2's, one as Llama 3's
- the strings are drawn with a fixed seed from every plane of Unicode, assigned or not, and from what patterns treat
  apart: white space, contractions, digits, line ends, emoji, combining marks, long runs, text of special tokens
- equality holds for these versions of both libraries: which code points are letters depends on their Unicode tables
"""

import importlib.util
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from bench_tokenize_ids import Ids, encode_all, load_fastokens, load_tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SAMPLE_CHARACTERS = 20_000_000  # of text that the tokenizers are trained on
SHOWN = 20  # mismatches of each row
SHOWN_CHARACTERS = 200  # of each text
SHOWN_IDS = 8  # of each text, from the first that differs
SEED = 7
RUN_CHARACTERS = 20_000
RUNS_EVERY = 1000  # one string in so many is a run of that length
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END = "<|endoftext|>"
LLAMA3_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

SPACES = " \t\n\r\v\f\x1c\x85\u00a0\u1680\u2003\u2009\u2028\u2029\u202f\u205f\u3000\u200b\u2060\ufeff"
LINE_ENDS = ("\n", "\r", "\r\n", "\n\n", "\r\r\n", " \n", "\n ", "\t\r\n")
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "'Re", "’s", "'ſ", "''s", " 's", "'\n", "'")
WORDS = ("I", " of", " don", "naïve", " été", " Straße", "слово", " 言葉", "한국어", " كلمة", "हिन्दी", "ﬁ", "ǅ", "_x")
EMOJI = (
    *"😀☃👍\u200d\ufe0f",
    "👍\U0001f3fd",  # with a skin tone
    "👩\u200d👩\u200d👧",  # a family, joined
    "🇩🇪",  # a flag, of two letters
    "❤\ufe0f",
    "1\ufe0f\u20e3",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # a flag, spelt in tags
)
DIGITS = "0123456789٣४๕²½Ⅷ①𝟘"
MARKS = tuple(range(0x0300, 0x0370)) + tuple(range(0x20D0, 0x20F1)) + tuple(range(0x0591, 0x05C8)) + (0x0E31, 0x093F)
SURROGATES = range(0xD800, 0xE000)  # no characters: a string with one has no UTF-8


def prove(texts: Sequence[str], vocab_size: int, strings: int, work: Path) -> tuple[str, Ids, list[dict[str, Any]]]:
    """Train the tokenizers and compare the libraries, printing what is found.

    Gives the path of the first tokenizer, the ids of `texts` that tokenizers makes with it, and the table's rows.
    """
    trained = _train(texts, vocab_size, work)
    main = next(iter(trained.values()))
    if not importlib.util.find_spec("fastokens"):
        print("fastokens is not installed: there is nothing to compare\n")
        return main, encode_all(load_tokenizers(main), texts), []
    corpora = {"corpus": texts, "fuzzed strings": list(fuzzed(strings))}
    reference = None
    rows = []
    print("| tokenizer | texts | compared | ids | sha256 by tokenizers | by fastokens | texts that differ |")
    print("|---|---|--:|--:|---|---|--:|")
    for name, path in trained.items():
        for kind, compared in corpora.items():
            expected, found = (encode_all(load(path), compared) for load in (load_tokenizers, load_fastokens))
            reference = reference or expected
            mismatches = _mismatches(compared, expected, found)
            print(
                f"| {name} | {kind} | {len(compared)} | {len(expected.values)} | {expected.sha256[:16]} "
                f"| {found.sha256[:16]} | {len(mismatches)} |",
                flush=True,
            )
            sums = {"tokenizers": expected.sha256, "fastokens": found.sha256}
            row = {"tokenizer": name, "texts": kind, "compared": len(compared), "ids": len(expected.values)}
            rows.append(row | {"sha256": sums, "mismatches": mismatches})
    _print_mismatches(rows)
    return main, reference or encode_all(load_tokenizers(main), texts), rows


def _train(texts: Sequence[str], vocab_size: int, work: Path) -> dict[str, str]:
    """Tokenizers by name, trained on documents from all over the text, saved in `work`."""
    size = sum(map(len, texts))
    sample = list(islice(texts, 0, None, -(-size // SAMPLE_CHARACTERS)))
    trained = {}
    for name, train in (("trained", train_bpe), ("like GPT-2", train_like_gpt2), ("like Llama 3", train_like_llama3)):
        trained[name] = str(work / f"{name.replace(' ', '-').lower()}.json")
        train(sample, vocab_size).save(trained[name])
    return trained


def _mismatches(texts: Sequence[str], expected: Ids, found: Ids) -> list[dict[str, Any]]:
    return [
        {"text": text, "tokenizers": first.tolist(), "fastokens": second.tolist()}
        for text, first, second in zip(texts, expected, found, strict=True)
        if not np.array_equal(first, second)
    ]


def _print_mismatches(rows: Sequence[dict[str, Any]]) -> None:
    print()
    for row in rows:
        for text, *both in (mismatch.values() for mismatch in row["mismatches"][:SHOWN]):
            at = next((number for number, (a, b) in enumerate(zip(*both, strict=False)) if a != b), min(map(len, both)))
            first, second = (ids[at : at + SHOWN_IDS] for ids in both)
            shown = f"{text[:SHOWN_CHARACTERS]!a} of {len(text)} characters"
            print(f"- {row['tokenizer']}, {shown}: from id {at} on {first} by tokenizers, {second} by fastokens")


def train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's pattern."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _trained(tokenizer, texts, vocab_size, [END])


def train_like_gpt2(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """The parts of GPT-2's tokenizer.json."""
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return _trained(tokenizer, texts, vocab_size, [END])


def train_like_llama3(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """The parts of Llama 3's tokenizer.json: its pattern, words of the vocabulary taken whole, a token before all."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trained = _trained(tokenizer, texts, vocab_size, list(LLAMA3_SPECIALS))
    begin = (LLAMA3_SPECIALS[0], trained.token_to_id(LLAMA3_SPECIALS[0]))
    trained.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin]),
        ]
    )
    return trained


def _trained(tokenizer: Tokenizer, texts: Sequence[str], vocab_size: int, specials: list[str]) -> Tokenizer:
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def fuzzed(count: int) -> Iterator[str]:
    """`count` strings, always the same: half of one kind each, half mixed from several."""
    draw = random.Random(SEED)
    for number in range(count):
        if number % RUNS_EVERY == 0:
            yield (_any_character(draw) if number % (2 * RUNS_EVERY) else draw.choice(" \n\taZ1'.é語")) * RUN_CHARACTERS
        elif number % 2:
            yield draw.choice(KINDS)(draw)
        else:
            yield "".join(draw.choice(KINDS)(draw) for _ in range(draw.randint(2, 8)))


def _any_character(draw: random.Random) -> str:
    """A code point of any plane with equal chance, private and unassigned ones included."""
    while (code := draw.randrange(17) * 0x10000 + draw.randrange(0x10000)) in SURROGATES:
        pass
    return chr(code)


def _plane_0(draw: random.Random) -> str:
    codes = (draw.randrange(0x10000) for _ in range(draw.randint(1, 24)))
    return "".join(chr(code) for code in codes if code not in SURROGATES)


def _of(parts: Sequence[str], longest: int) -> Callable[[random.Random], str]:
    return lambda draw: "".join(draw.choices(parts, k=draw.randint(1, longest)))


def _run(draw: random.Random) -> str:
    return draw.choice((*SPACES, *DIGITS, *".-'=#aZé語", _any_character(draw))) * draw.randint(2, 300)


def _special(draw: random.Random) -> str:
    text = draw.choice((END, *LLAMA3_SPECIALS))
    cut = draw.randint(1, len(text))
    return draw.choice((text, text[:cut], text[cut:], f" {text} ", text * 2, text.upper()))


def _marked(draw: random.Random) -> str:
    letters = draw.choices("aeiounकกשé😀 '1", k=draw.randint(1, 12))
    return "".join(letter + "".join(chr(draw.choice(MARKS)) for _ in range(draw.randrange(4))) for letter in letters)


def _number(draw: random.Random) -> str:
    form = draw.choice(("{}", " {}", "{}.{}", "{},{}", "-{}e{}", "{}{}", "${}%", "{}'s"))
    return form.format(*("".join(draw.choices(DIGITS, k=draw.randint(1, 9))) for _ in range(2)))


KINDS: tuple[Callable[[random.Random], str], ...] = (
    _of(SPACES, 20),
    _of(LINE_ENDS, 12),
    _of(tuple(SPACES) + LINE_ENDS + WORDS, 24),
    _of(WORDS + CONTRACTIONS, 16),
    _of(EMOJI, 12),
    _of(tuple(map(chr, range(128))), 40),
    lambda draw: "".join(_any_character(draw) for _ in range(draw.randint(1, 24))),
    lambda draw: "".join(_any_character(draw) + draw.choice(CONTRACTIONS) for _ in range(draw.randint(1, 8))),
    _plane_0,
    _run,
    _special,
    _marked,
    _number,
)
