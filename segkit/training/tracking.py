"""What a run leaves behind while it trains: metrics.jsonl, timing.jsonl, curves, and lines on the screen.

``metrics.jsonl`` holds no clock: two runs of the same command write the same bytes under ``determinism=strict``.
Times go to ``timing.jsonl`` and to the curves.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from segkit.errors import InputError, first_line
from segkit.files import without_nan
from segkit.progress import for_terminal, is_terminal, show
from segkit.runtime import num_cores
from segkit.training import sinks


class Tracker:
    """Writes records of one phase. ``run_metrics`` is the run's own metrics.jsonl, of all phases so far.

    Curves go to the sink ``kind`` as well (:mod:`segkit.training.sinks`), over the steps of the whole run: ``offset``
    is the number of steps of the phases before. With ``folder`` None (a rank that does not write) nothing is done.
    """

    def __init__(
        self, folder: Path | None, *, phase: str, num_steps: int, run_metrics: Path | None = None, offset: int = 0,
        kind: str = "tensorboard",
    ) -> None:  # fmt: skip
        self.folder, self.phase, self.num_steps, self.offset, self.kind = folder, phase, num_steps, offset, kind
        self.files = [path for path in (folder and folder / "metrics.jsonl", run_metrics) if path is not None]
        self._sink: sinks.Sink | None = None
        self._is_lost = False
        self._bar: Any = None
        self._last_line = 0.0
        self._purge_step = 0
        self._last_record: dict[str, Any] = {}
        self._last_speed: dict[str, Any] = {}

    def truncate(self, size: int, *, step: int, earlier: bytes = b"") -> None:
        """Cut the phase's metrics.jsonl to ``size`` bytes, and start the run's own again as ``earlier`` plus that.

        A record written after the checkpoint that training goes on from would otherwise stand there twice. The same
        goes for the curves: what a process before this one showed for ``step`` and later steps is not shown twice.
        """
        self._purge_step = step
        if self.folder is None:
            return
        if step == 0:
            for path in self.folder.glob(sinks.EVENTS):
                path.unlink()
        own = self.files[0]
        kept = own.read_bytes()[:size] if own.exists() else b""
        if len(kept) < size:
            warnings.warn(
                f"{own} has lost {size - len(kept)} of {size} bytes since the checkpoint: its curves have a gap",
                stacklevel=2,
            )
            kept = kept[: kept.rfind(b"\n") + 1]  # a torn line is no line
        self._last_record, self._last_speed = _last_line(kept), {}
        if (timing := self.folder / "timing.jsonl").is_file():
            of_step = [line for line in timing.read_bytes().splitlines() if f'"step": {step},'.encode() in line]
            self._last_speed = _last_line(of_step[-1]) if of_step else {}
        if own.exists():
            os.truncate(own, len(kept))  # in one piece: a process that dies here loses nothing that is kept
        for path in self.files[1:]:
            path.write_bytes(earlier + kept)

    def size(self) -> int:
        """Bytes of the phase's metrics.jsonl so far; they are on the disk then, as a checkpoint counts on them."""
        if self.folder is None or not self.files[0].exists():
            return 0
        with open(self.files[0], "rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def open(self) -> None:
        """Open the sink, which a new run does before its first step; InputError if that fails."""
        if self.folder is None or self._sink is not None:
            return
        step, last, run = self._purge_step, self._last_record, self.files[-1].parent
        try:
            purge_step = self.offset + step if step else None
            self._sink = sinks.open_sink(self.kind, self.folder, phase=self.phase, run=run, purge_step=purge_step)
        except Exception as error:
            memory = sinks.memory_of(self.kind, run, self.phase)
            anew = f", delete {memory} for a new run there" if memory.is_file() else ""
            raise InputError(
                f"tracker={self.kind} cannot be opened ({first_line(error)}): mend that{anew}, or set tracker=none"
            ) from None
        if self._sink.remembers and self.files[0].is_file():
            for line in self.files[0].read_bytes().splitlines():
                record = _last_line(line)
                self.scalars(record.get("step", 0), _tags(record))
        if last.get("step") == step and last.get("split") == "train":  # purged with the later ones
            shown = _training_tags(last) | {f"speed/{name}": value for name, value in self._last_speed.items()}
            self.scalars(step, {tag: value for tag, value in shown.items() if isinstance(value, float)})

    def _tell(self, show: Callable[[sinks.Sink], None]) -> None:
        """Call ``show`` with the sink. One that fails (a network, say) is given up, with one warning."""
        if self.folder is None or self._is_lost:
            return
        try:
            self.open()
            if self._sink is not None:
                show(self._sink)
        except Exception as error:
            self._is_lost = True
            with contextlib.suppress(Exception):
                if self._sink is not None:
                    self._sink.close()
            warnings.warn(
                f"tracker={self.kind} failed ({first_line(error)}): from here on the curves of phase {self.phase} "
                "stand in metrics.jsonl alone, until the run is started again",
                stacklevel=2,
            )

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self.folder is None:
            return
        line = json.dumps(without_nan({"phase": self.phase, "step": step, **values})) + "\n"
        for path in self.files:
            with open(path, "a", encoding="utf-8") as file:
                file.write(line)

    def training(self, step: int, values: dict[str, float]) -> None:
        """Record and show what the steps up to ``step`` have computed."""
        self.record(step, {"split": "train", **values})
        self.scalars(step, _training_tags(values))

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Record and show the scores of an evaluation: ``classes`` maps names to those of a class."""
        self.record(step, {"split": "val", **values})
        self.scalars(step, _evaluation_tags(values))

    def timing(self, step: int, values: dict[str, float]) -> None:
        """Append one line to timing.jsonl and show the values."""
        if self.folder is None:
            return
        with open(self.folder / "timing.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"phase": self.phase, "step": step, **values}) + "\n")
        self.scalars(step, {f"speed/{name}": value for name, value in values.items()})

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Show scalars; NaN (an absent class) is left out."""
        known = {for_terminal(name): float(value) for name, value in values.items() if value == value}
        self._tell(lambda sink: sink.scalars(self.offset + step, known))

    def pictures(self, step: int, tag: str, grid: Any) -> None:
        """Show an RGB picture, uint8 (H, W, 3)."""
        self._tell(lambda sink: sink.picture(self.offset + step, tag, grid))

    def text(self, tag: str, text: str) -> None:
        """Show a text in Markdown, at the first step of the phase."""
        self._tell(lambda sink: sink.text(self.offset, tag, text))

    def histogram(self, step: int, tag: str, counts: Any, edges: Any) -> None:
        """Show a histogram: ``counts`` (B,) of the bins between ``edges`` (B + 1,); none if empty."""
        filled = counts.nonzero()[0]
        if len(filled):
            first, last, at = filled[0], filled[-1] + 1, self.offset + step
            self._tell(lambda sink: sink.histogram(at, tag, counts[first:last], edges[first : last + 1]))

    def describe(self, row: sinks.Row) -> None:
        """Begin the run's row in a table of runs, which its last phase does."""
        self._tell(lambda sink: sink.describe(row))

    def finished(self, *, is_last: bool = True) -> None:
        """Note that the phase was trained to its end."""
        self._tell(lambda sink: sink.finished(is_last=is_last))

    def show_finished(self, *, is_last: bool) -> None:
        """Show what a finished phase has recorded if the sink has not, as of one that another run has trained."""
        if self.folder is not None and not sinks.has_shown(self.kind, self.files[-1].parent, self.phase):
            self.open()
            self.finished(is_last=is_last)
            self.close()

    def show(self, step: int, values: dict[str, str]) -> None:
        """Show the state of training: a bar on a terminal, a line at most every two seconds elsewhere."""
        if self.folder is None:
            return
        text = "  ".join(f"{name} {value}" for name, value in values.items())
        if is_terminal():
            self._draw(step, text)
        elif step == self.num_steps or time.monotonic() - self._last_line >= 2:
            self._last_line = time.monotonic()
            show(f"{self.phase} step {step}/{self.num_steps}  {text}")

    def _draw(self, step: int, text: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.table import Column

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(20),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),  # where there is no room, the bar is shorter
                TextColumn("{task.fields[text]}", markup=False),
            )
            self._bar = Progress(*columns, console=Console(file=sys.stderr))
            self._bar.start()
            self._bar.add_task(self.phase, total=self.num_steps, text="")
        self._bar.update(self._bar.task_ids[0], completed=step, text=f"{step}/{self.num_steps}  {text}")

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        if self.folder is None:
            return
        if self._bar is not None:
            self._bar.console.print(for_terminal(text), markup=False, highlight=False)
        else:
            show(text)

    def close(self) -> None:
        """Flush and close everything."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._sink is not None:
            self._tell(lambda sink: sink.close())
            self._sink = None


def _training_tags(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of training steps by the tags of their charts; what matters most comes first there."""
    return {"curves/loss" if name == "loss" else f"train/{name}": value for name, value in values.items()}


def _evaluation_tags(values: dict[str, Any]) -> dict[str, Any]:
    """Return the scores of an evaluation by the tags of their charts."""
    classes = values.get("classes") or {}
    kinds = {kind: None for scores in classes.values() for kind in scores}
    of_classes = {f"{kind}/{name}": scores.get(kind) for kind in kinds for name, scores in classes.items()}
    totals = {f"val/{name}": value for name, value in values.items() if name not in ("classes", "mean_iou")}
    found = {"curves/mean_iou": values.get("mean_iou"), **totals, **of_classes}
    return {tag: value for tag, value in found.items() if isinstance(value, int | float)}


def _tags(record: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a line of metrics.jsonl by the tags of their charts."""
    values = {name: value for name, value in record.items() if name not in ("phase", "step", "split")}
    if record.get("split") == "val":
        return _evaluation_tags(values)
    return {tag: value for tag, value in _training_tags(values).items() if isinstance(value, int | float)}


def _last_line(content: bytes) -> dict[str, Any]:
    """The record in the last line of ``content``; empty if there is none, or if it is damaged."""
    try:
        record = json.loads(content.splitlines()[-1])
    except (IndexError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


MUCH_WAITING = 0.2
"""Share of the time spent waiting for data, from which on the run says what would help."""


def loading_lever(workers: int) -> str:
    """What would make the loading faster, for the screen."""
    cores = num_cores()
    if workers < cores:
        return f"data-wait: loading is slower than training: set workers={cores} (now {workers}, on {cores} cores)"
    return (
        f"data-wait: loading is slower than training with {workers} workers on {cores} cores: if they are busy, store "
        "the images at the size that is trained on; if not, copy the data to a local disk"
    )


class Clock:
    """Images a second and the share of time spent waiting for data, without the time of evaluations."""

    def __init__(self) -> None:
        self.images, self.laps, self.waited, self.start = 0, 0, 0.0, time.perf_counter()

    def lap(self) -> dict[str, float]:
        """The figures since the last lap."""
        now = time.perf_counter()
        seconds = max(now - self.start, 1e-9)
        figures = {"images_per_second": self.images / seconds, "data_wait_share": self.waited / seconds}
        self.images, self.laps, self.waited, self.start = 0, self.laps + 1, 0.0, now
        return figures

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose duration does not count."""
        begun = time.perf_counter()
        yield
        self.start += time.perf_counter() - begun
