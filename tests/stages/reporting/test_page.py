import pytest

from stages.reporting.page import duration, number, picture, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (64_300, "64.3 kB"),
        (2_150_000_000, "2.15 GB"),
        (10**400, "1,000,000 TB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_numbers_and_durations() -> None:
    assert [number(None), number(1234567), number(1.23456), number(2.5, 1)] == ["–", "1,234,567", "1.2346", "2.5"]
    assert [duration(3.14), duration(119), duration(3600), duration(100_000)] == [
        "3.1 s",
        "119.0 s",
        "60 min",
        "27 h 47 min",
    ]


def test_a_picture_is_its_bytes() -> None:
    assert picture(b"\x89PNG") == "data:image/png;base64,iVBORw=="
