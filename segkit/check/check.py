"""What ``segkit check`` looks at: the data of every phase, then some real steps of each."""

from __future__ import annotations

import dataclasses
import re
import traceback
import warnings
from pathlib import Path
from typing import Any

from segkit.check.audit import SplitAudit, audit_split
from segkit.check.findings import DataAudit, Report, overlap_findings, published_count, split_findings
from segkit.config.schema import Config, DatasetConfig
from segkit.data.layout import collecting
from segkit.data.samples import SampleSet
from segkit.errors import InputError
from segkit.run.splits import Splits, open_phases, open_split, same_split

MEMORY_SHARE = 0.9
"""Share of a GPU's memory above which a run is likely to run out of it."""

LOADING_SHARE = 0.9
"""Share of the model's speed that the loader must reach, or a finding names it as the bottleneck."""

BUNDLE = re.compile(r"; (the batch [^:;]*|step \d+ of phase \w+ had no batch, )[^;]*?segkit-check-[^:;]*")
"""What a sentence says of the folder of the rehearsal, which is gone when it is read"""

NUM_REHEARSED = 200
"""Samples to rehearse with at least, where not all are looked at or some are broken."""


def check(config: Config, *, sample: int | None = None, rehearses: bool = True) -> Report:
    """Look at the data of every phase, then rehearse the run; the report collects the problems of both.

    ``sample``: number of random samples of each split to look at, instead of all.
    """
    report = Report(config, sample)
    look_at_data(report)
    from segkit.run.start import early_margins  # torch, not before the processes above are forked

    if text := early_margins(config):
        report.add("warning", text)
    if rehearses:
        rehearse(report)
    else:
        report.add("note", "no step was tried, because of --skip-step")
    return report


def look_at_data(report: Report) -> None:
    """Audit the splits of every data set that a phase of the run trains or is measured on."""
    for name in report.config.schedule:
        dataset = report.config.phase_dataset(name)
        if any(dataset == seen.config for seen in report.data):
            continue
        train = _audit(report, dataset, dataset.train_split, validates=False)
        if same := same_split(dataset):
            val = train
            report.add("warning", same)
        else:
            val = _audit(report, dataset, dataset.val_split, validates=True)
            if train and val:
                report.extend(overlap_findings(train, val))
        report.data.append(DataAudit(dataset, train, val))


def _audit(report: Report, dataset: DatasetConfig, split: str, *, validates: bool) -> SplitAudit | None:
    """Open and audit one split; returns None, with findings, if its reader refuses it."""
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
    audit.published = published_count(opened, dataset.reader)
    report.extend(split_findings(audit, validates=validates))
    return audit


def rehearse(report: Report) -> None:
    """Train, evaluate, save and resume on what the audit found usable; what fails becomes a finding."""
    from segkit.check import rehearsal

    audits = _audits_to_rehearse(report)
    if audits is None:
        return
    is_whole = all(train.is_complete and not train.broken for train, _ in audits.values())
    phases = {name: Splits(_usable(report, train), _usable(report, val)) for name, (train, val) in audits.items()}
    sizes = {name: (len(train.dataset), len(val.dataset)) for name, (train, val) in audits.items()}
    config = report.config if is_whole else _tolerating_absent(report.config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            report.rehearsal = rehearsal.rehearse(config, phases, sizes=sizes)
        except Exception as error:
            text = _failure(error, config, phases)
            if not any(found.level == "error" and found.text in text for found in report.findings):  # of the audit
                report.add("error", text)
    # Where only a part of the labels is counted, what the loss says of rare classes says little of the whole.
    level = "warning" if is_whole else "note"
    for text in dict.fromkeys(str(item.message) for item in caught if _is_ours(item)):
        report.add(level, f"while training: {text}")
    if report.rehearsal is not None:
        _judge(report, phases)


def _audits_to_rehearse(report: Report) -> dict[str, tuple[SplitAudit, SplitAudit]] | None:
    """Return the audits of training and validation of every phase.

    Returns None, with a finding, if there is nothing to rehearse with or the phases do not fit together.
    """
    audits = {}
    for name in report.config.schedule:
        dataset = report.config.phase_dataset(name)
        seen = next(seen for seen in report.data if seen.config == dataset)
        if seen.train is None or seen.val is None:
            report.add("note", "no step was tried, because a split could not be opened")
            return None
        audits[name] = seen.train, seen.val
    if not all(audit.usable() and audit.dataset.labelled for audit in report.audits()):
        report.add("note", "no step was tried, because a split has no usable pair of image and label")
        return None
    try:
        with collecting():  # pairs that a reader refuses were reported above
            open_phases(report.config)  # refuses phases that do not fit together
    except InputError as error:
        report.add("error", str(error))
        return None
    return audits


def _usable(report: Report, audit: SplitAudit) -> SampleSet:
    """Return the whole split if all of it was found usable, else some usable samples."""
    if audit.is_complete and not audit.broken:
        return audit.dataset
    least = max(NUM_REHEARSED, 4 * report.config.batch_size)
    if audit.is_complete:
        report.add("note", f"the steps were tried on unbroken pairs of split {audit.dataset.split} only")
    chosen = audit.usable()[:least]
    # of a sample as many more as make a batch of the run: memory and batch norms are a matter of its size
    others = sorted(set(range(len(audit.dataset))) - set(audit.indices))
    return audit.dataset.subset(chosen + others[: max(0, report.config.batch_size - len(chosen))])


def _tolerating_absent(config: Config) -> Config:
    """Return ``config`` with losses that accept a class without pixels: it may be in the labels left out."""

    def tolerant(loss: dict[str, Any]) -> dict[str, Any]:
        return {**loss, "absent": "max"} if loss.get("absent") == "error" else loss

    schedule = {
        name: dataclasses.replace(phase, loss=phase.loss and tolerant(phase.loss))
        for name, phase in config.schedule.items()
    }
    return dataclasses.replace(config, loss=tolerant(config.loss), schedule=schedule)


def _memory_advice(config: Config, phases: dict[str, Splits]) -> str:
    """Return what to set for a run that needs less memory; names the cheapest policy that was measured to fit."""
    from segkit import memory, runtime
    from segkit.guard import FEWER_AT_ONCE, MEMORY_ADVICE
    from segkit.run import auto_batch

    device = runtime.resolve_device(config.device)
    if not memory.can_measure(device):
        return MEMORY_ADVICE
    policy = auto_batch.cheapest_policy(config, phases, device)
    if policy is None:
        return f"no further grad_checkpointing makes its steps fit: set {FEWER_AT_ONCE}"
    return f"set grad_checkpointing={policy} (the cheapest with which its steps fit, measured), or {FEWER_AT_ONCE}"


def _failure(error: Exception, config: Config, phases: dict[str, Splits]) -> str:
    """Return one sentence for what ended the rehearsal; a defect of segkit also prints its traceback."""
    from segkit import memory, runtime
    from segkit.guard import explain

    if memory.is_out_of_memory(error):
        device = runtime.resolve_device(config.device)
        owner, size = "GPU" if device.type == "cuda" else "machine", memory.total(device) / memory.GIB
        advice = _memory_advice(config, phases)
        return f"the run would fail: this {owner} has {size:.0f} GiB of memory, too little: {advice}"
    sentence, _ = explain(error)
    if sentence is not None:
        return f"the run would fail: {BUNDLE.sub('', sentence)}"
    traceback.print_exception(error)
    reason = (str(error).splitlines() or ["no message"])[0]
    return (
        f"the run would fail with {type(error).__name__} ({reason}); the traceback above says where: change the keys "
        "that it points to"
    )


def _is_ours(item: warnings.WarningMessage) -> bool:
    """Return True for a warning that segkit gives its user; False for those that libraries give their callers."""
    return issubclass(item.category, UserWarning) and f"{Path(__file__).parent.parent}" in item.filename


def _judge(report: Report, phases: dict[str, Splits]) -> None:
    """Add what the figures measured on a GPU mean for the run."""
    measured, workers = report.rehearsal, report.config.workers
    assert measured is not None
    if not measured.is_gpu:
        return
    share = measured.peak_reserved / measured.memory_limit
    if share > MEMORY_SHARE:
        advice = _memory_advice(report.config, phases)
        report.add("warning", f"the run takes {share:.0%} of the GPU's memory: {advice}")
    model = min(measured.batch_size / phase.step_seconds for phase in measured.phases)
    if measured.loader_images_per_second < LOADING_SHARE * model:
        report.add(
            "warning",
            f"{workers} workers load {measured.loader_images_per_second:.1f} images/s, but the model takes "
            f"{model:.1f}: set workers to more, up to the number of cores ({measured.num_cores} here)",
        )
