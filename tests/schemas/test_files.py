import errno
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.failures import IntegrityFailure, ResourceFailure
from schemas.files import FileRef, digest_of, new_file, write_bytes

DIGEST = "sha256:" + "0" * 64


@given(chunks=st.lists(st.binary(max_size=50), max_size=10))
def test_a_file_is_described_as_it_is(tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("run")
    with new_file(folder / "stage" / "a.bin") as file:
        for chunk in chunks:
            file.write(chunk)
    ref = file.ref(folder / "stage" / "a.bin", folder, rows=3)
    data = b"".join(chunks)
    assert (ref.path, ref.size, ref.rows, ref.tokens) == ("stage/a.bin", len(data), 3, None)
    assert ref.digest == f"sha256:{hashlib.sha256(data).hexdigest()}" == digest_of(folder / ref.path)
    assert ref.check(folder).read_bytes() == data


def test_a_buffer_of_wide_items_is_counted_in_bytes(tmp_path: Path) -> None:
    with new_file(tmp_path / "a.bin") as file:
        assert file.write(memoryview(bytes(16)).cast("Q")) == 16
    assert file.size == file.tell() == (tmp_path / "a.bin").stat().st_size == 16


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "..", "../a", "a/../../b", "a/..", "a\\b", "a\0b", "C:/a", "c:a", "", ".", "//a"]
)
def test_a_path_that_leaves_the_run_is_refused(path: str) -> None:
    with pytest.raises(ValidationError):
        FileRef(path=path, size=0, digest=DIGEST)


@pytest.mark.parametrize("path", ["a", "a/b.c", "tokens/train-00000.arrow", "a..b/..c", "é/日 本"])
def test_a_path_inside_the_run_is_taken(path: str) -> None:
    assert FileRef(path=path, size=0, digest=DIGEST).path == path


@pytest.mark.parametrize("digest", ["", "sha256:0", "md5:" + "0" * 64, "sha256:" + "G" * 64, DIGEST + "\n"])
def test_what_is_no_digest_is_refused(digest: str) -> None:
    with pytest.raises(ValidationError):
        FileRef(path="a", size=0, digest=digest)


def test_links_out_of_the_run_are_refused(tmp_path: Path) -> None:
    run_dir, outside = tmp_path / "run", tmp_path / "outside"
    ref = write_bytes(run_dir / "stage" / "a", b"secret", run_dir)
    outside.mkdir()
    (outside / "a").write_bytes(b"secret")
    (run_dir / "stage" / "a").unlink()
    (run_dir / "stage" / "a").symlink_to(outside / "a")
    with pytest.raises(IntegrityFailure, match="leads out of the run"):
        ref.check(run_dir)
    (run_dir / "stage" / "a").unlink()
    (run_dir / "stage").rmdir()
    (run_dir / "stage").symlink_to(outside)
    with pytest.raises(IntegrityFailure, match="leads out of the run"):
        ref.locate(run_dir)


def test_links_inside_the_run_and_a_linked_run_are_taken(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ref = write_bytes(run_dir / "a", b"data", run_dir)
    (run_dir / "a").rename(run_dir / "b")
    (run_dir / "a").symlink_to("b")
    (tmp_path / "link").symlink_to(run_dir)
    assert ref.check(run_dir).read_bytes() == ref.check(tmp_path / "link").read_bytes() == b"data"


def test_a_link_to_itself_and_a_name_too_long_are_integrity_failures(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in ("loop", "x" * 300):
        with pytest.raises(IntegrityFailure):
            FileRef(path=path, size=0, digest=DIGEST).locate(tmp_path)


def test_a_missing_a_longer_and_a_changed_file_are_told_apart(tmp_path: Path) -> None:
    ref = write_bytes(tmp_path / "a", b"data", tmp_path)
    (tmp_path / "a").write_bytes(b"date")
    assert ref.locate(tmp_path) == tmp_path / "a"
    with pytest.raises(IntegrityFailure, match="was changed"):
        ref.check(tmp_path)
    (tmp_path / "a").write_bytes(b"data and more")
    with pytest.raises(IntegrityFailure, match="has 13 bytes, its manifest says 4"):
        ref.locate(tmp_path)
    (tmp_path / "a").unlink()
    with pytest.raises(IntegrityFailure, match="is missing"):
        ref.locate(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(IntegrityFailure, match="is missing"):
        ref.locate(tmp_path)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    data = bytes(range(32))
    ref = write_bytes(tmp_path / "a", data, tmp_path)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a").write_bytes(flipped)
        with pytest.raises(IntegrityFailure):
            ref.check(tmp_path)


def test_an_interrupted_write_leaves_the_file_before(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"before", tmp_path)
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"before"


def test_nothing_stands_under_the_name_before_the_bytes_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("rename"), replace(*names))[1])
    write_bytes(tmp_path / "a", b"data", tmp_path)
    assert events == ["fsync", "rename", "fsync"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_resource_failure_that_names_the_file(tmp_path: Path, code: int) -> None:
    with pytest.raises(ResourceFailure, match=r"no room to write .*a: free some space"), new_file(tmp_path / "a"):
        raise OSError(code, "full")
    assert list(tmp_path.iterdir()) == []
