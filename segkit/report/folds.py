"""Cross-validation: the folds of one configuration become one record, in which each image is scored once.

An image is scored by the run whose fold held it out. Counts are added, as if one run had predicted all images; a mean
over the scores of the folds would weigh a fold with few pixels of a class like one with many.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from segkit.errors import InputError
from segkit.evaluation import metrics
from segkit.evaluation.per_image import PerImageCounts
from segkit.report.groups import TRAINING_PIXELS, settings
from segkit.report.runs import AGAIN, RunRecord

KEY = "dataset.reader.fold"


def _reader(run: RunRecord) -> dict[str, Any]:
    reader = run.dataset.get("reader")
    return reader if isinstance(reader, dict) else {}


def fold_of(run: RunRecord) -> tuple[int, int] | None:
    """Return the fold that ``run`` held out, and the number of folds; None for a run without folds.

    A reader whose folds are published (``splits=sequence``) has four, and no key for their number.
    """
    reader = _reader(run)
    fold, folds = reader.get("fold"), reader.get("folds", 4 if reader.get("splits") == "sequence" else 0)
    return (fold, folds) if type(fold) is int and type(folds) is int and 0 <= fold < folds else None


def pool_folds(runs: Sequence[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """Return ``runs`` with those that differ in their fold alone as one record each, and a note for missing folds.

    Raises InputError for a fold without counts of its images, and for an image that two of the folds hold out.
    """
    members: dict[str, list[RunRecord]] = {}
    for number, run in enumerate(runs):
        own = fold_of(run)
        alike = {key: value for key, value in settings(run).items() if not key.endswith((KEY, TRAINING_PIXELS))}
        key = json.dumps([alike, run.seed, run.protocol, run.classes], sort_keys=True, default=str)
        key = key if own else str(number)
        while own and any(fold_of(other) == own for other in members.get(key, [])):
            key += "+"  # one fold trained twice: a row of its own
        members.setdefault(key, []).append(run)
    found, notes = [], []
    for group in members.values():
        if (own := fold_of(group[0])) is not None:
            group.sort(key=lambda run: fold_of(run) or (0, 0))
            have = [fold for fold, _ in map(fold_of, group)]  # type: ignore[misc]
            missing = ", ".join(str(fold) for fold in range(own[1]) if fold not in have)
            if missing:
                notes.append(
                    f"{group[0].path} has fold {', '.join(map(str, have))} of {own[1]}, and no fold {missing} was "
                    "named: the images that a missing fold holds out are not scored"
                )
        found.append(_pooled(group) if len(group) > 1 else group[0])
    return found, notes


def _pooled(group: Sequence[RunRecord]) -> RunRecord:
    """Return one record for several folds, in the order of their numbers."""
    holder: dict[str, RunRecord] = {}
    for run in group:
        if run.per_image is None:
            raise InputError(f"{run.path} has no counts of single images, which its fold is pooled by: {AGAIN}")
        for name in run.per_image.names:
            if holder.setdefault(name, run) is not run:
                raise InputError(
                    f"image {name!r} is held out by {holder[name].path} and by {run.path}, but in a cross-validation "
                    "one fold holds out each image: train all folds on the same files, or compare the runs one by one"
                )
    parts = [run.per_image for run in group if run.per_image is not None]
    counts = PerImageCounts.joined(parts, tuple(holder))
    results = metrics.summary(counts.total(), group[0].classes)
    results |= {"num_images": counts.num_images, "protocol": group[0].protocol}
    own = [fold_of(run) or (0, 0) for run in group]
    total = own[0][1]
    record = replace(
        group[0], config=deepcopy(group[0].config), results=results, per_image=counts, folds=tuple(group),
        pictures={name: picture for run in group for name, picture in run.pictures.items()},
        counts=_added([run.counts for run in group]), margins=None,
        pooled=f"{len(own)} {f'of {total} ' if len(own) < total else ''}folds pooled",
    )  # fmt: skip
    _reader(record)["fold"] = ",".join(str(fold) for fold, _ in own)
    return record


def _added(all_counts: Sequence[dict[str, int] | None]) -> dict[str, int] | None:
    """Return the training pixels of all folds; None if those of one are not known."""
    known = [counts for counts in all_counts if counts is not None]
    if len(known) < len(all_counts):
        return None
    return {name: sum(counts.get(name, 0) for counts in known) for name in known[0]}
