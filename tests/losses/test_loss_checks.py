"""What a loss says to input that it cannot take."""

from __future__ import annotations

import pytest
import torch

from segkit.errors import InputError
from segkit.losses import CrossEntropyLoss, check_labels, lift_binary

LOGITS = torch.zeros(2, 3, 4, 5)
TARGET = torch.zeros(2, 4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (LOGITS, TARGET[:1], r"shape \(N, H, W\) with the N = 2 images of .*\(2, 3, 4, 5\), got \(1, 4, 5\); pass"),
        (LOGITS, TARGET[0], r"target must have shape \(N, H, W\) .*got \(4, 5\)"),
        (LOGITS[:, :, :0], TARGET, r"logits of shape \(2, 3, 0, 5\) cannot .* holds no pixel; .*at least one row"),
        (LOGITS, TARGET[:, :, :0], r"cannot be interpolated to a target of shape \(2, 4, 0\), as one of them holds no"),
        (LOGITS, TARGET.to(torch.uint16), r"integer labels .*got torch.uint16; convert it with .long\(\)"),
        (LOGITS, TARGET.float(), r"integer labels .*got torch.float32; convert it with .long\(\)"),
        (LOGITS, TARGET.bool(), "integer labels .*got torch.bool"),
        (LOGITS, TARGET.to("meta"), r"logits are on cpu but target is on meta; .*\.to\(device\)"),
        (LOGITS[:, :1], TARGET, r"K = 1 class .*lift a one-logit binary model to \(0, z\)"),
        (LOGITS[0], TARGET, r"shape \(N, K, H, W\), got torch.float32 of shape \(3, 4, 5\)"),
        (LOGITS.long(), TARGET, r"logits must be a float tensor .*got torch.int64"),
        (LOGITS.numpy(), TARGET, "must be tensors, got ndarray and Tensor"),
    ],
)
def test_bad_input(logits, target, message):
    with pytest.raises(InputError, match=message):
        CrossEntropyLoss()(logits, target)


@pytest.mark.parametrize("ignore_index", [255, -100, 0, 1])
@pytest.mark.parametrize("wrong", [3, 7, -1, 254, 300])
def test_label_out_of_range_is_named(wrong, ignore_index):
    target = TARGET.clone()
    target[1, 2, 3] = wrong
    target[0, 0, 0] = ignore_index
    with pytest.raises(InputError, match=rf"target holds label {wrong} \(1 pixels\), allowed are 0 to 2"):
        check_labels(target, num_classes=3, ignore_index=ignore_index)


def test_several_wrong_labels():
    target = torch.arange(3, 11).view(1, 2, 4)
    with pytest.raises(InputError, match=r"label 3, 4, 5, 6, 7, \.\.\. \(8 pixels\)"):
        check_labels(target, num_classes=3, ignore_index=255)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_good_labels_of_any_integer_type(dtype):
    target = torch.tensor([[[0, 1, 2, 255]]], dtype=dtype)
    check_labels(target, num_classes=3, ignore_index=255)
    check_labels(torch.full_like(target, 255), num_classes=3, ignore_index=255)
    check_labels(target[:0], num_classes=3, ignore_index=255)


def test_lift_binary():
    z = torch.randn(2, 1, 3, 4)
    lifted = lift_binary(z)
    torch.testing.assert_close(lifted.softmax(1)[:, 1:], z.sigmoid())
    with pytest.raises(InputError, match=r"lift_binary takes logits of shape \(N, 1, H, W\)"):
        lift_binary(LOGITS)
