"""DeepLabV3+ with any encoder; the network is that of segmentation_models_pytorch.

L.-C. Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", ECCV 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from segkit.errors import InputError
from segkit.models.smp_model import smp_model

OUTPUT_STRIDES = (8, 16)
MOST_CHANNELS = 2**14
"""Channels of the decoder, whose weights are some times their square."""


def deeplabv3plus(
    encoder: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    output_stride: int = 8,
    encoder_weights: str | Path | None = "imagenet",
    weights: str | Path | None = None,
    decoder_channels: int = 256,
    atrous_rates: Sequence[int] = (12, 24, 36),
    dropout: float = 0.5,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """DeepLabV3+: images (N, in_channels, H, W) float, normalised -> logits (N, num_classes, ceil(H/4), ceil(W/4)).

    ``encoder``: a name of segmentation_models_pytorch, or ``tu-NAME`` for a model of timm. ``output_stride``: 8 or
    16, the stride of the encoder's last features. ``encoder_weights``: ``imagenet``, ``none``, or a file.
    ``weights``: a file with the weights of the whole model, a checkpoint of segkit for example; the encoder's own
    are not loaded then. ``atrous_rates``: dilations of the three branches of the pyramid, in cells of the output
    stride. ``dropout``: probability behind the pyramid.

    H and W are arbitrary; bilinear interpolation of the logits to (H, W) with ``align_corners=False`` is aligned with
    the image. InputError if a name, a value or a file of weights does not fit, or if a download fails.
    """
    if output_stride not in OUTPUT_STRIDES:
        raise InputError(
            f"model.output_stride is {output_stride}, but DeepLabV3+ has 8 or 16: set model.output_stride=8"
        )
    if len(atrous_rates) != 3 or min(atrous_rates) < 1:
        raise InputError(
            f"model.atrous_rates is {list(atrous_rates)}, but the pyramid has three branches with dilations of at "
            "least 1: set model.atrous_rates=[12,24,36]"
        )
    if not 1 <= decoder_channels <= MOST_CHANNELS:
        raise InputError(
            f"model.decoder_channels is {decoder_channels}, but must be from 1 to {MOST_CHANNELS}: set "
            "model.decoder_channels=256"
        )
    if not 0 <= dropout <= 1:
        raise InputError(f"model.dropout is {dropout}, but is a share from 0 to 1: set model.dropout=0.5")
    return smp_model(
        "DeepLabV3Plus",
        encoder,
        num_classes,
        in_channels=in_channels,
        encoder_weights=encoder_weights,
        weights=weights,
        options={
            "encoder_output_stride": output_stride,
            "decoder_channels": decoder_channels,
            "decoder_atrous_rates": tuple(atrous_rates),
            "decoder_aspp_dropout": dropout,
        },
        mean=mean,
        std=std,
    )
