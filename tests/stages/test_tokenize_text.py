import json
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from schemas.failures import InputFailure, UsageFailure
from schemas.tokenize_text import SPLITS, TokenizeConfig, TokenizeManifest
from stages import tokenize_text
from stages.data.token_store import TokenStore
from stages.tokenize_text import split_of

RECORDS = [
    {
        "text": f"Document {number} of {source}: été, 日本, 😀 <|endoftext|>\r\n tail  ",
        "source": source,
        "page": f"page {number // 4}",
    }
    for source in ("law", "code")
    for number in range(100)
]


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def config_for(*inputs: str, **settings: Any) -> TokenizeConfig:
    return TokenizeConfig(inputs=inputs, **{"vocab_size": 300, "valid_fraction": 0.2, **settings})


def texts_of(run_dir: Path, manifest: TokenizeManifest) -> dict[str, list[str]]:
    tokenizer = Tokenizer.from_file(str(manifest.output("tokenizer.json").check(run_dir)))
    texts = {}
    for split in SPLITS:
        store = TokenStore.open([ref.check(run_dir) for ref in manifest.shards(split)])
        rows = [store.tokens(number) for number in range(len(store))]
        assert all(manifest.metrics.end_of_text not in row for row in rows)
        texts[split] = [tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in rows]
        assert store.bytes.tolist() == [len(text.encode()) for text in texts[split]]
    return texts


def test_every_document_comes_back_from_one_of_the_splits(tmp_path: Path) -> None:
    manifest = tokenize_text.run(config_for(write(tmp_path / "a.jsonl", RECORDS)), tmp_path / "run")
    texts = texts_of(tmp_path / "run", manifest)
    assert Counter(texts["train"] + texts["valid"]) == Counter(record["text"] for record in RECORDS)
    assert 20 < len(texts["valid"]) < 60


def test_the_metrics_count_what_the_shards_hold(tmp_path: Path) -> None:
    blank = [{"text": " \n", "source": "law"}, {"text": "", "source": "law"}]
    manifest = tokenize_text.run(config_for(write(tmp_path / "a.jsonl", RECORDS + blank)), tmp_path / "run")
    metrics = manifest.metrics
    for split, counts in (("train", metrics.train), ("valid", metrics.valid)):
        store = TokenStore.open([ref.check(tmp_path / "run") for ref in manifest.shards(split)])
        assert (len(store), store.lengths.sum(), store.bytes.sum()) == (counts.documents, counts.tokens, counts.bytes)
        assert sum(ref.tokens or 0 for ref in manifest.shards(split)) == counts.tokens
    assert list(metrics.sources) == ["code", "law"]
    assert [counts.documents for counts in metrics.sources.values()] == [100, 100]
    assert metrics.skipped_empty == 2
    assert (metrics.vocab_size, metrics.encoder.split()[0]) == (300, "tokenizers")


def test_a_group_never_straddles_the_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS)
    manifest = tokenize_text.run(config_for(path, group_column="page"), tmp_path / "run")
    page_of = {record["text"]: record["page"] for record in RECORDS}
    pages = {split: {page_of[text] for text in texts} for split, texts in texts_of(tmp_path / "run", manifest).items()}
    assert pages["train"] and pages["valid"]
    assert not pages["train"] & pages["valid"]


def test_the_split_of_a_group_does_not_depend_on_the_corpus() -> None:
    held_out = {fraction: {n for n in range(5000) if split_of(f"g{n}", fraction) == "valid"} for fraction in (0.1, 0.3)}
    assert held_out[0.1] < held_out[0.3]
    assert 400 < len(held_out[0.1]) < 600
    assert 1350 < len(held_out[0.3]) < 1650


def test_the_order_and_place_of_the_files_do_not_matter(tmp_path: Path) -> None:
    first = [write(tmp_path / "one" / name, RECORDS[start::2]) for start, name in enumerate(("a.jsonl", "b.jsonl"))]
    write(tmp_path / "two/deep/a.jsonl", RECORDS[0::2])
    write(tmp_path / "two/b.jsonl", RECORDS[1::2])
    runs = [
        tokenize_text.run(config_for(*first), tmp_path / "run1"),
        tokenize_text.run(config_for(*reversed(first)), tmp_path / "run2"),
        tokenize_text.run(config_for(str(tmp_path / "two")), tmp_path / "run3"),
    ]
    assert len({run.content_digest() for run in runs}) == 1
    assert [ref.name for ref in runs[0].inputs] == ["a.jsonl", "b.jsonl"]


def test_equal_file_names_from_two_folders_both_count(tmp_path: Path) -> None:
    paths = [write(tmp_path / name / "a.jsonl", RECORDS[start::2]) for start, name in enumerate(("one", "two"))]
    manifest = tokenize_text.run(config_for(*paths), tmp_path / "run")
    assert [ref.name for ref in manifest.inputs] == ["one/a.jsonl", "two/a.jsonl"]
    store = TokenStore.open([ref.check(tmp_path / "run") for split in SPLITS for ref in manifest.shards(split)])
    assert len(set(store.ids)) == len(RECORDS)


def test_a_second_run_is_up_to_date_until_a_file_changes(tmp_path: Path) -> None:
    config = config_for(write(tmp_path / "a.jsonl", RECORDS))
    manifest = tokenize_text.run(config, tmp_path / "run")
    assert tokenize_text.run(config, tmp_path / "run") == manifest
    write(tmp_path / "a.jsonl", RECORDS[:-1])
    with pytest.raises(UsageFailure, match=r"its input a\.jsonl has changed"):
        tokenize_text.run(config, tmp_path / "run")
    assert tokenize_text.run(config, tmp_path / "run", force=True).key != manifest.key


def test_a_limit_takes_the_first_bytes_of_each_source(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS)
    manifest = tokenize_text.run(config_for(path, limit_bytes_per_source=2000), tmp_path / "run")
    expected = []
    for source in ("law", "code"):
        left = 2000
        for record in (record for record in RECORDS if record["source"] == source):
            left -= len(record["text"].encode())
            expected += [record["text"]] if left >= 0 else []
    texts = texts_of(tmp_path / "run", manifest)
    assert Counter(texts["train"] + texts["valid"]) == Counter(expected)
    assert manifest.metrics.skipped_by_limit == len(RECORDS) - len(expected)
    assert all(1900 < counts.bytes <= 2000 for counts in manifest.metrics.sources.values())


def test_a_given_tokenizer_is_taken_byte_for_byte_and_gives_the_same_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS)
    trained = tokenize_text.run(config_for(path), tmp_path / "run1")
    tokenizer = trained.output("tokenizer.json").check(tmp_path / "run1")
    taken = tokenize_text.run(config_for(path, tokenizer=str(tokenizer)), tmp_path / "run2")
    assert [ref.digest for ref in taken.outputs] == [ref.digest for ref in trained.outputs]
    assert [ref.name for ref in taken.inputs] == ["a.jsonl", "tokenizer.json"]
    assert taken.metrics == trained.metrics


def test_the_tokenizer_learns_from_a_bounded_sample_of_the_training_split_only(tmp_path: Path) -> None:
    held_out = [f"g{number}" for number in range(200) if split_of(f"g{number}", 0.2) == "valid"]
    training = [f"g{number}" for number in range(200) if split_of(f"g{number}", 0.2) == "train"]
    records = [{"text": "abab " * 20, "id": name} for name in training] + [
        {"text": "xyxy " * 20, "id": name} for name in held_out
    ]
    manifest = tokenize_text.run(config_for(write(tmp_path / "a.jsonl", records)), tmp_path / "run")
    vocabulary = json.loads((tmp_path / "run/tokens/tokenizer.json").read_text())["model"]["vocab"]
    assert "abab" in vocabulary
    assert "xy" not in vocabulary
    small = tokenize_text.run(config_for(str(tmp_path / "a.jsonl"), train_bytes=1), tmp_path / "small")
    assert small.metrics.train.documents == manifest.metrics.train.documents


@pytest.mark.parametrize(
    ("records", "settings", "expected"),
    [
        ([], {}, r"no text to tokenize: 1 file\(s\) hold no document that counts \(0 empty, 0 over the limit\)"),
        ([{"text": " "}], {}, r"\(1 empty, 0 over the limit\)"),
        (RECORDS, {"limit_bytes_per_source": 1}, r"\(0 empty, 200 over the limit\)"),
        (RECORDS[:1], {}, "the valid split is empty: 1 document.* give a larger --valid-fraction or more documents"),
        (RECORDS[:1], {"valid_fraction": 0.999}, "the train split is empty: .* give a smaller --valid-fraction"),
    ],
)
def test_an_empty_split_or_corpus_is_refused(
    tmp_path: Path, records: list[dict[str, Any]], settings: dict[str, Any], expected: str
) -> None:
    path = write(tmp_path / "a.jsonl", records)
    with pytest.raises(InputFailure, match=expected):
        tokenize_text.run(config_for(path, **settings), tmp_path / "run")
    assert not (tmp_path / "run/tokens/manifest.json").exists()


def test_no_inputs_and_a_missing_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageFailure, match="no text given"):
        tokenize_text.run(config_for(), tmp_path / "run")
    path = write(tmp_path / "a.jsonl", RECORDS)
    with pytest.raises(InputFailure, match=r"none\.json cannot be read: No such file"):
        tokenize_text.run(config_for(path, tokenizer=str(tmp_path / "none.json")), tmp_path / "run")


def _run_and_die(config: TokenizeConfig, run_dir: Path) -> None:
    """Tokenize, but die by SIGKILL when the second shard is finished."""
    original = os.replace

    def replace(source: Path, target: Path) -> None:
        original(source, target)
        if Path(target).name == "train-00001.arrow":
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    tokenize_text.SHARD_TOKENS = 1000
    tokenize_text.run(config, run_dir)


def test_killed_in_the_middle_it_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize_text, "SHARD_TOKENS", 1000)
    config = config_for(write(tmp_path / "a.jsonl", RECORDS))
    expected = tokenize_text.run(config, tmp_path / "whole")
    assert len(expected.shards("train")) == 3
    process = multiprocessing.get_context("spawn").Process(target=_run_and_die, args=(config, tmp_path / "run"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "run/tokens/train-00001.arrow").exists()
    assert not (tmp_path / "run/tokens/manifest.json").exists()
    again = tokenize_text.run(config, tmp_path / "run")
    assert again.outputs == expected.outputs
    found = {path.name for path in (tmp_path / "run/tokens").iterdir()}
    assert found == {"manifest.json"} | {ref.path.split("/")[-1] for ref in again.outputs}
