"""Faults on purpose, in every stage of a tiny pipeline: what survives, and what is lost.

    python benchmarks/bench_faults.py [--tries 20] [--seed 0] [--only kill,full,...]

Prints a row per fault and stage: tries, how many struck before the stage had ended, how many survived, bytes lost.
Survived means: the failure was told as it should be (exit code, one line), every manifest left behind lists whole
files, nothing made before was touched, and the same command, run again, ends with the bytes of a run that met no fault.
Bytes lost are those of files that do not. Rows that lose say how.

- commands run in processes forked from one that has imported the libraries, so a fault strikes the stage, not an import
- SIGKILL strikes at a moment drawn evenly from the time the stage takes without it
- a full disk is a small tmpfs, or without the right to mount one a limit on the size of files (EFBIG)
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from schemas.failures import IntegrityFailure  # noqa: E402
from schemas.files import digest_of  # noqa: E402
from schemas.run_manifests import manifest_folders, read_manifest  # noqa: E402

STAGES = {
    "tokenize": ("tokens",), "cluster": ("clusters",), "train-seed": ("seed",), "train-experts": ("experts", "dense"),
    "train-gates": ("gates",), "compose": ("central", "central-alone"), "evaluate": ("reports",),
}  # fmt: skip
TRAINING = ("train-seed", "train-experts", "train-gates", "compose")
SHAPE = (
    "hidden_size = 32\nintermediate_size = 64\nnum_hidden_layers = 2\nnum_attention_heads = 4\nnum_key_value_heads = 2"
)
TRAIN = 'batch_size = 6\nsequence_length = 32\nengine = "{engine}"\nprecision = "fp32"\ncheckpoint_every = 2'
SETTINGS = f"""
[tokenize]
vocab_size = 320
valid_fraction = 0.15
shard_bytes = 4000
[cluster]
clusters = 3
dimensions = 8
[train-seed]
steps = 16
{SHAPE}
{TRAIN}
[train-experts]
steps = 8
{TRAIN}
[train-gates]
steps = 8
{TRAIN}
[compose]
group_length = 4
latents_per_group = 2
encoder_layers = 1
latent_layers = 1
decoder_layers = 1
token_window = 8
plan_horizon = 2
steps = 8
bridge_steps = 8
bridge_batch_size = 6
{TRAIN}
[evaluate]
tokens = 700
top_k = [1]
"""
WORDS = {
    "recipe": "butter flour sugar eggs whisk the bowl oven bake gently until golden add salt milk stir dough",
    "code": "def return self if else import for in range print value = ( ) : [ ] None class yield lambda",
    "law": "whereas the party shall hereby pursuant clause contract obligations court liable notice tenant",
}
PATIENCE = 300.0  # seconds that a stage may take


@dataclass
class Row:
    """One fault in one stage."""

    fault: str
    stage: str
    tries: int = 0
    struck: int = 0
    survived: int = 0
    lost: int = 0
    how: list[str] = field(default_factory=list)

    def count(self, wrong: list[str], lost: int, struck: bool = True) -> None:
        self.tries += 1
        self.struck += struck
        self.survived += not wrong and not lost
        self.lost += lost
        self.how += wrong or ([f"{lost} bytes differ"] if lost else [])

    def __str__(self) -> str:
        how = f"  LOST: {self.how[0][:300]}" if self.how else ""
        return f"| {self.fault} | {self.stage} | {self.tries} | {self.struck} | {self.survived} | {self.lost:,} |{how}"


@dataclass
class Ended:
    """How a command ended: its exit code, and what it printed."""

    code: int
    text: str
    seconds: float

    def wrong(self, *codes: int) -> list[str]:
        """What is not as it should be, where one of `codes` was expected and one line to say why."""
        found = [] if self.code in codes else [f"exit code {self.code}, not {codes[0]}: {self.text[-400:]!r}"]
        lines = [line for line in self.text.splitlines() if line.startswith("cpipe:")]
        if "Traceback" in self.text or (self.code in codes and self.code > 0 and len(lines) != 1):
            found.append(f"not one line: {self.text[-400:]!r}")
        return found


def command(words: list[str], output: Path, fault: tuple[str, float]) -> None:
    """In a process of its own: run a command of cpipe with a fault built in."""
    os.setsid()
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    kind, number = fault
    if kind == "file size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(number), resource.RLIM_INFINITY))
    elif kind == "clock":
        start, now = time.time(), time.time
        time.time = lambda: start - 3600 * (now() - start)  # type: ignore[assignment]
    elif kind == "manifest":
        _die_before_manifest(int(number))
    from cpipe.app import build_app

    sys.argv = ["cpipe", *words]
    build_app(asked=words[0])(words)


def _die_before_manifest(number: int) -> None:
    from schemas import manifest

    write, left = manifest.Manifest.write, [number]

    def wrapped(*arguments: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.killpg(0, signal.SIGKILL)
        write(*arguments)  # type: ignore[arg-type]

    manifest.Manifest.write = wrapped  # type: ignore[method-assign,assignment]


class Bench:
    """A pipeline that met no fault, and its stages again with faults."""

    def __init__(self, folder: Path, tries: int, seed: int, engine: str) -> None:
        self.folder, self.tries, self.draw = folder, tries, random.Random(seed)
        self.rows: list[Row] = []
        self.seconds: dict[str, float] = {}
        self._numbers = iter(range(1 << 30))
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([f"stages.{path.stem}" for path in (ROOT / "stages").glob("*.py")])
        os.environ["PYTHONPATH"] = str(ROOT)  # for the process that all are forked from
        self.whole = folder / "whole"
        self.whole.mkdir()
        (self.whole / "cpipe.toml").write_text(SETTINGS.replace("{engine}", engine))
        for kind, words in WORDS.items():
            self._text(kind, words.split())
        self.inputs = [str(path) for path in sorted(folder.glob("*.jsonl"))]
        self.run(self.whole, "tokenize", "--help")  # the imports
        for stage in STAGES:
            ended = self.run(self.whole, stage)
            if ended.code:
                sys.exit(f"{stage} without a fault ended with {ended.code}:\n{ended.text}")
            self.seconds[stage] = ended.seconds

    def _text(self, kind: str, words: list[str]) -> None:
        draw = random.Random(kind)
        texts = [" ".join(draw.choices(words, k=60 + number % 7)) for number in range(40)]
        rows = [json.dumps({"id": f"{kind}-{i}", "source": kind, "text": text}) for i, text in enumerate(texts)]
        (self.folder / f"{kind}.jsonl").write_text("\n".join(rows) + "\n")

    def start(self, run: Path, stage: str, *flags: str, fault: tuple[str, float] = ("", 0)) -> tuple[object, Path]:
        words = [stage, str(run), *(self.inputs if stage == "tokenize" else ()), *flags]
        output = self.folder / f"output-{next(self._numbers)}"
        process = self._context.Process(target=command, args=(words, output, fault))
        process.start()
        return process, output

    def run(self, run: Path, stage: str, *flags: str, kill: float | None = None, **named: object) -> Ended:
        """Run a stage to its end, or for `kill` seconds and no longer."""
        begun = time.monotonic()
        process, output = self.start(run, stage, *flags, **named)  # type: ignore[arg-type]
        process.join(PATIENCE if kill is None else kill)  # type: ignore[attr-defined]
        if process.is_alive():  # type: ignore[attr-defined]
            with contextlib.suppress(ProcessLookupError):  # before it has a group of its own
                os.killpg(process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
            process.kill()  # type: ignore[attr-defined]
            process.join()  # type: ignore[attr-defined]
        text = output.read_text(errors="replace") if output.exists() else ""
        return Ended(process.exitcode or 0, text, time.monotonic() - begun)  # type: ignore[attr-defined]

    def before(self, stage: str, place: Path | None = None) -> Path:
        """A copy of the run as it was before the stage."""
        run = place or self.folder / f"run-{next(self._numbers)}"
        run.mkdir(exist_ok=True)
        names = list(STAGES)
        kept = [folder for name in names[: names.index(stage)] for folder in STAGES[name]]
        shutil.copy(self.whole / "cpipe.toml", run)
        for folder in (*kept, ".locks"):
            shutil.copytree(self.whole / folder, run / folder)
        return run

    def harm(self, run: Path, *stages: str) -> int:
        """Bytes of these stages' results that are not those of the whole run."""
        lost = 0
        for folder in manifest_folders(self.whole):
            if any(folder.split("/")[0] in STAGES[stage] for stage in stages):
                reference = read_manifest(self.whole, folder)
                for ref in reference.outputs:
                    path = run / ref.path
                    lost += 0 if path.is_file() and digest_of(path) == ref.digest else ref.size
                try:
                    same = read_manifest(run, folder).content_digest() == reference.content_digest()
                except (IntegrityFailure, OSError):
                    same = False
                lost += 0 if same else (self.whole / folder / "manifest.json").stat().st_size
        return lost

    def half(self, run: Path) -> list[str]:
        """Manifests that list files which are not whole."""
        found = []
        for folder in manifest_folders(run):
            for ref in read_manifest(run, folder).outputs:
                try:
                    ref.check(run)
                except IntegrityFailure as failure:
                    found.append(f"after the fault: {failure}")
        return found

    def again(self, row: Row, run: Path, wrong: list[str], *flags: str, struck: bool = True) -> None:
        """Run the stage again, and note what is not as without the fault."""
        names = list(STAGES)
        wrong += self.half(run)
        ended = self.run(run, row.stage, *flags)
        wrong += ended.wrong(0)
        left = [str(path.relative_to(run)) for path in run.rglob("*.tmp")]
        wrong += [f"left behind: {left}"] if left else []
        row.count(wrong, self.harm(run, *names[: names.index(row.stage) + 1]), struck)
        if not wrong:
            shutil.rmtree(run)

    def counts(self) -> list[tuple[int, int, int, int]]:
        return [(row.tries, row.struck, row.survived, row.lost) for row in self.rows]

    def row(self, fault: str, stage: str) -> Iterator[Row]:
        row = Row(fault, stage)
        yield row
        self.rows.append(row)
        print(row, flush=True)


def kill(bench: Bench) -> None:
    """SIGKILL at any moment."""
    for stage in STAGES:
        for row in bench.row("SIGKILL", stage):
            for _ in range(bench.tries):
                run = bench.before(stage)
                ended = bench.run(run, stage, kill=bench.draw.uniform(0, bench.seconds[stage]))
                bench.again(row, run, [], struck=ended.code == -signal.SIGKILL)


def group(bench: Bench) -> None:
    """SIGKILL of a stage and the processes that work for it."""
    for stage, flags in (("tokenize", ("--workers", "2")), ("train-experts", ("--parallel", "2"))):
        seconds = bench.run(run := bench.before(stage), stage, *flags).seconds
        shutil.rmtree(run)
        for row in bench.row(f"SIGKILL, {' '.join(flags)}", stage):
            for _ in range(max(1, bench.tries // 4)):
                run = bench.before(stage)
                ended = bench.run(run, stage, *flags, kill=bench.draw.uniform(0, seconds))
                bench.again(row, run, [], *flags, struck=ended.code == -signal.SIGKILL)


def manifest(bench: Bench) -> None:
    """SIGKILL when the data is written and a manifest is not, at each manifest that the stage writes."""
    for stage, folders in STAGES.items():
        written = [name for name in manifest_folders(bench.whole) if name.split("/")[0] in folders]
        for row in bench.row("SIGKILL before a manifest", stage):
            for number in range(1, len(written) + 1):
                run = bench.before(stage)
                ended = bench.run(run, stage, fault=("manifest", number))
                bench.again(row, run, ended.wrong(-signal.SIGKILL))


def full(bench: Bench) -> None:
    """No room at some point of what the stage writes."""
    for stage in STAGES:
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
    for stage, folders in STAGES.items():
        largest = max(path.stat().st_size for name in folders for path in (bench.whole / name).rglob("*"))
        for row in bench.row("files limited in size (EFBIG)", stage):
            for _ in range(max(1, bench.tries // 4)):
                run = bench.before(stage)
                ended = bench.run(run, stage, fault=("file size", bench.draw.uniform(200, largest - 1)))
                bench.again(row, run, ended.wrong(6))


def readonly(bench: Bench) -> None:
    """A run that may not be written to: a read-only mount, for root may write wherever rights alone forbid it."""
    for stage in STAGES:
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
    for stage in STAGES:
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
    for stage in STAGES:
        for row in bench.row("clock backwards, SIGKILL", stage):
            for _ in range(max(1, bench.tries // 10)):
                run = bench.before(stage)
                ended = bench.run(run, stage, kill=bench.draw.uniform(0, bench.seconds[stage]), fault=("clock", 0))
                wrong = bench.run(run, stage, fault=("clock", 0)).wrong(0)
                bench.again(row, run, wrong, struck=ended.code == -signal.SIGKILL)


def diverge(bench: Bench) -> None:
    """A loss that is not finite: told as what it is, and with other settings the stage begins anew."""
    for stage in TRAINING:
        for row in bench.row("loss not finite", stage):
            run = bench.before(stage)
            rate = "--bridge-learning-rate" if stage == "compose" else "--learning-rate"
            ended = bench.run(run, stage, rate, "1e38")
            bench.again(row, run, ended.wrong(7))


FAULTS = {
    "kill": kill, "group": group, "manifest": manifest, "full": full, "size": size, "readonly": readonly,
    "damage": damage, "two": two, "clock": clock, "diverge": diverge,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20, help="kills of each stage; other faults get a part of it")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, sizes and bits drawn")
    parser.add_argument("--only", default=",".join(FAULTS), help="faults to try, with commas between them")
    parser.add_argument("--engine", default="torch", choices=("torch", "deepspeed"), help="what trains")
    given = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), given.tries, given.seed, given.engine)
        times = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in bench.seconds.items())
        print(f"seconds without a fault: {times}\n")
        print("| fault | stage | tries | struck | survived | bytes lost |\n|---|---|--:|--:|--:|--:|", flush=True)
        for fault in given.only.split(","):
            FAULTS[fault](bench)
    tries, struck, survived, lost = (sum(column) for column in zip(*bench.counts(), strict=True))
    print(f"| all | all | {tries} | {struck} | {survived} | {lost:,} |")
    print(f"\n{tries - survived} of {tries} tries lost; {time.monotonic() - begun:.0f} s, seed {given.seed}")


if __name__ == "__main__":
    main()
