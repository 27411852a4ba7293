"""What every loss accepts, and one sentence for whatever else it is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from segkit.errors import InputError

LABEL_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Integers that torch computes with: wider ones without a sign it only stores."""


def check_inputs(logits: Tensor, target: Tensor, *, ignore_index: int, num_classes: int | None = None) -> None:
    """Raise InputError unless ``logits`` (N,K,h,w) float and ``target`` (N,H,W) integer belong together.

    The two may differ in height and width. Every label must lie in [0, K) or equal ``ignore_index``; ``num_classes``
    is the K that the loss was built for, if it was built for one. The range of the labels costs two reductions over
    them: about 0.05 ms for a batch on a CPU; on an accelerator it also waits for the forward pass once per call, which
    buys a message with the value instead of a device-side assertion that kills the process. Training checks the labels
    before they go to the device instead (:func:`labels_checked`).
    """
    if not (isinstance(logits, Tensor) and isinstance(target, Tensor)):
        raise InputError(f"logits and target must be tensors, got {type(logits).__name__} and {type(target).__name__}")
    if logits.dim() != 4 or not logits.is_floating_point():
        raise InputError(
            f"logits must be a float tensor of shape (N, K, H, W), got {logits.dtype} of shape {shape(logits)}"
        )
    if target.dtype not in LABEL_TYPES:
        raise InputError(
            f"target must hold integer labels (int64, shape (N, H, W)), got {target.dtype}; convert it with .long()"
        )
    if target.dim() != 3 or len(target) != len(logits):
        raise InputError(
            f"target must have shape (N, H, W) with the N = {len(logits)} images of the logits of shape "
            f"{shape(logits)}, got {shape(target)}; pass logits and labels of the same images"
        )
    if 0 in (*logits.shape[2:], *target.shape[1:]) and logits.shape[2:] != target.shape[1:]:
        raise InputError(
            f"logits of shape {shape(logits)} cannot be interpolated to a target of shape {shape(target)}, as one of "
            "them holds no pixel; pass both with at least one row and one column"
        )
    if logits.device != target.device:
        raise InputError(
            f"logits are on {logits.device} but target is on {target.device}; move one of them with .to(device)"
        )
    channels = logits.shape[1]
    if channels < 2:
        raise InputError(
            f"logits have K = {channels} class but a segmentation loss needs at least 2; "
            "lift a one-logit binary model to (0, z) with segkit.losses.lift_binary"
        )
    if num_classes is not None and channels != num_classes:
        raise InputError(
            f"logits have {channels} classes but this loss was built for {num_classes} "
            "(its margins or class weights); count labels and build the model with the same label table"
        )
    check_labels(target, num_classes=channels, ignore_index=ignore_index)


def check_labels(target: Tensor, *, num_classes: int, ignore_index: int) -> None:
    """Raise InputError, with the value, for a label outside [0, num_classes) that is not ``ignore_index``."""
    if target.numel() == 0 or torch.compiler.is_compiling() or _checked.get():
        return
    low, high = (int(v) for v in torch.aminmax(target))
    if low >= 0 and high < num_classes:
        return
    if low >= 0 and high == ignore_index:  # void is the largest value: is the next one within the range?
        high = int(torch.where(target == ignore_index, 0, target).max())
        if high < num_classes:
            return
    wrong = target[((target < 0) | (target >= num_classes)) & (target != ignore_index)]
    if wrong.numel():
        values = torch.unique(wrong)
        examples = ", ".join(str(int(v)) for v in values[:5]) + (", ..." if values.numel() > 5 else "")
        raise InputError(
            f"target holds label {examples} ({wrong.numel()} pixels), allowed are 0 to {num_classes - 1} and the "
            f"ignore index {ignore_index}; mend the label table of the data set or the number of classes of the model"
        )


_checked: ContextVar[bool] = ContextVar("checked", default=False)


@contextmanager
def labels_checked(target: Tensor, *, num_classes: int, ignore_index: int) -> Iterator[None]:
    """Check ``target`` while it is on the CPU; within the context no loss asks an accelerator for it."""
    check_labels(target, num_classes=num_classes, ignore_index=ignore_index)
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


def lift_binary(logits: Tensor) -> Tensor:
    """(N,1,H,W) logits z of a one-logit binary model -> the two-class logits (0, z), shape (N,2,H,W)."""
    if logits.dim() != 4 or logits.shape[1] != 1:
        raise InputError(f"lift_binary takes logits of shape (N, 1, H, W), got {shape(logits)}")
    return torch.cat([torch.zeros_like(logits), logits], dim=1)


def settings(loss: nn.Module) -> str:
    """The settings of ``loss`` as text: the ``extra_repr`` of all losses."""
    own = {name: value for name, value in vars(loss).items() if not name.startswith("_") and name != "training"}
    return ", ".join(f"{name}={value!r}" for name, value in own.items())


def shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple (shorter in messages than torch.Size)."""
    return tuple(tensor.shape)
