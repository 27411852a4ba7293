"""Predictions for image files of any kind: label PNGs, overlays, probabilities.

Files are decoded and written by threads while the model computes; a few images are in memory at a time. A file that
cannot be read is reported and skipped.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import nn

from segkit.errors import InputError
from segkit.evaluation import overlay
from segkit.evaluation.inference import Inference, Scorer
from segkit.evaluation.loop import autocast
from segkit.evaluation.views import argmax_channel, class_dtype

Pixels = NDArray[Any]
"""An image (H, W, C): uint8, uint16 or float32"""
Prepare = Callable[[Pixels], Pixels]
"""An image to the one that the scorer sees."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What is written for every image, each kind into a folder of its own."""

    labels: bool = True
    """labels/NAME.png: palette PNG, the index is the class"""
    overlays: bool = True
    """overlays/NAME.png: colours over the image, with a legend"""
    probabilities: bool = False
    """probabilities/NAME.npz: ``probabilities`` float16 (K, H, W)"""


@dataclass
class Report:
    """What became of the files."""

    num_written: int = 0
    failed: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 if every file was predicted, else 1."""
        return 1 if self.failed else 0


@dataclass(frozen=True)
class _Done:
    """The predictions of one image: class maps by title, and probabilities of the first if asked for."""

    labels: dict[str, NDArray[np.integer]]
    probabilities: NDArray[np.float16] | None


def predict_files(
    scorers: Scorer | Mapping[str, Scorer],
    images: Mapping[str, Path],
    output: str | os.PathLike[str],
    *,
    read_image: Callable[[Path], Pixels],
    classes: Sequence[str],
    palette: ArrayLike,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    inference: Inference | Mapping[str, Inference] | None = None,
    prepare: Mapping[str, Prepare] | None = None,
    outputs: Outputs | None = None,
    threads: int = 2,
    progress: Callable[[Iterable[str]], Iterable[str]] | None = None,
) -> Report:
    """Predict ``images``, paths by the names of their results, and write the results below ``output``.

    ``read_image`` gives the pixels of a file as it does for training; its InputErrors go into the report.
    ``palette``: (K, 3) colours 0..255. ``scorers``: one, or several by title; the first one's predictions are
    written, and with several also ``side_by_side/NAME.png``. ``inference``: that of all scorers, or one for each title.
    ``prepare``: by title, what an image goes through first, such as a resize. ``progress`` wraps the iterable of names.
    The report lists the files that could not be read; see `Report.exit_code`.
    """
    titled = dict(scorers) if isinstance(scorers, Mapping) else {"prediction": scorers}
    assert titled, "at least one scorer is needed"
    inference = Inference() if inference is None else inference
    prepare = dict.fromkeys(titled, np.asarray) if prepare is None else prepare
    inferences = dict(inference) if isinstance(inference, Mapping) else dict.fromkeys(titled, inference)
    outputs = Outputs() if outputs is None else outputs
    device = torch.device(device)
    writer = _Writer(Path(output), classes, np.asarray(palette, np.uint8), outputs, several=len(titled) > 1)
    writer.make_folders(images)
    report = Report()
    for scorer in titled.values():
        if isinstance(scorer, nn.Module):
            scorer.eval()
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers, torch.inference_mode():
        written: deque[Future[None]] = deque()
        names = list(images) if progress is None else progress(list(images))
        for name, image in _decoded_ahead(names, images, read_image, readers, num_ahead=2 * threads):
            if isinstance(image, InputError):
                report.failed.append((images[name], str(image)))
                continue
            with autocast(device, dtype):
                done = _predict(titled, image, inferences, prepare, device, probabilities=outputs.probabilities)
            written.append(writers.submit(writer.write, name, image, done))
            report.num_written += 1
            while len(written) > 2 * threads:
                written.popleft().result()
        while written:
            written.popleft().result()
    return report


def predict_arrays(
    scorer: Scorer,
    images: Iterable[Pixels],
    *,
    inference: Inference,
    prepare: Prepare,
    device: torch.device,
    dtype: torch.dtype | None,
) -> list[NDArray[np.integer]]:
    """Return the class maps (H, W) of ``images`` as :func:`predict_files` writes them."""
    if isinstance(scorer, nn.Module):
        scorer.eval()
    with torch.inference_mode(), autocast(device, dtype):
        found = [
            _predict({"": scorer}, image, {"": inference}, {"": prepare}, device, probabilities=False)
            for image in images
        ]
    return [done.labels[""] for done in found]


def _decoded_ahead(
    names: Iterable[str],
    images: Mapping[str, Path],
    read_image: Callable[[Path], Pixels],
    pool: ThreadPoolExecutor,
    *,
    num_ahead: int,
) -> Iterator[tuple[str, Pixels | InputError]]:
    """Names with their decoded image, or with the error, in order; ``num_ahead`` are decoded in advance."""

    def read(path: Path) -> Pixels | InputError:
        try:
            return read_image(path)
        except InputError as error:
            return error

    # The names are drawn one by one, in step with the results, so that progress is shown when an image is done.
    upcoming = iter(images.items())
    waiting: deque[Future[Pixels | InputError]] = deque()
    for name in names:
        for _, path in upcoming:
            waiting.append(pool.submit(read, path))
            if len(waiting) > num_ahead:
                break
        yield name, waiting.popleft().result()


def _predict(
    scorers: Mapping[str, Scorer],
    image: Pixels,
    inferences: Mapping[str, Inference],
    prepare: Mapping[str, Prepare],
    device: torch.device,
    *,
    probabilities: bool,
) -> _Done:
    size = (image.shape[0], image.shape[1])
    labels: dict[str, NDArray[np.integer]] = {}
    scores: NDArray[np.float16] | None = None
    for title, scorer in scorers.items():
        inference, prepared = inferences[title], prepare[title](image)
        tensor = torch.tensor(prepared).permute(2, 0, 1)[None].contiguous().to(device)
        if not probabilities or scores is not None:
            labels[title] = inference(scorer, tensor, size)[0].cpu().numpy()
            continue
        bands, best = [], []
        for _, band in inference.probabilities(scorer, tensor, size):
            bands.append(band[0].half().cpu().numpy())
            band = band if inference.decide is None else inference.decide(band)
            best.append(argmax_channel(band, class_dtype(band.shape[1]))[0].cpu().numpy())
        labels[title], scores = np.concatenate(best), np.concatenate(bands, axis=1)
    return _Done(labels, scores)


@dataclass(frozen=True)
class _Writer:
    output: Path
    classes: Sequence[str]
    palette: NDArray[np.uint8]
    outputs: Outputs
    several: bool

    def _kinds(self) -> list[str]:
        kinds = {
            "labels": self.outputs.labels,
            "overlays": self.outputs.overlays,
            "probabilities": self.outputs.probabilities,
            "side_by_side": self.several,
        }
        return [kind for kind, wanted in kinds.items() if wanted]

    def make_folders(self, names: Iterable[str]) -> None:
        try:
            for folder in {Path(name).parent for name in names}:
                for kind in self._kinds():
                    (self.output / kind / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {self.output} ({error.strerror}); give another output folder") from error

    def write(self, name: str, image: Pixels, done: _Done) -> None:
        """Write everything of one image."""
        first = next(iter(done.labels.values()))
        if first.size and int(first.max()) >= len(self.classes):
            raise InputError(
                f"the model predicts class {int(first.max())}, but {len(self.classes)} classes are named; use the "
                "label table it was trained with"
            )
        for kind in self._kinds():
            path = self.output / kind / f"{name}{'.npz' if kind == 'probabilities' else '.png'}"
            if kind == "labels":
                overlay.palette_image(first, self.palette).save(path)
            elif kind == "overlays":
                picture = overlay.overlay_with_legend(overlay.visible(image), first, self.classes, self.palette)
                Image.fromarray(picture).save(path, compress_level=1)
            elif kind == "probabilities":
                assert done.probabilities is not None
                np.savez_compressed(path, probabilities=done.probabilities)
            else:
                shown = overlay.visible(image), list(done.labels.items())
                picture = overlay.side_by_side(*shown, self.classes, self.palette)
                Image.fromarray(picture).save(path, compress_level=1)
