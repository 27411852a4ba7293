"""Whether runs were evaluated alike: same data and classes, measured in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from segkit.errors import InputError
from segkit.report.groups import differences, flatten
from segkit.report.runs import RunRecord


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


def check_comparable(runs: Sequence[RunRecord]) -> None:
    """Raise InputError, which names what differs, if the runs were not evaluated alike."""
    phrases = differing_protocols(runs)
    if phrases:
        raise InputError(
            f"these runs were not evaluated alike: {'; '.join(phrases)}. Compare runs of one protocol, evaluate them "
            "alike with `segkit evaluate`, or give --allow-mixed-protocols to show them side by side all the same"
        )


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
