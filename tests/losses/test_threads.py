"""Tiles on several threads: in order, with errors passed on, and the same bits as on one thread."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from segkit.losses import CrossEntropyLoss, DiceLoss, MarginCalibrationLoss, tiles


@pytest.fixture
def threads():
    """Sets torch's number of threads; puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def fifty_blocks(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 1)
    logits, target = torch.zeros(2, 3, 25, 1), torch.zeros(2, 25, 1, dtype=torch.int64)
    (blocks,) = tiles.cut(logits, target)
    assert len(blocks) == 50
    return blocks


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_results_come_in_order_and_every_thread_has_its_workspace(threads, monkeypatch, num_threads):
    threads(num_threads)
    blocks = fifty_blocks(monkeypatch)
    workspaces = {}

    def rule(s, label, work):
        assert not torch.is_grad_enabled()
        assert torch.get_num_threads() == 1
        workspaces.setdefault(threading.get_ident(), set()).add(work)
        time.sleep(1e-4)  # lets the others have their turn
        return torch.ones(1), torch.ones(3, 1)

    found = tiles.run(blocks, rule, lambda block, *_: block.place[:1] + block.place[2:3], ignore_index=255)
    assert found == [(n, slice(row, row + 1)) for n in range(2) for row in range(25)]
    assert 1 <= len(workspaces) <= num_threads
    assert all(len(own) == 1 for own in workspaces.values())
    assert len(set.union(*workspaces.values())) == len(workspaces)
    assert (threading.get_ident() in workspaces) == (num_threads == 1)
    assert torch.get_num_threads() == num_threads
    assert torch.is_grad_enabled()
    assert tiles.run([], rule, lambda *_: None, ignore_index=255) == []


def test_without_splitting_the_calling_thread_works_alone(threads, monkeypatch):
    threads(2)
    seen = []

    def rule(s, label, work):
        seen.append(threading.get_ident())
        return torch.ones(1), torch.ones(3, 1)

    tiles.run(fifty_blocks(monkeypatch), rule, lambda *_: None, ignore_index=255, split=False)
    assert seen == [threading.get_ident()] * 50


def test_an_error_reaches_the_caller(threads, monkeypatch):
    threads(2)

    begun, ended = [], []

    def rule(s, label, work):
        begun.append(s)
        if len(begun) == 1:
            raise KeyError("tile")
        time.sleep(0.01)
        ended.append(s)
        return torch.ones(1), torch.ones(3, 1)

    with pytest.raises(KeyError, match="tile"):
        tiles.run(fifty_blocks(monkeypatch), rule, lambda *_: None, ignore_index=255)
    assert len(ended) == len(begun) - 1 < 49  # no thread goes on
    assert torch.get_num_threads() == 2


MARGIN = MarginCalibrationLoss(rho_k0=torch.zeros(5), rho_0k=torch.linspace(0, 2, 5))


@pytest.mark.parametrize("size", [(8, 7), (32, 28)])
@pytest.mark.parametrize("loss", [MARGIN, DiceLoss(), CrossEntropyLoss()], ids=["margin", "Dice", "cross-entropy"])
def test_the_number_of_threads_does_not_change_a_bit(loss, size, threads, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 500)
    generator = torch.Generator().manual_seed(0)
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
