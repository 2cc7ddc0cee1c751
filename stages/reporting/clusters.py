"""The clusters for people: a table in Markdown and a map.

- on the map every document is drawn twice, coloured by its cluster and by its source: what the clusters are not told
  stands beside what they found
- characters that the font of the picture lacks are drawn as `?`; nothing in a name is markup
"""

import io
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from schemas.cluster_documents import ClusterMetrics

MOST_SOURCES = 9  # with a colour of their own
LEGEND_CLUSTERS = 20  # as many have a colour of their own; numbers on the map tell more apart
TERMS, LONGEST = 4, 40  # of a cluster in the legend: terms, characters
FONT = "DejaVu Sans"  # comes with matplotlib


def clusters_markdown(metrics: ClusterMetrics) -> str:
    """A row per cluster, and what the whole came to."""
    shared = any(cluster.shared_documents for cluster in metrics.clusters)
    columns = ["cluster", "documents", *(["shared"] if shared else []), "tokens", "% of tokens", "held out"]
    words = ["top terms", "most central documents", "sources"]
    lines = [
        f"| {' | '.join(columns + words)} |",
        f"|{'--:|' * len(columns)}{'---|' * len(words)}",
    ]
    total = max(1, sum(cluster.tokens for cluster in metrics.clusters))
    for number, cluster in enumerate(metrics.clusters):
        numbers = [f"{number:03d}", f"{cluster.documents:,}", *([f"{cluster.shared_documents:,}"] if shared else [])]
        numbers += [f"{cluster.tokens:,}", f"{100 * cluster.tokens / total:.1f}", f"{cluster.valid_documents:,}"]
        sources = [f"{name} {100 * count / max(1, cluster.documents):.0f} %" for name, count in cluster.sources.items()]
        texts = [", ".join(map(_plain, names)) for names in (cluster.top_terms, cluster.central_documents, sources)]
        lines.append(f"| {' | '.join(numbers + texts)} |")
    return "\n".join([*lines, "", *_totals(metrics)]) + "\n"


def _totals(metrics: ClusterMetrics) -> list[str]:
    sources = ""
    if metrics.nmi is not None:
        sources = f"; purity {metrics.purity:.3f} and normalised mutual information {metrics.nmi:.3f} with the sources"
    tokens = metrics.valid_token_balance
    return [
        f"Largest over mean: {metrics.train_balance:.3f} of documents, {metrics.train_token_balance:.3f} of tokens, "
        f"{metrics.valid_balance:.3f} of held-out documents"
        f"{'' if tokens is None else f', {tokens:.3f} of held-out tokens'}{sources}.",
        "",
        "![Map of the documents](map.png)",
    ]


def _plain(text: str) -> str:
    """Text on one line of which Markdown makes nothing else."""
    return re.sub(r"([\\|*_`<>\[\]#~&])", r"\\\1", " ".join(text.split()))


def clusters_map(places: np.ndarray, labels: np.ndarray, sources: Sequence[str], metrics: ClusterMetrics) -> bytes:
    """Documents at `places` [n, 2] by cluster, and by source. PNG."""
    from matplotlib.figure import Figure

    several = len(set(sources)) > 1
    figure = Figure(figsize=(17 if several else 9, 7), layout="constrained")
    panels = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    names = [f"{number:03d}  {_terms(cluster.top_terms)}" for number, cluster in enumerate(metrics.clusters)]
    _scatter(panels[0], places, labels, names if len(names) <= LEGEND_CLUSTERS else [], "cluster")
    for cluster in np.unique(labels).tolist():
        _number(panels[0], f"{cluster}", np.median(places[labels == cluster], axis=0))
    if several:
        _scatter(panels[1], places, *_most_frequent(sources), "source")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def _terms(terms: Sequence[str]) -> str:
    text = ", ".join(terms[:TERMS])
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _most_frequent(sources: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """A number for each document's source, and the names; the rare ones together."""
    names = sorted(name for name, _ in Counter(sources).most_common(MOST_SOURCES))
    number = {name: place for place, name in enumerate(names)}
    numbers = np.array([number.get(name, len(names)) for name in sources])
    return numbers, [*names, "others"] if numbers.max() == len(names) else names


def _scatter(panel: Any, places: np.ndarray, numbers: np.ndarray, names: Sequence[str], title: str) -> None:
    from matplotlib import color_sequences

    colors = color_sequences["tab10" if numbers.max() < 10 else "tab20"]
    size = float(np.clip(20_000 / len(places), 5, 40))
    panel.scatter(*places.T, c=[colors[number % len(colors)] for number in numbers], s=size, alpha=0.7, linewidths=0)
    panel.set_title(f"{len(places):,} documents by {title}")
    panel.set_aspect("equal", adjustable="datalim")
    panel.set_xticks([])
    panel.set_yticks([])
    if names:
        marks = [panel.scatter([], [], color=colors[number % len(colors)], s=40) for number in range(len(names))]
        legend = panel.legend(marks, [""] * len(names), loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_parse_math(False)  # a dollar sign is one
            text.set_text(_drawable(name))


def _number(panel: Any, text: str, place: np.ndarray) -> None:
    """Written a little above its place, which a small cluster fills."""
    from matplotlib.patheffects import withStroke

    look = {"fontsize": 11, "fontweight": "bold", "path_effects": [withStroke(linewidth=3, foreground="white")]}
    panel.annotate(text, place, (0, 8), textcoords="offset points", ha="center", va="center", **look)


def _drawable(text: str) -> str:
    return "".join(character if ord(character) in _glyphs() else "?" for character in " ".join(text.split()))


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont(FONT)).get_charmap())
