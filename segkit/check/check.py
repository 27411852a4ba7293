"""What ``segkit check`` looks at: the data of every phase, then one real step of everything."""

from __future__ import annotations

import dataclasses
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segkit.config.schema import Config, DatasetConfig
from segkit.errors import InputError

MEMORY_SHARE = 0.9
"""Share of a GPU's memory above which a run is likely to end for want of it."""


LOADING_SHARE = 0.9
"""Share of the model's speed that the loader must reach, or it is named as what a run waits for."""


NUM_REHEARSED = 200
"""Samples to rehearse with at least, where not all are looked at or some are broken."""


@dataclass
class DataAudit:
    """The two splits of one data set of the run; None for a split that could not be opened."""

    config: DatasetConfig
    train: Any = None
    val: Any = None


@dataclass
class Report:
    """All that was seen: audits of the data, the rehearsal (None if there was none), and findings of both."""

    config: Config
    sample: int | None = None
    data: list[DataAudit] = field(default_factory=list)
    findings: list[Any] = field(default_factory=list)
    rehearsal: Any = None

    @property
    def verdict(self) -> str:
        """``ok``, ``warnings`` or ``errors``: the worst of the findings."""
        levels = {finding.level for finding in self.findings}
        return "errors" if "error" in levels else "warnings" if "warning" in levels else "ok"

    def add(self, level: str, text: str) -> None:
        """Append a finding without files."""
        from segkit.check.findings import Finding

        self.extend([Finding(level, text)])

    def extend(self, findings: list[Any]) -> None:
        """Append the findings that were not there before (two phases may share a split)."""
        self.findings += [finding for finding in findings if finding not in self.findings]


def check(config: Config, *, sample: int | None = None, rehearses: bool = True) -> Report:
    """Look at the data of every phase, then rehearse the run; problems of both are collected in the report.

    ``sample``: look at so many random samples of each split only. Raises InputError for a mistake in ``config``.
    """
    from segkit.config.schema import check_targets

    check_targets(config)
    report = Report(config, sample)
    look_at_data(report)
    if rehearses:
        rehearse(report)
    else:
        report.add("note", "no step was tried, because of --skip-step")
    return report


def look_at_data(report: Report) -> None:
    """Audit the splits of every data set that a phase of the run trains or is measured on."""
    from segkit.check.findings import overlap_findings

    for name in report.config.schedule:
        dataset = report.config.phase_dataset(name)
        if any(dataset == seen.config for seen in report.data):
            continue
        seen = DataAudit(dataset)
        seen.train = _audit(report, dataset, dataset.train_split, validates=False)
        if dataset.val_split == dataset.train_split:
            seen.val = seen.train
            report.add(
                "warning",
                f"training and validation are both on split {dataset.val_split} of {dataset.name}, so that the scores "
                "say little about other images: set dataset.val_split to another one",
            )
        else:
            seen.val = _audit(report, dataset, dataset.val_split, validates=True)
            if seen.train and seen.val:
                report.extend(overlap_findings(seen.train, seen.val))
        report.data.append(seen)


def _audit(report: Report, dataset: DatasetConfig, split: str, *, validates: bool) -> Any:
    """Open and audit one split; what stops its reader becomes a finding, and the split None."""
    from segkit.check.audit import audit_split
    from segkit.check.findings import published_count, split_findings
    from segkit.data.layout import collecting
    from segkit.run.splits import open_split

    opened = None
    with collecting() as refused:
        try:
            opened = open_split(dataset, split)
        except InputError as error:
            refused.append(error)
    for refusal in refused:
        report.add("error", str(refusal))
    if opened is None:
        return None
    audit = audit_split(opened, sample=report.sample, seed=report.config.seed, workers=report.config.workers)
    published = published_count(opened, dataset.reader)
    report.extend(split_findings(audit, published=published, validates=validates))
    return audit


def rehearse(report: Report) -> None:
    """Train, evaluate, save and resume on what the audit found usable; what fails becomes a finding."""
    phases = _rehearsal_data(report)
    if phases is None:
        return
    sizes = {name: (len(splits.train), len(splits.val)) for name, splits in _all_data(report).items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            from segkit.check.rehearsal import rehearse as rehearse_run

            report.rehearsal = rehearse_run(_tolerant(report), phases, sizes=sizes)
        except Exception as error:
            report.add("error", _failure(error))
    # Where only a part of the labels is counted, what the loss says of rare classes says little of the whole.
    level = "warning" if _is_whole(report) else "note"
    for text in dict.fromkeys(str(item.message) for item in caught if _is_ours(item)):
        report.add(level, f"while training: {text}")
    if report.rehearsal is not None:
        _judge(report)


def _all_data(report: Report) -> dict[str, Any]:
    """The whole splits of every phase."""
    from segkit.run.splits import Splits

    found = {}
    for name in report.config.schedule:
        dataset = report.config.phase_dataset(name)
        seen = next(seen for seen in report.data if seen.config == dataset)
        found[name] = Splits(seen.train.dataset, seen.val.dataset)
    return found


def _rehearsal_data(report: Report) -> dict[str, Any] | None:
    """The splits to rehearse with: whole where all is well, else samples that were found usable.

    None, with a finding, where there is nothing to rehearse with.
    """
    from segkit.data.layout import collecting
    from segkit.run.splits import Splits, open_phases

    if any(seen.train is None or seen.val is None for seen in report.data):
        report.add("note", "no step was tried, because a split could not be opened")
        return None
    if not all(audit.usable() and audit.dataset.labelled for seen in report.data for audit in (seen.train, seen.val)):
        report.add("note", "no step was tried, because a split has no usable pair of image and label")
        return None
    try:
        with collecting():  # pairs that a reader refuses were reported above
            open_phases(report.config)  # for what it says of phases that do not fit together
    except InputError as error:
        report.add("error", str(error))
        return None
    phases = {}
    for name in report.config.schedule:
        dataset = report.config.phase_dataset(name)
        seen = next(seen for seen in report.data if seen.config == dataset)
        phases[name] = Splits(_usable(report, seen.train), _usable(report, seen.val))
    return phases


def _usable(report: Report, audit: Any) -> Any:
    """The whole split if all of it was found usable, else some usable samples."""
    if audit.is_complete and not audit.broken:
        return audit.dataset
    least = max(NUM_REHEARSED, 4 * report.config.batch_size)
    if audit.is_complete:
        report.add("note", f"the steps were tried on unbroken pairs of split {audit.dataset.split} only")
    return audit.dataset.subset(audit.usable()[:least])


def _is_whole(report: Report) -> bool:
    """True if the rehearsal trains on all of the training data."""
    return all(seen.train.is_complete and not seen.train.broken for seen in report.data)


def _tolerant(report: Report) -> Config:
    """The configuration; where only a part of the labels is counted, a class may be missing from that part."""
    config = report.config
    if _is_whole(report):
        return config

    def tolerant(loss: dict[str, Any] | None) -> dict[str, Any] | None:
        return {**loss, "absent": "max"} if loss and loss.get("absent") == "error" else loss

    schedule = {name: dataclasses.replace(phase, loss=tolerant(phase.loss)) for name, phase in config.schedule.items()}
    loss = tolerant(config.loss)
    assert loss is not None
    return dataclasses.replace(config, loss=loss, schedule=schedule)


def _failure(error: Exception) -> str:
    """One sentence for what ended the rehearsal; a traceback as well where it is nobody's mistake."""
    from segkit import memory
    from segkit.guard import MEMORY_ADVICE, explain

    if memory.is_out_of_memory(error):
        size = memory.total() / 2**30
        return f"the run would fail: this machine has {size:.0f} GiB of memory, too little: {MEMORY_ADVICE}"
    sentence, _ = explain(error)
    if sentence is not None:
        return f"the run would fail: {sentence}"
    traceback.print_exception(error)
    reason = (str(error).splitlines() or ["no message"])[0]
    return (
        f"the run would fail with {type(error).__name__} ({reason}); the traceback above says where: change the keys "
        "that it points to"
    )


def _is_ours(item: warnings.WarningMessage) -> bool:
    """True for a warning that segkit gives its user; not for those that libraries give their callers."""
    return issubclass(item.category, UserWarning) and f"{Path(__file__).parent.parent}" in item.filename


def _judge(report: Report) -> None:
    """What the measured figures mean for the run."""
    from segkit.guard import MEMORY_ADVICE

    measured, workers = report.rehearsal, report.config.workers
    if not measured.is_gpu:
        return
    share = measured.peak_reserved / measured.memory_limit
    if share > MEMORY_SHARE:
        report.add("warning", f"the run takes {share:.0%} of the GPU's memory: {MEMORY_ADVICE}")
    model = min(measured.batch_size / phase.step_seconds for phase in measured.phases)
    if measured.loader_images_per_second < LOADING_SHARE * model:
        report.add(
            "warning",
            f"{workers} workers load {measured.loader_images_per_second:.1f} images/s, but the model takes "
            f"{model:.1f}: set workers to more, up to the number of cores ({measured.num_cores} here)",
        )
