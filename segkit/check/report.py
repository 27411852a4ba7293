"""The report of ``segkit check``: as a JSON object, and that object as text."""

from __future__ import annotations

from typing import Any

from segkit.check.check import Report
from segkit.report.tables import percent, render

MOST_ROWS = 45
"""Raw values that are shown; of more, the rarest and those that are missing or unknown."""

RAREST = 12


def to_json(report: Report) -> dict[str, Any]:
    """The whole report as dictionaries, lists, strings and numbers."""
    from segkit.check.findings import LEVELS, published_count, summary

    config = report.config
    audits = []
    for seen in report.data:
        for audit in dict.fromkeys((seen.train, seen.val)):
            if audit is not None:
                published = published_count(audit.dataset, seen.config.reader)
                audits.append(summary(audit, published=published))
    ordered = sorted(report.findings, key=lambda finding: LEVELS.index(finding.level))
    return {
        "verdict": report.verdict,
        "dataset": config.dataset.name,
        "root": config.dataset.root,
        "model": config.model,
        "loss": config.loss,
        "sample": report.sample,
        "splits": audits,
        "rehearsal": None if report.rehearsal is None else report.rehearsal.to_json(),
        "findings": [
            {"level": finding.level, "text": finding.text, "files": list(finding.files)} for finding in ordered
        ],
    }


def as_text(content: dict[str, Any]) -> str:
    """What :func:`to_json` gives, for the screen."""
    parts = []
    if content["splits"]:
        parts += [_split_table(content), _value_table(content["splits"])]
    if content["rehearsal"]:
        parts.append(_rehearsal_text(content["rehearsal"]))
    parts += [f"{item['level']}: {item['text']}" for item in content["findings"]]
    parts.append(_verdict(content))
    return "\n".join(parts)


def _verdict(content: dict[str, Any]) -> str:
    counts = {level: sum(item["level"] == level for item in content["findings"]) for level in ("error", "warning")}
    shown = [f"{count} {level}{'s' * (count != 1)}" for level, count in counts.items() if count]
    return "verdict: " + (" and ".join(shown) if shown else "ok")


def _split_table(content: dict[str, Any]) -> str:
    from rich import box
    from rich.table import Table

    part = f", {content['sample']} random samples of each split" if content["sample"] else ""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("split")
    for column in ("images", "published", "read", "broken", "classes", "ignored %"):
        table.add_column(column, justify="right")
    table.add_column("width x height")
    for split in content["splits"]:
        pixels = [row["pixels"] for row in split["raw_values"]]
        known, present = split["classes"], sum(row["pixels"] > 0 for row in split["classes"].values())
        table.add_row(
            split["split"],
            f"{split['num_images']:,}",
            "-" if split["num_published"] is None else f"{split['num_published']:,}",
            f"{split['num_checked']:,}",
            f"{split['num_broken']:,}",
            f"{present} of {len(known)}",
            percent(split["ignored_pixels"] / sum(pixels)) if sum(pixels) else "-",
            _sizes(split["sizes"]),
        )
    place = f" in {content['root']}" if content["root"] else ""
    return f"{content['dataset']}{place}{part}\n{render(table)}"


def _sizes(sizes: list[dict[str, int]]) -> str:
    if not sizes:
        return "-"
    if len(sizes) == 1:
        return f"{sizes[0]['width']}x{sizes[0]['height']}"
    least = min(sizes, key=lambda size: size["width"] * size["height"])
    most = max(sizes, key=lambda size: size["width"] * size["height"])
    return f"{least['width']}x{least['height']} to {most['width']}x{most['height']}, {len(sizes)} sizes"


def _value_table(splits: list[dict[str, Any]]) -> str:
    """Share of the pixels of each split that each raw label value has."""
    from rich import box
    from rich.table import Table

    meaning: dict[int, str] = {}
    for split in splits:
        names = list(split["classes"])
        for row in split["raw_values"]:
            train = row["train"]
            meaning[row["value"]] = "unknown" if train is None else names[train] if train < len(names) else "(ignored)"
    totals = [sum(row["pixels"] for row in split["raw_values"]) for split in splits]
    pixels = [{row["value"]: row["pixels"] for row in split["raw_values"]} for split in splits]
    shown = sorted(meaning)
    title = "raw label values, percent of the pixels"
    if len(shown) > MOST_ROWS:
        rarest = sorted(shown, key=lambda value: pixels[0].get(value, 0))[:RAREST]
        missing = [v for v in shown if meaning[v] == "unknown" or any(not p.get(v, 0) for p in pixels)]
        title += f"; the {RAREST} rarest of {len(shown)}, missing and unknown ones (--json has all)"
        shown = sorted({*rarest, *missing[:MOST_ROWS]})
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("value", justify="right")
    table.add_column("class")
    for split in splits:
        table.add_column(split["split"], justify="right")
    for value in shown:
        shares = [f"{100 * p.get(value, 0) / max(total, 1):.4f}" for p, total in zip(pixels, totals, strict=True)]
        table.add_row(str(value), meaning[value], *shares)
    return f"{title}\n{render(table)}"


def _rehearsal_text(measured: dict[str, Any]) -> str:
    kind = "of the GPU" if measured["is_gpu"] else "of the process"
    lines = [
        f"rehearsal on {measured['device']}: {measured['num_steps']} steps of each phase, stopped after the first, "
        "resumed from its checkpoint, evaluated and saved",
        f"  peak memory    {shown_bytes(measured['peak_memory'])} {kind}, of {shown_bytes(measured['memory_limit'])}",
        f"  loader         {measured['loader_images_per_second']:.1f} images/s with workers={measured['workers']}",
        f"  evaluation     {measured['evaluated_images_per_second']:.1f} images/s",
    ]
    for phase in measured["phases"]:
        lines.append(
            f"  {phase['name']:14} {phase['images_per_second']:.1f} images/s of training; {phase['num_steps']:,} steps "
            f"and {phase['num_evaluations']:,} evaluations of {phase['num_evaluated_images']:,} images: about "
            f"{shown_time(phase['seconds'])}"
        )
    lines.append(f"  whole schedule about {shown_time(measured['estimated_seconds'])} on this machine")
    return "\n".join(lines) + "\n"


def shown_bytes(number: int) -> str:
    """Bytes as GiB or MiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def shown_time(seconds: float) -> str:
    """Seconds with the two largest units: "3 d 4 h", "5 h 20 min", "40 min", "25 s"."""
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"
