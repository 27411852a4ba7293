"""Which loss and which decision raise the mean IoU? Runs the study of docs/study/study.yaml, and reports it.

    python scripts/study.py --root DIR            # all arms and seeds; the same command again goes on where it stopped
    python scripts/study.py --root DIR --part curves    # COPLE-Net from random weights: does every loss learn?
    python scripts/study.py --table               # only tables and figures, from the results in docs/study

One job after the other, in this process: start it with `nohup ... &`. Every finished job leaves a small JSON file in
docs/study/results; run folders and the shared cross-entropy phases lie in --work.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import segkit
from segkit.config.compose import quoted
from segkit.config.schema import plain
from segkit.data import SampleSet
from segkit.data.loader import Batch, eval_batches
from segkit.data.transforms import EvalTransform
from segkit.evaluation import evaluate
from segkit.evaluation.bootstrap import compare_totals
from segkit.evaluation.decision import BiasedModel, collect_logits, tune_bias
from segkit.evaluation.inference import Inference
from segkit.evaluation.loop import evaluating
from segkit.evaluation.miou_rule import ScaledModel, fit_miou_rule
from segkit.files import read_json, without_nan, write_atomically
from segkit.report.uncertainty import holm
from segkit.run.saved import open_run
from segkit.run.splits import open_split
from segkit.runtime import provenance

STUDY = Path(__file__).resolve().parent.parent / "docs" / "study"
DECISIONS = ("argmax", "bias", "miou")
RULE = ("factor", "offset", "iou", "union")
CONTROL = "cross_entropy"


def main() -> None:
    """Run what is left of the parts, then write tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="the folder CamVid (dataset.root)")
    parser.add_argument("--part", choices=("arms", "curves"), default="arms")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the study's seeds, for several processes at once")
    parser.add_argument("--study", type=Path, default=STUDY, help="folder of study.yaml, results and tables")
    parser.add_argument("--work", type=Path, default=Path("outputs/study"), help="run folders and phase cache")
    parser.add_argument("--table", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    study = yaml.safe_load((arguments.study / "study.yaml").read_text())
    if not arguments.table:
        part, seeds = study[arguments.part], study["seeds"] if arguments.part == "arms" else study["seeds"][:1]
        for arm, own in part["each"].items():
            for seed in (seed for seed in seeds if arguments.seeds is None or seed in arguments.seeds):
                path = arguments.study / "results" / f"{arguments.part}-{arm}-{seed}.json"
                if not path.exists():
                    overrides = [*part["base"], *own, f"seed={seed}", f"dataset.root={quoted(arguments.root)}"]
                    overrides.append(f"cache_dir={quoted(arguments.work / 'cache')}")
                    job(arguments.part, overrides, study, arguments.work / f"{arguments.part}-{arm}-{seed}", path)
    report(arguments.study, study)


def job(part: str, overrides: list[str], study: dict[str, Any], folder: Path, path: Path) -> None:
    """Train one run in ``folder`` and write its results to ``path``."""
    begun = time.time()
    segkit.train(overrides, folder=folder)
    facts: dict[str, Any] = {
        "overrides": [text for text in overrides if not text.startswith(("dataset.root", "cache_"))]
    }
    if part == "arms":
        facts |= decide(folder, next(folder.parent.glob("arms-*")), study)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    facts["curve"] = [
        [line["step"], round(line.get("loss", line.get("mean_iou")), 5), line["split"]]
        for line in lines
        if part == "curves" and ("loss" in line or "mean_iou" in line)
    ]
    origin = provenance(device=torch.device("cpu"), seed=0)
    facts |= {"seconds": round(time.time() - begun), "threads": torch.get_num_threads(), "versions": origin["versions"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(without_nan(facts)) + "\n")
    print(f"written: {path}", flush=True)


class Recorded(torch.nn.Module):
    """Gives the logits of ``model`` for ``batches`` again, in their order, as often as they are asked for."""

    def __init__(self, model: torch.nn.Module, batches: list[Batch]) -> None:
        super().__init__()
        with evaluating(model, torch.device("cpu"), "fp32"):
            self.again = itertools.cycle([model(batch.images) for batch in batches])

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, h, w) of the next batch."""
        return next(self.again)


@functools.cache
def images(folder: Path, num_images: int | None) -> tuple[list[Batch], SampleSet]:
    """Batches of the validation images, or of ``num_images`` training images evenly chosen, and their split."""
    dataset = open_run(folder).config.dataset
    split = open_split(dataset, dataset.train_split if num_images else dataset.val_split)
    if num_images:
        split = split.subset(np.linspace(0, len(split) - 1, num_images).astype(int).tolist())
    transform = EvalTransform(resize=plain(dataset.eval_resize), labels=dataset.eval_labels.value)
    return list(eval_batches(split, transform=transform, batch_size=8, workers=0)), split


def decide(folder: Path, first: Path, study: dict[str, Any]) -> dict[str, Any]:
    """Fit bias and rule on training images, and count the validation images by every decision, in blocks of frames.

    ``first``: a run of the study, whose images are those of all.
    """
    model = open_run(folder).model()
    fitted, _ = images(first, study["fit"]["images"])
    val, split = images(first, None)
    facts = {"num_classes": split.num_classes, "ignore_index": split.ignore_index}
    sample = collect_logits(model, fitted, **facts, pixels_per_image=study["fit"]["pixels"])
    bias, rule = tune_bias(sample), fit_miou_rule(sample)
    recorded = Recorded(model, val)
    ways = {
        "argmax": (recorded, None),
        "bias": (BiasedModel(recorded, bias.bias), None),
        "miou": (ScaledModel(recorded, rule.rule), rule.rule.scores),
    }
    block, counts = np.arange(len(split)) // study["block"], {}
    for name, (scored, rescore) in ways.items():
        found = evaluate(scored, val, **facts, predict=Inference(decide=rescore)).per_image.class_totals()
        tp, target, predicted = (np.add.reduceat(part, np.unique(block, return_index=True)[1]) for part in found)
        counts[name] = {"tp": tp.tolist(), "predicted": predicted.tolist()}
    return {
        "classes": list(split.classes),
        "target": target.tolist(),
        "counts": counts,
        "mean_iou_where_fitted": [bias.mean_iou_before, bias.mean_iou_after, rule.mean_iou_after],
        "rule": {name: [round(row[key], 4) for key in RULE] for name, row in rule.rule.to_json(split.classes).items()},
    }


# -- the report ------------------------------------------------------------------------------------------------------


def load(folder: Path, part: str, arms: Any, seeds: list[int]) -> dict[str, dict[int, Any]]:
    """The results of ``part`` that are there: arm -> seed -> content, arms in the order of the study."""
    found = {}
    for arm in arms:
        paths = {seed: folder / "results" / f"{part}-{arm}-{seed}.json" for seed in seeds}
        found[arm] = {seed: read_json(path) for seed, path in paths.items() if path.exists()}
    return {arm: runs for arm, runs in found.items() if runs}


def totals(run: dict[str, Any], decision: str) -> np.ndarray:
    """(blocks, 2 K): true positives, then target + predicted pixels."""
    counts = run["counts"][decision]
    return np.concatenate([counts["tp"], np.add(run["target"], counts["predicted"])], axis=1).astype(float)


def ratios(runs: dict[int, Any], decision: str = "argmax") -> dict[str, np.ndarray]:
    """IoU, precision and recall of every class, (seeds, K) each; nan where undefined."""
    tp, predicted = (
        np.array([np.sum(run["counts"][decision][key], 0) for run in runs.values()]) for key in ("tp", "predicted")
    )
    target = np.array([np.sum(run["target"], 0) for run in runs.values()])
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"iou": tp / (target + predicted - tp), "precision": tp / predicted, "recall": tp / target}


def report(folder: Path, study: dict[str, Any]) -> None:
    """Write table.md, signs.md and the figures from the results in ``folder``."""
    arms = load(folder, "arms", study["arms"]["each"], study["seeds"])
    if CONTROL in arms:
        (folder / "table.md").write_text(table(arms))
        (folder / "signs.md").write_text(signs(arms))
    curves = load(folder, "curves", study["curves"]["each"], study["seeds"][:1])
    figures(folder, arms, curves)


def table(arms: dict[str, dict[int, Any]]) -> str:
    """Mean IoU of every arm and decision, and its paired difference to cross-entropy with the argmax."""
    rows, tests = [], []
    for arm, runs in arms.items():
        seeds = [seed for seed in runs if seed in arms[CONTROL]]
        for decision in DECISIONS:
            found = np.nanmean(ratios(runs, decision)["iou"], 1) * 100
            spread = f"{found.std(ddof=1):.2f}" if len(found) > 1 else "-"
            rows.append([arm, decision, f"{found.mean():.2f}", spread])
            pair = [np.stack([totals(arms[name][seed], how) for seed in seeds]) for name, how in
                    ((CONTROL, "argmax"), (arm, decision))]  # fmt: skip
            tests.append(
                (compare_totals(*pair) if seeds and (arm, decision) != (CONTROL, "argmax") else None, len(seeds))
            )
    corrected = iter(holm([test.p_value for test, _ in tests if test]))
    for row, (test, n) in zip(rows, tests, strict=True):
        text = ["", "", ""]
        if test:
            text = [
                f"{100 * test.difference:+.2f} [{100 * test.low:+.2f}, {100 * test.high:+.2f}]",
                f"{test.p_value:.3f}",
            ]
            text.append(f"{next(corrected):.3f}")
        row += [*text, str(n)]
    seconds = sum(run["seconds"] for runs in arms.values() for run in runs.values())
    head = [
        "arm",
        "decision",
        "mean IoU, %",
        "spread",
        "difference to cross_entropy + argmax [95 %]",
        "p",
        "p, Holm",
        "n",
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + (
        f"\n\n{sum(map(len, arms.values()))} runs, {seconds / 3600:.2f} hours in all, {MACHINE}; "
        + ", ".join(f"{name} {version}" for name, version in next(iter(arms[CONTROL].values()))["versions"].items())
        + ".\n"
    )


MACHINE = "one of two cores of an AMD EPYC, no GPU"


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z, share = 1.96, hits / n
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def signs(arms: dict[str, dict[int, Any]]) -> str:
    """The registered prediction, class by class: change of IoU against the same loss without margins."""
    base, without = ratios(arms[CONTROL]), arms.get("mc_no_margin")
    lean = (base["recall"] - base["precision"]).mean(0)
    classes = next(iter(arms[CONTROL].values()))["classes"]
    tested = {
        name: sign for name, sign in (("mc_mean1", 1), ("mc_tau10", 1), ("mc_mirror1", -1)) if name in arms and without
    }
    change = {name: np.nanmean(ratios(arms[name])["iou"], 0) - np.nanmean(ratios(without)["iou"], 0) for name in tested}
    head = ["class", "recall - precision", *(f"{name}, change of IoU" for name in tested)]
    lines = [head, ["---"] * len(head)]
    hits = {name: sign * np.sign(change[name]) == np.sign(lean) for name, sign in tested.items()}
    for k, name in enumerate(classes):
        marks = [f"{100 * change[arm][k]:+.2f} {'hit' if hits[arm][k] else 'miss'}" for arm in tested]
        lines.append([name, f"{100 * lean[k]:+.2f}", *marks])
    sums = [f"{hit.sum()} of {len(hit)}: {hit.mean():.2f} [{wilson(int(hit.sum()), len(hit))[0]:.2f}, "
            f"{wilson(int(hit.sum()), len(hit))[1]:.2f}]" for hit in hits.values()]  # fmt: skip
    lines.append(["hits", "", *sums])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def figures(folder: Path, arms: dict[str, dict[int, Any]], curves: dict[str, dict[int, Any]]) -> None:
    """study.svg: mean IoU by arm and decision; curves.svg: loss and mean IoU of COPLE-Net."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "segkit"
    from matplotlib import pyplot as plt

    if arms:
        figure, axis = plt.subplots(figsize=(8, 0.4 * len(arms) + 1.2))
        for shift, decision in zip((-0.25, 0, 0.25), DECISIONS, strict=True):
            points = [(100 * np.nanmean(iou), y + shift) for y, runs in enumerate(arms.values())
                      for iou in ratios(runs, decision)["iou"]]  # fmt: skip
            axis.plot(*zip(*points, strict=True), "o", markersize=4, label=decision)
        axis.set(yticks=range(len(arms)), yticklabels=list(arms), xlabel="mean IoU on val, %; a point a seed")
        axis.invert_yaxis()
        axis.legend()
        figure.tight_layout()
        figure.savefig(folder / "study.svg", metadata={"Date": None})
    if curves:
        figure, axes = plt.subplots(1, 2, figsize=(10, 4))
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


if __name__ == "__main__":
    main()
