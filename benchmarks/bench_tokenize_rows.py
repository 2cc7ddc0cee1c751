"""The rows of `bench_tokenize.py`: which commands are measured, their rounds, and the table."""

import importlib.util
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench_tokenize_ids import Comparison, Ids, compare, read_binary, read_cpipe, read_datasets, read_datatrove
from bench_tokenize_process import Usage, measure

PEERS = Path(__file__).with_name("bench_tokenize_peers.py")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
YARDSTICK = "datasets.map"


class Pipeline(NamedTuple):
    """A way from text to ids: a function of the peers, or cpipe with `flags`; `result` is the folder that counts."""

    name: str
    package: str
    read: Callable[[Path], Ids]
    peer: str = ""
    flags: tuple[str, ...] = ()
    result: str = "."
    limit: str = ""  # the row of the encoder it is built around
    alone: bool = False


PIPELINES = (
    Pipeline("fastokens alone", "fastokens", read_binary, peer="fastokens_alone", alone=True),
    Pipeline("tokenizers alone", "tokenizers", read_binary, peer="tokenizers_alone", alone=True),
    Pipeline("cpipe tokenize", "cpipe", read_cpipe, result="tokens", limit="fastokens alone"),
    Pipeline(
        "cpipe tokenize --encoder tokenizers",
        "cpipe",
        read_cpipe,
        flags=("--encoder", "tokenizers"),
        result="tokens",
        limit="tokenizers alone",
    ),
    Pipeline(YARDSTICK, "datasets", read_datasets, peer="datasets_map", result="dataset", limit="tokenizers alone"),
    Pipeline(
        "datatrove DocumentTokenizer",
        "datatrove",
        read_datatrove,
        peer="datatrove_tokenizer",
        result="tokens",
        limit="tokenizers alone",
    ),
    Pipeline("Megatron-style loop", "tokenizers", read_binary, peer="megatron_loop", limit="tokenizers alone"),
)


@dataclass(frozen=True)
class Setup:
    """What all rows share: a folder for outputs, the tokenizer, cores, bytes of text, files by form, the right ids."""

    out: Path
    tokenizer: str
    cores: int
    size: int
    files: dict[str, list[str]]
    tiny: dict[str, list[str]]
    reference: Ids


class Sample(NamedTuple):
    """One round of a row. Seconds, bytes; `left_bytes` counts caches and logs beside the result."""

    seconds: float
    startup: float
    cpu_seconds: float
    peak_bytes: int
    result_bytes: int
    left_bytes: int
    ids: Comparison


@dataclass
class Row:
    """A pipeline on one form of the files, with a sample for every round or the reason why there is none."""

    pipeline: Pipeline
    form: str
    samples: list[Sample] = field(default_factory=list)
    failure: str = ""

    @property
    def name(self) -> str:
        return self.pipeline.name if self.form == "plain" else f"{self.pipeline.name}, {self.form} files"

    def to_json(self) -> dict[str, Any]:
        samples = [sample._asdict() | {"ids": sample.ids.text} for sample in self.samples]
        return {"pipeline": self.pipeline.name, "form": self.form, "failure": self.failure, "samples": samples}


class PipelineFailed(Exception):
    """A command ended with an error."""


def rows_of(forms: Sequence[str]) -> list[Row]:
    """Every pipeline for every form; the encoders alone see no files."""
    return [Row(pipeline, form) for form in forms for pipeline in PIPELINES if form == forms[0] or not pipeline.alone]


def measure_rounds(rows: Sequence[Row], setup: Setup, rounds: int) -> None:
    """Fill the rows; one that fails is not tried again."""
    for number in range(rounds):
        for row in rows if number % 2 == 0 else reversed(rows):
            if not row.failure and not importlib.util.find_spec(row.pipeline.package):
                row.failure = f"{row.pipeline.package} is not installed"
            if not row.failure:
                try:
                    row.samples.append(_sample(row, setup))
                except PipelineFailed as failed:
                    row.failure = str(failed)
            told = row.failure or f"{row.samples[-1].seconds:.1f} s"
            print(f"round {number + 1} of {rounds}: {row.name}: {told}", file=sys.stderr, flush=True)


def _sample(row: Row, setup: Setup) -> Sample:
    pipeline = row.pipeline
    startup = 0.0 if pipeline.alone else _run(pipeline, setup, setup.tiny[row.form]).seconds
    usage = _run(pipeline, setup, setup.files[row.form])
    seconds, cpu_seconds = usage.seconds, usage.cpu_seconds
    if pipeline.alone:
        timing = json.loads((setup.out / "timing.json").read_text())
        seconds, cpu_seconds = timing["seconds"], timing["cpu_seconds"]
    sizes = (0, 0) if pipeline.alone else (_bytes_in(setup.out / pipeline.result), _bytes_in(setup.out))
    try:
        ids = compare(pipeline.read(setup.out), setup.reference)
    except Exception as error:  # another version of a peer may write otherwise, and the other rows are still wanted
        raise PipelineFailed(f"the output cannot be read: {type(error).__name__}: {error}") from error
    shutil.rmtree(setup.out)
    return Sample(seconds, startup, cpu_seconds, usage.peak_bytes, *sizes, ids)


def _run(pipeline: Pipeline, setup: Setup, files: Sequence[str]) -> Usage:
    """Run on `files` into an empty folder, with nothing waiting to be written. Raises PipelineFailed."""
    shutil.rmtree(setup.out, ignore_errors=True)
    setup.out.mkdir()
    out, cores = str(setup.out), str(setup.cores)
    if pipeline.peer:
        command = [sys.executable, str(PEERS), pipeline.peer, out, setup.tokenizer, cores, *files]
    else:
        command = [sys.executable, "-m", "cpipe", "tokenize", out, *files, "--tokenizer", setup.tokenizer]
        command += pipeline.flags
    os.sync()
    usage = measure(command, setup.cores, OFFLINE | {"HF_HOME": str(setup.out / "home")})
    if usage.exit_code:
        said = [line.strip(" │").replace("|", "/") for line in usage.output.splitlines() if any(map(str.isalnum, line))]
        raise PipelineFailed(f"failed with {usage.exit_code}: {' '.join(said[-3:]) or 'no message'}")
    return usage


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def print_table(rows: Sequence[Row], setup: Setup) -> None:
    """All rows, those that lose or fail too; then how near each comes to the encoder it is built around."""
    print(
        "| from text to ids | MB/s: least / middle / most | × datasets.map | MB/s without start-up | × datasets.map "
        "| start-up, s | CPU, s | peak memory, MB | on disk, MB (with caches) | ids |\n"
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|"
    )
    for row in rows:
        print(f"| {row.name} | {row.failure} |" if row.failure else _line(row, _find(rows, YARDSTICK, row.form), setup))
    print()
    for row in rows:
        limit = _find(rows, row.pipeline.limit, "plain")
        if row.samples and limit and limit.samples:
            share = statistics.median(_ratios(row, limit, _busy))
            print(f"- {row.name}: {share:.2f} of the speed of {limit.name} once started")


def _find(rows: Sequence[Row], name: str, form: str) -> Row | None:
    return next((row for row in rows if row.pipeline.name == name and row.form == form), None)


def _line(row: Row, yardstick: Row | None, setup: Setup) -> str:
    samples, alone = row.samples, row.pipeline.alone
    speeds = sorted(setup.size / 1e6 / sample.seconds for sample in samples)
    last = samples[-1]
    wrong = [sample.ids.text for sample in samples if not sample.ids.same]
    cells = [
        row.name,
        f"{speeds[0]:.2f} / **{statistics.median(speeds):.2f}** / {speeds[-1]:.2f}",
        _times(row, yardstick, lambda sample: sample.seconds),
        f"{statistics.median(setup.size / 1e6 / _busy(sample) for sample in samples):.2f}",
        _times(row, yardstick, _busy),
        "" if alone else f"{statistics.median(sample.startup for sample in samples):.2f}",
        f"{statistics.median(sample.cpu_seconds for sample in samples):.1f}",
        f"{max(sample.peak_bytes for sample in samples) / 1e6:.0f}",
        "" if alone else f"{last.result_bytes / 1e6:.1f} ({last.left_bytes / 1e6:.1f})",
        wrong[0] if wrong else last.ids.text,
    ]
    return f"| {' | '.join(cells)} |"


def _busy(sample: Sample) -> float:
    """Seconds without start-up; a thousandth of a second where noise leaves none."""
    return max(sample.seconds - sample.startup, 1e-3)


def _times(row: Row, yardstick: Row | None, seconds: Callable[[Sample], float]) -> str:
    """How many times faster than the yardstick, by the median over rounds."""
    if not yardstick or not yardstick.samples:
        return ""
    return f"{statistics.median(_ratios(row, yardstick, seconds)):.2f}"


def _ratios(row: Row, other: Row, seconds: Callable[[Sample], float]) -> Iterator[float]:
    """How many times faster than `other`, for the rounds both have."""
    for mine, theirs in zip(row.samples, other.samples, strict=False):
        yield seconds(theirs) / seconds(mine)
