"""Parameter groups and their learning rate."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, *, lr: float, encoder_lr_factor: float = 1.0) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: weights and (without weight decay) biases and norm parameters, encoder and rest.

    Every group has ``peak_lr``: the learning rate that a schedule scales. Parameters below an attribute named
    ``encoder`` get ``encoder_lr_factor`` times ``lr``. Frozen parameters are left out.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_encoder = "encoder" in name.split(".")
            groups.setdefault((in_encoder, parameter.ndim >= 2), []).append(parameter)
    result = []
    for (in_encoder, decays), parameters in groups.items():
        peak = lr * (encoder_lr_factor if in_encoder else 1.0)
        group: dict[str, Any] = {"params": parameters, "lr": peak, "peak_lr": peak}
        if not decays:
            group["weight_decay"] = 0.0
        result.append(group)
    return result


def set_lr(optimizer: Any, factor: float) -> float:
    """Set every group's learning rate to ``factor`` times its peak; return that of the last group (the head's)."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return optimizer.param_groups[-1]["lr"]
