"""What a checkpoint keeps of its first computation, and how its second one uses it.

Both run under a dispatch mode, which sees every operation below autograd. Kept are

    outputs of convolutions and matrix products of at least so many multiplications for a value, and means,
    everything that is drawn at random, so that nothing is drawn again,
    on a CPU, mean and deviation of batch norms in training: the second time they only scale and shift.

The second time these are taken in the order of the first, and all else is computed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from segkit.errors import InputError

BERNOULLI = torch.ops.aten.bernoulli_.float
BATCH_NORM = torch.ops.aten.native_batch_norm.default
CONVOLUTION = torch.ops.aten.convolution.default
MEAN = torch.ops.aten.mean.dim
PRODUCTS = tuple(getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm"))
RANDOM = torch.Tag.nondeterministic_seeded


def contexts(least: int, blocks: list[nn.Module]) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts for the first computation of ``blocks`` and for the second, in which running statistics stay."""
    kept: list[_Kept | None] = []
    return _Keep(least, kept), _Recall(least, kept, blocks)


def contexts_of_torch(least: int) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Those of torch, which torch.compile traces. It writes running statistics back once, and draws the same again."""

    def decide(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if _is_dear(least, operation, args) else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(decide)


def versions(values: Any) -> list[int]:
    """How often each tensor in ``values`` was written to."""
    return [value._version for value in tree_leaves(values) if isinstance(value, Tensor)]


def _is_dear(least: int, operation: Any, args: Any) -> bool:
    """True for a mean, and for an operation of ``least`` multiplications for a value or more."""
    if operation is CONVOLUTION:
        return args[1].shape[1:].numel() >= least
    return operation is MEAN or (operation in PRODUCTS and args[-1].shape[-2] >= least)


def _has_statistics(operation: Any, args: Any) -> bool:
    """True for a batch norm on a CPU that takes statistics of its batch, in at least float32."""
    if operation is not BATCH_NORM or not args[5] or args[1] is None:
        return False
    return args[1].dtype in (torch.float32, torch.float64) and args[1].device.type == "cpu"


def _alias(value: Tensor) -> Tensor:
    """``value`` without its history, but with its count of writes, which views made in a dispatch mode do not share."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return value.detach()


def _written(operation: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Those arguments of ``operation`` that it writes to."""
    specs = operation._schema.arguments
    given = dict(zip((spec.name for spec in specs), args, strict=False)) | kwargs
    return [given[spec.name] for spec in specs if spec.alias_info is not None and spec.alias_info.is_write]


class _Kept(NamedTuple):
    """What is kept of an operation: what it wrote into arguments, and its result; None if that is one of these."""

    operation: Any
    result: Any
    written: tuple[Tensor, ...]
    versions: list[int]


class _Keep(TorchDispatchMode):
    """Puts into the list ``kept`` what the head of this file says."""

    def __init__(self, least: int, kept: list[_Kept | None]) -> None:
        super().__init__()
        self.least, self.kept = least, kept

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if _has_statistics(operation, args):
            self._note(operation, result[1:])
        elif RANDOM in operation.tags:
            written = _written(operation, args, kwargs)
            drawn = [value.bool() if operation is BERNOULLI else value.clone() for value in written]
            is_numbers = isinstance(result, Tensor)  # which a mask is made of, often in place
            kept = None if written and result is written[0] else result.clone() if is_numbers else result
            self._note(operation, kept, drawn)
        elif _is_dear(self.least, operation, args):  # global pooling sets the strides of its mean, in place
            self._note(operation, result.clone() if operation is MEAN else result)
        return result

    def _note(self, operation: Any, result: Any, written: Iterable[Tensor] = ()) -> None:
        result = tree_map_only(Tensor, _alias, result)
        self.kept.append(_Kept(operation, result, tuple(written), versions(result)))


class _Recall(TorchDispatchMode):
    """Takes from ``kept`` what :class:`_Keep` put there."""

    def __init__(self, least: int, kept: list[_Kept | None], blocks: list[nn.Module]) -> None:
        super().__init__()
        self.least, self.kept, self.blocks = least, kept, blocks

    def __enter__(self) -> Any:
        self.number = 0
        self.frozen = _frozen_statistics(self.blocks)
        self.frozen.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.frozen.__exit__(*error)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _has_statistics(operation, args):
            x, weight, bias = args[:3]
            mean, scale = self._next(operation).result  # a variance of 1 leaves the factor as it is, to the last bit
            output = operation(x, weight * scale, bias, mean, torch.ones_like(mean), False, 0.0, 0.0)[0]
            return output, mean, scale
        if RANDOM in operation.tags:
            noted, written = self._next(operation), _written(operation, args, kwargs)
            for value, drawn in zip(written, noted.written, strict=True):
                value.copy_(drawn)
            return written[0] if noted.result is None else noted.result
        if _is_dear(self.least, operation, args):
            return self._next(operation).result
        return operation(*args, **kwargs)

    def _next(self, operation: Any) -> _Kept:
        noted = self.kept[self.number] if self.number < len(self.kept) else None
        if noted is None or noted.operation is not operation:
            first = noted.operation if noted else "nothing"
            raise InputError(
                f"a block computes something else the second time ({operation} where {first} was), "
                "or its gradient is wanted twice: set grad_checkpointing=false for this model"
            )
        if noted.versions != versions(noted.result):
            raise InputError(
                f"a block changes the output of {operation} in place, so that it cannot be kept: set "
                "grad_checkpointing=false for this model"
            )
        self.kept[self.number] = None
        self.number += 1
        return noted


@contextmanager
def _frozen_statistics(blocks: list[nn.Module]) -> Iterator[None]:
    """Running statistics and counters of ``blocks`` keep their values in this context; batch statistics are used.

    The layers must save the same tensors as in the first computation, so the running statistics are not taken away;
    with a momentum of 0 they are written with the values that they have.
    """
    norms = [
        module
        for block in blocks
        for module in block.modules()
        if isinstance(module, _NormBase) and module.training and module.running_mean is not None
    ]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
            norm.num_batches_tracked = None
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, saved, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = counter
