"""From a configuration to a finished run folder, phase by phase."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from segkit import files, runtime
from segkit.config.schema import Config, cache_dir_of, check_targets
from segkit.data.statistics import fingerprint
from segkit.errors import Interrupted
from segkit.models import Segmenter
from segkit.report.tables import class_table
from segkit.run import auto_batch
from segkit.run.build import build_model
from segkit.run.cache import PhaseCache, phase_key
from segkit.run.folder import RunFolder
from segkit.run.phase import PhaseRun, Surroundings, say
from segkit.run.splits import Splits
from segkit.training import checkpoint, distributed


def run(config: Config, folder: Path, phases: dict[str, Splits]) -> float:
    """Train every phase of ``config`` in ``folder``; returns the mean IoU of the last one.

    ``phases`` are the opened splits (:func:`segkit.run.splits.open_phases`). A finished phase is not repeated, an
    unfinished one goes on from its last checkpoint.
    """
    check_targets(config)
    runtime.set_determinism(strict=config.determinism.value == "strict")
    device = runtime.resolve_device(config.device)
    with distributed.process_group(device), stop_on_signal() as stop:
        return Run(config, folder, phases, device, stop).train()


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGTERM or SIGINT has come; a second signal acts as it always does."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, handle)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Run:
    """One run: its configuration, its folder, and the model that goes through all phases."""

    config: Config
    path: Path
    phases: dict[str, Splits]
    device: torch.device
    stop: Callable[[], bool]
    folder: RunFolder = field(init=False)
    cache_dir: Path = field(init=False)
    model: Segmenter = field(init=False)

    def __post_init__(self) -> None:
        self.path = Path(distributed.agree(str(self.path)))
        self.cache_dir = cache_dir_of(self.config)

    def train(self) -> float:
        """Train all phases; returns the mean IoU of the last."""
        cache = PhaseCache(self.cache_dir)
        distributed.on_main(cache.check)
        chosen = self._choose_batch() if self.config.auto_batch else None
        self.folder = RunFolder(self.path, self.config, writes=distributed.is_main())
        origin = runtime.provenance(device=self.device, seed=self.config.seed)
        data = {
            name: {"train": fingerprint(splits.train), "val": fingerprint(splits.val)}
            for name, splits in self.phases.items()
        }
        world = distributed.world_size()
        noted = {**origin, "data": data, "world_size": world, "auto_batch": chosen}
        distributed.on_main(lambda: self.folder.start(noted))
        for note in dict.fromkeys(note for splits in self.phases.values() for note in splits.train.notes):
            say(f"note: {note}")
        self._build()
        if self.config.profile_steps:
            return self._profile()
        machine = {**{key: origin[key] for key in ("versions", "device", "threads")}, "world_size": world}
        *shared, last = self.config.schedule
        for name in shared:
            self._shared_phase(cache, name, phase_key(self.config, name, fingerprints=data, machine=machine))
            self._load_phase(name)
        self.folder.link_last_phase()  # a run that is watched, or stopped, shows its checkpoints there
        results = self._phase(last)
        self.folder.link_last_phase()
        say(class_table(results))
        say(f"run folder: {self.path}")
        return float(results["mean_iou"])

    def _choose_batch(self) -> dict[str, Any] | None:
        """Set the batch size to the largest that fits; returns what it was chosen by."""
        saved = self.path / "config.yaml"
        self.config, chosen = auto_batch.with_largest_batch(
            self.config, saved=saved, phases=self.phases, device=self.device
        )
        say(auto_batch.sentence(chosen) if chosen else f"auto_batch: batch_size={self.config.batch_size}, as before")
        return chosen

    def _build(self) -> None:
        first = next(iter(self.phases.values())).train
        self.model = build_model(self.config, first.num_classes).to(self.device)
        if self.config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.config.init_from:
            self._initialise(Path(self.config.init_from))

    def _initialise(self, source: Path) -> None:
        path = source / "checkpoints" / checkpoint.LAST if source.is_dir() else source
        checkpoint.load_weights(self.model, checkpoint.weights(checkpoint.load(path)), source=path)

    def _load_phase(self, name: str) -> None:
        """Load the weights that phase ``name`` ended with: the next phase starts from them."""
        path = self.folder.phase(name) / "checkpoints" / checkpoint.LAST
        checkpoint.load_weights(self.model, checkpoint.weights(checkpoint.load(path)), source=path)

    def _shared_phase(self, cache: PhaseCache, name: str, key: str) -> None:
        """A phase that others build on: from the run folder, from the cache, or trained and then kept there."""
        folder = self.folder.phase(name)
        if distributed.on_main(lambda: self.folder.is_finished(name)):
            self._phase(name)
            distributed.on_main(lambda: cache.offer(key, folder))
            return
        with self._locked(cache, key, name):
            if distributed.on_main(lambda: self._fetch(cache, key, folder)):
                say(f"phase {name}: taken from the cache ({key})")
            self._phase(name)
            distributed.on_main(lambda: cache.store(key, folder))

    def _fetch(self, cache: PhaseCache, key: str, folder: Path) -> bool:
        """Take the phase from the cache, unless its training has begun in this run folder already."""
        if (folder / "checkpoints").exists():
            return False
        if cache.fetch(key, folder):
            return True
        cache.mark(key, folder)
        return False

    @contextmanager
    def _locked(self, cache: PhaseCache, key: str, name: str) -> Iterator[None]:
        """Hold the cache's lock of ``key``; waits for it as long as another run trains that phase, or until stopped."""
        lock = cache.lock(key)
        waiting = False
        try:
            while not distributed.on_main(lambda: cache.acquire(lock)):
                if not waiting:
                    say(f"phase {name}: another run trains it; waiting for that")
                waiting = True
                if distributed.any_rank(self.stop(), self.device):
                    raise Interrupted(f"stopped while another run trained phase {name}")
            yield
        finally:
            lock.release()

    # -- one phase -----------------------------------------------------------------------------------------------

    def _phase(self, name: str) -> dict[str, Any]:
        if self.folder.is_finished(name):
            say(f"phase {name}: finished already")
            if distributed.is_main():
                metrics = self.folder.phase(name) / "metrics.jsonl"
                files.write_atomically(self.folder.metrics, self.folder.earlier_metrics(name) + metrics.read_bytes())
            return self.folder.results(name)
        return PhaseRun(self._surroundings(), name, self.phases[name]).train()

    def _surroundings(self) -> Surroundings:
        return Surroundings(
            config=self.config,
            folder=self.folder,
            cache_dir=self.cache_dir,
            device=self.device,
            model=self.model,
            stop=self.stop,
        )

    def _profile(self) -> float:
        from segkit.training.profile import profile_steps

        name = next(iter(self.config.schedule))
        phase = PhaseRun(self._surroundings(), name, self.phases[name])
        say(profile_steps(phase.trainer(), phase.batches(0), num_steps=self.config.profile_steps, folder=self.path))
        return math.nan
