"""From JSON lines to token ids on disk: `cpipe tokenize` beside its encoder alone, datasets, datatrove, Megatron's way.

    pip install datatrove zstandard    # datasets comes with cpipe's dev extra; what is missing is a row that says so
    python benchmarks/bench_tokenize.py 'corpus/*.jsonl.zst' [--rounds 3] [--compressed] [--json FILE]

- one tokenizer for all, trained first on a sample; documents with no text are left out first, as pipelines differ there
- each row is a process of its own, kept to --cores; rows take turns, in the opposite order every other round
- start-up is what the same command takes, in the same round, for a few one-word documents in as many files (for a
  single document datasets would start no pool, and one of cpipe's splits would be empty)
- CPU seconds and memory are those of the whole process tree. The encoders alone are timed from texts in memory to ids
  in memory, the limit for whatever is built around them; their memory includes the texts
- every output is read back, and its ids are compared with those of tokenizers, document by document; before, fastokens
  is compared with tokenizers on the same text and on strings made to trip it (see bench_tokenize_exact.py)
- --compressed measures the pipelines on .jsonl.zst files as well
"""

import argparse
import glob
import io
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from bench_tokenize_exact import prove
from bench_tokenize_rows import Setup, measure_rounds, print_table, rows_of

TINY_DOCUMENTS = 200  # of one word; so many that both of cpipe's splits get some
PACKAGES = ("cpipe", "fastokens", "tokenizers", "datasets", "datatrove", "pyarrow", "numpy")


class Corpus(NamedTuple):
    """The texts, and the files that every pipeline gets, by form; the tiny ones are those start-up is measured with."""

    texts: list[str]
    files: dict[str, list[str]]
    tiny: dict[str, list[str]]


def main() -> None:
    options = _options()
    forms = ("plain", "compressed") if options.compressed else ("plain",)
    with tempfile.TemporaryDirectory(prefix="bench-tokenize-") as folder:
        work = Path(folder)
        corpus = _prepare(_expand(options.files), options.limit_mb, forms, work)
        documents, size = len(corpus.texts), sum(len(text.encode()) for text in corpus.texts)
        about = f"{_machine(options.cores)}\n\n{documents} documents, {size / 1e6:.1f} MB of text"
        print(f"{about}\n", flush=True)
        tokenizer, reference, exact = prove(corpus.texts, options.vocab_size, options.fuzz, work)
        corpus.texts.clear()
        rows = rows_of(forms)
        setup = Setup(work / "out", tokenizer, options.cores, size, corpus.files, corpus.tiny, reference)
        measure_rounds(rows, setup, options.rounds)
    print_table(rows, setup)
    print(f"\nload average at the end: {os.getloadavg()[0]:.1f}")
    if options.json:
        report = {"about": about, "bytes": size, "exact": exact, "rows": [row.to_json() for row in rows]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _options() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="JSON lines with a key `text`: .jsonl, also .zst, .gz or .bz2; globs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit-mb", type=float, help="of text, an equal share of every file; default: everything")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--cores", type=int, default=cores, help="default: all")
    parser.add_argument("--fuzz", type=int, default=40_000, help="strings to compare the libraries on")
    parser.add_argument("--compressed", action="store_true", help="measure on .jsonl.zst files, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement here")
    return parser.parse_args()


def _expand(patterns: Sequence[str]) -> list[str]:
    found = [path for pattern in patterns for path in sorted(glob.glob(pattern))]
    return found or sys.exit(f"no such file: {' '.join(patterns)}")


def _prepare(paths: Sequence[str], limit_mb: float | None, forms: Sequence[str], work: Path) -> Corpus:
    """Write the documents in every form; file names begin with a number, so that their order is by name, too."""
    corpus = Corpus([], {form: [] for form in forms}, {form: [] for form in forms})
    limit = limit_mb * 1e6 / len(paths) if limit_mb else float("inf")
    for number, path in enumerate(paths):
        lines = []
        for line, text in _documents(path, limit):
            lines.append(line)
            corpus.texts.append(text)
        words = range(-(-TINY_DOCUMENTS // len(paths)))
        tiny = [json.dumps({"text": "word", "id": f"{number}-{word}"}).encode() + b"\n" for word in words]
        name = f"{number:04d}-{Path(path).name.partition('.')[0]}.jsonl"
        for form in forms:
            corpus.files[form].append(_write(work / "corpus" / form / name, lines, form))
            corpus.tiny[form].append(_write(work / "tiny" / form / name, tiny, form))
    return corpus


def _documents(path: str, limit: float) -> Iterator[tuple[bytes, str]]:
    """The lines of a file that hold text, as they are, until `limit` bytes of text."""
    with io.BufferedReader(pa.input_stream(path, compression="detect"), 1 << 20) as stream:
        for line in stream:
            text = json.loads(line)["text"] if line.strip() else ""
            limit -= len(text.encode())
            if limit < 0:
                return
            if text.strip():
                yield line.rstrip(b"\r\n") + b"\n", text


def _write(path: Path, lines: Sequence[bytes], form: str) -> str:
    codec = {"plain": None, "compressed": "zstd"}[form]
    path = path.with_name(path.name + (".zst" if codec else ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.output_stream(str(path), compression=codec) as stream:
        stream.write(b"".join(lines))
    return str(path)


def _machine(cores: int) -> str:
    model = platform.processor() or platform.machine()
    if (found := Path("/proc/cpuinfo")).exists():
        names = [line for line in found.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(": ")[2] if names else model
    libraries = ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    load = os.getloadavg()[0]
    return f"{model}, {cores} cores, load average {load:.1f}; Python {platform.python_version()}, {libraries}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


if __name__ == "__main__":
    main()
