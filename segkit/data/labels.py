"""Label tables: which raw label value is which class.  The tables are JSON files in ``tables/``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from segkit.errors import InputError

TABLES = Path(__file__).parent / "tables"
VOID = 255
"""The train id of pixels that are no class."""

UNKNOWN = 254  # never a class (there are at most 254, from 0 on) and never VOID


@dataclass(frozen=True, eq=False)
class LabelTable:
    """The classes of a data set and the total map from raw label values to train ids.

    Train ids are 0..K-1; ``ignore_index`` (255) marks pixels that count neither in loss nor metrics.
    ``raw_to_train`` lists every raw value that may occur; any other is an error, never silently ignored.
    ``train_to_raw`` is what a benchmark server wants back.
    """

    name: str
    classes: tuple[str, ...]
    palette: np.ndarray
    raw_to_train: dict[int, int]
    train_to_raw: dict[int, int]
    ignore_index: int = VOID
    source: tuple[str, ...] = ()
    splits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num = len(self.classes)
        if not 1 <= num <= UNKNOWN:
            raise InputError(f"label table {self.name} has {num} classes; 1 to {UNKNOWN} are allowed")
        if self.ignore_index != VOID:
            raise InputError(f"label table {self.name} has ignore_index {self.ignore_index}; it must be {VOID}")
        if self.palette.shape != (num, 3) or self.palette.dtype != np.uint8:
            raise InputError(
                f"label table {self.name} has {num} classes but a palette of shape {self.palette.shape} "
                f"({self.palette.dtype}); give one [red, green, blue] of 0..255 for each class"
            )
        if len(set(self.classes)) != num:
            twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
            raise InputError(f"label table {self.name} names a class twice: {', '.join(twice)}; rename one")
        wrong = {r: t for r, t in self.raw_to_train.items() if not (0 <= t < num or t == self.ignore_index)}
        if wrong:
            raw, train = next(iter(wrong.items()))
            raise InputError(
                f"label table {self.name} maps raw value {raw} to {train}; allowed are 0..{num - 1} and "
                f"{self.ignore_index} (ignored)"
            )
        unreachable = sorted(set(range(num)) - set(self.raw_to_train.values()))
        if unreachable:
            raise InputError(
                f"label table {self.name} has no raw value for class {unreachable[0]} "
                f"({self.classes[unreachable[0]]}); add it to raw_to_train or drop the class"
            )
        assert set(self.train_to_raw) == set(range(num)), f"train_to_raw of {self.name} must list every class"

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def _lookup(self) -> np.ndarray:
        """uint8 (256,): train id of each raw value 0..255, ``UNKNOWN`` where the table has none."""
        lookup = np.full(256, UNKNOWN, np.uint8)
        for raw, train in self.raw_to_train.items():
            if 0 <= raw < 256:
                lookup[raw] = train
        return lookup

    def to_train(self, raw: np.ndarray, *, file: Path | str) -> np.ndarray:
        """Return train ids (H, W) uint8 of raw label values (H, W) of any integer type.

        Raises InputError naming ``file``, the values that are not in the table and how many pixels have them.
        """
        assert np.issubdtype(raw.dtype, np.integer), f"raw labels must be integers, not {raw.dtype}"
        narrow = narrowed(raw)
        if narrow.dtype == np.uint8 and raw.size:
            import cv2  # six times as fast as indexing; imported here to keep `import segkit.data` light

            train = np.asarray(cv2.LUT(narrow, self._lookup))
        else:
            train = np.full(raw.shape, UNKNOWN, np.uint8)
            for value in np.unique(raw).tolist():
                if value in self.raw_to_train:
                    train[raw == value] = self.raw_to_train[value]
        unknown = train == UNKNOWN
        if unknown.any():
            raise self._unknown_values(raw[unknown], file)
        return train

    def _unknown_values(self, values: np.ndarray, file: Path | str) -> InputError:
        found, counts = np.unique(values, return_counts=True)
        listed = ", ".join(f"{v} ({n} pixels)" for v, n in zip(found[:5], counts[:5], strict=True))
        more = f" and {len(found) - 5} other values" if len(found) > 5 else ""
        return InputError(
            f"label {file} has values that the table of {self.name} does not know: {listed}{more}; allowed are "
            f"{ranges(sorted(self.raw_to_train))}: {self.cure(found[:5].tolist())}"
        )

    def cure(self, unknown: Sequence[int]) -> str:
        """Return what to do about raw values that the table does not know."""
        if self.source != (self.name,):
            return "put the right file there, or add them to the table's raw_to_train"
        # a file of classes
        void = {value for value, train in self.raw_to_train.items() if train == self.ignore_index}
        return (
            f"give {self.name} the value of each class, as `ids: [0, 128, 255]` and `ignore: []`, or, if these are "
            f"void, `ignore: {sorted(void.union(unknown))}`"
        )


def narrowed(raw: np.ndarray) -> np.ndarray:
    """Return an integer array as uint8 if that holds all its values, else as it is; an empty one as it is."""
    if raw.dtype == np.uint8 or raw.size == 0 or raw.min() < 0 or raw.max() > 255:
        return raw
    return raw.astype(np.uint8)


def ranges(values: Sequence[int]) -> str:
    """Return sorted integers as "0..11, 255"."""
    parts: list[list[int]] = []
    for value in values:
        if parts and value == parts[-1][1] + 1:
            parts[-1][1] = value
        else:
            parts.append([value, value])
    return ", ".join(str(low) if low == high else f"{low}..{high}" for low, high in parts)


@cache
def table_file(name: str) -> dict[str, Any]:
    """Return the whole content of a shipped table file, with what stands in it beside the label table."""
    path = TABLES / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in TABLES.glob("*.json")))
        raise InputError(f"there is no label table {name!r}; shipped are: {known}")
    return json.loads(path.read_text(encoding="utf-8"))


def load_table(name: str) -> LabelTable:
    """Return the shipped label table ``name`` (segkit/data/tables/<name>.json)."""
    return table_from_dict(table_file(name))


def table_from_dict(content: Mapping[str, Any]) -> LabelTable:
    """Build a LabelTable from the content of a table file.

    Keys: name, classes, palette, raw_to_train ({raw: train id}); optional ignore_index (255), train_to_raw (default:
    the first raw value that is mapped to the class), source, splits.
    """
    if missing := {"name", "classes", "palette", "raw_to_train"} - content.keys():
        raise InputError(f"a label table lacks {', '.join(sorted(missing))}: it has {', '.join(map(str, content))}")
    try:
        colours = np.asarray(content["palette"])
    except ValueError:
        raise InputError(
            f"label table {content['name']} has colours of unequal lengths; give one [red, green, blue] of 0..255 for "
            "each class"
        ) from None
    colours = colours if colours.size else np.empty((0, 3), np.uint8)
    if colours.size and (colours.dtype.kind not in "iu" or colours.min() < 0 or colours.max() > 255):
        raise InputError(
            f"label table {content['name']} has a palette value outside 0..255, or no whole number; mend that colour"
        )
    raw_to_train = {int(raw): int(train) for raw, train in content["raw_to_train"].items()}
    train_to_raw = {int(train): int(raw) for train, raw in content.get("train_to_raw", {}).items()}
    if not train_to_raw:
        for raw, train in sorted(raw_to_train.items()):
            if train != VOID:
                train_to_raw.setdefault(train, raw)
    return LabelTable(
        name=str(content["name"]),
        classes=tuple(str(name) for name in content["classes"]),
        palette=colours.astype(np.uint8),
        raw_to_train=raw_to_train,
        train_to_raw=train_to_raw,
        ignore_index=int(content.get("ignore_index", VOID)),
        source=tuple(content.get("source", ())),
        splits={str(split): int(num) for split, num in content.get("splits", {}).items()},
    )
