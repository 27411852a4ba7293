"""Time (forward + backward) and peak memory of every loss, beside torch's cross-entropy in the same run.

    python scripts/bench_losses.py [--md] [--repeats 7] [--threads 2] [--reference FILE] [--only margin lovasz]

Three cases (N,K,H,W): logits at label size, with 19 and with 150 classes, and logits at a quarter of the label size
that every row up-samples by 4: segkit block by block for losses that are sums over pixels, torch all at once.

Time: each loss takes turns with torch's cross-entropy, at least --repeats times and for --seconds; median of its wall
time, and the ratio of that to the median of the cross-entropies between.
Memory: each row in a process of its own, which makes the inputs, runs the loss once on a tiny input (so that the
libraries are loaded), and then once on the case: the growth of the process's resident high-water mark. This counts
everything that the allocator took from the system, the gradient of the logits included, and nothing that was there
before (Linux only). "margin calibration, autograd" and "Lovasz-softmax, textbook" are the forms that a paper suggests.

--reference FILE times another implementation beside these: a Python file with make(num_classes) that returns
loss(logits, target) -> scalar; void is 255.
--trained X adds X to the logit of the label of each pixel, as a trained model would: with noise alone, most losses
see only confident mistakes.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as every command of segkit does

import torch
import torch.nn.functional as F
from bench_checkpointing import status
from torch import Tensor

import segkit.losses as losses
from segkit.memory import keep_freed

Loss = Callable[[Tensor, Tensor], Tensor]
VOID = 255
CASES = {
    "4 x 19 x 256 x 256": (4, 19, 256, 256, 1),
    "2 x 150 x 256 x 256": (2, 150, 256, 256, 1),
    "2 x 150 x 128 x 128, x4": (2, 150, 128, 128, 4),
}
BASE = "torch cross-entropy"


def margin_autograd(logits: Tensor, target: Tensor, *, rho_k0: Tensor, rho_0k: Tensor) -> Tensor:
    """Margin calibration, paper form, as a few vectorised lines that autograd differentiates."""
    first, second = logits.topk(2, dim=1).values.split(1, dim=1)
    lam = torch.where(logits == first, first - second, logits - first)
    valid = target != VOID
    own = F.one_hot(torch.where(valid, target, 0), logits.shape[1]).movedim(-1, 1).bool()
    x = torch.where(own, rho_k0.to(lam).view(1, -1, 1, 1) - lam, lam + rho_0k.to(lam).view(1, -1, 1, 1))
    return (F.softplus(math.log(2) * x) / math.log(2)).sum(1)[valid].mean()


def lovasz_textbook(logits: Tensor, target: Tensor) -> Tensor:
    """Lovasz-softmax as published: one sort of all pixels for every class that occurs."""
    valid = target != VOID
    p, label = logits.softmax(1).movedim(1, -1)[valid], target[valid]
    found = []
    for k in range(p.shape[1]):
        inside = (label == k).to(p.dtype)
        if inside.sum() == 0:
            continue
        errors, order = torch.sort((inside - p[:, k]).abs(), descending=True)
        inside = inside[order]
        jaccard = 1 - (inside.sum() - inside.cumsum(0)) / (inside.sum() + (1 - inside).cumsum(0))
        found.append(torch.dot(errors, torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])))
    return torch.stack(found).mean()


def upsampled_by_torch(loss: Loss) -> Loss:
    """``loss`` after up-sampling the logits to the size of the labels, all at once."""

    def call(logits: Tensor, target: Tensor) -> Tensor:
        if logits.shape[2:] != target.shape[1:]:
            logits = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
        return loss(logits, target)

    return call


def rows(num_classes: int, reference: str | None) -> dict[str, Loss]:
    """Every loss to be timed, by name."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(10**6, 10**8, (num_classes,), generator=generator)
    offsets = losses.margin_offsets(counts, scale="mean", mean_margin=0.5)
    margins: dict[str, Any] = {"rho_k0": offsets.rho_k0, "rho_0k": offsets.rho_0k}
    cross_entropy = functools.partial(F.cross_entropy, ignore_index=VOID)
    found: dict[str, Loss] = {
        BASE: upsampled_by_torch(cross_entropy),
        "margin calibration": losses.MarginCalibrationLoss(**margins),
        "margin calibration, compiled": losses.MarginCalibrationLoss(**margins, compile_tiles=True),
        "margin calibration, reference form": losses.MarginCalibrationLoss(**margins, form="reference"),
        "cross-entropy": losses.CrossEntropyLoss(),
        "focal": losses.FocalLoss(),
        "OHEM cross-entropy": losses.OhemCrossEntropyLoss(),
        "Lovasz-softmax": losses.LovaszSoftmaxLoss(),
        "Dice": losses.DiceLoss(),
        "generalised Dice": losses.GeneralizedDiceLoss(),
        "Tversky": losses.TverskyLoss(),
        "Jaccard metric loss": losses.JaccardMetricLoss(),
        "margin calibration, autograd": upsampled_by_torch(functools.partial(margin_autograd, **margins)),
        "Lovasz-softmax, textbook": upsampled_by_torch(lovasz_textbook),
    }
    if reference is not None:
        found[f"reference: {reference}"] = upsampled_by_torch(load_reference(reference)(num_classes))
    return found


def load_reference(path: str) -> Callable[[int], Loss]:
    """``make`` of the Python file ``path``."""
    spec = importlib.util.spec_from_file_location("reference_loss", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python file; --reference wants one with make(num_classes)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make


def example(case: str, trained: float, tiny: bool = False) -> tuple[Tensor, Tensor]:
    """Random logits, with gradient, and labels with 5 % void."""
    num, num_classes, height, width, factor = CASES[case]
    if tiny:
        num, height, width = 1, 4, 4
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, num_classes, (num, height * factor, width * factor), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.05] = VOID
    logits = torch.randn(num, num_classes, height, width, generator=generator)
    if trained:
        at_label = target[:, ::factor, ::factor]
        raise_by = torch.where(at_label == VOID, 0.0, trained)
        logits.scatter_add_(1, torch.where(at_label == VOID, 0, at_label)[:, None], raise_by[:, None])
    return logits.requires_grad_(), target


def step(loss: Loss, logits: Tensor, target: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    logits.grad = None
    if logits.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss(logits, target).backward()
    if logits.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_row(
    loss: Loss, base: Loss, logits: Tensor, target: Tensor, *, repeats: int, seconds: float
) -> tuple[float, float]:
    """Median milliseconds of ``loss`` and of ``base``, taken in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    for turn in itertools.count():
        if turn >= repeats + 2 and time.perf_counter() - start > seconds:
            break
        for way, found in zip((loss, base), times, strict=True):
            taken = step(way, logits, target)
            if turn >= 2:
                found.append(1e3 * taken)
    return statistics.median(times[0]), statistics.median(times[1])


def memory_worker(case: str, name: str, arguments: argparse.Namespace) -> None:
    """Print the growth in MB of the resident high-water mark over one step."""
    loss = rows(CASES[case][1], arguments.reference)[name]
    step(loss, *example(case, 0.0, tiny=True))
    logits, target = example(case, arguments.trained)
    target.clone()  # touches the pages
    before = status("VmRSS")
    step(loss, logits, target)
    print(json.dumps({"mb": max(0.0, (status("VmHWM") - before) / 1e6)}))


def memory_row(case: str, name: str, arguments: argparse.Namespace) -> float:
    """``memory_worker`` in a fresh process."""
    command = [sys.executable, __file__, "--worker", case, name, "--threads", str(arguments.threads)]
    command += ["--trained", str(arguments.trained)]
    if arguments.reference:
        command += ["--reference", arguments.reference]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the memory run of {name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["mb"]


def bench(case: str, arguments: argparse.Namespace) -> list[list[str]]:
    """The rows of one case: name, ms, ratio, MB, ratio."""
    logits, target = (item.detach().to(arguments.device) for item in example(case, arguments.trained))
    logits.requires_grad_()
    ways = rows(CASES[case][1], arguments.reference)
    for loss in ways.values():
        if isinstance(loss, torch.nn.Module):
            loss.to(arguments.device)
    table = []
    base_memory = memory_row(case, BASE, arguments) if arguments.memory else 0.0
    for name, loss in ways.items():
        if name != BASE and arguments.only and not any(word.lower() in name.lower() for word in arguments.only):
            continue
        print(f"{case}: {name}", file=sys.stderr, flush=True)
        own, base = time_row(loss, ways[BASE], logits, target, repeats=arguments.repeats, seconds=arguments.seconds)
        row = [name, f"{own:.1f}", f"{own / base:.2f}"]
        if arguments.memory:
            megabytes = base_memory if name == BASE else memory_row(case, name, arguments)
            row += [f"{megabytes:.0f}", f"{megabytes / base_memory:.2f}"]
        table.append(row)
    return table


def show(case: str, table: list[list[str]], arguments: argparse.Namespace) -> None:
    """Print one case, as Markdown or through rich."""
    title = f"{case}, {arguments.threads} threads" + ("" if arguments.device == "cpu" else f", {arguments.device}")
    header = ["loss", "ms", "x cross-entropy"] + (["peak extra MB", "x cross-entropy"] if arguments.memory else [])
    if arguments.md:
        print(f"\n**{title}**\n\n| {' | '.join(header)} |\n|---{'|---:' * (len(header) - 1)}|")
        for row in table:
            print(f"| {' | '.join(row)} |")
        return
    from rich.console import Console
    from rich.table import Table

    view = Table(title=title)
    for i, column in enumerate(header):
        view.add_column(column, justify="right" if i else "left")
    for row in table:
        view.add_row(*row)
    Console().print(view)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--md", action="store_true", help="Markdown instead of a drawn table")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="spent on a row and its cross-entropies, at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reference", metavar="FILE", help="Python file with make(num_classes) -> loss")
    parser.add_argument("--trained", type=float, default=0.0, metavar="X", help="added to the logit of the label")
    parser.add_argument("--only", nargs="*", metavar="WORD", help="rows whose name holds one of these words")
    parser.add_argument("--cases", nargs="*", type=int, default=[1, 2, 3], choices=[1, 2, 3])
    parser.add_argument("--device", default="cpu", help="on a GPU together with --no-memory")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.worker:
        case, name = arguments.worker
        memory_worker(case, name, arguments)
        return
    keep_freed()  # as every command of segkit does
    for number, case in enumerate(CASES, start=1):
        if number in arguments.cases:
            show(case, bench(case, arguments), arguments)


if __name__ == "__main__":
    main()
