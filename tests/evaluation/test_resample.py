"""Banded resampling against torch's own, whole at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from segkit.bilinear import resized_rows
from segkit.evaluation import views as resample
from segkit.evaluation.views import argmax_channel, band_slices, class_dtype


def in_bands(maps, size, **options):
    bands = [resized_rows(maps, size, rows, **options) for rows in band_slices(size, maps.shape[1])]
    return torch.cat(bands, dim=2)


@pytest.mark.parametrize("size", [(7, 9), (13, 9), (50, 33), (3, 20), (7, 4), (1, 1), (56, 72)])
@pytest.mark.parametrize("band_elements", [1, 700, 1 << 22])
def test_bands_equal_interpolation_at_once(size, band_elements, monkeypatch):
    monkeypatch.setattr(resample, "BAND_ELEMENTS", band_elements)
    maps = torch.randn(2, 5, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(in_bands(maps, size), expected, rtol=1e-12, atol=1e-12)


def test_extent_leaves_out_cells_from_padding():
    # A linear ramp over 12x16 pixels at stride 4, of which 9x13 are real: resized to 18x26, the values go on
    # along the same ramp, whatever stands in the padding further out.
    y, x = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
    maps = (4 * y + 1.5 + 100 * (4 * x + 1.5))[None, None]  # value of the pixel at the cell's centre
    resized = in_bands(maps, (18, 26), extent=(9 / 4, 13 / 4))
    pixel_y = ((torch.arange(18) + 0.5) / 2 - 0.5).clamp(1.5, 9.5)
    pixel_x = ((torch.arange(26) + 0.5) / 2 - 0.5).clamp(1.5, 13.5)
    torch.testing.assert_close(resized[0, 0], pixel_y[:, None] + 100 * pixel_x[None, :])


def test_integer_maps_become_float32():
    maps = torch.randint(0, 256, (1, 3, 10, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    expected = F.interpolate(maps.float(), size=(15, 7), mode="bilinear", align_corners=False)
    torch.testing.assert_close(in_bands(maps, (15, 7)), expected)


@pytest.mark.parametrize("num_classes", [1, 2, 19])
def test_argmax_is_the_first_largest(num_classes):
    scores = torch.randint(0, 4, (2, num_classes, 20, 20), generator=torch.Generator().manual_seed(0)).float()
    ranked = scores * 100 - torch.arange(num_classes).view(1, -1, 1, 1)
    assert torch.equal(argmax_channel(scores).long(), ranked.argmax(1))


def test_more_than_256_classes_need_more_than_a_byte():
    assert class_dtype(256) == torch.uint8
    scores = torch.zeros(1, 300, 2, 2)
    scores[:, 299] = 1
    assert argmax_channel(scores, class_dtype(300)).unique().tolist() == [299]
