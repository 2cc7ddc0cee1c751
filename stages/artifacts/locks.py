"""Locks of a run: `flock` on files under `.locks/`. The kernel drops one when its holder dies, so none is ever stale.

- a file of a lock held alone says by whom: process, host, since when. It is emptied when the holder lets go
- where several machines share a file system, `flock` may hold on each of them alone: what a holder on another host left
  in the file says that it was killed, or that this is so, and which of the two nobody here can tell
- where the file system has no locks at all, nothing goes on without them
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from loguru import logger

from schemas.failures import LockedFailure, ResourceFailure

FOLDER = ".locks"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def held(run_dir: Path, name: str) -> Iterator[None]:
    """Hold the lock `name` alone.

    Raises LockedFailure when others hold it, and ResourceFailure where there are no locks.
    """
    with open_lock(run_dir, name) as file:
        if not take(file, fcntl.LOCK_EX):
            raise refusal(run_dir / name, file)
        _warn_of_another_host(run_dir / name, file)
        file.truncate(0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
        file.flush()
        yield
        file.truncate(0)


@contextmanager
def turn_by_turn(run_dir: Path, name: str) -> Iterator[None]:
    """Within the block, be the only one of the jobs that share a stage; the others wait."""
    with open_lock(run_dir, name) as file:
        take(file, fcntl.LOCK_EX, wait=True)
        yield


def open_lock(run_dir: Path, name: str) -> TextIO:
    """The file of the lock, made where there is none."""
    locks = run_dir / FOLDER
    locks.mkdir(parents=True, exist_ok=True)
    return (locks / f"{name.replace('/', '-')}.lock").open("a+", encoding="utf-8", errors="replace")


def take(file: TextIO, kind: int, *, wait: bool = False) -> bool:
    """Take the lock, or change the one held; False when others stand against it. Raises ResourceFailure."""
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        raise ResourceFailure(
            f"the file system of {Path(file.name).parent} has no locks ({os.strerror(error.errno)}), without which two "
            "processes could spoil a run: put the run on another one, or mount it with locks (Lustre: -o flock)"
        ) from error
    return True


def refusal(what: Path, file: TextIO) -> LockedFailure:
    """That others hold the lock on `what`, and who."""
    return LockedFailure(f"{what} is being worked on by {holder(file)}: wait for it or stop it")


def holder(file: TextIO) -> str:
    """Who holds the lock, as its file says, in which anything may stand."""
    return _said(file) or "other processes"


def _said(file: TextIO) -> str:
    file.seek(0)
    return " ".join(file.read(200).split())


def _warn_of_another_host(what: Path, file: TextIO) -> None:
    before = _said(file)
    if " on " in before and socket.gethostname() not in before.split():
        logger.warning("{} was held by {}, which never let go: it was killed, or locks end at each host", what, before)
