"""What an audit saw, as findings: one sentence each, with the way to mend it; and the report that collects them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from segkit.check.audit import SplitAudit
from segkit.config.dataset import RGB
from segkit.config.schema import Config, DatasetConfig
from segkit.data.labels import ranges
from segkit.data.layout import and_more
from segkit.data.statistics import one_class

if TYPE_CHECKING:
    from segkit.check.rehearsal import Rehearsal

ERROR, WARNING, NOTE = "error", "warning", "note"
LEVELS = (ERROR, WARNING, NOTE)

NUM_SHOWN = 5
"""Sentences of one kind that are listed one by one; the others of the kind are counted in one sentence."""

TOLERATED_OVERLAP = 0.01
"""Share of the validation images that may occur in training as well before it is an error: published splits have a
few such images, and one has to keep them for scores that compare."""

DARK = 64
"""Of 255: images of 8 bits of which none has a value as high are suspicious."""

LEFT_OUT = {
    ("bdd100k", "train"): 4,
    ("bdd100k", "val"): 2,
    ("cityscapes", "train_extra"): 1,
}
"""Published pairs that a reader leaves out, because they are broken; its note says so."""


@dataclass(frozen=True)
class Finding:
    """One sentence for the user: ``level`` is error, warning or note; ``files`` are all that it is about."""

    level: str
    text: str
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.level in LEVELS, self.level


@dataclass
class DataAudit:
    """The two splits of one data set of the run; None for a split that could not be opened."""

    config: DatasetConfig
    train: SplitAudit | None = None
    val: SplitAudit | None = None


@dataclass
class Report:
    """Audits of the data, the rehearsal (None if there was none), and the findings of both.

    ``sample``: number of random samples of each split that were looked at; None for all.
    """

    config: Config
    sample: int | None = None
    data: list[DataAudit] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    rehearsal: Rehearsal | None = None

    @property
    def verdict(self) -> str:
        """``ok``, ``warnings`` or ``errors``: the worst of the findings."""
        levels = {finding.level for finding in self.findings}
        return "errors" if ERROR in levels else "warnings" if WARNING in levels else "ok"

    def audits(self) -> list[SplitAudit]:
        """Return every audited split once."""
        opened = [audit for seen in self.data for audit in (seen.train, seen.val) if audit is not None]
        return list(dict.fromkeys(opened))

    def add(self, level: str, text: str) -> None:
        """Append a finding that is about no file."""
        self.extend([Finding(level, text)])

    def extend(self, findings: Iterable[Finding]) -> None:
        """Append the findings that are not there yet: two phases may share a split."""
        self.findings += [finding for finding in findings if finding not in self.findings]


def published_count(dataset: Any, reader: dict[str, Any]) -> int | None:
    """Return the published number of images; None if none is published, or if the reader's options change the split."""
    if dataset.name == "robotic_instrument" and reader.get("splits", "paper") != "paper":
        return None
    if dataset.name == "synthetic" and reader.get("num_images") is not None:
        return None
    return dataset.table.splits.get(dataset.split)


def split_findings(audit: SplitAudit, *, validates: bool) -> Iterator[Finding]:
    """Yield all findings about one split; ``validates``: scores are computed on it."""
    dataset = audit.dataset
    for note in dataset.notes:
        yield Finding(NOTE, note)
    yield from _count_findings(audit)
    if not dataset.labelled:
        text = (
            f"split {dataset.split!r} of {dataset.name} has no labels, so that nothing can be trained or measured on "
            "it: choose another dataset.train_split or dataset.val_split"
        )
        yield Finding(ERROR, text)
    yield from _listed(audit, "image", what="images that cannot be read")
    yield from _listed(audit, "label", what="labels that cannot be read")
    yield from _listed(audit, "size", what="images of another size than their labels")
    yield from _unknown_values(audit)
    yield from _suspicious(audit)
    if dataset.labelled and audit.raw_pixels:
        yield from _absent_classes(audit, validates=validates)
        if sentence := one_class(audit.class_pixels, audit.ignored_pixels, dataset):
            yield Finding(ERROR, sentence)


def _count_findings(audit: SplitAudit) -> Iterator[Finding]:
    dataset, published, found = audit.dataset, audit.published, len(audit.dataset)
    left_out = LEFT_OUT.get((dataset.name, dataset.split), 0)
    if published is None or found in (published, published - left_out):
        return
    more_or_less = "only " if found < published else ""
    text = (
        f"split {dataset.split} of {dataset.name} has {more_or_less}{found:,} images, but {published - left_out:,} "
        "are published: unpack the archives again, or go on if this is a part on purpose"
    )
    yield Finding(WARNING, text)


def _file(audit: SplitAudit, index: int, *, label: bool = False) -> str:
    sample = audit.dataset.samples[index]
    return str(sample.labels[0] if label and sample.labels else sample.image)


def _listed(audit: SplitAudit, about: str, *, what: str) -> Iterator[Finding]:
    """Yield a finding for each of the first errors ``about`` image, label or size, and one for the rest."""
    sentences = audit.errors[about]
    files = {index: _file(audit, index, label=about == "label") for index in sorted(sentences)}
    num_first = len(files) if len(files) <= NUM_SHOWN + 1 else NUM_SHOWN
    for index in list(files)[:num_first]:
        yield Finding(ERROR, sentences[index], (files[index],))
    rest = tuple(files.values())[num_first:]
    if rest:
        text = (
            f"split {audit.dataset.split} has {len(rest)} more {what}, for example {rest[0]}: mend them likewise "
            "(--json lists them all)"
        )
        yield Finding(ERROR, text, rest)


def _unknown_values(audit: SplitAudit) -> Iterator[Finding]:
    """Yield a finding for each of the first unknown raw values, and one for the rest: a JPEG mask has all of a byte."""
    values = sorted(audit.unknown)
    num_first = len(values) if len(values) <= NUM_SHOWN + 1 else NUM_SHOWN
    for value in values[:num_first]:
        yield _unknown_value(audit, value)
    if rest := values[num_first:]:
        files = tuple(_file(audit, index, label=True) for index in sorted({i for v in rest for i in audit.unknown[v]}))
        text = (
            f"labels of split {audit.dataset.split} have {len(rest):,} more raw values that the table does not know, "
            f"from {rest[0]} to {rest[-1]}, for example {files[0]}: labels are no JPEG, and hold a class a pixel, no "
            "grey or instances"
        )
        yield Finding(ERROR, text, files)


def _unknown_value(audit: SplitAudit, value: int) -> Finding:
    """Return the finding about a raw value that the table lacks, with the labels that hold it."""
    samples = audit.unknown[value]
    worst = max(samples, key=lambda index: (samples[index], -index))
    files = tuple(_file(audit, index, label=True) for index in sorted(samples))
    in_all = ""
    if len(samples) > 1:
        pixels = sum(samples.values())
        in_all = f" ({len(samples):,} labels of {audit.dataset.split} hold it, {pixels:,} pixels in all)"
    table = audit.dataset.table
    text = (
        f"label {_file(audit, worst, label=True)} has {samples[worst]:,} pixels of the raw value {value}{in_all}, "
        f"which the label table of {audit.dataset.name} does not know; allowed are "
        f"{ranges(sorted(table.raw_to_train))}: {table.cure(sorted(audit.unknown)[:NUM_SHOWN])}"
    )
    return Finding(ERROR, text, files)


def _suspicious(audit: SplitAudit) -> Iterator[Finding]:
    split = audit.dataset.split
    for indices, kind, what in (
        (audit.one_colour, "image", "shows one colour only"),
        (audit.no_class, "label", "has no pixel of any class"),
    ):
        files = tuple(_file(audit, index, label=kind == "label") for index in indices)
        if files:
            text = f"{kind} {files[0]} {what}{and_more(files)}: look at it, and remove the pair from {split} if broken"
            yield Finding(WARNING, text, files)
    if audit.dataset.kind == RGB and audit.sizes and audit.brightest < DARK:
        text = (
            f"no image of split {split} has a value above {audit.brightest:g} of 255: where files hold 10 or 12 bits "
            "as 16, of which the upper byte is read, set dataset.dtype=uint16 and dataset.in_channels, or stretch them"
        )
        yield Finding(WARNING, text)
    if audit.turned:
        files = tuple(_file(audit, index) for index in audit.turned)
        text = (
            f"{len(files)} of {len(audit.indices)} images of split {split} have an orientation tag, for example "
            f"{files[0]}: it is ignored, since labels match the pixels as they are stored; if yours were drawn on the "
            "turned images, turn the images and remove the tag"
        )
        yield Finding(NOTE, text, files)
    twice = [indices for indices in audit.digests.values() if len(indices) > 1]
    if twice:
        files = tuple(_file(audit, index) for indices in twice for index in indices)
        text = (
            f"split {split} shows {len(twice)} image{'s' * (len(twice) > 1)} more than once, for example {files[0]} "
            f"and {files[1]}: remove the copies"
        )
        yield Finding(WARNING, text, files)


def _absent_classes(audit: SplitAudit, *, validates: bool) -> Iterator[Finding]:
    classes, split = audit.dataset.classes, audit.dataset.split
    absent = [classes[k] for k in np.flatnonzero(audit.class_pixels == 0)]
    if not absent:
        return
    names = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    pronoun = "it" if len(absent) == 1 else "them"
    if not audit.is_complete:
        text = f"the {len(audit.indices)} samples of {split} show no pixel of {names}: leave out --sample to know"
    elif validates:
        text = (
            f"split {split} has no pixel of {names}, so the mean IoU is over the other classes "
            f"({len(classes) - len(absent)}) and over those of {pronoun} that are predicted, which count as 0: compare "
            f"it only with scores on the same split, or add images of {pronoun}"
        )
    else:
        text = (
            f"split {split} has no pixel of {names}, which cannot be learnt, and a loss with margins gives {pronoun} "
            "that of loss.absent: add images, or correct the label table"
        )
    yield Finding(WARNING if audit.is_complete else NOTE, text)


def overlap_findings(train: SplitAudit, val: SplitAudit) -> Iterator[Finding]:
    """Yield at most one finding: images of ``train`` whose pixels are in ``val`` as well."""
    common = [digest for digest in val.digests if digest in train.digests]
    shared = [(train.digests[digest][0], index) for digest in common for index in val.digests[digest]]
    if not shared:
        return
    files = tuple(_file(val, index) for _, index in shared)
    text = (
        f"{len(shared)} of {len(val.indices)} images of split {val.dataset.split} are in {train.dataset.split} as "
        f"well, for example {files[0]} = {_file(train, shared[0][0])}: remove them from {train.dataset.split}, as "
        "scores on images that were trained on say little about others"
    )
    share = len(shared) / len(val.indices)
    yield Finding(ERROR if share > TOLERATED_OVERLAP else WARNING, text, files)


def summary(audit: SplitAudit) -> dict[str, Any]:
    """Return what was seen of a split as JSON values."""
    dataset = audit.dataset
    pixels, images = audit.class_pixels.tolist(), audit.class_images.tolist()
    table = dataset.table
    return {
        "dataset": dataset.name,
        "split": dataset.split,
        "num_images": len(dataset),
        "num_published": audit.published,
        "num_checked": len(audit.indices),
        "num_broken": len(audit.broken),
        "num_unreadable_images": len(audit.errors["image"]),
        "num_unreadable_labels": len(audit.errors["label"]),
        "num_different_sizes": len(audit.errors["size"]),
        "num_with_orientation": len(audit.turned),
        "sizes": [{"height": h, "width": w, "images": n} for (h, w), n in audit.sizes.most_common()],
        "ignored_pixels": audit.ignored_pixels,
        "raw_values": [
            {"value": value, "pixels": audit.raw_pixels[value], "train": table.raw_to_train.get(value)}
            for value in sorted({*audit.raw_pixels, *table.raw_to_train})
        ],
        "classes": {name: {"pixels": pixels[k], "images": images[k]} for k, name in enumerate(dataset.classes)},
        "notes": list(dataset.notes),
    }
