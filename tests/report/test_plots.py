"""What the charts show: the numbers that they are drawn from, and the elements that a browser lays out."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from base64 import b64decode

import numpy as np
import pytest
from PIL import Image

from segkit.report import plots, scales
from segkit.report.comparison import compare
from segkit.report.groups import Group, find_grids, gain
from segkit.report.page import _environment
from segkit.report.pictures import legend


def drawn(macro, chart):
    """The root of the elements that the macro ``macro`` of plots.html.j2 makes from ``chart``."""
    module = _environment().get_template("plots.html.j2").module
    return ET.fromstring(str(getattr(module, macro)(chart)).strip())


def having(root, name):
    """All elements of the class ``name``, in their order."""
    return [item for item in root.iter() if name in item.get("class", "").split()]


def style(item):
    """The inline style of ``item`` as a dictionary."""
    return dict(pair.split(":") for pair in item.get("style").split(";"))


def percent(item, key):
    return float(style(item)[key].removesuffix("%"))


# -- scales and charts ---------------------------------------------------------------------------------------------


def test_scales_meet_their_ends():
    linear = scales.Scale(0.0, 10.0)
    assert (linear(0.0), linear(5.0), linear(10.0)) == (0.0, 50.0, 100.0)
    log = scales.Scale(0.01, 100.0, log=True)
    assert [log(value) for value in (0.01, 1.0, 100.0)] == pytest.approx([0.0, 50.0, 100.0])
    assert log.values() == pytest.approx([0.01, 0.1, 1, 10, 100])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (22.0, 47.0, [25, 30, 35, 40, 45]), (-3.0, 2.0, [-3, -2, -1, 0, 1, 2])],
)
def test_ticks_are_round(low, high, ticks):
    assert scales.linear_ticks(low, high, 5) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.008, 0.11, [0.01, 0.03, 0.1]), (0.9, 6.0, [1, 2, 5]), (0.024, 0.0375, [0.025, 0.03, 0.035])],
)
def test_a_logarithmic_axis_has_few_ticks_and_at_least_one(low, high, ticks):
    assert scales.Scale(low, high, log=True).values() == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.05, "0.05"), (20.0, "20"), (30_000, "30k"), (1e-6, "1e-6"), (0, "0"), (1.5e-4, "1.5e-4"), (2_500_000, "2.5e6")],
)
def test_tick_text(value, text):
    assert scales.compact(value) == text


def test_a_constant_has_a_scale():
    assert scales.scale([3.0, 3.0])(3.0) == 50.0
    assert scales.scale([0.0])(0.0) == 50.0


def test_scales_have_a_least_span():
    axis = scales.scale([0.5, 0.5 + 1e-7], least=0.01)
    assert axis.high - axis.low == pytest.approx(0.01 * 1.08)
    axis = scales.scale([2.0, 2.0 + 1e-7])  # a loss
    assert axis.high - axis.low == pytest.approx(0.02 * 1.08)
    axis = scales.scale([0.0, 3.0], zero=True, least=0.01)
    assert (axis.low, axis.high) == (0.0, 3.0 * 1.04)


TINY = 1e-7
"""A difference of shares, 1e-5 points."""


def test_differences_of_1e_5_points_are_not_drawn_as_differences(make_run, monkeypatch):
    runs = [make_run(f"t{t}u{u}", f"loss.tau={t}", f"loss.upsilon={u}") for t in (5, 20) for u in (1, 2)]
    groups = compare(runs).groups
    scores = {group.name: 0.5 + number * TINY for number, group in enumerate(groups)}
    monkeypatch.setattr(Group, "scores", lambda group, key: [scores[group.name]])
    (grid,) = find_grids(groups)
    strengths = [cell[1] for _, cells in plots.grid_chart(grid).rows for cell in cells]
    assert len(strengths) == 4
    assert max(strengths) - min(strengths) <= 1
    for _, chart in plots.gain_charts(groups, groups[0]):
        assert {row.text for row in chart.rows} == {"0.0"}
        assert max(row.width for row in chart.rows) < 0.1
    curves = [plots.Series(name, 0, [0, 1], [score, 0.5]) for name, score in scores.items()]
    monkeypatch.setattr(plots, "series", lambda *_: curves)
    for key in ("mean_iou", "loss"):
        heights = [y for curve in plots.training_curve(groups, key).curves for _, y in curve.line]
        assert max(heights) - min(heights) < 0.1
    rows = [(0, "a", 0.5 - TINY, 0.5, 0.5 + TINY)]
    (interval,) = plots.interval_chart(rows, label="", x_label="", text=str).rows
    assert interval.high - interval.low < 0.1


def test_equal_shares_and_margins_look_equal(make_run):
    groups = compare([make_run("a", margins=True)]).groups
    run, number = groups[0].runs[0], len(groups[0].classes)
    run.counts.update(dict.fromkeys(run.counts, 10**7) | {"sign": 10**7 - 1})
    widths = [row.width for row in plots.share_chart(groups).rows]
    assert max(widths) - min(widths) < 0.1
    for values in ([1.0] * (number - 1) + [1 + TINY], [0.0] * (number - 1) + [-TINY]):
        run.margins["rho_0k"] = values
        places = [dot.at for _, dots in plots.margin_chart(groups, "rho_0k").rows for dot in dots]
        assert len(places) == number
        assert max(places) - min(places) < 0.1


@pytest.mark.parametrize(("value", "text"), [(0.0123, "+1.23"), (-1e-7, "0.00"), (0.0, "0.00"), (-0.02, "-2.00")])
def test_points_have_a_sign_unless_they_are_zero(value, text):
    assert plots.points(value) == text


def test_a_legend_holds_all_letters_of_its_names():
    """As many dark pixels on a narrow strip as on a wide one; the names have no spaces to lose."""
    names = ["traffic_sign_frame_of_a_temporary_board__", "road", "W" * 60]
    palette = np.full((3, 3), 200, np.uint8)
    ink = [255 * strip.size - int(strip.sum()) for width in (2000, 330, 120)
           for strip in [legend(palette, names, width)]]  # fmt: skip
    assert ink[1] == pytest.approx(ink[0], rel=0.01)
    assert ink[2] == pytest.approx(ink[0], rel=0.01)


def test_bars_are_as_long_as_their_values():
    axis = scales.Scale(-0.1, 0.2)
    rows = [plots._gain_bar(name, value, axis) for name, value in (("a", 0.2), ("b", -0.1), ("c", None))]
    root = drawn("bar_chart", plots.AxisChart("x", rows, axis(0.0)))
    bars = having(root, "bar")
    widths = [percent(item, "width") for item in bars]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.02)
    assert [item.get("class") for item in bars] == ["bar gain", "bar loss"]
    # the loss ends where the gain begins
    assert percent(bars[1], "left") + widths[1] == pytest.approx(percent(bars[0], "left"), abs=0.02)
    assert percent(having(root, "axis")[0], "left") == percent(bars[0], "left")
    assert [item.text for item in having(root, "value")] == ["+20.0", "-10.0", "none"]


def test_heat_cells_have_shares_of_the_colour():
    cells = [plots._heat_cell(value, 1.0, 3.0, str, "not run") for value in (1.0, None, 3.0)]
    root = drawn("heat_map", plots.HeatMap("x", "", "", ["a", "b", "c"], [("r", cells)]))
    assert [item.get("style") for item in having(root, "cell")] == ["--t:0%", None, "--t:100%"]
    assert [item.get("title") for item in having(root, "cell")] == ["r, a: 1.0", "r, b: not run", "r, c: 3.0"]


def test_a_curve_goes_through_its_points():
    chart = plots.line_chart([plots.Series("s", 0, [0, 10], [1.0, 2.0])], "loss")
    (line,) = drawn("line_chart", chart).iter("polyline")
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line.get("points").split())
    assert x0 < x1
    assert y0 > y1  # upwards
    height = {text: at for at, text in chart.y_ticks}  # the ticks lie on the curve's scale
    assert (height["1"], height["2"]) == pytest.approx((y0, y1))


def test_a_single_point_is_a_dot():
    chart = plots.line_chart([plots.Series("s", 3, [10], [1.0])], "loss")
    root = drawn("line_chart", chart)
    (dot,) = having(root, "dot")
    assert (dot.get("data-series"), percent(dot, "top")) == ("3", 50.0)
    assert list(root.iter("polyline")) == []


def test_names_are_whole_whatever_their_length():
    """Nothing is cut here: the browser alone knows how much fits."""
    name = "a very long name of a class, longer than any chart is wide: " + "x" * 100
    bars = plots.AxisChart("x", [plots.Bar(name, "1", 0.0, 5.0, "s7")], 0.0)
    dots = plots.AxisChart("x", [(name, [])])
    cells = plots.HeatMap("x", "", "", [name], [(name, [("1", 5)])], is_matrix=True)
    intervals = plots.AxisChart("x", [plots.Dot(0, name, 2.0, "", 1.0, 3.0)])
    for macro, chart in (("bar_chart", bars), ("dot_chart", dots), ("heat_map", cells), ("interval_chart", intervals)):
        assert name in {item.text for item in drawn(macro, chart).iter()}


def test_intervals_lie_about_their_values():
    chart = plots.interval_chart([(2, "a", 0.4, 0.5, 0.7)], label="x", x_label="", text=str, zero=True)
    root = drawn("interval_chart", chart)
    (span,), (dot,) = having(root, "interval"), having(root, "dot")
    low, width, at = percent(span, "left"), percent(span, "width"), percent(dot, "left")
    assert (at - low) / width == pytest.approx(1 / 3, abs=1e-3)
    assert percent(having(root, "axis")[0], "left") == 0.0
    assert having(root, "above")[0][1].text == "0.5 [0.4, 0.7]"


# -- curves --------------------------------------------------------------------------------------------------------


def test_phases_follow_one_another(make_run):
    group = compare([make_run("a", "schedule=pretrain_finetune")]).groups[0]
    run = group.runs[0]
    assert plots.phase_offsets(run) == {"pretrain": 0, "finetune": 200}
    found = plots.recorded(run, "val", "mean_iou")
    assert list(found) == [50, 100, 150, 200, 250, 300, 350, 400]
    assert found[400] == run.results["mean_iou"]
    assert plots.marks([group]) == [(200.0, "finetune")]


def test_a_band_spans_the_seeds(make_run):
    groups = compare([make_run(f"a{s}", seed=s, skill=0.7 + 0.1 * s) for s in (0, 1)]).groups
    (curve,) = plots.series(groups, "val", "mean_iou")
    one, other = (plots.recorded(run, "val", "mean_iou") for run in groups[0].runs)
    at = curve.x.index(100.0)
    assert curve.low[at] == min(one[100], other[100])
    assert curve.high[at] == max(one[100], other[100])
    assert curve.y[at] == pytest.approx((one[100] + other[100]) / 2)


def test_long_curves_are_averaged():
    assert plots._thin([1.0, 3.0, 5.0, 7.0, 9.0], 2) == [2.0, 6.0, 9.0]


# -- classes, labels, margins --------------------------------------------------------------------------------------


def test_classes_are_ordered_by_their_pixels(make_run):
    groups = compare([make_run("a")]).groups
    order, shares = plots.class_order(groups)
    assert order == ["road", "building", "sky", "vegetation", "sidewalk", "car", "person", "sign"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["sign"] == pytest.approx(0.002)


def test_gains_per_class(make_run):
    comparison = compare([make_run("a", "loss=dice"), make_run("b", skill=0.9), make_run("c", skill=0.7, seed=1)])
    base, group = comparison.groups
    iou = [[run.results["classes"]["car"]["iou"] for run in one.runs] for one in (base, group)]
    assert len(iou[1]) == 2
    found, _ = gain(group, base, "iou/car")
    assert found == pytest.approx(iou[1][0] - iou[0][0])  # seed 1 has no partner


def test_margins_are_those_of_the_run_folder(make_run):
    groups = compare([make_run("a", margins=True), make_run("b", "loss=dice")]).groups
    titles = [item.get("title") for item in having(drawn("dot_chart", plots.margin_chart(groups, "rho_0k")), "dot")]
    assert f"road, {groups[0].name}: 0.01" in titles
    assert len(titles) == 8
    assert plots.margin_chart(groups[1:], "rho_0k") is None


def test_a_margin_of_zero_has_no_dot_on_a_logarithmic_axis(make_run):
    groups = compare([make_run("a", margins=True)]).groups
    groups[0].runs[0].margins["rho_0k"][0] = 0.0
    dots = dict(plots.margin_chart(groups, "rho_0k").rows)
    assert dots["road"] == []
    assert len(dots["sign"]) == 1


def test_a_share_of_zero_is_said(make_run):
    groups = compare([make_run("a")]).groups
    groups[0].runs[0].counts["sign"] = 0
    assert {row.name: row.text for row in plots.share_chart(groups).rows}["sign"] == "none"


# -- confusion -----------------------------------------------------------------------------------------------------


def test_confusion_rows_are_shares_of_the_label():
    counts = np.array([[8, 2, 0], [5, 5, 0], [0, 0, 0]])
    shares = plots.row_shares(counts)
    np.testing.assert_allclose(shares[:2], [[0.8, 0.2, 0], [0.5, 0.5, 0]])
    assert np.isnan(shares[2]).all()
    assert plots.top_confusions(counts, ["a", "b", "c"]) == [("b", "a", 0.5), ("a", "b", 0.2)]
    root = drawn("heat_map", plots.confusion_chart(counts, ["a", "b", "c"]))
    titles = [item.get("title") for item in having(root, "cell")]
    assert "b, a: 50.0" in titles
    assert "c, a: no pixels" in titles


def test_confusion_adds_the_runs_of_a_group(make_run):
    (group,) = compare([make_run(f"a{s}", seed=s) for s in (0, 1)]).groups
    assert plots.confusion(group).sum() == 2 * 30 * 20_000


def test_a_confusion_matrix_of_many_classes_is_ink_of_its_strength():
    counts = np.diag(np.full(50, 9)).astype(np.int64)
    counts[0, 1] = 3
    kind, content = plots.confusion_chart(counts, [str(k) for k in range(50)]).split(",")
    assert kind == "data:image/png;base64"
    alpha = np.asarray(Image.open(io.BytesIO(b64decode(content))))[..., 3]
    assert alpha[0, :3].tolist() == [int(255 * 0.75**0.5), int(255 * 0.25**0.5), 0]
    assert (alpha[1:].diagonal(1) == 255).all()


def test_a_band_that_reaches_zero_has_a_linear_axis():
    """The mean of two runs may be positive where one of them is at a loss of 0."""
    chart = plots.line_chart([plots.Series("s", 0, [0, 10], [50.0, 1.0], [40.0, 0.0], [60.0, 2.0])], "loss")
    assert chart.y_label == "training loss"
    assert len(chart.curves[0].band) == 4
