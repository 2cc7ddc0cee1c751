import json
from pathlib import Path

import pytest

from schemas.tokenize_text import TokenizeConfig
from stages.data.corpus import find_corpus
from stages.data.selection import split_of
from stages.data.text_sample import SampleJob, join_samples, sample_part, smallest


def sample(folder: Path, texts: list[str], size: int, shard_bytes: int = 1 << 20, **settings: int) -> list[str]:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": f"d{number}"}) + "\n" for number, text in enumerate(texts)))
    config = TokenizeConfig(
        inputs=(str(path),), train_bytes=size, shard_bytes=shard_bytes, valid_fraction=0.2, **settings
    )
    corpus = find_corpus(config, folder)
    return join_samples((sample_part(SampleJob(corpus, part)) for part in reversed(corpus.parts)), size)


TEXTS = [f"document {number} é".ljust(60) for number in range(200)]
TRAINING = {text for number, text in enumerate(TEXTS) if split_of(f"d{number}", 0.2) == "train"}


@pytest.mark.parametrize("size", [100, 3000, 1 << 20])
def test_the_sample_does_not_depend_on_how_the_corpus_is_cut(tmp_path: Path, size: int) -> None:
    whole = sample(tmp_path, TEXTS, size)
    assert sample(tmp_path, TEXTS, size, shard_bytes=1024) == whole
    assert sum(len(text.encode()) for text in whole) <= size
    assert set(whole) <= TRAINING


def test_all_of_a_small_training_split_is_in_it(tmp_path: Path) -> None:
    assert sorted(sample(tmp_path, TEXTS, 1 << 20)) == sorted(TRAINING)


def test_a_long_document_is_drawn_from_piece_by_piece(tmp_path: Path) -> None:
    texts = ["long " * 100_000, *TEXTS]
    drawn = sample(tmp_path, texts, 100_000)
    assert 2 <= sum(piece.strip().startswith("long") for piece in drawn) < 10


def test_a_limit_of_a_source_holds_for_the_sample_too(tmp_path: Path) -> None:
    drawn = sample(tmp_path, TEXTS, 1 << 20, limit_bytes_per_source=1000)
    assert 0 < sum(len(text.encode()) for text in drawn) <= 1000


def test_the_smallest_hashes_win_and_one_piece_always_stays() -> None:
    drawn = [(5, "eeee"), (1, "a"), (3, "ccc"), (2, "bb")]
    assert smallest(drawn, 6) == [(1, "a"), (2, "bb"), (3, "ccc")]
    assert smallest(drawn, 0) == [(1, "a")]
    assert smallest([], 10) == []
