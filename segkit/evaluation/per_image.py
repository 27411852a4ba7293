"""The confusion matrix of every image, sparse: intervals and paired tests need nothing else. Numpy only."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segkit.errors import InputError, check_archive, first_line

_FIELDS = ("image", "target", "prediction", "count", "names", "num_classes")


@dataclass(frozen=True)
class PerImageCounts:
    """Non-zero entries of one (K, K) confusion matrix per image.

    Entry e: in image ``image[e]``, ``count[e]`` pixels of class ``target[e]`` were predicted as ``prediction[e]``;
    entries of one place add up.
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

    @classmethod
    def joined(cls, parts: Sequence[PerImageCounts], names: Sequence[str]) -> PerImageCounts:
        """Return the sum of ``parts`` over the images ``names``, which are in that order and told by their names."""
        position = {name: number for number, name in enumerate(names)}
        image = [np.array([position[name] for name in part.names], np.int64)[part.image] for part in parts]
        target, prediction, count = (
            np.concatenate([getattr(part, key) for part in parts]) for key in ("target", "prediction", "count")
        )
        return cls(np.concatenate(image), target, prediction, count, tuple(names), parts[0].num_classes)

    def total(self) -> NDArray[np.int64]:
        """The confusion matrix (K, K) of all images together."""
        return self._dense(slice(None))

    def matrix(self, image: int) -> NDArray[np.int64]:
        """The confusion matrix (K, K) of one image."""
        return self._dense(self.image == image)

    def _dense(self, entries: Any) -> NDArray[np.int64]:
        counts = np.zeros((self.num_classes, self.num_classes), np.int64)
        np.add.at(counts, (self.target[entries], self.prediction[entries]), self.count[entries])
        return counts

    def class_totals(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """``(TP, T, P)``, each int64 (num_images, K): true positives, target pixels, predicted pixels."""
        shape = (self.num_images, self.num_classes)
        tp, target, predicted = (np.zeros(shape, np.int64) for _ in range(3))
        hit = self.target == self.prediction
        np.add.at(tp, (self.image[hit], self.target[hit]), self.count[hit])
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
    def load(cls, path: Path) -> PerImageCounts:
        """Read a file with the content of `to_bytes`. Raises `InputError` for any other file."""
        cure = "delete it to do without intervals, or evaluate the run again with `segkit evaluate`"
        if not path.exists():
            raise InputError(f"there is no per-image count file {path}; `segkit evaluate` writes it")
        if not path.is_file():
            raise InputError(f"{path} is not a per-image count file (it is no file); {cure}")
        try:
            check_archive(path, cure=cure)
            with np.load(path, allow_pickle=False) as stored:
                fields = {key: stored[key] for key in _FIELDS}
        except InputError:
            raise
        except Exception as error:  # numpy, zipfile and zlib raise what they like for a file that is none
            reason = "it holds more than numbers and texts" if "allow_pickle" in str(error) else first_line(error)
            raise InputError(f"{path} is not a per-image count file ({reason}); {cure}") from None
        wrong = _wrong(fields)
        if wrong:
            raise InputError(f"{path} is not a per-image count file ({wrong}); {cure}")
        image, target, prediction, count = (fields[key].astype(np.int64) for key in _FIELDS[:4])
        return cls(image, target, prediction, count, tuple(fields["names"].tolist()), int(fields["num_classes"]))


def _wrong(fields: dict[str, NDArray[Any]]) -> str:
    """What keeps ``fields`` from being sparse counts, in words; empty if nothing does."""
    columns, names, num_classes = [fields[key] for key in _FIELDS[:4]], fields["names"], fields["num_classes"]
    if num_classes.shape != () or num_classes.dtype.kind not in "iu" or not 1 <= int(num_classes) <= 2**15:
        return "num_classes is no number of classes"
    if names.ndim != 1 or names.dtype.kind != "U" or len(names) == 0:
        return "names are no list of texts"
    if any(column.ndim != 1 or column.dtype.kind not in "iu" or len(column) != len(columns[0]) for column in columns):
        return "its columns are not of whole numbers and of one length"
    limits = (len(names), int(num_classes), int(num_classes), 2**62)
    for key, column, limit in zip(_FIELDS, columns, limits, strict=False):
        if len(column) and not (int(column.min()) >= 0 and int(column.max()) < limit):
            return f"{key} has a number outside 0..{limit - 1}"
    return ""


def sparse(matrix: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the non-zero entries of a confusion matrix: int64 (3, n), rows target, prediction and count."""
    target, prediction = np.nonzero(matrix)
    return np.stack([target, prediction, matrix[target, prediction]])
