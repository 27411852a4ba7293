"""What an encoder's input is normalised with: ``(image / 255 - mean) / std``, per colour channel."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from segkit.errors import InputError

Triple = tuple[float, ...]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HALF: Triple = (0.5, 0.5, 0.5)

HALF_ENCODERS = ("inceptionresnetv2", "inceptionv4", "xception")
"""Encoders of segmentation_models_pytorch whose ImageNet weights expect [-1, 1]; the others expect ImageNet's own
mean and deviation, but for the family ``dpn``."""
DPN_MEAN: Triple = (124 / 255, 117 / 255, 104 / 255)
DPN_STD: Triple = (1 / (0.0167 * 255),) * 3


def normalisation(encoder: str) -> tuple[Triple, Triple]:
    """Mean and deviation, in units of 255, that the ImageNet weights of ``encoder`` expect.

    They depend on the name alone and not on which weights are loaded, so that a trained model that is built again
    without the ImageNet weights sees the same input.
    """
    if encoder.startswith("tu-"):
        import timm

        config = timm.get_pretrained_cfg(encoder.removeprefix("tu-"), allow_unregistered=True)
        if config is None or config.mean is None:
            return IMAGENET_MEAN, IMAGENET_STD
        return tuple(map(float, config.mean)), tuple(map(float, config.std))
    if encoder in HALF_ENCODERS:
        return HALF, HALF
    if encoder.startswith("dpn"):
        return DPN_MEAN, DPN_STD
    return IMAGENET_MEAN, IMAGENET_STD


def set_normalisation(
    net: nn.Module,
    default_mean: Sequence[float],
    default_std: Sequence[float],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    """Put ``net.input_mean`` and ``net.input_std`` (tuples, one value a channel): the defaults unless given."""
    means = tuple(float(value) for value in (default_mean if mean is None else mean))
    stds = tuple(float(value) for value in (default_std if std is None else std))
    check_normalisation(means, stds, num_channels=len(default_mean))
    vars(net).update(input_mean=means, input_std=stds)


def check_normalisation(mean: Sequence[float], std: Sequence[float], *, num_channels: int) -> None:
    """InputError unless there is one mean and one positive deviation for every channel."""
    if len(mean) != num_channels or len(std) != num_channels or min(std) <= 0 or max(mean) > 1:
        raise InputError(
            f"model.mean is {list(mean)} and model.std {list(std)}, but the model wants {num_channels} values each, "
            "for colours from 0 to 1, and positive deviations: set model.mean=null model.std=null"
        )
