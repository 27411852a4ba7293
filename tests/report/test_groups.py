from __future__ import annotations

import csv
import io
import json
import re
import statistics

import pytest

from segkit.evaluation.bootstrap import bootstrap_mean_iou
from segkit.report.comparison import compare
from segkit.report.groups import Group, differences, find_grids, flatten, gain, loss_name
from segkit.report.tables import Cell, csv_text, latex, markdown, screen

RECIPE = "schedule=pretrain_finetune"


def test_runs_that_differ_only_in_seed_are_one_row(make_run):
    runs = [make_run("b", RECIPE, seed=1), make_run("c", RECIPE, "loss.tau=5.0"), make_run("a", RECIPE, "workers=0")]
    comparison = compare(runs)
    assert [[run.path.name for run in group.runs] for group in comparison.groups] == [["a", "b"], ["c"]]
    assert [group.name for group in comparison.groups] == [
        "margin calibration (paper), τ=10, υ=1",
        "margin calibration (paper), τ=5, υ=1",
    ]


def test_a_gain_is_over_the_seeds_of_both(make_run):
    runs = [make_run(f"a{seed}", "loss=dice", seed=seed, skill=0.6 + 0.1 * seed) for seed in (0, 1)]
    runs += [make_run(f"b{seed}", seed=seed, skill=0.65) for seed in (1, 2, 3)]
    base, group = compare(runs).groups
    value, seeds = gain(group, base, "mean_iou")
    assert value == group.scores("mean_iou")[0] - base.scores("mean_iou")[1]  # by seed, not in their order
    assert seeds == "over 1 common seed"
    means = [statistics.mean(one.scores("mean_iou")) for one in (group, base)]
    other = Group("c", group.runs[1:])
    expected = pytest.approx(statistics.mean(group.scores("mean_iou")[1:]) - means[1])
    assert gain(other, base, "mean_iou") == (expected, "of means: no seed is common")
    assert gain(group, base, "iou/none") == (None, "")


def test_copies_of_the_data_are_one_row_and_other_data_are_not(make_run):
    runs = [make_run(name, f"dataset.root=/{name}", seed=seed) for seed, name in enumerate("abc")]
    assert [len(group.runs) for group in compare(runs).groups] == [3]
    path = (runs[2] / "label_counts.json").resolve()
    content = json.loads(path.read_text())
    next(iter(content["classes"].values()))["pixels"] += 1  # a label that was corrected
    path.write_text(json.dumps(content))
    names = [group.name for group in compare(runs).groups]
    assert len(names) == 2
    assert re.search(r"training pixels=\d+", names[1])
    assert "root" not in "".join(names)


def test_one_seed_twice_is_two_rows(make_run):
    comparison = compare([make_run("a"), make_run("b")])
    assert [len(group.runs) for group in comparison.groups] == [1, 1]
    assert len({group.name for group in comparison.groups}) == 2


def test_names_say_in_what_rows_differ(make_run):
    runs = [make_run("a", "loss=cross_entropy"), make_run("b", "loss=cross_entropy", "loss.weighting=enet")]
    runs += [make_run("c", "loss=cross_entropy", "optimizer.lr=0.5"), make_run("d", "loss=dice")]
    names = [group.name for group in compare(runs).groups]
    assert names[3] == "dice"
    assert "weighting=enet" in names[1]
    assert "optimizer.lr=0.5" in names[2]
    assert len(set(names)) == 4


def test_phases_of_one_loss_are_told_by_their_names(make_run):
    run = make_run("a", "loss=cross_entropy", RECIPE)
    names = [group.name for group in compare([run / "pretrain", run]).groups]
    assert names == ["cross-entropy, phase=pretrain", "cross-entropy, phase=finetune"]


def test_the_learning_rate_of_a_row_is_that_of_its_phase(make_run):
    runs = [make_run("a", RECIPE, "schedule.finetune.lr=0.25"), make_run("b", "schedule=single", "optimizer.lr=0.25")]
    assert not any("lr=" in group.name for group in compare(runs).groups)
    runs[1] = make_run("c", RECIPE, "schedule.finetune.lr=0.125")
    runs += [make_run("d", RECIPE, "schedule.finetune.lr=0.25", "optimizer.lr=0.5")]
    names = [group.name for group in compare(runs).groups]
    assert ["optimizer.lr=0.25" in name for name in names] == [True, False, True]
    assert "schedule.pretrain.lr=0.5" in names[2]


def test_the_contender_is_the_best_row_but_the_baseline(make_run):
    runs = [make_run("a", skill=0.9), make_run("b", "loss=dice", skill=0.6), make_run("c", "loss=focal", skill=0.7)]
    comparison = compare(runs)
    assert comparison.best is comparison.baseline
    assert comparison.contender.runs[0].path == runs[2]
    assert compare(runs[:1]).contender is None


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ({"_target_": "segkit.losses.cross_entropy"}, "cross-entropy"),
        ({"_target_": "segkit.losses.LovaszSoftmaxLoss"}, "lovasz softmax"),
        ({"_target_": "segkit.losses.margin_calibration", "form": "reference"}, "margin calibration (reference)"),
        (
            {
                "_target_": "segkit.losses.SumLoss",
                "terms": {
                    "a": {"weight": 1.0, "loss": {"_target_": "segkit.losses.cross_entropy"}},
                    "b": {"weight": 0.5, "loss": {"_target_": "segkit.losses.DiceLoss"}},
                },
            },
            "cross-entropy + 0.5 dice",
        ),
        ({"_target_": "mine.SetLoss", "terms": {"a": 1, "b": [2]}}, "set"),
        ({"_target_": "mine.Sum", "terms": {"a": {"weight": "much", "loss": {"_target_": "x.DiceLoss"}}}}, "sum"),
    ],
)
def test_losses_in_words(node, name):
    assert loss_name(node) == name


def test_the_baseline_comes_first(make_run):
    one, other = make_run("a", "loss=dice"), make_run("b")
    assert compare([one, other]).baseline.runs[0].path == one
    assert compare([one, other], baseline=other).baseline.runs[0].path == other
    assert compare([one], baseline=other).baseline.runs[0].path == other


def test_a_grid_is_found_beside_its_baseline(make_run):
    runs = [make_run("ce", "loss=cross_entropy")]
    runs += [
        make_run(f"{t}{u}", f"loss.tau={t}", f"loss.upsilon={u}") for t in (20, 5) for u in (1, 2) if (t, u) != (5, 2)
    ]
    (grid,) = find_grids(compare(runs).groups)
    assert (grid.row_key, grid.column_key) == ("loss.tau", "loss.upsilon")
    assert (grid.rows, grid.columns) == ((5, 20), (1, 2))
    shown = [[cell.runs[0].path.name if cell else None for cell in row] for row in grid.cells]
    assert shown == [["51", None], ["201", "202"]]


def test_a_line_is_no_grid(make_run):
    assert find_grids(compare([make_run(str(t), f"loss.tau={t}") for t in (1, 2, 3)]).groups) == []


def test_differences_name_keys_that_one_side_lacks():
    found = differences([flatten({"a": {"b": 1, "c": 2}}), flatten({"a": {"b": 1, "d": 3}})])
    assert set(found) == {"a.c", "a.d"}
    assert found["a.c"][0] == 2


# -- tables --------------------------------------------------------------------------------------------------------


def test_cells_have_mean_and_sample_deviation():
    cell = Cell((0.5, 0.6, 0.8))
    assert cell.mean == pytest.approx(1.9 / 3)
    assert cell.spread == pytest.approx(statistics.stdev([0.5, 0.6, 0.8]))
    assert Cell((0.5,)).spread is None
    assert (Cell(()).mean, Cell(()).mean_text) == (None, "–")


@pytest.fixture
def table(make_run):
    runs = [make_run(f"ce{s}", "loss=cross_entropy", seed=s) for s in (0, 1)]
    runs += [make_run("mc", skill=0.9), make_run("dice", "loss=dice", skill=0.5)]
    return compare(runs).table


def test_csv_has_every_digit(table):
    rows = list(csv.DictReader(io.StringIO(csv_text(table))))
    assert [row["seed"] for row in rows] == ["0", "1", "0", "0"]
    runs = [run for group in table.groups for run in group.runs]
    for row, run in zip(rows, runs, strict=True):
        assert row["run"] == str(run.path)
        assert float(row["mean_iou"]) == run.results["mean_iou"]
        for kind in ("iou", "precision", "recall"):
            assert float(row[f"{kind}/sign"]) == run.results["classes"]["sign"][kind]
        interval = bootstrap_mean_iou(run.per_image)
        assert (float(row["mean_iou_low"]), float(row["mean_iou_high"])) == (interval.low, interval.high)
    pair = [run.results["mean_iou"] for run in runs[:2]]
    assert [row["mean_iou_std"] for row in rows] == [repr(statistics.stdev(pair))] * 2 + ["", ""]


def test_markdown(table):
    lines = markdown(table).splitlines()
    assert lines[0].startswith("|  | runs | pixel acc. | mIoU | std | 95 % interval | road | ")
    assert len({line.count("|") for line in lines[:5]}) == 1
    score = table.groups[1].runs[0].results["mean_iou"]
    own = bootstrap_mean_iou(table.groups[1].runs[0].per_image)
    assert f"| **{100 * score:.2f}** | – | {100 * own.low:.2f}–{100 * own.high:.2f} |" in lines[3]
    pair = [run.results["mean_iou"] for run in table.groups[0].runs]
    assert f"| {50 * sum(pair):.2f} | {100 * statistics.stdev(pair):.2f} | " in lines[2]


def test_latex(table):
    lines = latex(table).splitlines()
    body = [line for line in lines if line.endswith(r"\\")]
    assert len({line.count("&") for line in body}) == 1
    assert lines[1] == r"\begin{tabular}{l" + "r" * body[0].count("&") + "}"
    assert r"$\tau$=10, $\upsilon$=1" in body[2]
    assert r"& mIoU & std & 95 \% interval &" in body[0]
    assert r"\textbf{" in body[2]
    assert r"\textbf{" not in body[1] + body[3]
    assert r" $\pm$ " in body[1]
    assert re.search(r"& \d\d\.\d\d--\d\d\.\d\d &", body[1])


def test_screen(table):
    text = screen(table)
    assert re.search(r"margin calibration \(paper\).* 1 .*\*", text)
    assert "synthetic val, 30 images" in text.replace("\n", " ")


def test_a_group_leaves_out_scores_that_runs_lack(make_run):
    run = compare([make_run("a")]).groups[0].runs[0]
    run.results["classes"]["sky"]["iou"] = None
    assert Group("g", (run,)).scores("iou/sky") == []
