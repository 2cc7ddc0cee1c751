"""Whether two tokenizers give every text the same ids: a model reads the ids it was trained on, and no others.

- equal as they are written, they are equal; else every id must stand for the same token, and samples be cut alike
- names of special tokens are text here, as they are when a corpus is tokenized
"""

from collections.abc import Collection, Iterable

from tokenizers import Tokenizer

# Where pre-tokenizers and normalizers differ: white space, digits, marks, case, scripts, composed letters.
SAMPLES = (
    "  two  spaces,\n\ttab \r\n\n\n end ",
    'It\'s 3.14159 or 1,234,567; x_y(z)[0] != "HTTPServer" — naïve',
    "e\u0301te\u0301 Straße İstanbul 漢字かな 🙂👩\u200d💻 \u00a0\u3000x",
)


def difference_between(
    one: Tokenizer, other: Tokenizer, renamed: Collection[int] = (), texts: Iterable[str] = ()
) -> str | None:
    """What sets them apart, in words; None when nothing does. Tokens in `renamed` may have two names."""
    for tokenizer in (one, other):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
    if one.to_str() == other.to_str():
        return None
    names, others = ({token: name for name, token in each.get_vocab().items()} for each in (one, other))
    unlike = [
        token
        for token in sorted(names.keys() | others.keys())
        if names.get(token) != others.get(token) and token not in renamed
    ]
    if unlike:
        first = unlike[0]
        return f"id {first} is {names.get(first)!r} in one, {others.get(first)!r} in the other ({len(unlike)} such ids)"
    for text in (*SAMPLES, *texts):
        if one.encode(text, add_special_tokens=False).ids != other.encode(text, add_special_tokens=False).ids:
            return f"they cut the text {text[:40]!r} in other places"
    return None
