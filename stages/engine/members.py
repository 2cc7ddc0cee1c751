"""Trainings that do not need each other, several at once: a process for each, with its device, threads and log.

- one that fails stops no other: what failed is told when the rest is finished, with the logs to read
- a process leaves its parent's group, so Ctrl-C reaches the parent alone, which asks all to stop: each writes its
  checkpoint. Signals that come while no training listens are kept for the one that begins; a second signal to the
  parent ends everything at once
- a process ends with its parent, however that ends: SIGKILL leaves nobody behind to write into the run
- the threads of one member follow from how many may run at once, not from how many are left to train: the same command
  resumes with the same rounding
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from loguru import logger

import schemas.failures
from schemas import launch
from schemas.failures import Failure, InterruptedFailure, ResourceFailure
from schemas.launch import launched_as
from stages.engine.stopping import SIGNALS, stop_requested

if TYPE_CHECKING:
    from loguru import Message

LOG_FORMAT = "{time:HH:mm:ss} {level: <7} {message}"


@dataclass(frozen=True)
class Member:
    """One training: its name in messages, what trains it (picklable), where its process writes what it has to say."""

    name: str
    train: Callable[[], Any]
    log: Path


@dataclass
class Running:
    """A member at work: its process, what it sends, its place among those at work, and how it failed."""

    member: Member
    process: SpawnProcess
    connection: Connection
    slot: int
    failure: Failure | None = None


def members_at_once(asked: int | None) -> int:
    """As many as asked for, else one per CUDA device; on a processor one, which gets all the threads."""
    return asked or max(1, torch.cuda.device_count())


def train_members(members: Sequence[Member], at_once: int) -> dict[str, Any]:
    """Train all members, `at_once` at a time; one at a time in this process, which then has what they return.

    Raises one failure for all that failed, InterruptedFailure when a signal stopped them. Under a launcher, whose
    processes have to stay together, they go one by one, and the first failure ends it.
    """
    if launched_as().world > 1:
        return {member.name: member.train() for member in members}
    results: dict[str, Any] = {}
    failures = _one_by_one(members, results) if at_once == 1 else _in_processes(members, at_once)
    if failures:
        logs = [] if at_once == 1 else [member.log for member in members if member.name in failures]
        raise _together(failures, [log for log in logs if log.exists()])
    return results


def _one_by_one(members: Sequence[Member], results: dict[str, Any]) -> dict[str, Failure]:
    failures: dict[str, Failure] = {}
    for member in members:
        try:
            results[member.name] = member.train()
        except Failure as failure:
            failures[member.name] = failure.with_traceback(None)  # whose frames would keep the model in memory
            if isinstance(failure, InterruptedFailure):
                break
            if member is not members[-1]:
                logger.warning("{}", failure)
    return failures


def _together(failures: Mapping[str, Failure], logs: Sequence[Path]) -> Failure:
    """One failure that says all; a signal's, or else the first one's, decides on its kind."""
    names: dict[str, list[str]] = {}
    for name, failure in failures.items():
        names.setdefault(str(failure).removeprefix(f"{name}: ").removeprefix(f"{name} "), []).append(name)
    kinds = [type(failure) for failure in failures.values()]
    kind = InterruptedFailure if InterruptedFailure in kinds else kinds[0]
    told = "; ".join(f"{', '.join(owners)}: {message}" for message, owners in names.items())
    return kind(told + (f" (logs: {', '.join(map(str, logs))})" if logs else ""))


def _in_processes(members: Sequence[Member], at_once: int) -> dict[str, Failure]:
    threads = max(1, torch.get_num_threads() // at_once)
    devices = _devices()
    logger.info("{} members, {} at once, threads of each: {}", len(members), at_once, threads)
    failures: dict[str, Failure] = {}
    waiting, running, free = list(members), list[Running](), list(range(at_once))
    stopped = False
    try:
        with stop_requested() as stopping:
            while waiting or running:
                if stopping() and not stopped:
                    stopped = True
                    for one in running:
                        one.process.terminate()
                if stopped or any(isinstance(failure, InterruptedFailure) for failure in failures.values()):
                    left = InterruptedFailure("not begun: run the same command to resume")
                    failures |= dict.fromkeys((member.name for member in waiting), left)
                    waiting.clear()
                while waiting and free:
                    slot = free.pop(0)
                    device = devices[slot % len(devices)] if devices else None
                    running.append(_start(waiting.pop(0), slot, device, threads))
                ready = wait([one.connection for one in running], timeout=0.2)
                for one in [one for one in running if one.connection in ready and not _receive(one)]:
                    if failure := _ended(one):
                        failures[one.member.name] = failure
                    running.remove(one)
                    free.append(one.slot)
    finally:
        for one in running:
            one.process.kill()
            one.process.join()
    return {member.name: failures[member.name] for member in members if member.name in failures}


def _devices() -> list[str]:
    """The devices there are, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name for name in visible.split(",") if name] or [str(n) for n in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


def _start(member: Member, slot: int, device: str | None, threads: int) -> Running:
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(member, device, threads, launch.STARTED, sending), name=member.name)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the new process inherits it, until it can listen
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    sending.close()
    return Running(member, process, receiving, slot)


def _receive(one: Running) -> bool:
    """Pass on a log record, or keep a failure. False when the process has ended."""
    try:
        message = json.loads(one.connection.recv_bytes())
    except (EOFError, OSError):  # OSError: it was killed in the middle of a message
        return False
    if "failure" in message:
        one.failure = getattr(schemas.failures, message["kind"])(message["failure"])
    else:
        logger.bind(**message["extra"]).log(message["level"], "{}", message["text"])
    return True


def _ended(one: Running) -> Failure | None:
    """How a process that has ended failed, if it did."""
    one.process.join()
    one.connection.close()
    code, failure = one.process.exitcode or 0, one.failure
    if code == -signal.SIGKILL:
        failure = ResourceFailure("killed by SIGKILL, perhaps for want of memory: run the same command to resume")
    elif code < 0:
        failure = Failure(f"ended by {signal.Signals(-code).name}")
    elif code and not failure:
        failure = Failure(f"ended with exit code {code}")
    if failure and not isinstance(failure, InterruptedFailure):
        logger.warning("{}: {}", one.member.name, str(failure).removeprefix(f"{one.member.name}: "))
    return failure


# In the process of a member


def _work(member: Member, device: str | None, threads: int, started: float, connection: Connection) -> None:
    os.setpgrp()
    launch.STARTED = started  # of the command, not of this process
    _keep_signals()
    _write_to(member.log, connection)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # read when CUDA is first used, which is later
    torch.set_num_threads(threads)
    try:
        member.train()
    except Failure as failure:
        _send_failure(connection, failure)
        logger.error("{}", failure)
        sys.exit(failure.exit_code)
    except Exception as error:
        traceback.print_exc()
        kind = ResourceFailure if isinstance(error, (MemoryError, torch.OutOfMemoryError)) else Failure
        said = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        _send_failure(connection, kind(said))
        sys.exit(kind.exit_code)


def _send_failure(connection: Connection, failure: Failure) -> None:
    connection.send_bytes(json.dumps({"kind": type(failure).__name__, "failure": str(failure)}).encode())


def _keep_signals() -> None:
    """Keep signals until a training listens, and watch over the parent."""
    kept = threading.Event()

    def keep(number: int, frame: object) -> None:
        kept.set()

    def watch() -> None:
        parent = multiprocessing.parent_process()
        while parent is not None and not wait([parent.sentinel], timeout=0.1):
            if kept.is_set() and signal.getsignal(signal.SIGTERM) is not keep:
                kept.clear()
                os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1)

    for number in SIGNALS:
        signal.signal(number, keep)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=watch, daemon=True).start()


def _write_to(log: Path, connection: Connection) -> None:
    """Send what is printed and logged to the log, and records also to the parent, which shows them."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    def send(message: "Message") -> None:
        record = message.record
        if record["level"].no >= logger.level("INFO").no or "task" in record["extra"]:
            content = {"level": record["level"].name, "text": record["message"], "extra": record["extra"]}
            connection.send_bytes(json.dumps(content, default=str).encode())

    logger.remove()
    logger.add(sys.stderr, format=LOG_FORMAT, level="INFO")
    logger.add(send, level="DEBUG", format="{message}")
