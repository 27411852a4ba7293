"""Whether scores may stand in one table: same data, same classes, measured in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from segkit.errors import InputError
from segkit.report.groups import differences, flatten
from segkit.report.runs import RunRecord


def differing_protocols(runs: Sequence[RunRecord]) -> list[str]:
    """A phrase for everything in which the evaluations of ``runs`` differ from the first one's; empty if nothing."""
    phrases = []
    measured = [{**flatten(run.protocol), "number of images": run.results["num_images"]} for run in runs]
    for key, values in differences(measured).items():
        other = next(index for index, value in enumerate(values) if value != values[0])
        phrases.append(
            f"{key} is {_shown(values[0])} in {runs[0].path} and {_shown(values[other])} in {runs[other].path}"
        )
    for run in runs[1:]:
        if run.classes != runs[0].classes:
            phrases.append(f"the classes are {_classes(runs[0])} in {runs[0].path} and {_classes(run)} in {run.path}")
            break
    named = [run for run in runs if run.per_image is not None]
    for run in named[1:]:
        if not phrases and _images(run) != _images(named[0]):
            phrases.append(f"the images of {named[0].path} and of {run.path} have different names")
            break
    return phrases


def check_comparable(runs: Sequence[RunRecord]) -> None:
    """InputError that names what differs, if the runs were not evaluated alike."""
    phrases = differing_protocols(runs)
    if phrases:
        raise InputError(
            f"these runs were not evaluated alike: {'; '.join(phrases)}. Compare runs of one protocol, evaluate them "
            "alike with `segkit evaluate`, or give --allow-mixed-protocols to show them side by side all the same"
        )


def comparable(one: RunRecord, other: RunRecord) -> bool:
    """True if a paired test between the two makes sense: the same classes, and the same images by name."""
    if one.per_image is None or other.per_image is None:
        return False
    return not differing_protocols([one, other])


def _images(run: RunRecord) -> list[str]:
    assert run.per_image is not None
    return sorted(run.per_image.names)


def _classes(run: RunRecord) -> str:
    shown = ", ".join(run.classes[:4])
    return f"{len(run.classes)} ({shown}{', ...' if len(run.classes) > 4 else ''})"


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, int | float | str | list | type(None)) else "not given"
