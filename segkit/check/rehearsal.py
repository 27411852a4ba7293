"""One real step of everything, with the exact configuration of a run, in a folder that is deleted afterwards.

The pipeline itself trains a few steps of every phase, is stopped after the first, resumes from its checkpoint, and
evaluates and saves at the end of each phase. Nothing here imitates it; this module shortens the configuration, takes
the time, and estimates what the whole schedule would take.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from segkit import memory, runtime
from segkit.config.schema import Config, TrackerKind, cache_dir_of
from segkit.errors import Interrupted
from segkit.progress import show
from segkit.run import pipeline
from segkit.run.phase import Phase, prepare_phase
from segkit.run.plan import plan_phase
from segkit.run.saved import read_config
from segkit.run.splits import Splits
from segkit.run.start import initial_model
from segkit.training import checkpoint
from segkit.training.profile import check_enough
from segkit.training.sinks import SERVICES, check_tracker
from segkit.training.tracking import Tracker

NUM_STEPS = {"cpu": 3, "mps": 3, "cuda": 12}
"""Steps of each phase: one to warm up, one after resuming from the checkpoint, the rest are timed."""

NUM_EVALUATED = {"cpu": 2, "mps": 2, "cuda": 16}
"""Images of each evaluation."""

LOADING_SECONDS = 20.0
"""Longest time that the measurement of the loader may take, once its second batch has arrived."""


@dataclass(frozen=True, kw_only=True)
class PhaseCost:
    """What a phase of the whole schedule would take, estimated from the steps that were timed.

    ``step_seconds``: a step without waiting for data; ``seconds``: all steps and evaluations.
    """

    name: str
    num_steps: int
    num_evaluations: int
    num_evaluated_images: int
    step_seconds: float
    images_per_second: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What was measured.

    ``peak_memory``: the most bytes held during the rehearsal, on a GPU by tensors, on a CPU by this process (None where
    the system does not tell). ``peak_reserved``: the most bytes of the GPU that were reserved for tensors; 0 on a CPU.
    ``memory_limit``: bytes that the GPU or the machine has.
    """

    device: str
    is_gpu: bool
    num_cores: int
    workers: int
    num_steps: int
    batch_size: int
    peak_memory: int | None
    peak_reserved: int
    memory_limit: int
    loader_images_per_second: float
    evaluated_images_per_second: float
    phases: tuple[PhaseCost, ...]

    @property
    def seconds(self) -> float:
        """Estimated time of the whole schedule, in seconds."""
        return sum(phase.seconds for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        content = dataclasses.asdict(self)
        return {**content, "phases": list(content["phases"]), "estimated_seconds": self.seconds}


def rehearse(config: Config, phases: dict[str, Splits], *, sizes: dict[str, tuple[int, int]]) -> Rehearsal:
    """Train, stop, resume, evaluate and save with ``config`` on ``phases``; returns what was measured.

    ``phases`` may hold fewer samples than the real splits, which have ``sizes`` images (training, validation). Raises
    what the pipeline raises.
    """
    runtime.set_determinism(strict=config.determinism.value == "strict")
    device = runtime.resolve_device(config.device)
    check_tracker(config.tracker.value)
    is_gpu = device.type == "cuda"
    with contextlib.ExitStack() as stack:
        if not is_gpu:
            stack.enter_context(memory.bounded())
        measured = stack.enter_context(memory.measuring(device)) if memory.can_measure(device) else None
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="segkit-check-"))
        folder = Path(name) / "run"
        short = shorten(in_steps(config, sizes), device=device, cache_dir=cache_beside(config, Path(name)))
        first, quiet = next(iter(config.schedule)), io.StringIO()  # keeps the pipeline's lines out of the report
        if config.profile_steps:  # which the rehearsal leaves out
            num_steps = plan_phase(config, first, sizes[first][0]).num_steps
            check_enough(config.profile_steps, phase=first, num_steps=num_steps)
        saved = True
        if plan_phase(short, first, len(phases[first].train)).num_steps > 1:
            _say("training the first step, then stopping")
            with contextlib.redirect_stdout(quiet), contextlib.suppress(Interrupted):
                pipeline.run(short, folder, phases, stop=lambda: True)
            saved = _saved(folder / first)
        _say("resuming from the checkpoint, through all phases")
        with contextlib.redirect_stdout(quiet):
            pipeline.run(short, folder, phases, stop=lambda: False)  # raises what the stopped one may have hidden
        assert saved, f"phase {first} was not saved after its first step"
        trained = read_config(folder / "config.yaml")  # auto_batch may have chosen another batch size
        _check_steps(trained, folder, phases)
        _say("timing the loader and the evaluation")
        last = _last_phase(trained, phases, device)
        loading, evaluating = loader_speed(last), evaluation_speed(last)
        chosen = dataclasses.replace(config, batch_size=trained.batch_size)
        costs = tuple(
            cost(chosen, name, folder, sizes[name], len(phases[name].train), loading=loading, evaluating=evaluating)
            for name in config.schedule
        )
    return Rehearsal(
        device=runtime.device_name(device),
        is_gpu=is_gpu,
        num_cores=runtime.num_cores(),
        workers=config.workers,
        num_steps=short.limit_steps or 0,
        batch_size=chosen.batch_size,
        peak_memory=None if measured is None else measured.bytes,
        peak_reserved=memory.peak(device) if is_gpu else 0,
        memory_limit=memory.total(device),
        loader_images_per_second=loading,
        evaluated_images_per_second=evaluating,
        phases=costs,
    )


def in_steps(config: Config, sizes: dict[str, tuple[int, int]]) -> Config:
    """Return ``config`` with the steps of each phase on all of its images, however few it is rehearsed on."""
    whole = dataclasses.replace(config, limit_steps=None)
    schedule = {
        name: dataclasses.replace(phase, epochs=None, steps=plan_phase(whole, name, sizes[name][0]).num_steps)
        for name, phase in config.schedule.items()
    }
    return dataclasses.replace(config, schedule=schedule)


def shorten(config: Config, *, device: torch.device, cache_dir: Path) -> Config:
    """Return ``config`` with a few steps and images; whatever decides about memory and speed stays.

    A tracker that is a service is not told of them.
    """
    steps, images = NUM_STEPS[device.type], NUM_EVALUATED[device.type]
    evaluation = dataclasses.replace(
        config.evaluation,
        every_steps=None,
        every_epochs=None,
        max_images=min(images, config.evaluation.max_images or images),
    )
    return dataclasses.replace(
        config,
        evaluation=evaluation,
        limit_steps=min(steps, config.limit_steps or steps),
        cache_dir=str(cache_dir),
        log_every=1,
        checkpoint_every=None,
        profile_steps=0,
        resume=True,
        tracker=TrackerKind.tensorboard if config.tracker.value in SERVICES else config.tracker,
    )


def cache_beside(config: Config, folder: Path) -> Path:
    """Make a cache below ``folder`` that shares the label counts of the real one, but not its trained phases."""
    counts = cache_dir_of(config) / "label_counts"
    counts.mkdir(parents=True, exist_ok=True)
    (folder / "cache").mkdir()
    (folder / "cache" / "label_counts").symlink_to(counts.resolve(), target_is_directory=True)
    return folder / "cache"


def _say(text: str) -> None:
    show(f"rehearsal: {text}", error=True)


def _saved(folder: Path) -> bool:
    """True if the pipeline saved the phase in ``folder`` after its first step."""
    state = checkpoint.load_last(folder / "checkpoints")
    return state is not None and state["progress"]["step"] == 1


def _check_steps(config: Config, folder: Path, phases: dict[str, Splits]) -> None:
    """Assert that every step of every phase was trained once: none lost, and none repeated after resuming."""
    for name in config.schedule:
        expected = list(range(1, plan_phase(config, name, len(phases[name].train)).num_steps + 1))
        rows = _rows(folder / name / "metrics.jsonl")
        trained = [row["step"] for row in rows if row["split"] == "train"]
        assert trained == expected, f"phase {name} trained the steps {trained}, not {expected}"
        assert any(row["split"] == "val" for row in rows), f"phase {name} was not evaluated"


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -- measuring -------------------------------------------------------------------------------------------------------


def _last_phase(config: Config, phases: dict[str, Splits], device: torch.device) -> Phase:
    """Return the last phase of the run once more, at its start."""
    *_, name = config.schedule
    model, _ = initial_model(config, phases[name].train.classes, device)
    return prepare_phase(config, name, splits=phases[name], model=model, device=device, cache_dir=cache_dir_of(config))


def loader_speed(phase: Phase) -> float:
    """Return the images a second that the loader gives when it never has to wait for the model.

    The workers begin together, so that their first batches come in a burst: timing starts once each has made one.
    """
    first = max(1, phase.config.workers)
    last = 3 * first
    batches = dataclasses.replace(phase.batches, plan=dataclasses.replace(phase.plan, num_steps=last))
    arrivals: list[tuple[float, int]] = []
    start = time.perf_counter()
    for batch in batches.training(0):
        arrivals.append((time.perf_counter() - start, len(batch.names)))
        if len(arrivals) >= last or (len(arrivals) > first and arrivals[-1][0] > LOADING_SECONDS):
            break
    if len(arrivals) <= first:  # a phase of very few steps: time all of them
        return sum(images for _, images in arrivals) / max(arrivals[-1][0], 1e-9)
    seconds = arrivals[-1][0] - arrivals[first - 1][0]
    return sum(images for _, images in arrivals[first:]) / max(seconds, 1e-9)


def evaluation_speed(phase: Phase) -> float:
    """Return the images a second of an evaluation, once its workers have started."""
    loaded: list[float] = []

    def stop() -> bool:
        loaded.append(time.perf_counter())  # an evaluation asks this whenever a batch has been loaded
        return False

    tracker = Tracker(None, phase=phase.name, num_steps=phase.plan.num_steps)
    results, _ = phase.validation(tracker, stop).evaluate(phase.model)
    runtime.synchronize(phase.device)
    return results["num_images"] / max(time.perf_counter() - loaded[0], 1e-9)


def cost(
    config: Config,
    name: str,
    folder: Path,
    size: tuple[int, int],
    num_rehearsed: int,
    *,
    loading: float,
    evaluating: float,
) -> PhaseCost:
    """Return what phase ``name`` would take with ``size`` training and validation images."""
    batch = min(config.batch_size, num_rehearsed)
    rows = _rows(folder / name / "timing.jsonl")
    # The first step warms up; in the first phase, so does the second, with which the run resumes.
    warm = 2 if name == next(iter(config.schedule)) else 1
    rows = rows[warm:] or rows[-1:]
    step_seconds = statistics.median(batch / row["images_per_second"] * (1 - row["data_wait_share"]) for row in rows)
    in_step = max(step_seconds, batch / loading)
    plan = plan_phase(config, name, size[0])
    evaluated = min(size[1], config.evaluation.max_images or size[1])
    return PhaseCost(
        name=name,
        num_steps=plan.num_steps,
        num_evaluations=plan.num_evaluations,
        num_evaluated_images=evaluated,
        step_seconds=step_seconds,
        images_per_second=batch / in_step,
        seconds=plan.num_steps * in_step + plan.num_evaluations * evaluated / evaluating,
    )
