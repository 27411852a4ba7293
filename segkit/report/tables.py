"""Results as tables for the screen."""

from __future__ import annotations

import shutil
from io import StringIO
from typing import Any


def render(table: Any, *, width: int | None = None) -> str:
    """A rich table as text for a terminal of ``width`` columns."""
    from rich.console import Console

    out = StringIO()
    width = width or max(80, shutil.get_terminal_size((100, 24)).columns)
    Console(file=out, width=width, force_terminal=False).print(table)
    return out.getvalue().rstrip()


def percent(value: float | None) -> str:
    """A share in percent with two digits; a dash where it has no meaning."""
    return "-" if value is None or value != value else f"{100 * value:.2f}"


def class_table(results: dict[str, Any]) -> str:
    """The per-class table of a ``results.json``: IoU, precision and recall in percent, pixels of the label."""
    from rich import box
    from rich.table import Table

    protocol = results.get("protocol", {})
    table = Table(
        title=f"{protocol.get('dataset', '')} {protocol.get('split', '')}, {results['num_images']} images, in percent",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("class")
    for column in ("IoU", "precision", "recall", "pixels"):
        table.add_column(column, justify="right")
    for name, scores in results["classes"].items():
        shown = [percent(scores[key]) for key in ("iou", "precision", "recall")]
        table.add_row(name, *shown, f"{scores['target_pixels']:,}")
    table.add_section()
    table.add_row(f"mean over {results['num_classes_averaged']} classes", percent(results["mean_iou"]), "", "", "")
    table.add_row("pixel accuracy", percent(results["pixel_accuracy"]), "", "", "")
    lines = [render(table)]
    if results.get("absent_classes"):
        lines.append(f"not averaged, because absent: {', '.join(results['absent_classes'])}")
    return "\n".join(lines)
