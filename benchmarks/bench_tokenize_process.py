"""One command as a process tree: wall time, CPU time and peak memory of all its processes, for the other benchmarks.

- CPU time is the kernel's, to the end of every process: orphans, such as a fork server, are adopted and waited for
- memory is the sum of PSS, in which shared pages count once, sampled every 0.1 s: shorter peaks can be missed
- where there is no /proc, memory is that of the largest process alone
"""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.1
ORPHAN_SECONDS = 10.0  # how long what a command leaves behind may take to end
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
SESSION = 3  # of the fields of /proc/<pid>/stat after the command's name


@dataclass(frozen=True)
class Usage:
    """What a command took: seconds of wall clock, seconds of CPU, bytes of memory; how it ended and what it said."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    exit_code: int
    output: str


def measure(command: list[str], cores: int, environment: dict[str, str]) -> Usage:
    """Run `command` on the first `cores` cores to its end; standard output and error are kept together."""
    _adopt_orphans()
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = _start(command, cores, environment, log.fileno())
        memory = _Memory(process.pid)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            _kill(process.pid)
            raise
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu_seconds = _cpu(usage) + _await_orphans(process.pid)
        peak = memory.finish() or usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        log.seek(0)
        return Usage(seconds, cpu_seconds, peak, process.returncode, log.read().decode(errors="replace"))


def _adopt_orphans() -> None:
    """Make this process the parent of processes whose own parent ends, so that their CPU time can be asked for."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _start(command: list[str], cores: int, environment: dict[str, str], output: int) -> subprocess.Popen[bytes]:
    """Start in a session of its own, whose number says later which processes belong to it."""
    allowed = os.sched_getaffinity(0) if sys.platform == "linux" else set()
    try:
        if allowed:
            os.sched_setaffinity(0, sorted(allowed)[:cores])  # inherited
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    finally:
        if allowed:
            os.sched_setaffinity(0, allowed)


def _cpu(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def _await_orphans(group: int) -> float:
    """CPU seconds of adopted processes; those that do not end by themselves are killed."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    seconds = 0.0
    while True:
        try:
            pid, _, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return seconds
        if pid:
            seconds += _cpu(usage)
        elif time.monotonic() > deadline:
            _kill(group)
            deadline += ORPHAN_SECONDS
        else:
            time.sleep(0.01)


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


class _Memory(threading.Thread):
    """The largest sum of PSS over the processes of a session, until `finish`; 0 when it cannot be read."""

    def __init__(self, session: int) -> None:
        super().__init__(daemon=True)
        self._session = session
        self._peak = 0
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        while True:
            self._peak = max(self._peak, sum(_pss(pid) for pid in _members(self._session)))
            if self._ended.wait(SAMPLE_SECONDS):
                return

    def finish(self) -> int:
        self._ended.set()
        self.join()
        return self._peak


def _members(session: int) -> list[str]:
    """Processes of a session, by the numbers in /proc."""
    found = []
    for pid in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if pid.isdecimal():
            with suppress(OSError):  # ended meanwhile
                fields = Path("/proc", pid, "stat").read_bytes().rpartition(b")")[2].split()
                if int(fields[SESSION]) == session:
                    found.append(pid)
    return found


def _pss(pid: str) -> int:
    with suppress(OSError):
        for line in Path("/proc", pid, "smaps_rollup").read_bytes().splitlines():
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) * 1024
    return 0
