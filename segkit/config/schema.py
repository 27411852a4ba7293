"""The closed schema of a run's configuration, and the way from a configuration node to an object.

Hydra composes the YAML files of ``configs/`` into this schema; :func:`to_config` turns the result into plain
dataclasses once, at the door. Nothing beyond it sees a configuration object of OmegaConf. A misspelt key, a value of
a wrong type and a contradiction between two keys all fail here, before data or a heavy library is touched.

This module imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from segkit.config.dataset import RGB, DatasetConfig, require, within
from segkit.config.targets import GROUPS, check_node, group_name
from segkit.errors import MOST_NUMBER, check_normalisation, is_positive

MOST_STEPS = 10**9
"""Steps of a phase: no training is longer, and beyond it lies what a counter cannot hold."""
MOST_PICTURES = 1000
"""Images of an evaluation that are shown: all stand in one picture, in memory."""
PART = re.compile(r"[\w.*?!\[\]-]+").fullmatch  # a part of a dotted name, or a pattern of some

FREE_KEYS = (
    "workers", "device", "cache_dir", "checkpoint_every", "resume", "ignore_config_change", "profile_steps", "sweep",
    "tracker", "trust", "max_pixels",
)  # fmt: skip
"""Top-level keys that may change between two runs in one folder: they do not change what is computed."""


def is_free(key: str) -> bool:
    """True for a dotted key that changes nothing that is computed.

    Where data lie is one, as the files are compared, and so is a recipe: the keys that read it hold its values.
    """
    return key.split(".")[0] in FREE_KEYS or bool(re.search(r"(^|\.)dataset\.(root$|recipe\.)", key))


class Precision(Enum):
    """Number format of the forward pass; parameters and losses stay in float32. ``auto``: segkit.run.hardware."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Determinism(Enum):
    """``none``: fastest kernels; ``strict``: bitwise repeatable (on a CPU, and on a GPU where torch can)."""

    none = "none"
    strict = "strict"


class Head(Enum):
    """Of the weights of ``init_from``: ``keep`` all, or ``reset`` the last layer, for other classes."""

    keep = "keep"
    reset = "reset"


class TrackerKind(Enum):
    """Where curves are shown beside metrics.jsonl: see :mod:`segkit.training.sinks`."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    mlflow = "mlflow"
    none = "none"


class LrSchedule(Enum):
    """How the learning rate moves: the equations stand in :func:`segkit.training.schedules.lr_factor`."""

    poly = "poly"
    cosine = "cosine"
    constant = "constant"
    step = "step"
    one_cycle = "one_cycle"


@dataclass(kw_only=True)
class PhaseConfig:
    """One phase of training: one data set, one loss, one optimizer, a number of epochs or of steps.

    ``loss`` and ``dataset`` default to the run's own; ``lr`` to ``optimizer.lr``. The learning rate rises linearly
    over ``warmup_steps`` and then follows ``lr_schedule``; poly falls as (1 - step/steps) ** ``poly_power``.
    """

    epochs: float | None = None
    steps: int | None = None
    loss: dict[str, Any] | None = None
    dataset: DatasetConfig | None = None
    lr: float | None = None
    lr_schedule: LrSchedule = LrSchedule.poly
    warmup_steps: int = 0
    poly_power: float = 0.9

    def check(self, name: str, *, others: list[str]) -> None:
        """Raise InputError if the keys of phase ``name`` contradict each other; ``others``: names of other phases."""
        key, hint = f"schedule.{name}", f" (the others are {', '.join(others)})" if others else ""
        require(
            self.epochs is not None or self.steps is not None,
            f"phase {name} of the schedule has neither epochs nor steps: set {key}.epochs=..., or correct its name"
            f"{hint}",
        )
        require(
            self.epochs is None or self.steps is None,
            f"{key} has epochs={self.epochs} and steps={self.steps}, but needs exactly one of the two: "
            f"set {key}.epochs=null or {key}.steps=null",
        )
        require(
            self.epochs is None or 0 < self.epochs <= MOST_STEPS,
            f"{key}.epochs is {self.epochs}, but must be positive and at most {MOST_STEPS}: set {key}.epochs=...",
        )
        within(f"{key}.steps", self.steps, 1, MOST_STEPS)
        for number in ("lr", "warmup_steps", "poly_power"):
            within(f"{key}.{number}", getattr(self, number), 0, MOST_NUMBER)
        require(
            self.lr_schedule is not LrSchedule.one_cycle or not self.warmup_steps,
            f"{key}.warmup_steps is {self.warmup_steps}, but one_cycle has a rise of its own: set {key}.warmup_steps=0",
        )


@dataclass(kw_only=True)
class EvaluationConfig:
    """Evaluation during training, on ``dataset.val_split``; always at the end of a phase as well."""

    every_steps: int | None = None
    every_epochs: float | None = 1.0
    batch_size: int = 1
    max_images: int | None = None
    pictures: int = 4

    def __post_init__(self) -> None:
        for key in ("every_steps", "batch_size", "max_images"):
            within(f"evaluation.{key}", getattr(self, key), 1)
        within("evaluation.pictures", self.pictures, 0, MOST_PICTURES)
        require(
            self.every_epochs is None or 0 < self.every_epochs <= MOST_STEPS,
            f"evaluation.every_epochs is {self.every_epochs}, but must be positive, at most {MOST_STEPS}, or null: "
            "set evaluation.every_epochs=1",
        )
        require(
            self.every_steps is None or self.every_epochs is None,
            f"evaluation has every_steps={self.every_steps} and every_epochs={self.every_epochs}, but takes at most "
            "one of the two: set evaluation.every_epochs=null",
        )


@dataclass(kw_only=True)
class SweepConfig:
    """A sweep (``-m``) on this machine: ``jobs`` run at a time.

    With a ``space`` it is a search (``segkit.sweeps.search``): ``trials`` in all, none started after ``hours``, and a
    poor one stopped early once ``prune_after`` others have finished.
    """

    jobs: int = 1
    space: dict[str, Any] = field(default_factory=dict)
    trials: int | None = None
    hours: float | None = None
    prune_after: int | None = 5

    def __post_init__(self) -> None:
        for key in ("jobs", "trials", "prune_after"):
            within(f"sweep.{key}", getattr(self, key), 1)
        require(
            self.hours is None or self.hours > 0,
            f"sweep.hours is {self.hours}, but must be positive or null: set sweep.hours=8",
        )


@dataclass(kw_only=True)
class Config:
    """A whole run. ``configs/train.yaml`` explains every key."""

    dataset: DatasetConfig
    model: dict[str, Any]
    loss: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, PhaseConfig]
    augment: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    seed: int = 0
    determinism: Determinism = Determinism.none
    device: str = "auto"
    precision: Precision = Precision.auto
    compile: bool = False
    channels_last: bool | str = "auto"
    grad_checkpointing: bool | str = False
    sync_batchnorm: bool = False

    batch_size: int = 8
    accumulate: int = 1
    auto_batch: bool = False
    clip_norm: float | None = None
    ema_decay: float | None = None
    encoder_lr_factor: float = 1.0

    workers: int = 4
    log_every: int = 10
    tracker: TrackerKind = TrackerKind.tensorboard
    checkpoint_every: int | None = None
    profile_steps: int = 0
    overfit_batches: int | None = None
    limit_steps: int | None = None

    init_from: str | None = None
    head: Head = Head.keep
    freeze: Any = field(default_factory=list)
    lr_factors: Any = None  # not dict[str, float], to which an override could not add
    cache_dir: str | None = None
    resume: bool = True
    ignore_config_change: bool = False
    trust: list[str] = field(default_factory=list)
    max_pixels: int = 200_000_000

    def __post_init__(self) -> None:
        require(bool(self.schedule), "schedule has no phase, but needs at least one: choose schedule=single or another")
        for name, phase in self.schedule.items():
            require(
                name.isidentifier() and name not in {"checkpoints", "evaluations", "pictures", "wandb"},
                f"schedule has a phase named {name!r}, but a name is of letters, digits and underscores, and not "
                "checkpoints, evaluations, pictures or wandb, which a run's folder has already: rename the phase",
            )
            phase.check(name, others=[other for other in self.schedule if other != name])
        self.freeze = [self.freeze] if isinstance(self.freeze, str) else [] if self.freeze is None else self.freeze
        require(
            isinstance(self.freeze, list) and all(isinstance(item, str) and PART(item) for item in self.freeze),
            f"freeze is {self.freeze!r}, but takes names of parts of the model: set freeze=encoder or a list of such",
        )
        require(
            re.fullmatch(r"auto|(cpu|mps|cuda)(:\d{1,3})?", self.device) is not None,
            f"device is {self.device!r}, but must be auto, cpu, cuda, cuda:N or mps: set device=auto",
        )
        self.lr_factors = {} if self.lr_factors is None else self.lr_factors
        require(
            isinstance(self.lr_factors, dict),
            f"lr_factors is {self.lr_factors!r}, but gives factors by parts: set lr_factors={{encoder:0.1}}",
        )
        for pattern, factor in self.lr_factors.items():
            require(
                bool(PART(str(pattern))) and type(factor) in (int, float) and is_positive(factor),
                f"lr_factors.{pattern} is {factor!r}, but must be a part of the model and a positive number "
                f"(1e-30 to 1e30): set freeze={pattern if PART(str(pattern)) else 'PART'} to keep these weights",
            )
        for key in ("batch_size", "accumulate"):
            within(key, getattr(self, key), 1, 2**16)
        within("workers", self.workers, 0, 1000)
        for key in ("log_every", "checkpoint_every", "overfit_batches", "limit_steps", "max_pixels"):
            within(key, getattr(self, key), 1)
        for key in ("profile_steps", "seed"):
            within(key, getattr(self, key), 0)
        require(
            self.channels_last in (True, False, "auto"),
            f"channels_last is {self.channels_last!r}, but must be auto, true or false: set channels_last=auto",
        )
        require(
            self.grad_checkpointing in (False, "light", "mixed", True),
            f"grad_checkpointing is {self.grad_checkpointing!r}, but must be false, light, mixed or true: "
            "set grad_checkpointing=light",
        )
        self._check_pairs()

    def _check_pairs(self) -> None:
        for name, node in self.augment.items():
            require(
                node is None or isinstance(node, dict),
                f"augment.{name} is {node!r}, but must name a transform: set "
                f"'augment.{name}={{_target_:albumentations.Rotate,limit:10,p:0.5}}'",
            )
        require(
            self.batch_size % self.accumulate == 0,
            f"batch_size is {self.batch_size} and accumulate {self.accumulate}, but a batch is cut into accumulate "
            f"equal parts: set batch_size={math.ceil(self.batch_size / self.accumulate) * self.accumulate}",
        )
        require(
            self.clip_norm is None or is_positive(self.clip_norm),
            f"clip_norm is {self.clip_norm}, but must be positive or null (1e-30 to 1e30): set clip_norm=1.0",
        )
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"ema_decay is {self.ema_decay}, but must lie between 0 and 1, or be null: set ema_decay=0.999",
        )
        for name in self.schedule:
            dataset = self.phase_dataset(name)
            place = "dataset" if self.schedule[name].dataset is None else f"schedule.{name}.dataset"
            dataset.resize.check_pixels(f"{place}.resize", self.max_pixels)
            dataset.eval_resize.check_pixels(f"{place}.eval_resize", self.max_pixels)
            first, own = ((item.kind, item.mean, item.std) for item in (self.images, dataset))
            require(
                own == first,
                f"phase {name} has images of {own} and the first phase of {first} (in_channels, dtype, mean, std), but "
                f"one model goes through all phases: set the same in schedule.{name}.dataset",
            )
        for key in ("init_from", "cache_dir"):
            require(getattr(self, key) != "", f"{key} is empty: set {key}=PATH, or {key}=null")
        require(
            self.head is Head.keep or self.init_from is not None,
            "head=reset replaces the last layer of init_from, but that is null: set init_from=PATH, or head=keep",
        )
        require(
            is_positive(self.encoder_lr_factor),
            f"encoder_lr_factor is {self.encoder_lr_factor}, but must be positive (1e-30 to 1e30): set "
            "encoder_lr_factor=1.0",
        )

    @property
    def images(self) -> DatasetConfig:
        """The data set that says of what kind the images of all phases are."""
        return self.phase_dataset(next(iter(self.schedule)))

    def phase_dataset(self, name: str) -> DatasetConfig:
        """The data set of phase ``name``."""
        return self.schedule[name].dataset or self.dataset

    def phase_loss(self, name: str) -> dict[str, Any]:
        """The loss node of phase ``name``."""
        return self.schedule[name].loss or self.loss


def plain(value: Any) -> Any:
    """A dataclass of this module as dictionaries, lists, strings and numbers (for YAML, JSON and hashing)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def targets(config: Config) -> list[tuple[str, dict[str, Any]]]:
    """Every ``_target_`` node of ``config`` with the key under which it stands."""
    nodes = [("model", config.model), ("optimizer", config.optimizer), ("loss", config.loss)]
    nodes.append(("dataset.reader", config.dataset.reader))
    nodes += [(f"augment.{name}", node) for name, node in config.augment.items() if node is not None]
    for name, phase in config.schedule.items():
        if phase.loss is not None:
            nodes.append((f"schedule.{name}.loss", phase.loss))
        if phase.dataset is not None:
            nodes.append((f"schedule.{name}.dataset.reader", phase.dataset.reader))
    return nodes


FACTS: dict[str, tuple[str, ...]] = {
    "model": ("num_classes", "classes", "in_channels"),
    "optimizer": ("params",),
    "loss": ("class_pixels", "class_names", "ignore_index", "num_classes"),
    "reader": ("root", "split"),
    "augment": ("fill", "fill_mask"),
}
"""What the pipeline itself passes to the targets of each group."""


def check_targets(config: Config) -> None:
    """Bind every target of ``config`` to its signature, so that a wrong argument fails before data is touched."""
    for key, node in targets(config):
        check_node(node, dict.fromkeys(FACTS[group_name(key)], object()), key=key)
    if config.optimizer["_target_"] in GROUPS["optimizer"].permitted:
        _check_optimizer(config.optimizer)
    if config.model["_target_"] in GROUPS["model"].permitted and config.images.kind == RGB:
        given = (config.model.get(name) for name in ("mean", "std"))
        check_normalisation(*([0.5] * 3 if values is None else values for values in given), num_channels=3)


def _check_optimizer(node: dict[str, Any]) -> None:
    """Raise InputError for numbers that any optimizer of torch refuses, before torch is imported."""
    for name in ("lr", "eps", "weight_decay", "momentum"):
        within(f"optimizer.{name}", node.get(name), 0)
    for name in ("capturable", "differentiable"):
        text = f"optimizer.{name} is {node.get(name)}, but is for programs that record a step or differentiate it"
        require(not node.get(name), f"{text}: leave it out")
    require(not node.get("maximize"), "optimizer.maximize is true, but a loss is to get small: leave it out")
    require(
        all(0 <= value < 1 for value in node.get("betas", ())),
        f"optimizer.betas is {node.get('betas')}, but each must be from 0 to below 1: set optimizer.betas=[0.9,0.999]",
    )


def cache_dir_of(config: Config) -> Path:
    """``cache_dir`` of the configuration; else ``$SEGKIT_CACHE``, or ``~/.cache/segkit``."""
    folder = os.path.expanduser(config.cache_dir or os.environ.get("SEGKIT_CACHE") or "~/.cache/segkit")
    text = f"the cache would be {folder}, which is no folder of this machine: set cache_dir=DIR, or SEGKIT_CACHE"
    require(folder[0] != "~" and "://" not in folder, text)
    return Path(folder)
