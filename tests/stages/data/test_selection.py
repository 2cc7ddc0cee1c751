import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.failures import InputFailure
from schemas.tokenize_text import TokenizeConfig
from stages.data.parts import Part, Piece
from stages.data.reading.readers import Rejected, Span
from stages.data.reading.sources import find_files
from stages.data.selection import Selection, split_of, symbol_share

PUNCTUATED = "!!! ??? ... --- +++ === a"


def selection(folder: Path, *files: list[Any], skip: Any = None, **settings: Any) -> Selection:
    for number, records in enumerate(files):
        lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
        (folder / f"{number}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    found = find_files([str(folder)])
    part = Part(0, tuple(Piece(number, Span()) for number in range(len(found))))
    return Selection(TokenizeConfig(**settings), found, ["text"] * len(found), part, skip)


def test_the_split_of_a_group_does_not_depend_on_the_corpus() -> None:
    held_out = {fraction: {n for n in range(5000) if split_of(f"g{n}", fraction) == "valid"} for fraction in (0.1, 0.3)}
    assert held_out[0.1] < held_out[0.3]
    assert 400 < len(held_out[0.1]) < 600
    assert 1350 < len(held_out[0.3]) < 1650


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    texts = ["", " \n", "short", "just right, really", "x" * 50, PUNCTUATED, "also good enough"]
    found = selection(
        tmp_path, [{"text": text} for text in texts], min_characters=6, max_characters=40, max_symbol_share=0.5
    )
    assert [document.text for document in found] == ["just right, really", "also good enough"]
    assert found.left_out == {"empty": 2, "too_short": 1, "too_long": 1, "symbols": 1}


def test_nothing_but_white_space_is_left_out_unasked(tmp_path: Path) -> None:
    texts = ["a", "!" * 1000, "x" * 100_000]
    found = selection(tmp_path, [{"text": text} for text in texts])
    assert [document.text for document in found] == texts
    assert not found.left_out


def test_a_source_ends_with_the_document_that_passes_its_limit(tmp_path: Path) -> None:
    records = [{"text": "x" * 10, "source": source} for source in "aabab" for _ in range(2)]
    found = selection(tmp_path, records, limit_bytes_per_source=25)
    assert [document.source for document in found] == ["a", "a", "a", "b", "b", "b"]
    assert found.left_out == {"over_limit": 4}


def test_it_knows_with_which_document_each_file_begins(tmp_path: Path) -> None:
    found = selection(tmp_path, [{"text": "a"}, {"text": "b"}], [{"text": " "}], [{"text": "c"}])
    assert len(list(found)) == 3
    assert found.begins == [0, 2, 2]


def test_a_bad_record_stops_the_reading_or_is_handed_over(tmp_path: Path) -> None:
    records = [{"text": "a"}, "{", {"text": 3}, {"text": "b"}]
    with pytest.raises(InputFailure, match=r"0\.jsonl line 2 is not JSON"):
        list(selection(tmp_path, records))
    handed: list[Rejected] = []
    found = selection(tmp_path, records, skip=handed.append)
    assert [document.text for document in found] == ["a", "b"]
    assert [(rejected.file, rejected.line) for rejected in handed] == [("0.jsonl", 2), ("0.jsonl", 3)]
    assert found.left_out == {"faulty": 2}


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_the_symbol_share_counts_what_is_neither_letter_mark_number_nor_space(text: str) -> None:
    symbols = [c for c in text if unicodedata.category(c)[0] not in "LMNZ" and not c.isspace()]
    assert symbol_share(text) == pytest.approx(len(symbols) / len(text))
