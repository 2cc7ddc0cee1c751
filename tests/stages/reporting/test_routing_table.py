import json

import numpy as np
import pytest

from stages.reporting.routing import RoutingTable

STARTS = np.array([0, 40, 100])  # two documents


def table() -> RoutingTable:
    ids = np.array([1] * 30 + [2] * 10 + [2] * 30 + [3] * 30)
    return RoutingTable(["law", "code"], np.array([0, 1]), STARTS, ids, 5)


def weights() -> np.ndarray:
    """The first document asks expert 0, the second the seed and expert 1 alike."""
    found = np.zeros((100, 3), np.float32)
    found[:40, 1] = 1.0
    found[40:, 0] = found[40:, 2] = 0.5
    return found


def test_means_openness_entropy_and_tokens_are_those_of_the_weights() -> None:
    routing = table()
    routing.add("gates", weights(), str)
    (row,) = routing.rows
    assert row.layer == "input"
    assert row.sources == {"code": (0.5, 0.0, 0.5), "law": (0.0, 1.0, 0.0)}
    assert row.clusters == {"0": (0.0, 1.0, 0.0), "1": (0.5, 0.0, 0.5)}
    assert (row.own, row.foreign) == ((1.0, 0.5), (0.0, 0.0))
    assert row.experts_asked == 1.0
    assert row.entropy == pytest.approx(0.6)  # a bit for 60 of 100 tokens
    assert row.tokens == (("1", "2", "3"), ("3", "2", "1"))  # token 2: a quarter of it in the first document


def test_layers_have_a_row_each_and_the_files_hold_them() -> None:
    routing = table()
    routing.add("inside", np.stack([weights(), weights()[::-1]], 1), str)
    routing.add("before", weights(), str)
    assert [(row.model, row.layer) for row in routing.rows] == [
        ("inside", "layer 0"), ("inside", "layer 1"), ("before", "input"),
    ]  # fmt: skip
    assert routing.rows[0].sources != routing.rows[1].sources
    assert json.loads(routing.as_json())[2]["own"] == [1.0, 0.5]
    assert routing.plot().startswith(b"\x89PNG")


def test_an_expert_without_text_of_its_own_is_shut_not_a_fault() -> None:
    routing = RoutingTable(["law", "code"], np.array([0, 0]), STARTS, np.ones(100, int), 5)
    routing.add("gates", weights(), str)
    assert routing.rows[0].own[1] == 0.0
