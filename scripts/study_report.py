"""Tables and figures of the study, from the results in docs/study/results; ``scripts/study.py --table`` calls it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segkit.errors import InputError
from segkit.evaluation.bootstrap import compare_totals
from segkit.files import read_json
from segkit.report.uncertainty import holm

DECISIONS = ("argmax", "bias", "miou")
CONTROL, WITHOUT = "cross_entropy", "mc_no_margin"
SIGNS = {"mc_mean1": 1, "mc_tau10": 1, "mc_mirror1": -1}
"""Arms of the registered prediction: the sign of their margins."""
MACHINE = "two cores of an AMD EPYC, no GPU"
CURE = "delete it, and the command of the study makes it again"
Arms = dict[str, dict[int, Any]]
"""arm -> seed -> content of its result, in the order of the study."""


def report(folder: Path, study: dict[str, Any]) -> None:
    """Write table.txt, signs.txt and the figures from the results in ``folder``; of learning rates the table alone."""
    arms, curves = load_all(folder, study)
    if any(arm.endswith("_high") for arm in arms):
        (folder / "table.txt").write_text(learning_rates(arms))
        return
    if CONTROL in arms:
        (folder / "table.txt").write_text(table(arms))
        study_figure(folder, arms)
    if CONTROL in arms and WITHOUT in arms:
        (folder / "signs.txt").write_text(signs(arms))
    curves_figure(folder, curves)


def load_all(folder: Path, study: dict[str, Any]) -> tuple[Arms, Arms]:
    """The results of arms and of curves that are there; InputError if one is damaged."""
    arms = load(folder, "arms", study["arms"]["each"], study["seeds"])
    curves = load(folder, "curves", study["curves"]["each"], study["seeds"][:1])
    for part, runs in (("arms", arms), ("curves", curves)):
        for (arm, seed), run in {(arm, seed): run for arm, own in runs.items() for seed, run in own.items()}.items():
            try:
                sizes = {totals(run, name).shape for name in DECISIONS} if part == "arms" else {(1, len(run["curve"]))}
                whole = len(sizes) == 1 and all(map(all, sizes))
            except (LookupError, TypeError, ValueError):
                whole = False
            if not whole:
                path = folder / "results" / f"{part}-{arm}-{seed}.json"
                raise InputError(f"{path} is not what a job of the study writes: {CURE}")
    return arms, curves


def load(folder: Path, part: str, names: Sequence[str], seeds: list[int]) -> Arms:
    """The results of ``part`` that are there."""
    found: Arms = {}
    for arm in names:
        paths = {seed: folder / "results" / f"{part}-{arm}-{seed}.json" for seed in seeds}
        found[arm] = {seed: read_json(path, cure=CURE) for seed, path in paths.items() if path.exists()}
    return {arm: runs for arm, runs in found.items() if runs}


def totals(run: dict[str, Any], decision: str) -> np.ndarray:
    """(blocks, 2 K): true positives, then target + predicted pixels."""
    counts = run["counts"][decision]
    return np.concatenate([counts["tp"], np.add(run["target"], counts["predicted"])], axis=1).astype(float)


def ratios(runs: dict[int, Any], decision: str = "argmax") -> dict[str, np.ndarray]:
    """IoU, precision and recall of every class, (seeds, K) each; nan where undefined."""
    counts = [run["counts"][decision] for run in runs.values()]
    tp, predicted = (np.array([np.sum(one[key], 0) for one in counts]) for key in ("tp", "predicted"))
    target = np.array([np.sum(run["target"], 0) for run in runs.values()])
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"iou": tp / (target + predicted - tp), "precision": tp / predicted, "recall": tp / target}


def change(arms: Arms, arm: str, control: str, decision: str) -> np.ndarray:
    """(K,) IoU of ``arm`` less that of ``control``, mean over the seeds that both have."""
    both = [seed for seed in arms[arm] if seed in arms[control]]
    mine, other = (ratios({seed: arms[name][seed] for seed in both}, decision)["iou"] for name in (arm, control))
    return np.nanmean(mine - other, 0)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows]) + "\n"


def rows_against(arms: Arms, entries: list[tuple[str, str]], control: tuple[str, str]) -> list[list[str]]:
    """One row an (arm, decision): mean IoU, spread, paired difference to ``control`` with interval, p, Holm, n."""
    rows, results = [], []
    for arm, decision in entries:
        seeds = [seed for seed in arms[arm] if seed in arms[control[0]]]
        pair = [np.stack([totals(arms[name][seed], how) for seed in seeds]) for name, how in (control, (arm, decision))]
        found = 100 * np.nanmean(ratios(arms[arm], decision)["iou"], 1)
        spread = f"{found.std(ddof=1):.2f}" if len(found) > 1 else "-"
        rows.append([arm, decision, f"{found.mean():.2f}", spread, str(len(found))])
        results.append(None if (arm, decision) == control else compare_totals(*pair))
    corrected = iter(holm([result.p_value for result in results if result]))
    for row, result in zip(rows, results, strict=True):
        row += ["", "", ""] if result is None else [
            f"{100 * result.difference:+.2f} [{100 * result.low:+.2f}, {100 * result.high:+.2f}]",
            f"{result.p_value:.4f}",
            f"{next(corrected):.4f}",
        ]  # fmt: skip
    return rows


def table(arms: Arms) -> str:
    """All arms and decisions against cross-entropy with the argmax; then margins alone, and losses under ``miou``."""
    head = ["arm", "decision", "mean IoU, %", "spread", "seeds", "difference, points [95 %]", "p", "p, Holm"]
    margins = [(arm, "argmax") for arm in (WITHOUT, *SIGNS) if arm in arms]
    everything = [(arm, decision) for arm in arms for decision in DECISIONS]
    parts = [
        "Difference to `cross_entropy` with `argmax`:\n",
        markdown(head, rows_against(arms, everything, (CONTROL, "argmax"))),
        "Margins alone, difference to `mc_no_margin`:\n" if len(margins) > 1 and WITHOUT in arms else "",
        markdown(head, rows_against(arms, margins, margins[0])) if len(margins) > 1 and WITHOUT in arms else "",
        "Losses under one rule, difference to `cross_entropy` with `miou`:\n",
        markdown(head, rows_against(arms, [(arm, "miou") for arm in arms], (CONTROL, "miou"))),
    ]
    across = {decision: [100 * change(arms, arm, CONTROL, decision).mean() for arm in arms] for decision in DECISIONS}
    parts.append(
        "Standard deviation over the arms of the paired difference to `cross_entropy` under the same decision: "
        + ", ".join(f"{name} {np.std(values, ddof=1):.2f}" for name, values in across.items() if len(arms) > 1)
        + " points.\n"
    )
    runs = [run for seeds in arms.values() for run in seeds.values()]
    versions = ", ".join(f"{name} {version}" for name, version in runs[0]["versions"].items())
    hours = sum(run["seconds"] for run in runs) / 3600
    parts.append(f"{len(runs)} runs; their durations add up to {hours:.1f} hours; {MACHINE}; {versions}.\n")
    return "\n".join(part for part in parts if part)


def learning_rates(arms: Arms) -> str:
    """The mean IoU of every arm at its three learning rates, the best in bold; those beside its own are arms as well.

    Their names end with ``_low`` and ``_high``.
    """
    rates: dict[str, None] = {}
    rows = []
    for name in (name for name in arms if not name.endswith(("_low", "_high"))):
        row = [name]
        for decision in ("argmax", "miou"):
            runs = {rate_of(arms[key]): arms[key] for key in (f"{name}_low", name, f"{name}_high") if key in arms}
            scores = {rate: 100 * float(np.nanmean(ratios(own, decision)["iou"])) for rate, own in runs.items()}
            rates |= dict.fromkeys(scores)
            best = max(scores.values())
            row += [f"**{scores[rate]:.2f}**" if scores[rate] == best else f"{scores[rate]:.2f}" for rate in scores]
        rows.append(row)
    seeds = sorted({seed for runs in arms.values() for seed in runs})
    head = ["arm", *(f"{decision}, {rate}" for decision in ("argmax", "`miou`") for rate in rates)]
    return f"Mean IoU, %, seed {', '.join(map(str, seeds))}, by learning rate:\n\n{markdown(head, rows)}"


def rate_of(runs: dict[int, Any]) -> str:
    """The learning rate of an arm's own phase, as its overrides say."""
    texts = next(iter(runs.values()))["overrides"]
    return next(text for text in reversed(texts) if text.startswith("schedule.finetune.lr=")).partition("=")[2]


def signs(arms: Arms) -> str:
    """The registered prediction, class by class: change of IoU against the same loss without margins."""
    base = ratios(arms[CONTROL])
    lean = (base["recall"] - base["precision"]).mean(0)
    known = np.isfinite(lean)
    changes = {arm: change(arms, arm, WITHOUT, "argmax") for arm in SIGNS if arm in arms}
    hits = {arm: (SIGNS[arm] * np.sign(values) == np.sign(lean)) & known for arm, values in changes.items()}
    rows = []
    for k, name in enumerate(next(iter(arms[CONTROL].values()))["classes"]):
        cells = [f"{100 * changes[arm][k]:+.2f} {'hit' if hits[arm][k] else 'miss'}" for arm in changes]
        rows.append(
            [name, f"{100 * lean[k]:+.1f}", *cells] if known[k] else [name, "never predicted", *["-"] * len(cells)]
        )
    shares = [(int(hit.sum()), int(known.sum())) for hit in hits.values()]
    rows.append(["hits", "", *("{} of {} [{:.2f}, {:.2f}]".format(*share, *wilson(*share)) for share in shares)])
    return markdown(["class", "recall - precision, points", *(f"`{arm}`: change of IoU" for arm in changes)], rows)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z, share = 1.959964, hits / n
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def pyplot() -> Any:
    """matplotlib.pyplot that writes the same SVG for the same figures."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "segkit"
    from matplotlib import pyplot

    return pyplot


def study_figure(folder: Path, arms: Arms) -> None:
    """study.svg: mean IoU by arm and decision, a point a seed."""
    figure, axis = pyplot().subplots(figsize=(8, 0.4 * len(arms) + 1.2))
    for shift, decision in zip((-0.25, 0, 0.25), DECISIONS, strict=True):
        points = [
            (100 * np.nanmean(iou), y + shift)
            for y, runs in enumerate(arms.values())
            for iou in ratios(runs, decision)["iou"]
        ]
        axis.plot(*zip(*points, strict=True), "o", markersize=4, label=decision)
    axis.set(yticks=range(len(arms)), yticklabels=list(arms), xlabel="mean IoU on val, %; a point a seed")
    axis.invert_yaxis()
    axis.legend()
    figure.tight_layout()
    figure.savefig(folder / "study.svg", metadata={"Date": None})


def curves_figure(folder: Path, curves: Arms) -> None:
    """curves.svg: loss, relative to its first value, and mean IoU of the runs from random weights."""
    if not curves:
        return
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4))
    for arm, runs in curves.items():
        for axis, split in zip(axes, ("train", "val"), strict=True):
            line = [(step, value) for step, value, kind in next(iter(runs.values()))["curve"] if kind == split]
            first = line[0][1] if split == "train" else 0.01
            axis.plot([step for step, _ in line], [value / first for _, value in line], label=arm)
    axes[0].set(xlabel="step", ylabel="loss, relative to its first value")
    axes[1].set(xlabel="step", ylabel="mean IoU on val, %")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "curves.svg", metadata={"Date": None})
