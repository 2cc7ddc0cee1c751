import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from schemas.failures import LockedFailure, ResourceFailure
from stages.artifacts.locks import held, open_lock, take, turn_by_turn


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="WARNING")
    yield lines
    logger.remove(sink)


def test_the_holder_is_named_with_process_host_and_time(tmp_path: Path) -> None:
    with held(tmp_path, "experts/001"):
        told = (
            rf"experts/001 is being worked on by process {os.getpid()} on {re.escape(socket.gethostname())} since 2\d"
        )
        with pytest.raises(LockedFailure, match=told) as failure, held(tmp_path, "experts/001"):
            pass
        assert "\n" not in str(failure.value)
        assert (tmp_path / ".locks/experts-001.lock").read_text()
    assert (tmp_path / ".locks/experts-001.lock").read_text() == ""


def test_one_that_failed_lets_go(tmp_path: Path) -> None:
    with pytest.raises(KeyError), held(tmp_path, "seed"):
        raise KeyError
    with held(tmp_path, "seed"):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("lock", [held, turn_by_turn])
def test_without_locks_nothing_goes_on_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, lock: Any
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    told = rf"{tmp_path}/\.locks has no locks \({os.strerror(code)}\)"
    with pytest.raises(ResourceFailure, match=told) as failure, lock(tmp_path, "seed"):
        pytest.fail("went on")
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("left", "told"),
    [
        ("process 7 on elsewhere since 2026", True),
        (f"process 7 on {socket.gethostname()} since 2026", False),
        ("", False),
    ],
)
def test_what_a_holder_on_another_host_left_is_a_warning(
    tmp_path: Path, warnings: list[str], left: str, told: bool
) -> None:
    with open_lock(tmp_path, "seed") as file:
        file.write(left)
    with held(tmp_path, "seed"):
        pass
    assert [
        line for line in warnings if "seed was held by process 7 on elsewhere since 2026, which" in line
    ] == warnings
    assert bool(warnings) == told


@pytest.mark.parametrize("content", [b"\xff\x00\n\nx", b"y" * 100_000, b"\x1b[31m"])
def test_whatever_stands_in_the_file_a_refusal_is_one_short_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".locks").mkdir()
    (tmp_path / ".locks/seed.lock").write_bytes(content)
    with open_lock(tmp_path, "seed") as file:
        assert take(file, fcntl.LOCK_EX)
        with pytest.raises(LockedFailure) as failure, held(tmp_path, "seed"):
            pass
    assert "\n" not in str(failure.value) and len(str(failure.value)) < 400
