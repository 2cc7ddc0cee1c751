"""A tiny pipeline that met no fault, and its stages again with one: what bench_faults.py does its harm to.

- commands run in processes forked from one that has imported the libraries, so a fault strikes the stage, not an import
- what a fault left is held against the run that met none, file by file
"""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
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

    def __init__(self, folder: Path, tries: int, seed: int, engine: str, stages: Sequence[str]) -> None:
        self.folder, self.tries, self.draw = folder, tries, random.Random(seed)
        self.stages = [stage for stage in STAGES if stage in stages]  # that are harmed
        self.rows: list[Row] = []
        self.seconds: dict[str, float] = {}
        self._numbers = iter(range(1 << 30))
        self._context = multiprocessing.get_context("forkserver")
        libraries = [f"stages.{path.stem}" for path in (ROOT / "stages").glob("*.py")]
        self._context.set_forkserver_preload([*libraries, *(["deepspeed"] if engine == "deepspeed" else [])])
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for one while it is imported
        os.environ["PYTHONPATH"] = str(ROOT)  # for the process that all are forked from
        self.whole = folder / "whole"
        self.whole.mkdir()
        (self.whole / "cpipe.toml").write_text(SETTINGS.replace("{engine}", engine))
        for kind, words in WORDS.items():
            self._text(kind, words.split())
        self.inputs = [str(path) for path in sorted(folder.glob("*.jsonl"))]
        self.run(self.whole, "tokenize", "--help")  # the imports
        names = list(STAGES)
        for stage in names[: names.index(self.stages[-1]) + 1]:
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
