"""The faults of bench_faults.py, each a function that strikes the stages of a tiny pipeline and counts what survives.

- SIGKILL strikes at a moment drawn evenly from the time the stage takes without it
- a full disk is a small tmpfs, or without the right to mount one a limit on the size of files (EFBIG)
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from faulty_pipeline import STAGES, TRAINING, Bench, Row

from schemas.run_manifests import manifest_folders, read_manifest


def kill(bench: Bench) -> None:
    """SIGKILL at any moment."""
    for stage in bench.stages:
        for row in bench.row("SIGKILL", stage):
            for _ in range(bench.tries):
                run = bench.before(stage)
                ended = bench.run(run, stage, kill=bench.draw.uniform(0, bench.seconds[stage]))
                bench.again(row, run, [], struck=ended.code == -signal.SIGKILL)


def group(bench: Bench) -> None:
    """SIGKILL of a stage and the processes that work for it."""
    for stage, flags in (("tokenize", ("--workers", "2")), ("train-experts", ("--parallel", "2"))):
        if stage not in bench.stages:
            continue
        seconds = bench.run(run := bench.before(stage), stage, *flags).seconds
        shutil.rmtree(run)
        for row in bench.row(f"SIGKILL, {' '.join(flags)}", stage):
            for _ in range(max(1, bench.tries // 4)):
                run = bench.before(stage)
                ended = bench.run(run, stage, *flags, kill=bench.draw.uniform(0, seconds))
                bench.again(row, run, [], *flags, struck=ended.code == -signal.SIGKILL)


def manifest(bench: Bench) -> None:
    """SIGKILL when the data is written and a manifest is not, at each manifest that the stage writes."""
    for stage in bench.stages:
        written = [name for name in manifest_folders(bench.whole) if name.split("/")[0] in STAGES[stage]]
        for row in bench.row("SIGKILL before a manifest", stage):
            for number in range(1, len(written) + 1):
                run = bench.before(stage)
                ended = bench.run(run, stage, fault=("manifest", number))
                bench.again(row, run, ended.wrong(-signal.SIGKILL))


def full(bench: Bench) -> None:
    """No room at some point of what the stage writes."""
    for stage in bench.stages:
        place, reason = mounted(bench.folder / f"disk-{stage}", "size=64m")
        if place is None:
            print(f"| disk full (tmpfs) | {stage} | skipped: {reason} |", flush=True)
            continue
        try:
            for row in bench.row("disk full (tmpfs)", stage):
                for _ in range(max(1, bench.tries // 4)):
                    fill(bench, row, place)
        finally:
            subprocess.run(["umount", place], check=True)


def fill(bench: Bench, row: Row, place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
    run = bench.before(row.stage, place / "run")
    used = used_bytes(place)
    needed = sum(path.stat().st_size for name in STAGES[row.stage] for path in (bench.whole / name).rglob("*"))
    room = used + 4096 + int(bench.draw.random() * needed) // 4096 * 4096
    subprocess.run(["mount", "-o", f"remount,size={room}", place], check=True)
    ended = bench.run(run, row.stage)
    subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
    bench.again(
        row, run, ended.wrong(6, 0), struck=ended.code == 6
    )  # 0: what it needed to write besides was less than thought
    shutil.rmtree(run, ignore_errors=True)


def used_bytes(place: Path) -> int:
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def mounted(place: Path, options: str) -> tuple[Path | None, str]:
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
    return (place, "") if done.returncode == 0 else (None, done.stderr.strip() or "mount failed")


def size(bench: Bench) -> None:
    """No file may grow beyond some size: what a full disk is to those who cannot mount one."""
    for stage in bench.stages:
        largest = max(path.stat().st_size for name in STAGES[stage] for path in (bench.whole / name).rglob("*"))
        for row in bench.row("files limited in size (EFBIG)", stage):
            for _ in range(max(1, bench.tries // 4)):
                run = bench.before(stage)
                ended = bench.run(run, stage, fault=("file size", bench.draw.uniform(200, largest - 1)))
                bench.again(row, run, ended.wrong(6))


def readonly(bench: Bench) -> None:
    """A run that may not be written to: a read-only mount, for root may write wherever rights alone forbid it."""
    for stage in bench.stages:
        run = bench.before(stage)
        for step in (["--bind", run, run], ["-o", "remount,bind,ro", run]):
            done = subprocess.run(["mount", *step], capture_output=True, text=True)
        if done.returncode:
            print(f"| read-only run | {stage} | skipped: {done.stderr.strip()} |", flush=True)
            continue
        for row in bench.row("read-only run", stage):
            ended = bench.run(run, stage)
            subprocess.run(["umount", run], check=True)
            bench.again(row, run, ended.wrong(6))


def damage(bench: Bench) -> None:
    """A file cut, changed, gone, or of the future: `verify` names it, and what reads it refuses it."""
    readers = {"tokens": "cluster", "clusters": "train-experts", "seed": "train-experts", "experts": "train-gates",
               "dense": "evaluate", "gates": "compose", "central": "evaluate", "central-alone": "evaluate"}  # fmt: skip
    # A changed bit of a manifest may also make what was made from it stale, or change nothing that is read.
    expected = {"bit of a manifest flipped": (4, 2, 0), "manifest of a newer version": (4,)}
    for name, spoil in DAMAGE.items():
        codes = expected.get(name, (4, 0))
        for folder, stage in readers.items():
            if stage not in bench.stages:
                continue
            for row in bench.row(name, f"{folder}, read by {stage}"):
                for _ in range(max(1, bench.tries // 10)):
                    run = bench.folder / f"run-{next(bench._numbers)}"
                    shutil.copytree(bench.whole, run)
                    target = victim(bench, run, folder, name)
                    spoil(target, bench.draw)
                    told = str(target.relative_to(run))
                    checked = bench.run(run, "verify")
                    wrong = checked.wrong(4) + ([] if told in checked.text else [f"verify does not name {told}"])
                    for away in STAGES[stage]:
                        shutil.rmtree(run / away)
                    ended = bench.run(run, stage)
                    reads = "manifest" in name or ended.code == 4 or not bench.harm(run, stage)
                    wrong += ended.wrong(*codes) + ([] if reads else [f"{stage} read {told} and went on"])
                    row.count(wrong, 0)
                    shutil.rmtree(run)


def victim(bench: Bench, run: Path, folder: str, damage: str) -> Path:
    if "manifest" in damage:
        return run / folder / "manifest.json"
    outputs = read_manifest(run, folder).outputs or read_manifest(run, f"{folder}/000").outputs
    return run / bench.draw.choice([ref for ref in outputs if ref.size > 1 and not ref.path.endswith(".png")]).path


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content) - 1)] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def newer(path: Path, _: random.Random) -> None:
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps({**content, "schema": content["schema"].split("/")[0] + "/99", "more": 1}))


DAMAGE: dict[str, Callable[[Path, random.Random], object]] = {
    "file cut": lambda path, draw: os.truncate(path, draw.randrange(path.stat().st_size)),
    "bit of a file flipped": flip,
    "file missing": lambda path, _: path.unlink(),
    "manifest cut": lambda path, draw: os.truncate(path, draw.randrange(path.stat().st_size - 2)),
    "bit of a manifest flipped": flip,
    "manifest of a newer version": newer,
}


def two(bench: Bench) -> None:
    """Two processes at once: the second is refused, the first goes on."""
    for stage in bench.stages:
        for row in bench.row("a second process", stage):
            for _ in range(max(1, bench.tries // 4)):
                run = bench.before(stage)
                first, _output = bench.start(run, stage)
                lock = run / ".locks" / f"{STAGES[stage][0]}.lock"
                end = time.monotonic() + bench.seconds[stage]
                while time.monotonic() < end and not any(path.read_text() for path in lock.parent.glob("*.lock")):
                    time.sleep(0.001)
                second = bench.run(run, stage)
                first.join()  # type: ignore[attr-defined]
                if second.code == 0:  # it came when the first had finished, or between two of its folders
                    continue
                wrong = second.wrong(5)
                wrong += [f"the first ended with {first.exitcode}"] if first.exitcode not in (0, 5) else []  # type: ignore[attr-defined]
                bench.again(row, run, wrong)


def clock(bench: Bench) -> None:
    """A clock that runs backwards, an hour a second, and SIGKILL under it."""
    for stage in bench.stages:
        for row in bench.row("clock backwards, SIGKILL", stage):
            for _ in range(max(1, bench.tries // 10)):
                run = bench.before(stage)
                ended = bench.run(run, stage, kill=bench.draw.uniform(0, bench.seconds[stage]), fault=("clock", 0))
                wrong = bench.run(run, stage, fault=("clock", 0)).wrong(0)
                bench.again(row, run, wrong, struck=ended.code == -signal.SIGKILL)


def diverge(bench: Bench) -> None:
    """A loss that is not finite: told as what it is, and with other settings the stage begins anew."""
    for stage in [stage for stage in TRAINING if stage in bench.stages]:
        for row in bench.row("loss not finite", stage):
            run = bench.before(stage)
            rate = "--bridge-learning-rate" if stage == "compose" else "--learning-rate"
            ended = bench.run(run, stage, rate, "1e38")
            bench.again(row, run, ended.wrong(7))


FAULTS: dict[str, Callable[[Bench], None]] = {
    "kill": kill, "group": group, "manifest": manifest, "full": full, "size": size, "readonly": readonly,
    "damage": damage, "two": two, "clock": clock, "diverge": diverge,
}  # fmt: skip
