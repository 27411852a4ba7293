"""Padding of images and fitting of logits: geometry against coordinates that are known exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segkit.models.any_size import accept_any_size, fit_logits, pad_to_multiple, padded_size


def test_padded_size() -> None:
    assert [padded_size(n, 16) for n in (1, 15, 16, 17, 375)] == [16, 16, 16, 32, 384]


def test_pad_to_multiple() -> None:
    x = torch.randn(1, 2, 5, 8)
    padded = pad_to_multiple(x, 4)
    assert padded.shape == (1, 2, 8, 8)
    assert torch.equal(padded[..., :5, :], x)
    assert padded[..., 5:, :].abs().sum() == 0
    assert pad_to_multiple(padded, 4) is padded


def ramp(height: int, width: int, *, stride: int) -> torch.Tensor:
    """Two channels: the vertical and the horizontal pixel coordinate of the centre of each cell of size ``stride``."""
    rows = (torch.arange(height // stride, dtype=torch.float64) + 0.5) * stride - 0.5
    columns = (torch.arange(width // stride, dtype=torch.float64) + 0.5) * stride - 0.5
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]


@pytest.mark.parametrize(("stride", "multiple"), [(4, 8), (4, 16), (8, 8), (16, 32), (1, 16)])
@pytest.mark.parametrize("size", [(375, 500), (370, 499), (96, 128), (97, 79), (213, 81)])
def test_fitted_logits_lie_over_their_pixels(size: tuple[int, int], stride: int, multiple: int) -> None:
    """Logits that are the coordinates of their own centres must interpolate to the coordinates of the pixels."""
    padded = tuple(padded_size(extent, multiple) for extent in size)
    logits = fit_logits(ramp(*padded, stride=stride), padded=padded, size=size)
    assert logits.shape[-2:] == tuple(-(-extent // stride) for extent in size)
    whole = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0]
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    margin = 2 * stride  # nearer to the border, interpolation lacks the cell outside and repeats the last one
    inner = (slice(margin, size[0] - margin), slice(margin, size[1] - margin))
    assert whole[0][inner].numel() > 0
    torch.testing.assert_close(whole[0][inner], rows[inner], rtol=0, atol=1e-9)
    torch.testing.assert_close(whole[1][inner], columns[inner], rtol=0, atol=1e-9)


def test_plain_cropping_would_not_lie_over_its_pixels() -> None:
    """The test above can fail: the grid without resampling is stretched by up to stride - 1 pixels."""
    logits = ramp(40, 40, stride=8)
    whole = F.interpolate(logits, size=(33, 33), mode="bilinear", align_corners=False)[0, 0]
    assert (whole[20, 20] - 20).abs() > 2


class Halving(nn.Module):
    """Refuses odd sizes, as encoders do; its logits are the means of 2x2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] % 4 == 0
        assert x.shape[-2] % 4 == 0
        return F.avg_pool2d(self.head(x), 2)


def test_accept_any_size_keeps_keys_values_and_copies() -> None:
    net = Halving()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(1, 3, 8, 12)
    expected = net(x)
    net = accept_any_size(net, multiple=4)
    assert isinstance(net, Halving)
    assert list(net.state_dict()) == list(before)
    assert torch.equal(net(x), expected)
    assert net(torch.randn(2, 3, 7, 9)).shape == (2, 2, 4, 5)
    clone = copy.deepcopy(net)
    with torch.no_grad():
        clone.head.weight.zero_()
    assert torch.equal(net(x), expected)
