import pickle

import pytest

from schemas.failures import Failure, IntegrityFailure, UsageFailure, on_one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no a/b.txt: give another", "no a/b.txt: give another"),
        ("naïve – “日本” …", "naïve – “日本” …"),
        ("a\nb\rc\td", "a\\nb\\rc\\td"),
        ("\x1b[2J\x07\x9b", "\\x1b[2J\\x07\\x9b"),
        ("\udcff \u2028 \u202e", "\\udcff \\u2028 \\u202e"),
        ("\0", "\\x00"),
    ],
)
def test_whatever_stands_in_a_message_it_is_one_line(text: str, shown: str) -> None:
    assert str(UsageFailure(text)) == on_one_line(text) == shown
    shown.encode()
    assert str(Failure(shown)) == shown  # told again, it stays as it is


def test_the_middle_of_a_long_message_is_left_out() -> None:
    told = str(IntegrityFailure(f"key {'k' * 10**6}: mend it"))
    assert told.startswith("key kkk") and told.endswith("kkk: mend it") and " … " in told and len(told) < 2000


def test_a_message_may_be_passed_between_processes() -> None:
    assert str(pickle.loads(pickle.dumps(UsageFailure("a\nb")))) == "a\\nb"
