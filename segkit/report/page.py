"""The report as one HTML file that asks nobody for anything: style, script and pictures are inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path

from segkit.report import html, records, sections
from segkit.report.comparison import Comparison
from segkit.report.groups import flatten
from segkit.report.svg import tag

HERE = Path(__file__).resolve().parent
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The page itself forbids every request to elsewhere."""


def page(c: Comparison, *, num_samples: int = 2000, pictures: int = 6) -> str:
    """The report on ``c``. The same runs give the same bytes.

    ``num_samples`` is the number of bootstrap resamples, ``pictures`` the most images shown side by side.
    """
    parts: list[tuple[str, str, Callable[[Comparison], str]]] = [
        ("scores", "Scores", sections.scores),
        ("certainty", "Certainty", partial(sections.certainty, num_samples=num_samples)),
        ("grid", "Grid", sections.grids),
        ("training", "Training", sections.training),
        ("classes", "Classes", sections.classes),
        ("labels", "Labels and margins", sections.labels),
        ("confusion", "Confusion", sections.confusions),
        ("pictures", "Images", partial(records.pictures, most=pictures)),
        ("configuration", "Configuration", records.configuration),
        ("origin", "Origin", records.origin),
    ]
    made = [(anchor, title, content) for anchor, title, make in parts if (content := make(c))]
    body = "".join(tag("section", tag("h2", title) + content, id=anchor) for anchor, title, content in made)
    links = "".join(tag("a", title, href=f"#{anchor}") for anchor, title, _ in made)
    button = '<button type="button" id="theme" aria-label="Switch between light and dark">◐</button>'
    nav = tag("nav", tag("div", links, class_="links") + button)
    return (
        "<!doctype html>\n"
        + '<html lang="en"><head><meta charset="utf-8">'
        + f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        + '<meta name="viewport" content="width=device-width, initial-scale=1">'
        + '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        + tag("title", escape(_title(c)))
        + f"<style>{_asset('page.css')}</style></head><body>{nav}"
        + tag("main", _head(c) + body)
        + f"<script>{_asset('page.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _title(c: Comparison) -> str:
    protocol = c.groups[0].runs[0].protocol
    return " ".join(str(protocol[key]) for key in ("dataset", "split") if key in protocol) or "Comparison"


def _head(c: Comparison) -> str:
    runs = c.runs
    measured = {**flatten(runs[0].protocol), "images": runs[0].results["num_images"], "classes": len(runs[0].classes)}
    chips = "".join(
        tag("li", f"{escape(key.replace('_', ' '))} <b>{escape(_plain(value))}</b>")
        for key, value in measured.items()
        if value is not None and value is not False
    )
    parts = [
        tag("p", "segkit compare", class_="kicker"),
        tag("h1", escape(_title(c))),
        tag("ul", chips, class_="chips"),
    ]
    if c.mixed:
        words = f"These runs were not evaluated alike: {'; '.join(c.mixed)}. Their scores are not comparable."
        parts.append(html.paragraph(words, "banner"))
    if c.notes:
        parts.append(
            html.details(f"Notes ({len(c.notes)})", "".join(html.paragraph(note) for note in c.notes), opened=True)
        )
    return tag("header", "".join(parts) + _highlights(c))


def _highlights(c: Comparison) -> str:
    """The three figures that a reader looks for first."""
    at = c.table.keys.index("mean_iou")
    best = c.table.rows[c.groups.index(c.best)][at]
    spread = f" ± {best.shown_spread}" if best.shown_spread else ""
    tiles = [("best mean IoU", f"{best.shown}{spread} %", c.best.name)]
    if c.contender is not None and min(c.mean_iou(c.contender), c.mean_iou(c.baseline)) >= 0:
        gain = 100 * (c.mean_iou(c.contender) - c.mean_iou(c.baseline))
        tiles.append(("against the baseline", f"{gain:+.2f} points", f"{c.contender.name}, less {c.baseline.name}"))
    num_seeds = sorted({len(group.runs) for group in c.groups})
    seeds = (
        "one seed each" if num_seeds == [1] else f"{'–'.join(map(str, {num_seeds[0]: 0, num_seeds[-1]: 0}))} seeds each"
    )
    runs = f"{len(c.runs)} run{'s' if len(c.runs) != 1 else ''}"
    tiles.append(("compared", runs, f"{len(c.groups)} row{'s' if len(c.groups) != 1 else ''}, {seeds}"))
    drawn = "".join(
        tag(
            "div",
            tag("span", label, class_="small") + tag("strong", escape(value)) + tag("span", escape(more)),
            class_="tile",
        )
        for label, value, more in tiles
    )
    return tag("div", drawn, class_="tiles")


def _plain(value: object) -> str:
    return value if isinstance(value, str) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
