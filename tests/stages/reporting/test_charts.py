import re

import pytest

from stages.reporting.charts import BOX_HEIGHT, BOX_WIDTH, HEIGHT, LEFT, TOP, WIDTH, Series, graph, line_chart, ticks


def points(line: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in line.split()]  # type: ignore[misc]


def test_a_falling_curve_falls_on_the_page_and_ends_at_the_right() -> None:
    chart = line_chart("t", [Series("a", (5.0, 4.0, 2.0), 300), Series("b", (3.0,), 150)])
    a, b = (points(line.points) for line in chart.lines)
    assert [x for x, _ in a] == sorted(x for x, _ in a) and [y for _, y in a] == sorted(y for _, y in a)
    assert a[1][0] - a[0][0] == pytest.approx(a[2][0] - a[1][0], abs=0.1)
    assert b[0][0] == pytest.approx((LEFT + a[-1][0]) / 2, abs=0.1)  # half as many steps
    assert all(LEFT <= x <= WIDTH and TOP <= y <= HEIGHT for x, y in a + b)
    assert [line.last for line in chart.lines] == [2.0, 3.0]
    for y, label in chart.y_ticks:  # ticks stand where their values would be drawn
        top, bottom = a[0][1], a[2][1]
        assert y == pytest.approx(top + (5 - float(label)) / 3 * (bottom - top), abs=0.2)
    assert chart.x_ticks[-1] == (a[-1][0], "300")


@pytest.mark.parametrize("values", [(1.0,), (2.0, 2.0), (0.0,), (1e300, -1e300), (1e-300, 0.0), (10**400,)])
def test_odd_curves_have_a_drawing(values: tuple[float, ...]) -> None:
    chart = line_chart("t", [Series("a", values, 10**400)])
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points(chart.lines[0].points))
    assert chart.y_ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (2.3, 5.6, [3, 4, 5]),
        (0.12, 0.19, [0.12, 0.14, 0.16, 0.18]),
        (0, 7, [0, 2, 4, 6]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


INPUTS = {"b": ["a"], "c": ["a", "b"], "d": ["a"], "e": ["c", "d", "a"], "f": ["e", "b"]}


def test_each_box_stands_right_of_what_it_was_made_from_and_on_no_other() -> None:
    drawn = graph(dict.fromkeys("fedcba", "1 s"), INPUTS)
    boxes = {box.name: box for box in drawn.boxes}
    assert boxes.keys() == set("abcdef")
    for name, starts in INPUTS.items():
        assert all(boxes[name].x >= boxes[start].x + BOX_WIDTH for start in starts)
    places = [(box.x, box.y) for box in drawn.boxes]
    for x, y in places:
        assert 0 <= x <= drawn.width - BOX_WIDTH and 0 <= y <= drawn.height - BOX_HEIGHT
        assert sum(abs(x - other_x) < BOX_WIDTH and abs(y - other_y) < BOX_HEIGHT for other_x, other_y in places) == 1


def test_edges_that_others_imply_are_left_out_and_long_ones_cross_no_box() -> None:
    drawn = graph(dict.fromkeys("abcdef", ""), INPUTS)
    assert len(drawn.edges) == len(["ab", "bc", "ad", "ce", "de", "ef", "bf"])  # not ac, ae
    for edge in drawn.edges:
        for x, y in [tuple(map(int, pair.split(","))) for pair in re.findall(r"\d+,\d+", edge)]:
            inside = [
                box for box in drawn.boxes if box.x + 2 < x < box.x + BOX_WIDTH - 2 and box.y < y < box.y + BOX_HEIGHT
            ]
            assert not inside, (edge, inside)


def test_a_circle_ends_and_unknown_inputs_are_no_boxes() -> None:
    drawn = graph({"a": "", "b": ""}, {"a": ["b", "a"], "b": ["a", "text.jsonl"]})
    assert {box.name for box in drawn.boxes} == {"a", "b"}
    many = [str(number) for number in range(60)]
    assert len(graph(dict.fromkeys(many, ""), dict.fromkeys(many, many)).boxes) == 60
    assert graph({}, {}).boxes == ()
