"""The table and the map of clusters whose names would be markup, or have no glyphs."""

import struct

import numpy as np
import pytest

from schemas.cluster_documents import ClusterMetrics, ClusterSummary
from stages.reporting.clusters import clusters_map, clusters_markdown

RNG = np.random.default_rng(0)


def summary(number, **changes):
    plain = {
        "documents": 1000, "tokens": 30_000, "shared_documents": 0, "valid_documents": 20,
        "top_terms": ("flour", "oven"), "central_documents": ("d1", "d2", "d3"), "sources": {"web": 750, "book": 250},
    }  # fmt: skip
    return ClusterSummary(cluster=number, **(plain | changes))


def metrics(*clusters, **changes):
    plain = {
        "dimensions": 8, "sampled_documents": 9, "inertia": 1.0, "spread": 0.5, "fit_balance": 1.0,
        "train_balance": 1.25, "train_token_balance": 1.5, "valid_balance": 2.0, "purity": 0.75, "token_purity": 0.7,
        "nmi": 0.6, "shared_documents": 0, "shared_tokens": 0, "largest_weight": 0.9, "effective_clusters": 1.2,
        "routed_home": 1.0,
    }  # fmt: skip
    return ClusterMetrics(clusters=clusters, **(plain | changes))


def rows(text):
    """Cells of the table's lines, split as Markdown does."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")] for line in lines]


def test_every_cluster_has_a_row_with_sizes_terms_documents_and_sources():
    text = clusters_markdown(metrics(summary(0), summary(1, tokens=10_000, top_terms=("court",))))
    header, _, first, second = rows(text)
    assert dict(zip(header, first, strict=True)) == {
        "cluster": "000", "documents": "1,000", "tokens": "30,000", "% of tokens": "75.0", "held out": "20",
        "top terms": "flour, oven", "most central documents": "d1, d2, d3", "sources": "web 75 %, book 25 %",
    }  # fmt: skip
    assert second[3] == "25.0" and "court" in second
    assert "1.250 of documents, 1.500 of tokens" in text and "purity 0.750" in text


def test_the_balance_of_held_out_tokens_is_told_where_it_is_known():
    assert "2.000 of held-out documents; purity" in clusters_markdown(metrics(summary(0)))
    text = clusters_markdown(metrics(summary(0), valid_token_balance=1.75))
    assert "2.000 of held-out documents, 1.750 of held-out tokens; purity" in text


def test_shared_documents_have_a_column_where_there_are_some():
    header, _, first = rows(clusters_markdown(metrics(summary(0, shared_documents=7))))
    assert dict(zip(header, first, strict=True))["shared"] == "7"


def test_without_sources_nothing_is_said_of_them():
    assert "purity" not in clusters_markdown(metrics(summary(0), purity=None, token_purity=None, nmi=None))


def test_names_are_no_markup_and_stay_in_their_cell():
    odd = summary(0, top_terms=("a|b", "*bold*", "<b>"), central_documents=("x\ny", "`c`"), sources={"[l](u)": 1000})
    header, _, first = rows(clusters_markdown(metrics(odd)))
    assert len(first) == len(header)
    assert first[-3] == "a\0b, \\*bold\\*, \\<b\\>"
    assert first[-2] == "x y, \\`c\\`"
    assert first[-1] == "\\[l\\](u) 100 %"


def drawn(count, sources, documents=60, terms=("flour", "oven")):
    labels = (np.arange(documents) % count).astype(np.int32)
    places = RNG.normal(size=(documents, 2))
    found = metrics(*(summary(number, top_terms=terms) for number in range(count)))
    return lambda: clusters_map(places, labels, [sources[n % len(sources)] for n in range(documents)], found)


def width(png):
    assert png.startswith(b"\x89PNG")
    return struct.unpack(">I", png[16:20])[0]


def test_the_map_has_a_panel_for_sources_where_there_are_several():
    assert width(drawn(3, ["a", "b"])()) > 1.5 * width(drawn(3, ["a"])())


def test_the_same_documents_give_the_same_bytes():
    draw = drawn(4, ["a", "b"])
    assert draw() == draw()


def test_another_clustering_gives_another_picture():
    assert drawn(4, ["a", "b"])() != drawn(5, ["a", "b"])()


@pytest.mark.parametrize("count", [1, 21, 45])
def test_any_number_of_clusters_and_sources_is_drawn(count):
    assert drawn(count, [f"s{number}" for number in range(count)])()


def test_names_that_look_like_mathematics_or_have_no_glyphs_are_drawn():
    names = ["$\\frac{$", "_hidden", "小麦粉", "مرحبا", "a\nb", "\U0001f33e"]
    assert drawn(2, names, terms=("$x_{$", "小麦粉"))()


def test_two_documents_are_enough():
    assert drawn(1, ["a"], documents=2)()
