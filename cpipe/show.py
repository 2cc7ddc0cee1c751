"""Results as short tables on standard output."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from schemas.clean_run import Removed
from schemas.failures import IntegrityFailure
from schemas.launch import launched_as
from schemas.manifest import FILE_NAME, Environment, Manifest
from schemas.progress import state_of
from schemas.run_manifests import manifest_folders, read_manifest
from schemas.strict import Strict
from schemas.submit_jobs import JobRow
from schemas.train_experts import AddedManifest
from schemas.verify_run import CheckedFolder

if TYPE_CHECKING:
    from schemas.plan_training import Plan

# A table in a file must not be squeezed, and neither tokens nor names of files are markup, though some look like it.
OUT = Console(width=None if sys.stdout.isatty() else 170, markup=False, emoji=False)
MOST_ROWS = 40
CELL = 60  # characters shown of a long value


def show_manifest(manifest: Manifest, run_dir: Path, *, as_json: bool) -> None:
    """Print what a stage measured and where it wrote: once, however many processes worked together."""
    if launched_as().rank:
        return
    if as_json:
        print(json.dumps(manifest.to_json(), indent=2, sort_keys=True))
        return
    if manifest.command == "evaluate":
        show_evaluation(manifest, run_dir)
        return
    folders = sorted({ref.path.split("/")[0] for ref in manifest.outputs if "/" in ref.path})
    place = f" in {', '.join(folders)}" if folders else ""
    OUT.print(
        Text(manifest.command, "bold") + f" finished in {run_dir}: {len(manifest.outputs)} files{place}", soft_wrap=True
    )
    scalars = Table(box=None, show_header=False)
    for name, value in _flat(manifest.metrics):
        if isinstance(value, tuple) and value and isinstance(value[0], Strict):
            show_rows(name, value)
        elif not isinstance(value, (tuple, dict)):
            scalars.add_row(name.replace("_", " "), cell(value))
    OUT.print(scalars)


def show_evaluation(manifest: Manifest, run_dir: Path) -> None:
    """The table of models, and where it and its plot lie."""
    metrics = dict(manifest.metrics)
    table = Table(title=f"{metrics['tokens']:,} held-out tokens of {metrics['documents']:,} documents")
    table.add_column("model")
    for name in ("bits/byte", "vs dense", "macro", "parameters", "active", "train FLOPs", "FLOPs/token"):
        table.add_column(name, justify="right")
    for row in metrics["rows"]:
        against = "–" if row.against_dense is None else f"{row.against_dense:+.2f} %"
        costs = (f"{row.parameters / 1e6:.1f} M", f"{row.active_parameters / 1e6:.1f} M", f"{row.training_flops:.1e}")
        scores = (f"{row.bits_per_byte:.4f}", against, f"{row.macro_bits_per_byte:.4f}")
        table.add_row(row.model, *scores, *costs, f"{row.inference_flops / 1e6:.1f} M")
    OUT.print(table)
    if metrics["usage"]:
        show_rows("bits per byte lost without a part", metrics["usage"])
    if fitted := metrics["fitted"]:
        OUT.print(
            f"fitted on {fitted.tokens:,} tokens of {fitted.documents:,} other documents: temperature "
            f"{fitted.temperature:.4g}, forgetting {fitted.forgetting:.4g}"
        )
    for model, steps in metrics["dense_steps"].items():
        OUT.print(f"{model} costs as much to train as a dense baseline of --dense-steps {steps}")
    OUT.print(f"largest change of a prediction when only the true prefix is given: {metrics['prefix_gap']:.1e} nats")
    for ref in manifest.outputs:
        OUT.print(str(run_dir / ref.path), soft_wrap=True, highlight=False)


def show_status(
    run_dir: Path, stages: Iterable[tuple[str, type[Manifest]]], jobs: Sequence[JobRow] = (), *, as_json: bool
) -> None:
    """Which stages are finished, when, and how long they took: reads only manifests. And the jobs given."""
    found = run_state(run_dir, stages)
    if as_json:
        states = {"jobs": [job.model_dump() for job in jobs]} if jobs else {}
        print(json.dumps({"run": str(run_dir), "stages": found, **states}, indent=2))
        return
    OUT.print(status_table(run_dir, found))
    if jobs:
        _print_jobs(jobs)


def status_table(run_dir: Path, found: Sequence[Mapping[str, Any]]) -> Table:
    """A line per stage."""
    table = Table(title=str(run_dir))
    for name in ("stage", "folder", "state", "started", "seconds"):
        table.add_column(name)
    for entry in found:
        table.add_row(*(cell(entry.get(name)) for name in ("stage", "folder", "state", "started", "seconds")))
    return table


def run_state(run_dir: Path, stages: Iterable[tuple[str, type[Manifest]]]) -> list[dict[str, Any]]:
    """An entry per stage, and per folder that a stage wrote beside its own."""
    found = []
    for command, kind in stages:
        path = run_dir / kind.folder / FILE_NAME
        if path.is_file():
            manifest = kind.parse(path)  # a seed may have been imported
            found.append(_finished(manifest.command, run_dir, kind.folder, manifest.environment))
        else:
            found.append({"stage": command, "folder": kind.folder, "state": state_of(run_dir, kind.folder)})
    return [*found, *_other_folders(run_dir, {entry["folder"] for entry in found})]


def show_jobs(jobs: Sequence[JobRow], run_dir: Path, *, as_json: bool) -> None:
    """What became of each job, and how to submit those that were not."""
    if as_json:
        print(json.dumps([job.model_dump() for job in jobs], indent=2))
        return
    _print_jobs(jobs)
    OUT.print(f"scripts and logs in {run_dir / 'slurm'}", soft_wrap=True, highlight=False)
    if any(job.state == "to submit" for job in jobs):
        OUT.print("submit them with the same command and --submit", highlight=False)


def _print_jobs(jobs: Sequence[JobRow]) -> None:
    table = Table(title="jobs", title_justify="left")
    for name in ("job", "tasks", "number", "state"):
        table.add_column(name)
    for job in jobs:
        table.add_row(job.job, cell(job.tasks), "–" if job.number is None else str(job.number), job.state)
    OUT.print(table)


def _finished(command: str, run_dir: Path, folder: str, environment: Environment) -> dict[str, Any]:
    """Of a stage that holds others together, the seconds of them all."""
    place = run_dir / folder
    seconds = environment.seconds + sum(
        read_manifest(place, member).environment.seconds for member in manifest_folders(place)
    )
    times = {"started": environment.started, "seconds": round(seconds, 3)}
    return {"stage": command, "folder": folder, "state": "finished", **times}


def _other_folders(run_dir: Path, known: set[str]) -> Iterator[dict[str, Any]]:
    """What stages wrote beside their own folder: the dense baseline, further compositions, domains added later."""
    for folder in manifest_folders(run_dir):
        # What lies deeper belongs to the folder around it, but for domains: nothing holds them together.
        if folder in known or (folder.count("/") and Path(folder).parent.as_posix() != AddedManifest.folder):
            continue
        path = run_dir / folder / FILE_NAME
        try:
            content = json.loads(path.read_bytes())
            environment = Environment.from_mapping(content["environment"])
            yield _finished(content["schema"].removeprefix("cpipe.").split("/")[0], run_dir, folder, environment)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IntegrityFailure(f"{path} is no manifest of cpipe: remove it, or rerun its stage") from error
    yield from _begun_beside(run_dir)


def _begun_beside(run_dir: Path) -> Iterator[dict[str, Any]]:
    """What was begun beside the stages' own folders and is not finished: dense baselines, domains."""
    places = [*run_dir.glob("dense/"), *run_dir.glob("dense-*/"), *run_dir.glob(f"{AddedManifest.folder}/*/")]
    for folder in (place.relative_to(run_dir).as_posix() for place in sorted(places)):
        if (state := state_of(run_dir, folder)).startswith("begun"):
            yield {"stage": AddedManifest.command, "folder": folder, "state": state}


def show_plan(plan: "Plan", *, as_json: bool) -> None:
    """A line per training, under them what the times rest on. States: weights, their copies, gradients, averages."""
    if as_json:
        print(plan.model_dump_json(indent=2))
        return
    table = Table(title="what the settings would train")
    table.add_column("training", no_wrap=True)
    names = ("times", "parameters", "trained", "tokens", "epochs", "FLOPs", "rate", "precision", "ZeRO", "rows")
    for name in (*names, "states", "activations", "disk", "hours"):
        table.add_column(name, justify="right")
    for each in plan.trainings:
        counts = (_size(each.parameters, ""), _size(each.trained_parameters, ""), _size(each.tokens, ""))
        how = (
            f"{each.flops:.1e}",
            f"{each.learning_rate:g}",
            each.precision,
            cell(each.zero_stage),
            cell(each.micro_batch_size),
        )
        activations = each.memory.activations
        bytes_of = (each.memory.total - activations, activations, each.disk)
        hours = None if each.seconds is None else each.seconds / 3600
        sizes = (_size(number, "B") for number in bytes_of)
        table.add_row(each.name, cell(each.count), *counts, cell(each.epochs), *how, *sizes, cell(hours))
    OUT.print(table)
    if plan.flops_per_second:
        OUT.print(f"{plan.flops_per_second:.3g} FLOP/s a device, {'measured here' if plan.measured else 'as given'}")
    seed = plan.trainings[0]
    if seed.name == "seed" and (share := seed.tokens / seed.parameters) < 10:
        better = "about 20 are best for given FLOPs (Hoffmann et al. 2022): more --steps, or fewer weights"
        OUT.print(f"the seed sees {share:.2g} tokens for each weight; {better}", soft_wrap=True)
    for line in plan.unknown:
        OUT.print(f"unknown: {line}", soft_wrap=True)


def _size(number: int, unit: str) -> str:
    """Three digits and a prefix."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}{unit}"
    return f"{number} {unit}".strip()


def show_checked(checked: Sequence[CheckedFolder], run_dir: Path, *, as_json: bool) -> None:
    """What `cpipe verify` found: a line per folder, and then per problem."""
    problems = [problem for folder in checked for problem in folder.problems]
    counts = {"files": sum(each.files for each in checked), "bytes": sum(each.bytes for each in checked)}
    if as_json:
        found = [problem.model_dump() for problem in problems]
        folders = [each.model_dump(exclude={"problems"}) for each in checked]
        print(json.dumps({"run": str(run_dir), **counts, "problems": found, "folders": folders}, indent=2))
        return
    table = Table(title=str(run_dir))
    for name in ("folder", "files", "bytes", "found"):
        table.add_column(name, justify="right" if name in ("files", "bytes") else "left")
    for each in checked:
        faults = ", ".join(sorted({problem.fault for problem in each.problems}))
        table.add_row(each.folder, cell(each.files), cell(each.bytes), faults or "as written")
    OUT.print(table)
    for problem in problems:
        OUT.print(f"{problem.fault}: {problem.message}", soft_wrap=True, highlight=False)
    OUT.print(f"{counts['files']:,} files, {counts['bytes']:,} bytes, {len(problems)} problems", highlight=False)


def show_removed(removed: Sequence[Removed], run_dir: Path, *, dry_run: bool, as_json: bool) -> None:
    """What `cpipe clean` removed, or would: a line each, and the room it took."""
    size = sum(each.bytes for each in removed)
    if as_json:
        found = [each.model_dump() for each in removed]
        print(json.dumps({"run": str(run_dir), "dry_run": dry_run, "bytes": size, "removed": found}, indent=2))
        return
    for each in removed:
        OUT.print(f"{run_dir / each.path}  {each.bytes:,} bytes, {each.why}", soft_wrap=True, highlight=False)
    OUT.print(
        f"{size:,} bytes {'would be freed' if dry_run else 'freed'} in {run_dir}", soft_wrap=True, highlight=False
    )


def show_samples(samples: dict[str, str]) -> None:
    """What some models wrote, by model."""
    for model, text in samples.items():
        OUT.print(Text(model, "bold"))
        OUT.print(text, highlight=False)


def show_rows(title: str, rows: tuple[Strict, ...]) -> None:
    """A table with a line per record; columns that are empty everywhere are left out."""
    table = Table(title=title.replace("_", " "), title_justify="left")
    records = [dict(row) for row in rows[:MOST_ROWS]]
    names = [name for name in records[0] if any(record[name] not in (None, (), {}) for record in records)]
    names = [name for name in names if not isinstance(records[0][name], Strict)]
    for name in names:
        number = all(isinstance(record[name], (int, float, type(None))) for record in records)
        table.add_column(name.replace("_", " "), justify="right" if number else "left")
    for record in records:
        table.add_row(*(cell(record[name]) for name in names))
    OUT.print(table)


def cell(value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, dict):
        value = [f"{name} {cell(count)}" for name, count in value.items()]
    if isinstance(value, (tuple, list)):
        value = ", ".join(cell(part) for part in value)
    text = str(value)
    return text if len(text) <= CELL else text[: CELL - 1] + "…"


def _flat(model: Strict, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in model:
        if isinstance(value, Strict):
            found += _flat(value, f"{prefix}{name} ")
        else:
            found.append((prefix + name, value))
    return found
