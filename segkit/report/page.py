"""The report as one HTML file that needs no network: style, script and pictures are inside.

The functions here gather what the sections show, and ``page.html.j2`` lays it out and escapes all text (autoescape).
A section that has nothing to show is None.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from segkit.evaluation import metrics
from segkit.report import plots, uncertainty
from segkit.report.comparison import Comparison
from segkit.report.groups import MISSING, Group, comparable, differences, find_grids, flatten, gain
from segkit.report.pictures import overlay, panel
from segkit.report.runs import RunRecord
from segkit.report.tables import percent

HERE = Path(__file__).resolve().parent
MOST_OVERLAYS = 4
"""Rows of the table whose predictions stand side by side: the baseline, the best, then in their order."""
NUM_LISTED = 5

Part = dict[str, Any] | list[Any] | None


def page(c: Comparison, *, pictures: int = 6) -> str:
    """Return the report on ``c``, with at most ``pictures`` images side by side. The same runs give the same bytes."""
    parts: dict[str, tuple[str, Part]] = {
        "scores": ("Scores", scores(c)),
        "certainty": ("Certainty", certainty(c)),
        "grid": ("Grid", grids(c)),
        "training": ("Training", training(c)),
        "classes": ("Classes", classes(c)),
        "labels": ("Labels and margins", labels(c)),
        "confusion": ("Confusion", confusions(c)),
        "pictures": ("Images", images(c, most=pictures)),
        "configuration": ("Configuration", _compared([group.settings for group in c.groups])),
        "origin": ("Origin", origin(c)),
    }
    first = c.runs[0]
    title = " ".join(str(first.protocol[key]) for key in ("dataset", "split") if key in first.protocol)
    measured = {**flatten(first.protocol), "images": first.results["num_images"], "classes": len(first.classes)}
    return render(
        "page.html.j2", c=c, parts=parts, title=title or "Comparison",
        measured={key: value for key, value in measured.items() if value is not None and value is not False},
        tiles=_highlights(c),
    )  # fmt: skip


_DIRECTIONS = [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
CONTROL = dict.fromkeys(
    [*range(9), 11, 12, *range(14, 32), *range(127, 160), *_DIRECTIONS], "\N{REPLACEMENT CHARACTER}"
)
"""Control characters, of which HTML has none, and marks of direction, which would turn the text around a name; a
terminal that shows the file would obey them."""


def render(template: str, **parts: Any) -> str:
    """Return a page of this folder with its style and script inside; all text of ``parts`` is escaped."""
    assets = {"style": _asset("page.css"), "script": _asset("page.js")}
    return _environment().get_template(template).render(**parts, **assets).translate(CONTROL)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {
        "percent": partial(percent, missing="–"),
        "points": plots.points,
        "zip": lambda one, other: zip(one, other, strict=True),
        "fact": lambda value: value if isinstance(value, str) else json.dumps(value, default=str),
        "call": lambda value, function: function(value),
    }
    made.tests["missing"] = lambda value: value is MISSING
    return made


def _asset(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))


def _highlights(c: Comparison) -> list[tuple[str, str, str]]:
    """Return the three figures that a reader looks for first, as (name, figure, what it belongs to)."""
    best = c.table.rows[c.groups.index(c.best)][c.table.keys.index("mean_iou")]
    spread = f" ± {best.spread_text}" if best.spread_text else ""
    tiles = [("best mean IoU", f"{best.mean_text}{spread} %", c.best.name)]
    gained, seeds = (None, "") if c.contender is None else gain(c.contender, c.baseline, "mean_iou")
    if c.contender is not None and gained is not None:
        names = f"{c.contender.name}, less {c.baseline.name}, {seeds}"
        tiles.append(("against the baseline", f"{plots.points(gained)} points", names))
    num_seeds = sorted({len(group.runs) for group in c.groups})
    span = "–".join(map(str, dict.fromkeys((num_seeds[0], num_seeds[-1]))))
    seeds = "one seed each" if num_seeds == [1] else f"{span} seeds each"
    runs, rows = (f"{len(of)} {word}{'s' * (len(of) != 1)}" for of, word in ((c.folders, "run"), (c.groups, "row")))
    return [*tiles, ("compared", runs, f"{rows}, {seeds}")]


def _ordered(c: Comparison) -> list[Group]:
    """Return the baseline, the best of the others, and the rest in their order."""
    return sorted(c.groups, key=lambda group: 0 if group is c.baseline else 1 if group is c.contender else 2)


def scores(c: Comparison) -> Part:
    """Return the number of classes averaged, and those that are absent; the table itself is ``c.table``."""
    return {
        "num_averaged": sorted({run.results["num_classes_averaged"] for run in c.runs}),
        "absent": sorted({name for run in c.runs for name in run.results.get("absent_classes") or ()}),
    }


def certainty(c: Comparison) -> Part:
    """Return bootstrap intervals, and paired tests against the baseline."""
    found = list(c.table.intervals.items())
    if not found:
        return None
    tests = uncertainty.paired_tests(c.groups, c.baseline, num_samples=c.num_samples)
    numbers = [c.groups.index(test.group) for test in tests]
    scored = [(at, c.groups[at].name, one.low, one.mean_iou, one.high) for at, one in found]
    gained = [
        (at, test.group.name, test.result.low, test.result.difference, test.result.high)
        for at, test in zip(numbers, tests, strict=True)
    ]
    label, x_label = f"Mean IoU less that of {c.baseline.name}", "difference in mean IoU, points"
    return {
        "intervals": plots.interval_chart(scored, label="Mean IoU with intervals", x_label="mean IoU, %", text=percent),
        "num_images": found[0][1].num_images,
        "gains": plots.interval_chart(gained, label=label, x_label=x_label, text=plots.points, zero=True),
        "tests": list(zip(numbers, tests, strict=True)),
    }


def grids(c: Comparison) -> Part:
    """Return every grid of two numbers as (grid, heat map, name of its best group)."""
    found = []
    for grid in find_grids(c.groups):
        cells = [cell for row in grid.cells for cell in row if cell]
        means = {cell.name: statistics.fmean(values) for cell in cells if (values := cell.scores("mean_iou"))}
        found.append((grid, plots.grid_chart(grid), max(means, key=lambda name: means[name]) if means else "none"))
    return found


def training(c: Comparison) -> Part:
    """Return mean IoU and loss over the steps, and the number of kinds of loss."""
    curves = {key: plots.training_curve(c.groups, key) for key in ("mean_iou", "loss")}
    names = {str(group.runs[0].loss.get("_target_")) for group in c.groups}
    return {**curves, "num_losses": len(names)} if any(curves.values()) else None


def classes(c: Comparison) -> Part:
    """Return the gain per class against the baseline, one chart per group, the largest mean IoU first."""
    charts = sorted(plots.gain_charts(c.groups, c.baseline), key=lambda item: -c.mean_iou(item[0]))
    return {"charts": charts, "is_ordered": bool(plots.class_order(c.groups)[1])} if charts else None


def labels(c: Comparison) -> Part:
    """Return label distribution and margins per class, and the numbers of the groups that have margins."""
    margins = {key: plots.margin_chart(c.groups, key) for key in ("rho_0k", "rho_k0")}
    charts = {**margins, "share": plots.share_chart(c.groups)}
    numbers = [index for index, group in enumerate(c.groups) if group.runs[0].margins]
    return {**charts, "numbers": numbers} if any(charts.values()) else None


def confusions(c: Comparison) -> Part:
    """Return confusion matrices, and how many of them (baseline, best other group) are not folded away."""
    matrices, num_open = [], 0
    for group in _ordered(c):
        counts = plots.confusion(group)
        if counts is None:
            continue
        num_open += group is c.baseline or group is c.contender
        worst = plots.top_confusions(counts, group.classes)
        errors = "; ".join(f"{a} taken for {b} {100 * share:.1f} %" for a, b, share in worst)
        matrices.append({"name": group.name, "chart": plots.confusion_chart(counts, group.classes), "errors": errors})
    return {"matrices": matrices, "num_open": num_open} if matrices else None


# -- images --------------------------------------------------------------------------------------------------------


class ImageScore(NamedTuple):
    """Mean IoU of one image over the classes that it has, with the baseline and with another run if there is one."""

    name: str
    baseline: float
    other: float | None = None

    @property
    def gain(self) -> float:
        """How much better the other run is; without one the baseline's score."""
        return self.baseline if self.other is None else self.other - self.baseline


def image_scores(run: RunRecord) -> dict[str, float]:
    """Return the mean IoU of every image with labelled pixels, over the classes in its label or prediction."""
    if run.per_image is None:
        return {}
    tp, target, predicted = run.per_image.class_totals()
    means = [metrics.mean_of_present(row) for row in metrics.divide(tp, target + predicted - tp)]
    return {name: mean for name, mean in zip(run.per_image.names, means, strict=True) if mean == mean}


def image_ranking(*runs: RunRecord) -> list[ImageScore]:
    """Return the images of one run from best to worst, of a baseline and another from largest gain to largest loss.

    Empty for runs without counts of single images, and for two that cannot be paired.
    """
    if not all(comparable(runs[0], run) for run in runs):
        return []
    scored = [image_scores(run) for run in runs]
    names = [name for name in scored[0] if all(name in one for one in scored)]
    return sorted((ImageScore(name, *(one[name] for one in scored)) for name in names), key=lambda one: -one.gain)


def extremes(ranked: Sequence[Any], most: int) -> list[Any]:
    """Return at most ``most`` of ``ranked``, half from its front and half from its end."""
    return list(ranked) if len(ranked) <= most else [*ranked[: -(-most // 2)], *ranked[len(ranked) - most // 2 :]]


def shown_runs(c: Comparison) -> list[tuple[Group, RunRecord]]:
    """Return the groups whose predictions stand side by side, each with the run that they are of."""
    first = [(group, next((run for run in group.runs if run.pictures), group.runs[0])) for group in _ordered(c)]
    return first[:MOST_OVERLAYS]


def chosen_names(runs: Sequence[RunRecord], ranked: Sequence[str], most: int) -> list[str]:
    """Return at most ``most`` images that all ``runs`` stored, half from the front of ``ranked``, half from its end.

    Those without a rank, as they have no label, are shown where none has one.
    """
    common = [name for name in runs[0].pictures if all(name in run.pictures for run in runs)]
    return extremes([name for name in ranked if name in common] or common, most)


def images(c: Comparison, *, most: int) -> Part:
    """Return images with the largest gains and losses: their scores, and their predictions where runs stored them."""
    ranked = image_ranking(*c.ranked_runs)
    stored = [(group, run) for group, run in shown_runs(c) if run.pictures]
    names = chosen_names([run for _, run in stored], [one.name for one in ranked], most) if stored and most else []
    if not ranked and not names:
        return None
    scored = [image_scores(run) for _, run in stored]
    gallery = [(name, _panels(stored, scored, name)) for name in names]
    key = [pair for _, run in stored[:1] for pair in zip(run.classes, run.palette, strict=False)]
    is_extreme = names == [one.name for one in extremes(ranked, most)]
    return {"ranked": extremes(ranked, 2 * NUM_LISTED), "key": key, "gallery": gallery, "is_extreme": is_extreme}


def _panels(
    stored: Sequence[tuple[Group, RunRecord]], scored: Sequence[dict[str, float]], name: str
) -> list[tuple[str, str]]:
    """Return (address, caption) of the image ``name``, of its label and of each group's prediction."""
    picture = stored[0][1].pictures[name]
    image, label, _ = picture.read()
    panels = [(panel(image), "image"), (panel(overlay(image, label, picture.palette)), "label")]
    for (group, run), known in zip(stored, scored, strict=True):
        own_image, _, prediction = run.pictures[name].read()
        caption = group.name + (f", {100 * known[name]:.1f} %" if name in known else "")
        panels.append((panel(overlay(own_image, prediction, run.pictures[name].palette)), caption))
    return panels


# -- configuration and origin --------------------------------------------------------------------------------------


def origin(c: Comparison) -> Part:
    """Return code, versions, machine and data fingerprints, as every run noted them; folds differ in their data."""
    known, firsts = ([run for run in runs if run.provenance] for runs in (c.folders, c.runs))
    if not known:
        return None
    differing = differences([flatten(_tidy(run)) for run in firsts])
    facts = _compared([flatten(_tidy(run)) for run in known])
    return {**facts, "runs": known, "data_differs": any(key.startswith("data.") for key in differing)}


def _compared(all_facts: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the facts in which groups or runs differ, and those that they share."""
    differing = differences(all_facts)
    common = {key: value for key, value in all_facts[0].items() if key not in differing}
    return {"differing": differing, "common": common}


def _tidy(run: RunRecord) -> dict[str, Any]:
    facts = {key: value for key, value in run.provenance.items() if key not in ("seed", "starts")}
    if isinstance(facts.get("command"), list):
        facts["command"] = " ".join(map(str, facts["command"]))
    return facts
