"""Which parameters are trained, in which groups, and their learning rate."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from segkit.errors import InputError
from segkit.training.checkpoint import network


def matches(name: str, pattern: str) -> bool:
    """True if parts of the dotted ``name`` fit ``pattern``, whose ``*`` and ``?`` stand for any text, any letter."""
    return fnmatch.fnmatchcase(f".{name}.", f"*.{pattern}.*")


def lr_factors_of(
    model: nn.Module,
    *,
    freeze: Sequence[str] = (),
    lr_factors: Mapping[str, float] | None = None,
    encoder_lr_factor: float = 1.0,
) -> dict[str, float]:
    """Return the factor of the learning rate by the name of each parameter, as a checkpoint names it; 0: frozen.

    ``freeze`` are patterns (:func:`matches`), ``lr_factors`` factors by pattern. InputError for a pattern that fits no
    parameter, and for a parameter that two fit, or one and a ``encoder_lr_factor`` beside 1.
    """
    names = [name for name, _ in network(model).named_parameters()]
    factors = dict.fromkeys(names, 1.0)
    rules = [(f"freeze={pattern}", pattern, 0.0) for pattern in freeze]
    rules += [(f"lr_factors.{pattern}={factor}", pattern, factor) for pattern, factor in (lr_factors or {}).items()]
    if encoder_lr_factor != 1 and any(matches(name, "encoder") for name in names):
        rules.append((f"encoder_lr_factor={encoder_lr_factor}", "encoder", encoder_lr_factor))
    rule_of: dict[str, str] = {}
    for rule, pattern, factor in rules:
        found = [name for name in names if matches(name, pattern)]
        if not found:
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise InputError(
                f"{rule} fits no parameter of the model, whose parts are {parts}: name one of them, or a part of a "
                f"name such as {names[0]}"
            )
        if twice := next((name for name in found if name in rule_of), None):
            raise InputError(
                f"{rule_of[twice]} and {rule} both fit the parameter {twice}, which one at most may: correct or remove "
                "one of the two"
            )
        rule_of |= dict.fromkeys(found, rule)
        factors |= dict.fromkeys(found, factor)
    return factors


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the parameters that ``patterns`` fit out of training, and the running statistics of their modules.

    ``model.frozen`` are the modules all of whose parameters are frozen, and those without any whose buffers fit: the
    model keeps them in evaluation mode. InputError if nothing is left to train.
    """
    net = network(model)
    factors = lr_factors_of(net, freeze=patterns)
    if factors and not any(factors.values()):
        raise InputError(f"freeze={list(patterns)} leaves no parameter to train: name a part of the model")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and factors[name] > 0)
    frozen = []
    for place, module in net.named_modules():
        own = [factors.get(f"{place}.{name}".lstrip(".")) for name, _ in module.named_parameters(recurse=False)]
        buffers = [name for name, _ in module.named_buffers(recurse=False)]
        fits = any(matches(f"{place}.{name}", pattern) for name in buffers for pattern in patterns)
        if not any(own) if own else fits:
            frozen.append(place)
    vars(model).update(frozen=tuple(frozen))


def parameter_groups(
    model: nn.Module, *, lr: float, encoder_lr_factor: float = 1.0, lr_factors: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: weights and (without weight decay) biases and norm parameters, encoder and rest.

    Every group has ``peak_lr``: the learning rate that a schedule scales. Parameters below an attribute named
    ``encoder`` get ``encoder_lr_factor`` times ``lr``, those that ``lr_factors`` names (:func:`lr_factors_of`) theirs.
    Frozen parameters are left out.
    """
    factors = lr_factors_of(model, lr_factors=lr_factors, encoder_lr_factor=encoder_lr_factor)
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in network(model).named_parameters():
        if parameter.requires_grad:
            key = ("encoder" in name.split("."), parameter.ndim >= 2, factors[name])
            groups.setdefault(key, []).append(parameter)
    result = []
    for (_, decays, factor), parameters in groups.items():
        peak = lr * factor
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
