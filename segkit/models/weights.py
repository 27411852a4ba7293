"""Weights of networks from files, checked key by key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segkit.errors import InputError

WRAPPERS = ("module.", "_orig_mod.", "net.", "model.")
"""Prefixes that wrappers (parallel training, compilation, :class:`~segkit.models.Segmenter`) put before every key."""


def read_state(path: str | Path, *, key: str) -> dict[str, torch.Tensor]:
    """The state dict in ``path``: of ``torch.save``, a checkpoint of segkit (its entry ``model``), or safetensors.

    ``key`` is the configuration key that named the file; InputError mentions it. Only tensors are accepted.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{key} is {path}, but there is no such file: give the path of a file with weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path, device="cpu")
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch and safetensors raise for a bad file is not one family
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{key} is {path}, which cannot be read as weights ({reason[0]}): give a file that torch.save or "
            "safetensors wrote, with tensors only"
        ) from None
    for entry in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(entry), Mapping):
            state = state[entry]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(
            f"{key} is {path}, which holds no state dict: give a file with a mapping from names to tensors, or a "
            "checkpoint of segkit"
        )
    return dict(state)


def strip_wrappers(state: dict[str, torch.Tensor], own: Iterable[str]) -> dict[str, torch.Tensor]:
    """``state`` without a prefix that every key has and that the model's ``own`` keys do not have."""
    own = list(own)
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in state) and not all(name.startswith(prefix) for name in own):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def differences(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """What keeps ``state`` from loading into a model with the state dict ``own``: missing, unknown, other shape."""
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    return {
        "missing": [name for name in own if name not in state],
        "unknown": [name for name in state if name not in own],
        "of another shape": shapes,
    }


def describe(found: Mapping[str, list[str]], *, show: int = 3) -> str:
    """``found`` of :func:`differences` as a phrase, with the first names of each kind."""
    parts = []
    for kind, names in found.items():
        if names:
            more = ", ..." if len(names) > show else ""
            parts.append(f"{len(names)} {kind} ({', '.join(names[:show])}{more})")
    return "; ".join(parts)


def load_model_weights(net: nn.Module, path: str | Path, *, key: str = "model.weights") -> None:
    """Load the whole state dict in ``path`` into ``net``; InputError lists what differs if it is another model's."""
    own = net.state_dict()
    state = strip_wrappers(read_state(path, key=key), own)
    found = differences(state, own)
    if any(found.values()):
        raise InputError(
            f"{key} is {path}, whose weights are of another model: {describe(found)}; choose the model that they were "
            f"trained with, or remove {key}"
        )
    net.load_state_dict(state)
