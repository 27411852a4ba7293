"""The trainer's images a second against a bare loop over the same model, loss and tensors, in one run.

    python scripts/bench_trainer.py [--model deeplabv3plus_tiny] [--size 128 192] [--batch 8] [--steps 40] [--repeats 5]
    python scripts/bench_trainer.py --checkpoint 50    # what a checkpoint every 50 steps costs, for --model and --size
    python scripts/bench_trainer.py --diagnostics 10   # what loss.diagnostics=true with log_every=10 costs

Both loops run in turns, and the table shows medians over the turns and their ratio. The batches are in memory, so
what is measured is the trainer itself: learning rate, logging, metrics.jsonl, the look at the loss, progress.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from segkit.config.compose import compose
from segkit.data.loader import Batch
from segkit.losses import CrossEntropyLoss, MarginCalibrationLoss
from segkit.memory import keep_freed
from segkit.run import build
from segkit.run.charts import LossObserver
from segkit.training.optim import parameter_groups
from segkit.training.precision import Mixed
from segkit.training.step import split, train_step
from segkit.training.tracking import Tracker
from segkit.training.trainer import Settings, Trainer

NUM_CLASSES = 11


def make_batches(arguments: argparse.Namespace) -> list[Batch]:
    """Batches of noise with blocks of labels."""
    generator = torch.Generator().manual_seed(0)
    height, width = arguments.size
    batches = []
    for _ in range(4):
        shape = (arguments.batch, 3, height, width)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        coarse = torch.randint(0, NUM_CLASSES, (arguments.batch, 1, 8, 8), generator=generator).float()
        labels = F.interpolate(coarse, size=(height, width)).squeeze(1).to(torch.uint8)
        batches.append(Batch(images, labels, ["noise"] * arguments.batch, list(range(arguments.batch))))
    return batches


def bare_loop(model, loss, optimizer, batches, *, steps: int, mixed: Mixed) -> float:
    """Images a second of the least code that trains."""
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        batch = batches[step % len(batches)]
        images, target = batch.images.to(mixed.device), batch.labels.to(mixed.device).long()
        optimizer.zero_grad(set_to_none=True)
        with mixed.autocast():
            logits = model(images)
        loss(logits, target).backward()
        optimizer.step()
    if mixed.device.type == "cuda":
        torch.cuda.synchronize()
    return steps * len(batches[0].names) / (time.perf_counter() - start)


def trainer_loop(model, loss, optimizer, batches, *, steps: int, mixed: Mixed, log_every: int) -> float:
    """Images a second of the trainer, without its evaluation and its checkpoint at the end."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            model, loss, optimizer, Path(folder), num_steps=steps + 1, mixed=mixed, log_every=log_every
        )
        start = time.perf_counter()
        # one batch short of the last step: fit then returns without evaluating or saving
        trainer.fit(lambda first: (batches[step % len(batches)] for step in range(steps)))
        if mixed.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        trainer.tracker.close()
    return steps * len(batches[0].names) / seconds


def checkpoint_stall(model, loss, optimizer, batches, *, mixed: Mixed, interval: int, repeats: int) -> str:
    """Seconds of writing last.pt (hashed, flushed to the disk) beside those of ``interval`` steps of the bare loop."""
    speed = bare_loop(model, loss, optimizer, batches, steps=10, mixed=mixed)
    seconds = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # not /tmp, which may lie in memory
        trainer = make_trainer(model, loss, optimizer, Path(folder), num_steps=1, mixed=mixed, log_every=1)
        for _ in range(repeats + 1):
            start = time.perf_counter()
            trainer.save()
            seconds.append(time.perf_counter() - start)
        size = (Path(folder) / "checkpoints" / "last.pt").stat().st_size
    write = statistics.median(seconds[1:])
    training = interval * len(batches[0].names) / speed
    share = f"{interval} steps take {training:.1f} s: {write / training:.2%}"
    return f"checkpoint of {size / 2**20:.0f} MiB in {write:.3f} s; {share}"


def diagnostics_cost(model, batches, *, mixed: Mixed, every: int, steps: int) -> str:
    """Seconds of a step with the margin loss, with and without its diagnostics in turns."""
    margins = torch.full((NUM_CLASSES,), 0.1)
    plain, watched = (MarginCalibrationLoss(rho_k0=margins, rho_0k=margins).to(mixed.device) for _ in range(2))
    LossObserver(watched)  # a hook of the loss
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-4), lr=1e-4)
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for step in range(2 * steps + 4):
        name, loss = (("without", plain), ("with", watched))[step % 2]
        parts = split(batches[step // 2 % len(batches)], 1)  # the same batch for both
        start = time.perf_counter()
        train_step(model, loss, optimizer, parts, mixed=mixed, scaler=mixed.scaler()).read()
        seconds[name].append(time.perf_counter() - start)
    without, observed = (statistics.median(found[2:]) for found in seconds.values())
    ratio = statistics.median(b / a for a, b in zip(seconds["without"][2:], seconds["with"][2:], strict=True))
    return (
        f"a step takes {without:.4f} s without diagnostics and {observed:.4f} s with them, ratio {ratio:.4f} "
        f"(medians of {steps} pairs); in one step of {every} they cost {(ratio - 1) / every:.2%} of the training"
    )


def make_trainer(model, loss, optimizer, folder: Path, *, num_steps: int, mixed: Mixed, log_every: int) -> Trainer:
    """A trainer with nothing to evaluate."""
    return Trainer(
        model=model,
        loss=loss,
        optimizer=optimizer,
        settings=Settings(phase="bench", num_steps=num_steps, seed=0, log_every=log_every),
        mixed=mixed,
        tracker=Tracker(folder, phase="bench", num_steps=num_steps),
        folder=folder,
        validate=lambda model, step: {"mean_iou": 0.0},
        config={},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deeplabv3plus_tiny")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 192], metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpoint", type=int, metavar="INTERVAL", help="measure the writing of checkpoints instead")
    parser.add_argument("--diagnostics", type=int, metavar="EVERY", help="measure the margin diagnostics instead")
    arguments = parser.parse_args()
    keep_freed()  # as every command of segkit does
    torch.set_num_threads(arguments.threads)
    config = compose([f"model={arguments.model}", "model.encoder_weights=none"])
    device = torch.device(arguments.device)
    model = build.build_model(config, NUM_CLASSES).to(device)
    loss = CrossEntropyLoss().to(device)
    mixed = Mixed(arguments.precision, device)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-4), lr=1e-4, fused=True)
    batches = make_batches(arguments)
    bare_loop(model, loss, optimizer, batches, steps=3, mixed=mixed)
    if arguments.checkpoint:
        options = {"mixed": mixed, "interval": arguments.checkpoint, "repeats": arguments.repeats}
        print(f"{arguments.model}: {checkpoint_stall(model, loss, optimizer, batches, **options)}")
        return
    if arguments.diagnostics:
        options = {"mixed": mixed, "every": arguments.diagnostics, "steps": arguments.steps}
        print(f"{arguments.model}: {diagnostics_cost(model, batches, **options)}")
        return
    bare, ours = [], []
    for _ in range(arguments.repeats):
        bare.append(bare_loop(model, loss, optimizer, batches, steps=arguments.steps, mixed=mixed))
        ours.append(trainer_loop(model, loss, optimizer, batches, steps=arguments.steps, mixed=mixed, log_every=10))
    ratios = [mine / theirs for mine, theirs in zip(ours, bare, strict=True)]
    print(
        f"{arguments.model}, {arguments.batch} x {arguments.size}, {arguments.precision}, {arguments.threads} threads"
    )
    print(f"bare loop  {statistics.median(bare):8.2f} images/s")
    print(f"trainer    {statistics.median(ours):8.2f} images/s")
    print(f"ratio      {statistics.median(ratios):8.3f}  (median of {arguments.repeats} turns)")


if __name__ == "__main__":
    main()
