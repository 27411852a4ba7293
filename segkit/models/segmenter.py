"""The network together with the normalisation of its input."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from segkit.errors import InputError, check_normalisation

PerChannel = tuple[float, ...]

IMAGENET_MEAN: PerChannel = (0.485, 0.456, 0.406)
IMAGENET_STD: PerChannel = (0.229, 0.224, 0.225)
HALF: PerChannel = (0.5, 0.5, 0.5)

HALF_ENCODERS = ("inceptionresnetv2", "inceptionv4", "xception")
"""Encoders of segmentation_models_pytorch whose ImageNet weights expect [-1, 1]; all others but the family ``dpn``
expect ImageNet's own mean and deviation."""
DPN_MEAN: PerChannel = (124 / 255, 117 / 255, 104 / 255)
DPN_STD: PerChannel = (1 / (0.0167 * 255),) * 3


class Segmenter(nn.Module):
    """``net`` on normalised images: images (N, C, H, W) of integers or floats in 0..divisor -> the logits of ``net``.

    ``net`` sees ``(images / divisor - mean) / std`` in float32; ``divisor`` is 255 for images of 8 bits, 65535 for
    those of 16, 1 for values as they are. ``mean`` and ``std``, one value a channel for values divided by it, default
    to ``net.input_mean`` and ``net.input_std``, and to ImageNet's where ``net`` has none. They move with the module but
    are not part of the state dict; the trained weights are ``segmenter.net.state_dict()``.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    frozen: tuple[str, ...] = ()
    """Modules of ``net``, by name, that stay in evaluation mode: their running statistics do not move."""
    digest: str = ""
    """SHA-256 of the checkpoint that the weights were read from."""

    def __init__(
        self,
        net: nn.Module,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        divisor: float = 255.0,
    ) -> None:
        super().__init__()
        mean = getattr(net, "input_mean", IMAGENET_MEAN) if mean is None else mean
        std = getattr(net, "input_std", IMAGENET_STD) if std is None else std
        if not all(hasattr(values, "__len__") for values in (mean, std)):
            raise InputError(
                f"input_mean and input_std are {mean!r} and {std!r}, but hold one value a channel: set lists"
            )
        most = 1.0 if divisor > 1 else math.inf
        check_normalisation(mean, std, num_channels=len(getattr(net, "input_mean", mean)), most=most)
        self.net = net
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self.divisor = float(divisor)
        # (images / divisor - mean) / std in one pass: images * scale + shift, both computed in float64.
        deviations = torch.tensor(self.std, dtype=torch.float64)
        shift = -torch.tensor(self.mean, dtype=torch.float64) / deviations
        self.register_buffer("scale", (1 / (self.divisor * deviations)).float().view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(1, -1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Segmenter:
        """Set the mode of all modules but the frozen ones, which stay in evaluation mode."""
        super().train(mode)
        for name in self.frozen:
            self.net.get_submodule(name).training = False
        return self

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Return ``(images / divisor - mean) / std`` in float32, in the memory format of ``images``."""
        return torch.addcmul(self.shift, images.float(), self.scale)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of ``images`` (N, C, H, W) at the stride of the network."""
        return self.net(self.normalise(images))

    def without_values(self) -> Segmenter:
        """Return a copy that has shapes and computes nothing (device meta), in the same mode."""
        blank = {id(value): torch.empty_like(value, device="meta") for value in (*self.parameters(), *self.buffers())}
        return copy.deepcopy(self, blank)

    def takes(self, shape: Sequence[int]) -> bool:
        """Return False if the network does not compute images of ``shape`` (N, C, H, W), as far as shapes tell."""
        try:
            with torch.no_grad():
                self.without_values()(torch.empty(tuple(shape), dtype=torch.uint8, device="meta"))
        except Exception:
            return False
        return True


def timm_entry(encoder: str) -> Any:
    """Return what timm says of the published weights of ``encoder``; None for one of another package, or without."""
    if not encoder.startswith("tu-"):
        return None
    import timm

    return timm.get_pretrained_cfg(encoder.removeprefix("tu-"), allow_unregistered=True)


def normalisation(encoder: str) -> tuple[PerChannel, PerChannel]:
    """Return mean and deviation, for colours from 0 to 1, that the ImageNet weights of ``encoder`` expect.

    They depend on the name alone, not on which weights are loaded, so a trained model that is built again without the
    ImageNet weights sees the same input.
    """
    entry = timm_entry(encoder)
    if entry is not None and entry.mean is not None:
        return tuple(map(float, entry.mean)), tuple(map(float, entry.std))
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
    """Set ``net.input_mean`` and ``net.input_std`` (tuples, one value a channel): the defaults unless given."""
    means = tuple(float(value) for value in (default_mean if mean is None else mean))
    stds = tuple(float(value) for value in (default_std if std is None else std))
    check_normalisation(means, stds, num_channels=len(default_mean))
    vars(net).update(input_mean=means, input_std=stds)
