"""``segkit stats``: pixels of every class, and the margin-offsets that follow from them."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from segkit.config import Config
from segkit.errors import InputError

MARGIN_DEFAULTS: dict[str, Any] = {
    "tau": 10.0,
    "upsilon": 1.0,
    "scale": "tau",
    "mean_margin": None,
    "absent": "max",
    "rho_max": None,
}
"""Arguments of :func:`segkit.losses.margin_offsets`, used where the loss of the run has no margins."""

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def parse() -> argparse.Namespace:
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
    arguments = parser.parse_intermixed_args()
    for option in ("csv", "json", "plot"):
        path = getattr(arguments, option)
        if path and not path.absolute().parent.is_dir():
            raise InputError(f"--{option} is {path}, but the folder {path.absolute().parent} does not exist: make it")
    if arguments.plot and arguments.plot.suffix.lower() not in PLOT_SUFFIXES:
        raise InputError(f"--plot is {arguments.plot}, but must end with {', '.join(PLOT_SUFFIXES)}")
    return arguments


def main() -> None:
    """Entry point of the verb."""
    from segkit.train import guarded

    guarded(run)


def run() -> None:
    """Count, show, and write what was asked for."""
    from segkit.commands.compose import compose
    from segkit.preflight import open_split

    arguments = parse()
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
    """What a loss node says about margins, and the defaults for the rest."""
    return {name: loss.get(name, default) for name, default in MARGIN_DEFAULTS.items()}


def rows_of(config: Config, split: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row a class, and what they have in common."""
    from segkit.cache_dir import cache_dir_of
    from segkit.data.statistics import count_labels

    cache_dir = cache_dir_of(config)
    counts = count_labels(split, workers=config.workers, cache_dir=cache_dir)
    arguments = margin_arguments(config.loss)
    margins = margins_of(counts.class_pixels.tolist(), list(counts.classes), arguments, cache_dir=cache_dir)
    valid = int(counts.class_pixels.sum())
    rows = [
        {
            "class": name,
            "pixels": int(counts.class_pixels[k]),
            "share": float(counts.class_pixels[k] / valid),
            "images": int(counts.class_images[k]),
            "rho_0k": margins["rho_0k"][k],
            "rho_k0": margins["rho_k0"][k],
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


# -- margins, kept: importing torch to compute them again would take longer than all the rest -------------------------


def margins_of(
    class_pixels: list[int], class_names: list[str], arguments: dict[str, Any], *, cache_dir: Path
) -> dict[str, list[float]]:
    """``rho_0k`` and ``rho_k0`` of every class in logits; from ``cache_dir`` where they were computed before.

    Warnings are given again on every call. Raises InputError as :func:`segkit.losses.margin_offsets` does.
    """
    path = cache_dir / "margins" / f"{_key(class_pixels, class_names, arguments)}.json"
    kept = _kept(path, len(class_names))
    if kept is None:
        kept = _compute(class_pixels, class_names, arguments)
        _keep(path, kept)
    for text in kept.pop("warnings"):
        warnings.warn(text, stacklevel=2)
    return kept


def _key(class_pixels: list[int], class_names: list[str], arguments: dict[str, Any]) -> str:
    """Hash of everything that the margins depend on, the code that computes them included."""
    code = (Path(__file__).resolve().parent.parent / "losses" / "margins.py").read_bytes()
    text = json.dumps([class_pixels, class_names, arguments, hashlib.sha256(code).hexdigest()])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _compute(class_pixels: list[int], class_names: list[str], arguments: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    from segkit.losses.margins import margin_offsets

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        margins = margin_offsets(np.array(class_pixels, np.int64), class_names=class_names, **arguments)
    texts = [str(item.message) for item in caught]
    return {"rho_0k": margins.rho_0k.tolist(), "rho_k0": margins.rho_k0.tolist(), "warnings": texts}


def _kept(path: Path, num_classes: int) -> dict[str, Any] | None:
    """The margins in ``path``; None where there are none, or the file is torn."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        whole = len(kept["rho_0k"]) == len(kept["rho_k0"]) == num_classes and isinstance(kept["warnings"], list)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if whole else None


def _keep(path: Path, margins: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(margins), encoding="utf-8")
    partial.replace(path)  # a reader never sees half a file


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
