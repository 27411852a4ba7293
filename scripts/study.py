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
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from study_report import load_all, report

import segkit
from segkit.config.compose import compose, quoted
from segkit.data import SampleSet
from segkit.data.loader import Batch, eval_batches
from segkit.errors import InputError, first_line
from segkit.evaluation import evaluate
from segkit.evaluation.decision import BiasedModel, collect_logits, tune_bias
from segkit.evaluation.inference import Inference
from segkit.evaluation.loop import evaluating
from segkit.evaluation.miou_rule import ScaledModel, fit_miou_rule
from segkit.files import without_nan, write_atomically
from segkit.guard import guarded
from segkit.run.build import eval_transform
from segkit.run.saved import open_run
from segkit.run.splits import open_split
from segkit.runtime import provenance

STUDY = Path(__file__).resolve().parent.parent / "docs" / "study"
RULE = ("factor", "offset", "iou", "union")


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
    study = read_study(arguments.study / "study.yaml")
    load_all(arguments.study, study)
    if not arguments.table:
        jobs = jobs_of(arguments, study)
        for overrides, _ in jobs:
            compose(overrides)  # no arm is refused after another was trained
        for overrides, path in jobs:
            job(arguments.part, overrides, study, arguments.work / path.stem, path)
    report(arguments.study, study)


def read_study(path: Path) -> dict[str, Any]:
    """The study in the YAML file ``path``; InputError if it is none."""
    try:
        study = yaml.safe_load(path.read_text(encoding="utf-8"))
        parts = study["arms"], study["curves"]
        lists = [texts for part in parts for texts in (part["base"], *part["each"].values())]
        numbers = [study["block"], study["fit"]["images"], study["fit"]["pixels"], *study["seeds"]]
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as a study ({first_line(error)}): mend it, or give --study") from None
    if not all(type(number) is int and number >= 0 for number in numbers) or not study["seeds"]:
        raise InputError(f"{path} has a number among seeds, block and fit that is no whole one from 0: mend it")
    if not all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in lists):
        raise InputError(f"{path} has a base, or an arm below each, that is no list of overrides: write [loss=focal]")
    return study


def jobs_of(arguments: argparse.Namespace, study: dict[str, Any]) -> list[tuple[list[str], Path]]:
    """The overrides and the result of every job that is left; InputError for a seed that the study does not have."""
    part, seeds = study[arguments.part], study["seeds"] if arguments.part == "arms" else study["seeds"][:1]
    if arguments.root is None:
        raise InputError("there is no --root: give the folder CamVid, or --table to train nothing")
    if unknown := set(arguments.seeds or ()) - set(seeds):
        raise InputError(
            f"--seeds has {min(unknown)}, but the seeds of {arguments.part} are {seeds}: give some of them"
        )
    found = []
    for (arm, own), seed in itertools.product(part["each"].items(), arguments.seeds or seeds):
        path = arguments.study / "results" / f"{arguments.part}-{arm}-{seed}.json"
        fixed = [f"dataset.root={quoted(arguments.root)}", f"cache_dir={quoted(arguments.work / 'cache')}"]
        if not path.exists():
            found.append(([*part["base"], *own, f"seed={seed}", *fixed], path))
    return found


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
        with evaluating(model, torch.device("cpu"), None):
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
    return list(eval_batches(split, transform=eval_transform(dataset), batch_size=8, workers=0)), split


def decide(folder: Path, first: Path, study: dict[str, Any]) -> dict[str, Any]:
    """Fit bias and rule on training images, and count the validation images by every decision, in blocks of frames.

    ``first``: a run of the study, whose images are those of all.
    """
    model = open_run(folder).model()
    fitted, _ = images(first, study["fit"]["images"])
    val, split = images(first, None)
    facts: dict[str, Any] = {"num_classes": split.num_classes, "ignore_index": split.ignore_index}
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


if __name__ == "__main__":
    guarded(main)
