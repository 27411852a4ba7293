"""Tiles on several threads: in order, with errors passed on, and the same bits as on one thread."""

from __future__ import annotations

import threading

import pytest
import torch

from segkit.losses import CrossEntropyLoss, DiceLoss, MarginCalibrationLoss, UpsampledLoss, tiles
from segkit.losses.parallel import each


@pytest.fixture
def threads():
    """Sets torch's number of threads; puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_results_come_in_order_and_every_thread_has_its_state(threads, num_threads):
    threads(num_threads)
    seen = []

    def make_state():
        seen.append(threading.get_ident())
        return {"uses": 0}

    def do(item, state):
        state["uses"] += 1
        assert not torch.is_grad_enabled()
        return item * item, torch.get_num_threads() if num_threads > 1 else 1

    found = each(range(50), do, make_state, split=True)
    assert found == [(i * i, 1) for i in range(50)]
    assert len(seen) == num_threads
    assert torch.get_num_threads() == num_threads
    assert torch.is_grad_enabled()
    assert each([], do, make_state, split=True) == []


def test_an_error_reaches_the_caller(threads):
    threads(2)

    def do(item, state):
        raise KeyError(item)

    with pytest.raises(KeyError):
        each(range(4), do, dict, split=True)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    "loss",
    [
        UpsampledLoss(MarginCalibrationLoss(rho_k0=torch.zeros(5), rho_0k=torch.linspace(0, 2, 5))),
        DiceLoss(),
        CrossEntropyLoss(),
    ],
    ids=["banded margin calibration", "Dice", "cross-entropy"],
)
def test_the_number_of_threads_does_not_change_a_bit(loss, threads, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 500)
    generator = torch.Generator().manual_seed(0)
    size = (8, 7) if isinstance(loss, UpsampledLoss) else (32, 28)
    logits = torch.randn(2, 5, *size, generator=generator)
    target = torch.randint(5, (2, 32, 28), generator=generator)
    found = []
    for num_threads in (1, 2, 4, 2):
        threads(num_threads)
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, target)
        value.backward()
        found.append((value.detach(), leaf.grad))
    for value, gradient in found[1:]:
        assert torch.equal(value, found[0][0])
        assert torch.equal(gradient, found[0][1])
