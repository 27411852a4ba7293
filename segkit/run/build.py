"""From configuration nodes to objects: model, loss, optimizer, transform."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from segkit import memory, runtime
from segkit.config.dataset import RGB, SamplerKind
from segkit.config.schema import Config, DatasetConfig, plain
from segkit.config.targets import instantiate, locate
from segkit.data import SampleSet
from segkit.data.labels import VOID
from segkit.data.sampling import Sampler, make_sampler
from segkit.data.statistics import LabelCounts, counts_and_classes
from segkit.data.transforms import PAD_COLOUR, EvalTransform, TrainTransform
from segkit.errors import InputError
from segkit.evaluation.inference import Inference
from segkit.models import Segmenter, enable_grad_checkpointing
from segkit.models.grouped import fit_for_cpu
from segkit.run.plan import plan_phase
from segkit.run.splits import Splits
from segkit.training.optim import freeze, lr_factors_of, parameter_groups

if TYPE_CHECKING:
    from segkit.data.augment import Augment

FUSED = ("torch.optim.AdamW", "torch.optim.Adam", "torch.optim.SGD")
"""Optimizers of which torch has a form in one pass over the parameters, on CPUs and on GPUs."""
FORMS = {"fused", "foreach", "capturable", "differentiable"}


def build_model(config: Config, num_classes: int) -> Segmenter:
    """The model of ``config`` for ``num_classes``, with its weights drawn from ``config.seed``.

    What ``config.freeze`` names is frozen; InputError if that, or ``lr_factors``, does not fit the model.
    """
    with runtime.drawing:
        torch.manual_seed(runtime.derive_seed(config.seed, "weights"))
        model = segmenter(config.model, num_classes, config.images)
    if config.grad_checkpointing:
        enable_grad_checkpointing(model.net, config.grad_checkpointing)
    factors = {"lr_factors": config.lr_factors, "encoder_lr_factor": config.encoder_lr_factor}
    lr_factors_of(model, freeze=config.freeze, **factors)
    freeze(model, config.freeze)
    if config.channels_last is True:  # here, so that a saved run computes, and scores, as it was trained
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def segmenter(node: dict[str, Any], num_classes: int, images: DatasetConfig) -> Segmenter:
    """The model of ``node`` for the images that ``images`` describes; InputError if it does not take their channels."""
    images.check_statistics()
    wanted = images.in_channels
    takes = "in_channels" in inspect.signature(locate(node.get("_target_", ""), key="model")).parameters
    if (given := node.get("in_channels") or (wanted if takes else 3)) != wanted:
        cure = "leave model.in_channels out" if takes else "give it an argument in_channels"
        raise InputError(
            f"{node['_target_']} takes images of {given} channels, but dataset.in_channels is {wanted}: {cure}"
        )
    facts = {"num_classes": num_classes, "classes": num_classes, "in_channels": wanted}
    net = instantiate(node, facts, key="model")
    if lazy := next((name for name, item in net.named_parameters() if is_lazy(item)), None):
        raise InputError(
            f"{node['_target_']} has no size yet for its parameter {lazy}: take another than a lazy module"
        )
    fit_for_cpu(net)
    return Segmenter(net, mean=images.mean, std=images.std, divisor=images.dtype.divisor)


def build_loss(config: Config, phase: str, counts: LabelCounts) -> nn.Module:
    """The loss of ``phase`` with margins or weights from ``counts``."""
    facts = {
        "class_pixels": counts.class_pixels,
        "class_names": list(counts.classes),
        "num_classes": len(counts.classes),
        "ignore_index": VOID,
    }
    key = "loss" if config.schedule[phase].loss is None else f"schedule.{phase}.loss"
    return instantiate(config.phase_loss(phase), facts, key=key)


def build_optimizer(config: Config, model: nn.Module, phase: str | None) -> torch.optim.Optimizer:
    """The optimizer of ``config`` over the parameter groups of ``model``, with the learning rate of ``phase`` if it
    has one.

    One of :data:`FUSED` is so on a CPU and with CUDA unless the configuration names a form, or is strict: the last bits
    differ.
    """
    node = dict(config.optimizer)
    lr = None if phase is None else config.schedule[phase].lr
    keys = {name: f"optimizer.{name}" for name in node}
    if lr is not None:
        node["lr"], keys["lr"] = lr, f"schedule.{phase}.lr"
    if "lr" not in node:
        raise InputError("optimizer.lr is needed: set optimizer.lr=...")
    for name, value in ((name, value) for name, value in node.items() if type(value) in (int, float)):
        single = float(torch.tensor(float(value), dtype=torch.float64).float().abs())
        if not math.isfinite(single) or (single == 0 and (value or name == "eps")):
            raise InputError(
                f"{keys[name]} is {value}, which as a number of 32 bits is {single}, so steps would give NaN or "
                f"nothing: set another {keys[name]}"
            )
    groups = parameter_groups(
        model, lr=node["lr"], encoder_lr_factor=config.encoder_lr_factor, lr_factors=config.lr_factors
    )
    if not groups:
        raise InputError(f"the model {config.model['_target_']} has no parameter to train: give it one")
    tried = {parameter.device.type for parameter in model.parameters()} <= {"cpu", "cuda", "meta"}
    if tried and config.determinism.value == "none" and node.get("_target_") in FUSED and not node.keys() & FORMS:
        node["fused"] = True
    return instantiate(node, {"params": groups}, key="optimizer")


def check_parts(config: Config, splits: dict[str, Splits]) -> None:
    """Build losses and optimizers of all phases for nothing; InputError for what they refuse, and for lack of labels.

    The same goes for the length of each phase, which with ``auto_batch`` is known later only.

    Losses get counts in which all classes are as frequent, and optimizers one parameter: what depends on the real
    ones shows when a run is prepared. What is quick to find comes first: torch's optimizers import its compiler.
    """
    for pair in splits.values():
        pair.val.check_labelled()
    given = next((key for key in ("mean", "std") if config.model.get(key) is not None), None)
    if given and config.images.mean is not None:
        raise InputError(
            f"model.{given} is {config.model[given]} and dataset.{given} {getattr(config.images, given)}, but images "
            "are normalised once, with those of dataset: set model.mean=null model.std=null"
        )
    for name, pair in splits.items():
        if not config.auto_batch:
            plan_phase(config, name, len(pair.train))
        build_loss(config, name, even_counts(pair.train.classes))
    for name, pair in splits.items():
        if augment := train_transform(config, name, augment=True).augment:
            augment.check_fills(len(pair.train.classes))
    alone = dataclasses.replace(config, lr_factors={})
    for name in splits:
        _try_optimizer(build_optimizer(alone, model := nn.Linear(1, 1), name), model, config.optimizer)


def _try_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, node: dict[str, Any]) -> None:
    """Raise InputError if numbers of the optimizer ``node`` overflow in a step, here of ``model``."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except ArithmeticError as error:
        given = ", ".join(f"optimizer.{name}={value}" for name, value in node.items() if name != "_target_")
        raise InputError(
            f"{node['_target_']} cannot compute a step ({type(error).__name__}): correct {given}"
        ) from None


def check_sizes(config: Config, device: torch.device) -> None:
    """Raise InputError if memory cannot hold a batch of crops, or a resized image, of some phase.

    Counted are pixels of one byte in RAM and of float32 on ``device``; what the network takes shows in a step.
    """
    batch = 1 if config.auto_batch else config.batch_size
    part = -(-batch // config.accumulate)
    kept = config.overfit_batches or 1
    for dataset in map(config.phase_dataset, config.schedule):
        (height, width), channels = dataset.crop, dataset.in_channels
        tall, wide = dataset.eval_resize.size or [dataset.eval_resize.short_side or 0] * 2
        crops, images = height * width * channels, tall * wide * channels
        for what, cure, waiting, computed in (
            (f"a batch of {batch} crops of {height}x{width}", "crop, or batch_size", batch * crops, 4 * part * crops),
            (f"overfit_batches={kept} of {batch} crops", "crop, or overfit_batches", kept * batch * crops, 0),
            (f"an image of {tall}x{wide}", "eval_resize", images, 4 * images),
        ):
            in_ram = waiting if device.type == "cuda" else waiting + computed
            for needed, there in ((in_ram, memory.total()), (computed, memory.total(device))):
                if needed > there:
                    raise InputError(
                        f"{what} takes at least {needed / memory.GIB:.0f} GiB, but there are {there / memory.GIB:.0f}: "
                        f"set a smaller dataset.{cure}"
                    )


def check_batch(config: Config, phase: str, model: Segmenter, *, num_images: int, world_size: int) -> None:
    """Raise InputError if ``phase`` cuts its batch into unequal parts, or of one image where batch norms need two.

    A batch has no more images than there are, ``num_images``, and each of ``world_size`` processes an equal share.
    """
    rows = min(config.batch_size, num_images) // world_size
    there = "is only 1 image" if num_images == 1 else f"are only {num_images} images"
    fewer = f", as there {there} to train on" if num_images < config.batch_size else ""
    if rows % config.accumulate:
        raise InputError(
            f"phase {phase} has batches of {rows} images on a process{fewer}, which cannot be cut into "
            f"accumulate={config.accumulate} equal parts: set accumulate to a divisor of {rows}, such as 1"
        )
    if rows != config.accumulate or config.sync_batchnorm:
        return
    dataset = config.phase_dataset(phase)
    trial = model.without_values().train()
    try:
        trial(torch.empty(1, dataset.in_channels, *dataset.crop, dtype=torch.uint8, device="meta"))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        cures = ["add images"] if fewer else ["set a larger batch_size"]
        cures += ["set a smaller accumulate"] if config.accumulate > 1 else []
        raise InputError(
            f"phase {phase} has one image at a time{fewer}, of which a batch norm of this model sees a single value "
            f"per channel: {', '.join(cures)}, or choose a model without batch norm"
        ) from None
    except (RuntimeError, NotImplementedError):
        pass  # an operation that needs values


def even_counts(classes: Sequence[str]) -> LabelCounts:
    """Counts in which all classes are as frequent, of so many pixels that no real data set refuses less."""
    ones = np.full(len(classes), 2**54, np.int64)
    return LabelCounts(ones, ones, 0, 1, tuple(classes), "")


def build_augment(nodes: dict[str, Any], *, crop: tuple[int, int], images: DatasetConfig) -> Augment | None:
    """The transforms of the configuration's ``augment``; None if there are none.

    What comes into view from beyond a crop's border has the colour and the label of padding unless the node says else;
    of more than four channels, for which OpenCV has no colour, 0.
    """
    transforms, pad = {}, padding(images)
    for key, node in ((f"augment.{name}", node) for name, node in nodes.items() if node is not None):
        moves = "border_mode" in inspect.signature(locate(node.get("_target_", ""), key=key)).parameters
        facts = {"fill": pad if len(pad) <= 4 else 0, "fill_mask": VOID} if moves else {}
        transforms[key] = instantiate(node, facts, key=key)
    if not transforms:
        return None
    from segkit.data.augment import Augment

    return Augment(transforms, crop=crop, kind=images.kind)


def padding(images: DatasetConfig) -> tuple[float, ...]:
    """The mean of the images, one value a channel, as files hold it; InputError if it is needed and not known."""
    images.check_statistics()
    if images.mean is None:
        return PAD_COLOUR
    divisor = images.dtype.divisor
    return tuple(round(value * divisor) if divisor > 1 else value for value in images.mean)


def train_transform(config: Config, phase: str, *, augment: bool) -> TrainTransform:
    """Scale-crop-flip, colour jitter and the transforms of ``phase``; only the crop without ``augment``."""
    dataset = config.phase_dataset(phase)
    crop = (dataset.crop[0], dataset.crop[1])
    pad = padding(dataset)
    if augment and dataset.color_jitter and dataset.kind != RGB:
        raise InputError(
            f"dataset.color_jitter is {dataset.color_jitter}, but there are no colours to jitter in images of "
            f"{dataset.in_channels} channels of {dataset.dtype.value}: set dataset.color_jitter=0"
        )
    made = build_augment(config.augment, crop=crop, images=dataset) if augment else None
    return TrainTransform(
        crop=crop,
        resize=plain(dataset.resize),
        scale=(dataset.scale[0], dataset.scale[1]) if augment else (1.0, 1.0),
        flip=dataset.flip if augment else 0.0,
        color_jitter=dataset.color_jitter if augment else 0.0,
        jitter=plain(dataset.jitter),
        augment=made,
        pad=pad,
    )


def eval_transform(dataset: DatasetConfig) -> EvalTransform:
    """What an image and its label go through before they are evaluated."""
    return EvalTransform(resize=plain(dataset.eval_resize), labels=dataset.eval_labels.value)


def build_sampler(config: Config, phase: str, split: SampleSet, *, cache_dir: Path | None) -> Sampler | None:
    """What draws the samples of ``phase`` from ``split``, after its labels were counted; None for all in turn."""
    dataset = config.phase_dataset(phase)
    if dataset.sampler is SamplerKind.uniform:
        return None
    counts, has_class = counts_and_classes(split, workers=config.workers, cache_dir=cache_dir)
    return make_sampler(dataset.sampler.value, has_class, counts.class_pixels, chance=dataset.rare_crop)


def evaluation_protocol(
    dataset: DatasetConfig, inference: Inference, *, split: str, max_images: int | None, precision: str
) -> dict[str, Any]:
    """How a score was measured: what stands beside it in results.json, and what runs must share to be compared."""
    return {
        "dataset": dataset.name,
        "split": split,
        "max_images": max_images,
        "resize": plain(dataset.eval_resize),
        "labels": dataset.eval_labels.value,
        "inference": "whole image" if inference.window is None else "sliding window",
        **inference.describe(),
        "decision": "argmax",
        "precision": precision,
    }
