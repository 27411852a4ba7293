"""The evaluation loop on models whose answer is known."""

from __future__ import annotations

import json
import tracemalloc
import weakref
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from segkit.errors import InputError
from segkit.evaluation import BoundaryCounts, ConfusionMatrix, evaluate, metrics, to_results
from segkit.evaluation.per_image import PerImageCounts, sparse


class Batch(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor
    names: list[str]
    indices: list[int]


class RedIsTheClass(nn.Module):
    """Logits that make the value of the red channel the prediction; notes how it was called."""

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.seen = []

    def forward(self, images):
        self.seen.append((self.training, torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        classes = torch.arange(self.num_classes).view(1, -1, 1, 1)
        return -(images[:, :1].float() - classes).abs()


def make_batches(num_images, *, num_classes=4, size=(6, 8), batch_size=2, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, num_classes, (num_images, 3, *size)).astype(np.uint8)
    labels = rng.integers(0, num_classes, (num_images, *size)).astype(np.uint8)
    labels[:, 0, :2] = 255
    for start in range(0, num_images, batch_size):
        rows = list(range(start, min(start + batch_size, num_images)))
        yield Batch(torch.from_numpy(images[rows]), torch.from_numpy(labels[rows]), [f"image{i}" for i in rows], rows)


def test_counts_pictures_and_per_image_matrices():
    model = RedIsTheClass(4).train()
    result = evaluate(model, make_batches(5), num_classes=4, pictures={0, 1, 2})
    matrix = ConfusionMatrix(4)
    batches = list(make_batches(5))
    for batch in batches:
        matrix.update(batch.images[:, 0], batch.labels)
    np.testing.assert_array_equal(result.counts, matrix.counts.numpy())
    assert result.counts.sum() == 5 * (48 - 2)
    assert result.per_image.names == tuple(f"image{i}" for i in range(5))
    single = ConfusionMatrix(4)
    single.update(batches[1].images[1, 0], batches[1].labels[1])
    np.testing.assert_array_equal(result.per_image.matrix(3), single.counts.numpy())
    assert [p.name for p in result.pictures] == ["image0", "image1", "image2"]
    np.testing.assert_array_equal(result.pictures[2].image, batches[1].images[0].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(result.pictures[2].label, batches[1].labels[0].numpy())
    np.testing.assert_array_equal(result.pictures[2].prediction, batches[1].images[0, 0].numpy())


class Reads(TorchDispatchMode):
    """Counts how often a value is read from a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_no_value_is_read_for_a_single_image(batch_size):
    """One answer a batch: whether the logits are finite; the counts are read as arrays."""
    with Reads() as reads:
        evaluate(RedIsTheClass(4), make_batches(6, batch_size=batch_size), num_classes=4, pictures={0})
    assert reads.count <= 6 // batch_size


def test_the_image_of_a_batch_that_is_out_of_range_is_named():
    *_, batch = make_batches(3, batch_size=3)
    batch.labels[1, 2, 2] = 77
    with pytest.raises(InputError, match=r"label value 77 \(1 pixels\) out of range in image1"):
        evaluate(RedIsTheClass(4), [batch], num_classes=4)


def test_model_runs_in_eval_and_inference_mode_and_gets_its_own_mode_back():
    for mode in (True, False):
        model = RedIsTheClass(4).train(mode)
        evaluate(model, make_batches(1), num_classes=4)
        assert model.seen == [(False, True, False)]
        assert model.training is mode
    model = RedIsTheClass(4).train()
    with pytest.raises(InputError, match="out of range in image0"):
        evaluate(model, make_batches(1), num_classes=2)
    assert model.training
    model = RedIsTheClass(4)
    evaluate(model, make_batches(1), num_classes=4, dtype=torch.bfloat16)
    assert model.seen == [(False, True, True)]


def test_labels_may_have_another_size_than_the_images():
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    images[..., 2:] = 3
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[..., 4:] = 3
    result = evaluate(RedIsTheClass(4), [Batch(images, labels, ["a"], [0])], num_classes=4, pictures=range(1))
    assert result.counts.sum() == 64
    assert result.pictures[0].image.shape == (8, 8, 3)


def test_ranks_together_equal_one_process():
    whole = evaluate(RedIsTheClass(4), make_batches(6, batch_size=1), num_classes=4, pictures=range(2))
    parts = []

    def collect(local):
        parts.append(local)
        return [local]

    batches = list(make_batches(6, batch_size=1))
    for rank in (1, 0):
        evaluate(RedIsTheClass(4), batches[rank::2], num_classes=4, pictures=range(2), gather=collect)
    joined = evaluate(
        RedIsTheClass(4),
        batches[0::2],
        num_classes=4,
        pictures=range(2),
        gather=lambda local: [parts[0], local],
    )
    np.testing.assert_array_equal(joined.counts, whole.counts)
    assert joined.per_image.names == whole.per_image.names
    np.testing.assert_array_equal(joined.per_image.image, whole.per_image.image)
    np.testing.assert_array_equal(joined.per_image.count, whole.per_image.count)
    assert [p.name for p in joined.pictures] == ["image0", "image1"]


def test_memory_grows_by_the_sparse_matrices_of_the_images_only():
    num_classes, size = 12, (40, 50)
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most_alive = 0

    def watched(num_images):
        nonlocal most_alive
        for index in range(num_images):
            ((images, labels, _, _),) = make_batches(1, num_classes=num_classes, size=size, seed=index)
            alive.update([images, labels])
            most_alive = max(most_alive, len(alive))
            yield Batch(images, labels, [f"image{index}"], [index])
            del images, labels

    def peak(num_images):
        batches = watched(num_images)
        tracemalloc.start()
        result = evaluate(RedIsTheClass(num_classes), batches, num_classes=num_classes, boundary_ratio=0.02)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most, len(result.per_image.count)

    peak(1)  # imports
    (few, few_entries), (many, many_entries) = peak(20), peak(220)
    entries = many_entries - few_entries
    assert entries > 200 * 100
    # Three int64 an entry while counting and four in the result; a name and places in lists and dicts an image.
    assert many - few < (3 + 4) * 8 * entries + 200 * 500
    assert most_alive <= 4, "images and labels of this batch and of the one before"


def test_no_image_and_an_image_twice_are_errors():
    with pytest.raises(InputError, match=r"there is no image to evaluate; check dataset\.root"):
        evaluate(RedIsTheClass(4), [], num_classes=4)
    batch = next(make_batches(1))
    with pytest.raises(InputError, match=r"image image0 \(number 0\) was evaluated twice"):
        evaluate(RedIsTheClass(4), [batch, batch], num_classes=4)


def test_nan_logits_and_wrong_shapes_are_errors():
    class Broken(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.make = make

        def forward(self, images):
            return self.make(images)

    with pytest.raises(InputError, match=r"logits that are not finite \(inf or nan\)"):
        evaluate(Broken(lambda x: torch.full((2, 4, 6, 8), float("nan"))), make_batches(2), num_classes=4)
    with pytest.raises(InputError, match=r"must return logits \(N, K, h, w\), got shape \(4, 6, 8\)"):
        evaluate(Broken(lambda x: torch.zeros(4, 6, 8)), make_batches(2), num_classes=4)


def test_progress_wraps_the_batches():
    seen = []

    def progress(batches):
        for batch in batches:
            seen.append(batch.names)
            yield batch

    evaluate(RedIsTheClass(4), make_batches(3), num_classes=4, progress=progress)
    assert seen == [["image0", "image1"], ["image2"]]


def test_results_hold_the_scores_and_the_protocol():
    result = evaluate(RedIsTheClass(4), make_batches(5, num_classes=3), num_classes=4)
    results = to_results(result, class_names=["a", "b", "c", "d"], protocol={"split": "val"})
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert results["mean_iou"] == pytest.approx(metrics.mean_iou(result.counts))
    assert results["absent_classes"] == ["d"]
    assert results["num_classes_averaged"] == 3
    assert results["num_images"] == 5
    assert results["protocol"] == {"ignore_index": 255, "absent_class": "excluded", "split": "val"}


def test_per_image_file_keeps_everything(tmp_path):
    result = evaluate(RedIsTheClass(4), make_batches(5), num_classes=4)
    path = tmp_path / "per_image.npz"
    path.write_bytes(result.per_image.to_bytes())
    loaded = PerImageCounts.load(path)
    assert loaded.names == result.per_image.names
    assert loaded.num_classes == 4
    np.testing.assert_array_equal(loaded.total(), result.counts)
    for i in range(5):
        np.testing.assert_array_equal(loaded.matrix(i), result.per_image.matrix(i))
    tp, target, predicted = loaded.class_totals()
    for i in range(5):
        matrix = loaded.matrix(i)
        np.testing.assert_array_equal(tp[i], np.diag(matrix))
        np.testing.assert_array_equal(target[i], matrix.sum(1))
        np.testing.assert_array_equal(predicted[i], matrix.sum(0))
    assert [p.name for p in tmp_path.iterdir()] == ["per_image.npz"]


def test_per_image_file_that_is_none(tmp_path):
    with pytest.raises(InputError, match=r"there is no per-image count file .*x\.npz"):
        PerImageCounts.load(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"x\.npz is not a per-image count file"):
        PerImageCounts.load(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", image=np.zeros(3))
    with pytest.raises(InputError, match=r"y\.npz is not a per-image count file"):
        PerImageCounts.load(tmp_path / "y.npz")


def test_an_image_without_labels_keeps_its_place():
    counts = [np.zeros((2, 2), np.int64), np.eye(2, dtype=np.int64)]
    per_image = PerImageCounts.from_sparse([sparse(matrix) for matrix in counts], ["empty", "full"], num_classes=2)
    assert per_image.num_images == 2
    assert per_image.matrix(0).sum() == 0
    np.testing.assert_array_equal(per_image.total(), np.eye(2))


def test_boundary_scores_are_counted_on_request_and_over_ranks():
    batches = list(make_batches(4, size=(20, 30)))
    result = evaluate(RedIsTheClass(4), batches, num_classes=4, boundary_ratio=0.05)
    expected = BoundaryCounts(4, ratio=0.05)
    for batch in batches:
        for image, label in zip(batch.images, batch.labels, strict=True):
            expected.update(image[0].numpy(), label.numpy())
    np.testing.assert_array_equal(result.boundary.iou(), expected.iou())
    results = to_results(result, class_names=list("abcd"))
    assert results["boundary"] == expected.summary()
    assert results["classes"]["b"]["boundary_iou"] == pytest.approx(expected.iou()[1])

    parts = []

    def collect(local):
        parts.append(local)
        return [local]

    evaluate(RedIsTheClass(4), batches[1:], num_classes=4, boundary_ratio=0.05, gather=collect)
    joined = evaluate(
        RedIsTheClass(4),
        batches[:1],
        num_classes=4,
        boundary_ratio=0.05,
        gather=lambda local: [local, parts[0]],
    )
    np.testing.assert_array_equal(joined.boundary.iou(), expected.iou())
