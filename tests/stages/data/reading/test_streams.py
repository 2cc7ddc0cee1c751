import bz2
import gzip
import io
import lzma
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.failures import InputFailure
from stages.data.reading import streams
from stages.data.reading.streams import lines, opened, start_of_text


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


CODECS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstd,
    "bz2": lambda data: bz2.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
}
DATA = b"".join(b"%d %d\n" % (line, random.Random(line).getrandbits(64)) for line in range(2000))


def write(folder: Path, data: bytes) -> Path:
    path = folder / "a.txt"
    path.write_bytes(data)
    return path


def read(path: Path, codec: str | None) -> bytes:
    with opened(path, codec) as stream:
        return stream.read()


def refusal(path: Path, codec: str | None) -> str:
    with pytest.raises(InputFailure) as failure:
        read(path, codec)
    assert "\n" not in str(failure.value)
    assert str(failure.value).startswith(f"{path} cannot be read: ")
    return str(failure.value)


def test_a_plain_file_is_read_as_it_is(tmp_path: Path) -> None:
    assert read(write(tmp_path, DATA), None) == DATA


@pytest.mark.parametrize("codec", CODECS)
def test_a_compressed_file_is_read_to_the_end_of_its_last_member(tmp_path: Path, codec: str) -> None:
    compress = CODECS[codec]
    for parts in ([DATA], [b""], [DATA, DATA], [b"", DATA, b"", DATA[:10], b""]):
        assert read(write(tmp_path, b"".join(map(compress, parts))), codec) == b"".join(parts)


@pytest.mark.parametrize("codec", CODECS)
def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path: Path, codec: str) -> None:
    first, second = CODECS[codec](DATA[:20_000]), CODECS[codec](DATA[20_000:])
    data = first + second
    near_borders = [border + offset for border in (0, len(first), len(data)) for offset in range(-20, 20)]
    for length in sorted({*near_borders, *range(0, len(data), len(data) // 20)}):
        if 0 <= length < len(data) and length != len(first):
            refusal(write(tmp_path, data[:length]), codec)
    assert read(write(tmp_path, first), codec) == DATA[:20_000]  # cut between two members nothing tells


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rubbish", [b"rubbish", b"\x1f", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ"])
def test_bytes_after_the_end_are_refused(tmp_path: Path, codec: str, rubbish: bytes) -> None:
    refusal(write(tmp_path, CODECS[codec](DATA) + rubbish), codec)


@pytest.mark.parametrize("codec", CODECS)
def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(tmp_path: Path, codec: str) -> None:
    for data in (DATA, b"", b"\x00\x01", *(compress(DATA) for other, compress in CODECS.items() if other != codec)):
        refusal(write(tmp_path, data), codec)


@pytest.mark.parametrize("codec", CODECS)
def test_a_changed_byte_of_the_data_is_noticed(tmp_path: Path, codec: str) -> None:
    data = bytearray(zstd_with_checksum() if codec == "zst" else CODECS[codec](DATA))
    data[len(data) // 2] ^= 1
    refusal(write(tmp_path, bytes(data)), codec)


def zstd_with_checksum() -> bytes:
    """A frame of one raw block with a checksum (of the right length only): RFC 8878, 3.1.1."""
    return zstd_frame(window=17, content=b"content", checksum=b"\0\0\0\0")


def zstd_frame(window: int, content: bytes, checksum: bytes = b"") -> bytes:
    descriptor = bytes([4 if checksum else 0, (window - 10) << 3])
    return b"\x28\xb5\x2f\xfd" + descriptor + (len(content) << 3 | 1).to_bytes(3, "little") + content + checksum


def test_zstd_may_not_ask_for_a_window_of_more_than_128_mib(tmp_path: Path) -> None:
    assert read(write(tmp_path, zstd_frame(27, b"text")), "zst") == b"text"
    assert "too much memory" in refusal(write(tmp_path, zstd_frame(28, b"text")), "zst")


def test_zstd_skips_frames_that_are_to_be_skipped(tmp_path: Path) -> None:
    skipped = b"\x50\x2a\x4d\x18" + (8).to_bytes(4, "little") + b"12345678"
    assert read(write(tmp_path, skipped + zstd(b"a") + skipped + zstd(b"b") + skipped), "zst") == b"ab"


def test_xz_may_not_ask_for_more_memory_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, lzma.compress(DATA, preset=6))  # a dictionary of 8 MiB
    assert read(path, "xz") == DATA
    monkeypatch.setattr(streams, "XZ_MEMORY", 8 << 20)
    assert "Memory usage limit" in refusal(path, "xz")


@pytest.mark.parametrize("padding", [0, 4, 8, 4 * streams.PIECE + 4])
def test_xz_streams_may_be_padded_by_fours(tmp_path: Path, padding: int) -> None:
    stream = lzma.compress(DATA)
    padded = stream + bytes(padding) + stream + bytes(padding)
    assert read(write(tmp_path, padded), "xz") == DATA + DATA
    assert "of padding, expected a multiple of four" in refusal(write(tmp_path, padded + b"\0"), "xz")
    refusal(write(tmp_path, bytes(4) + stream), "xz")


@pytest.mark.parametrize("check", [lzma.CHECK_NONE, lzma.CHECK_CRC32, lzma.CHECK_CRC64, lzma.CHECK_SHA256])
def test_every_check_of_xz_is_known(tmp_path: Path, check: int) -> None:
    assert read(write(tmp_path, lzma.compress(DATA, check=check)), "xz") == DATA


def test_the_old_lzma_format_is_not_taken_for_xz(tmp_path: Path) -> None:
    refusal(write(tmp_path, lzma.compress(DATA, format=lzma.FORMAT_ALONE)), "xz")


@pytest.mark.parametrize("codec", CODECS)
def test_what_lies_well_before_a_cut_is_read(tmp_path: Path, codec: str) -> None:
    noise = [random.Random(line).randbytes(100_000).replace(b"\n", b"") + b"\n" for line in range(8)]
    data = CODECS[codec](b"".join(noise))
    path = write(tmp_path, data[: len(data) * 3 // 4])
    seen: list[bytes] = []
    with pytest.raises(InputFailure), opened(path, codec) as stream:
        seen.extend(stream)
    assert seen == noise[: len(seen)]
    assert len(seen) >= 4


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    for codec in (None, *CODECS):
        with pytest.raises(InputFailure, match=r"none cannot be read: .*(No such file|Failed to open)"):
            read(tmp_path / "none", codec)
        with pytest.raises(InputFailure, match=r"cannot be read: "):
            read(tmp_path, codec)


def test_other_failures_are_not_taken_for_the_files(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), opened(write(tmp_path, DATA), None):
        raise ZeroDivisionError


@pytest.mark.parametrize("codec", CODECS)
def test_a_bomb_is_skipped_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    """256 MB of zeros as one line in a gz of 256 KB; less in the codecs that are slow."""
    size, count = (16 << 20, 16) if codec == "gz" else (4 << 20, 8)
    path = write(tmp_path, CODECS[codec](bytes(size)) * count + CODECS[codec](b"\nlast"))
    assert path.stat().st_size < 2 << 20
    monkeypatch.setattr(streams, "MAX_DOCUMENT", 1 << 20)
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        with opened(path, codec) as stream:
            assert list(lines(stream)) == [(1, None), (2, b"last")]
            assert pa.total_allocated_bytes() - arrow < 8 << 20
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=120, deadline=None)
@given(data=st.binary(max_size=60).map(lambda data: data.replace(b"\x00", b"\n")), limit=st.integers(1, 8))
def test_lines_are_those_of_the_standard_library_but_for_long_ones(data: bytes, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "MAX_DOCUMENT", limit)
        found = list(lines(io.BytesIO(data), first=5))
    expected = [line if len(line) <= limit else None for line in io.BytesIO(data)]
    assert found == list(enumerate(expected, 5))


@settings(max_examples=120, deadline=None)
@given(data=st.lists(st.sampled_from([b"a", b"\n", b"long long"])).map(b"".join), limit=st.integers(1, 8))
def test_parts_cut_at_line_borders_hold_the_lines_of_the_whole(data: bytes, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "MAX_DOCUMENT", limit)
        whole = list(lines(io.BytesIO(data)))
        borders = [0, *(place + 1 for place, byte in enumerate(data) if byte == 10), len(data)]
        for number, border in enumerate(borders):
            first = list(lines(io.BytesIO(data), 1, border))
            second = list(lines(io.BytesIO(data[border:]), len(first) + 1, len(data) - border))
            assert first + second == whole
            assert len(first) == number or border == len(data)


@settings(max_examples=100, deadline=None)
@given(
    data=st.binary(max_size=400),
    codec=st.sampled_from(list(CODECS)),
    change=st.integers(0, 400),
    byte=st.integers(0, 255),
)
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, codec: str, change: int, byte: int
) -> None:
    compressed = bytearray(CODECS[codec](data))
    compressed[change % len(compressed)] = byte
    folder = tmp_path_factory.mktemp("any")
    for content in (data, bytes(compressed)):
        try:
            read(write(folder, content), codec)
        except InputFailure as failure:
            assert "\n" not in str(failure)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (text.encode(encoding), encoding[:6].upper())
        for text in ("\ufefftext", "\ufeff")
        for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
    ],
)
def test_other_encodings_are_told_by_their_marks(data: bytes, name: str) -> None:
    with pytest.raises(InputFailure, match=f"a.txt looks like {name}, expected UTF-8: convert it"):
        start_of_text(data, Path("a.txt"))


def test_one_byte_order_mark_is_dropped() -> None:
    mark = b"\xef\xbb\xbf"
    for data in (b"", b"text", mark, mark + b"text", mark[:2], os.urandom(1)):
        assert start_of_text(mark + data, Path("a.txt")) == data
        assert start_of_text(b"." + mark + data, Path("a.txt")) == b"." + mark + data
