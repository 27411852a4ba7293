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

import torch
from torch import Tensor, nn

from segkit.losses.checks import check_choice, check_inputs
from segkit.losses.tiles import compute_dtype


class LovaszSoftmaxLoss(nn.Module):
    """Mean over classes of the Lovasz extension of 1 - IoU, on softmax probabilities.

    ``classes``: "present" averages over the classes that occur, "all" over every class (an absent one costs
    its largest probability). ``per_image``: mean of the losses of the images that have a valid pixel,
    instead of one loss over the whole batch.
    """

    pixel_decomposable = False

    def __init__(self, *, classes: str = "present", per_image: bool = False, ignore_index: int = 255) -> None:
        super().__init__()
        check_choice(classes, "classes", ("present", "all"))
        self.classes = classes
        self.per_image = bool(per_image)
        self.ignore_index = int(ignore_index)

    def forward(self, logits: Tensor, target: Tensor, *, denominator: None = None) -> Tensor:
        """() loss of ``logits`` (N,K,H,W) against ``target`` (N,H,W); 0 if every pixel is ignored."""
        assert denominator is None, "not a sum over pixels: there is nothing to divide by"
        check_inputs(logits, target, ignore_index=self.ignore_index)
        with torch.autocast(logits.device.type, enabled=False):
            scores = logits.to(compute_dtype(logits))
            if not self.per_image:
                return self._pixels(scores, target)[0]
            images = zip(scores, target, strict=True)
            losses, valid = zip(*(self._pixels(s[None], t[None]) for s, t in images), strict=True)
            return torch.stack(losses).sum() / torch.stack(valid).sum().clamp(min=1)

    def _pixels(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and whether there is a valid pixel, for float logits (N,K,H,W) and target (N,H,W)."""
        valid = (target != self.ignore_index).flatten()
        p = logits.movedim(1, 0).flatten(1)
        label = target.flatten().long()
        if not bool(valid.all()):
            p, label = p[:, valid], label[valid]
        if len(label) == 0:
            return 0 * p.sum(), valid.any()
        p = torch.softmax(p, 0)
        return lovasz_of_probabilities(p, label, all_classes=self.classes == "all"), valid.any()

    def extra_repr(self) -> str:
        return f"classes={self.classes!r}, per_image={self.per_image}, ignore_index={self.ignore_index}"


def lovasz_of_probabilities(p: Tensor, label: Tensor, *, all_classes: bool = False) -> Tensor:
    """() Lovasz loss of probabilities ``p`` (K,P) and labels ``label`` (P,) in [0,K), P at least 1."""
    num_classes = len(p)
    size = torch.bincount(label, minlength=num_classes)
    present = size > 0
    with torch.no_grad():
        own = (1 - p.gather(0, label[None])[0]).clamp(min=0)  # error of each pixel in its own class
        least = torch.full_like(p[:, 0], torch.inf).scatter_reduce(0, label, own, "amin")
        keep = p > least[:, None]
        keep.scatter_(0, label[None], False)  # pixels of other classes only; the own ones are all kept, below
        rows, pixels = keep.nonzero(as_tuple=True)
        rows = torch.cat([label, rows])
        pixels = torch.cat([torch.arange(len(label), device=p.device), pixels])
        error = p[rows, pixels]
        error[: len(label)] = own
        order = _order(rows, error, num_own=len(label))
        is_own = order < len(label)
        rows_sorted = rows[order]
        growth = _growth(rows_sorted, is_own, size, p.dtype)
        slope = torch.zeros_like(p)
        slope[rows_sorted, pixels[order]] = torch.where(is_own, -growth, growth)
        value = (growth * error[order]).sum()
    count = num_classes if all_classes else present.sum()
    # value with the slope of a linear function of p: exact, because the growth does not change between ties
    total = value + ((slope * p).sum() - (slope * p).sum().detach())
    if all_classes:
        total = total + torch.where(present, 0, p.amax(1)).sum()
    return total / count


def _order(rows: Tensor, error: Tensor, *, num_own: int) -> Tensor:
    """Indices that sort by class, then by falling error; at equal errors the first ``num_own`` entries lead."""
    if error.dtype == torch.float32:
        # positive floats order as their bits do; the sort is stable
        key = (rows << 32) | (0x7FFFFFFF - error.view(torch.int32).long())
        return torch.sort(key, stable=True).indices
    falling = torch.sort(error, descending=True, stable=True).indices
    return falling[torch.sort(rows[falling], stable=True).indices]


def _growth(rows: Tensor, is_own: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """(M,) growth of the Jaccard loss at each entry, sorted as ``_order`` says: the head of this file."""
    num_entries = torch.bincount(rows, minlength=len(size))
    first = (num_entries.cumsum(0) - num_entries)[rows]
    own_before = is_own.cumsum(0) - is_own.long()
    f = own_before - (size.cumsum(0) - size)[rows]
    b = torch.arange(len(rows), device=rows.device) - first - f
    whole = size[rows]
    union = (whole + b).to(dtype)
    return torch.where(is_own, 1 / union, (whole - f) / (union * (union + 1)))
