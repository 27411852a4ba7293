"""Any architecture of segmentation_models_pytorch on any of its encoders, or of timm's (``tu-NAME``)."""

from __future__ import annotations

import difflib
import inspect
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from segkit.errors import InputError, first_line
from segkit.models.any_size import Windowed, accept_any_size, mix_in
from segkit.models.segmenter import normalisation, set_normalisation, timm_entry
from segkit.models.weights import LITE0, load_encoder_weights, load_model_weights, weights_origin

SHIPPED = (LITE0, "tu-regnetx_002", "resnet34", "se_resnext50_32x4d", "mit_b2", "tu-vit_small_patch16_dinov3")
"""Encoders of ``configs/model``."""

FIXED = ("encoder_name", "encoder_weights", "in_channels", "classes", "activation", "upsampling", "aux_params")
"""Arguments of an architecture that :func:`smp_model` sets itself."""


def smp_model(
    arch: str,
    encoder: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    encoder_weights: str | Path | None = "imagenet",
    weights: str | Path | None = None,
    options: dict[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Architecture ``arch`` of segmentation_models_pytorch: (N, C, H, W) float -> logits at the decoder's own stride.

    ``arch``: Unet, UnetPlusPlus, MAnet, Linknet, FPN, PSPNet, DeepLabV3, DeepLabV3Plus, PAN, UPerNet, Segformer, DPT.
    ``encoder``: a name of the package's own, or ``tu-NAME`` for the model NAME of timm.
    ``encoder_weights``: ``imagenet``, ``none``, or a file with the encoder's weights. ``weights``: a file with those
    of the whole model. ``options``: further arguments of the architecture, for example ``decoder_channels``.
    ``mean`` and ``std``: what the input is normalised with; null takes what the encoder was trained with. Of another
    number of channels than 3 the network says nothing about it; the encoder's weights are extended to them
    (:func:`~segkit.models.weights.load_encoder_weights`).

    H and W are arbitrary: the image is padded as the encoder needs it, and the logits cover the image alone.
    Transformers of timm take their size from the image where they can; to those that cannot it is given in windows.
    InputError for an unknown name (with the nearest ones), an unknown option, or weights that are unavailable.
    """
    import segmentation_models_pytorch as smp

    name = _architecture(arch)
    _check_encoder(encoder)
    cls = getattr(smp, name)
    parameters = inspect.signature(cls.__init__).parameters
    arguments = dict(options or {})
    _check_options(arguments, parameters, name=name)
    if "upsampling" in parameters:
        arguments["upsampling"] = 1
    dynamic, window = _sizes(encoder)
    if dynamic:
        arguments["dynamic_img_size"] = True
    net = _build(cls, encoder, num_classes, in_channels, arguments)
    if name == "DPT" and (odd := [side for side in net.encoder.output_strides if side & (side - 1)]):
        raise InputError(
            f"model.encoder is {encoder!r}, whose patches are {odd[0]} pixels wide, but DPT needs a power of two: "
            "choose an encoder with patch8, patch16 or patch32 in its name"
        )
    if weights is None:
        load_encoder_weights(net.encoder, encoder, encoder_weights, in_channels=in_channels)
    if in_channels == 3:
        set_normalisation(net, *normalisation(encoder), mean=mean, std=std)
    if window:
        mix_in(Windowed, net)
        vars(net).update(window=window)
    else:
        halved = {"DPT": 2, "PAN": 8}  # by these decoders the last features are made smaller again
        stride = net.encoder.output_stride * halved.get(name, 1)
        accept_any_size(net, multiple=stride if dynamic or cls.requires_divisible_input_shape else 1)
    if weights is not None:
        load_model_weights(net, weights)
    return net


def _sizes(encoder: str) -> tuple[bool, int | None]:
    """Whether ``encoder`` can take its size from the image, and the only side that it takes, None for any.

    timm knows the first by an argument of the class, and the second by the entry of the weights.
    """
    import timm

    name = encoder.removeprefix("tu-")
    if name == encoder:
        return False, None
    module = sys.modules[timm.models.model_entrypoint(name.partition(".")[0]).__module__]
    classes = [item for item in vars(module).values() if inspect.isclass(item) and issubclass(item, nn.Module)]
    transformers = [item for item in classes if "img_size" in inspect.signature(item.__init__).parameters]
    if any("dynamic_img_size" in inspect.signature(item.__init__).parameters for item in transformers):
        return True, None
    entry = timm_entry(encoder)
    return False, entry.input_size[-1] if entry is not None and entry.fixed_input_size else None


def _build(cls: Any, encoder: str, num_classes: int, in_channels: int, arguments: dict[str, Any]) -> Any:
    """Return the network with random weights; what the package refuses becomes an InputError."""
    try:
        with warnings.catch_warnings():
            # The package will remove its encoders named timm-...: whoever names one is told so, as an error.
            warnings.simplefilter("error", DeprecationWarning)
            fixed = {"encoder_name": encoder, "encoder_weights": None, "in_channels": in_channels}
            return cls(**fixed, classes=num_classes, **arguments)
    except (ValueError, TypeError, RuntimeError, LookupError, AssertionError, DeprecationWarning) as error:
        raise InputError(
            f"{cls.__name__} cannot be built on the encoder {encoder} ({first_line(error)}): choose another "
            "model.encoder, or change the options of the model"
        ) from error


def _architecture(arch: str) -> str:
    """Return the class name for ``arch``, whose letters may be upper or lower case."""
    import segmentation_models_pytorch as smp

    names = {name: cls.__name__ for name, cls in smp.MODEL_ARCHITECTURES_MAPPING.items()}
    if arch.lower() not in names:
        close = difflib.get_close_matches(arch.lower(), names, n=3, cutoff=0.4)
        nearest = f"nearest: {', '.join(names[name] for name in close)}; " if close else ""
        raise InputError(
            f"model.arch is {arch!r}, but segmentation_models_pytorch has no such architecture ({nearest}all: "
            f"{', '.join(names.values())}): set model.arch to one of them"
        )
    return names[arch.lower()]


def _check_encoder(encoder: str) -> None:
    """Raise InputError with the closest names if there is no encoder of this name."""
    import segmentation_models_pytorch as smp
    import timm

    if any(sign in encoder for sign in ":/\\"):
        raise InputError(
            f"model.encoder is {encoder!r}, but must be a name, not an address: set model.encoder to a name of "
            "segmentation_models_pytorch or to tu-NAME, and model.encoder_weights=PATH for a file"
        )
    if encoder.startswith("tu-"):
        name, _, tag = encoder.removeprefix("tu-").partition(".")
        if timm.is_model(name):
            try:
                timm_entry(encoder)
            except RuntimeError:
                tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{name}.*")]
                raise InputError(
                    f"model.encoder is {encoder!r}, but timm has no weights {tag!r} of {name}, only "
                    f"{', '.join(tags) or 'none'}: set model.encoder=tu-{name}"
                ) from None
            return
        known, prefix = timm.list_models(), "tu-"
    else:
        known, prefix = smp.encoders.get_encoder_names(), ""
        if encoder in known:
            return
        if timm.is_model(encoder):
            raise InputError(
                f"model.encoder is {encoder!r}, which is a name of timm: write it with its prefix, "
                f"model.encoder=tu-{encoder}"
            )
    close = difflib.get_close_matches(encoder.removeprefix("tu-"), known, n=3, cutoff=0.4)
    nearest = f" (nearest: {', '.join(prefix + name for name in close)})" if close else ""
    raise InputError(
        f"model.encoder is {encoder!r}, but there is no such encoder{nearest}: set model.encoder to a name of "
        "segmentation_models_pytorch, or to tu-NAME for a model of timm"
    )


def encoder_names(part: str | None) -> list[str]:
    """The names that ``model.encoder`` takes, timm's as ``tu-NAME``, which have ``part`` in them.

    Without ``part``: those of the shipped models, and of segmentation_models_pytorch those whose weights are here.
    """
    import segmentation_models_pytorch as smp
    import timm

    own = [name for name in smp.encoders.get_encoder_names() if not name.startswith("timm-")]  # these are deprecated
    if part is None:
        return [*SHIPPED, *(name for name in own if name not in SHIPPED and weights_origin(name)[1])]
    return [name for name in (*own, *(f"tu-{name}" for name in timm.list_models())) if part in name]


def _check_options(options: dict[str, Any], parameters: Any, *, name: str) -> None:
    """Raise InputError for an option that the architecture does not have, or that has a key of its own."""
    allowed = [key for key in parameters if key not in (*FIXED, "self", "kwargs")]
    for key in options:
        if key not in allowed:
            raise InputError(
                f"model.options.{key} is not an option of {name}, which has {', '.join(allowed)}: remove "
                f"model.options.{key} or correct its name"
            )
