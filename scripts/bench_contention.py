"""What threads that wait cost a training that shares its cores, and what each way of waiting costs it alone.

    python scripts/bench_contention.py [--spin 1000 10000 30000] [--steps 12] [--repeats 3]

A thread of OpenMP that waits for the others spins on its core first, and sleeps later: how long it spins is what
OMP_WAIT_POLICY and GOMP_SPINCOUNT set. For each setting, in turns: milliseconds of a training step alone, with loading
processes beside it, with a second training beside it, and with one process beside it that never waits. Shown are the
medians over the repeats and, in brackets, the speed relative to the default of OpenMP (more is better).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

BUSY = "while True: pass"
SCENES = ("alone", "loading", "two trainings", "busy process")


def train(*, model: str, steps: int, workers: int) -> float:
    """Median milliseconds of a training step, without waiting for data; ``workers`` load batches meanwhile."""
    import torch

    from segkit.config.compose import compose
    from segkit.losses import CrossEntropyLoss
    from segkit.memory import keep_freed
    from segkit.run import build
    from segkit.run.batches import PhaseBatches
    from segkit.run.plan import plan_phase
    from segkit.run.splits import open_phases
    from segkit.training.precision import Mixed
    from segkit.training.step import split, train_step

    keep_freed()  # as every command of segkit does
    config = compose(
        [
            f"model={model}",
            "model.encoder_weights=none",
            "schedule=single",
            "dataset.crop=[128,192]",
            "dataset.reader.num_images=64",
            f"workers={workers}",
        ]
    )
    splits = open_phases(config)["train"]
    plan = plan_phase(config, "train", len(splits.train))
    batches = iter(PhaseBatches(config=config, plan=plan, splits=splits, pin_memory=False).training(0))
    network = build.build_model(config, splits.train.num_classes).to(memory_format=torch.channels_last)
    optimizer = build.build_optimizer(config, network.train(), None)
    mixed, loss = Mixed("fp32", torch.device("cpu")), CrossEntropyLoss()
    taken, batch = [], next(batches)
    for number in range(steps + 2):
        batch = next(batches) if workers else batch
        images = batch.images.contiguous(memory_format=torch.channels_last)
        start = time.perf_counter()
        train_step(
            network, loss, optimizer, split(batch._replace(images=images), 1), mixed=mixed, scaler=mixed.scaler()
        )
        if number >= 2:  # the first two warm up
            taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


def measure(scene: str, setting: dict[str, str], *, model: str, steps: int) -> float:
    """Milliseconds of a step in ``scene``, in processes of their own with the variables ``setting``."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))} | setting
    task = {"model": model, "steps": steps, "workers": 2 if scene == "loading" else 0}
    beside = []
    if scene == "busy process":
        beside = [subprocess.Popen([sys.executable, "-c", BUSY])]
    if scene == "two trainings":
        longer = json.dumps({**task, "steps": 100 * steps})
        beside = [subprocess.Popen([sys.executable, __file__, "--task", longer], env=environment)]
    try:
        command = [sys.executable, __file__, "--task", json.dumps(task)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        for process in beside:
            process.kill()
            process.wait()
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Print one row of the table for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spin", type=int, nargs="*", default=[1000, 10_000, 30_000], help="values of GOMP_SPINCOUNT")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="deeplabv3plus_lite")
    parser.add_argument("--scenes", nargs="+", default=list(SCENES), choices=SCENES)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(train(**json.loads(arguments.task)))
        return
    settings: dict[str, dict[str, str]] = {"default": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
    settings |= {f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in arguments.spin}
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(arguments.repeats):
        for scene in arguments.scenes:
            for name, setting in settings.items():
                value = measure(scene, setting, model=arguments.model, steps=arguments.steps)
                found.setdefault((name, scene), []).append(value)
    print(f"{arguments.model}, milliseconds of a step, {len(os.sched_getaffinity(0))} cores")
    print(f"{'':14}" + "".join(f"{scene:>20}" for scene in arguments.scenes))
    for name in settings:
        cells = []
        for scene in arguments.scenes:
            mine, default = (statistics.median(found[key, scene]) for key in (name, "default"))
            cells.append(f"{mine:.0f} ({default / mine:.2f})")
        print(f"{name:14}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
