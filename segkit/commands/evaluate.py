"""``segkit evaluate``: score a trained run again, on any split and with any inference."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segkit.commands.options import add_inference_arguments, inference

BOUNDARY_RATIO = 0.02
"""Width of the band of ``--boundary``, as a share of the image's diagonal."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="segkit evaluate",
        description="Evaluate a trained run. Writes results.json beside the checkpoint, and into RUN/evaluations.",
        epilog="example: segkit evaluate outputs/cityscapes/RUN --tta flip,ms --slide 800x800",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--phase", help="a phase of the run (default: the last)")
    parser.add_argument("--checkpoint", default="last", choices=["last", "best"])
    parser.add_argument("--split", help="default: dataset.val_split of the run")
    parser.add_argument("--root", help="folder of the data set, where it moved")
    parser.add_argument("--batch-size", type=int, default=1, help="images of equal size at once")
    parser.add_argument("--max-images", type=int, help="only the first N images")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: that of the run")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--protocol", default="standard", help="standard, cityscapes, ade20k or bdd100k")
    parser.add_argument("--boundary", action="store_true", help="also boundary IoU and F-score, and trimap IoU")
    parser.add_argument("--calibrate", action="store_true", help="tune a bias per class on training images; keep it")
    parser.add_argument("--calibrated", action="store_true", help="use the bias that --calibrate has tuned")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results to FILE as well")
    add_inference_arguments(parser)
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> None:
    """Evaluate, show the table, write the results."""
    from segkit.files import write_json
    from segkit.report.tables import class_table
    from segkit.run.saved import open_run
    from segkit.run.splits import open_split
    from segkit.runtime import resolve_device

    arguments = parse(argv)
    saved = open_run(arguments.run, phase=arguments.phase)
    checkpoint = saved.checkpoint(arguments.checkpoint)
    dataset = saved.config.phase_dataset(saved.phase_name)
    if arguments.root:
        dataset = dataclasses.replace(dataset, root=arguments.root)
    split = open_split(dataset, arguments.split or dataset.val_split)
    device = resolve_device(arguments.device)
    model = saved.model(arguments.checkpoint).to(device)
    if arguments.calibrate:
        from segkit.commands.calibration import tune

        tune(saved, model, dataset, device=device, workers=arguments.workers)
    if arguments.calibrate or arguments.calibrated:
        from segkit.commands.calibration import with_bias

        model = with_bias(saved, model)
    results, per_image = evaluate_split(arguments, saved, dataset, split, model, device)
    results |= {"phase": saved.phase_name, "checkpoint": arguments.checkpoint}
    print(class_table(results))
    for name in ("benchmark", "boundary"):
        for key, value in results.get(name, {}).items():
            if isinstance(value, float) and key != "boundary_ratio":
                print(f"{name} {key}: {100 * value:.2f} %")
    folder = saved.folder / "evaluations"
    folder.mkdir(exist_ok=True)
    label = evaluation_name(arguments, split.split)
    per_image.save(folder / f"{label}.npz")
    targets = [folder / f"{label}.json", checkpoint.parent / "results.json", arguments.output]
    for path in targets:
        if path is not None:
            write_json(path, results)
            print(f"written: {path}")


def evaluation_name(arguments: argparse.Namespace, split: str) -> str:
    """A file name that tells evaluations of one run apart."""
    parts = [split, arguments.checkpoint]
    parts += [mode for mode in arguments.tta.split(",") if mode]
    parts += ["slide"] * bool(arguments.slide) + ["calibrated"] * (arguments.calibrate or arguments.calibrated)
    return "-".join(parts)


def evaluate_split(
    arguments: argparse.Namespace, saved: Any, dataset: Any, split: Any, model: Any, device: Any
) -> tuple[dict[str, Any], Any]:
    """The results in the form of results.json, and the sparse matrices of the images."""
    from segkit.config.schema import plain
    from segkit.data.loader import eval_batches
    from segkit.data.transforms import EvalTransform
    from segkit.evaluation import evaluate, to_results
    from segkit.evaluation.protocols import benchmark_scores
    from segkit.progress import track
    from segkit.run.build import evaluation_protocol

    predict = inference(arguments, dataset.crop)
    precision = arguments.precision or saved.config.precision.value
    if arguments.max_images:
        split = split[: arguments.max_images]
    transform = EvalTransform(resize=plain(dataset.eval_resize), labels=dataset.eval_labels.value)
    batches = eval_batches(split, transform=transform, batch_size=arguments.batch_size, workers=arguments.workers)
    evaluation = evaluate(
        model,
        batches,
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
