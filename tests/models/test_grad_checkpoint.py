"""Gradient checkpointing: the same loss, gradients, buffers and keys; less kept for the backward pass."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segkit.models import COPLENet, Segmenter, deeplabv3plus, enable_grad_checkpointing, smp_model


def coplenet(norm: str) -> nn.Module:
    return COPLENet(3, 4, feature_channels=(8, 16, 32, 64, 128), norm=norm)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "coplenet batch": lambda: coplenet("batch"),
    "coplenet group": lambda: coplenet("group"),
    "tiny": lambda: deeplabv3plus(
        "tu-regnetx_002", 4, encoder_weights="none", output_stride=16, decoder_channels=32, atrous_rates=(1, 2, 3)
    ),
}
SLOW_MODELS: dict[str, Callable[[], nn.Module]] = {
    "se-resnext": lambda: deeplabv3plus("se_resnext50_32x4d", 4, encoder_weights="none", decoder_channels=32),
    "lite0": lambda: deeplabv3plus("tu-tf_efficientnet_lite0", 4, encoder_weights="none", output_stride=16),
    "dense list arguments": lambda: smp_model("FPN", "densenet121", 4, encoder_weights="none"),
    "functional dropout": lambda: smp_model("Unet", "efficientnet-b0", 4, encoder_weights="none"),
    "stages of timm": lambda: smp_model("Unet", "tu-resnetv2_50", 4, encoder_weights="none"),
    "transformer": lambda: smp_model("Segformer", "mit_b0", 4, encoder_weights="none"),
}


def step(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Loss of one training step; the random numbers of dropout are the same at every call."""
    torch.manual_seed(7)
    target = torch.arange(images.shape[0] * 9).reshape(images.shape[0], 3, 3) % 4
    logits = F.adaptive_avg_pool2d(model(images).float(), 3)
    loss = F.cross_entropy(logits, target)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_MODELS)])
def test_same_loss_gradients_buffers_and_keys(name: str) -> None:
    torch.manual_seed(0)
    plain = (MODELS | SLOW_MODELS)[name]()
    wrapped = copy.deepcopy(plain)
    keys = list(plain.state_dict())
    assert enable_grad_checkpointing(wrapped) >= 10
    assert list(wrapped.state_dict()) == keys
    images = torch.randn(2, 3, 32, 32) if name in SLOW_MODELS else torch.randn(2, 3, 32, 48)
    for _ in range(2):  # the second step would show running statistics that were updated twice in the first
        assert torch.equal(step(plain, images), step(wrapped, images))
    gradients = {key: value.grad for key, value in plain.named_parameters()}
    for key, value in wrapped.named_parameters():
        if value.grad is None:
            assert gradients[key] is None
        else:
            torch.testing.assert_close(value.grad, gradients[key], rtol=1e-6, atol=1e-9, msg=key)
    for key, value in wrapped.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key


@pytest.mark.parametrize("policy", ["light", "mixed", True])
@pytest.mark.parametrize("name", ["tiny", "coplenet batch", "attention"])
def test_several_steps_in_float64(name: str, policy: bool | str) -> None:
    """Loss, gradients, weights and buffers of three updates are those without checkpointing."""
    torch.manual_seed(0)
    plain = (Attention() if name == "attention" else MODELS[name]()).double()
    wrapped = copy.deepcopy(plain)
    enable_grad_checkpointing(wrapped, policy)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (plain, wrapped)]
    for seed in range(3):
        images = torch.randn(2, 3, 32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        losses = []
        for model, optimizer in zip((plain, wrapped), optimizers, strict=True):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            losses.append(model(images).square().mean())
            losses[-1].backward()
            optimizer.step()
        assert torch.equal(*losses)
        for (key, one), other in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=1e-13, msg=key)
    for (key, one), other in zip(plain.state_dict().items(), wrapped.state_dict().values(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-13, msg=key)


@pytest.mark.parametrize("name", ["tiny", "coplenet batch"])
@pytest.mark.parametrize(("policy", "least"), [("light", 128), ("mixed", 512), (True, 1024)])
def test_convolutions_that_are_computed_again(policy: bool | str, least: int, name: str) -> None:
    """Those of fewer multiplications for a value of the output; a few are not needed again, or not in a block."""
    torch.manual_seed(0)
    model = MODELS[name]()
    enable_grad_checkpointing(model, policy)
    with ConvolutionCounter() as counter:
        loss = model(torch.randn(2, 3, 32, 48)).square().mean()
        forward = dict(counter.calls)
        loss.backward()
    again = {shape for shape, number in counter.calls.items() if number > forward[shape]}
    cheap = {shape for shape in forward if math.prod(shape[1:]) < least}
    assert again <= cheap
    assert len(again) > 0.7 * len(cheap)


class Token(nn.Module):
    """A block of a transformer: matrix products, softmax and a norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(F.gelu((q @ k.mT).softmax(-1) @ v))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 128, 8, stride=8)
        self.blocks = nn.ModuleList([Token(128), Token(128)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return x


class ProductCounter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in {torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("policy", "kept"), [("light", True), (True, False)])
def test_matrix_products_are_kept_by_light(policy: bool | str, kept: bool) -> None:
    """Two blocks of two linear layers and two products; the backward pass of a product is two, of a layer `mm`.

    The product with the values sums over 24 tokens only, so that `light` computes it again, too.
    """
    model = Attention()
    enable_grad_checkpointing(model, policy)
    with ProductCounter() as counter:
        loss = model(torch.randn(2, 3, 32, 48)).square().mean()
        assert counter.count == 2 * (2 + 2)
        loss.backward()
    backward = counter.count - 8
    assert backward == (8 + 2 if kept else 8 + 8 - 2)  # what follows the last product of a block is not needed again


class Block(nn.Module):
    """A residual block with everything that a second computation could get wrong."""

    def __init__(self, channels: int, *, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels, momentum=momentum)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.dropout(F.relu(self.norm(self.conv(x))))


class Stage(nn.Sequential):
    """A sequence that is made in a way of its own."""

    def __init__(self, channels: int, depth: int, **options: float | None) -> None:
        super().__init__(*(Block(channels, **options) for _ in range(depth)))


def stack(num_blocks: int = 3, **options: float | None) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.ModuleDict({"stage": Stage(8, num_blocks, **options)})["stage"],
    )


def test_blocks_are_computed_twice_and_count_their_batches_once() -> None:
    model = stack()
    assert enable_grad_checkpointing(model) == 3
    step(model, torch.randn(2, 3, 8, 8))
    for block in model[1]:
        assert block.calls == 2
        assert block.norm.num_batches_tracked.item() == 1
        assert block.norm.momentum == 0.1


def test_cumulative_average_of_batch_norm() -> None:
    """``momentum=None`` divides by the counter, so a counter that rose twice would show."""
    torch.manual_seed(0)
    plain = stack(momentum=None)
    wrapped = copy.deepcopy(plain)
    enable_grad_checkpointing(wrapped)
    for seed in range(3):
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        step(plain, images)
        step(wrapped, images)
    for key, value in wrapped.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key


def test_no_recomputation_without_gradients() -> None:
    model = stack()
    enable_grad_checkpointing(model)
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, 8, 8))
    assert [block.calls for block in model[1]] == [1, 1, 1]


def test_copy_does_not_share_weights() -> None:
    """A moving average of the weights is a deep copy; its blocks must compute with its own weights."""
    model = stack().eval()
    enable_grad_checkpointing(model)
    clone = copy.deepcopy(model)
    images = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        for value in clone.parameters():
            value.zero_()
        assert clone(images).abs().sum() == 0
        assert model(images).abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = coplenet("batch")
    wrapped = copy.deepcopy(plain)
    enable_grad_checkpointing(wrapped)
    images = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(step(plain, images), step(wrapped, images))
    for key, value in wrapped.named_parameters():
        torch.testing.assert_close(value.grad, dict(plain.named_parameters())[key].grad, rtol=1e-6, atol=1e-9)


class LiveStorages(TorchDispatchMode):
    """Notes every storage that is made while the mode is on; ``num_bytes`` are those that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def num_bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def kept_bytes(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes that the forward pass of ``model`` keeps for the backward pass."""
    with LiveStorages() as live:
        logits = model(images)
    for value in (*model.parameters(), *model.buffers(), images):  # operations may return views of them
        live.made.pop(value.untyped_storage()._cdata, None)
    kept = live.num_bytes()
    del logits
    return kept


@pytest.mark.parametrize(
    ("name", "policy", "share"),
    [
        ("coplenet batch", "light", 0.75),
        ("coplenet batch", True, 0.45),
        ("tiny", "light", 0.75),
        ("tiny", True, 0.4),
        pytest.param("se-resnext", True, 0.4, marks=pytest.mark.slow),
    ],
)
def test_keeps_less_for_the_backward_pass(name: str, policy: bool | str, share: float) -> None:
    torch.manual_seed(0)
    model = (MODELS | SLOW_MODELS)[name]()
    images = torch.randn(2, 3, 64, 64)
    whole = kept_bytes(model, images)
    enable_grad_checkpointing(model, policy)
    assert kept_bytes(model, images) < share * whole


@pytest.mark.parametrize("policy", ["light", True])
def test_compiled(policy: bool | str) -> None:
    """Under torch.compile: same loss, gradients and running statistics, without a break of the graph."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(*(Residual(8) for _ in range(3))))
    wrapped = copy.deepcopy(plain)
    enable_grad_checkpointing(wrapped, policy)
    images = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, about its internals
        compiled = torch.compile(wrapped, backend="aot_eager_decomp_partition", fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(step(plain, images), step(compiled, images), rtol=1e-5, atol=1e-6)
    for key, value in wrapped.named_parameters():
        torch.testing.assert_close(value.grad, dict(plain.named_parameters())[key].grad, rtol=1e-4, atol=1e-6)
    for key, value in wrapped.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-5, atol=1e-6, msg=key)


def test_distributed(tmp_path: Path) -> None:
    """Wrapped by DistributedDataParallel (one process): same loss, gradients and running statistics."""
    torch.manual_seed(0)
    plain = stack()
    wrapped = copy.deepcopy(plain)
    enable_grad_checkpointing(wrapped)
    images = torch.randn(2, 3, 8, 8)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(wrapped)
        assert torch.equal(step(plain, images), step(parallel, images))
    finally:
        torch.distributed.destroy_process_group()
    for key, value in wrapped.named_parameters():
        torch.testing.assert_close(value.grad, dict(plain.named_parameters())[key].grad, rtol=1e-6, atol=1e-9)
    for key, value in wrapped.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(self.norm(self.conv(x)))


def test_segmenter_around_a_network_that_lists_its_blocks() -> None:
    model = Segmenter(coplenet("group"))
    assert enable_grad_checkpointing(model) == 14


def test_two_blocks_in_a_row_keep_one_input() -> None:
    """Blocks that are called one by one are checkpoints of their own, with the same gradients."""
    torch.manual_seed(0)
    model = stack(4)
    enable_grad_checkpointing(model)
    blocks = list(model[1])

    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.model[0](x)
            for block in blocks:
                x = block(x)
            return x

    images = torch.randn(2, 3, 64, 64)
    value = 2 * 8 * 64 * 64 * 4  # bytes of the output of a block
    other = copy.deepcopy(model)
    sizes = [kept_bytes(network, images) for network in (model, OneByOne())]
    assert sizes[1] - sizes[0] == pytest.approx(2 * value, rel=0.01)
    assert torch.equal(step(other, images), step(OneByOne(), images))
    for one, two in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-6, atol=1e-9)


class ConvolutionCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[int, ...], int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            shape = tuple(args[1].shape)
            self.calls[shape] = self.calls.get(shape, 0) + 1
        return function(*args, **(kwargs or {}))
