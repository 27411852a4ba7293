"""The model card: README.md of a folder that segkit export writes, from the facts in its config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from segkit.report.tables import percent
from segkit.report.text import for_markdown


def card(facts: Mapping[str, Any]) -> str:
    """Return the card of a model as Markdown; every word that comes from ``facts`` is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent),
        undefined=StrictUndefined,
        finalize=lambda value: for_markdown(_text(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    total = sum(facts["class_pixels"]) or 1
    rows = [
        {
            "name": name,
            "colour": "#{:02x}{:02x}{:02x}".format(*colour),
            "share": f"{100 * pixels / total:.3g}",
            "iou": [percent(score["iou"].get(name)) for score in facts["scores"]],
        }
        for name, colour, pixels in zip(facts["classes"], facts["palette"], facts["class_pixels"], strict=True)
    ]
    unseen = [name for name, pixels in zip(facts["classes"], facts["class_pixels"], strict=True) if not pixels]
    template = environment.get_template("card.md.j2")
    return template.render(facts=facts, rows=rows, unseen=unseen, percent=percent, nodes=_nodes, words=_words)


def _nodes(node: Mapping[str, Any]) -> str:
    """Return a configuration node in one line: the name of its target, and the values that are set."""
    values = [f"{key} {json.dumps(value)}" for key, value in node.items() if key != "_target_" and value is not None]
    return ", ".join([str(node.get("_target_", "")).rpartition(".")[2], *values])


def _words(protocol: Mapping[str, Any]) -> str:
    """Return what a protocol says beyond data set and split, in one line."""
    left_out = ("dataset", "split", "decision_fitted_on")
    empty = (None, False, {"short_side": None, "size": None})
    shown = [(key, value) for key, value in protocol.items() if value not in empty and key not in left_out]
    return ", ".join(f"{key} {_text(value)}" for key, value in shown)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
