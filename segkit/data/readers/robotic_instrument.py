"""Robotic Instrument: the training part of MICCAI EndoVis 2017, eight sequences of 225 frames.

Folders below ``root`` (the archives' own top folders, or a folder ``training``, may lie in between)::

    instrument_dataset_{1..8}/left_frames/frame%03d.png
    instrument_dataset_{1..8}/ground_truth/<instrument folder>/frame%03d.png        one mask per instrument

The masks of a frame are merged when it is read; nothing is written into the data. The names of the instrument folders
follow no rule, so they are found by the frames in them.
"""

from __future__ import annotations

import dataclasses
import os
import re
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from segkit.data.decode import read_index_png
from segkit.data.files import is_folder, visible_entries
from segkit.data.labels import VOID, load_table, table_file
from segkit.data.layout import Layout, check_option, check_split
from segkit.data.samples import Sample, SampleSet
from segkit.errors import InputError

ARCHIVES = "instrument_1_4_training.zip and instrument_5_8_training.zip"
TASKS = ("parts", "binary", "type")
SEQUENCES = tuple(range(1, 9))
PAPER_FRAMES = {"train": range(150), "val": range(150, 175), "test": range(175, 225)}
"""Frames of each sequence in each split of the paper (neighbouring frames fall into different splits)."""

FOLDS = ((1, 3), (2, 5), (4, 8), (6, 7))
"""Sequences of the validation split in each fold of ``splits=sequence``."""

MERGED = ("type_labels", "binary_labels", "parts_labels")
"""Folders that the paper's code writes beside the instruments: merged masks, not instruments."""

PART_CODES = (0, 10, 20, 30, 40)
_IS_ODD = np.array([value not in PART_CODES for value in range(256)], np.uint8)
_FLOOR = np.array([value // 10 * 10 if value <= PART_CODES[-1] else 0 for value in range(256)], np.uint8)
_FRAME = re.compile(r"(frame(\d{3}))\.png")


def read(
    root: Path | str | None,
    *,
    split: str,
    task: str = "parts",
    splits: str = "paper",
    fold: int = 0,
    overlap: str = "paper",
    odd_values: str = "error",
) -> SampleSet:
    """Open ``split``.

    ``task``: parts (shaft, wrist, claspers, probe), binary (instrument or not), or type (seven kinds).
    ``splits``: paper (train, val, test by frame) or sequence (train, val; ``fold`` 0..3 holds out the
    sequences of :data:`FOLDS`).
    ``overlap``, where two instruments cover a pixel: paper (parts: the codes are added, sums above 40 become
    background; type: the last folder by name wins) or ignore (the pixel is ignored). It does not matter for
    binary.
    ``odd_values``, for values other than 0, 10, 20, 30, 40 in a mask: error, or floor (the merged value is
    divided by ten and rounded down, as in the paper's code).

    Raises InputError for missing folders, frames and masks; ``notes`` names sequences that are not there.
    """
    name = "robotic_instrument"
    layout = Layout(name, root, archives=ARCHIVES)
    check_option("task", task, TASKS, dataset=name)
    check_option("splits", splits, ("paper", "sequence"), dataset=name)
    check_option("fold", fold, range(len(FOLDS)), dataset=name)
    if fold and splits == "paper":
        raise InputError(f"fold is {fold}, but splits=paper has no folds: set dataset.reader.splits=sequence")
    check_option("overlap", overlap, ("paper", "ignore"), dataset=name)
    check_option("odd_values", odd_values, ("error", "floor"), dataset=name)
    check_split(split, PAPER_FRAMES if splits == "paper" else ("train", "val"), dataset=f"{name} (splits={splits})")
    wanted = [n for n in SEQUENCES if splits == "paper" or (n in FOLDS[fold]) == (split == "val")]
    found = _sequences(layout)
    samples = []
    for number in wanted:
        if number in found:
            samples += _samples(layout, found[number], frames=PAPER_FRAMES[split] if splits == "paper" else range(225))
    missing = ", ".join(str(number) for number in wanted if number not in found)
    of = "1..8" if splits == "paper" else f"split {split}"
    notes = [f"sequences {missing} of {of} are not under {layout.root}: unpack {ARCHIVES}"] if missing else []
    if found.keys().isdisjoint(wanted):
        raise InputError(notes[0])
    table = load_table(f"robotic_instrument_{task}")
    if overlap == "ignore":
        table = dataclasses.replace(table, raw_to_train={**table.raw_to_train, VOID: table.ignore_index})
    return SampleSet(
        samples,
        table=table,
        name=name,
        split=split,
        load_label=partial(merge_masks, task=task, overlap=overlap, odd_values=odd_values),
        notes=notes,
    )


def _sequences(layout: Layout) -> dict[int, Path]:
    """{number: folder} of the training sequences: in ``root``, ``root/training`` or the archives' tops."""
    root = layout.root
    found: dict[int, Path] = {}
    for base in (root, root / "training", *(root / f"instrument_{part}_training" for part in ("1_4", "5_8"))):
        for number in SEQUENCES:
            folder = base / f"instrument_dataset_{number}"
            if os.path.isdir(folder / "left_frames"):
                if number in found:
                    raise InputError(
                        f"instrument_dataset_{number} lies in {found[number].parent} and in {base}; keep one of the two"
                    )
                found[number] = folder
    if not found:
        layout.base("instrument_dataset_1/left_frames", "training", "instrument_1_4_training")
    return found


def _frames(folder: Path, among: range = range(1000)) -> dict[str, Path]:
    """{frame%03d: file} of the frames in ``folder`` whose numbers are ``among`` these, in order."""
    found = [(match, entry.path) for entry in visible_entries(folder) if (match := _FRAME.fullmatch(entry.name))]
    return {match[1]: Path(path) for match, path in found if int(match[2]) in among}


def instrument_folders(sequence: Path) -> list[Path]:
    """Return the folders of ``sequence``/ground_truth that hold frames, without the paper's merged ones, by name."""
    truth = Layout("robotic_instrument", sequence.parent, archives=ARCHIVES).folder(sequence / "ground_truth")
    folders = [Path(entry.path) for entry in visible_entries(truth) if is_folder(entry) and entry.name not in MERGED]
    return [folder for folder in folders if _frames(folder)]


def _samples(layout: Layout, sequence: Path, *, frames: range) -> list[Sample]:
    """The samples of one sequence whose frame numbers lie in ``frames``."""
    folders = instrument_folders(sequence)
    if not folders:
        raise InputError(
            f"no folder of {sequence / 'ground_truth'} holds masks named frame000.png; unpack {ARCHIVES} again"
        )
    images = _frames(sequence / "left_frames", frames)
    masks = [_frames(folder, frames) for folder in folders]
    lonely = {key: path for found in masks for key, path in found.items() if key not in images}
    layout.pair({}, lonely, image=f"{sequence}/left_frames/{{id}}.png", label="")
    for folder, found in zip(folders, masks, strict=True):
        known = {key: path for key, path in found.items() if key in images}
        layout.pair(images, known, image="", label=f"{folder}/{{id}}.png")
    return [
        Sample(f"{sequence.name}_{key}", image, tuple(found[key] for found in masks))
        for key, image in images.items()
        if all(key in found for found in masks)
    ]


def merge_masks(sample: Sample, *, task: str, overlap: str, odd_values: str) -> np.ndarray:
    """Return the raw label (H, W) uint8 of a frame: part codes, 0/1 for binary, type codes; 255 where ignored."""
    masks = [read_index_png(path, first_channel=True) for path in sample.labels]  # of sequence 7 they are in colour
    for path, mask in zip(sample.labels, masks, strict=True):
        if mask.shape != masks[0].shape:
            raise InputError(
                f"masks {sample.labels[0]} and {path} of one frame have sizes {masks[0].shape[::-1]} and "
                f"{mask.shape[::-1]}; unpack {ARCHIVES} again"
            )
        if odd_values == "error":
            _check_codes(mask, path)
    total = sum(masks, np.zeros(masks[0].shape, np.uint16))
    if task == "binary":
        return (total > 0).astype(np.uint8)
    if task == "parts":  # the sum of the codes, 0 where it exceeds 40, rounded down to a multiple of ten
        merged = cv2.LUT(np.minimum(total, 255).astype(np.uint8), _FLOOR)
    else:
        merged = np.zeros(total.shape, np.uint8)
        for path, mask in zip(sample.labels, masks, strict=True):
            merged[mask > 0] = _type_code(path.parent)
    if overlap == "ignore":
        merged[sum((mask > 0).astype(np.uint8) for mask in masks) > 1] = VOID
    return merged


def _check_codes(mask: np.ndarray, path: Path) -> None:
    if cv2.LUT(mask, _IS_ODD).any():
        counts = np.bincount(mask.ravel(), minlength=256)
        odd = [value for value in np.flatnonzero(counts).tolist() if value not in PART_CODES]
        listed = ", ".join(f"{value} ({counts[value]} pixels)" for value in odd[:5])
        raise InputError(
            f"mask {path} has values that are no instrument part: {listed}; allowed are 0, 10, 20, 30, 40: "
            "set dataset.reader.odd_values=floor to divide by ten and round down, as the paper's code does"
        )


def _type_code(folder: Path) -> int:
    types = table_file("robotic_instrument_type")["type_mapping"]
    for name, code in types.items():
        if name in folder.name:
            return code
    raise InputError(
        f"folder {folder} names no known instrument; its name must contain one of "
        f"{', '.join(types)} (needed for dataset.reader.task=type only)"
    )
