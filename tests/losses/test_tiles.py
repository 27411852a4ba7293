"""The machinery of tiles: any tile size, any number format, compiled or not, gives the same numbers."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

from segkit.losses import (
    CrossEntropyLoss,
    DiceLoss,
    FocalLoss,
    MarginCalibrationLoss,
    OhemCrossEntropyLoss,
    compiling,
    tiles,
)


def margin(**options):
    return MarginCalibrationLoss(rho_k0=torch.linspace(0, 0.2, 5), rho_0k=torch.linspace(0, 3, 5), **options)


LOSSES = {
    "margin calibration": margin,
    "reference form": lambda **options: margin(form="reference", **options),
    "cross-entropy": CrossEntropyLoss,
    "weighted cross-entropy": lambda **options: CrossEntropyLoss(
        weight=torch.linspace(0.5, 2, 5), label_smoothing=0.1, **options
    ),
    "focal": FocalLoss,
}


def example(size=(2, 12, 10), dtype=torch.float64, ties=False):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(size[0], 5, *size[1:], generator=generator, dtype=torch.float64)
    target = torch.randint(5, size, generator=generator)
    target[torch.rand(size, generator=generator) < 0.1] = 255
    return (logits.round() if ties else logits).to(dtype), target


def value_and_gradient(loss, logits, target, factor=1.0):
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, target)
    (value * factor).backward()
    return value.detach(), leaf.grad


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", [*LOSSES, "Dice"])
def test_tile_size_does_not_matter(name, ties, monkeypatch):
    loss = LOSSES[name]() if name in LOSSES else DiceLoss()
    logits, target = example(ties=ties)
    expected = value_and_gradient(loss, logits, target)
    for elements in (1, 170, 10**6):
        monkeypatch.setattr(tiles, "TILE_ELEMENTS", elements)
        found = value_and_gradient(loss, logits, target)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("upsampled", [False, True])
@pytest.mark.parametrize("name", [*LOSSES, "Dice", "OHEM"])
def test_images_of_one_tile_are_as_images_alone(name, upsampled, monkeypatch):
    """As on an accelerator: tiles of two images and of one."""
    loss = {"Dice": DiceLoss, "OHEM": functools.partial(OhemCrossEntropyLoss, min_kept=20), **LOSSES}[name]()
    logits, target = example((3, 12, 10))
    if upsampled:
        logits = logits[:, :, ::4, ::5]
    expected = value_and_gradient(loss, logits, target)
    monkeypatch.setattr(tiles, "images_per_tile", lambda *_: 2)
    found = value_and_gradient(loss, logits, target)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_no_image_is_cut_into_no_tile():
    logits, target = torch.empty(0, 2, 8, 8, device="meta"), torch.empty(0, 8, 8, device="meta")  # no CPU
    assert [len(blocks) for blocks in tiles.cut(logits, target)] == [0]
    assert list(tiles.cut(logits[..., ::2], target)) == []


@pytest.mark.parametrize("form", ["paper", "reference"])
@pytest.mark.parametrize("factor", [1.0, 10.0])  # small margins and large ones are computed in different ways
def test_a_tie_changes_nothing_for_its_neighbours(form, factor):
    """Tiles with ties take another path: every pixel must get what it gets alone."""
    loss = MarginCalibrationLoss(rho_k0=torch.linspace(0, 0.2, 5), rho_0k=factor * torch.linspace(0, 3, 5), form=form)
    logits, target = example((1, 6, 20), ties=True)
    _, together = value_and_gradient(loss, logits, target)
    num_valid = (target != 255).sum()
    tied = (logits == logits.amax(1, keepdim=True)).sum(1) > 1
    assert 0 < tied.sum() < tied.numel()
    for row, column in [(r, c) for r in range(6) for c in range(20)]:
        place = (slice(None), slice(None), slice(row, row + 1), slice(column, column + 1))
        _, alone = value_and_gradient(loss, logits[place], target[:, row : row + 1, column : column + 1])
        torch.testing.assert_close(together[place] * num_valid, alone, rtol=1e-12, atol=1e-14)


def test_gradient_survives_the_number_of_pixels_in_half_precision():
    """g / n lies below what float16 can hold: kept un-normalised and scaled later, it is still exact."""
    logits, target = example((2, 200, 200), torch.float16)
    _, expected = value_and_gradient(CrossEntropyLoss(), logits.double(), target)
    assert expected.abs().max() < 2e-5  # float16 resolves 6e-8: 0.3 per cent of the largest, nothing of the others
    _, gradient = value_and_gradient(CrossEntropyLoss(), logits, target, factor=65536.0)
    assert (gradient.double() / 65536 - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_second_backward_pass_gives_the_same(dtype):
    logits, target = example(dtype=dtype)
    leaf = logits.requires_grad_()
    value = margin()(leaf, target)
    first, second, third = (
        torch.autograd.grad(factor * value, leaf, retain_graph=True)[0] for factor in (1.0, 2.0, 1.0)
    )
    torch.testing.assert_close(second, 2 * first)
    torch.testing.assert_close(third, first)


def test_no_gradient_is_made_where_none_is_wanted():
    logits, target = example()
    with torch.no_grad():
        assert not margin()(logits, target).requires_grad
    assert margin()(logits, target).grad_fn is None


def test_double_backward_says_no():
    logits, target = example()
    leaf = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(margin()(leaf, target), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly if name == "reference form" else ()) for name in LOSSES]
)
def test_compiled_is_plain(name, ties, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 300)
    logits, target = example(dtype=torch.float32, ties=ties)
    plain = value_and_gradient(LOSSES[name](compile_tiles=False), logits, target)
    with warnings.catch_warnings():
        # torch's own compiler stack warns about itself; a failed compilation must still be an error here
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="torch.compile failed")
        fast = value_and_gradient(LOSSES[name](compile_tiles=True), logits, target)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-8)


@pytest.mark.nightly
def test_compiled_half_precision_in_any_layout():
    logits, target = example(dtype=torch.float16)
    logits = logits.to(memory_format=torch.channels_last)
    plain = value_and_gradient(margin(compile_tiles=False), logits, target, factor=1024.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="torch.compile failed")
        fast = value_and_gradient(margin(compile_tiles=True), logits, target, factor=1024.0)
    assert fast[1].dtype == torch.float16
    torch.testing.assert_close(fast, plain, rtol=2e-3, atol=1e-3)


def test_failing_compiler_is_said_once_and_changes_nothing(monkeypatch):
    def broken(function, **options):
        def call(*arguments, **parameters):
            raise RuntimeError("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(compiling.Compiler, "failed", False)
    compiling.compiled.cache_clear()
    logits, target = example()
    expected = value_and_gradient(margin(compile_tiles=False), logits, target)
    with pytest.warns(UserWarning, match="torch.compile failed .*no compiler here.*same numbers"):
        found = value_and_gradient(margin(compile_tiles=True), logits, target)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    value_and_gradient(margin(compile_tiles=True), logits, target)  # no second warning: warnings are errors here
    compiling.compiled.cache_clear()


def test_want_of_memory_is_no_failure_of_the_compiler(monkeypatch):
    def full(function, **options):
        def call(*arguments, **parameters):
            raise torch.OutOfMemoryError("no memory left")

        return call

    monkeypatch.setattr(torch, "compile", full)
    monkeypatch.setattr(compiling.Compiler, "failed", False)
    compiling.compiled.cache_clear()
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        value_and_gradient(margin(compile_tiles=True), *example())
    assert not compiling.Compiler.failed
    compiling.compiled.cache_clear()


def test_a_loss_is_not_compiled_unless_asked():
    assert not compiling.wants_compiler(None)
    assert compiling.wants_compiler(True)
    assert not compiling.wants_compiler(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("wanted", [False, True])
def test_cuda_is_cpu(name, wanted):
    logits, target = example(dtype=torch.float32)
    loss = LOSSES[name](compile_tiles=wanted)
    expected = value_and_gradient(loss, logits, target)
    value, gradient = value_and_gradient(loss.cuda(), logits.cuda(), target.cuda())
    torch.testing.assert_close(value.cpu(), expected[0])
    torch.testing.assert_close(gradient.cpu(), expected[1])
