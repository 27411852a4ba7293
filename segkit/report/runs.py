"""Read finished runs for a report: the files of a run folder, checked; nothing is computed anew."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segkit.config.targets import fits
from segkit.errors import InputError
from segkit.evaluation import metrics
from segkit.evaluation.per_image import PerImageCounts
from segkit.files import MOST_JSON_BYTES, digest_of, read_config_text, read_json, read_text
from segkit.report.pictures import StoredPicture, read_pictures

RESULT_KEYS = ("mean_iou", "pixel_accuracy", "classes", "num_classes_averaged", "num_images", "protocol")
CLASS_KEYS = {"iou", "precision", "recall", "target_pixels"}

OLD = "it was written by another version of segkit"
DAMAGED = "give the command that trained the run again, which mends the file or says how, or leave the run out"
CONFIG = "delete it, and give the command that trained the run again"
AGAIN = (
    "evaluate the run again with `segkit evaluate RUN` and compare with --evaluation, or delete PHASE/results.json in "
    "it and give the command that trained it again"
)


@dataclass(frozen=True)
class RunRecord:
    """What one run folder says. ``config`` is as it stood for ``phase``, the phase of the results; ``counts`` are
    the training pixels of every class. ``folds`` are the records that were pooled in this one, and ``pooled`` says so.

    Optional files that are missing are None or empty here, with a sentence in ``notes``.
    """

    path: Path
    phase: str
    config: dict[str, Any]
    results: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] | None = None
    margins: dict[str, Any] | None = None
    metrics: tuple[dict[str, Any], ...] = ()
    per_image: PerImageCounts | None = None
    pictures: dict[str, StoredPicture] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    folds: tuple[RunRecord, ...] = ()
    pooled: str = ""

    @property
    def folders(self) -> tuple[RunRecord, ...]:
        """The record of each run folder: itself, or its folds."""
        return self.folds or (self,)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their numbers."""
        return tuple(self.results["classes"])

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.config["seed"])

    @property
    def loss(self) -> dict[str, Any]:
        """The loss node of the phase."""
        return self.config["schedule"][self.phase].get("loss") or self.config["loss"]

    @property
    def dataset(self) -> dict[str, Any]:
        """The data set node of the phase; empty if a stranger's file has something else there."""
        node = self.config["schedule"][self.phase].get("dataset") or self.config["dataset"]
        return node if isinstance(node, dict) else {}

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """Colours of the classes in the stored pictures; empty if there are none."""
        return next((picture.palette for picture in self.pictures.values()), ())

    @property
    def protocol(self) -> dict[str, Any]:
        """How the results were measured."""
        return self.results["protocol"]

    def is_outdated(self) -> bool:
        """True for an evaluation of a checkpoint that has other weights now."""
        which, digest = self.results.get("checkpoint"), self.results.get("digest")
        path = self.path / "checkpoints" / f"{which}.pt"
        return digest is not None and which in ("last", "best") and path.is_file() and digest_of(path) != digest


def find_runs(paths: Sequence[Path | str], *, evaluation: str | None = None) -> tuple[list[RunRecord], list[str]]:
    """Return the runs that ``paths`` name, and a note for every file or folder that is left out.

    A path is a run folder, the folder of one phase in it, or a folder whose sub-folders are runs (a sweep).
    ``evaluation`` names an evaluation that ``segkit evaluate`` wrote into RUN/evaluations; without it the results
    are those at the end of training. InputError for a named run that cannot be read; an unfinished run of a sweep
    is left out with a sentence.
    """
    runs: list[RunRecord] = []
    notes: list[str] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"{path} is not a folder: name run folders such as outputs/DATA/MODEL/TIME, or a sweep's")
        is_phase = (path / "results.json").is_file() and (path.resolve().parent / "config.yaml").is_file()
        if is_phase or (path / "config.yaml").is_file():
            runs.append(_read_current(path, evaluation))
        else:
            found, left_out = _read_sweep(path, evaluation)
            runs += found
            notes += left_out
    once: dict[Path, RunRecord] = {}
    for run in runs:
        once.setdefault((run.path / "results.json").resolve(), run)
    return list(once.values()), [*notes, *(note for run in once.values() for note in run.notes)]


def _read_current(path: Path, evaluation: str | None) -> RunRecord:
    """Return the record of a run; InputError if its checkpoint has other weights now than the evaluation was of."""
    run = read_run(path, evaluation=evaluation)
    if run.is_outdated():
        raise InputError(
            f"the evaluation {evaluation!r} of {run.path} is of weights that it has not any more, since its training "
            f"went on: evaluate it again with `{_evaluate(run.path)}`"
        )
    return run


def _evaluate(path: Path) -> str:
    """The command that evaluates the run folder ``path``, or the run of the phase whose folder it is."""
    if (path / "config.yaml").is_file():
        return f"segkit evaluate {shlex.quote(str(path))}"
    return f"segkit evaluate {shlex.quote(str(path.resolve().parent))} --phase {shlex.quote(path.resolve().name)}"


def _read_sweep(path: Path, evaluation: str | None) -> tuple[list[RunRecord], list[str]]:
    ends = _sweep_ends(path)
    folders = [item for item in path.iterdir() if item.is_dir() and not item.name.startswith((".", "_"))]
    folders.sort(key=_natural)
    runs, notes = [], []
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            notes.append(f"left out: {folder} has no config.yaml, its run {ends.get(folder.name, 'did not start')}")
        elif not (folder / "results.json").is_file():
            notes.append(f"left out: {folder} has no results.json, its run {ends.get(folder.name, 'is not finished')}")
        else:
            runs.append(_read_current(folder, evaluation))
    if runs:
        return runs, notes
    if any((folder / "config.yaml").is_file() for folder in folders):
        raise InputError(
            f"no run of the sweep {path} is finished: wait for one, or run the sweep again to go on with it"
        )
    raise InputError(
        f"{path} is neither a run (it has no config.yaml), a finished phase of one, nor a sweep (no sub-folder has "
        "one): name run folders such as outputs/DATA/MODEL/TIME"
    )


def _sweep_ends(path: Path) -> dict[str, str]:
    """Return how each failed job of a sweep ended, by the name of its folder."""
    try:
        jobs = json.loads(read_text(path / "sweep.json", most=MOST_JSON_BYTES, cure=DAMAGED))
        failed = [job for job in jobs if job["state"] == "failed"]
        reasons = [str(job.get("error") or "its log says why").strip().removeprefix("error: ") for job in failed]
        return {Path(job["folder"]).name: f"failed: {why}" for job, why in zip(failed, reasons, strict=True)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}  # a sweep on a cluster has no sweep.json; its folders suffice


def _natural(path: Path) -> tuple[int, int, str]:
    return (0, int(path.name), "") if path.name.isdecimal() else (1, 0, path.name)


def read_run(path: Path, *, evaluation: str | None = None) -> RunRecord:
    """Return the record of a run folder, or of the folder of one of its phases; InputError names what is wrong."""
    top = path if (path / "config.yaml").is_file() else path.resolve().parent
    config = _read_config(top / "config.yaml")
    names = list(config["schedule"])
    phase = names[-1] if top == path else path.resolve().name
    if phase not in config["schedule"]:
        raise InputError(f"{path} is no phase of {top}, whose phases are {', '.join(names)}: name the run folder")
    results_file, counts_file = _result_files(path, evaluation)
    cure = AGAIN if evaluation is None else "delete it, and evaluate the run again with `segkit evaluate RUN`"
    results = check_results(read_json(results_file, cure=cure), results_file, cure=cure)
    if top == path and results.get("phase") in names:
        phase = results["phase"]
    until = names[: names.index(phase) + 1]
    config = {**config, "schedule": {name: config["schedule"][name] for name in until}}
    notes: list[str] = []

    def read(file: Path, reader: Callable[[Path], Any], purpose: str) -> Any:
        if file.is_file():
            return reader(file)
        notes.append(f"{path} has no {file.name}: no {purpose} for it")
        return None

    curves = read(top / "metrics.jsonl", lambda file: _read_lines(file, until), "curves")
    if curves == []:
        notes.append(f"{top / 'metrics.jsonl'} has no line of {', '.join(until)}: no curves for it")
    pictures = read_pictures(path / "pictures")
    if evaluation is not None and pictures:
        pictures = {}
        notes.append(f"the pictures in {path} are of the evaluation after training and not shown for {evaluation}")
    record = RunRecord(
        path=path,
        phase=phase,
        config=config,
        results=results,
        provenance=read(top / "provenance.json", _read_json, "origin") or {},
        counts=read(path / "label_counts.json", _read_counts, "label distribution"),
        margins=_read_margins(path / "margins.json") if (path / "margins.json").is_file() else None,
        metrics=tuple(curves or ()),
        per_image=read(counts_file, PerImageCounts.load, "intervals, tests and confusion matrix"),
        pictures=pictures,
        notes=tuple(notes),
    )
    _check_per_image(record, results_file, counts_file)
    return record


def _result_files(path: Path, evaluation: str | None) -> tuple[Path, Path]:
    """Return the files of scores and of per-image counts; InputError if there are no such scores."""
    if evaluation is None:
        if not (path / "results.json").is_file():
            raise InputError(
                f"{path} has no results.json, its run is not finished: go on with it, or leave it out of the comparison"
            )
        return path / "results.json", path / "per_image.npz"
    folder = path / "evaluations"
    known = sorted(item.stem for item in folder.glob("*.json"))
    if evaluation not in known:
        # A name may be given without the hash of the protocol at its end.
        matching = [name for name in known if re.fullmatch(f"{re.escape(evaluation)}-[0-9a-f]{{8}}", name)]
        if len(matching) > 1:
            raise InputError(
                f"{path} has several evaluations {evaluation!r}, of different protocols: name one of "
                f"{', '.join(matching)}"
            )
        evaluation = matching[0] if matching else evaluation
    if evaluation not in known:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise InputError(f"{path} has no evaluation {evaluation!r}, {has}: make it with `{_evaluate(path)}`")
    return folder / f"{evaluation}.json", folder / f"{evaluation}.npz"


def _read_config(path: Path) -> dict[str, Any]:
    config = read_config_text(path)
    schedule = config["schedule"]
    if not isinstance(schedule, dict) or not schedule or not all(isinstance(item, dict) for item in schedule.values()):
        raise InputError(f"{path} has no phases in schedule, {OLD}: run it again")
    nodes = [(config["loss"], "loss"), (config["model"], "model")]
    nodes += [(item["loss"], f"schedule.{name}.loss") for name, item in schedule.items() if item.get("loss")]
    for node, name in nodes:
        if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
            raise InputError(f"{path} has no {name}._target_, {OLD}: run it again")
    if type(seed := config.get("seed")) is not int:
        raise InputError(f"{path} has the seed {seed!r}, but must have a whole number: {CONFIG}")
    return config


def check_results(results: dict[str, Any], path: Path, *, cure: str = AGAIN) -> dict[str, Any]:
    """Return ``results``, the content of ``path``; InputError, which ends with ``cure``, if they are no results."""
    missing = [key for key in RESULT_KEYS if key not in results]
    if missing:
        raise InputError(f"{path} has no {' and no '.join(missing)}, {OLD}: {cure}")
    classes = results["classes"]
    rows = list(classes.values()) if fits(classes, dict[str, dict[str, Any]]) else []
    values = [(key, results[key]) for key in ("mean_iou", "pixel_accuracy")]
    values += [item for row in rows for item in row.items()]
    good = all(
        type(value) is int and 0 <= value < 2**63 if name.endswith("_pixels") else _is_share(value)
        for name, value in values
    )
    if not rows or not good or not all(row.keys() >= CLASS_KEYS for row in rows):
        raise InputError(f"{path} lacks a score, or holds one that is no number from 0 to 1, it is damaged: {cure}")
    if any(type(results[key]) is not int or results[key] < 0 for key in ("num_images", "num_classes_averaged")):
        raise InputError(f"{path} has a number of images or classes that is none, the file is damaged: {cure}")
    best = results.get("best") or {}
    known = isinstance(best, dict) and (not best or _is_share(best.get("mean_iou", "none")))
    if not known or not fits(results.get("absent_classes"), list[str] | None):
        raise InputError(f"{path} has a best score or absent classes that are none, the file is damaged: {cure}")
    if not isinstance(results["protocol"], dict):
        raise InputError(f"{path} has a protocol that is not of keys and values, the file is damaged: {cure}")
    return results


def _is_share(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, cure=DAMAGED)


def _read_counts(path: Path) -> dict[str, int]:
    rows = _read_json(path).get("classes")
    try:
        counts = {str(name): int(row["pixels"]) for name, row in rows.items()}  # type: ignore[union-attr]
        if not counts or min(counts.values()) < 0 or sum(counts.values()) >= 2**63:
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise InputError(f"{path} has not a number of pixels per class: {DAMAGED}") from None
    return counts


def _read_margins(path: Path) -> dict[str, Any]:
    margins = _read_json(path)
    names: Any = margins.get("classes")
    columns: list[Any] = [margins.get(key) for key in ("rho_0k", "rho_k0")]
    good = fits(names, list[str]) and all(fits(column, list[float]) for column in columns)
    if not good or not names or any(len(column) != len(names) or max(map(abs, column)) >= 1e300 for column in columns):
        raise InputError(f"{path} has not one rho_0k and one rho_k0 per class: {DAMAGED}")
    return margins


def _read_lines(path: Path, phases: Iterable[str]) -> list[dict[str, Any]]:
    wanted, records = set(phases), []
    for number, line in enumerate(read_text(path, most=16 * MOST_JSON_BYTES, cure=DAMAGED).splitlines(), start=1):
        try:
            record = json.loads(line)
            phase = record["phase"]
            whole = [value for value in record.values() if type(value) is int]
            if type(record["step"]) is not int or not isinstance(phase, str) or any(abs(n) >= 2**63 for n in whole):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"line {number} of {path} is no record of a phase: {DAMAGED}") from None
        if phase in wanted:
            records.append(record)
    return records


def _check_per_image(run: RunRecord, results_file: Path, counts_file: Path) -> None:
    """Raise InputError unless the per-image counts are of the evaluation that wrote the results."""
    if run.per_image is None:
        return
    counts = run.per_image.total()
    again = metrics.mean_iou(counts) if run.per_image.num_classes == len(run.classes) else math.nan
    given = run.results["mean_iou"]
    same = again != again if given is None else math.isclose(again, given, rel_tol=1e-9, abs_tol=1e-12)
    if not same or run.per_image.num_images != run.results["num_images"]:
        raise InputError(
            f"{results_file} (mean IoU {given}, {run.results['num_images']} images) and {counts_file.name} "
            f"(mean IoU {again:.6g}, {run.per_image.num_images} images) are not of one evaluation: {AGAIN}"
        )
