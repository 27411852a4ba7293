"""Folds pooled by ``compare``, against sums of dense matrices."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest

from segkit.errors import InputError
from segkit.evaluation import metrics
from segkit.evaluation.bootstrap import bootstrap_mean_iou
from segkit.evaluation.per_image import PerImageCounts
from segkit.report import tables
from segkit.report.comparison import compare
from segkit.report.page import origin, page
from segkit.report.runs import RunRecord

K, PER_FOLD = 8, 6


@pytest.fixture
def make_fold(make_run, composed_folds):
    """A run of fold ``fold`` of five; each fold holds out images of its own name, drawn with its own skill."""

    def make(name, fold, *overrides, held_out=None, **options):
        options = {"skill": 0.6 + 0.05 * fold, "num_images": PER_FOLD, "num_pictures": 1, **options}
        run = make_run(name, *overrides, **options)
        composed_folds(run, fold)
        counts = PerImageCounts.load(run / "per_image.npz")
        names = tuple(f"image{(fold if held_out is None else held_out) * PER_FOLD + i}" for i in range(PER_FOLD))
        (run / "per_image.npz").resolve().write_bytes(replace(counts, names=names).to_bytes())
        return run

    return make


@pytest.fixture
def composed_folds():
    """Writes the data set of a cross-validation into the config.yaml of a run."""
    import yaml

    def write(run, fold, folds=5):
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["dataset"]["reader"] = {"_target_": "segkit.data.readers.folder.read", "folds": folds, "fold": fold}
        (run / "config.yaml").write_text(yaml.safe_dump(config))

    return write


def dense_sum(runs):
    """The confusion matrix of all images, entry by entry, and its IoU."""
    total = np.zeros((K, K), np.int64)
    for run in runs:
        with np.load(run / "per_image.npz") as stored:
            for target, prediction, count in zip(stored["target"], stored["prediction"], stored["count"], strict=True):
                total[target, prediction] += count
    hit = np.diag(total).astype(np.float64)
    return total, hit / (total.sum(0) + total.sum(1) - hit)


def test_five_folds_are_one_run_that_scores_each_image_once(make_fold):
    runs = [make_fold(f"f{fold}", fold) for fold in (3, 0, 1, 4, 2)]
    comparison = compare(runs)
    (group,) = comparison.groups
    (record,) = group.runs
    total, iou = dense_sum(runs)
    np.testing.assert_array_equal(record.per_image.total(), total)
    assert record.results["mean_iou"] == pytest.approx(iou.mean(), rel=1e-12)
    assert [record.results["classes"][name]["iou"] for name in record.classes] == pytest.approx(iou, rel=1e-12)
    assert record.results["mean_iou"] != pytest.approx(
        np.mean([json.loads((run / "results.json").read_text())["mean_iou"] for run in runs]), abs=1e-6
    ), "no mean of the folds' scores"
    assert record.results["num_images"] == record.per_image.num_images == 5 * PER_FOLD
    assert record.per_image.names == tuple(f"image{i}" for i in range(5 * PER_FOLD))
    assert [one.path.name for one in comparison.folders] == ["f0", "f1", "f2", "f3", "f4"]
    assert comparison.notes == ()
    assert set(record.pictures) == {"val_0000"}


def test_the_interval_is_drawn_over_the_images_of_all_folds(make_fold):
    runs = [make_fold(f"f{fold}", fold) for fold in range(5)]
    matrices = []
    for run in runs:
        counts = PerImageCounts.load(run / "per_image.npz")
        matrices += [counts.matrix(image) for image in range(PER_FOLD)]
    made = PerImageCounts.from_sparse(
        [np.stack([*np.nonzero(matrix), matrix[np.nonzero(matrix)]]) for matrix in matrices],
        [str(i) for i in range(len(matrices))],
        num_classes=K,
    )
    expected = bootstrap_mean_iou(made, num_samples=300)
    (record,) = compare(runs).runs
    found = bootstrap_mean_iou(record.per_image, num_samples=300)
    assert (found.low, found.mean_iou, found.high) == (expected.low, expected.mean_iou, expected.high)
    assert found.num_images == 5 * PER_FOLD


def test_every_output_says_how_many_folds_were_pooled(make_fold, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # else the table of the screen breaks the name
    comparison = compare([make_fold(f"f{fold}", fold) for fold in range(5)])
    for written in (tables.screen, tables.markdown, tables.latex, tables.csv_text):
        assert "5 folds pooled" in " ".join(written(comparison.table).split()), written
    (row,) = csv.DictReader(io.StringIO(tables.csv_text(comparison.table)))
    assert float(row["mean_iou"]) == comparison.runs[0].results["mean_iou"]
    text = page(comparison, pictures=1)
    assert "5 folds pooled" in text
    assert "each image is scored once" in text
    assert "Every run (5)" in text


def test_the_origin_shows_the_command_of_every_fold(make_fold):
    runs = [make_fold(f"f{fold}", fold) for fold in range(2)]
    for fold, run in enumerate(runs):
        facts = json.loads((run / "provenance.json").read_text())
        facts |= {"command": ["train.py", f"fold={fold}"], "data": {"train": f"{fold}"}}
        (run / "provenance.json").write_text(json.dumps(facts))
    part = origin(compare(runs))
    assert part["differing"]["command"] == ["train.py fold=0", "train.py fold=1"]
    assert [run.path for run in part["runs"]] == runs
    assert not part["data_differs"]  # folds do, by what they are


def test_seeds_and_losses_are_pooled_apart(make_fold):
    runs = [make_fold(f"a{fold}{seed}", fold, seed=seed) for fold in (0, 1) for seed in (0, 1)]
    runs += [make_fold(f"b{fold}", fold, "loss=dice") for fold in (0, 1)]
    base, other = compare(runs).groups
    assert [(run.seed, len(run.folds)) for run in base.runs] == [(0, 2), (1, 2)]
    assert [(run.seed, len(run.folds)) for run in other.runs] == [(0, 2)]
    assert [one.path.name for one in base.runs[1].folds] == ["a01", "a11"]
    assert other.name == "dice, 2 of 5 folds pooled"


def test_missing_folds_are_named(make_fold):
    runs = [make_fold(f"f{fold}", fold) for fold in (0, 2, 3)]
    comparison = compare(runs)
    (note,) = comparison.notes
    assert "has fold 0, 2, 3 of 5, and no fold 1, 4 was named" in note
    assert "3 of 5 folds pooled" in comparison.groups[0].name
    others = [make_fold(f"d{fold}", fold, "loss=dice") for fold in (0, 2)]
    with pytest.raises(InputError, match=r"images is 18 in .*; .* no fold 1, 3, 4 was named: .* not scored\. "):
        compare([*runs, *others])
    (alone,) = compare([make_fold("alone", 1)]).groups
    assert "pooled" not in alone.name


def test_an_image_that_two_folds_hold_out_is_refused(make_fold):
    runs = [make_fold("a", 0), make_fold("b", 1, held_out=0)]
    with pytest.raises(InputError, match=r"image 'image0' is held out by .*a and by .*b, but in a"):
        compare(runs)


def test_a_fold_without_counts_is_refused(make_fold):
    runs = [make_fold("a", 0), make_fold("b", 1)]
    (runs[1] / "per_image.npz").unlink()
    with pytest.raises(InputError, match=r"b has no counts of single images, which its fold is pooled by: evaluate"):
        compare(runs)


def test_one_fold_trained_twice_is_a_row_of_its_own(make_fold):
    runs = [make_fold("a0", 0), make_fold("a1", 1), make_fold("again", 0)]
    comparison = compare(runs, allow_mixed_protocols=True)
    assert [[one.path.name for one in group.runs[0].folders] for group in comparison.groups] == [
        ["a0", "a1"],
        ["again"],
    ]


def test_published_folds_are_pooled_too():
    from segkit.report.folds import fold_of

    def run(**reader):
        config = {"dataset": {"reader": reader}, "schedule": {"train": {}}}
        return RunRecord(path=None, phase="train", config=config, results={})

    assert fold_of(run(splits="sequence", fold=3)) == (3, 4)
    assert fold_of(run(splits="paper", fold=0)) is None
    assert fold_of(run(folds=0, fold=0)) is None
    assert fold_of(run(folds=3, fold="1")) is None


def test_curves_of_folds_with_other_steps_are_interpolated(make_fold):
    runs = [make_fold(f"f{fold}", fold) for fold in (0, 1)]
    path = runs[1] / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["step"] += 5
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    from segkit.report import plots

    (record,) = compare(runs).runs
    one, other = (plots.recorded(fold, "val", "mean_iou") for fold in record.folds)
    (curve,) = plots.series(compare(runs).groups, "val", "mean_iou")
    assert list(curve.x) == [50, 100, 150, 200]
    expected = (one[100] + other[55] + (other[105] - other[55]) * 45 / 50) / 2
    assert curve.y[1] == pytest.approx(expected, rel=1e-12)


def test_metrics_of_the_pool_are_those_of_a_summary(make_fold):
    runs = [make_fold(f"f{fold}", fold) for fold in (0, 1)]
    total, _ = dense_sum(runs)
    (record,) = compare(runs).runs
    correct = np.trace(total) / total.sum()
    assert record.results["pixel_accuracy"] == pytest.approx(correct, rel=1e-12)
    assert metrics.mean_iou(total) == record.results["mean_iou"]
