import struct

import pytest

from schemas.evaluate_models import FittedRouting, ModelRow, UsageRow
from stages.reporting.table import COLORS, markdown, plot


def row(number, dense=None, group="single"):
    return ModelRow(
        model=f"model {number}", group=group, bits_per_byte=2.0 + number / 8, against_dense=dense,
        macro_bits_per_byte=2.5, perplexity=30.0, parameters=3_400_000, active_parameters=1_200_000,
        training_flops=2.5e15, inference_flops=7_600_000.0, sources={"code": 1.5 + number, "law": 3.0},
        clusters={"cluster 000": 2.0},
    )  # fmt: skip


ROWS = tuple(row(number, 1.5 * number, group) for number, group in enumerate(COLORS))
USAGE = (UsageRow(model="composed", part="bridges static", difference=0.0123, places=(0.5, -0.25)),)


def test_markdown_has_a_line_per_row_and_the_same_cells_in_each():
    lines = markdown(ROWS, ()).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert {line.count("|") for line in lines} == {10}
    for line, one in zip(lines[2:], ROWS, strict=True):
        assert line.startswith(f"| {one.model} | {one.bits_per_byte:.4f} | {one.against_dense:+.2f} % |")
        assert line.endswith("| 3.40 M | 1.20 M | 2.50e+15 | 7.6 M |")


def test_markdown_says_what_parts_are_worth():
    text = markdown(ROWS, USAGE)
    head = "| model | without | bits/byte lost | nats lost at each place of a group |\n|---|---|--:|---|\n"
    assert text.endswith(head + "| composed | bridges static | +0.0123 | +0.500 -0.250 |\n")
    assert "bits/byte lost" not in markdown(ROWS, ())


def test_markdown_without_dense_has_a_dash():
    assert markdown((row(0),), ()).splitlines()[2].startswith("| model 0 | 2.0000 | – | 2.5000 |")


@pytest.mark.parametrize("count", [1, len(ROWS)])
def test_the_plot_is_a_png_that_grows_with_the_rows(count):
    picture = plot(ROWS[:count])
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 500
    assert height == pytest.approx(110 * (1.5 + 0.28 * count), abs=2)


def test_same_rows_same_bytes():
    assert plot(ROWS) == plot(ROWS) != plot(ROWS[:2])


def test_a_source_known_perfectly_does_not_stop_the_plot():
    certain = row(0).model_copy(update={"sources": {"code": 0.0, "law": 3.0}})
    assert plot((certain, row(1))).startswith(b"\x89PNG")


def test_markdown_says_what_was_fitted_and_on_how_much():
    fitted = FittedRouting(
        temperature=0.04321, forgetting=0.97, documents=30, tokens=12_345, gain=0.01, forgetting_gain=0.02
    )
    text = markdown(ROWS, USAGE, fitted)
    assert (
        "on 12,345 held-out tokens of 30 documents that are not scored: temperature 0.04321, forgetting 0.97." in text
    )
    assert "not scored" not in markdown(ROWS, USAGE)
