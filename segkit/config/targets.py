"""``_target_`` nodes: from a name and arguments in a configuration to the object that they describe.

A saved run's configuration is a stranger's text. So there is no rule by which a name is allowed, but a list: a node
stands in a group (``model``, ``loss``, ``optimizer``, ``reader``: the last word of its key; or ``augment``), the group
has permitted targets, and nothing else is even imported. What a name leads to must be the object that it led to when
the list was written, and what that returns must be of the group's type. An outer node is bound before an inner one is
built.

Code of one's own is added with :func:`trust`, which only the command line calls.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import importlib.util
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from segkit.config.signatures import Signature, read_signature
from segkit.errors import InputError, did_you_mean, is_of_a_file, raised

LOSS_OPTIONS = ("diagnostics",)
"""Keys of a loss node that the pipeline reads; they are not arguments of the loss."""

LARGEST = 2**63 - 1
"""The largest whole number that a key takes: tensors hold no larger one."""


class Group(NamedTuple):
    """``permitted``: target -> module in which its object is defined. ``result``: module and name of its type.

    ``inner``: where nodes of the same group may stand in the arguments of a node, with ``*`` for any name.
    """

    permitted: Mapping[str, str]
    result: tuple[str, str]
    inner: tuple[tuple[str, ...], ...] = ()


def _in(package: str, **modules: str) -> dict[str, str]:
    """Targets ``package.NAME`` of every module, whose names are separated by blanks."""
    return {f"{package}.{name}": f"{package}.{module}" for module, names in modules.items() for name in names.split()}


_READERS = "ade20k bdd100k camvid cityscapes cocostuff10k folder mapillary robotic_instrument voc"
_OPTIMIZERS = {
    "adadelta": "Adadelta", "adagrad": "Adagrad", "adam": "Adam", "adamax": "Adamax", "adamw": "AdamW", "asgd": "ASGD",
    "nadam": "NAdam", "radam": "RAdam", "rmsprop": "RMSprop", "rprop": "Rprop", "sgd": "SGD",
}  # fmt: skip

_TRANSFORMS = {
    "blur.transforms": "AdvancedBlur Blur Defocus GaussianBlur GlassBlur MedianBlur MotionBlur ZoomBlur",
    "dropout.channel_dropout": "ChannelDropout",
    "dropout.coarse_dropout": "CoarseDropout Erasing",
    "dropout.grid_dropout": "GridDropout",
    "dropout.transforms": "PixelDropout",
    "dropout.xy_masking": "XYMasking",
    "geometric.distortion": "ElasticTransform GridDistortion OpticalDistortion ThinPlateSpline",
    "geometric.flip": "D4 HorizontalFlip SquareSymmetry Transpose VerticalFlip",
    "geometric.rotate": "RandomRotate90 Rotate SafeRotate",
    "geometric.transforms": "Affine Perspective RandomGridShuffle",
    "pixel.transforms": "AdditiveNoise AutoContrast CLAHE ChannelShuffle ChromaticAberration ColorJitter Downscale "
    "Emboss Equalize FancyPCA GaussNoise HueSaturationValue ISONoise Illumination ImageCompression InvertImg "
    "MultiplicativeNoise PlanckianJitter PlasmaBrightnessContrast PlasmaShadow Posterize RGBShift "
    "RandomBrightnessContrast RandomFog RandomGamma RandomRain RandomShadow RandomSnow RandomSunFlare RandomToneCurve "
    "RingingOvershoot SaltAndPepper Sharpen ShotNoise Solarize Spatter ToGray ToSepia UnsharpMask",
}
"""Of Albumentations: what keeps the size of a crop, needs no boxes, other images or files, and is not very slow."""

GROUPS: dict[str, Group] = {
    "model": Group(
        _in("segkit.models", deeplabv3plus="deeplabv3plus", smp_model="smp_model", coplenet="COPLENet"),
        ("torch.nn", "Module"),
    ),
    "loss": Group(
        _in(
            "segkit.losses",
            pixelwise="cross_entropy CrossEntropyLoss FocalLoss OhemCrossEntropyLoss",
            region="DiceLoss GeneralizedDiceLoss TverskyLoss JaccardMetricLoss",
            iou_margin="IouMarginLoss",
            lovasz="LovaszSoftmaxLoss",
            margin_calibration="margin_calibration MarginCalibrationLoss",
            sum="SumLoss",
        ),
        ("torch.nn", "Module"),
        inner=(("terms", "*", "loss"),),
    ),
    "optimizer": Group(_in("torch.optim", **_OPTIMIZERS), ("torch.optim", "Optimizer")),
    "reader": Group(
        {
            **{f"segkit.data.readers.{name}.read": f"segkit.data.readers.{name}" for name in _READERS.split()},
            "segkit.synthetic.dataset.read": "segkit.synthetic.dataset",
        },
        ("segkit.data.samples", "SampleSet"),
    ),
    "augment": Group(
        {
            f"albumentations.{name}": f"albumentations.augmentations.{module}"
            for module, names in _TRANSFORMS.items()
            for name in names.split()
        },
        ("segkit.data.augment", "BasicTransform"),
    ),
}

_trusted: set[str] = set()
places: set[str] = set()
"""Folders that were added to ``sys.path``, as trusted packages usually lie there"""


def trust(packages: Sequence[str]) -> None:
    """Permit targets in ``packages`` of the user's own, in this process; never called with names from a file."""
    for name in packages:
        if not name.isidentifier():
            raise InputError(f"trust has {name!r}, but takes names of packages: set trust=[mypackage]")
    if packages and (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
        places.add(here)
    for name in packages:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise InputError(
                f"trust has {name!r}, but there is no such package here, nor in PYTHONPATH: correct its name"
            )
    _trusted.update(packages)


def short_name(node: Mapping[str, Any]) -> str:
    """The name of the target of ``node`` without its module."""
    return node["_target_"].rpartition(".")[2]


def group_name(key: str) -> str:
    """The name of the group of the node that stands under ``key``."""
    return "augment" if key.startswith("augment.") else key.rpartition(".")[2]


def group_of(key: str) -> Group:
    """The group of the node that stands under ``key``."""
    return GROUPS[group_name(key)]


def check_allowed(node: Mapping[str, Any], *, key: str) -> None:
    """Raise InputError if ``node``, or a node within it, names a target that its group does not permit."""
    target, group = node.get("_target_"), group_of(key)
    if not (isinstance(target, str) and (target in group.permitted or is_trusted(target))):
        hint = did_you_mean(str(target), group.permitted)
        if group_name(key) == "augment":
            hint += "the size of a crop is kept, and boxes, other images and files are not at hand; "
        raise InputError(
            f"{key}._target_ is {target!r}, but must be one of {', '.join(sorted(group.permitted))}: {hint}choose an "
            f"option of the group {key.split('.')[0]}, or name a package of your own on the command line, "
            "trust=[mypackage], or --trust mypackage for a saved run"
        )
    for place, child in children(node):
        if not any(_matches(place, pattern) for pattern in group.inner):
            raise InputError(f"{key}.{'.'.join(place)} holds a _target_, but takes plain values only: remove it")
        check_allowed(child, key=f"{key}.{'.'.join(place)}")


def is_trusted(target: str) -> bool:
    """True for what is in a package of the user's own that :func:`trust` permits."""
    return target.partition(".")[0] in _trusted and all(part.isidentifier() for part in target.split("."))


def _matches(place: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    return len(place) == len(pattern) and all(want in ("*", got) for got, want in zip(place, pattern, strict=True))


def children(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The nearest nodes with a ``_target_`` inside ``value``, at whatever depth, each with its place."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, item in items:
        inner = (*place, str(name))
        if isinstance(item, Mapping) and "_target_" in item:
            yield inner, dict(item)
        else:
            yield from children(item, inner)


def locate(target: str, *, key: str) -> Any:
    """Import the permitted object that ``target`` names; InputError if there is none."""
    check_allowed({"_target_": target}, key=key)
    module, _, name = target.rpartition(".")
    if group_name(key) == "augment":
        importlib.import_module(group_of(key).result[0])  # which imports Albumentations as it should be
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{key}._target_ names {target!r}, which cannot be imported ({error}): correct the name"
        ) from None
    except (Exception, SystemExit) as error:  # of a package of the user's
        raise InputError(f"{key}._target_ names {target!r}, whose import fails ({raised(error)}): mend it") from error
    home = group_of(key).permitted.get(target)
    defined = getattr(found, "__module__", "")
    known = (defined, getattr(found, "__qualname__", "")) == (home, name)
    if not callable(found) or not (known or (home is None and defined.partition(".")[0] in _trusted)):
        raise InputError(f"{key}._target_ names {target!r}, which is {found!r} now: choose another option")
    return found


def bind(node: Mapping[str, Any], facts: Mapping[str, Any], *, key: str) -> tuple[Any, dict[str, Any]]:
    """The target of ``node`` and the keyword arguments for it: the node's own, and the facts that it asks for.

    A fact is passed where the target has a parameter of its name that the node leaves out or sets to null.
    InputError names an argument that the target does not have, one that is missing, or one of a wrong type.
    """
    function = locate(node.get("_target_", ""), key=key)
    parameters = inspect.signature(function).parameters
    return function, _arguments(node, facts, Signature(parameters, _hints(function)), key=key)


def _arguments(node: Mapping[str, Any], facts: Mapping[str, Any], signature: Signature, *, key: str) -> dict[str, Any]:
    """The keyword arguments for the target of ``node``, see :func:`bind`."""
    arguments = {name: value for name, value in node.items() if name not in ("_target_", *LOSS_OPTIONS)}
    parameters = signature.parameters
    accepts_any = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    unknown = [] if accepts_any else [name for name in arguments if name not in parameters]
    if unknown:
        allowed = ", ".join(name for name in parameters if name not in facts) or "none"
        anew = f", or add ~{key}, so that '+{key}={{_target_:...}}' begins without those of the option before it"
        raise InputError(
            f"{key}.{unknown[0]} is not an argument of {node['_target_']}, which takes {allowed}: remove "
            f"{key}.{unknown[0]} or correct its name{anew if is_trusted(node['_target_']) and '.' not in key else ''}"
        )
    given = [name for name in facts if arguments.get(name) is not None and group_name(key) != "augment"]
    if given:
        raise InputError(
            f"{key}.{given[0]} is {arguments[given[0]]!r}, but that is what the run itself tells {node['_target_']}: "
            f"remove {key}.{given[0]}"
        )
    options = {name: node.get(name) for name in LOSS_OPTIONS if group_name(key) == "loss"}
    hints = {**signature.hints, **dict.fromkeys(options, bool)}
    for name, value in (arguments | options).items():
        has_default = name in facts or name in options or name not in parameters or parameters[name].default is None
        if value is None and has_default:
            continue
        if name in hints and not fits(value, hints[name]):
            raise InputError(f"{key}.{name} is {value!r}, but must be {described(hints[name])}: set {key}.{name}=...")
    for name, value in facts.items():
        if name in parameters and arguments.get(name) is None:
            arguments[name] = value
    missing = [
        name
        for name, item in parameters.items()
        if item.default is inspect.Parameter.empty
        and item.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and name not in arguments
    ]
    if missing:
        raise InputError(f"{key}.{missing[0]} is needed by {node['_target_']}: set {key}.{missing[0]}=...")
    return arguments


def check_node(node: Mapping[str, Any], facts: Mapping[str, Any], *, key: str) -> None:
    """Bind ``node``, then the nodes within it, to their signatures; nothing is built, and little imported."""
    check_allowed(node, key=key)
    target = node["_target_"]
    home = group_of(key).permitted.get(target) if group_name(key) != "augment" else None  # Albumentations wraps them
    signature = read_signature(home, target.rpartition(".")[2]) if home else None
    if signature is None:
        bind(node, facts, key=key)
    else:
        _arguments(node, facts, signature, key=key)
    for place, child in children(node):
        check_node(child, facts, key=f"{key}.{'.'.join(place)}")


def instantiate(node: Mapping[str, Any], facts: Mapping[str, Any] | None = None, *, key: str) -> Any:
    """Build the object that ``node`` describes, once it and the nodes within it have been checked.

    An exception of a constructor that is not segkit's becomes an InputError with the key.
    """
    facts = facts or {}
    check_node(node, facts, key=key)

    def build(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            if "_target_" in value:
                return instantiate(value, facts, key=name)
            return {inner: build(item, f"{name}.{inner}") for inner, item in value.items()}
        return value

    function, arguments = bind(node, facts, key=key)
    arguments = {name: build(value, f"{key}.{name}") if name in node else value for name, value in arguments.items()}
    try:
        built = function(**arguments)
    except InputError as error:
        if group_name(key) != "loss":
            raise
        raise InputError(re.sub(r"(?<![\w.])loss\.", f"{key}.", str(error))) from error  # where the loss stands
    except Exception as error:
        other = is_of_a_file(error) or isinstance(error, MemoryError) or "memory" in str(error)
        if is_trusted(node["_target_"]) and not other:
            raise InputError(f"{node['_target_']} fails ({raised(error)}): mend it, or what {key} gives it") from error
        if not isinstance(error, (TypeError, ValueError, ArithmeticError, RuntimeError)):
            raise
        is_own = function.__module__.partition(".")[0] == "segkit"
        if is_own or (isinstance(error, RuntimeError) and group_name(key) != "optimizer"):  # memory, for one
            raise
        given = ", ".join(f"{key}.{name}={value}" for name, value in node.items() if name != "_target_")
        reason = " ".join(str(error).split()).partition(" [type=")[0]  # of pydantic's text the part for people
        raise InputError(f"{node['_target_']} refuses its arguments ({reason}): correct {given}") from error
    module, name = group_of(key).result
    if not isinstance(built, getattr(importlib.import_module(module), name)):
        raise InputError(f"{key}._target_ is {node['_target_']!r}, which makes a {type(built).__name__}, no {name}")
    return built


# -- types -----------------------------------------------------------------------------------------------------------


def _hints(function: Any) -> dict[str, Any]:
    """Types of the parameters of ``function``; empty where they cannot be resolved."""
    try:
        return typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, TypeError, AttributeError):
        return {}


def fits(value: Any, hint: Any) -> bool:
    """True if the plain ``value`` (of YAML) may stand for the type ``hint``; types that are not plain take anything."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in _plain(inner))
    if origin is typing.Literal:
        return value in inner
    if hint is type(None):
        return value is None
    if hint is float:
        return (isinstance(value, float) and value == value) or fits(value, int)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint is Path:
        return isinstance(value, str | Path)
    if origin is tuple and inner and inner[-1] is not ...:
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(fits, value, inner))
    if origin in (list, tuple, collections.abc.Sequence):
        return isinstance(value, list | tuple) and all(fits(item, inner[0]) for item in value)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, Mapping) and all(fits(item, inner[1]) for item in value.values())
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return isinstance(value, hint)
    if _is_tensor(hint):
        return isinstance(value, list | tuple)
    return True


def described(hint: Any) -> str:
    """The type ``hint`` in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(described(option) for option in _plain(inner)))
    if origin is typing.Literal:
        return " or ".join(map(str, inner))
    if origin is tuple and inner and inner[-1] is not ...:
        return f"a list of {len(inner)} values, each {described(inner[0])}"
    if origin in (list, tuple, collections.abc.Sequence):
        return f"a list of values, each {described(inner[0])}"
    if origin in (dict, collections.abc.Mapping) or dataclasses.is_dataclass(hint):
        return "a mapping of keys to values"
    names = {
        float: "a number",
        int: "a whole number of at most 64 bits",
        bool: "true or false",
        str: "a text",
        type(None): "null",
        Path: "a path",
    }
    return names.get(hint, "a list of numbers" if _is_tensor(hint) else getattr(hint, "__name__", str(hint)).lower())


def _is_tensor(hint: Any) -> bool:
    return getattr(hint, "__name__", "") == "Tensor"


def _plain(options: tuple[Any, ...]) -> list[Any]:
    """The ``options`` of a union that a plain value may have: a tensor only where nothing else is left."""
    plain = [option for option in options if not _is_tensor(option)]
    return plain if any(option is not type(None) for option in plain) else list(options)
