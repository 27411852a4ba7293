"""What a model gives, and a loss of the user's own, tried before the first step."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from segkit import memory
from segkit.config.schema import Config, plain
from segkit.config.targets import GROUPS
from segkit.data import SampleSet
from segkit.data.transforms import target_size
from segkit.errors import InputError, raised
from segkit.models import Segmenter
from segkit.training.step import check_value

STRIDE = 4
"""That of the logits that a loss is tried with."""


def try_model(model: Segmenter, config: Config, phase: str, val: SampleSet, device: torch.device) -> None:
    """Raise InputError unless a model gives logits (N, K, h, w), in training and in evaluation.

    For zeros of the size of the crops, in a copy whose running statistics are not kept, and of an image as it is
    evaluated. Of segkit's models, those on an encoder of timm may take some sizes only, and only one that does not take
    these computes anything here. A phase on the data of an earlier one has the same sizes.
    """
    own = config.model["_target_"] not in GROUPS["model"].permitted
    if not own and not str(config.model.get("encoder")).startswith("tu-"):
        return
    dataset = config.phase_dataset(phase)
    earlier = itertools.takewhile(lambda name: name != phase, config.schedule)
    if any(config.phase_dataset(name) == dataset for name in earlier):
        return
    size = target_size(val.image(0).shape[:2], plain(dataset.eval_resize))
    crops = min(2, config.batch_size // config.accumulate)
    for mode, shape in (
        ("evaluation", (1, dataset.in_channels, *size)),
        ("training", (crops, dataset.in_channels, *dataset.crop)),
    ):
        encoder = "" if own else f" on {config.model['encoder']}"
        what = f"{config.model['_target_']}{encoder}, in {mode} mode for images {shape},"
        if not own and model.train(mode == "training").takes(shape):
            continue
        tried = model.eval() if mode == "evaluation" else copy.deepcopy(model).train()
        kept = [device] if device.type == "cuda" else []
        other = "crop" if mode == "training" else "eval_resize"
        cure = "mend it" if own else f"set another dataset.{other}, or choose another model"
        with _tried(what, cure), torch.no_grad(), torch.random.fork_rng(kept):
            logits = tried(torch.zeros(shape, device=device))
        good = isinstance(logits, Tensor) and logits.dim() == 4 and logits.is_floating_point()
        if not good or logits.shape[:2] != (shape[0], val.num_classes):
            got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            wanted = f"floating-point logits ({shape[0]}, {val.num_classes}, h, w)"
            raise InputError(f"{what} gives {got}, but must give {wanted}: mend it")
    model.train()


def try_loss(loss: nn.Module, config: Config, phase: str, train: SampleSet, device: torch.device) -> None:
    """Raise InputError unless ``loss``, if it is of the user's own, gives one number with a gradient for two crops."""
    if all(type(part).__module__.partition(".")[0] in ("segkit", "torch") for part in loss.modules()):
        return
    what = f"the loss {config.phase_loss(phase)['_target_']} of phase {phase}"
    if names := [name for name, _ in loss.named_parameters()]:
        raise InputError(f"{what} has a parameter {names[0]}, which no optimizer trains: make it a buffer, or a number")
    height, width = config.phase_dataset(phase).crop
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(train.num_classes, (2, height, width), generator=generator)
    target[:, 0] = train.ignore_index
    small = (2, train.num_classes, -(-height // STRIDE), -(-width // STRIDE))
    logits = torch.randn(small, generator=generator).to(device).requires_grad_()
    with _tried(f"{what}, for logits {small} and labels {tuple(target.shape)},"):
        tried, target = copy.deepcopy(loss), target.to(device)
        given = target.clone()
        own: Any = tried.denominator if getattr(tried, "pixel_decomposable", False) else None
        value = tried(logits, target, **({"denominator": own(target)} if own else {}))
    check_value(value, what)
    if not torch.equal(given, target):
        raise InputError(f"{what} changes the labels that it is given, which others read as well: let it clone them")
    with _tried(f"the gradient of {what}"):
        value.backward()


@contextmanager
def _tried(what: str, cure: str = "mend it") -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or memory.is_out_of_memory(error):
            raise
        raise InputError(f"{what} fails ({raised(error)}): {cure}") from error
