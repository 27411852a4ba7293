"""The sections on single images, on the configuration, and on where the runs come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from segkit.report import html, images
from segkit.report.comparison import Comparison
from segkit.report.groups import MISSING, differences, flatten
from segkit.report.runs import RunRecord
from segkit.report.svg import tag

MOST_OVERLAYS = 4
"""Rows of the table whose predictions stand side by side: the baseline, the best, then in their order."""
NUM_LISTED = 5


def pictures(c: Comparison, *, most: int) -> str:
    """Images with the largest gains and losses: their scores, and their predictions where run folders hold pictures."""
    if c.contender is None:
        return _gallery(c, [], most)
    baseline, other = c.baseline.runs[0], c.contender.runs[0]
    ranked = images.gains(baseline, other)
    parts = []
    if ranked:
        listed = ranked if len(ranked) <= 2 * NUM_LISTED else ranked[:NUM_LISTED] + ranked[-NUM_LISTED:]
        rows = [
            [escape(one.name), *(f'<td class="num">{100 * value:.2f}</td>' for value in (one.baseline, one.other)),
             f'<td class="num">{100 * one.gain:+.2f}</td>']
            for one in listed
        ]  # fmt: skip
        head = ["image", escape(c.baseline.name), escape(c.contender.name), "gain"]
        note = f"Mean IoU of single images, over the classes in each, in percent: {baseline.path} and {other.path}."
        parts.append(
            html.cards([html.card(html.table(head, rows), title="Largest gains and losses", note=note, wide=True)])
        )
    return parts[0] + _gallery(c, ranked, most) if parts else _gallery(c, ranked, most)


def _gallery(c: Comparison, ranked: Sequence[images.ImageScore], most: int) -> str:
    stored = images.stored_runs(c.groups)
    if not stored or not most:
        return ""
    first = {id(c.baseline): 0, id(c.contender): 1}
    stored = sorted(stored, key=lambda item: (first.get(id(c.groups[item[0]]), 2), item[0]))[:MOST_OVERLAYS]
    runs = [run for _, run in stored]
    names = images.chosen_names(runs, [one.name for one in ranked], most)
    if not names:
        return ""
    scores = [images.image_scores(run) if run.per_image is not None else {} for run in runs]
    figures = []
    for name in names:
        image, label, _ = runs[0].pictures[name].read()
        palette = runs[0].pictures[name].palette
        shown = [
            _panel(images.panel(image), "image"),
            _panel(images.panel(images.overlay(image, label, palette)), "label"),
        ]
        for (index, run), known in zip(stored, scores, strict=True):
            own_image, _, prediction = run.pictures[name].read()
            caption = c.groups[index].name + (f", {100 * known[name]:.1f} %" if name in known else "")
            shown.append(
                _panel(images.panel(images.overlay(own_image, prediction, run.pictures[name].palette)), caption)
            )
        figures.append(tag("h4", escape(name)) + tag("div", "".join(shown), class_="strip"))
    note = "Largest gains first, largest losses last, among the images that every run stored." if ranked else ""
    key = _class_key(runs[0].classes, next(iter(runs[0].pictures.values())).palette)
    return html.card(key + "".join(figures), title="Predictions side by side", note=note, wide=True)


def _panel(uri: str, caption: str) -> str:
    return tag(
        "figure", f'<img src="{uri}" alt="{escape(caption)}" loading="lazy">' + tag("figcaption", escape(caption))
    )


def _class_key(classes: Sequence[str], palette: Sequence[tuple[int, int, int]]) -> str:
    items = "".join(
        tag("li", f'<i style="background:rgb({r},{g},{b})"></i>{escape(name)}')
        for name, (r, g, b) in zip(classes, palette, strict=False)
    )
    return tag("ul", items, class_="key")


# -- configuration and origin --------------------------------------------------------------------------------------


def configuration(c: Comparison) -> str:
    """Settings in which the rows differ, and those that they share."""
    all_settings = [group.settings for group in c.groups]
    differing = differences(all_settings)
    head = ["setting", *(html.group_head(index, group.name) for index, group in enumerate(c.groups))]
    rows = [[escape(key), *(_value(value) for value in values)] for key, values in differing.items()]
    parts = [html.table(head, rows, class_="facts") if rows else html.paragraph("No setting differs.")]
    common = {key: value for key, value in all_settings[0].items() if key not in differing}
    shared = html.table(
        ["setting", "value"], ([escape(key), _value(value)] for key, value in common.items()), class_="facts"
    )
    return parts[0] + html.details(f"Settings that all share ({len(common)})", shared)


def origin(c: Comparison) -> str:
    """Code, versions, machine and data fingerprints, as every run noted them."""
    known = [run for run in c.runs if run.provenance]
    if not known:
        return ""
    facts = [flatten(_tidy(run)) for run in known]
    differing = differences(facts)
    common = {key: value for key, value in facts[0].items() if key not in differing}
    same = html.table(["", "all runs" if len(known) > 1 else str(known[0].path)],
                      ([escape(key), _value(value)] for key, value in common.items()), class_="facts")  # fmt: skip
    data = [key for key in differing if key.startswith("data.")]
    warning = ""
    if data:
        warning = html.paragraph(
            "The fingerprints of the training data differ: files, label table or options were not the same "
            "(times of change take part, so that a copy of the files differs too).", "banner",
        )  # fmt: skip
    if not differing:
        return warning + same
    rows = [[escape(str(run.path)), *(_value(differing[key][at]) for key in differing)] for at, run in enumerate(known)]
    table = html.table(["run", *map(escape, differing)], rows, class_="facts")
    return warning + table + html.details(f"The same in all runs ({len(common)})", same)


def _tidy(run: RunRecord) -> dict[str, Any]:
    facts = {key: value for key, value in run.provenance.items() if key not in ("seed", "starts")}
    if isinstance(facts.get("command"), list):
        facts["command"] = " ".join(map(str, facts["command"]))
    return facts


def _value(value: Any) -> str:
    if value is MISSING:
        return '<td class="absent">–</td>'
    shown = value if isinstance(value, str) else json.dumps(value, default=str)
    return tag("td", escape(shown), class_="long" if len(shown) > 60 else None)
