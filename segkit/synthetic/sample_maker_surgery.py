"""A small synthetic copy of the Robotic Instrument data (MICCAI EndoVis 2017)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segkit.data.readers.robotic_instrument import PAPER_FRAMES, mask_folders
from segkit.synthetic.layouts import other_splits, scaled
from segkit.synthetic.sample_maker_scenes import write_png

SHAFT, WRIST, CLASPERS, PROBE = 10, 20, 30, 40
"""Codes of the instrument parts in the official masks."""

LOOKS = {
    0: (170, 80, 70),
    SHAFT: (70, 75, 90),
    WRIST: (150, 155, 160),
    CLASPERS: (205, 200, 140),
    PROBE: (60, 120, 200),
}
"""Colour of tissue and of each part in the drawn frames."""

THREE_CHANNELS = "instrument_dataset_7"
"""The sequence whose masks are RGB files with three equal channels."""


def write_robotic_instrument(output: Path, *, num_images: int, rng: np.random.Generator, scale: float) -> None:
    """Eight sequences with frames in each range of the paper's split; one mask folder per instrument.

    The irregular folder names, the drop-in probe (Other_labels) of the first two sequences, overlapping
    instruments, the dark border of the frames and the three-channel masks are as in the official data.
    At least one training frame a sequence is written, so there are never fewer than eight.
    """
    folders = mask_folders()
    for number, (sequence, names) in enumerate(sorted(folders.items())):
        for split, frames in PAPER_FRAMES.items():
            count = num_images if split == "train" else other_splits(num_images)
            share = count // len(folders) + (number < count % len(folders))
            for frame in range(frames.start, frames.start + max(1, share)):
                _write_frame(output / sequence, names, frame, rng=rng, size=scaled((1080, 1920), scale))


def _write_frame(
    sequence: Path, folders: list[str], frame: int, *, rng: np.random.Generator, size: tuple[int, int]
) -> None:
    image = _tissue(rng, size)
    centre = rng.uniform((0.4, 0.4), (0.55, 0.6))
    for index, folder in enumerate(folders):
        # Instruments come from both sides and meet about the centre, so that some of their pixels overlap.
        tip = centre + rng.uniform(-0.06, 0.06, 2)
        side = (0.18, 0.82)[index % 2]
        mask = _probe(rng, size) if folder.startswith("Other") else _instrument(rng, size, tip, side)
        for value, colour in LOOKS.items():
            if value:
                stripes = 14 * np.sin(0.35 * np.arange(size[1]) * (1 + value / 20))[None, :, None]
                image = np.where((mask == value)[..., None], np.array(colour) + stripes, image)
        pixels = np.repeat(mask[..., None], 3, axis=2) if sequence.name == THREE_CHANNELS else mask
        write_png(sequence / "ground_truth" / folder / f"frame{frame:03d}.png", pixels)
    image = image + rng.normal(0, 5, (*size, 1))
    image[~_content(size)] = 15
    write_png(sequence / "left_frames" / f"frame{frame:03d}.png", np.clip(image, 0, 255).astype(np.uint8))


def _content(size: tuple[int, int]) -> NDArray[np.bool_]:
    """True in the picture's content, which a dark border surrounds (x 328..1591, y 37..1046 of 1920x1080)."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width]
    return (
        (x >= width * 328 / 1920) & (x < width * 1592 / 1920) & (y >= height * 37 / 1080) & (y < height * 1047 / 1080)
    )


def _tissue(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float64]:
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    phase = rng.uniform(0, 6, 2)
    waves = np.sin(x / size[1] * 9 + phase[0]) * np.cos(y / size[0] * 7 + phase[1])
    return np.array(LOOKS[0]) + 25 * waves[..., None]


def _instrument(rng: np.random.Generator, size: tuple[int, int], tip: NDArray, side: float) -> NDArray[np.uint8]:
    """A rod from the border at relative x ``side`` to ``tip`` (relative y, x): shaft, then wrist, then claspers."""
    height, width = size
    start = np.array([rng.uniform(0.1, 0.9), side])
    scale = np.array([height, width], float)
    a, b = start * scale, np.asarray(tip) * scale
    y, x = np.mgrid[0:height, 0:width]
    points = np.stack([y, x], -1) - a
    along = points @ (b - a) / ((b - a) @ (b - a))
    across = np.abs(points @ np.array([b[1] - a[1], a[0] - b[0]])) / np.linalg.norm(b - a)
    radius = height * 0.06
    mask = np.zeros(size, np.uint8)
    mask[(across < radius) & (along >= 0) & (along < 0.65)] = SHAFT
    mask[(across < radius * 0.9) & (along >= 0.65) & (along < 0.82)] = WRIST
    mask[(across < radius * 0.7) & (along >= 0.82) & (along <= 1.05)] = CLASPERS
    mask[~_content(size)] = 0
    return mask


def _probe(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.uint8]:
    height, width = size
    y, x = np.mgrid[0:height, 0:width]
    centre = rng.uniform((0.72, 0.3), (0.82, 0.7))
    disc = (y / height - centre[0]) ** 2 + ((x - centre[1] * width) / height) ** 2 < 0.09**2
    return np.where(disc, PROBE, 0).astype(np.uint8)
