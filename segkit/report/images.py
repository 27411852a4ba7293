"""Single images: where a group gains and loses most against the baseline, and how the predictions look there."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segkit.evaluation import metrics
from segkit.report.figures import data_uri
from segkit.report.groups import Group
from segkit.report.protocols import comparable
from segkit.report.runs import RunRecord
from segkit.report.stored_pictures import VOID

PANEL = 440
"""Width of a picture in pixels: twice what a phone shows side by side."""
STRENGTH = 0.6
"""Share of the class colour in an overlay."""


@dataclass(frozen=True)
class ImageScore:
    """Mean IoU of one image over the classes that it has, with the baseline and with another run."""

    name: str
    baseline: float
    other: float

    @property
    def gain(self) -> float:
        """How much better the other run is."""
        return self.other - self.baseline


def image_scores(run: RunRecord) -> dict[str, float]:
    """Mean IoU of every image over the classes in its label or prediction; images without labelled pixels left out."""
    assert run.per_image is not None
    tp, target, predicted = run.per_image.class_totals()
    scores = metrics.divide(tp, target + predicted - tp)
    means = [metrics.mean_of_present(row) for row in scores]
    return {name: mean for name, mean in zip(run.per_image.names, means, strict=True) if mean == mean}


def gains(baseline: RunRecord, other: RunRecord) -> list[ImageScore]:
    """The images of both runs from largest gain to largest loss; empty where the runs cannot be paired."""
    if not comparable(baseline, other):
        return []
    ours, theirs = image_scores(baseline), image_scores(other)
    both = [ImageScore(name, ours[name], theirs[name]) for name in ours if name in theirs]
    return sorted(both, key=lambda one: -one.gain)


def stored_runs(groups: Sequence[Group]) -> list[tuple[int, RunRecord]]:
    """(number of the group, its first run with stored pictures) for the groups that have one."""
    found = []
    for index, group in enumerate(groups):
        run = next((run for run in group.runs if run.pictures), None)
        if run is not None:
            found.append((index, run))
    return found


def chosen_names(runs: Sequence[RunRecord], ranked: Sequence[str], most: int) -> list[str]:
    """At most ``most`` images that all ``runs`` stored: half from the front of ``ranked``, half from its end."""
    common = [name for name in runs[0].pictures if all(name in run.pictures for run in runs)]
    ordered = [name for name in ranked if name in common] + [name for name in common if name not in ranked]
    if len(ordered) <= most:
        return ordered
    return ordered[: -(-most // 2)] + ordered[len(ordered) - most // 2 :]


def overlay(
    image: NDArray[np.uint8], indices: NDArray[np.uint8], palette: Sequence[tuple[int, int, int]]
) -> NDArray[np.uint8]:
    """Class colours over a paled image; where there is no class, the image alone."""
    table = np.zeros((256, 3), np.float64)
    table[: len(palette)] = palette
    known = (indices < len(palette)) & (indices != VOID)
    mixed = np.where(known[..., None], (1 - STRENGTH) * image + STRENGTH * table[indices], image)
    return np.rint(mixed).astype(np.uint8)


def panel(pixels: NDArray[np.uint8]) -> str:
    """A data URI of ``pixels`` (H, W, 3), as JPEG of at most :data:`PANEL` pixels width."""
    picture = Image.fromarray(pixels)
    if picture.width > PANEL:
        height = max(1, round(picture.height * PANEL / picture.width))
        picture = picture.resize((PANEL, height), Image.Resampling.BOX)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=82)
    return data_uri(out.getvalue(), "jpeg")
