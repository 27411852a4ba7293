"""The network together with the normalisation of its input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from segkit.models.normalisation import IMAGENET_MEAN, IMAGENET_STD, check_normalisation


class Segmenter(nn.Module):
    """``net`` on normalised images: images (N, C, H, W), uint8 or float in 0..255 -> the logits of ``net``.

    ``net`` sees ``(images / 255 - mean) / std`` in float32. ``mean`` and ``std``, one value a channel for colours
    from 0 to 1, default to ``net.input_mean`` and ``net.input_std``, and to ImageNet's where ``net`` has none. They
    move with the module but are no part of the state dict; the trained weights are ``segmenter.net.state_dict()``.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self, net: nn.Module, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        mean = getattr(net, "input_mean", IMAGENET_MEAN) if mean is None else mean
        std = getattr(net, "input_std", IMAGENET_STD) if std is None else std
        check_normalisation(mean, std, num_channels=len(getattr(net, "input_mean", mean)))
        self.net = net
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        # (images / 255 - mean) / std in one pass: images * scale + shift, both computed in float64.
        deviations = torch.tensor(self.std, dtype=torch.float64)
        shift = -torch.tensor(self.mean, dtype=torch.float64) / deviations
        self.register_buffer("scale", (1 / (255 * deviations)).float().view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(1, -1, 1, 1), persistent=False)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """``(images / 255 - mean) / std`` in float32, in the memory format of ``images``."""
        return torch.addcmul(self.shift, images.float(), self.scale)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of ``images`` (N, C, H, W) at the stride of the network."""
        return self.net(self.normalise(images))
