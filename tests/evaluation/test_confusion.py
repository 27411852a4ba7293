"""Counting pixels: every input type gives the slow loop's counts, and values out of range are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from segkit.errors import InputError
from segkit.evaluation import ConfusionMatrix, confusion, count_pixels


def loop_counts(pred, target, num_classes, ignore_index):
    counts = np.zeros((num_classes, num_classes), np.int64)
    for p, t in zip(pred.reshape(-1).tolist(), target.reshape(-1).tolist(), strict=True):
        if t != ignore_index:
            counts[t, p] += 1
    return counts


@pytest.mark.parametrize("pred_dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("num_classes", [2, 19, 150])
def test_counts_equal_the_loop(num_classes, pred_dtype, target_dtype):
    generator = torch.Generator().manual_seed(num_classes)
    target = torch.randint(0, num_classes, (2, 13, 17), generator=generator)
    pred = torch.randint(0, num_classes, (2, 13, 17), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    pred[target == 255] = 200  # what is predicted on an ignored pixel does not matter
    counts = count_pixels(pred.to(pred_dtype), target.to(target_dtype), num_classes=num_classes)
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts.numpy(), loop_counts(pred, target, num_classes, 255))


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 7, 300])
def test_any_ignore_index(ignore_index):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 4, (40, 40), generator=generator)
    pred = torch.randint(0, 4, (40, 40), generator=generator)
    target[:5] = ignore_index
    counts = count_pixels(pred, target, num_classes=4, ignore_index=ignore_index)
    np.testing.assert_array_equal(counts.numpy(), loop_counts(pred, target, 4, ignore_index))


def test_more_classes_than_a_byte_holds():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 300, (50, 50), generator=generator)
    pred = torch.randint(0, 300, (50, 50), generator=generator)
    target[target == 255] = 254
    counts = count_pixels(pred.to(torch.int16), target, num_classes=300, ignore_index=-1)
    np.testing.assert_array_equal(counts.numpy(), loop_counts(pred, target, 300, -1))


def test_maps_without_a_pixel_or_without_a_label():
    empty = torch.zeros(0, 4, dtype=torch.int64)
    assert int(count_pixels(empty, empty, num_classes=3).sum()) == 0
    void = torch.full((4, 4), 255)
    assert int(count_pixels(torch.zeros_like(void), void, num_classes=3).sum()) == 0


def test_large_maps_are_counted_in_parts_because_histogram_bins_are_float32(monkeypatch):
    target = torch.zeros(1, 2**24 + 3, dtype=torch.uint8)
    counts = count_pixels(target, target, num_classes=2)
    assert counts.tolist() == [[2**24 + 3, 0], [0, 0]]
    monkeypatch.setattr(confusion, "_MAX_HISTOGRAM_PIXELS", 100)
    small = torch.arange(1234).remainder(5).view(1, -1).to(torch.uint8)
    np.testing.assert_array_equal(
        count_pixels(small, small.flip(1), num_classes=5).numpy(), loop_counts(small, small.flip(1), 5, 255)
    )


def test_non_contiguous_maps():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 4, (20, 30), generator=generator).to(torch.uint8)
    pred = torch.randint(0, 4, (30, 20), generator=generator).to(torch.uint8).t()
    counts = count_pixels(pred[::2, 1:], target[::2, 1:], num_classes=4)
    np.testing.assert_array_equal(counts.numpy(), loop_counts(pred[::2, 1:], target[::2, 1:], 4, 255))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_label_out_of_range_is_named(dtype):
    target = torch.zeros(4, 4, dtype=dtype)
    target[0, :3] = 34
    target[1, 0] = 19
    message = (
        r"label value 19 \(1 pixels\), 34 \(3 pixels\) out of range in lindau_3: allowed are the classes "
        r"0\.\.18 and ignore_index 255; map the raw labels with the data set's label table"
    )
    with pytest.raises(InputError, match=message):
        count_pixels(torch.zeros_like(target), target, num_classes=19, where="lindau_3")
    wide = torch.zeros(4, 4, dtype=torch.int64)
    wide[0, 0] = 700
    with pytest.raises(InputError, match=r"label value 700 \(1 pixels\) out of range: allowed"):
        count_pixels(torch.zeros_like(wide), wide, num_classes=19)


@pytest.mark.parametrize("value", [19, 255, 256, -1])
def test_prediction_out_of_range_is_named(value):
    target = torch.zeros(4, 4, dtype=torch.int64)
    pred = target.clone()
    pred[2, 2] = value
    with pytest.raises(InputError, match=rf"prediction value {value} \(1 pixels\) out of range.*0\.\.18; the model"):
        count_pixels(pred, target, num_classes=19)


def test_sizes_and_types_are_checked():
    with pytest.raises(InputError, match=r"differ in size in a\.png: \(4, 4\) and \(4, 5\)"):
        count_pixels(torch.zeros(4, 4).long(), torch.zeros(4, 5).long(), num_classes=2, where="a.png")
    with pytest.raises(InputError, match=r"must hold class numbers, got torch\.float32 and torch\.int64"):
        count_pixels(torch.zeros(4, 4), torch.zeros(4, 4).long(), num_classes=2)
    with pytest.raises(InputError, match=r"must be tensors, got ndarray and Tensor: take torch\.as_tensor"):
        ConfusionMatrix(2).update(np.zeros((4, 4), int), torch.zeros(4, 4).long())


def test_a_running_matrix_adds_up_and_merges():
    generator = torch.Generator().manual_seed(1)
    pairs = [torch.randint(0, 3, (2, 8, 8), generator=generator) for _ in range(4)]
    whole, left, right = (ConfusionMatrix(3) for _ in range(3))
    for i, (pred, target) in enumerate(pairs):
        whole.update(pred, target)
        (left if i < 2 else right).update(pred, target)
    left.merge(right)
    assert torch.equal(left.counts, whole.counts)
    assert whole.counts.sum() == 4 * 64
    expected = sum(loop_counts(pred, target, 3, 255) for pred, target in pairs)
    np.testing.assert_array_equal(whole.counts.numpy(), expected)
    tp = np.diag(expected)
    iou = tp / (expected.sum(0) + expected.sum(1) - tp)
    np.testing.assert_allclose(whole.iou().numpy(), iou)
    assert whole.mean_iou() == pytest.approx(iou.mean())
    np.testing.assert_allclose(whole.precision().numpy(), tp / expected.sum(0))
    np.testing.assert_allclose(whole.recall().numpy(), tp / expected.sum(1))
    assert torch.equal(whole.recall(), whole.class_accuracy())
    np.testing.assert_allclose(whole.dice().numpy(), 2 * tp / (expected.sum(0) + expected.sum(1)))
    assert whole.pixel_accuracy() == pytest.approx(tp.sum() / expected.sum())
    assert whole.frequency_weighted_iou() == pytest.approx((iou * expected.sum(1) / expected.sum()).sum())
    whole.reset()
    assert whole.absent_classes() == [0, 1, 2]
    with pytest.raises(InputError, match="cannot merge a confusion matrix of 4 classes"):
        whole.merge(ConfusionMatrix(4))
    with pytest.raises(InputError, match="num_classes must be at least 1, got 0"):
        ConfusionMatrix(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("num_classes", [19, 150, 300])
def test_counts_on_cuda_equal_those_on_the_cpu(num_classes):
    target = torch.randint(0, min(num_classes, 255), (2, 100, 120))
    pred = torch.randint(0, num_classes, (2, 100, 120))
    matrix = ConfusionMatrix(num_classes, device="cuda")
    matrix.update(pred.cuda(), target.cuda())
    assert matrix.counts.is_cuda
    assert torch.equal(matrix.counts.cpu(), count_pixels(pred, target, num_classes=num_classes))
