"""``segkit stats``: pixels of every class, and the margin-offsets that follow from them."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segkit.config.schema import Config
from segkit.errors import InputError

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command line; InputError before any work for a file that cannot be written."""
    parser = argparse.ArgumentParser(
        prog="segkit stats",
        description="Count the label pixels of every class, and show the margins of the loss that follow from them.",
        epilog="example: segkit stats dataset=camvid dataset.root=data/CamVid loss.tau=5 --plot shares.png",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for train.py: dataset=..., loss.tau=...")
    parser.add_argument("--split", help="split to count (default: dataset.train_split)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture (PNG, SVG or PDF)")
    arguments = parser.parse_intermixed_args(argv)
    for option in ("csv", "json", "plot"):
        path = getattr(arguments, option)
        if path and not path.absolute().parent.is_dir():
            raise InputError(f"--{option} is {path}, but the folder {path.absolute().parent} does not exist: make it")
    if arguments.plot and arguments.plot.suffix.lower() not in PLOT_SUFFIXES:
        raise InputError(f"--plot is {arguments.plot}, but must end with {', '.join(PLOT_SUFFIXES)}")
    return arguments


def run(argv: Sequence[str]) -> None:
    """Count, show, and write what was asked for."""
    from segkit.config.compose import compose
    from segkit.run.splits import open_split

    arguments = parse(argv)
    config = compose(arguments.overrides)
    split = open_split(config.dataset, arguments.split or config.dataset.train_split)
    rows, summary = rows_of(config, split)
    print(table(rows, summary))
    if arguments.csv:
        write_csv(arguments.csv, rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({**summary, "classes": rows}, indent=2) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(arguments.plot, rows, summary)
    for path in (arguments.csv, arguments.json, arguments.plot):
        if path:
            print(f"written: {path}", file=sys.stderr)


def margin_arguments(loss: dict[str, Any]) -> dict[str, Any]:
    """The options of :func:`segkit.margins.compute_margins`: those of a loss node, and the defaults for the rest."""
    import inspect

    from segkit.margins import compute_margins

    options = inspect.signature(compute_margins).parameters.values()
    given = (item for item in options if item.default is not item.empty and item.name != "class_names")
    return {item.name: loss.get(item.name, item.default) for item in given}


def rows_of(config: Config, split: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row a class, and what they have in common."""
    from segkit.config.schema import cache_dir_of
    from segkit.data.statistics import count_labels
    from segkit.margins import compute_margins

    counts = count_labels(split, workers=config.workers, cache_dir=cache_dir_of(config))
    arguments = margin_arguments(config.loss)
    margins = compute_margins(counts.class_pixels, class_names=counts.classes, **arguments)
    valid = int(counts.class_pixels.sum())
    rows = [
        {
            "class": name,
            "pixels": int(counts.class_pixels[k]),
            "share": float(counts.class_pixels[k] / valid),
            "images": int(counts.class_images[k]),
            "rho_0k": float(margins.rho_0k[k]),
            "rho_k0": float(margins.rho_k0[k]),
        }
        for k, name in enumerate(counts.classes)
    ]
    ignored = int(counts.ignored_pixels)
    summary = {
        "dataset": config.dataset.name,
        "split": split.split,
        "num_images": counts.num_images,
        "valid_pixels": valid,
        "ignored_pixels": ignored,
        "ignored_share": ignored / (valid + ignored),
        "margins": arguments,
    }
    return rows, summary


# -- output ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    """The rows as a table for the screen."""
    from rich import box
    from rich.table import Table

    from segkit.report.tables import render

    margins = ", ".join(f"{key}={value}" for key, value in summary["margins"].items() if value is not None)
    title = f"{summary['dataset']} {summary['split']}, {summary['num_images']:,} images; margins in logits: {margins}"
    out = Table(box=box.SIMPLE_HEAD)
    for name, justify in (("#", "right"), ("class", "left"), ("pixels", "right"), ("share %", "right")):
        out.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("images", "rho_0k", "rho_k0"):
        out.add_column(name, justify="right")
    for number, row in enumerate(rows):
        out.add_row(
            str(number),
            row["class"],
            f"{row['pixels']:,}",
            f"{100 * row['share']:.4f}",
            f"{row['images']:,}",
            f"{row['rho_0k']:.4g}",
            f"{row['rho_k0']:.3g}",
        )
    ignored = f"ignored: {summary['ignored_pixels']:,} pixels, {100 * summary['ignored_share']:.2f} % of all"
    return f"{title}\n{render(out)}\n{ignored}"


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows as CSV with a header."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Shares on a logarithmic axis beside the margins rho_0k, the most frequent class at the top.

    A class without pixels has no bar on the left, but the word "absent".
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ordered = sorted(rows, key=lambda row: row["share"])
    names = [row["class"] for row in ordered]
    height = max(2.5, 0.22 * len(rows) + 1.2)
    figure, (left, right) = pyplot.subplots(1, 2, sharey=True, figsize=(10, height), layout="constrained")
    shares = [100 * row["share"] for row in ordered]
    least = min(share for share in shares if share > 0) / 3
    left.barh(names, [share if share > 0 else float("nan") for share in shares], color="#3b6ea8")
    left.set(xscale="log", xlabel="share of valid pixels, %", xlim=(least, 100))
    for place, share in enumerate(shares):
        if share == 0:
            left.text(least * 1.05, place, "absent", va="center", fontsize=7, color="#777777")
    right.barh(names, [row["rho_0k"] for row in ordered], color="#c2703d")
    right.set(xlabel="margin rho_0k, logits")
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", labelsize=8 if len(rows) < 60 else 5)
    figure.suptitle(f"{summary['dataset']} {summary['split']}: {summary['num_images']:,} images")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
