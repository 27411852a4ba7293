"""Groups of runs that differ only in their seed, each with a name of its own, and whether runs may be compared."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from segkit.config.schema import FREE_KEYS, is_free
from segkit.config.targets import fits
from segkit.report.runs import RunRecord

SYMBOLS = {"tau": "τ", "upsilon": "υ", "mean_margin": "mean margin"}
MISSING = object()
TRAINING_PIXELS = "training pixels"
"""A setting that stands for the data themselves."""


@dataclass(frozen=True)
class Group:
    """The runs of one configuration; they differ in their seed alone."""

    name: str
    runs: tuple[RunRecord, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that took part, by dotted key; see :func:`settings`."""
        return settings(self.runs[0])

    @property
    def counted(self) -> list[RunRecord]:
        """The runs that have a mean IoU, and counts of single images to test it by."""
        return [run for run in self.runs if run.per_image is not None and run.results["mean_iou"] is not None]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        return self.runs[0].classes

    def scores(self, key: str) -> list[float]:
        """Return a score (see :func:`score`) of every run that has it."""
        return [value for run in self.runs if (value := score(run.results, key)) is not None]


def score(results: dict[str, Any], key: str) -> float | None:
    """Return one score of a ``results.json``: None if missing.

    ``key`` is ``mean_iou``, ``pixel_accuracy``, or ``iou/CLASS``, ``precision/CLASS``, ``recall/CLASS``.
    """
    kind, slash, name = key.partition("/")
    return results["classes"].get(name, {}).get(kind) if slash else results[key]


def gain(group: Group, baseline: Group, key: str) -> tuple[float | None, str]:
    """Return a score (see :func:`score`) of ``group`` less that of ``baseline``, and what the mean is over, in words.

    It is over the seeds that both have, run by run; of all runs where they share none. None where one has no score.
    """
    ours, theirs = (
        {run.seed: value for run in one.runs if (value := score(run.results, key)) is not None}
        for one in (group, baseline)
    )
    common = sorted(ours.keys() & theirs.keys())
    if common:
        gains = [ours[seed] - theirs[seed] for seed in common]
        return statistics.fmean(gains), f"over {len(common)} common seed{'s' * (len(common) > 1)}"
    if not ours or not theirs:
        return None, ""
    return statistics.fmean(ours.values()) - statistics.fmean(theirs.values()), "of means: no seed is common"


def settings(run: RunRecord) -> dict[str, Any]:
    """Return the settings of ``run`` by dotted key, without the seed and the keys that do not change what is computed.

    ``loss`` and ``optimizer.lr`` are those of the phase whose results are compared. Where the data lie is left out too;
    :data:`TRAINING_PIXELS` tells other data from copies.
    """
    own = {key: value for key, value in run.config.items() if key not in (*FREE_KEYS, "seed")}
    own["loss"] = run.loss
    schedule = {name: dict(phase) for name, phase in run.config["schedule"].items()}
    schedule[run.phase].pop("loss", None)
    if (lr := schedule[run.phase].pop("lr", None)) is not None:
        for name in schedule.keys() - {run.phase}:  # they keep what is common to phases without their own
            schedule[name]["lr"] = schedule[name].get("lr") or own["optimizer"].get("lr")
        own["optimizer"] = {**own["optimizer"], "lr": lr}
    own["schedule"] = schedule
    if run.counts is None:
        return flatten(own)
    found = {key: value for key, value in flatten(own).items() if not is_free(key)}
    return {**found, TRAINING_PIXELS: sum(run.counts.values())}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys."""
    if isinstance(tree, dict) and tree:
        flat: dict[str, Any] = {}
        for name, value in tree.items():
            flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
        return flat
    return {prefix: tree}


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Return the groups in the order in which their first runs were given; runs of a group are sorted by seed."""
    members: dict[str, list[RunRecord]] = {}
    for run in runs:
        # A run given twice with one seed (trained again, or on another machine) is a row of its own.
        key = json.dumps([settings(run), run.protocol, run.classes], sort_keys=True, default=str)
        while any(other.seed == run.seed for other in members.get(key, [])):
            key += "+"
        members.setdefault(key, []).append(run)
    grouped = [tuple(sorted(group, key=lambda run: run.seed)) for group in members.values()]
    return [Group(name, group) for name, group in zip(_names(grouped), grouped, strict=True)]


def differences(all_settings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the keys whose values differ, with their values in all of ``all_settings``; MISSING where absent."""
    keys = dict.fromkeys(key for one in all_settings for key in one)
    columns = {key: [one.get(key, MISSING) for one in all_settings] for key in keys}
    return {key: values for key, values in columns.items() if any(value != values[0] for value in values[1:])}


# -- protocols -----------------------------------------------------------------------------------------------------


def differing_protocols(runs: Sequence[RunRecord]) -> list[str]:
    """Return one phrase for every way in which the evaluations of ``runs`` differ from that of the first run."""
    phrases = []
    measured = [{**flatten(run.protocol), "number of images": run.results["num_images"]} for run in runs]
    for key, values in differences(measured).items():
        at = next(index for index, value in enumerate(values) if value != values[0])
        phrases.append(
            f"{key} is {_written(values[0])} in {runs[0].path} and {_written(values[at])} in {runs[at].path}"
        )
    differing = next((run for run in runs if run.classes != runs[0].classes), None)
    if differing is not None:
        classes = [f"{_classes(run)} in {run.path}" for run in (runs[0], differing)]
        phrases.append(f"the classes are {' and '.join(classes)}")
    images = [(run.path, sorted(run.per_image.names)) for run in runs if run.per_image is not None]
    other = next((path for path, names in images if names != images[0][1]), None)
    if not phrases and other is not None:
        phrases.append(f"the images of {images[0][0]} and of {other} have different names")
    return phrases


def comparable(one: RunRecord, other: RunRecord) -> bool:
    """Return True if a paired test of the two makes sense: same protocol, same classes, same images by name."""
    if one.per_image is None or other.per_image is None:
        return False
    return not differing_protocols([one, other])


def _classes(run: RunRecord) -> str:
    first = ", ".join(run.classes[:4])
    return f"{len(run.classes)} ({first}{', ...' if len(run.classes) > 4 else ''})"


def _written(value: Any) -> str:
    return repr(value) if isinstance(value, int | float | str | list | type(None)) else "not given"


# -- names ---------------------------------------------------------------------------------------------------------


def loss_name(node: dict[str, Any]) -> str:
    """Return a loss in words: ``margin calibration (paper)``, ``cross-entropy``, ``cross-entropy + dice``."""
    target = node.get("_target_")
    terms = node.get("terms")
    if terms and fits(terms, dict[str, dict[str, Any]]):
        parts = [(term.get("loss"), term.get("weight")) for term in terms.values()]
        if fits(parts, list[tuple[dict[str, Any], float | None]]):  # else a loss of one's own, or a damaged file
            return " + ".join(("" if weight in (1, None) else f"{weight:g} ") + loss_name(one) for one, weight in parts)
    if not isinstance(target, str):
        return "loss"
    name = target.rpartition(".")[2].removesuffix("Loss")
    if name != name.lower():
        name = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()
    name = name.replace("_", " ").replace("cross entropy", "cross-entropy")
    return f"{name} ({node['form']})" if node.get("form") else name


def _names(grouped: Sequence[tuple[RunRecord, ...]]) -> list[str]:
    """Return one name per group: its loss, then the settings in which it differs from others with that loss."""
    firsts = [group[0] for group in grouped]
    names = [loss_name(run.loss) for run in firsts]
    for name in dict.fromkeys(names):
        alike = [index for index, other in enumerate(names) if other == name]
        differing = differences([settings(firsts[index]) for index in alike])
        # Keys of phases that only some of them have are left out: the name of the phase tells those apart.
        named = {
            key: values for key, values in differing.items() if not (key.startswith("schedule.") and MISSING in values)
        }
        for position, index in enumerate(alike):
            own = {key: values[position] for key, values in named.items()}
            own = {key: one for key, one in own.items() if isinstance(one, int | float | str) and len(str(one)) <= 24}
            if len({firsts[other].phase for other in alike}) > 1:
                own = {"phase": firsts[index].phase} | own
            written = [_setting(key, value) for key, value in (_method(firsts[index].loss) | own).items()]
            names[index] = ", ".join([name, *written[:5]])
    models = [settings(run)["model._target_"] for run in firsts]
    if len(set(models)) > 1:
        prefixes = [model.rpartition(".")[2] for model in models]
        names = [f"{prefix}: {name}" for prefix, name in zip(prefixes, names, strict=True)]
    names = [", ".join(filter(None, (name, run.pooled))) for name, run in zip(names, firsts, strict=True)]
    repeated = {name for name in names if names.count(name) > 1}
    return [f"{name} [{run.path}]" if name in repeated else name for name, run in zip(names, firsts, strict=True)]


def _method(loss: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of margin calibration without which a result says little."""
    keys = ("mean_margin", "upsilon") if loss.get("scale") == "mean" else ("tau", "upsilon")
    return {f"loss.{key}": loss[key] for key in keys if loss.get(key) is not None}


def _setting(key: str, value: Any) -> str:
    last = key.rpartition(".")[2]
    name = SYMBOLS.get(last, last if key.startswith("loss.") else key)
    return f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"


# -- grids ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Groups that differ in exactly two numbers: ``cells[row][column]`` is the group of ``rows[row]``,
    ``columns[column]``, or None where that pair was not run."""

    row_key: str
    column_key: str
    rows: tuple[float, ...]
    columns: tuple[float, ...]
    cells: tuple[tuple[Group | None, ...], ...]


def find_grids(groups: Sequence[Group]) -> list[Grid]:
    """Return every grid, such as tau by upsilon, among ``groups``: two numbers differ, and three cells or more."""
    by_loss: dict[str, list[Group]] = {}
    for group in groups:
        by_loss.setdefault(loss_name(group.runs[0].loss), []).append(group)
    grids = []
    for members in by_loss.values():
        differing = differences([group.settings for group in members])
        numbers = {
            key: values
            for key, values in differing.items()
            if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        }
        if len(differing) == 2 and len(numbers) == 2 and len(members) >= 3:
            (row_key, row_values), (column_key, column_values) = numbers.items()
            rows, columns = sorted(set(row_values)), sorted(set(column_values))
            at = dict(zip(zip(row_values, column_values, strict=True), members, strict=True))
            cells = tuple(tuple(at.get((row, column)) for column in columns) for row in rows)
            grids.append(Grid(row_key, column_key, tuple(rows), tuple(columns), cells))
    return grids
