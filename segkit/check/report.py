"""The report of ``segkit check``: as a JSON object, and that object as text."""

from __future__ import annotations

from typing import Any

from segkit.check.findings import LEVELS, Report, summary
from segkit.report.tables import percent, screen_table
from segkit.report.text import for_terminal

MOST_ROWS = 45
"""Raw values in the table at most; of more, it has the rarest and those that are missing or unknown."""

RAREST = 12
"""Raw values that count as the rarest."""


def to_json(report: Report) -> dict[str, Any]:
    """Return the whole report as JSON values, the findings ordered by level."""
    config = report.config
    ordered = sorted(report.findings, key=lambda finding: LEVELS.index(finding.level))
    return {
        "verdict": report.verdict,
        "dataset": config.dataset.name,
        "root": config.dataset.root,
        "model": config.model,
        "loss": config.loss,
        "sample": report.sample,
        "splits": [summary(audit) for audit in report.audits()],
        "rehearsal": None if report.rehearsal is None else report.rehearsal.to_json(),
        "findings": [{"level": item.level, "text": item.text, "files": list(item.files)} for item in ordered],
    }


def as_text(content: dict[str, Any]) -> str:
    """Return the result of :func:`to_json` as text for the screen."""
    parts = []
    if content["splits"]:
        parts += [_split_table(content), _value_table(content["splits"])]
    if content["rehearsal"]:
        parts.append(_rehearsal_text(content["rehearsal"]))
    parts += [for_terminal(f"{item['level']}: {item['text']}") for item in content["findings"]]
    parts.append(_verdict(content))
    return "\n".join(parts)


def _verdict(content: dict[str, Any]) -> str:
    counts = {level: sum(item["level"] == level for item in content["findings"]) for level in ("error", "warning")}
    found = [f"{count} {level}{'s' * (count != 1)}" for level, count in counts.items() if count]
    return "verdict: " + (" and ".join(found) or "ok")


def _split_table(content: dict[str, Any]) -> str:
    part = f", {content['sample']} random samples of each split" if content["sample"] else ""
    rows = []
    for split in content["splits"]:
        pixels = [row["pixels"] for row in split["raw_values"]]
        present = sum(row["pixels"] > 0 for row in split["classes"].values())
        rows.append([
            split["split"],
            f"{split['num_images']:,}",
            "-" if split["num_published"] is None else f"{split['num_published']:,}",
            f"{split['num_checked']:,}",
            f"{split['num_broken']:,}",
            f"{present} of {len(split['classes'])}",
            percent(split["ignored_pixels"] / sum(pixels)) if sum(pixels) else "-",
            _sizes(split["sizes"]),
        ])  # fmt: skip
    head = ["split", "images", "published", "read", "broken", "classes", "ignored %", "width x height"]
    table = screen_table(head, rows, left=["split", "width x height"])
    place = f" in {content['root']}" if content["root"] else ""
    return f"{for_terminal(content['dataset'] + place)}{part}\n{table}"


def _sizes(sizes: list[dict[str, int]]) -> str:
    if not sizes:
        return "-"
    ordered = sorted(sizes, key=lambda size: size["width"] * size["height"])
    least, most = (f"{size['width']}x{size['height']}" for size in (ordered[0], ordered[-1]))
    return least if len(sizes) == 1 else f"{least} to {most}, {len(sizes)} sizes"


def _value_table(splits: list[dict[str, Any]]) -> str:
    """Return a table with the share of each raw label value in the pixels of each split."""
    meaning: dict[int, str] = {}
    for split in splits:
        names = list(split["classes"])
        for row in split["raw_values"]:
            train = row["train"]
            meaning[row["value"]] = "unknown" if train is None else names[train] if train < len(names) else "(ignored)"
    totals = [sum(row["pixels"] for row in split["raw_values"]) for split in splits]
    pixels = [{row["value"]: row["pixels"] for row in split["raw_values"]} for split in splits]
    values = sorted(meaning)
    title = "raw label values, percent of the pixels"
    if len(values) > MOST_ROWS:
        rarest = sorted(values, key=lambda value: pixels[0].get(value, 0))[:RAREST]
        missing = [v for v in values if meaning[v] == "unknown" or any(not p.get(v, 0) for p in pixels)]
        title += f"; the {RAREST} rarest of {len(values)}, missing and unknown ones (--json has all)"
        values = sorted({*rarest, *missing[:MOST_ROWS]})
    rows = []
    for value in values:
        shares = [f"{100 * p.get(value, 0) / max(total, 1):.4f}" for p, total in zip(pixels, totals, strict=True)]
        rows.append([str(value), meaning[value], *shares])
    head = ["value", "class", *(split["split"] for split in splits)]
    return f"{title}\n{screen_table(head, rows, left=['class'])}"


def _rehearsal_text(measured: dict[str, Any]) -> str:
    owner, peak = "GPU" if measured["is_gpu"] else "process", measured["peak_memory"]
    taken = "not measured on this system" if peak is None else f"{shown_bytes(peak)} of the {owner}"
    lines = [
        f"rehearsal on {measured['device']}: {measured['num_steps']} steps of each phase, stopped after the first, "
        "resumed from its checkpoint, evaluated and saved",
        f"  peak memory    {taken}, of {shown_bytes(measured['memory_limit'])}",
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
    """Return a number of bytes in GiB or MiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def shown_time(seconds: float) -> str:
    """Return seconds in the two largest units: "3 d 4 h", "5 h 20 min", "40 min", "25 s"."""
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"
