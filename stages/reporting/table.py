"""The table of models as JSON, as Markdown and as a picture."""

import io
import json
from collections.abc import Sequence

from schemas.evaluate_models import FittedRouting, ModelRow, UsageRow

COLORS = {
    "single": "#4c78a8",
    "ensemble": "#72b7b2",
    "gates": "#54a24b",
    "central": "#eeca3b",
    "composed": "#e45756",
    "control": "#bab0ac",
}


def as_json(rows: Sequence[ModelRow], usage: Sequence[UsageRow]) -> bytes:
    """`rows` and `usage`, for scripts."""
    content = {"rows": [row.model_dump() for row in rows], "usage": [row.model_dump() for row in usage]}
    return (json.dumps(content, indent=2) + "\n").encode()


def markdown(rows: Sequence[ModelRow], usage: Sequence[UsageRow], fitted: FittedRouting | None = None) -> str:
    """The table, best row first, what was fitted for it, and what the parts of the central models contribute."""
    lines = [
        "| model | bits/byte | against dense | macro | perplexity | parameters | active | training FLOPs "
        "| FLOPs/token |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        against = "–" if row.against_dense is None else f"{row.against_dense:+.2f} %"
        lines.append(
            f"| {row.model} | {row.bits_per_byte:.4f} | {against} | {row.macro_bits_per_byte:.4f} | "
            f"{row.perplexity:.2f} | {row.parameters / 1e6:.2f} M | {row.active_parameters / 1e6:.2f} M | "
            f"{row.training_flops:.2e} | {row.inference_flops / 1e6:.1f} M |"
        )
    if fitted:
        lines += [
            "",
            f"Fitted on {fitted.tokens:,} held-out tokens of {fitted.documents:,} documents that are not scored: "
            f"temperature {fitted.temperature:.4g}, forgetting {fitted.forgetting:.4g}.",
        ]
    if usage:
        lines += ["", "| model | without | bits/byte lost | nats lost at each place of a group |", "|---|---|--:|---|"]
        for lost in usage:
            places = " ".join(f"{nats:+.3f}" for nats in lost.places)
            lines.append(f"| {lost.model} | {lost.part} | {lost.difference:+.4f} | {places} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[ModelRow]) -> bytes:
    """Bars of bits per byte, and a heat map of every model's bits per byte on every source. PNG."""
    from matplotlib.figure import Figure

    sources = list(rows[0].sources)
    height = 1.5 + 0.28 * len(rows)
    figure = Figure(figsize=(9 + 0.8 * len(sources), height), layout="constrained")
    bars, heat = figure.subplots(1, 2, width_ratios=[3, 0.55 * len(sources) + 0.5])
    names = [row.model for row in rows]
    values = [row.bits_per_byte for row in rows]
    bars.barh(names, values, color=[COLORS.get(row.group, "#999999") for row in rows])
    low, high = 0.97 * min(values), min(max(values), 1.5 * min(values))
    bars.set_xlim(low, high + 0.15 * (high - low))
    bars.set_ylim(len(rows) - 0.5, -0.5)  # the rows of the heat map
    bars.set_xlabel("bits per byte (lower is better; the axis does not start at 0)")
    for place, value in enumerate(values):
        bars.annotate(f" {value:.3f}", (min(value, high), place), va="center", fontsize=8)
    # Each source relative to its best model: sources differ far more in difficulty than models in skill.
    best = {source: max(1e-6, min(row.sources[source] for row in rows)) for source in sources}  # 1e-6: their rounding
    relative = [[100 * (row.sources[source] / best[source] - 1) for source in sources] for row in rows]
    image = heat.imshow(relative, aspect="auto", cmap="viridis_r", vmin=0, vmax=15)
    heat.set_xticks(range(len(sources)), sources, rotation=60, ha="right", fontsize=8)
    heat.set_yticks([])
    figure.colorbar(image, ax=heat, label="% above the best model of the source")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
