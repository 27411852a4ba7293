"""How far it is from the command to the loss: the frames of segkit on the stack, counted inside a loss."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path

import torch

import segkit
from segkit import launch
from segkit.run import phase

PACKAGE = Path(segkit.__file__).parent
ROOT = PACKAGE.parent
FRAMES = ["main", "guarded", "task", "run", "train_phase", "fit", "_step", "train_step"]


def segkit_frames() -> list[str]:
    """Functions of segkit on the stack, the outermost first."""
    return [entry.name for entry in traceback.extract_stack() if Path(entry.filename).is_relative_to(PACKAGE)]


class FramesLoss(torch.nn.Module):
    """A loss that notes the stack it is called from."""

    pixel_decomposable = False

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[str] = []

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.frames = segkit_frames()
        return logits.float().mean()


def test_eight_frames_stand_between_the_command_and_the_loss(monkeypatch, tmp_path):
    loss = FramesLoss()
    monkeypatch.setattr(phase, "build_loss", lambda *arguments, **options: loss)
    overrides = ["schedule=single", "loss=cross_entropy", "debug=smoke", "limit_steps=1", "batch_size=2", "device=cpu"]
    overrides += ["dataset.reader.num_images=4", "dataset.reader.size=[64,64]", "dataset.crop=[64,64]", "workers=0"]
    overrides += [f"cache_dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run", "model=deeplabv3plus_tiny"]
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
    launch.main()
    assert loss.frames == FRAMES


def test_the_map_in_contributing_shows_these_frames():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    path = re.search(r"`(main -> [^`]+)`", text)
    assert path is not None
    shown = [name.strip().split(".")[-1] for name in path.group(1).split("->")]
    assert shown == [*FRAMES, "loss"]


def test_the_number_of_frames_is_told():
    assert len(FRAMES) == 8
    assert "eight functions" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
