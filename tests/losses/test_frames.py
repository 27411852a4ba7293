"""How far it is from a loss to the arithmetic on a tile: the frames of segkit on the stack, counted inside a tile."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch

import segkit
from segkit.losses import MarginCalibrationLoss, tiles
from segkit.losses.margin_tile import margin_tile

PACKAGE = Path(segkit.__file__).parent
FRAMES = ["PixelLoss.forward", "KeptGradient.forward", "run", "run.<locals>.thread", "tile", "margin_tile"]
"""Six, as ARCHITECTURE has them: the last is the tile function itself."""


def segkit_frames(frame) -> list[str]:
    """Functions of segkit from the outermost to ``frame``."""
    found = []
    while frame is not None:
        if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            found.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return found[::-1]


@pytest.fixture
def stacks(monkeypatch):
    """(frames of the calling thread, frames of the one that computes) at each call of the tile function."""
    found = []
    caller = threading.get_ident()

    def fake_tile(*arguments, **parameters):
        own = segkit_frames(sys._getframe(1))
        above = [] if threading.get_ident() == caller else segkit_frames(sys._current_frames()[caller])
        found.append((above, own))
        return margin_tile(*arguments, **parameters)

    monkeypatch.setattr(sys.modules["segkit.losses.margin_calibration"], "margin_tile", fake_tile)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 300)
    return found


@pytest.mark.parametrize("size", [(24, 20), (6, 5)], ids=["at label size", "below"])
@pytest.mark.parametrize("threads", [1, 2])
def test_six_frames_from_the_loss_to_the_tile(stacks, size, threads):
    loss = MarginCalibrationLoss(rho_k0=torch.zeros(3), rho_0k=torch.ones(3))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        loss(torch.randn(2, 3, *size, requires_grad=True), torch.zeros(2, 24, 20, dtype=torch.int64))
    finally:
        torch.set_num_threads(before)
    assert len(stacks) > 4
    for above, own in stacks:  # beyond `run` the calling thread may be handing out work
        assert [*above[:3], *own, "margin_tile"] == FRAMES
        assert len(own) == (5 if threads == 1 else 2)
    assert len(FRAMES) == 6
