"""Report a run: everything its manifests say, in one HTML file that opens anywhere, also without a network.

- derived, no stage: see `schemas.report_run`. It says the same whenever it is written, as nothing of its own is in it
- a run that is not finished has a report too; what is missing is left out, and what does not follow from what lies in
  the run now is said at the top
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from schemas.cluster_documents import ClusterManifest, SweepManifest
from schemas.compose_model import ComposeManifest
from schemas.evaluate_models import EvaluateManifest, ModelRow
from schemas.failures import IntegrityFailure, UsageFailure
from schemas.files import FileRef, write_bytes
from schemas.manifest import Manifest
from schemas.report_run import FILE_NAME, SAMPLES, TRAINING_SAMPLES, ReportConfig, Sample, Samples, TrainingSample
from schemas.run_manifests import FROM_OUTSIDE, broken_links, manifest_folders, read_manifest
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import ExpertManifest, ExpertsManifest, is_further
from schemas.train_gates import GatesManifest
from schemas.training import TrainingMetrics
from stages.reporting.charts import Graph, LineChart, Series, graph, line_chart
from stages.reporting.page import duration, picture, render

Manifests = dict[str, Manifest]
TAIL = 1 << 16  # bytes read of what a training wrote; a sample has a few hundred
SHOWN = 3  # samples of each training
ORDER = (
    "corpus",
    "tokens",
    "clusters",
    "clusters-sweep",
    "added",
    "seed",
    "dense",
    "experts",
    "gates",
    "central-alone",
)


def stream(config: ReportConfig, run_dir: Path) -> Iterator[FileRef]:
    """Write the report and tell where it lies. Raises UsageFailure when nothing is finished, and IntegrityFailure."""
    manifests = {folder: read_manifest(run_dir, folder) for folder in sorted(manifest_folders(run_dir), key=_order)}
    if not manifests:
        raise UsageFailure(f"nothing in {run_dir} is finished yet: `cpipe tokenize {run_dir} FILES` begins")
    page = render(
        {
            "name": run_dir.resolve().name,
            "broken": [f"{name} {why}" for name in manifests for why in broken_links(name, manifests)],
            "summary": _summary(manifests),
            "graph": _graph(manifests),
            "clusters": _clusters(run_dir, manifests),
            "sweep": _one(SweepManifest, manifests),
            "curves": _curves(manifests),
            "evaluation": _evaluation(manifests),
            "gates": _one(GatesManifest, manifests),
            "routing": _picture(run_dir, _one(EvaluateManifest, manifests), "routing.png"),
            "compositions": {name: each for name, each in manifests.items() if isinstance(each, ComposeManifest)},
            "samples": _samples(run_dir),
            "training_samples": dict(_training_samples(run_dir)),
            "settings": {name: _settings(each) for name, each in manifests.items() if not _is_expert(each)},
            "manifests": manifests,
            "listed": config.listed_files,
        }
    )
    yield write_bytes(run_dir / EvaluateManifest.folder / FILE_NAME, page, run_dir)


def _order(folder: str) -> tuple[int, str]:
    """As the pipeline makes them: compositions after the central model, what is not known before the evaluation."""
    first = "dense" if is_further(folder) else folder.split("/")[0]
    place = ORDER.index(first) if first in ORDER else len(ORDER)
    return place + 1 if folder == EvaluateManifest.folder else place, folder


def _one(kind: type[Any], manifests: Manifests) -> Any:
    return next((manifest for manifest in manifests.values() if isinstance(manifest, kind)), None)


def _is_expert(manifest: Manifest) -> bool:
    """Whether it is one of many alike, shown together with the others."""
    return isinstance(manifest, ExpertManifest) and (manifest.config.cluster, manifest.config.added) != (None, None)


def _summary(manifests: Manifests) -> list[tuple[str, str]]:
    """What stands first: a few numbers and what they count."""
    facts = []
    if tokens := _one(TokenizeManifest, manifests):
        counts = (tokens.metrics.train, tokens.metrics.valid)
        facts.append((f"{sum(count.tokens for count in counts):,}", "tokens of text"))
        facts.append((f"{sum(count.documents for count in counts):,}", "documents"))
    if experts := _one(ExpertsManifest, manifests):
        facts.append((f"{experts.metrics.experts}", "experts"))
    if evaluation := _one(EvaluateManifest, manifests):
        best = next((row for row in evaluation.metrics.rows if not row.model.startswith("oracle")), None)
        if best:
            facts.append((f"{best.bits_per_byte:.4f}", f"bits per byte, best: {best.model}"))
    return facts


def _graph(manifests: Manifests) -> Graph:
    """Folders and what they were made from; experts are one box. What was collected is known again by its digests."""
    written = {ref.digest: name for name, manifest in manifests.items() for ref in manifest.outputs}
    inputs: dict[str, set[str]] = {_box(name): set() for name in manifests}
    for name, manifest in manifests.items():
        from_outside = manifest.command in FROM_OUTSIDE
        starts = {written.get(ref.digest, "") if from_outside else ref.name for ref in manifest.inputs}
        inputs[_box(name)] |= {_box(start) for start in starts} - {_box(name)}
    if "experts" in inputs:  # the dense baseline is made beside them
        inputs["experts"] -= {"dense"}
    return graph(
        {box: _detail(box, manifests) for box in inputs}, {box: sorted(starts) for box, starts in inputs.items()}
    )


def _detail(box: str, manifests: Manifests) -> str:
    seconds = sum(each.environment.seconds for name, each in manifests.items() if _box(name) == box)
    members = sum(name.startswith(f"{box}/") for name in manifests)
    return f"{members} members · {duration(seconds)}" if members else duration(seconds)


def _box(folder: str) -> str:
    return folder.split("/")[0]


def _clusters(run_dir: Path, manifests: Manifests) -> dict[str, Any] | None:
    manifest: ClusterManifest | None = _one(ClusterManifest, manifests)
    if manifest is None:
        return None
    total = max(1, sum(cluster.tokens for cluster in manifest.metrics.clusters))
    return {
        "metrics": manifest.metrics,
        "shares": [cluster.tokens / total for cluster in manifest.metrics.clusters],
        "map": _picture(run_dir, manifest, "map.png"),
    }


def _picture(run_dir: Path, manifest: Manifest | None, name: str) -> str | None:
    """A picture that a stage drew; None where it drew none."""
    drawn = next((ref for ref in manifest.outputs if ref.path.endswith(f"/{name}")), None) if manifest else None
    return picture(drawn.check(run_dir).read_bytes()) if drawn else None


def _curves(manifests: Manifests) -> list[LineChart]:
    """One drawing for all trainings of a kind: seed, experts and dense, gates, central model, compositions."""
    panels: dict[str, list[Series]] = {}
    for name, manifest in manifests.items():
        kind = manifest.schema_id.removeprefix("cpipe.").split("/")[0]
        training = getattr(manifest.metrics, "training", None)
        if isinstance(training, TrainingMetrics) and training.curve:
            panels.setdefault(kind, []).append(Series(name, training.curve, max(1, training.steps)))
    return [line_chart(title, series) for title, series in panels.items()]


def _evaluation(manifests: Manifests) -> dict[str, Any] | None:
    manifest: EvaluateManifest | None = _one(EvaluateManifest, manifests)
    if manifest is None or not manifest.metrics.rows:
        return None
    rows = manifest.metrics.rows
    values = [row.bits_per_byte for row in rows]
    low, high = 0.97 * min(values), min(max(values), 1.5 * min(values))
    largest = max((abs(row.difference) for row in manifest.metrics.usage), default=0.0)
    return {
        "metrics": manifest.metrics,
        "bars": [_share(value - low, high - low) for value in values],
        "sources": list(rows[0].sources),
        "heat": [_heat(row, rows) for row in rows],
        "usage_bars": [_share(abs(row.difference), largest) for row in manifest.metrics.usage],
    }


def _heat(row: ModelRow, rows: tuple[ModelRow, ...]) -> list[tuple[float | None, float]]:
    """Bits per byte on each source, and how far above the best model's: 0 to 1, which is 15 %."""
    found: list[tuple[float | None, float]] = []
    for source in rows[0].sources:
        value = row.sources.get(source)
        best = max(1e-6, min(other.sources.get(source, 1e6) for other in rows))
        found.append((value, 1.0 if value is None else round(_share(value / best - 1, 0.15), 3)))
    return found


def _share(part: float, whole: float) -> float:
    return round(min(1.0, max(0.0, part / whole)), 4) if whole > 0 else 0.0


def _samples(run_dir: Path) -> tuple[Sample, ...]:
    """Texts that models wrote, where somebody asked them to."""
    path = run_dir / EvaluateManifest.folder / SAMPLES
    if not path.is_file():
        return ()
    try:
        return Samples.from_json(path.read_bytes()).samples
    except (ValidationError, IntegrityFailure) as error:
        raise IntegrityFailure(f"{path} holds no samples: remove it, or make it anew with --prompt") from error


def _training_samples(run_dir: Path) -> Iterator[tuple[str, list[TrainingSample]]]:
    """The last texts that decoders wrote while they were trained, by folder."""
    found = [*run_dir.glob(f"*/{TRAINING_SAMPLES}"), *run_dir.glob(f"*/*/{TRAINING_SAMPLES}")]
    folders = {path.parent.relative_to(run_dir).as_posix(): path for path in found}
    for folder in sorted((name for name in folders if not name.startswith(".")), key=_order):
        path = folders[folder]
        if not path.is_file() or not path.resolve().is_relative_to(run_dir.resolve()):
            raise IntegrityFailure(f"{path} leads out of the run or is no file: remove it")
        with path.open("rb") as file:
            file.seek(start := max(0, path.stat().st_size - TAIL))
            lines = file.read().split(b"\n")[1 if start else 0 : -1]  # a line that was cut or is being written is none
        try:
            yield folder, [TrainingSample.from_json(line) for line in lines[-SHOWN:]]
        except (ValidationError, IntegrityFailure) as error:
            raise IntegrityFailure(f"{path} holds no samples of a training: remove it") from error


def _settings(manifest: Manifest) -> list[tuple[str, str, bool]]:
    """Name, value, and whether it is not the default."""
    now = dict(_flat(manifest.config.model_dump(mode="json")))
    try:
        defaults: Mapping[str, Any] = dict(_flat(type(manifest.config)().model_dump(mode="json")))
    except ValidationError:  # some have no default
        defaults = now
    return [(name, _as_set(value), value != defaults.get(name, value)) for name, value in now.items()]


def _as_set(value: Any) -> str:
    """A setting as `cpipe.toml` would have it, but for quotation marks."""
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
