"""The confusion matrix of every image, sparse: intervals and paired tests need nothing else. Numpy only."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segkit.errors import InputError

_FIELDS = ("image", "target", "prediction", "count", "names", "num_classes")


@dataclass(frozen=True)
class PerImageCounts:
    """Non-zero entries of one (K, K) confusion matrix per image.

    Entry e: in image ``image[e]``, ``count[e]`` pixels of class ``target[e]`` were predicted as ``prediction[e]``.
    The arrays are int64 and of one length; ``names`` has one name per image, in the order of the data set. An image
    without any labelled pixel has no entry but keeps its name.
    """

    image: NDArray[np.int64]
    target: NDArray[np.int64]
    prediction: NDArray[np.int64]
    count: NDArray[np.int64]
    names: tuple[str, ...]
    num_classes: int

    @property
    def num_images(self) -> int:
        """Number of images, including those without entries."""
        return len(self.names)

    @classmethod
    def from_sparse(
        cls, matrices: Sequence[NDArray[np.int64]], names: Sequence[str], *, num_classes: int
    ) -> PerImageCounts:
        """Return the counts of one or more matrices in the form of `sparse`, one per name."""
        assert len(matrices) == len(names), (len(matrices), len(names))
        image = np.repeat(np.arange(len(matrices)), [matrix.shape[1] for matrix in matrices])
        target, prediction, count = np.concatenate(matrices, axis=1)
        return cls(image, target, prediction, count, tuple(names), num_classes)

    def total(self) -> NDArray[np.int64]:
        """The confusion matrix (K, K) of all images together."""
        counts = np.zeros((self.num_classes, self.num_classes), np.int64)
        np.add.at(counts, (self.target, self.prediction), self.count)
        return counts

    def matrix(self, image: int) -> NDArray[np.int64]:
        """The dense confusion matrix (K, K) of one image."""
        counts = np.zeros((self.num_classes, self.num_classes), np.int64)
        of_image = self.image == image
        counts[self.target[of_image], self.prediction[of_image]] = self.count[of_image]
        return counts

    def class_totals(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """``(TP, T, P)``, each int64 (num_images, K): true positives, target pixels, predicted pixels."""
        shape = (self.num_images, self.num_classes)
        tp, target, predicted = (np.zeros(shape, np.int64) for _ in range(3))
        hit = self.target == self.prediction
        tp[self.image[hit], self.target[hit]] = self.count[hit]
        np.add.at(target, (self.image, self.target), self.count)
        np.add.at(predicted, (self.image, self.prediction), self.count)
        return tp, target, predicted

    def to_bytes(self) -> bytes:
        """Return the content of a compressed .npz file, which `load` reads."""
        content = io.BytesIO()
        np.savez_compressed(
            content,
            image=self.image.astype(np.int32),
            target=self.target.astype(np.int16),
            prediction=self.prediction.astype(np.int16),
            count=self.count,
            names=np.array(self.names, dtype=np.str_),
            num_classes=np.int64(self.num_classes),
        )
        return content.getvalue()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PerImageCounts:
        """Read a file with the content of `to_bytes`. Raises `InputError` for any other file."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                fields = {key: stored[key] for key in _FIELDS}
        except FileNotFoundError:
            raise InputError(f"there is no per-image count file {path}; `segkit evaluate` writes it") from None
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path} is not a per-image count file ({error}); write it again with `segkit evaluate`"
            ) from error
        image, target, prediction, count = (fields[key].astype(np.int64) for key in _FIELDS[:4])
        return cls(image, target, prediction, count, tuple(fields["names"].tolist()), int(fields["num_classes"]))


def sparse(matrix: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the non-zero entries of a confusion matrix: int64 (3, n), rows target, prediction and count."""
    target, prediction = np.nonzero(matrix)
    return np.stack([target, prediction, matrix[target, prediction]])
