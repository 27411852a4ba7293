"""What the charts show, read back from their elements or from the numbers that they are drawn from."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from segkit.report import curves, figures, svg
from segkit.report.comparison import compare


def elements(chart, name):
    return [item for item in ET.fromstring(chart).iter() if item.tag == name]


# -- scales and charts ---------------------------------------------------------------------------------------------


def test_scales_meet_their_ends():
    linear = svg.Scale(0.0, 10.0, 100.0, 300.0)
    assert (linear(0.0), linear(5.0), linear(10.0)) == (100.0, 200.0, 300.0)
    log = svg.Scale(0.01, 100.0, 0.0, 400.0, log=True)
    assert [log(value) for value in (0.01, 1.0, 100.0)] == pytest.approx([0.0, 200.0, 400.0])
    assert log.ticks() == pytest.approx([0.01, 0.1, 1, 10, 100])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (22.0, 47.0, [25, 30, 35, 40, 45]), (-3.0, 2.0, [-3, -2, -1, 0, 1, 2])],
)
def test_ticks_are_round(low, high, ticks):
    assert svg.linear_ticks(low, high, 5) == pytest.approx(ticks)


@pytest.mark.parametrize(("value", "text"), [(0.05, "0.05"), (20.0, "20"), (30_000, "30k"), (1e-6, "1e-6"), (0, "0")])
def test_tick_text(value, text):
    assert svg.compact(value) == text


def test_a_constant_has_a_scale():
    scale = svg.scale([3.0, 3.0], 0.0, 100.0)
    assert scale(3.0) == 50.0


def test_bars_are_as_long_as_their_values():
    chart = svg.bar_chart([("a", 0.2), ("b", -0.1), ("c", None)], label="x", value_text=str)
    bars = [item for item in elements(chart, "rect") if "bar" in item.get("class", "")]
    widths = [float(item.get("width")) for item in bars]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.02)
    assert [item.get("class") for item in bars] == ["bar gain", "bar loss"]
    # the loss ends where the gain begins
    assert float(bars[1].get("x")) + widths[1] == pytest.approx(float(bars[0].get("x")), abs=0.02)
    assert "none" in chart


def test_heat_cells_have_shares_of_the_colour():
    chart = svg.heat_map(
        ["r"], ["a", "b", "c"], [[1.0, None, 3.0]], label="x", value_text=str, row_label="", column_label=""
    )
    cells = elements(chart, "rect")
    assert [item.get("style") for item in cells] == ["--t:0%", None, "--t:100%"]
    assert "r, b: not run" in chart


def test_a_curve_goes_through_its_points():
    chart = svg.line_chart([svg.Series("s", 0, [0, 10], [1.0, 2.0])], label="x", x_label="", y_label="")
    (line,) = elements(chart, "polyline")
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line.get("points").split())
    assert x0 < x1
    assert y0 > y1  # upwards


# -- curves --------------------------------------------------------------------------------------------------------


def test_phases_follow_one_another(make_run):
    group = compare([make_run("a", "schedule=pretrain_finetune")]).groups[0]
    run = group.runs[0]
    assert curves.phase_offsets(run) == {"pretrain": 0, "finetune": 200}
    found = curves.points(run, "val", "mean_iou")
    assert list(found) == [50, 100, 150, 200, 250, 300, 350, 400]
    assert found[400] == run.results["mean_iou"]
    assert curves.marks([group]) == [(200.0, "finetune")]


def test_a_band_spans_the_seeds(make_run):
    groups = compare([make_run(f"a{s}", seed=s, skill=0.7 + 0.1 * s) for s in (0, 1)]).groups
    (curve,) = curves.series(groups, "val", "mean_iou")
    one, other = (curves.points(run, "val", "mean_iou") for run in groups[0].runs)
    at = curve.x.index(100.0)
    assert curve.low[at] == min(one[100], other[100])
    assert curve.high[at] == max(one[100], other[100])
    assert curve.y[at] == pytest.approx((one[100] + other[100]) / 2)


def test_long_curves_are_averaged():
    assert curves._thin([1.0, 3.0, 5.0, 7.0, 9.0], 2) == [2.0, 6.0, 9.0]


# -- classes, labels, margins --------------------------------------------------------------------------------------


def test_classes_are_ordered_by_their_pixels(make_run):
    groups = compare([make_run("a")]).groups
    order, shares = figures.class_order(groups)
    assert order == ["road", "building", "sky", "vegetation", "sidewalk", "car", "person", "sign"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["sign"] == pytest.approx(0.002)


def test_gains_per_class(make_run):
    comparison = compare([make_run("a", "loss=dice"), make_run("b", skill=0.9), make_run("c", skill=0.7, seed=1)])
    base, group = comparison.groups
    rows = dict(figures.class_gains(group, base, base.classes))
    iou = [[run.results["classes"]["car"]["iou"] for run in one.runs] for one in (base, group)]
    assert rows["car"] == pytest.approx((iou[1][0] + iou[1][1]) / 2 - iou[0][0])


def test_margins_are_those_of_the_run_folder(make_run):
    groups = compare([make_run("a", margins=True), make_run("b", "loss=dice")]).groups
    titles = [item.text for item in elements(figures.margin_chart(groups, "rho_0k", "logits"), "title")]
    assert f"road, {groups[0].name}: 0.01" in titles
    assert len(titles) == 8
    assert figures.margin_chart(groups[1:], "rho_0k", "logits") == ""


def test_a_share_of_zero_is_said(make_run):
    groups = compare([make_run("a")]).groups
    groups[0].runs[0].counts["sign"] = 0
    assert "none" in figures.share_chart(groups)


# -- confusion -----------------------------------------------------------------------------------------------------


def test_confusion_rows_are_shares_of_the_label():
    counts = np.array([[8, 2, 0], [5, 5, 0], [0, 0, 0]])
    shares = figures.row_shares(counts)
    np.testing.assert_allclose(shares[:2], [[0.8, 0.2, 0], [0.5, 0.5, 0]])
    assert np.isnan(shares[2]).all()
    assert figures.top_confusions(counts, ["a", "b", "c"]) == [("b", "a", 0.5), ("a", "b", 0.2)]
    chart = figures.confusion_chart(counts, ["a", "b", "c"])
    assert re.search(r"<title>b, a: 50.0</title>", chart)


def test_confusion_adds_the_runs_of_a_group(make_run):
    (group,) = compare([make_run(f"a{s}", seed=s) for s in (0, 1)]).groups
    assert figures.confusion(group).sum() == 2 * 30 * 20_000
