import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizing_apart import tokenize_and_die, tokenize_share

from schemas.failures import InputFailure, LockedFailure, StaleFailure, UsageFailure
from schemas.tokenize_text import SPLITS, LeftOut, ShareManifest, TokenizeConfig, TokenizeManifest
from stages import tokenize_text
from stages.artifacts.stage_folder import share_folder
from stages.data import corpus as corpus_module
from stages.data import segments
from stages.data.corpus import find_corpus
from stages.data.selection import split_of
from stages.data.token_store import TokenStore
from stages.data.tokenizer import train_tokenizer

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


def tokenize(config: TokenizeConfig, run_dir: Path, *, force: bool = False) -> TokenizeManifest:
    manifest = tokenize_text.run(config, run_dir, force=force)
    assert isinstance(manifest, TokenizeManifest)
    return manifest


def trained(folder: Path) -> Path:
    path = folder / "trained" / "tokenizer.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(train_tokenizer((record["text"] for record in RECORDS), 300).to_str())
    return path


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
    manifest = tokenize(config_for(write(tmp_path / "a.jsonl", RECORDS)), tmp_path / "run")
    texts = texts_of(tmp_path / "run", manifest)
    assert Counter(texts["train"] + texts["valid"]) == Counter(record["text"] for record in RECORDS)
    assert 20 < len(texts["valid"]) < 60


def test_the_metrics_count_what_the_shards_hold(tmp_path: Path) -> None:
    blank = [{"text": " \n", "source": "law"}, {"text": "", "source": "law"}]
    manifest = tokenize(config_for(write(tmp_path / "a.jsonl", RECORDS + blank)), tmp_path / "run")
    metrics = manifest.metrics
    for split, counts in (("train", metrics.train), ("valid", metrics.valid)):
        store = TokenStore.open([ref.check(tmp_path / "run") for ref in manifest.shards(split)])
        assert (len(store), store.lengths.sum(), store.bytes.sum()) == (counts.documents, counts.tokens, counts.bytes)
        assert sum(ref.tokens or 0 for ref in manifest.shards(split)) == counts.tokens
    assert list(metrics.sources) == ["code", "law"]
    assert [counts.documents for counts in metrics.sources.values()] == [100, 100]
    assert metrics.left_out == LeftOut(empty=2)
    assert (metrics.vocab_size, metrics.lossy, metrics.encoder.split()[0]) == (300, 0, "fastokens")


def test_a_group_never_straddles_the_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS)
    manifest = tokenize(config_for(path, group_column="page"), tmp_path / "run")
    page_of = {record["text"]: record["page"] for record in RECORDS}
    pages = {split: {page_of[text] for text in texts} for split, texts in texts_of(tmp_path / "run", manifest).items()}
    assert pages["train"] and pages["valid"]
    assert not pages["train"] & pages["valid"]


def test_the_order_and_place_of_the_files_do_not_matter(tmp_path: Path) -> None:
    first = [write(tmp_path / "one" / name, RECORDS[start::2]) for start, name in enumerate(("a.jsonl", "b.jsonl"))]
    write(tmp_path / "two/deep/a.jsonl", RECORDS[0::2])
    write(tmp_path / "two/b.jsonl", RECORDS[1::2])
    runs = [
        tokenize(config_for(*first), tmp_path / "run1"),
        tokenize(config_for(*reversed(first)), tmp_path / "run2"),
        tokenize(config_for(str(tmp_path / "two")), tmp_path / "run3"),
    ]
    assert len({run.content_digest() for run in runs}) == 1
    assert [ref.name for ref in runs[0].inputs] == ["a.jsonl", "b.jsonl"]


def test_equal_file_names_from_two_folders_both_count(tmp_path: Path) -> None:
    paths = [write(tmp_path / name / "a.jsonl", RECORDS[start::2]) for start, name in enumerate(("one", "two"))]
    manifest = tokenize(config_for(*paths), tmp_path / "run")
    assert [ref.name for ref in manifest.inputs] == ["one/a.jsonl", "two/a.jsonl"]
    store = TokenStore.open([ref.check(tmp_path / "run") for split in SPLITS for ref in manifest.shards(split)])
    assert len(set(store.ids)) == len(RECORDS)


def test_a_second_run_is_up_to_date_until_a_file_changes(tmp_path: Path) -> None:
    config = config_for(write(tmp_path / "a.jsonl", RECORDS))
    manifest = tokenize(config, tmp_path / "run")
    assert tokenize(config, tmp_path / "run") == manifest
    write(tmp_path / "a.jsonl", RECORDS[:-1])
    with pytest.raises(UsageFailure, match=r"its input a\.jsonl has changed"):
        tokenize(config, tmp_path / "run")
    assert tokenize(config, tmp_path / "run", force=True).key != manifest.key


def test_a_limit_takes_the_first_bytes_of_each_source(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS)
    manifest = tokenize(config_for(path, limit_bytes_per_source=2000), tmp_path / "run")
    expected = []
    for source in ("law", "code"):
        left = 2000
        for record in (record for record in RECORDS if record["source"] == source):
            left -= len(record["text"].encode())
            expected += [record["text"]] if left >= 0 else []
    texts = texts_of(tmp_path / "run", manifest)
    assert Counter(texts["train"] + texts["valid"]) == Counter(expected)
    assert manifest.metrics.left_out == LeftOut(over_limit=len(RECORDS) - len(expected))
    assert all(1900 < counts.bytes <= 2000 for counts in manifest.metrics.sources.values())


def test_a_given_tokenizer_is_taken_byte_for_byte_and_gives_the_same_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS)
    trained = tokenize(config_for(path), tmp_path / "run1")
    tokenizer = trained.output("tokenizer.json").check(tmp_path / "run1")
    taken = tokenize(config_for(path, tokenizer=str(tokenizer)), tmp_path / "run2")
    assert [ref.digest for ref in taken.outputs] == [ref.digest for ref in trained.outputs]
    assert [ref.name for ref in taken.inputs] == ["a.jsonl", "tokenizer.json"]
    assert taken.metrics == trained.metrics


def test_the_tokenizer_learns_from_a_bounded_sample_of_the_training_split_only(tmp_path: Path) -> None:
    held_out = [f"g{number}" for number in range(200) if split_of(f"g{number}", 0.2) == "valid"]
    training = [f"g{number}" for number in range(200) if split_of(f"g{number}", 0.2) == "train"]
    records = [{"text": "abab " * 20, "id": name} for name in training] + [
        {"text": "xyxy " * 20, "id": name} for name in held_out
    ]
    manifest = tokenize(config_for(write(tmp_path / "a.jsonl", records)), tmp_path / "run")
    vocabulary = json.loads((tmp_path / "run/tokens/tokenizer.json").read_text())["model"]["vocab"]
    assert "abab" in vocabulary
    assert "xy" not in vocabulary
    small = tokenize(config_for(str(tmp_path / "a.jsonl"), train_bytes=1), tmp_path / "small")
    assert small.metrics.train.documents == manifest.metrics.train.documents


@pytest.mark.parametrize(
    ("records", "settings", "expected"),
    [
        ([], {}, r"no text to train a tokenizer on: 1 file\(s\) hold no document for the train split"),
        ([], {"given": True}, r"no text to tokenize: 1 file\(s\) hold no document that counts \(none at all\)"),
        ([{"text": " "}], {"given": True}, r"no document that counts \(1 empty\)"),
        (RECORDS, {"given": True, "limit_bytes_per_source": 1}, r"no document that counts \(200 over limit\)"),
        (RECORDS[:1], {}, "the valid split is empty: 1 document.* give a larger --valid-fraction or more documents"),
        (
            RECORDS[:1],
            {"given": True, "valid_fraction": 0.999},
            "the train split is empty: .* smaller --valid-fraction",
        ),
    ],
)
def test_an_empty_split_or_corpus_is_refused(
    tmp_path: Path, records: list[dict[str, Any]], settings: dict[str, Any], expected: str
) -> None:
    path = write(tmp_path / "a.jsonl", records)
    if settings.pop("given", False):
        settings["tokenizer"] = str(trained(tmp_path))
    with pytest.raises(InputFailure, match=expected):
        tokenize(config_for(path, **settings), tmp_path / "run")
    assert not (tmp_path / "run/tokens/manifest.json").exists()


def test_no_inputs_and_a_missing_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageFailure, match="no text given"):
        tokenize(config_for(), tmp_path / "run")
    path = write(tmp_path / "a.jsonl", RECORDS)
    with pytest.raises(InputFailure, match=r"no such file: .*none\.json"):
        tokenize(config_for(path, tokenizer=str(tmp_path / "none.json")), tmp_path / "run")


SMALL = {"shard_bytes": 2000}  # the records make several parts and, compressed, several segments of a part


def corpus(folder: Path) -> str:
    """Plain and compressed lines, rows and text: parts of one and of several segments."""
    write(folder / "a.jsonl", RECORDS)
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"zipped {number} " + "z" * 50}) + "\n" for number in range(300))
    pq.write_table(pa.table({"text": [f"row {number} " * 9 for number in range(60)]}), folder / "c.parquet", 8)
    (folder / "d.txt").write_text("a text of its own " * 10)
    return str(folder)


def bytes_of(run_dir: Path, manifest: TokenizeManifest) -> dict[str, bytes]:
    return {ref.path: ref.check(run_dir).read_bytes() for ref in manifest.outputs}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenizeConfig, TokenizeManifest, dict[str, bytes]]:
    """A corpus tokenized in one go by this process: the config, the manifest and the files."""
    folder = tmp_path_factory.mktemp("whole")
    config = config_for(corpus(folder / "text"), **SMALL)
    manifest = tokenize(config, folder / "run")
    assert len(manifest.shards("train")) > 10
    assert any("_001" in ref.path for ref in manifest.outputs)
    return config, manifest, bytes_of(folder / "run", manifest)


def changed(config: TokenizeConfig, **settings: Any) -> TokenizeConfig:
    return config.model_copy(update=settings)


@pytest.mark.parametrize("settings", [{"workers": 3}, {"encoder": "tokenizers"}, {"on_error": "skip"}])
def test_neither_workers_nor_encoder_change_a_byte(whole: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    config, expected, files = whole
    manifest = tokenize(changed(config, **settings), tmp_path / "run")
    assert bytes_of(tmp_path / "run", manifest) == files
    assert manifest.key == expected.key


def test_shares_done_in_any_order_merge_to_the_same_bytes(whole: Any, tmp_path: Path) -> None:
    config, expected, files = whole
    run_dir = tmp_path / "run"
    shares = []
    for number in (3, 1):
        shares.append(tokenize_text.run(changed(config, shard=f"{number}/3"), run_dir))
    with pytest.raises(UsageFailure, match=r"\d+ of \d+ parts are not done \(number 2, 5"):
        tokenize(changed(config, merge=True), run_dir)
    shares.append(tokenize_text.run(changed(config, shard="2/3"), run_dir))
    assert tokenize_text.run(changed(config, shard="2/3"), run_dir) == shares[-1]
    assert all(isinstance(share, ShareManifest) for share in shares)
    assert sum(share.metrics.documents for share in shares) == len(RECORDS) + 300 + 60 + 1
    manifest = tokenize(changed(config, merge=True), run_dir)
    assert bytes_of(run_dir, manifest) == files
    assert manifest.content_digest() == expected.content_digest()
    assert {path.name for path in (run_dir / "tokens").iterdir()} == {
        "manifest.json", *(path.rsplit("/", 1)[1] for path in files)
    }  # fmt: skip
    assert tokenize_text.run(changed(config, shard="1/3"), run_dir) == manifest


def test_shares_at_the_same_time_train_one_tokenizer_and_merge_to_the_same_bytes(whole: Any, tmp_path: Path) -> None:
    config, _, files = whole
    spawn = multiprocessing.get_context("spawn")
    shares = [
        spawn.Process(target=tokenize_share, args=(changed(config, shard=f"{n}/3"), tmp_path / "run"))
        for n in (1, 2, 3)
    ]
    for share in shares:
        share.start()
    for share in shares:
        share.join(120)
        assert share.exitcode == 0
    assert bytes_of(tmp_path / "run", tokenize(changed(config, merge=True), tmp_path / "run")) == files


def test_shares_of_other_settings_and_force_are_refused(whole: Any, tmp_path: Path) -> None:
    config, _, _ = whole
    tokenize_text.run(changed(config, shard="1/2"), tmp_path / "run")
    with pytest.raises(UsageFailure, match="--force with --shard would throw away what others have done"):
        tokenize_text.run(changed(config, shard="2/2"), tmp_path / "run", force=True)
    with share_folder(tmp_path / "run", TokenizeManifest, config, find_corpus(config, tmp_path / "run").inputs()):
        with pytest.raises(StaleFailure, match="is being filled with other settings or inputs"):
            tokenize_text.run(changed(config, shard="2/2", valid_fraction=0.3), tmp_path / "run")
        with pytest.raises(LockedFailure, match="is being worked on by other processes"):
            tokenize(config, tmp_path / "run")


@pytest.mark.parametrize("share", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_an_impossible_share_is_refused(share: str) -> None:
    with pytest.raises(ValidationError):
        TokenizeConfig(shard=share)


@pytest.mark.parametrize("renames", [1, 2, 4, 9, 17, 40])
def test_killed_anywhere_it_ends_with_the_same_bytes(whole: Any, tmp_path: Path, renames: int) -> None:
    config, _, files = whole
    run_dir = tmp_path / "run"
    process = multiprocessing.get_context("spawn").Process(target=tokenize_and_die, args=(config, run_dir, renames))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (run_dir / "tokens/manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in (run_dir / "tokens/parts").glob("*.json")}
    times = {path: path.stat().st_mtime_ns for path in (run_dir / "tokens").glob("*.arrow")}
    manifest = tokenize(config, run_dir)
    assert bytes_of(run_dir, manifest) == files
    recorded = len(finished)
    untouched = sum(path.stat().st_mtime_ns == time for path, time in times.items())
    assert untouched >= recorded  # what was finished was not done again
    assert not list(run_dir.rglob("*.tmp"))


def test_killed_with_several_workers_it_ends_with_the_same_bytes(whole: Any, tmp_path: Path) -> None:
    config, _, files = whole
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "cpipe", "tokenize", str(run_dir), *config.inputs, "--workers", "2"]
    command += ["--vocab-size", "300", "--valid-fraction", "0.2", "--shard-bytes", "2000"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list((run_dir / "tokens").glob("train-*.arrow")) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert bytes_of(run_dir, tokenize(config, run_dir)) == files


def test_equal_texts_are_kept_once_where_asked(tmp_path: Path) -> None:
    repeated = [{"text": record["text"], "source": "copy"} for record in RECORDS[::2]]
    paths = [write(tmp_path / "a.jsonl", RECORDS), write(tmp_path / "b.jsonl", repeated + repeated)]
    manifest = tokenize(config_for(*paths, deduplicate=True, **SMALL), tmp_path / "run")
    assert manifest.metrics.left_out == LeftOut(duplicates=2 * len(repeated))
    assert set(manifest.metrics.sources) == {"law", "code"}
    texts = texts_of(tmp_path / "run", manifest)
    assert Counter(texts["train"] + texts["valid"]) == Counter(record["text"] for record in RECORDS)
    all_of_them = tokenize(config_for(*paths, **SMALL), tmp_path / "all")
    assert all_of_them.metrics.sources["copy"].documents == 2 * len(repeated)


NAMED = [{"text": f"text {number}", "id": number} for number in range(60)]


def test_names_that_begin_anew_in_every_file_are_refused_at_once(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, NAMED) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(
        InputFailure, match=r"b\.jsonl line 1 has the id of .*a\.jsonl line 1, and ids must differ: name"
    ):
        tokenize(config_for(*paths), tmp_path / "run")
    assert not (tmp_path / "run/tokens").exists()
    manifest = tokenize(config_for(*paths, id_column="-"), tmp_path / "run")
    assert manifest.metrics.train.documents + manifest.metrics.valid.documents == 120


def test_a_name_that_stands_twice_stops_the_work_or_is_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*NAMED, {"text": "again", "id": 7}, {"text": "and again", "id": 7}])
    config = config_for(path, shard_bytes=1024)
    with pytest.raises(InputFailure, match=r"a\.jsonl line 61 has the id of .*a\.jsonl line 8"):
        tokenize(config, tmp_path / "run")
    manifest = tokenize(changed(config, on_error="skip"), tmp_path / "run")
    assert manifest.metrics.left_out == LeftOut(faulty=2)
    texts = texts_of(tmp_path / "run", manifest)
    assert Counter(texts["train"] + texts["valid"]) == Counter(record["text"] for record in NAMED)
    skipped = [json.loads(line) for line in (tmp_path / "run/tokens/skipped.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in skipped] == [("a.jsonl", 61), ("a.jsonl", 62)]


def test_faults_stop_the_work_or_are_skipped_and_listed(tmp_path: Path) -> None:
    faulty = [json.dumps(record) for record in RECORDS]
    faulty[3], faulty[50] = '{"text": 5}', '{"text": "cut'
    (tmp_path / "a.jsonl").write_text("\n".join(faulty))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(f"{line}\n" for line in faulty[4:40]).encode())[:-20])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 nothing")
    config = config_for(str(tmp_path / "*.*"), text_column="text", **SMALL)
    with pytest.raises(InputFailure, match=r"a\.jsonl line 4: column 'text' holds a value of type int"):
        tokenize(config, tmp_path / "run")
    manifest = tokenize(changed(config, on_error="skip", workers=2), tmp_path / "run")
    skipped = [json.loads(line) for line in (tmp_path / "run/tokens/skipped.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in skipped][:2] == [("a.jsonl", 4), ("a.jsonl", 51)]
    assert {entry["file"] for entry in skipped[2:]} == {"b.jsonl.gz", "c.parquet"}
    assert manifest.metrics.left_out.faulty == len(skipped)
    assert manifest.output("skipped.jsonl").check(tmp_path / "run")
    again = changed(config, on_error="skip")
    assert tokenize(again, tmp_path / "run") == manifest
    with pytest.raises(StaleFailure, match=r"is finished, but \d+ faulty record.s. were skipped, listed in"):
        tokenize(config, tmp_path / "run")


def test_after_a_fault_what_was_finished_is_not_done_again(tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in RECORDS]
    lines[-1] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = config_for(str(tmp_path / "a.jsonl"), tokenizer=str(trained(tmp_path)), **SMALL)
    with pytest.raises(InputFailure, match="line 200 is not JSON"):
        tokenize(config, tmp_path / "run")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/tokens").glob("*.arrow")}
    assert len(done) > 3
    manifest = tokenize(changed(config, on_error="skip"), tmp_path / "run")
    assert manifest.metrics.left_out == LeftOut(faulty=1)
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_an_unreadable_file_is_named_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path / name, RECORDS) for name in ("a.jsonl", "b.jsonl")]
    original = Path.open

    def refuse(path: Path, *mode: Any, **options: Any) -> Any:
        if path.name == "b.jsonl":
            raise PermissionError(13, "Permission denied")
        return original(path, *mode, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputFailure, match=r"b\.jsonl cannot be read: Permission denied"):
        tokenize(config_for(*paths), tmp_path / "run")
    manifest = tokenize(config_for(*paths, on_error="skip"), tmp_path / "run")
    assert [ref.name for ref in manifest.inputs] == ["a.jsonl"]
    assert "b.jsonl cannot be read: Permission denied" in (tmp_path / "run/tokens/skipped.jsonl").read_text()


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write(tmp_path / "a.jsonl", RECORDS))
    original = segments.Selection.__iter__

    def read_slowly(selection: Any) -> Any:
        for document in original(selection):
            os.utime(path, (5, 5))
            yield document

    monkeypatch.setattr(segments.Selection, "__iter__", read_slowly)
    with pytest.raises(InputFailure, match=r"a\.jsonl was changed while it was read"):
        tokenize(config_for(str(path), tokenizer=str(trained(tmp_path))), tmp_path / "run")


def test_standard_input_is_read_and_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS)
    for _ in range(2):  # the second time it is up to date
        with open(path, "rb") as stream:
            monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": stream}))
            manifest = tokenize(config_for("-"), tmp_path / "run")
    assert [ref.name for ref in manifest.inputs] == ["stdin.jsonl"]
    assert manifest.metrics.train.documents + manifest.metrics.valid.documents == len(RECORDS)
    assert not (tmp_path / "run/.stdin").exists()


def test_the_column_of_the_text_is_found_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(corpus_module.logger, "info", lambda text, *values: said.append(text.format(*values)))
    renamed = [{"body": record["text"], "source": record["source"]} for record in RECORDS]
    tokenize(config_for(write(tmp_path / "a.jsonl", renamed)), tmp_path / "run")
    assert "1 file(s) have no column `text`: theirs is taken to be `body`" in said
    unclear = [{"one": "a", "two": "b"}]
    with pytest.raises(InputFailure, match="--text-column"):
        tokenize(config_for(write(tmp_path / "b.jsonl", unclear)), tmp_path / "run")


def test_concept_tokens_are_reserved_in_training_or_renamed_in_a_given_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS)
    manifest = tokenize(config_for(path, concept_tokens=5), tmp_path / "run")
    assert manifest.metrics.concept_tokens == (1, 2, 3, 4, 5)
    given = json.loads(trained(tmp_path).read_text())
    last = max(given["model"]["vocab"].values())
    given["added_tokens"] += [
        given["added_tokens"][0] | {"id": last + 1 + number, "content": f"<|reserved_special_token_{number}|>"}
        for number in range(4)
    ]
    (tmp_path / "given.json").write_text(json.dumps(given))
    plain = tokenize(config_for(path, tokenizer=str(tmp_path / "given.json")), tmp_path / "plain")
    renamed = tokenize(config_for(path, tokenizer=str(tmp_path / "given.json"), concept_tokens=3), tmp_path / "renamed")
    assert renamed.metrics.concept_tokens == (last + 1, last + 2, last + 3)
    assert [ref.digest for ref in renamed.shards("train")] == [ref.digest for ref in plain.shards("train")]
    found = Tokenizer.from_file(str(renamed.output("tokenizer.json").check(tmp_path / "renamed")))
    assert found.token_to_id("<concept_2>") == last + 3
    with pytest.raises(InputFailure, match="4 unused tokens were found"):
        tokenize(config_for(path, tokenizer=str(tmp_path / "given.json"), concept_tokens=5), tmp_path / "more")


@pytest.mark.parametrize(
    "settings",
    [{"unused_tokens": ("a",)}, {"concept_tokens": 1, "unused_pattern": "a"}],
)
def test_renaming_without_a_tokenizer_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="unused tokens are renamed with --tokenizer and --concept-tokens only"):
        TokenizeConfig(**settings)


def test_a_model_folder_is_taken_with_what_it_says_ends_a_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "model").mkdir()
    given = json.loads(trained(tmp_path).read_text())
    given["added_tokens"].append(given["added_tokens"][0] | {"id": len(given["model"]["vocab"]), "content": "<done>"})
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(given))
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps({"eos_token": "<done>"}))
    manifest = tokenize(config_for(path, tokenizer=str(tmp_path / "model")), tmp_path / "run")
    assert manifest.metrics.end_of_text == len(given["model"]["vocab"])
    assert [ref.name for ref in manifest.inputs] == ["a.jsonl", "tokenizer.json", "tokenizer_config.json"]
    other = tokenize(
        config_for(path, tokenizer=str(tmp_path / "model"), end_of_text="<|endoftext|>"), tmp_path / "other"
    )
    assert other.metrics.end_of_text == 0


def test_a_lossy_tokenizer_is_refused_or_its_losses_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS)
    given = json.loads(trained(tmp_path).read_text()) | {"normalizer": {"type": "Lowercase"}}
    (tmp_path / "lower.json").write_text(json.dumps(given))
    config = config_for(path, tokenizer=str(tmp_path / "lower.json"))
    with pytest.raises(InputFailure, match=r"does not give document 'a\.jsonl:1' back as it was"):
        tokenize(config, tmp_path / "run")
    assert tokenize(changed(config, allow_lossy=True), tmp_path / "run").metrics.lossy == len(RECORDS)


def test_others_read_the_shards_as_they_are(whole: Any, tmp_path: Path) -> None:
    _, manifest, files = whole
    name = manifest.shards("train")[0].path
    path = tmp_path / "shard.arrow"
    path.write_bytes(files[name])
    store = TokenStore.open([path])
    expected = [store.tokens(number).tolist() for number in range(len(store))]
    assert polars.read_ipc(path)["tokens"].to_list() == expected
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    assert table["tokens"].to_pylist() == expected
    assert duckdb.sql('select sum(len(tokens)), count(*) from "table"').fetchall() == [
        (
            sum(map(len, expected)),
            len(expected),
        )
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets.disable_progress_bars()
        found = datasets.load_dataset("arrow", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert found["tokens"][:] == expected


def test_done_again_with_other_text_it_encodes_with_the_new_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for text in ("abab ", "xyxy "):
        config = config_for(write(path, [{"text": text * 40} for _ in range(50)]))
        manifest = tokenize(config, tmp_path / "run", force=True)
        assert set(texts_of(tmp_path / "run", manifest)["train"]) == {text * 40}
        assert manifest.metrics.bytes_per_token > 3
