"""``segkit evaluate``: score a trained run again, on any split and with any inference."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segkit.commands.options import (
    INFERENCE,
    add_shared,
    check_writable,
    dataset_of,
    inference,
    limit_pixels,
    verb_parser,
)

PROTOCOLS = ("standard", "cityscapes", "ade20k", "bdd100k")
BOUNDARY_RATIO = 0.02
"""Width of the band of ``--boundary``, as a share of the image's diagonal."""


def parser() -> ArgumentParser:
    """Return the parser of the verb's arguments."""
    verb = verb_parser(
        "evaluate",
        "Evaluate a trained run. Writes results.json beside the checkpoint, and into RUN/evaluations.",
        example="outputs/cityscapes/RUN --tta flip,ms --slide 800x800",
    )
    add_shared(verb, "run", "--phase", "--checkpoint")
    verb.add_argument("--split", help="split to score (default: dataset.val_split of the run)")
    verb.add_argument("--max-images", type=int, metavar="N", help="score only the first N images (default: all)")
    verb.add_argument("--protocol", default="standard", choices=PROTOCOLS, help="figures of a benchmark to add")
    verb.add_argument("--boundary", action="store_true", help="also boundary IoU and F-score, and trimap IoU")
    verb.add_argument("--calibrate", action="store_true", help="tune a bias per class on training images; keep it")
    verb.add_argument("--output", type=Path, metavar="FILE", help="write the results to FILE as well")
    add_shared(
        verb,
        "--calibrated",
        "--root",
        "--batch-size",
        "--workers",
        "--precision",
        "--device",
        "--max-pixels",
        *INFERENCE,
    )
    return verb


def run(argv: Sequence[str]) -> None:
    """Evaluate, print the table, write the results."""
    arguments = parser().parse_args(argv)
    limit_pixels(arguments)
    check_writable(arguments, "output")
    from segkit.commands import decision
    from segkit.files import write_atomically, write_json
    from segkit.report.tables import class_table
    from segkit.run.saved import open_run
    from segkit.run.splits import open_split
    from segkit.runtime import resolve_device

    saved = open_run(arguments.run, phase=arguments.phase)
    checkpoint = saved.checkpoint(arguments.checkpoint)
    dataset = dataset_of(saved, arguments)
    split = open_split(dataset, arguments.split or dataset.val_split)
    device = resolve_device(arguments.device)
    model = saved.model(arguments.checkpoint).to(device)
    if arguments.calibrate:
        decision.tune(saved, model, dataset, device=device, workers=arguments.workers)
    if arguments.calibrate or arguments.calibrated:
        model = decision.with_bias(saved, model)
    results, per_image = evaluate_split(arguments, saved, dataset, split, model, device)
    results |= {"phase": saved.phase_name, "checkpoint": arguments.checkpoint}
    print(class_table(results))
    for name in ("benchmark", "boundary"):
        for key, value in results.get(name, {}).items():
            if isinstance(value, float) and key != "boundary_ratio":
                print(f"{name} {key}: {100 * value:.2f} %")
    folder = saved.folder / "evaluations"
    folder.mkdir(exist_ok=True)
    name = evaluation_name(arguments, split.split)
    write_atomically(folder / f"{name}.npz", per_image.to_bytes())
    for path in (folder / f"{name}.json", checkpoint.parent / "results.json", arguments.output):
        if path is not None:
            write_json(path, results)
            print(f"written: {path}")


def evaluation_name(arguments: Namespace, split: str) -> str:
    """Return a file name that tells evaluations of one run apart."""
    parts = [split, arguments.checkpoint]
    parts += [mode for mode in arguments.tta.split(",") if mode]
    parts += ["slide"] * bool(arguments.slide) + ["calibrated"] * (arguments.calibrate or arguments.calibrated)
    return "-".join(parts)


def evaluate_split(
    arguments: Namespace, saved: Any, dataset: Any, split: Any, model: Any, device: Any
) -> tuple[dict[str, Any], Any]:
    """Return the results in the form of results.json, and the sparse matrices of the images."""
    from segkit.config.schema import plain
    from segkit.data.loader import eval_batches
    from segkit.data.transforms import EvalTransform
    from segkit.evaluation import benchmark_scores, evaluate, to_results
    from segkit.progress import track
    from segkit.run.build import evaluation_protocol

    predict = inference(arguments, dataset.crop)
    precision = arguments.precision or saved.config.precision.value
    if arguments.max_images:
        split = split[: arguments.max_images]
    transform = EvalTransform(resize=plain(dataset.eval_resize), labels=dataset.eval_labels.value)
    evaluation = evaluate(
        model,
        eval_batches(split, transform=transform, batch_size=arguments.batch_size, workers=arguments.workers),
        num_classes=split.num_classes,
        ignore_index=split.ignore_index,
        device=device,
        precision=precision,
        predict=predict,
        boundary_ratio=BOUNDARY_RATIO if arguments.boundary else None,
        progress=lambda items: track(items, description="evaluating", unit="batches"),
    )
    protocol = evaluation_protocol(
        dataset, predict, split=split.split, max_images=arguments.max_images, precision=precision
    )
    if arguments.protocol != "standard":
        protocol["benchmark"] = arguments.protocol
    if arguments.calibrate or arguments.calibrated:
        protocol["calibrated"] = True
    results = to_results(evaluation, class_names=split.classes, protocol=protocol)
    if arguments.protocol != "standard":
        results["benchmark"] = benchmark_scores(arguments.protocol, evaluation.counts, split.classes)
    return results, evaluation.per_image
