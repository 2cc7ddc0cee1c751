import math

import numpy as np
import pytest
import torch

from stages.reporting.scores import ScoreTable, usage_row

SOURCES = ["b", "a", "b", "c"]
CLUSTERS = ["cluster 000", "cluster 001", "cluster 001", "cluster 000"]
STARTS = np.array([0, 4, 6, 13, 16])


def table_of(sizes):
    return ScoreTable(SOURCES, CLUSTERS, np.asarray(sizes), STARTS)


def add(table, name, scores, group="single"):
    table.add(name, group, scores, 10, 5, 1e9, 1e6)


def some_scores(seed=0):
    return -torch.rand(16, generator=torch.Generator().manual_seed(seed)) * 5


def test_a_uniform_model_over_bytes_needs_eight_bits_for_each():
    table = table_of(np.diff(STARTS))  # a token per byte
    uniform = torch.full((16,), -math.log(256))
    assert table.bits_per_byte(uniform) == pytest.approx(8)
    add(table, "uniform", uniform)
    (row,) = table.rows()
    assert row.bits_per_byte == 8 == row.macro_bits_per_byte
    assert row.perplexity == pytest.approx(256, abs=1e-3)
    assert row.sources == {"a": 8, "b": 8, "c": 8}


def test_tokens_of_several_bytes_share_their_bits():
    table = table_of(np.diff(STARTS) * 4)
    assert table.bits_per_byte(torch.full((16,), -math.log(256))) == pytest.approx(2)


def test_parts_add_up_to_the_whole():
    sizes, scores = np.array([9, 8, 20, 4]), some_scores()
    table = table_of(sizes)
    add(table, "model", scores)
    (row,) = table.rows()
    bits = -float(scores.double().sum()) / math.log(2)
    assert row.bits_per_byte == pytest.approx(bits / 41, abs=1e-6)
    weights = {"a": 8, "b": 29, "c": 4}
    assert sum(row.sources[name] * size for name, size in weights.items()) == pytest.approx(bits, abs=1e-4)
    weights = {"cluster 000": 13, "cluster 001": 28}
    assert sum(row.clusters[name] * size for name, size in weights.items()) == pytest.approx(bits, abs=1e-4)
    assert row.macro_bits_per_byte == pytest.approx(sum(row.sources.values()) / 3, abs=1e-6)
    assert row.perplexity == pytest.approx(math.exp(-float(scores.mean())), rel=1e-4)


def test_each_source_counts_its_own_tokens():
    scores = torch.zeros(16)
    scores[4:6] = -math.log(2)  # the second document, the only one of source a
    table = table_of([9, 8, 20, 4])
    add(table, "model", scores)
    (row,) = table.rows()
    assert row.sources == {"a": 0.25, "b": 0, "c": 0}
    assert row.clusters == {"cluster 000": 0, "cluster 001": round(2 / 28, 6)}


def test_rows_stand_best_first_and_compared_with_dense():
    table = table_of([9, 8, 20, 4])
    add(table, "poor", some_scores() * 2)
    add(table, "dense", some_scores())
    add(table, "good", some_scores() / 2)
    rows = table.rows()
    assert [row.model for row in rows] == ["good", "dense", "poor"]
    assert [row.against_dense for row in rows] == [
        pytest.approx(-50, abs=1e-2), 0, pytest.approx(100, abs=1e-2),
    ]  # fmt: skip


def test_without_dense_nothing_is_compared():
    table = table_of([9, 8, 20, 4])
    add(table, "one", some_scores())
    assert [row.against_dense for row in table.rows()] == [None]


def test_what_is_lost_without_a_part_is_told_in_all_and_by_place_in_a_group():
    lost = torch.tensor([0.5, 0.0, 0.25, 1.0, 0.0])
    row = usage_row("composed", "plan", lost, 7, np.array([0, 1, 2, 0, 1]))
    assert row.difference == pytest.approx(1.75 / math.log(2) / 7, abs=1e-6)
    assert row.places == (0.75, 0.0, 0.25)
