from __future__ import annotations

import io
import os
from dataclasses import replace

import numpy as np
import pytest

from segkit.evaluation import metrics
from segkit.report import page, pictures, uncertainty
from segkit.report.comparison import compare


def iou_mean(matrix):
    """Mean IoU over the classes of ``matrix`` that have a union, one by one."""
    unions = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    return float(np.mean([matrix[k, k] / union for k, union in enumerate(unions) if union]))


def without(run, name):
    """``run`` with a class that is in no label, and that only a pixel of the last image is taken for, or none."""
    k, counts = run.classes.index(name), run.per_image
    kept = counts.target != k
    own = {key: getattr(counts, key)[kept] for key in ("image", "target", "prediction", "count")}
    own["prediction"] = np.where(own["prediction"] == k, 0, own["prediction"])
    if run.seed == 0:
        own["prediction"][-1] = k
    counts = replace(counts, **own)
    results = run.results | metrics.summary(counts.total(), run.classes)
    return replace(run, per_image=counts, results=results)


def test_the_interval_of_a_row_is_that_of_its_mean_also_where_one_run_alone_predicts_a_class(make_run):
    groups = compare(
        [make_run(f"{loss}{s}", f"loss={loss}", seed=s) for loss in ("dice", "focal") for s in (0, 1)]
    ).groups
    row, other = (replace(group, runs=tuple(without(run, "sign") for run in group.runs)) for group in groups)
    means = [iou_mean(run.per_image.total()) for run in row.runs]
    assert means[1] - means[0] > 0.03  # 0 for the class in one of them, not averaged in the other
    first, second = row.runs
    turned = replace(second.per_image, image=29 - second.per_image.image, names=second.per_image.names[::-1])
    row = replace(row, runs=(first, replace(second, per_image=turned)))  # images go by their names
    (_, found), _ = uncertainty.intervals([row, other], num_samples=300)
    assert found.mean_iou == pytest.approx(np.mean(means), rel=1e-12)
    assert found.low < np.mean(means) < found.high
    (test,) = uncertainty.paired_tests([row, other], row, num_samples=300)
    expected = np.mean([iou_mean(run.per_image.total()) for run in other.runs]) - np.mean(means)
    assert (test.num_pairs, test.result.difference) == (2, pytest.approx(expected, rel=1e-9))


def test_the_interval_of_a_mean_equals_that_of_resamples_one_by_one(make_run):
    from scipy.stats import bootstrap

    (group,) = compare([make_run(f"a{s}", seed=s, num_images=8) for s in (0, 1)]).groups
    matrices = [[run.per_image.matrix(at) for at in range(8)] for run in group.runs]

    def mean(drawn):
        return np.mean([iou_mean(sum(one[int(at)] for at in drawn)) for one in matrices])

    reference = bootstrap((np.arange(8),), mean, n_resamples=1500, vectorized=False, method="BCa", rng=1)
    ((_, found),) = uncertainty.intervals([group], num_samples=4000)
    low, high = reference.confidence_interval
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_intervals_hold_the_score(make_run):
    groups = compare([make_run("a"), make_run("b", "loss=dice", skill=0.6)]).groups
    found = uncertainty.intervals(groups, num_samples=300)
    for at, interval in found:
        score = groups[at].runs[0].results["mean_iou"]
        assert interval.mean_iou == pytest.approx(score, rel=1e-12)
        assert interval.low < score < interval.high
    assert [at for at, _ in found] == [0, 1]


def test_a_clear_gain_is_found_and_none_is_not(make_run):
    runs = [make_run("a", skill=0.7), make_run("b", "loss=dice", skill=0.8), make_run("c", "loss=focal", skill=0.7)]
    comparison = compare(runs)
    better, same = uncertainty.paired_tests(comparison.groups, comparison.baseline, num_samples=300)
    expected = comparison.groups[1].runs[0].results["mean_iou"] - comparison.baseline.runs[0].results["mean_iou"]
    assert better.result.difference == pytest.approx(expected)
    assert better.result.low > 0
    assert better.result.p_value == pytest.approx(1 / 301)
    assert better.holm == pytest.approx(2 / 301)
    assert same.result.p_value == 1


def test_seeds_are_paired(make_run):
    runs = [make_run(f"a{s}", seed=s) for s in (0, 1, 2)] + [make_run(f"b{s}", "loss=dice", seed=s) for s in (2, 5)]
    base, other = compare(runs).groups
    assert [(one.seed, two.seed) for one, two in uncertainty._pairs(base, other)] == [(2, 2)]
    other = replace(other, runs=other.runs[1:])  # no seed in common: in their order
    assert [(one.seed, two.seed) for one, two in uncertainty._pairs(base, other)] == [(0, 5)]


def test_other_protocols_are_never_paired(make_run):
    runs = [make_run("a"), make_run("b", protocol={"inference": "flip"})]
    comparison = compare(runs, allow_mixed_protocols=True)
    assert len(comparison.groups) == 2
    assert uncertainty.paired_tests(comparison.groups, comparison.baseline, num_samples=100) == []
    assert page.image_ranking(*comparison.runs) == []


def test_holm_by_hand():
    assert uncertainty.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert uncertainty.holm([0.9, 0.8]) == [1.0, 1.0]
    assert uncertainty.holm([]) == []


def test_a_row_is_best_if_every_paired_test_supports_it(make_run):
    runs = [make_run("a", skill=0.7), make_run("b", "loss=dice", skill=0.8), make_run("c", "loss=focal", skill=0.6)]
    table = compare(runs, num_samples=300).table
    marked = [[cell.is_best for cell in row] for row in table.rows]
    assert [row[table.keys.index("mean_iou")] for row in marked] == [False, True, False]
    assert [row[table.keys.index("pixel_accuracy")] for row in marked] == [False, True, False]
    assert not any(marked[0] + marked[2])
    keys, groups = ["mean_iou", "iou/sky"], table.groups
    assert uncertainty.best_rows(groups[:1], keys, num_samples=300) == [None, None]  # nothing to be better than
    flattered = replace(groups[0].runs[0], results={**groups[0].runs[0].results, "mean_iou": 0.99})
    rows = [replace(groups[0], runs=(flattered,)), groups[1]]
    assert uncertainty.best_rows(rows, ["mean_iou"], num_samples=300) == [None]  # the tests show the contrary
    silent = [replace(group, runs=(replace(group.runs[0], per_image=None),)) for group in groups]
    assert uncertainty.best_rows(silent, keys, num_samples=300) == [None, None]  # nothing to test with


def test_samples_that_are_too_few_for_so_many_rows_are_said(make_run):
    runs = [make_run(f"{tau}", f"loss.tau={tau}.0") for tau in range(1, 8)]
    assert not compare(runs[:6], num_samples=100).notes
    (note,) = compare(runs, num_samples=100).notes
    assert note == ("no row of 7 can be bold by 100 samples, of which no p-value is below 1/101: give --samples 120")
    assert not compare(runs, num_samples=120).notes


def test_a_row_that_is_better_by_chance_is_not_marked(make_run):
    """The same predictions but for one pixel of one image."""
    comparison = compare([make_run("a"), make_run("b", "loss=dice")], num_samples=300)
    counts = comparison.runs[1].per_image
    right = int(np.flatnonzero((counts.target == counts.prediction) & (counts.count > 1))[0])
    wrong = int(np.flatnonzero((counts.image == counts.image[right]) & (counts.target == counts.target[right])
                               & (counts.target != counts.prediction))[0])  # fmt: skip
    changed = counts.count.copy()
    changed[[right, wrong]] += (1, -1)
    run = replace(comparison.runs[1], per_image=replace(counts, count=changed))
    run = replace(run, results=metrics.summary(run.per_image.total(), run.classes) | {
        key: run.results[key] for key in ("num_images", "protocol")})  # fmt: skip
    groups = [comparison.groups[0], replace(comparison.groups[1], runs=(run,))]
    assert 0 < run.results["mean_iou"] - comparison.runs[0].results["mean_iou"] < 1e-5
    assert uncertainty.best_rows(groups, ["mean_iou"], num_samples=300) == [None]


# -- images --------------------------------------------------------------------------------------------------------


def test_image_scores_are_means_over_the_classes_of_the_image(make_run):
    (group,) = compare([make_run("a")]).groups
    scores = page.image_scores(group.runs[0])
    matrix = group.runs[0].per_image.matrix(4).astype(float)
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    assert scores["val_0004"] == pytest.approx(np.mean([m / u for m, u in zip(np.diag(matrix), union) if u]))  # noqa: B905


def test_gains_are_sorted(make_run):
    runs = compare([make_run("a"), make_run("b", "loss=dice", skill=0.82)]).runs
    gains = page.image_ranking(*runs)
    assert len(gains) == 30
    assert [one.gain for one in gains] == sorted((one.gain for one in gains), reverse=True)


def test_best_and_worst_stored_images_are_chosen(make_run):
    (run,) = compare([make_run("a", num_pictures=6)]).runs
    ranked = ["val_0005", "val_0029", "val_0003", "val_0000", "val_0001", "val_0002", "val_0004"]
    assert page.chosen_names([run], ranked, 3) == ["val_0005", "val_0003", "val_0004"]
    assert page.chosen_names([run], ranked, 1) == ["val_0005"]
    assert page.chosen_names([run], ranked[:3], 3) == ["val_0005", "val_0003"]  # the others have no labelled pixel
    assert len(page.chosen_names([run], [], 10)) == 6


def test_the_images_of_one_run_are_ranked_by_their_scores(make_run):
    comparison = compare([make_run("a", num_pictures=2)])
    ranked = page.image_ranking(*comparison.ranked_runs)
    scores = page.image_scores(comparison.runs[0])
    assert [one.name for one in ranked] == sorted(scores, key=lambda name: -scores[name])
    part = page.images(comparison, most=4)
    assert [one.name for one in part["ranked"]] == [one.name for one in (*ranked[:5], *ranked[-5:])]
    assert not part["is_extreme"]  # the two images that are stored are not the best and the worst


def test_overlay_keeps_the_image_where_there_is_no_class():
    image = np.full((1, 3, 3), 100, np.uint8)
    mixed = pictures.overlay(image, np.array([[0, 1, 255]], np.uint8), [(200, 0, 50), (0, 0, 0)])
    np.testing.assert_array_equal(mixed[0], [[160, 40, 70], [40, 40, 40], [100, 100, 100]])


def test_stored_pictures_come_back(make_run):
    run = make_run("a", num_pictures=2)
    (record,) = compare([run]).runs
    image, label, prediction = record.pictures["val_0001"].read()
    assert image.shape == (96, 128, 3)
    assert label.dtype == np.uint8
    assert set(np.unique(label[:4])) == {255}
    assert prediction.max() < 8


def test_stored_pictures_are_small_and_keep_their_classes(tmp_path):
    from types import SimpleNamespace

    from segkit.report.pictures import LONGEST, read_pictures, write_pictures

    label = np.zeros((600, 3000), np.uint8)
    label[:, 1500:] = 149
    picture = SimpleNamespace(
        name="x", image=np.zeros((600, 3000, 3), np.uint8), label=label, prediction=label.astype(int)
    )
    write_pictures(tmp_path / "p", [picture], palette=np.zeros((150, 3), np.uint8), classes=["c"] * 150)
    image, stored, _ = read_pictures(tmp_path / "p")["x"].read()
    assert image.shape == (205, LONGEST, 3)
    assert set(np.unique(stored)) == {0, 149}


def test_an_index_cannot_name_files_elsewhere(make_run, tmp_path):
    run = make_run("a", num_pictures=1)
    index = run / "pictures" / "index.json"
    index.write_text(index.read_text().replace("0000_label.png", "../../../secret.png"))
    (record,) = compare([run]).runs
    assert record.pictures["val_0000"].label == run / "pictures" / "secret.png"


def written(array, kind):
    from PIL import Image

    Image.fromarray(array).save(out := io.BytesIO(), kind)
    return out.getvalue()


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("label", b"no picture"),
        ("image", b"no picture"),
        ("label", written(np.full((96, 128), 300, np.uint16), "PNG")),
        ("prediction", written(np.zeros((96, 128), bool), "PNG")),
        ("prediction", written(np.zeros((96, 128), np.float32), "TIFF")),
        ("image", written(np.zeros((96, 128, 3), np.uint8), "EPS")),  # which a program of its own would draw
    ],
)
def test_a_broken_picture_is_named(make_run, part, content):
    from segkit.errors import InputError

    run = make_run("a", num_pictures=1)
    (record,) = compare([run]).runs
    getattr(record.pictures["val_0000"], part).write_bytes(content)
    with pytest.raises(InputError, match=rf"0000_{part}\.\w+ cannot be read .*: delete the folder"):
        record.pictures["val_0000"].read()


def test_a_pipe_in_place_of_a_picture_is_not_waited_for(make_run):
    from segkit.errors import InputError

    (record,) = compare([make_run("a", num_pictures=1)]).runs
    picture = record.pictures["val_0000"]
    picture.label.unlink()
    os.mkfifo(picture.label)
    with pytest.raises(InputError, match=r"0000_label\.png cannot be read \(it is no file\): delete the folder"):
        picture.read()


def test_pictures_of_two_sizes_are_named(make_run):
    from PIL import Image

    from segkit.errors import InputError

    (record,) = compare([make_run("a", num_pictures=1)]).runs
    Image.new("L", (3, 2)).save(record.pictures["val_0000"].prediction)
    with pytest.raises(InputError, match=r"have sizes \(96, 128\), \(96, 128\) and \(2, 3\), but must have one"):
        record.pictures["val_0000"].read()
