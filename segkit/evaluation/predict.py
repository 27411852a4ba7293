"""Predictions for image files of any kind: label PNGs, overlays, probabilities.

Files are decoded and written by threads while the model computes; a few images are in memory at a time. A file that
cannot be read is reported and skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from segkit.errors import InputError
from segkit.evaluation import overlay
from segkit.evaluation.ahead import ahead
from segkit.evaluation.inference import Inference, Scorer
from segkit.evaluation.loop import autocast
from segkit.evaluation.views import argmax_channel, class_dtype

Pixels = NDArray[Any]
"""An image (H, W, C): uint8, uint16 or float32"""
Labels = NDArray[np.integer]


@dataclass(frozen=True)
class Predictor:
    """A model in evaluation mode, and how an image goes through it.

    ``prepare``: what an image goes through first, such as a resize; labels have the size of the image before it.
    ``dtype``: of autocast; None for none.
    """

    score: Scorer
    inference: Inference
    prepare: Callable[[Pixels], Pixels] = np.asarray
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None

    def labels(self, image: Pixels) -> Labels:
        """Return the class map (H, W) of an image (H, W, C)."""
        with torch.inference_mode(), autocast(torch.device(self.device), self.dtype):
            return self.inference(self.score, *self._prepared(image))[0].cpu().numpy()

    def probabilities(self, image: Pixels) -> tuple[Labels, NDArray[np.float16]]:
        """Return the class map (H, W) and the probabilities (K, H, W) of an image (H, W, C)."""
        bands, best, decide = [], [], self.inference.decide
        with torch.inference_mode(), autocast(torch.device(self.device), self.dtype):
            for _, band in self.inference.probabilities(self.score, *self._prepared(image)):
                bands.append(band[0].half().cpu().numpy())
                band = band if decide is None else decide(band)
                best.append(argmax_channel(band, class_dtype(band.shape[1]))[0].cpu().numpy())
        return np.concatenate(best), np.concatenate(bands, axis=1)

    def _prepared(self, image: Pixels) -> tuple[Tensor, tuple[int, int]]:
        tensor = torch.tensor(self.prepare(image)).permute(2, 0, 1)[None].contiguous().to(self.device)
        return tensor, (image.shape[0], image.shape[1])


@dataclass(frozen=True)
class _Done:
    """The predictions of one image: class maps by title, and probabilities of the first if asked for."""

    name: str
    image: Pixels
    labels: dict[str, Labels]
    probabilities: NDArray[np.float16] | None


def predict_files(
    predictors: Mapping[str, Predictor],
    images: Mapping[str, Path],
    output: Path,
    *,
    read_image: Callable[[Path], Pixels],
    written_beside: Callable[[Path], AbstractContextManager[Path]],
    classes: Sequence[str],
    palette: ArrayLike,
    probabilities: bool = False,
    threads: int = 2,
    progress: Callable[[Iterable[str]], Iterable[str]] | None = None,
) -> tuple[int, list[tuple[Path, str]]]:
    """Predict ``images``, paths by the names of their results, and write each kind of result below ``output``.

    ``labels/NAME.png``: palette PNG, the index is the class. ``overlays/NAME.png``: colours over the image, with a
    legend. ``probabilities/NAME.npz``, if asked for: ``probabilities`` float16 (K, H, W).

    ``predictors``: one or several by title; the first one's predictions are written, and with several also
    ``side_by_side/NAME.png``. ``read_image`` gives the pixels of a file as it does for training;
    ``written_beside`` is that of segkit.files. ``palette``: (K, 3) colours 0..255. ``progress`` wraps the
    iterable of names.

    Returns the number of predicted images, and the files that could not be read with what its InputErrors say.
    """
    endings = {"labels": ".png", "overlays": ".png"}
    endings |= {"probabilities": ".npz"} if probabilities else {}
    endings |= {"side_by_side": ".png"} if len(predictors) > 1 else {}
    writer = _Writer(output, endings, classes, np.asarray(palette, np.uint8), written_beside)
    writer.make_folders(images)
    failed: list[tuple[Path, str]] = []

    def read(path: Path) -> Pixels | InputError:
        try:
            return read_image(path)
        except InputError as error:
            return error

    def predicted() -> Iterator[_Done]:
        # The names are drawn in step with the results, so that progress is shown when an image is done.
        names = list(images) if progress is None else progress(list(images))
        for name, image in zip(names, ahead(read, images.values(), threads=threads), strict=False):
            if isinstance(image, InputError):
                failed.append((images[name], str(image)))
            else:
                yield _predict(predictors, name, image, probabilities=probabilities)

    try:
        num_written = sum(1 for _ in ahead(writer.write, predicted(), threads=threads))
    finally:
        writer.remove_empty_folders()
    return num_written, failed


def check_output(output: Path) -> None:
    """Raise InputError if the folder ``output`` has labels or checkpoints that are not of predictions."""
    others = [name for name in ("labels", "checkpoints") if (output / name).exists()]
    if others and not (output / "overlays").exists():  # which come with every prediction
        raise InputError(
            f"{output} has {others[0]} that are not of predictions, but perhaps of a data set or of a run: "
            f"give a folder of its own, such as {output / 'predictions'}"
        )


def _predict(predictors: Mapping[str, Predictor], name: str, image: Pixels, *, probabilities: bool) -> _Done:
    first, *others = predictors
    labels, scores = {}, None
    if probabilities:
        labels[first], scores = predictors[first].probabilities(image)
    else:
        labels[first] = predictors[first].labels(image)
    labels |= {title: predictors[title].labels(image) for title in others}
    return _Done(name, image, labels, scores)


@dataclass(frozen=True)
class _Writer:
    """``endings``: of the files of each kind of result."""

    output: Path
    endings: Mapping[str, str]
    classes: Sequence[str]
    palette: NDArray[np.uint8]
    written_beside: Callable[[Path], AbstractContextManager[Path]]

    def make_folders(self, names: Iterable[str]) -> None:
        check_output(self.output)
        try:
            for folder in {Path(name).parent for name in names}:
                for kind in self.endings:
                    (self.output / kind / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {self.output} ({error.strerror}); give another output folder") from error

    def remove_empty_folders(self) -> None:
        """Remove those of images that were all skipped."""
        for kind in self.endings:
            for folder, _, _ in os.walk(self.output / kind, topdown=False):
                with suppress(OSError):
                    os.rmdir(folder)

    def write(self, done: _Done) -> None:
        """Write everything of one image."""
        first = next(iter(done.labels.values()))
        if first.size and int(first.max()) >= len(self.classes):
            raise InputError(
                f"the model predicts class {int(first.max())}, but {len(self.classes)} classes are named; use the "
                "label table it was trained with"
            )
        for kind, ending in self.endings.items():
            path = self.output / kind / f"{done.name}{ending}"
            with self.written_beside(path) as temporary, open(temporary, "wb") as file:
                self._write(kind, done, first, file)

    def _write(self, kind: str, done: _Done, first: Labels, file: BinaryIO) -> None:
        if kind == "labels":
            overlay.palette_image(first, self.palette).save(file, "PNG")
        elif kind == "overlays":
            picture = overlay.overlay_with_legend(overlay.visible(done.image), first, self.classes, self.palette)
            Image.fromarray(picture).save(file, "PNG", compress_level=1)
        elif kind == "probabilities":
            assert done.probabilities is not None
            np.savez_compressed(file, probabilities=done.probabilities)
        else:
            shown = overlay.visible(done.image), list(done.labels.items())
            picture = overlay.side_by_side(*shown, self.classes, self.palette)
            Image.fromarray(picture).save(file, "PNG", compress_level=1)
