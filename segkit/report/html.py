"""Pieces of a page: tables, legends, cards. All text is escaped here and in :mod:`segkit.report.svg`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from segkit.report import svg
from segkit.report.groups import Group
from segkit.report.svg import tag


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, class_: str = "") -> str:
    """A table that scrolls sideways where it is too wide; the cells are finished HTML, the first of a row its head."""
    rows = [list(row) for row in rows]
    numeric = [bool(rows) and 'class="num' in rows[0][at] for at in range(len(head))]
    columns = zip(head, numeric, strict=True)
    header = tag(
        "tr", "".join(tag("th", cell, scope="col", class_="num" if right else None) for cell, right in columns)
    )
    body = "".join(
        tag(
            "tr",
            tag("th", row[0], scope="row")
            + "".join(cell if cell.startswith("<td") else tag("td", cell) for cell in row[1:]),
        )
        for row in rows
    )
    inner = tag("table", tag("thead", header) + tag("tbody", body), class_=class_ or None)
    return tag("div", inner, class_="scroll", tabindex="0")


def swatch(index: int) -> str:
    """The short line that stands for series ``index``."""
    line = tag("line", x1="1", x2="21", y1="6", y2="6", class_="curve", stroke_dasharray=svg.dash(index))
    return tag("svg", line, viewBox="0 0 22 12", class_=f"swatch series {svg.colour(index)}", aria_hidden="true")


def group_head(index: int, name: str) -> str:
    """A group's name beside its colour."""
    return f"{swatch(index)}{tag('span', escape(name))}"


def legend(groups: Sequence[Group], numbers: Iterable[int] | None = None) -> str:
    """The groups with their colours; pointing at one dims the others."""
    shown = range(len(groups)) if numbers is None else numbers
    items = "".join(
        tag("li", group_head(index, groups[index].name), data_legend=index, tabindex="0", role="button")
        for index in shown
    )
    return tag("ul", items, class_="legend")


def card(content: str, *, title: str = "", note: str = "", wide: bool = False) -> str:
    """A chart or table with a title above and a remark below."""
    head = tag("h3", escape(title)) if title else ""
    foot = tag("p", escape(note), class_="note") if note else ""
    return tag("figure", head + content + foot, class_="card wide" if wide else "card")


def tall(chart: str) -> str:
    """A chart that scrolls where it is taller than a screen (one row per class, many classes)."""
    return tag("div", chart, class_="tall")


def cards(items: Iterable[str]) -> str:
    """Cards side by side where there is room."""
    return tag("div", "".join(items), class_="cards")


def paragraph(content: str, class_: str = "lead") -> str:
    """A paragraph of plain text."""
    return tag("p", escape(content), class_=class_)


def details(summary: str, content: str, *, opened: bool = False) -> str:
    """Content that is folded away under ``summary``."""
    attribute = " open" if opened else ""
    return f"<details{attribute}><summary>{escape(summary)}</summary>{content}</details>"


def number_cell(value: float | None, shown: str, *, key: str, mark: str = "", spread: str = "") -> str:
    """A score in a table: as a reader sees it, and with every digit in ``data-value``."""
    more = tag("span", f"±{spread}", class_="spread") if spread else ""
    data = "" if value is None else repr(value)
    return tag("td", escape(shown) + more, data_key=key, data_value=data, class_=f"num {mark}".strip())
