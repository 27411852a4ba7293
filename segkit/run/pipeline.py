"""From a configuration to a finished run folder, phase by phase."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from segkit import runtime
from segkit.config.schema import Config, TrackerKind, cache_dir_of, plain
from segkit.data.statistics import fingerprint
from segkit.errors import InputError, Interrupted
from segkit.files import write_json
from segkit.models import Segmenter
from segkit.report.tables import class_table
from segkit.run import auto_batch, hardware
from segkit.run.build import check_batch, check_parts, check_sizes
from segkit.run.cache import PhaseCache, phase_key
from segkit.run.folder import RunFolder
from segkit.run.phase import Phase, make_trainer, prepare_phase, train_phase
from segkit.run.plan import plan_phase
from segkit.run.saved import as_begun
from segkit.run.splits import Splits, same_images
from segkit.run.start import REPORT, early_margins, initial_model, report_lines
from segkit.run.validation import interrupted_by
from segkit.training import checkpoint, distributed, sinks
from segkit.training.distributed import print_main
from segkit.training.profile import check_enough, profile_steps
from segkit.training.tracking import Tracker

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals after which the state is saved and the run ends: of a scheduler, of the keyboard, of a closed terminal."""
SAME_SIGNAL = 1.0
"""Seconds within which a signal that comes again is the same one, by another way"""


def run(config: Config, path: Path, splits: dict[str, Splits], *, stop: Callable[[], bool] | None = None) -> float:
    """Train every phase of ``config`` in the folder ``path``; returns the mean IoU of the last one.

    ``splits`` are the opened splits of every phase (:func:`segkit.run.splits.open_phases`). Everything that can be
    refused is refused before the first step, of whatever phase. A finished phase is not repeated, an unfinished one
    goes on from its last checkpoint. ``stop`` is asked after every step whether to end; by default a signal decides.
    """
    check_parts(config, splits)
    runtime.set_determinism(strict=config.determinism.value == "strict")
    device = runtime.resolve_device(config.device)
    with distributed.process_group(device), _stopping(stop) as stopping:
        folder = RunFolder(Path(distributed.agree(str(path))), config)
        with folder.held():
            phases, facts = _prepare(folder, splits, device, stopping)
            if config.profile_steps:
                return _profile(next(iter(phases.values())), folder.path)
            cache = PhaseCache(cache_dir_of(config))
            for name in config.schedule:
                phase = phases.pop(name)  # with it goes the state of its optimizer
                with contextlib.nullcontext() if phase.is_last else _shared(phase, folder, cache, facts, stopping):
                    results = train_phase(phase, folder, stopping)
            folder.link_last_phase()
            distributed.on_main(folder.check_whole)
        print_main(class_table(results))  # within the group: after it every process is a main one
        print_main(f"run folder: {folder.path}")
        place = hardware.typed(folder.path)
        print_main("next:")
        for options in (
            "evaluate {} --tta flip,ms",
            "predict {} --input IMAGES --output DIR",
            "compare {} ANOTHER_RUN",
        ):
            print_main(f"  segkit {options.format(place)}")
        if config.tracker is TrackerKind.tensorboard:
            print_main(f"  tensorboard --logdir {place}")
    return math.nan if results["mean_iou"] is None else float(results["mean_iou"])


def check_machine(config: Config, device: torch.device) -> None:
    """Raise InputError for what this machine does not have: processes, packages, memory, a cache."""
    if config.sync_batchnorm and distributed.world_size() == 1:
        raise InputError(
            "sync_batchnorm=true shares statistics between processes, but there is one: start several with torchrun, "
            "or set sync_batchnorm=false"
        )
    distributed.on_main(lambda: sinks.check_tracker(config.tracker.value))
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")  # torch looks for no other
    compiler = os.environ.get("CXX", usual)
    if config.compile and not shutil.which(compiler.partition(" ")[0]):
        raise InputError(
            f"compile=true needs a compiler of C++, but {compiler or 'the empty CXX'} is not in PATH: install one, "
            "name it in CXX, or set compile=false"
        )
    check_sizes(config, device)
    distributed.on_main(PhaseCache(cache_dir_of(config)).check)


def _prepare(
    folder: RunFolder, splits: dict[str, Splits], device: torch.device, stop: Callable[[], bool]
) -> tuple[dict[str, Phase], dict[str, Any]]:
    """All phases, ready to be trained, and what provenance.json says; the folder's config.yaml is written last."""
    config = folder.config
    check_machine(config, device)
    cache_dir = cache_dir_of(config)
    distributed.on_main(lambda: folder.check_places(splits))
    begun = folder.begun_config()
    config, reasons = hardware.choose(config, begun=begun, device=device)
    with interrupted_by(stop, "stopped while auto_batch measured memory"):
        config, chosen = auto_batch.choose_batch(config, begun=begun, phases=splits, device=device)
    folder.config = config
    changes = distributed.on_main(lambda: folder.check(splits))
    if config.profile_steps:
        first = next(iter(config.schedule))
        num_steps = plan_phase(config, first, len(splits[first].train)).num_steps
        check_enough(config.profile_steps, phase=first, num_steps=num_steps)
    opened = as_begun(config, folder.path)
    model, origin = initial_model(opened, next(iter(splits.values())).train.classes, device)
    facts = _facts(config, splits, device)
    distributed.on_main(lambda: folder.check_space(model, has_average=config.ema_decay is not None))
    for name in config.schedule:
        check_batch(config, name, model, num_images=len(splits[name].train), world_size=distributed.world_size())
    phases = {}
    for name in config.schedule:
        with interrupted_by(stop, f"stopped while phase {name} was prepared"):
            phases[name] = prepare_phase(
                config, name, splits=splits[name], model=model, device=device, cache_dir=cache_dir
            )
    lengths = {name: phase.plan.num_steps for name, phase in phases.items()}
    distributed.on_main(lambda: folder.extend(lengths))
    if origin and opened is config:
        distributed.on_main(lambda: write_json(folder.path / REPORT, origin))
        print_main("\n".join(report_lines(origin)))
    why = {key: [plain(getattr(config, key)), reason] for key, reason in reasons.items()}
    distributed.on_main(lambda: folder.start({**facts, "chosen": why, "auto_batch": chosen}, splits, changes))
    for key, (before, now) in changes.items():
        print_main(f"changed: {key} is {now} from here on, and was {before}")
    for note in dict.fromkeys(note for pair in splits.values() for note in pair.train.notes):
        print_main(f"note: {note}")
    found = [same_images(config.phase_dataset(name), splits[name]) for name in config.schedule]
    for text in dict.fromkeys([*found, early_margins(config)]):
        if text:
            print_main(f"warning: {text}")
    print_main(hardware.head(config, reasons, path=folder.path, phases=list(phases.values())))
    return phases, facts


@contextmanager
def _stopping(stop: Callable[[], bool] | None) -> Iterator[Callable[[], bool]]:
    """Yield ``stop``, or a function that tells whether a signal has come; a second one acts as always."""
    asked = threading.Event()
    if stop is not None or threading.current_thread() is not threading.main_thread():
        yield stop or asked.is_set
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}  # as under nohup
    first: dict[int, float] = {}

    def handle(number: int, frame: Any) -> None:
        asked.set()
        # A scheduler signals all processes, and torchrun or a sweep passes on what it got: that is one request.
        if time.monotonic() - first.setdefault(number, time.monotonic()) > SAME_SIGNAL:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load_weights(model: Segmenter, path: Path) -> None:
    """Load the weights of the checkpoint ``path`` into ``model``."""
    checkpoint.load_weights(model, checkpoint.weights(checkpoint.load(path)), source=path)


def _facts(config: Config, splits: dict[str, Splits], device: torch.device) -> dict[str, Any]:
    """What provenance.json says of code, machine and data."""
    data = {name: {"train": fingerprint(pair.train), "val": fingerprint(pair.val)} for name, pair in splits.items()}
    origin = runtime.provenance(device=device, seed=config.seed)
    return {**origin, "data": data, "world_size": distributed.world_size()}


@contextmanager
def _shared(
    phase: Phase, folder: RunFolder, cache: PhaseCache, facts: dict[str, Any], stop: Callable[[], bool]
) -> Iterator[None]:
    """Around a phase that others build on: take it from ``cache`` if it is there, store it if it is not.

    Its weights are in the model afterwards, unless the next phase goes on from its own.
    """
    name, place = phase.name, folder.phase(phase.name)
    machine = {key: facts[key] for key in ("versions", "device", "threads", "world_size")}
    key = phase_key(phase.config, name, fingerprints=facts["data"], machine=machine)
    if distributed.on_main(lambda: folder.is_finished(name)):
        yield
        distributed.on_main(lambda: cache.offer(key, place))
    else:
        with _locked(cache, key, name, lambda: distributed.any_rank(stop(), phase.device)):
            if distributed.on_main(lambda: _fetch(cache, key, place)):
                print_main(f"phase {name}: taken from the cache ({key})")
            yield
            distributed.on_main(lambda: cache.store(key, place))
    names = list(phase.config.schedule)
    if distributed.on_main(lambda: folder.goes_on(names[names.index(name) + 1])):
        return
    last = place / "checkpoints" / checkpoint.LAST
    if not last.is_file():
        raise InputError(
            f"{last}, from which the next phase starts, is gone: copy it back, or delete {place} to train phase {name} "
            "again"
        )
    load_weights(phase.model, last)


def _fetch(cache: PhaseCache, key: str, folder: Path) -> bool:
    """Take the phase from the cache, unless its training has begun in this run folder already."""
    if (folder / "checkpoints").exists():
        return False
    if cache.fetch(key, folder):
        return True
    cache.mark(key, folder)
    return False


@contextmanager
def _locked(cache: PhaseCache, key: str, name: str, stopped: Callable[[], bool]) -> Iterator[None]:
    """Hold the cache's lock of ``key``; waits for it as long as another run trains that phase, or until stopped."""
    lock = cache.lock(key)
    with contextlib.ExitStack() as stack:
        stack.callback(lock.release)
        waiting = False
        while not distributed.on_main(lambda: cache.acquire(lock)):
            if not waiting:
                print_main(f"phase {name}: another run trains it; waiting for that")
            waiting = True
            if stopped():
                raise Interrupted(f"stopped while another run trained phase {name}")
        yield


def _profile(phase: Phase, path: Path) -> float:
    tracker = Tracker(None, phase=phase.name, num_steps=phase.plan.num_steps)
    trainer = make_trainer(phase, path / phase.name, tracker=tracker, validate=lambda *_: {}, stop=lambda: False)
    batches = phase.batches.training(0)
    print_main(profile_steps(trainer, batches, num_steps=phase.config.profile_steps, folder=path))
    return math.nan
