import json
from pathlib import Path

import pytest

from schemas.collect_text import CollectConfig, CollectManifest
from stages import collect_text
from stages.data.reading.installation import KINDS

SMALL = CollectConfig(bytes_per_kind=20_000)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CollectManifest]:
    run_dir = tmp_path_factory.mktemp("run")
    return run_dir, collect_text.run(SMALL, run_dir)


def records_of(run_dir: Path, manifest: CollectManifest) -> list[dict[str, str]]:
    lines = [line for ref in manifest.outputs for line in ref.check(run_dir).read_text().splitlines()]
    return [json.loads(line) for line in lines]


def test_every_kind_is_found_and_none_exceeds_its_bytes(collected: tuple[Path, CollectManifest]) -> None:
    run_dir, manifest = collected
    assert manifest.metrics.dropped == ()
    assert sorted(manifest.metrics.kinds) == list(KINDS)
    for kind, counts in manifest.metrics.kinds.items():
        lines = (run_dir / "corpus" / f"{kind}.jsonl").read_text().splitlines()
        size = sum(len(json.loads(line)["text"].encode()) for line in lines)
        assert 10_000 < size == counts.bytes <= SMALL.bytes_per_kind
        assert len(lines) == counts.documents == manifest.output(f"{kind}.jsonl").rows


def test_records_are_distinct_pieces_grouped_by_file(collected: tuple[Path, CollectManifest]) -> None:
    records = records_of(*collected)
    assert len({record["id"] for record in records}) == len({record["text"] for record in records}) == len(records)
    for record in records:
        assert record["id"].rpartition("#")[0] == record["group"]
        assert 0 < len(record["text"]) <= 6000


def test_no_record_names_a_path_of_the_machine(collected: tuple[Path, CollectManifest]) -> None:
    for record in records_of(*collected):
        assert not record["group"].startswith("/")
        assert ".." not in record["group"]
        assert "site-packages" not in record["group"]


def test_the_same_installation_gives_the_same_bytes(collected: tuple[Path, CollectManifest], tmp_path: Path) -> None:
    again = collect_text.run(SMALL, tmp_path)
    assert again.outputs == collected[1].outputs
    assert again.content_digest() == collected[1].content_digest()


def test_another_seed_takes_other_files(collected: tuple[Path, CollectManifest], tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"sampling_seed": 1})
    groups = {record["group"] for record in records_of(tmp_path, collect_text.run(config, tmp_path))}
    assert groups != {record["group"] for record in records_of(*collected)}


def test_code_comes_without_comments_and_docstrings(collected: tuple[Path, CollectManifest]) -> None:
    records = records_of(*collected)
    headers = [record for record in records if record["source"] == "cpp"]
    assert not [record["id"] for record in headers if "/*" in record["text"] or "Licensed" in record["text"]]
    code = [record for record in records if record["source"] in ("python", "stubs")]
    assert not [record["id"] for record in code if "\n# " in record["text"]]
