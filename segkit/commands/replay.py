"""``segkit replay``: repeat the step of a failure bundle and look at it from the inside."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segkit.commands.options import add_shared, verb_parser
from segkit.errors import InputError
from segkit.progress import show

CURE = "the bundle is damaged; copy it again"


def parser() -> ArgumentParser:
    """Return the parser of the verb's arguments."""
    verb = verb_parser(
        "replay",
        "Repeat the forward and backward pass of a failed step from the bundle that training left.",
        example="outputs/synthetic/RUN/train/failure-0000120",
    )
    verb.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder failure-STEP of a run")
    verb.add_argument("--json", action="store_true", help="print the findings as JSON")
    add_shared(verb, "--device", "--trust")
    return verb


def run(argv: Sequence[str]) -> None:
    """Repeat the step and print what was found."""
    arguments = parser().parse_args(argv)
    from segkit.files import read_json, without_nan

    bundle = arguments.bundle
    if not (bundle / "error.json").is_file():
        raise InputError(f"{bundle} is no failure bundle, it has no error.json: name a folder failure-STEP of a run")
    needed = ["config.json", "label_counts.json", *["batch.pt", "state.pt"] * os.path.lexists(bundle / "batch.pt")]
    if missing := [name for name in needed if not (bundle / name).is_file()]:
        raise InputError(f"{bundle} has no {missing[0]}: {CURE}")
    failed = read_json(bundle / "error.json", cure=CURE)
    kinds = {"phase": str, "step": int, "rank": int, "error": str, "names": list}
    wrong = [key for key, kind in kinds.items() if not isinstance(failed.get(key), kind)]
    if wrong or failed["step"] < 0 or not all(isinstance(name, str) for name in failed["names"]):
        raise InputError(f"{bundle / 'error.json'} has no {(wrong or ['step or names'])[0]} of a failed step: {CURE}")
    if not arguments.json:
        show(f"phase {failed['phase']}, step {failed['step'] + 1}, rank {failed['rank']}: {failed['error']}")
        show(f"samples: {', '.join(failed['names']) or 'not known'}")
    findings = repeat(bundle, failed, device=arguments.device)
    if arguments.json:
        print(json.dumps(without_nan(findings), indent=2))
        return
    for line in lines(findings):
        show(line)


def repeat(bundle: Path, failed: dict[str, Any], *, device: str) -> dict[str, Any]:
    """Return the findings of :func:`segkit.training.failure.examine` on the step of ``bundle``.

    A batch that could not be read in training is read now, from the data that the configuration names; InputError if
    they have changed, so that it is another one.
    """
    from segkit import memory, runtime
    from segkit.data.statistics import LabelCounts
    from segkit.run.build import build_loss, build_model
    from segkit.run.saved import model_with, read_config, read_counts, without_sources
    from segkit.training import checkpoint, failure
    from segkit.training.precision import Mixed
    from segkit.training.step import restore_followers

    config = read_config(bundle / "config.json", cure=CURE)
    if failed["phase"] not in config.schedule:
        raise InputError(f"{bundle / 'error.json'} names phase {failed['phase']!r}, which config.json lacks: {CURE}")
    batch = stored_batch(bundle, config.images) if (bundle / "batch.pt").is_file() else read_again(config, failed)
    kept = read_counts(bundle / failure.COUNTS, cure=CURE)
    counts = LabelCounts.from_dict(kept | {"ignored_pixels": 0, "num_images": 1, "fingerprint": ""})
    runtime.set_determinism(strict=config.determinism.value == "strict")
    chosen = runtime.resolve_device(device)
    source, num_classes = bundle / "state.pt", len(counts.classes)
    loss = build_loss(config, failed["phase"], counts)
    if source.exists():
        state = checkpoint.load(source)
        model = model_with(state["model"], config, num_classes, source=source)
        try:
            restore_followers(loss, state["loss"])
        except (LookupError, TypeError, RuntimeError):
            raise InputError(f"{source} lacks what the loss had followed: {CURE}") from None
    else:
        show("note: no batch could be read, so no weights were kept: those of a new model are used", error=True)
        with memory.bounded():
            model = build_model(without_sources(config), num_classes)
    model, loss = model.to(chosen), loss.to(chosen)
    where = failure.Where(phase=failed["phase"], step=failed["step"], rank=failed["rank"])
    mixed = Mixed(config.precision.value, chosen)
    return failure.examine(model, loss, batch, mixed=mixed, seed=where.seed(config.seed))


def stored_batch(bundle: Path, kind: Any) -> Any:
    """Return the batch that was saved with the bundle; InputError if the file holds none of the ``kind`` of images."""
    import torch

    from segkit.data.loader import Batch
    from segkit.training.checkpoint import read_archive

    path = bundle / "batch.pt"
    content = read_archive(path)
    try:
        batch = Batch(**content)
        images, labels = batch.images, batch.labels
        good = images.dtype == getattr(torch, kind.dtype.value) and labels.dtype == torch.uint8 and images.dim() == 4
        shape = len(labels), kind.in_channels, *labels.shape[1:]
        good = good and labels.dim() == 3 and images.shape == shape and labels.numel() > 0
        for item in (images, labels):  # a few bytes can stand for terabytes, or for no values at all
            dense = item.layout == torch.strided and item.is_cpu
            good = good and dense and item.untyped_storage().nbytes() >= item.numel() * item.element_size()
    except (TypeError, AttributeError):
        good = False
    if not good:
        wanted = f"(N, {kind.in_channels}, H, W) of {kind.dtype.value}"
        raise InputError(f"{path} holds no images {wanted} and labels (N, H, W) of 8 bits: {CURE}")
    return batch


def read_again(config: Any, failed: dict[str, Any]) -> Any:
    """Read the batch of the failed step from the data set; raises what the reader raises."""
    from segkit.data.loader import train_batches
    from segkit.run.build import build_sampler, train_transform
    from segkit.run.splits import open_split

    dataset = config.phase_dataset(failed["phase"])
    split = open_split(dataset, dataset.train_split)
    batches = train_batches(
        split,
        transform=train_transform(config, failed["phase"], augment=True),
        batch_size=config.batch_size,
        seed=config.seed,
        phase=failed["phase"],
        start_step=failed["step"],
        num_steps=failed["step"] + 1,
        sampler=build_sampler(config, failed["phase"], split, cache_dir=None),  # the bundle may be a stranger's
    )
    batch = next(iter(batches))
    if failed["names"] and batch.names != failed["names"]:
        raise InputError(
            f"the data have changed: the samples of this step are {', '.join(batch.names)} now, but were "
            f"{', '.join(failed['names'])}: restore the files, or train again"
        )
    return batch


def lines(findings: dict[str, Any]) -> list[str]:
    """Return the findings as lines of text."""
    logits = findings["logits"]
    terms = ", ".join(f"{name} {value:.6g}" for name, value in findings["terms"].items())
    norms = sorted(findings["gradient_norms"].items(), key=lambda item: -item[1])
    return [
        f"loss {findings['loss']:.6g} ({terms})",
        f"logits from {logits['least']} to {logits['greatest']}, {logits['not_finite']} not finite",
        f"first module with a non-finite output: {findings['first_non_finite_module'] or 'none'}",
        f"first parameter with a non-finite gradient: {findings['first_non_finite_gradient'] or 'none'}",
        f"gradient norm {findings['gradient_norm']:.6g}: "
        + ", ".join(f"{name} {norm:.4g}" for name, norm in norms[:12]),
    ]
