"""The part of the schema that describes a data set, and the two checks that all of the schema uses."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from segkit.errors import InputError, is_positive


class LabelSize(Enum):
    """Size at which a prediction is compared: that of the label file, or that of the resized image."""

    original = "original"
    resized = "resized"


class SamplerKind(Enum):
    """What an epoch draws: :mod:`segkit.data.sampling`."""

    uniform = "uniform"
    class_balanced = "class_balanced"
    rare_crop = "rare_crop"


RGB = (3, "uint8")
"""Channels and type of images that are colours."""


class ImageType(Enum):
    """Type of the values of an image, as numpy names it."""

    uint8 = "uint8"
    uint16 = "uint16"
    float32 = "float32"

    @property
    def divisor(self) -> float:
        """What values are divided by before the mean is subtracted: the greatest of an integer type."""
        return {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}[self.value]


def require(condition: bool, message: str) -> None:
    """Raise InputError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


def within(key: str, value: float | None, least: float, most: float = math.inf) -> None:
    """Raise InputError if ``value`` of ``key`` is below ``least`` or above ``most``; None passes."""
    require(value is None or value >= least, f"{key} is {value}, but must be at least {least}: set {key}=...")
    require(value is None or value <= most, f"{key} is {value}, but must be at most {most}: set {key}=...")


def of_phase(text: str, phase: str) -> str:
    """``text`` about the data set of a run, with the keys of that of ``phase`` alone."""
    return re.sub(r"(?<![\w.])dataset\.", f"schedule.{phase}.dataset.", text)


def is_list(key: str, value: Any) -> None:
    """Raise InputError unless ``value`` of ``key`` is a list of numbers or None; ``${...}`` and [[1]] may be others."""
    good = isinstance(value, list) and all(type(item) in (int, float) for item in value)
    require(value is None or good, f"{key} is {value!r}, but must be a list of numbers: set {key}=[...]")


def is_share(key: str, value: float, what: str, *, most: float = 1, example: str = "...") -> None:
    """Raise InputError unless ``value`` of ``key``, which is ``what``, is from 0 to ``most``."""
    require(0 <= value <= most, f"{key} is {value}, but is {what} from 0 to {most}: set {key}={example}")


@dataclass(kw_only=True)
class ResizeConfig:
    """``short_side``: pixels of the shorter side, aspect kept; ``size``: exactly [height, width]; or neither."""

    short_side: int | None = None
    size: list[int] | None = None

    def check(self, key: str) -> None:
        """Raise InputError if the two contradict each other; ``key`` is where they stand."""
        is_list(f"{key}.size", self.size)
        require(
            self.short_side is None or self.size is None,
            f"{key} has short_side={self.short_side} and size={self.size}, but takes at most one of the two: "
            f"set {key}.short_side=null or {key}.size=null",
        )
        if self.size is not None:
            require(
                len(self.size) == 2 and min(self.size) > 0,
                f"{key}.size is {self.size}, but must be [height, width]: set {key}.size=[720,1280]",
            )
        within(f"{key}.short_side", self.short_side, 1)

    def check_pixels(self, key: str, most: int) -> None:
        """Raise InputError if every image would have more pixels than ``most``, which decoding refuses."""
        height, width = self.size or [self.short_side or 0] * 2
        require(
            height * width <= most,
            f"{key} makes images of {height}x{width}, more than max_pixels={most}: set a smaller {key}, or max_pixels "
            "to more",
        )


@dataclass(kw_only=True)
class RecipeConfig:
    """What a data set's usual training looks like; the schedules and ``batch_size`` read it.

    ``warmup_steps`` is of the first phase; ``finetune_lr`` of a phase that goes on with its weights, null for ``lr``;
    ``evaluate_every`` in epochs.
    """

    batch_size: int = 8
    epochs: float = 40.0
    finetune_epochs: float = 20.0
    lr: float = 1e-4
    finetune_lr: float | None = None
    warmup_steps: int = 0
    evaluate_every: float = 1.0


@dataclass(kw_only=True)
class JitterConfig:
    """Strengths of the colour jitter: factors are from 1 - s to 1 + s, ``hue`` turns by up to a share of the circle."""

    brightness: float = 0.25
    contrast: float = 0.25
    saturation: float = 0.25
    hue: float = 0.05

    def __post_init__(self) -> None:
        for key, most in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
            is_share(f"dataset.jitter.{key}", getattr(self, key), "a strength", most=most)


@dataclass(kw_only=True)
class DatasetConfig:
    """One data set: how to read it, and how its images are cut for training and for evaluation.

    ``holdout``: share of the images of ``train_split``, chosen by a hash of their names, that is kept out of training,
    for what is to be fitted on images that the weights have not seen (:mod:`segkit.run.splits`). ``rare_crop``: the
    probability that the sampler of this name takes a crop of a rare class. ``in_channels``, ``dtype``: of images; those
    that are not 8-bit RGB need ``mean`` and ``std``, one value a channel, of values divided by ``dtype.divisor``, which
    `segkit stats` prints. Null is what the model's encoder was trained with.
    """

    name: str
    reader: dict[str, Any]
    root: str | None = None
    in_channels: int = 3
    dtype: ImageType = ImageType.uint8
    mean: list[float] | None = None
    std: list[float] | None = None
    train_split: str = "train"
    val_split: str = "val"
    holdout: float = 0.0
    resize: ResizeConfig = field(default_factory=ResizeConfig)
    eval_resize: ResizeConfig = field(default_factory=ResizeConfig)
    eval_labels: LabelSize = LabelSize.original
    crop: list[int] = field(default_factory=lambda: [512, 512])
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    flip: float = 0.5
    color_jitter: float = 0.0
    sampler: SamplerKind = SamplerKind.uniform
    rare_crop: float = 0.5
    jitter: JitterConfig = field(default_factory=JitterConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)

    def __post_init__(self) -> None:
        for key in ("crop", "scale", "mean", "std"):
            is_list(f"dataset.{key}", getattr(self, key))
        require(
            len(self.crop) == 2 and min(self.crop) >= 8 and max(self.crop) < 2**16,
            f"dataset.crop is {self.crop}, but must be [height, width] of at least 8 and below 65536: "
            "set dataset.crop=[512,512]",
        )
        require(
            len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 100,
            f"dataset.scale is {self.scale}, but must be [least, most] with 0 < least <= most <= 100: "
            "set dataset.scale=[0.5,2.0]",
        )
        require(self.root != "", f"dataset.root is empty: set dataset.root=DIR, the folder of {self.name}")
        for key in ("train_split", "val_split"):  # an empty one would be the images of all splits
            require(getattr(self, key) != "", f"dataset.{key} is empty: set dataset.{key}=NAME")
        for key in ("resize", "eval_resize"):
            getattr(self, key).check(f"dataset.{key}")
        self._check_images()
        is_share("dataset.holdout", self.holdout, "a share of the training images", most=0.5, example="0.1")
        for key in ("flip", "color_jitter", "rare_crop"):
            is_share(f"dataset.{key}", getattr(self, key), "a probability")

    def __repr__(self) -> str:  # in a sentence about a key to which ${dataset} brought all of it
        return f"DatasetConfig(name={self.name!r}, ...)"

    @property
    def kind(self) -> tuple[int, str]:
        """Channels and type of the images; :data:`RGB` by default."""
        return self.in_channels, self.dtype.value

    def _check_images(self) -> None:
        num, mean, std = self.in_channels, self.mean or [], self.std or []
        least, most = (0, 1) if self.dtype.divisor > 1 else (-math.inf, math.inf)
        require(
            1 <= num <= 1000, f"dataset.in_channels is {num}, but must be from 1 to 1000: set dataset.in_channels=3"
        )
        require(
            self.mean is self.std is None
            or (
                len(mean) == len(std) == num and all(map(is_positive, std)) and least <= min(mean) and max(mean) < most
            ),
            f"dataset.mean is {self.mean} and dataset.std {self.std}, but {num} values each are wanted "
            f"(dataset.in_channels), of values divided by {self.dtype.divisor:.0f}, and positive deviations (1e-30 or "
            "more): set both to what `segkit stats` prints, and leave a channel of one value out",
        )

    def check_statistics(self) -> None:
        """Raise InputError if images need a mean and a deviation that are not given."""
        require(
            self.kind == RGB or self.mean is not None,
            f"images of {self.in_channels} channels of {self.dtype.value} are not what an encoder was trained with, so "
            "they need their own mean and deviation: run `segkit stats` with the same dataset.* and add the two lines "
            "dataset.mean=... dataset.std=... that it prints",
        )
