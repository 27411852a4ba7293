"""Sums over pixels with a closed-form gradient, tile by tile.

A loss that is a sum over pixels needs one visit per pixel: value and gradient come from the same exponentials, so
autograd would only store and reread what is already known. Here a batch is cut into *blocks* of labels, the logits of
each become a *tile* (K, pixels) that stays in the cache, and a *tile function* does the arithmetic:

    function(s (K,P) float32 or float64, label (P,) int64 in [0,K), work) -> loss (P,), gradient (K,P)

It must not write to ``s``; ``work`` is a ``Workspace`` for its temporaries and its results.

Logits below label resolution are up-sampled block by block and never exist at label resolution as a whole: bilinear
up-sampling is linear and separable, so a block of rows and columns is R X C^T, with R and C the slices of two small
matrices and X the few logits that reach the block, and the gradient of X is R^T G C.

Inside, classes are told apart by arithmetic with masks of 0 and 1 in floating point rather than by boolean masks:
on a CPU the former run at the speed of an addition, the latter about eight times slower.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from segkit.bilinear import spans

Result = TypeVar("Result")
TileFunction = Callable[..., tuple[Tensor, Tensor]]

TILE_ELEMENTS = 512 * 1024
"""Logits per tile on a CPU: 2 MB of float32. Smaller tiles stay in a faster cache but pay more for every call."""

ACCELERATOR_TILE_ELEMENTS = 16 * 1024 * 1024
"""Logits per tile elsewhere: 64 MB of float32, so that launches cost nothing and temporaries little memory."""

GROUP_BLOCKS = 32
"""Blocks of low logits that are enough for all threads: their gradients are held at once."""


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, float32 for everything narrower."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def sum_dtype(logits: Tensor) -> torch.dtype:
    """float64 on a CPU, where it is free; elsewhere the dtype of the computation."""
    return torch.float64 if logits.device.type == "cpu" else compute_dtype(logits)


class Workspace:
    """Buffers for the large temporaries of a tile, by name, reused from tile to tile.

    On a CPU fresh memory costs several times what the arithmetic on it does: every page is mapped, zeroed, unmapped.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}  # flat, and in the shape it had last

    def buffer(self, name: str, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Buffer ``name`` as a contiguous tensor of the shape of ``like``, or of ``shape``, with whatever it holds.

        It has the dtype in which ``like`` is computed, and its device.
        """
        size = like.shape if shape is None else torch.Size(shape)
        flat, shaped = self._buffers.get(name, (None, None))
        if shaped is None or shaped.shape != size:
            if flat is None or flat.numel() < size.numel():
                flat = torch.empty(size.numel(), dtype=compute_dtype(like), device=like.device)
            shaped = flat[: size.numel()].view(size)
            self._buffers[name] = flat, shaped
        return shaped


class Block(NamedTuple):
    """A rectangle of labels in one image, and the logits that reach it; or several images, on an accelerator.

    ``rows`` (H,h) and ``columns`` (W,w) up-sample ``logits`` (K,h,w) to the size of ``target`` (H,W); None where the
    logits have that size. Of M images, ``logits`` are (K,M,h,w) and ``target`` is (M,H,W). ``place`` is the index of
    ``logits`` in the logits (N,K,..) of the batch, see ``in_batch``.
    """

    place: tuple[int | slice, slice, slice, slice]
    logits: Tensor
    target: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None

    def scores(self, void: Tensor | None, work: Workspace) -> Tensor:
        """(K,P) logits at the labels for a tile function: a view where that is possible, else a copy.

        Nothing of a void pixel, nan included, gets in: it becomes (1, 0, ..., 0), a unique maximum, so that it takes
        no path reserved for ties.
        """
        given, dtype = self.logits, compute_dtype(self.logits)
        if self.rows is not None and self.columns is not None:
            copy = work.buffer("logits", given, (len(given), *self.target.shape))
            torch.matmul(self.rows, torch.matmul(given.to(dtype), self.columns.T), out=copy)
        elif void is None and given.dtype == dtype and given[0].is_contiguous():
            return given.flatten(1)
        else:
            copy = work.buffer("logits", given).copy_(given)
        s = copy.flatten(1)
        fill_columns(s, void)
        fill_columns(s[0], void, 1.0)
        return s

    def in_batch(self, values: Tensor) -> Tensor:
        """``values``, as many as ``logits``, in the shape that the batch has at ``place``: (K,h,w) or (M,K,h,w)."""
        values = values.view(self.logits.shape)
        return values if values.ndim == 3 else values.transpose(0, 1)

    def low_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of the logits, as ``in_batch``, from that of the up-sampled ones, (K,P)."""
        assert self.rows is not None
        assert self.columns is not None
        full = gradient.view(len(gradient), *self.target.shape)
        return self.in_batch(torch.matmul(torch.matmul(self.rows.T, full), self.columns))


def cut(logits: Tensor, target: Tensor) -> Iterator[list[Block]]:
    """The blocks of ``logits`` (N,K,h,w) and ``target`` (N,H,W), in groups to be computed one after the other.

    At label size all blocks are one group. Else blocks overlap by the logits that reach both, and the gradients of a
    group are held until they are added up: it has the blocks of a few images, enough for all threads, or an image that
    is one block, whose operations are split instead.
    """
    count = images_per_tile(logits, target)
    images = [n if count == 1 else slice(n, n + count) for n in range(0, len(logits), count)]
    if logits.shape[2:] != target.shape[1:]:
        group: list[Block] = []
        for n in images:
            blocks = list(_low_blocks(logits, target, n))
            group += blocks
            if len(blocks) == 1 or len(group) >= GROUP_BLOCKS or n == images[-1]:
                yield group
                group = []
        return
    num_classes, height, width = logits.shape[1:]
    most = max(1, pixels_per_tile(num_classes, logits.device) // max(1, width))
    num_rows = max(1, math.ceil(height / math.ceil(height / most))) if height else 1  # bands alike, for the threads
    bands = [slice(top, min(top + num_rows, height)) for top in range(0, height, num_rows)]
    every = slice(None)
    places = [(n, every, band, every) for n in images for band in bands]
    yield [Block(place, _classes_first(logits[place]), target[place[0], place[2]]) for place in places]


def _classes_first(logits: Tensor) -> Tensor:
    """(K,h,w) as it is, (M,K,h,w) as (K,M,h,w)."""
    return logits if logits.ndim == 3 else logits.transpose(0, 1)


def _low_blocks(logits: Tensor, target: Tensor, n: int | slice) -> Iterator[Block]:
    """The blocks of the image or images ``n``: nearly square, so that few logits are read twice."""
    height, width = target.shape[1:]
    pixels = pixels_per_tile(logits.shape[1], logits.device)
    num_rows = min(height, max(1, math.isqrt(pixels)))
    num_columns = min(width, max(1, pixels // num_rows))
    num_rows = min(height, max(1, pixels // num_columns))
    where = logits.device, compute_dtype(logits)
    for rows in spans(logits.shape[2], height, num_rows, *where):
        for columns in spans(logits.shape[3], width, num_columns, *where):
            place = (n, slice(None), slice(rows.first, rows.last), slice(columns.first, columns.last))
            target_block = target[n, rows.out, columns.out]
            yield Block(place, _classes_first(logits[place]), target_block, rows.matrix, columns.matrix)


def images_per_tile(logits: Tensor, target: Tensor) -> int:
    """How many whole images make a tile: one on a CPU, and as many as fit elsewhere, where every call has its price."""
    pixels = pixels_per_tile(logits.shape[1], logits.device)
    return 1 if logits.device.type == "cpu" else max(1, pixels // max(1, target.shape[1:].numel()))


def pixels_per_tile(num_classes: int, device: torch.device) -> int:
    """P: how many pixels of ``num_classes`` logits make a tile."""
    return max(1, (TILE_ELEMENTS if device.type == "cpu" else ACCELERATOR_TILE_ELEMENTS) // num_classes)


class Labels(NamedTuple):
    """``classes`` (P,) int64, 0 where void, and which pixels are void: None if none is.

    Void pixels are given as indices on a CPU and as a boolean mask elsewhere (indices would wait for the device).
    """

    classes: Tensor
    void: Tensor | None


def read_labels(target: Tensor, ignore_index: int) -> Labels:
    """The labels of ``target`` (..), flattened."""
    label = target.reshape(-1).long()
    void = label == ignore_index
    if label.device.type != "cpu":
        return Labels(label.masked_fill(void, 0), void)
    indices = void.nonzero()[:, 0]
    if len(indices) == 0:
        return Labels(label, None)
    return Labels(label.index_fill(0, indices, 0), indices)


def fill_columns(matrix: Tensor, void: Tensor | None, value: float = 0.0) -> Tensor:
    """``matrix`` (.., P) with ``value`` written into the void columns, in place; see ``Labels``."""
    if void is None:
        return matrix
    if void.dtype == torch.bool:
        return matrix.masked_fill_(void, value)
    return matrix.index_fill_(-1, void, value)


class GradientSum:
    """The gradient of logits (N,K,h,w), put together from that of blocks.

    Below label size blocks overlap, and their parts are added up in float32, or float64, whatever the dtype of the
    logits is: in the order of the blocks, so that no bit depends on the threads.
    """

    def __init__(self, logits: Tensor, target: Tensor) -> None:
        is_low = logits.shape[2:] != target.shape[1:]
        self._dtype = logits.dtype
        self._sum = torch.zeros_like(logits, dtype=compute_dtype(logits)) if is_low else torch.empty_like(logits)

    def write(self, block: Block, gradient: Tensor, factor: Tensor | float = 1.0) -> Tensor | None:
        """``factor`` times the ``gradient`` (K,P) of a block: written here at label size, else returned for ``add``."""
        if block.rows is not None:
            return block.low_gradient(gradient.mul_(factor))
        torch.mul(block.in_batch(gradient), factor, out=self._sum[block.place])
        return None

    def add(self, blocks: list[Block], parts: list[Tensor | None]) -> None:
        """Add what ``write`` returned for ``blocks``, in their order."""
        for block, part in zip(blocks, parts, strict=True):
            if part is not None:
                self._sum[block.place] += part

    def result(self) -> Tensor:
        """The gradient in the dtype of the logits."""
        return self._sum.to(self._dtype)


Write = Callable[[Block, Labels, Tensor, Tensor], Result]


def run(
    blocks: list[Block], rule: TileFunction, write: Write[Result], *, ignore_index: int, split: bool = True
) -> list[Result]:
    """``write(block, labels, *rule(tile))`` of every block, in their order; void pixels have loss and gradient 0.

    A tile is some forty small operations. Splitting each of them between the threads of torch would cost as many
    barriers, at every one of which a thread that another process (a data worker) keeps from its core holds up all
    others. So on a CPU whole tiles are handed to as many Python threads as torch has, whose operations are not split
    further; torch releases the interpreter lock while it computes. With ``split`` False the calling thread works
    alone. ``write`` is called in these threads, for several blocks at once.
    """
    if not blocks:
        return []
    device = blocks[0].logits.device
    results: list[Result | None] = [None] * len(blocks)
    queue = iter(range(len(blocks)))  # next() of it is atomic

    def thread() -> None:
        work = Workspace()
        # properties of each thread; autocast would run matrix products in half precision
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for i in queue:
                results[i] = tile(blocks[i], rule, write, ignore_index, work)

    threads = min(torch.get_num_threads(), len(blocks)) if split and device.type == "cpu" else 1
    if threads == 1:
        thread()
        return results  # type: ignore[return-value]
    futures = [_pool(torch.get_num_threads()).submit(thread) for _ in range(threads)]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        for _ in queue:  # where one has failed, the others begin no further tile, and are at their end, too
            pass
        wait(futures)
        # a thread of the pool has set the number for itself and for threads yet to come; here it still stands
        torch.set_num_threads(torch.get_num_threads())
    for future in futures:
        future.result()
    return results  # type: ignore[return-value]


def tile(block: Block, rule: TileFunction, write: Write[Result], ignore_index: int, work: Workspace) -> Result:
    """``write(block, labels, loss (P,), gradient (K,P))`` of one block; see ``run``.

    A -inf logit that the rule does not feel makes the losses NaN, as NaN and inf do by themselves.
    """
    labels = read_labels(block.target, ignore_index)
    scores = block.scores(labels.void, work)
    lowest = scores.amin()  # read first, while they are in the cache
    loss, gradient = rule(scores, labels.classes, work)
    loss += 0 * lowest
    return write(block, labels, fill_columns(loss, labels.void), fill_columns(gradient, labels.void))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "segkit-tiles", initializer=_compute_alone)


def _compute_alone() -> None:
    """Keep torch from splitting operations of the calling thread."""
    torch.get_num_threads()  # the first call in a thread takes over the number of the process: it must not come later
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_pool.cache_clear)
