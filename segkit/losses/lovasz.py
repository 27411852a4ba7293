"""Lovasz-softmax: the convex extension of the Jaccard loss, exactly and with little sorting.

Source: Berman, Triki, Blaschko, "The Lovasz-Softmax loss", CVPR 2018. For class c, sort the errors
e_i = |t_i - p_i(c)| of the pixels, largest first. With G pixels of the class, and f of the class and b of
others standing before pixel i, the Jaccard loss grows at i by

    1 / (G + b)                            where i is of class c
    (G - f) / ((G + b) (G + b + 1))        where it is not

and the loss is the sum of e_i times that growth. The growth of a pixel of another class is 0 once all G
pixels of class c stand before it (f = G). So only the pixels of other classes whose error exceeds the
smallest error within the class have to be sorted at all; the rest cost nothing and get no gradient, in this
and in every other exact implementation. What is left of all classes is sorted at once.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from segkit.errors import check_choice
from segkit.losses.checks import check_inputs, settings
from segkit.losses.pixel_loss import KeptGradient, at_label_size, divides_early
from segkit.losses.tiles import compute_dtype, fill_columns, read_labels


class LovaszSoftmaxLoss(nn.Module):
    """Mean over classes of the Lovasz extension of 1 - IoU, on softmax probabilities.

    ``classes``: "present" averages over the classes that occur, "all" over every class (an absent one costs its
    largest probability). ``per_image``: mean of the losses of the images that have a valid pixel, instead of one
    loss over the whole batch.
    """

    pixel_decomposable = False
    extra_repr = settings

    def __init__(
        self, *, classes: Literal["present", "all"] = "present", per_image: bool = False, ignore_index: int = 255
    ) -> None:
        super().__init__()
        check_choice(classes, "classes", ("present", "all"))
        self.classes = classes
        self.per_image = bool(per_image)
        self.ignore_index = int(ignore_index)

    def forward(self, logits: Tensor, target: Tensor, *, denominator: None = None) -> Tensor:
        """() loss of ``logits`` (N,K,h,w) against ``target`` (N,H,W); 0 if every pixel is ignored."""
        assert denominator is None, "not a sum over pixels: there is nothing to divide by"
        check_inputs(logits, target, ignore_index=self.ignore_index)
        return _LovaszGradient.apply(at_label_size(logits, target), target, self)

    def value_and_gradient(
        self, logits: Tensor, target: Tensor, *, wanted: bool, factor: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return the loss (), and ``factor`` times its gradient where that is ``wanted``, of logits at label size."""
        groups = [slice(n, n + 1) for n in range(len(logits))] if self.per_image else [slice(0, len(logits))]
        groups = [group for group in groups if bool((target[group] != self.ignore_index).any())]
        value = torch.zeros((), dtype=compute_dtype(logits), device=logits.device)
        gradient = torch.zeros_like(logits) if wanted else None
        for group in groups:
            part = probabilities(logits[group], target[group], self.ignore_index)
            loss, slope = lovasz_of_probabilities(part, all_classes=self.classes == "all", wanted=wanted)
            lowest = logits[group].amin(1).masked_fill(target[group] == self.ignore_index, 0).amin()
            value += loss / len(groups) + 0 * lowest  # -inf makes it NaN, as NaN and inf do by themselves
            if gradient is not None and slope is not None:
                # dL/ds = p (v - sum_k p_k v_k) of the slope v = dL/dp
                slope.mul_(part.p)
                slope.sub_(part.p.mul_(slope.sum(1, keepdim=True))).mul_(factor / len(groups))
                gradient[group] = slope.view(gradient[group].shape)
        return value, gradient


class _LovaszGradient(KeptGradient):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, loss: LovaszSoftmaxLoss) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(logits)
        ctx.again = lambda leaf: _LovaszGradient.apply(leaf, target, loss)
        # gradients shrink as 1 / pixels: in half precision that is left to the backward pass
        ctx.divisor = None if divides_early(logits) else target.numel()
        wanted, factor = ctx.needs_input_grad[0], 1.0 if ctx.divisor is None else float(ctx.divisor)
        with torch.autocast(logits.device.type, enabled=False):
            value, ctx.gradient = loss.value_and_gradient(logits, target, wanted=wanted, factor=factor)
        return value


class Probabilities(NamedTuple):
    """Softmax ``p`` (N,K,P), 0 at void pixels, and the valid pixels: ``label`` (V,), their place ``own`` in p (V,)."""

    p: Tensor
    label: Tensor
    own: Tensor


def probabilities(logits: Tensor, target: Tensor, ignore_index: int) -> Probabilities:
    """``Probabilities`` of ``logits`` (N,K,H,W) and ``target`` (N,H,W)."""
    num, num_classes = logits.shape[:2]
    p = torch.softmax(logits.to(compute_dtype(logits)).flatten(2).contiguous(), 1)
    for n in range(num):
        fill_columns(p[n], read_labels(target[n], ignore_index)[1])
    pixels = (target.flatten() != ignore_index).nonzero()[:, 0]
    label = target.flatten()[pixels].long()
    image, at = pixels // p.shape[2], pixels % p.shape[2]
    return Probabilities(p, label, (image * num_classes + label) * p.shape[2] + at)


def lovasz_of_probabilities(part: Probabilities, *, all_classes: bool, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """() Lovasz loss, and its slope (N,K,P) in the probabilities where ``wanted``; at least one valid pixel."""
    p, label, own = part
    flat = p.view(-1)
    size = torch.bincount(label, minlength=p.shape[1])
    own_p = flat.index_select(0, own)
    own_error = (1 - own_p).clamp(min=0)
    least = torch.full_like(p[0, :, 0], torch.inf).scatter_reduce(0, label, own_error, "amin")
    flat.index_fill_(0, own, 0)  # so that only pixels of other classes are found
    other = above(p, least)
    flat.index_copy_(0, own, own_p)

    error = torch.cat([own_error, flat.index_select(0, other)])
    classes = torch.cat([label, other // p.shape[2] % p.shape[1]])
    error, order = sort_errors(classes, error)
    is_own = order < len(label)
    growth = growth_of(torch.bincount(classes, minlength=len(size)), is_own, size, p.dtype)
    count = p.shape[1] if all_classes else (size > 0).sum()
    loss = (growth * error).sum()
    slope = None
    if wanted:
        unsorted = torch.empty_like(growth).index_copy_(0, order, torch.where(is_own, -growth, growth) / count)
        slope = torch.zeros_like(p)
        slope.view(-1).index_copy_(0, own, unsorted[: len(own)]).index_copy_(0, other, unsorted[len(own) :])
    if all_classes and bool((size == 0).any()):
        absent = (size == 0).nonzero()[:, 0]
        highest = p[:, absent].amax((0, 2), keepdim=True)
        loss = loss + highest.sum()
        if slope is not None:
            tied = (p[:, absent] == highest).to(p.dtype)
            slope[:, absent] = tied / tied.sum((0, 2), keepdim=True) / count
    return loss / count, slope


def above(p: Tensor, least: Tensor) -> Tensor:
    """Places (M,) in the flattened ``p`` (N,K,P) where it exceeds ``least`` (K,)."""
    if p.device.type == "cpu":  # numpy compares and collects about four times as fast
        return torch.from_numpy(np.flatnonzero(np.greater(p.numpy(), least.numpy()[:, None])))
    return (p > least[:, None]).flatten().nonzero()[:, 0]


def sort_errors(classes: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """``error`` (M,) sorted by class, then falling, and the indices that sort so; equals keep their order."""
    if error.dtype == torch.float32:
        # floats that are not negative order as their bits do; integers go through a radix sort
        key, order = torch.sort((classes << 32) | (0x7FFFFFFF - error.view(torch.int32).long()), stable=True)
        return (0x7FFFFFFF - (key & 0xFFFFFFFF)).to(torch.int32).view(torch.float32), order
    falling = torch.sort(error, descending=True, stable=True).indices
    order = falling[torch.sort(classes[falling], stable=True).indices]
    return error[order], order


def growth_of(num_entries: Tensor, is_own: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """(M,) growth of the Jaccard loss at each entry, sorted by class and error: the head of this file.

    ``num_entries`` (K,) are the entries of each class, ``size`` (K,) those that are pixels of the class.
    """

    def spread(per_class: Tensor) -> Tensor:
        return torch.repeat_interleave(per_class, num_entries, output_size=len(is_own))

    f = is_own.cumsum(0) - is_own.long() - spread(size.cumsum(0) - size)
    b = torch.arange(len(is_own), device=size.device) - f - spread(num_entries.cumsum(0) - num_entries)
    whole = spread(size)
    union = (whole + b).to(dtype)
    return torch.where(is_own, 1 / union, (whole - f) / (union * (union + 1)))
