"""Small charts as inline SVG: strings from numbers, coloured by the page's style sheet, so that they follow its theme.

Every chart is laid out for :data:`WIDTH` units, about the width of a phone, so that its letters stay readable there;
on a wide screen several stand side by side. Classes of the style sheet: ``s0``..``s7`` colour a series.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 420.0
NUM_COLOURS = 8
DASHES = ("", "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Series:
    """A curve: points (x, y), and a band (low, high) about it where several runs were averaged."""

    name: str
    number: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def tag(name: str, content: str = "", **attributes: object) -> str:
    """An element; ``class_`` stands for class, an underscore in a name for a hyphen, None leaves an attribute out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{content}</{name}>"


def number(value: object) -> str:
    """A coordinate with at most two digits behind the point; any other value as it is."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def text(x: float, y: float, content: str, *, anchor: str = "start", class_: str | None = None, **more: object) -> str:
    """A line of text at (x, y)."""
    return tag("text", escape(content), x=x, y=y, text_anchor=anchor, class_=class_, **more)


def figure(height: float, content: str, *, label: str, width: float = WIDTH) -> str:
    """The svg element around ``content``; ``label`` is what a screen reader says."""
    return tag(
        "svg", content, viewBox=f"0 0 {number(width)} {number(height)}", role="img", aria_label=label, class_="chart"
    )


def colour(index: int) -> str:
    """The class of series ``index``."""
    return f"s{index % NUM_COLOURS}"


def dash(index: int) -> str | None:
    """The dash pattern that tells series of one colour apart."""
    return DASHES[index // NUM_COLOURS % len(DASHES)] or None


# -- scales --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """From values to units of the picture, linear or logarithmic, with round numbers for ticks."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """About ``count`` round values from low to high."""
        return _log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high, count)


def scale(values: Sequence[float], start: float, stop: float, *, log: bool = False, zero: bool = False) -> Scale:
    """The scale on which ``values`` fill the way from ``start`` to ``stop``; ``zero`` puts 0 on it too."""
    finite = [value for value in values if math.isfinite(value)] + ([0.0] if zero else [])
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if log:
        return Scale(low / 1.25, high * 1.25, start, stop, log=True)
    if high == low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    margin = 0.04 * (high - low)
    return Scale(low if zero and low == 0 else low - margin, high if zero and high == 0 else high + margin, start, stop)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from ``low`` to ``high``."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs((high - low) / step - count))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if math.log10(high / low) > 2 else (1, 2, 5)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def compact(value: float) -> str:
    """A tick's text: 0.05, 20, 3k, 1e-6."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{round(value, 6):g}"


def percent_tick(value: float) -> str:
    """A share as a tick in percent."""
    return f"{round(100 * value, 6):g}"


# -- charts --------------------------------------------------------------------------------------------------------


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    y_label: str,
    y_text: Callable[[float], str] = compact,
    log_y: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    height: float = 270.0,
) -> str:
    """Curves over a common x axis; ``marks`` are vertical lines with a word each."""
    left, right, top, bottom = 46.0, WIDTH - 8, 20.0, height - 38
    x = scale([value for one in series for value in one.x], left, right, zero=True)
    spread = [value for one in series for value in (*one.y, *one.low, *one.high)]
    y = scale(spread, bottom, top, log=log_y)
    parts = [
        _axes(x, y, bottom=bottom, left=left, right=right, top=top, x_label=x_label, y_label=y_label, y_text=y_text)
    ]
    for place, word in marks:
        parts.append(tag("line", x1=x(place), x2=x(place), y1=top, y2=bottom, class_="mark"))
        parts.append(text(x(place) + 4, top + 10, word, class_="small"))
    for one in series:
        parts.append(_curve(one, x, y))
    return figure(height, "".join(parts), label=label)


def _axes(
    x: Scale, y: Scale, *, bottom: float, left: float, right: float, top: float,
    x_label: str, y_label: str, y_text: Callable[[float], str],
) -> str:  # fmt: skip
    parts = []
    for value in y.ticks():
        parts.append(tag("line", x1=left, x2=right, y1=y(value), y2=y(value), class_="grid"))
        parts.append(text(left - 6, y(value) + 4, y_text(value), anchor="end"))
    for value in x.ticks(5):
        parts.append(text(x(value), bottom + 17, compact(value), anchor="middle"))
        parts.append(tag("line", x1=x(value), x2=x(value), y1=bottom, y2=bottom + 4, class_="axis"))
    parts.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
    parts.append(text((left + right) / 2, bottom + 34, x_label, anchor="middle", class_="label"))
    parts.append(text(0.0, top - 8, y_label, class_="label"))
    return "".join(parts)


def _curve(series: Series, x: Scale, y: Scale) -> str:
    points = [f"{number(x(a))},{number(y(b))}" for a, b in zip(series.x, series.y, strict=True)]
    title = tag("title", escape(series.name))
    parts = []
    if series.low and any(a != b for a, b in zip(series.low, series.high, strict=True)):
        edge = [f"{number(x(a))},{number(y(b))}" for a, b in zip(series.x, series.high, strict=True)]
        edge += [f"{number(x(a))},{number(y(b))}" for a, b in reversed([*zip(series.x, series.low, strict=True)])]
        parts.append(tag("polygon", title, points=" ".join(edge), class_="band"))
    if len(points) == 1:
        cx, cy = points[0].split(",")
        parts.append(tag("circle", title, cx=cx, cy=cy, r="3.5", class_="dot"))
    else:
        parts.append(
            tag("polyline", title, points=" ".join(points), class_="curve", stroke_dasharray=dash(series.number))
        )
    return tag("g", "".join(parts), class_=f"series {colour(series.number)}", data_series=series.number)


def bar_chart(
    rows: Sequence[tuple[str, float | None]],
    *,
    label: str,
    value_text: Callable[[float], str],
    log: bool = False,
    series: int | None = None,
    limit: float | None = None,
) -> str:
    """Horizontal bars. With ``series`` all have its colour; without, they go left (loss) and right (gain) from zero.

    ``limit`` fixes the longest bar's value, so that several charts can be compared; a row of None is left blank.
    """
    line, top = 19.0, 6.0
    left = min(150.0, 12 + 6.4 * max((len(name) for name, _ in rows), default=0))
    values = [value for _, value in rows if value is not None and math.isfinite(value) and (not log or value > 0)]
    signed = series is None
    room = 52.0
    if signed:
        most = limit or max((abs(value) for value in values), default=1.0) or 1.0
        axis = Scale(-most, most, left + room, WIDTH - room)
    elif log:
        axis = Scale(10 ** math.floor(math.log10(min(values, default=0.1)) - 1e-9), max(values, default=1.0), left,
                     WIDTH - room - 10, log=True)  # fmt: skip
    else:
        axis = Scale(0.0, limit or max(values, default=1.0) or 1.0, left, WIDTH - room)
    zero = axis(axis.low if not signed else 0.0)
    parts = [tag("line", x1=zero, x2=zero, y1=top - 4, y2=top + line * len(rows), class_="axis")]
    for index, (name, value) in enumerate(rows):
        y = top + index * line
        parts.append(text(left - 8, y + 13, _cut(name), anchor="end"))
        if value is None or (log and value <= 0):
            parts.append(text(zero + 5, y + 13, "none", class_="small"))
            continue
        end = axis(value)
        fill = ("gain" if value >= 0 else "loss") if signed else colour(series or 0)
        bar = tag("title", escape(f"{name}: {value_text(value)}"))
        parts.append(
            tag(
                "rect",
                bar,
                x=min(zero, end),
                y=y + 3,
                width=abs(end - zero),
                height=line - 6,
                rx="2",
                class_=f"bar {fill}",
            )
        )
        inside_left = signed and value < 0
        parts.append(
            text(end + (-5 if inside_left else 5), y + 13, value_text(value), anchor="end" if inside_left else "start")
        )
    return figure(top + line * len(rows) + 4, "".join(parts), label=label)


def dot_chart(
    rows: Sequence[tuple[str, Sequence[tuple[int, str, float]]]], *, label: str, x_label: str, log: bool
) -> str:
    """Rows of dots on a common axis: per row (series, its name, value) triples; of a log axis, zeros are left out."""
    line, top = 19.0, 6.0
    left = min(150.0, 12 + 6.4 * max((len(name) for name, _ in rows), default=0))
    values = [value for _, dots in rows for _, _, value in dots if not log or value > 0]
    axis = scale(values or [0.1, 1.0], left + 8, WIDTH - 14, log=log, zero=not log)
    bottom = top + line * len(rows)
    parts = []
    for value in axis.ticks():
        parts.append(tag("line", x1=axis(value), x2=axis(value), y1=top, y2=bottom, class_="grid"))
        parts.append(text(axis(value), bottom + 15, compact(value), anchor="middle"))
    parts.append(text((left + WIDTH) / 2, bottom + 32, x_label, anchor="middle", class_="label"))
    for index, (name, dots) in enumerate(rows):
        y = top + (index + 0.5) * line
        parts.append(text(left - 8, y + 4, _cut(name), anchor="end"))
        for series, series_name, value in dots:
            if log and value <= 0:
                continue
            title = tag("title", escape(f"{name}, {series_name}: {value:.4g}"))
            dot = tag("circle", title, cx=axis(value), cy=y, r="4", class_="dot")
            parts.append(tag("g", dot, class_=f"series {colour(series)}", data_series=series))
    return figure(bottom + 38, "".join(parts), label=label)


def interval_chart(
    rows: Sequence[tuple[int, str, float, float, float]],
    *,
    label: str,
    x_label: str,
    value_text: Callable[[float], str],
    zero: bool = False,
) -> str:
    """Points with intervals: rows of (series, name, low, value, high), each name above its interval."""
    line, top = 38.0, 4.0
    axis = scale([v for row in rows for v in row[2:]], 14.0, WIDTH - 14, zero=zero)
    bottom = top + line * len(rows) + 2
    parts = []
    for value in axis.ticks(6):
        parts.append(tag("line", x1=axis(value), x2=axis(value), y1=top, y2=bottom, class_="grid"))
        parts.append(text(axis(value), bottom + 15, percent_tick(value), anchor="middle"))
    if zero:
        parts.append(tag("line", x1=axis(0.0), x2=axis(0.0), y1=top, y2=bottom, class_="axis"))
    parts.append(text(WIDTH / 2, bottom + 32, x_label, anchor="middle", class_="label"))
    for index, (series, name, low, value, high) in enumerate(rows):
        y = top + index * line
        words = f"{value_text(value)} [{value_text(low)}, {value_text(high)}]"
        parts.append(text(4.0, y + 13, _cut(name, 40), class_="small strong"))
        parts.append(text(WIDTH - 4, y + 13, words, anchor="end", class_="small"))
        drawn = tag("title", escape(f"{name}: {words}"))
        middle = y + 25
        drawn += tag("line", x1=axis(low), x2=axis(high), y1=middle, y2=middle, class_="interval")
        for end in (low, high):
            drawn += tag("line", x1=axis(end), x2=axis(end), y1=middle - 4, y2=middle + 4, class_="interval")
        drawn += tag("circle", cx=axis(value), cy=middle, r="4.5", class_="dot")
        parts.append(tag("g", drawn, class_=f"series {colour(series)}", data_series=series))
    return figure(bottom + 38, "".join(parts), label=label)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    label: str,
    value_text: Callable[[float], str],
    row_label: str,
    column_label: str,
    bounds: tuple[float, float] | None = None,
    cell_text: bool = True,
    turned: bool = False,
    width: float = WIDTH,
) -> str:
    """Coloured cells, paler for less; a missing value is hatched. ``turned`` writes the columns' names upright."""
    known = [value for row in values for value in row if value is not None]
    low, high = bounds or (min(known, default=0.0), max(known, default=1.0))
    left = min(150.0, 22 + 6.6 * max(len(_cut(name)) for name in rows))
    top = 34.0 if not turned else min(110.0, 26 + 6.4 * max(len(_cut(name)) for name in columns))
    size = (width - left - 2) / len(columns)
    tall = size if turned else 40.0
    parts = [text((left + width) / 2, 11.0, column_label, anchor="middle", class_="label")]
    middle = top + tall * len(rows) / 2
    parts.append(
        text(11.0, middle, row_label, anchor="middle", class_="label", transform=f"rotate(-90 11 {middle:.1f})")
    )
    for j, name in enumerate(columns):
        x = left + (j + 0.5) * size
        turn = f"rotate(-90 {x + 4:.1f} {top - 6:.1f})" if turned else None
        parts.append(
            text(x + 4 if turned else x, top - 6, _cut(name), anchor="start" if turned else "middle", transform=turn)
        )
    for i, name in enumerate(rows):
        y = top + i * tall
        parts.append(text(left - 6, y + tall / 2 + 4, _cut(name), anchor="end"))
        for j, value in enumerate(values[i]):
            parts.append(
                _cell(
                    left + j * size, y, size, tall, value, (low, high), f"{name}, {columns[j]}", value_text, cell_text
                )
            )
    return figure(top + tall * len(rows) + 4, "".join(parts), label=label, width=width)


def _cell(
    x: float, y: float, width: float, height: float, value: float | None, bounds: tuple[float, float], name: str,
    value_text: Callable[[float], str], written: bool,
) -> str:  # fmt: skip
    low, high = bounds
    shown = "not run" if value is None else value_text(value)
    share = 0.0 if value is None else 50.0 if high == low else 100 * (value - low) / (high - low)
    cell = tag(
        "rect", tag("title", escape(f"{name}: {shown}")), x=x + 0.5, y=y + 0.5, width=width - 1, height=height - 1,
        class_="cell missing" if value is None else "cell", style=None if value is None else f"--t:{share:.0f}%",
    )  # fmt: skip
    if written and value is not None:
        cell += text(
            x + width / 2, y + height / 2 + 4, shown, anchor="middle", class_="over" if share > 55 else "under"
        )
    return cell


def _cut(name: str, longest: int = 22) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"
