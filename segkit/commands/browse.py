"""``segkit browse``: training crops as the trainer sees them, on one offline page."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segkit.commands.options import add_shared, check_writable, configuration, count, verb_parser
from segkit.errors import InputError
from segkit.progress import show


def parser() -> ArgumentParser:
    """Return the parser of the verb's arguments."""
    verb = verb_parser(
        "browse",
        "Show training crops, clean and augmented, with their labels and class shares, on one page without a network.",
        example="dataset=folder dataset.root=/data/mine augment=strong --output browse.html",
    )
    add_shared(verb, "overrides", "--config-dir")
    verb.add_argument("--output", type=Path, required=True, metavar="FILE", help="the page to write")
    verb.add_argument("--n", type=count(1, most=1000), default=24, metavar="N", help="samples to show")
    verb.add_argument("--rare-first", action="store_true", help="look at all labels, and show the rarest classes first")
    return verb


def run(argv: Sequence[str]) -> None:
    """Write the page."""
    arguments = parser().parse_intermixed_args(argv)
    check_writable(arguments, "output")
    from segkit.files import write_atomically
    from segkit.report.page import render
    from segkit.run.splits import open_split

    config = configuration(arguments, "output")
    phase = list(config.schedule)[-1]
    dataset = config.phase_dataset(phase)
    split = open_split(dataset, dataset.train_split)
    draws = in_order(config, phase, split, rarest(split, arguments.n, config) if arguments.rare_first else arguments.n)
    text = render(
        "browse.html.j2", title=f"{split.name} {split.split}", samples=samples(config, phase, split, draws),
        key=list(zip(split.classes, split.palette.tolist(), strict=True)), total=len(split), notes=split.notes,
        facts={"crop": dataset.crop, "scale": dataset.scale, "flip": dataset.flip, "jitter": dataset.color_jitter,
               "augment": ", ".join(name for name, node in config.augment.items() if node) or "none beyond"},
    )  # fmt: skip
    write_atomically(arguments.output, text)
    show(f"written: {arguments.output} ({len(draws)} of {len(split)} samples)")


def in_order(config: Any, phase: str, split: Any, wanted: int | list[int]) -> list[Any]:
    """Return the draws that the phase begins with, as many as ``wanted``; or of epoch 0 those of a list of samples.

    A sampler may not draw all of these; the others come at the end, as it would crop them anywhere.
    """
    from segkit.config.schema import cache_dir_of
    from segkit.data.loader import Draw, draws_of
    from segkit.run.build import build_sampler

    sampler = build_sampler(config, phase, split, cache_dir=cache_dir_of(config))
    draws = draws_of(0, split, sampler, batch_size=len(split), seed=config.seed, phase=phase)
    if isinstance(wanted, int):
        return draws[:wanted]
    first = {draw.sample: draw for draw in reversed(draws)}
    return [first.get(index) or Draw(index, -1, ("augment", config.seed, phase, 0, index)) for index in wanted]


def rarest(split: Any, num: int, config: Any) -> list[int]:
    """Return samples with the most pixels of each class, the rarest class first, in turn."""
    import numpy as np

    from segkit.data.statistics import label_histogram
    from segkit.data.workers import map_samples

    counts = np.stack(list(map_samples(label_histogram, split, range(len(split)), workers=config.workers)))
    counts = counts[:, : split.num_classes]
    if not counts.any():
        raise InputError(
            f"no pixel of split {split.split} is of a class, so that none is rare: mend the label table or the labels, "
            "which you see without --rare-first"
        )
    present = [k for k in np.argsort(counts.sum(0), kind="stable") if counts[:, k].any()]
    best = {k: [i for i in np.argsort(-counts[:, k], kind="stable").tolist() if counts[i, k]] for k in present}
    places = range(max(map(len, best.values()), default=0))
    return list(dict.fromkeys(best[k][place] for place in places for k in present if place < len(best[k])))[:num]


def samples(config: Any, phase: str, split: Any, draws: Sequence[Any]) -> list[dict[str, Any]]:
    """Return name, pictures [(address, caption), ...] and class shares of every sample, clean and as in epoch 0."""
    from segkit.data.loader import crop_of
    from segkit.evaluation.overlay import visible
    from segkit.report.pictures import overlay, panel
    from segkit.run.build import train_transform

    found = []
    kinds = {kind: train_transform(config, phase, augment=kind == "augmented") for kind in ("clean", "augmented")}
    for draw in draws:
        pictures = []
        for kind, transform in kinds.items():
            image, label = crop_of(split, transform, draw)
            image = visible(image)
            pictures += [(panel(image), kind), (panel(overlay(image, label, split.palette)), f"{kind}, label")]
        parts = {name: float((label == k).mean()) for k, name in enumerate(split.classes)}
        shares = sorted(((share, name) for name, share in parts.items() if share), reverse=True)
        void = float((label == split.ignore_index).mean())
        sample = split.samples[draw.sample]
        files = [str(path) for path in (sample.image, *sample.labels)]
        found.append({"name": sample.name, "files": files, "pictures": pictures, "shares": shares, "void": void})
    return found
