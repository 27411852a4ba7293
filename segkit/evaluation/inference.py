"""From images to predictions of the label's size.

A model returns logits at its own stride. They are up-sampled bilinearly (align_corners=False) to the size
of the label, in bands of rows, and each band is reduced to the best class at once: full-size logits never
exist, so that memory does not grow with the number of classes times the label size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segkit.errors import InputError

BAND_ELEMENTS = 1 << 22
"""A band holds at most about so many up-sampled logits (16 MiB in float32)."""

Size = tuple[int, int]


def whole_image(model: nn.Module, images: Tensor, size: Size) -> Tensor:
    """Predictions (N, H, W) of one forward pass per batch.

    ``images`` (N, 3, h, w) as the model takes them, ``size`` = (H, W) of the labels. uint8 up to 256 classes,
    int16 beyond.
    """
    return best_class(forward(model, images), size)


def forward(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits (N, K, h', w') in float32, checked."""
    logits = model(images)
    if logits.ndim != 4 or len(logits) != len(images):
        raise InputError(
            f"a model must return logits (N, K, h, w), got shape {tuple(logits.shape)} for images of shape "
            f"{tuple(images.shape)}"
        )
    logits = logits.float()
    if not bool(torch.isfinite(logits).all()):
        raise InputError(
            "the model returned logits that are not finite (inf or nan); evaluate with precision fp32, or "
            "take an earlier checkpoint"
        )
    return logits


def best_class(logits: Tensor, size: Size) -> Tensor:
    """Class of the largest logit (N, H, W) after bilinear up-sampling of (N, K, h, w) to ``size``."""
    num_classes = logits.shape[1]
    dtype = torch.uint8 if num_classes <= 256 else torch.int16
    best = torch.empty(len(logits), *size, dtype=dtype, device=logits.device)
    for rows, band in upsampled_bands(logits, size):
        best[:, rows] = argmax_channel(band, dtype)
    return best


def upsampled_bands(logits: Tensor, size: Size) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(rows, band)``: band (N, K, len(rows), W) of the maps (N, K, h, w) up-sampled to ``size``.

    Equal to those rows of ``F.interpolate(logits, size, mode="bilinear", align_corners=False)`` but for
    rounding: bilinear interpolation is linear first along the columns of the band's few input rows, then
    along the rows.
    """
    height, width = size
    num, num_classes, low_height, low_width = logits.shape
    per_row = max(1, num * num_classes * width)
    rows_per_band = max(1, BAND_ELEMENTS // per_row)
    # Output row y lies at input position (y + 1/2) h / H - 1/2, held within the first and the last row.
    position = (torch.arange(height, device=logits.device, dtype=torch.float64) + 0.5) * (
        low_height / height
    ) - 0.5
    position = position.clamp(0, low_height - 1)
    upper = position.floor().long()
    lower = (upper + 1).clamp(max=low_height - 1)
    fraction = (position - upper).to(logits.dtype)[:, None]
    for start in range(0, height, rows_per_band):
        rows = slice(start, min(start + rows_per_band, height))
        if low_height == height:
            band = logits[:, :, rows]
        else:
            band = torch.lerp(logits[:, :, upper[rows]], logits[:, :, lower[rows]], fraction[rows])
        if low_width != width:
            band = F.interpolate(band, size=(band.shape[2], width), mode="bilinear", align_corners=False)
        yield rows, band


def argmax_channel(scores: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Index of the largest of (N, K, H, W) along K, the first one among equals."""
    if scores.device.type != "cpu":
        return scores.argmax(1).to(dtype)
    # On the CPU a pass per class over whole rows is several times as fast as a reduction over a strided axis.
    best = scores[:, 0].clone()
    index = torch.zeros_like(best, dtype=dtype)
    for k in range(1, scores.shape[1]):
        index.masked_fill_(scores[:, k] > best, k)
        torch.maximum(best, scores[:, k], out=best)
    return index
