"""Gradient checkpointing: blocks whose activations are computed again in the backward pass instead of kept.

T. Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016. A block keeps its input, and outputs of its
convolutions and matrix products as a policy says:

    light   all of them: norms, activations and gates are computed again
    mixed   those that are expensive to compute: deep blocks as `light`, blocks of high resolution as a whole
    True    convolutions that are expensive to compute and small to keep

Loss, gradients, buffers and random numbers are those of the plain network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from segkit.errors import InputError
from segkit.models.any_size import mix_in

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
DEAR_OUTPUT = 512
"""Multiplications for one output element, from which on an output is expensive to compute."""
CONVOLUTION = torch.ops.aten.convolution.default
PRODUCTS = tuple(getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm"))
KEPT_WHOLE = ("DeepLabV3Decoder", "DeepLabV3PlusDecoder")
"""Classes of segmentation_models_pytorch that are left alone. What they keep is needed first in the backward pass, and
would be computed again at once: a twentieth of a step's time, for a fortieth of its memory."""
RANDOM_LAYERS = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d)


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
    return len(blocks)


def _find_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost blocks below ``module``, in order."""
    for child in module.children():
        if type(child).__name__ in KEPT_WHOLE:
            continue
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
        elif is_series or type(member).__name__.endswith("Stage"):  # timm's name for a series of blocks
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
        compiling = torch.compiler.is_compiling()
        # A caller may go on to extend a list that it handed in, as densely connected networks do.
        args = tuple(list(value) if isinstance(value, list) else value for value in args)
        # torch.compile traces buffers as values of the graph and writes them back once; it takes torch's own contexts.
        keeps = POLICIES[self.policy]
        contexts: Any = create_selective_checkpoint_contexts if compiling else _contexts
        bound = functools.partial(contexts, keeps) if compiling else functools.partial(contexts, keeps, self)
        versions = [] if compiling else _versions(args)
        output = checkpoint(
            super().forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=_is_random(self, len(args) + len(kwargs)),
            context_fn=bound,
            **kwargs,
        )
        if not compiling and versions != _versions(args):
            raise InputError(
                f"a block of class {type(self).__name__} changes its input in place, so that it cannot be computed "
                "again: set grad_checkpointing=false for this model"
            )
        return output


def _versions(args: tuple[Any, ...]) -> list[int]:
    """Return how often each tensor among ``args`` was written to."""
    return [value._version for value in args if isinstance(value, torch.Tensor)]


def _is_random(block: nn.Module, num_arguments: int) -> bool:
    """Return True if the forward pass of ``block`` may draw random numbers: dropout in any of its forms, in training.

    Saving and restoring the generators' states costs a little at every block, on a GPU a synchronisation, so blocks
    that cannot draw go without it. A rate may also be an attribute that a functional dropout uses, or come as a further
    argument of the call (as in the EfficientNet of segmentation_models_pytorch).
    """
    if not block.training:
        return False
    if num_arguments > 1:
        return True
    for module in block.modules():
        if isinstance(module, RANDOM_LAYERS) or "drop" in type(module).__name__.lower():
            return True
        if any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items()):
            return True
    return False


def _contexts(keeps: Policy, block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return contexts for the first computation and for the second.

    In the second, running statistics stay as they are, and outputs that the first one kept are not computed again.
    """
    if keeps is _whole and not any(isinstance(x, nn.Conv2d) and _is_dear_and_small(x.weight) for x in block.modules()):
        return nullcontext(), _frozen_statistics(block, nullcontext())
    first, second = create_selective_checkpoint_contexts(keeps)
    return first, _frozen_statistics(block, second)


Policy = Callable[..., CheckpointPolicy]


def _decision(keeps: bool) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


def _light(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return _decision(operation is CONVOLUTION or operation in PRODUCTS)


def _mixed(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation is CONVOLUTION:
        return _decision(args[1].shape[1:].numel() >= DEAR_OUTPUT)
    return _decision(operation in PRODUCTS and args[-1].shape[-2] >= DEAR_OUTPUT)


def _whole(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return _decision(operation is CONVOLUTION and _is_dear_and_small(args[1]))


def _is_dear_and_small(weight: torch.Tensor) -> bool:
    """Return True for the weight (outputs, inputs per group, height, width) of a convolution with an output to keep.

    Such an output is expensive to compute and small to keep: an element costs one multiplication for each input channel
    and each place of the kernel, and there are fewer channels than in the input. The narrowing 1x1 convolution of a
    wide bottleneck is nearly half of its work, and the output a tenth of what the bottleneck would keep.
    """
    return weight.shape[0] < weight.shape[1] and weight.shape[1:].numel() >= DEAR_OUTPUT


POLICIES: dict[bool | str, Policy] = {"light": _light, "mixed": _mixed, True: _whole}
"""Less memory and more time from one to the next."""


@contextmanager
def _frozen_statistics(block: nn.Module, inner: AbstractContextManager) -> Iterator[None]:
    """Enter ``inner``; running statistics and counters of ``block`` keep their values, batch statistics are used.

    The layers must save the same tensors as in the first computation, so the running statistics are not taken away;
    with a momentum of 0 they are written with the values that they have.
    """
    norms = [
        module
        for module in block.modules()
        if isinstance(module, _NormBase) and module.training and module.running_mean is not None
    ]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
            norm.num_batches_tracked = None
        with inner:
            yield
    finally:
        for norm, (momentum, counter) in zip(norms, saved, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = counter
