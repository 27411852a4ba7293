"""``segkit stats``: pixels of every class, and the margin-offsets that follow from them."""

from __future__ import annotations

import csv
import io
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segkit.commands.options import add_shared, check_writable, configuration, verb_parser
from segkit.config.dataset import RGB
from segkit.config.schema import Config
from segkit.files import write_atomically, write_json, written_beside
from segkit.progress import show


def parser() -> ArgumentParser:
    """Return the parser of the verb's arguments."""
    verb = verb_parser(
        "stats",
        "Count the label pixels of every class, and show the margins of the loss that follow from them; of images that "
        "are not 8-bit RGB also mean and deviation of each channel.",
        example="dataset=camvid dataset.root=data/CamVid loss.tau=5 --plot shares.png",
    )
    add_shared(verb, "overrides", "--config-dir")
    verb.add_argument("--split", help="split to count (default: dataset.train_split)")
    verb.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    verb.add_argument("--plot", type=Path, metavar="FILE", help="write a picture (PNG, SVG or PDF)")
    return verb


def run(argv: Sequence[str]) -> None:
    """Count, print the table, and write the files that were asked for."""
    arguments = parser().parse_intermixed_args(argv)
    check_writable(arguments, "csv", "json", "plot", draws=("plot",))
    from segkit.run.splits import open_split

    config = configuration(arguments, "csv", "json", "plot")
    split = open_split(config.dataset, arguments.split or config.dataset.train_split)
    rows, summary = rows_of(config, split)
    print(table(rows, summary))
    if arguments.csv:
        write_csv(arguments.csv, rows)
    if arguments.json:
        write_json(arguments.json, {**summary, "classes": rows})
    if arguments.plot:
        plot(arguments.plot, rows, summary)
    for path in (arguments.csv, arguments.json, arguments.plot):
        if path:
            show(f"written: {path}", error=True)


def margin_arguments(loss: dict[str, Any]) -> dict[str, Any]:
    """Return the options of :func:`segkit.margins.compute_margins`: those in ``loss``, and the defaults of the rest."""
    import inspect

    from segkit.margins import compute_margins

    options = inspect.signature(compute_margins).parameters.values()
    given = (item for item in options if item.default is not item.empty and item.name != "class_names")
    return {item.name: loss.get(item.name, item.default) for item in given}


def rows_of(config: Config, split: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return one row a class, and what the rows have in common."""
    from segkit.config.schema import cache_dir_of
    from segkit.data.statistics import count_labels, image_statistics
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
    if config.dataset.kind != RGB:
        found = image_statistics(split, divisor=config.dataset.dtype.divisor, workers=config.workers)
        summary |= {key: [float(f"{value:.6g}") for value in found[key]] for key in found}
    return rows, summary


# -- output ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    """The rows as a table for the screen."""
    from segkit.report.tables import screen_table
    from segkit.report.text import for_terminal

    margins = ", ".join(f"{key}={value}" for key, value in summary["margins"].items() if value is not None)
    title = f"{summary['dataset']} {summary['split']}, {summary['num_images']:,} images; margins in logits: {margins}"
    cells = [
        [str(number), row["class"], f"{row['pixels']:,}", f"{100 * row['share']:.4f}", f"{row['images']:,}",
         f"{row['rho_0k']:.4g}", f"{row['rho_k0']:.3g}"]
        for number, row in enumerate(rows)
    ]  # fmt: skip
    head = ["#", "class", "pixels", "share %", "images", "rho_0k", "rho_k0"]
    ignored = f"ignored: {summary['ignored_pixels']:,} pixels, {100 * summary['ignored_share']:.2f} % of all"
    images = [f"dataset.{key}=[{','.join(map(str, summary[key]))}]" for key in ("mean", "std") if key in summary]
    return "\n".join([for_terminal(title), screen_table(head, cells, left=["class"]), ignored, *images])


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as CSV with a header."""
    from segkit.report.text import for_csv

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(row | {"class": for_csv(row["class"])} for row in rows)
    write_atomically(path, text.getvalue())


def plot(path: Path, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Draw the shares on a logarithmic axis beside the margins rho_0k, the most frequent class at the top.

    A class without pixels has no bar on the left, but the word "absent".
    """
    from matplotlib.figure import Figure

    from segkit.report.text import for_matplotlib

    ordered = sorted(rows, key=lambda row: row["share"])
    names = [for_matplotlib(row["class"]) for row in ordered]
    figure = Figure(figsize=(10, max(2.5, 0.22 * len(rows) + 1.2)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
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
    figure.suptitle(for_matplotlib(f"{summary['dataset']} {summary['split']}: {summary['num_images']:,} images"))
    with written_beside(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:].lower())
