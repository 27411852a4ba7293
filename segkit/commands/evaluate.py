"""``segkit evaluate``: score a trained run again, on any split and with any inference."""

from __future__ import annotations

import hashlib
import json
import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from segkit.commands.options import (
    INFERENCE,
    add_shared,
    check_spares,
    check_writable,
    count,
    inference,
    open_scored,
    verb_parser,
)
from segkit.errors import InputError
from segkit.evaluation.protocols import PROTOCOLS
from segkit.progress import show

BOUNDARY_RATIO = 0.02
"""Width of the band of ``--boundary``, as a share of the image's diagonal."""


def parser() -> ArgumentParser:
    """Return the parser of the verb's arguments."""
    verb = verb_parser(
        "evaluate",
        "Evaluate a trained run. Writes RUN/evaluations/NAME.json, with a name for every way of evaluating.",
        example="outputs/cityscapes/RUN --tta flip,ms --slide 800x800 --decision miou",
    )
    add_shared(verb, "run", "--phase", "--checkpoint", "--trust")
    verb.add_argument(
        "--split", help="split to score, or holdout for the images of dataset.holdout (default: dataset.val_split)"
    )
    verb.add_argument("--max-images", type=count(1), metavar="N", help="score only the first N images (default: all)")
    verb.add_argument("--protocol", default="standard", choices=list(PROTOCOLS), help="figures of a benchmark to add")
    verb.add_argument("--boundary", action="store_true", help="also boundary IoU and F-score, and trimap IoU")
    verb.add_argument("--refit", action="store_true", help="fit --decision bias or miou again, though one is stored")
    verb.add_argument("--output", type=Path, metavar="FILE", help="write the results to FILE as well")
    shared = ("--decision", "--root", "--batch-size", "--workers", "--precision", "--device", "--max-pixels")
    add_shared(verb, *shared, *INFERENCE)
    return verb


def run(argv: Sequence[str]) -> None:
    """Evaluate, print the table, write the results."""
    from segkit.report.tables import class_table

    results, written = score(parser().parse_args(argv))
    print(class_table(results))
    for name in ("benchmark", "boundary"):
        for key, value in results.get(name, {}).items():
            if isinstance(value, float) and key != "boundary_ratio":
                show(f"{name} {key}: {100 * value:.2f} %")
    for path in written:
        show(f"written: {path}")


def score(arguments: Namespace) -> tuple[dict[str, Any], list[Path]]:
    """Evaluate and write the results; returns them, in the form of results.json, and the files."""
    check_writable(arguments, "output")
    if arguments.refit and arguments.decision == "argmax":
        raise InputError("--refit is given without a decision to fit: add --decision miou or --decision bias")
    import numpy as np

    from segkit.commands import decision
    from segkit.evaluation import benchmark_scores
    from segkit.files import write_atomically, write_json
    from segkit.run.changes import trained_on
    from segkit.runtime import resolve_device

    saved, dataset, split = open_scored(arguments.run, arguments, phase=arguments.phase, split=arguments.split)
    check_spares(arguments, [dataset.root], "output")
    inference(arguments, dataset.crop)
    benchmark_scores(arguments.protocol, np.zeros((split.num_classes, split.num_classes), np.int64), split.classes)
    split.check_labelled()
    folder = folder_of(saved)
    to_fit_on = check_decision(arguments, saved, dataset, split)
    if split.split != dataset.train_split and (seen := trained_on(saved.path, split)):
        show(
            f"warning: {len(seen)} of the {len(split)} images, {seen[0]} for one, were trained on, as the splits "
            "overlap or were others then: their scores are too good",
            error=True,
        )
    device = resolve_device(arguments.device)
    model = saved.model(arguments.checkpoint).to(device)
    if to_fit_on:
        decision.fit(saved, model, dataset, *to_fit_on, checkpoint=arguments.checkpoint, workers=arguments.workers)
    chosen = decision.decision_of(saved, arguments.decision, checkpoint=arguments.checkpoint, digest=model.digest)
    results, evaluation = evaluate_split(arguments, saved, dataset, split, model, chosen)
    results |= {"phase": saved.phase_name, "checkpoint": arguments.checkpoint, "digest": model.digest}
    folder.mkdir(exist_ok=True)
    name = evaluation_name(arguments, results["protocol"], other_root(saved, arguments.root))
    write_atomically(folder / f"{name}.npz", evaluation.per_image.to_bytes())
    written = [folder / f"{name}.json", *([arguments.output] if arguments.output else [])]
    for path in written:
        write_json(path, results)
    return results, written


def folder_of(saved: Any) -> Path:
    """Return the folder of the evaluations of a run; InputError if it cannot be written."""
    folder = saved.folder / "evaluations"
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder} is in the way of the evaluations, which lie in a folder of that name: remove it")
    if not os.access(folder if folder.exists() else saved.folder, os.W_OK):
        raise InputError(f"evaluations are kept in {folder}, which cannot be written: copy the run, and evaluate that")
    return folder


def check_decision(arguments: Namespace, saved: Any, dataset: Any, split: Any) -> tuple[Any, dict[str, Any]] | None:
    """Return what ``--decision`` is to be fitted on, if none is stored or ``--refit`` is given; None otherwise.

    InputError, before the model is read, for one whose images are in ``split``, or that is stored and damaged.
    """
    from segkit.commands import decision

    if arguments.decision == "argmax":
        return None
    if not arguments.refit and (saved.folder / decision.FILE).exists():
        stored = decision.decision_of(saved, arguments.decision, checkpoint=arguments.checkpoint)
        decision.check_unseen(stored.fitted_on, split, dataset)
        return None
    found = decision.to_fit_on(saved, dataset)
    decision.check_unseen(found[1], split, dataset)
    return found


def other_root(saved: Any, root: str | None) -> Path | None:
    """Return the folder ``root`` of ``--root`` if the data of the run are in another one, which is there."""
    own = saved.config.phase_dataset(saved.phase_name).root
    # os.path.exists: Path.exists raises for a folder that one may not look into
    if root is None or own is None or not os.path.exists(own) or os.path.samefile(own, root):
        return None  # the run's data, perhaps moved
    return Path(root).resolve()


def evaluation_name(arguments: Namespace, protocol: dict[str, Any], root: Path | None = None) -> str:
    """Return a file name: what one would ask for in words, and a hash of the checkpoint and the whole protocol.

    ``root`` is in both: that of other data than the run's.
    """
    parts = [protocol["split"].replace("/", "_"), arguments.checkpoint]
    parts += [re.sub(r"[^\w.]+", "_", root.name, flags=re.ASCII)[:40]] if root else []
    parts += [mode for mode in arguments.tta.split(",") if mode]
    if protocol["window"]:
        parts.append("slide{}x{}".format(*protocol["window"]))
    parts += [arguments.decision] * (arguments.decision != "argmax")
    parts += [arguments.protocol] * (arguments.protocol != "standard")
    parts += ["boundary"] * arguments.boundary
    if arguments.max_images:
        parts.append(f"first{arguments.max_images}")
    asked = [protocol, arguments.checkpoint, arguments.boundary] + ([str(root)] if root else [])
    whole = json.dumps(asked, sort_keys=True)
    return "-".join([*parts, hashlib.blake2b(whole.encode(), digest_size=4).hexdigest()])


def evaluate_split(
    arguments: Namespace, saved: Any, dataset: Any, split: Any, model: Any, decision: Any, pictures: Sequence[int] = ()
) -> tuple[dict[str, Any], Any]:
    """Return the results in the form of results.json, and the evaluation, which keeps ``pictures``."""
    from segkit.data.loader import eval_batches
    from segkit.evaluation import benchmark_scores, evaluate, to_results
    from segkit.progress import track
    from segkit.run.build import eval_transform, evaluation_protocol
    from segkit.training.precision import DTYPES

    predict = replace(inference(arguments, dataset.crop), decide=decision.decide)
    precision = arguments.precision or saved.config.precision.value
    if arguments.max_images:
        split = split[: arguments.max_images]
    options = {"batch_size": arguments.batch_size, "workers": arguments.workers}
    evaluation = evaluate(
        decision.around(model),
        eval_batches(split, transform=eval_transform(dataset), **options),
        num_classes=split.num_classes,
        ignore_index=split.ignore_index,
        device=next(model.parameters()).device,
        dtype=DTYPES[precision],
        predict=predict,
        pictures=pictures,
        boundary_ratio=BOUNDARY_RATIO if arguments.boundary else None,
        progress=lambda items: track(items, description="evaluating", unit="batches"),
    )
    protocol = evaluation_protocol(
        dataset, predict, split=split.split, max_images=arguments.max_images, precision=precision
    )
    protocol |= decision.protocol()
    if arguments.protocol != "standard":
        protocol["benchmark"] = arguments.protocol
    results = to_results(evaluation, class_names=split.classes, protocol=protocol)
    if arguments.protocol != "standard":
        results["benchmark"] = benchmark_scores(arguments.protocol, evaluation.counts, split.classes)
    return results, evaluation
