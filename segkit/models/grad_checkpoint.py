"""Gradient checkpointing: blocks whose activations are computed again in the backward pass instead of kept.

T. Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016. What is kept are the inputs of blocks, or of two
in a row, spatial means, and outputs of convolutions and matrix products that take many multiplications for a value:

    light   128 or more: norms, activations, gates and depthwise convolutions are computed again
    mixed   512 or more: more convolutions, those of high resolution
    True    1024 or more

Loss, gradients, buffers and random numbers are those of the plain network.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from segkit.errors import InputError
from segkit.models import recompute
from segkit.models.any_size import mix_in

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
POLICIES: dict[bool | str, int] = {"light": 128, "mixed": 512, True: 1024}
"""Multiplications for one value of an output that is kept: less memory and more time from one to the next."""
SERIES = 2
"""Blocks in a row that are one checkpoint. More would keep less, but all that they compute again is there at once."""

_series = threading.local()
"""``is_running``: blocks are called by a checkpoint that has several of them."""


def enable_grad_checkpointing(model: nn.Module, policy: bool | str = True) -> int:
    """Recompute the blocks of ``model`` in the backward pass, in place; returns the number of blocks.

    ``policy``: one of :data:`POLICIES`, what a block keeps beside its input.

    A model may list its blocks itself with a method ``checkpoint_blocks()``. Otherwise they are found by structure: the
    composite members of the sequences and lists that hold a network's stages (residual blocks, the branches of a
    decoder, transformer blocks), and sequences of plain layers that hold a convolution.

    The keys and values of the state dict stay as they are. Running statistics are updated once per step. InputError if
    ``model`` has no such block, or if there is no such policy.
    """
    if policy not in POLICIES:
        raise InputError(f"grad_checkpointing is {policy!r}, but must be light, mixed or true: set it to light")
    listed = (getattr(module, "checkpoint_blocks", None) for module in model.modules())
    own = next((method for method in listed if callable(method)), None)
    blocks = [block for block in (_find_blocks(model) if own is None else own()) if not isinstance(block, Checkpointed)]
    if not blocks:
        raise InputError(
            f"{type(model).__name__} has no blocks to recompute (or they are recomputed already): set "
            "grad_checkpointing=false"
        )
    for block in blocks:
        for layer in block.modules():  # none may write to its input, which may be an output that is kept
            if getattr(layer, "inplace", False) is True:
                vars(layer).update(inplace=False)
        mix_in(Checkpointed, block)
        vars(block).update(policy=policy)
    for module in list(model.modules()):
        is_series = (
            isinstance(module, nn.Sequential)
            and len(module) > 1
            and all(isinstance(block, Checkpointed) for block in module)
        )
        if is_series and type(module).forward is nn.Sequential.forward:
            mix_in(Series, module)
    return len(blocks)


def _find_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost blocks below ``module``, in order."""
    for child in module.children():
        if _is_unit(child):
            yield child
        elif isinstance(child, CONTAINERS):
            yield from _members(child)
        else:
            yield from _find_blocks(child)


def _members(container: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks among the members of ``container``, and those of members that are series of blocks."""
    for member in container.children():
        is_series = isinstance(member, CONTAINERS) and not _is_plain(member)
        if _is_unit(member):
            yield member
        elif is_series or type(member).__name__.endswith(("Stage", "ASPP")):  # names of those that hold units or blocks
            yield from _members(member)
        elif any(True for _ in member.children()) and any(True for _ in member.parameters()):
            yield member


def _is_plain(module: nn.Module) -> bool:
    """Return True for an nn.Sequential of layers that have no layers inside."""
    return isinstance(module, nn.Sequential) and all(not list(layer.children()) for layer in module)


def _is_unit(module: nn.Module) -> bool:
    """Return True for an nn.Sequential such as (convolution, norm, activation); the convolution may be separable."""
    if not isinstance(module, nn.Sequential):
        return False
    layers = list(module)
    leaves = [layer for layer in layers if not list(layer.children())]
    has_weights = any(True for layer in leaves for _ in layer.parameters())
    has_convolution = any(isinstance(layer, nn.Conv2d) for layer in module.modules())
    return has_weights and has_convolution and all(layer in leaves or _is_plain(layer) for layer in layers)


class Checkpointed(nn.Module):
    """Mixin in front of a block's class: its forward pass is a checkpoint while gradients are recorded."""

    policy: bool | str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        if not torch.compiler.is_compiling() and getattr(_series, "is_running", False):
            return super().forward(*args, **kwargs)
        return _checkpoint([self], super().forward, *args, **kwargs)


class Series(nn.Sequential):
    """Mixin in front of an nn.Sequential of blocks: two in a row are one checkpoint, so that one input less is kept."""

    def forward(self, x: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        for first in range(0, len(self), SERIES):
            blocks = list(self)[first : first + SERIES]
            x = _checkpoint(blocks, functools.partial(_run, blocks), x)
        return x


def _run(blocks: list[nn.Module], x: Any) -> Any:
    """The output of ``blocks`` in a row, none of which is a checkpoint here."""
    _series.is_running = True
    try:
        for block in blocks:
            x = block(x)
        return x
    finally:
        _series.is_running = False


def _checkpoint(blocks: list[Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, the output of ``blocks``, computed again in the backward pass."""
    least = POLICIES[blocks[0].policy]
    # A caller may go on to extend a list that it handed in, as densely connected networks do.
    args = tuple(list(value) if isinstance(value, list) else value for value in args)
    if torch.compiler.is_compiling():
        contexts = functools.partial(recompute.contexts_of_torch, least)
        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)
    before = recompute.versions(args)
    output = checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # what is drawn is kept
        context_fn=functools.partial(recompute.contexts, least, blocks),
        **kwargs,
    )
    if before != recompute.versions(args):
        raise InputError(
            f"a block of class {type(blocks[0]).__name__} changes its input in place, so that it cannot be computed "
            "again: set grad_checkpointing=false for this model"
        )
    return output
