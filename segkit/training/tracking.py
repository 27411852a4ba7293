"""What a run leaves behind while it trains: metrics.jsonl, timing.jsonl, TensorBoard, and lines on the screen.

``metrics.jsonl`` holds no clock: two runs of the same command write the same bytes under ``determinism=strict``.
Times go to ``timing.jsonl`` and to TensorBoard.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from segkit.files import without_nan
from segkit.progress import for_terminal, is_terminal, show
from segkit.runtime import num_cores

TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's files below that of the phase."""


class Tracker:
    """Writes records of one phase. ``run_metrics`` is the run's own metrics.jsonl, of all phases so far.

    With ``folder`` None (a rank that does not write) every method does nothing.
    """

    def __init__(self, folder: Path | None, *, phase: str, run_metrics: Path | None = None, num_steps: int) -> None:
        self.folder, self.phase, self.num_steps = folder, phase, num_steps
        self.files = [path for path in (folder and folder / "metrics.jsonl", run_metrics) if path is not None]
        self._writer: Any = None
        self._bar: Any = None
        self._last_line = 0.0
        self._purge_step = 0
        self._last_record: dict[str, Any] = {}
        self._last_speed: dict[str, Any] = {}

    def truncate(self, size: int, *, step: int, earlier: bytes = b"") -> None:
        """Cut the phase's metrics.jsonl to ``size`` bytes, and start the run's own again as ``earlier`` plus that.

        A record written after the checkpoint that training goes on from would otherwise stand there twice. The same
        goes for TensorBoard: what a process before this one wrote for ``step`` and later steps is not shown any more.
        """
        self._purge_step = step
        if self.folder is None:
            return
        if step == 0:
            shutil.rmtree(self.folder / TENSORBOARD, ignore_errors=True)
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

    @property
    def writer(self) -> Any:
        """The TensorBoard writer; imported and opened when it is first needed."""
        if self._writer is None and self.folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            _wait_for_a_later_name(self.folder / TENSORBOARD)
            self._writer = SummaryWriter(
                str(self.folder / TENSORBOARD), purge_step=self._purge_step or None, flush_secs=30
            )
            last = self._last_record
            if last.get("step") == self._purge_step and last.get("split") == "train":  # purged with the later ones
                shown = {f"train/{name}": value for name, value in last.items() if isinstance(value, float)}
                shown |= {f"speed/{name}": item for name, item in self._last_speed.items() if isinstance(item, float)}
                self.scalars(last["step"], shown)
        return self._writer

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self.folder is None:
            return
        line = json.dumps(without_nan({"phase": self.phase, "step": step, **values})) + "\n"
        for path in self.files:
            with open(path, "a", encoding="utf-8") as file:
                file.write(line)

    def timing(self, step: int, values: dict[str, float]) -> None:
        """Append one line to timing.jsonl and show the values in TensorBoard."""
        if self.folder is None:
            return
        with open(self.folder / "timing.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"phase": self.phase, "step": step, **values}) + "\n")
        self.scalars(step, {f"speed/{name}": value for name, value in values.items()})

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Show scalars in TensorBoard; NaN (an absent class) is left out."""
        if self.folder is None:
            return
        for name, value in values.items():
            if value == value:
                self.writer.add_scalar(for_terminal(name), value, step)

    def pictures(self, step: int, tag: str, grid: Any) -> None:
        """Show an RGB picture, uint8 (H, W, 3), in TensorBoard."""
        if self.folder is not None:
            self.writer.add_image(tag, grid, step, dataformats="HWC")

    def text(self, tag: str, text: str) -> None:
        """Show a text in Markdown in TensorBoard, at step 0."""
        if self.folder is not None:
            self.writer.add_text(tag, text, 0)

    def histogram(self, step: int, tag: str, counts: Any, edges: Any) -> None:
        """Show a histogram in TensorBoard: ``counts`` (B,) of the bins between ``edges`` (B + 1,); none if empty."""
        filled = counts.nonzero()[0]
        if self.folder is None or not len(filled):
            return
        first, last = filled[0], filled[-1] + 1
        counts, low, high = counts[first:last], edges[first:last], edges[first + 1 : last + 1]
        middle = (low + high) / 2
        self.writer.add_histogram_raw(
            tag,
            min=low[0],
            max=high[-1],
            num=counts.sum(),
            sum=(counts * middle).sum(),
            sum_squares=(counts * middle**2).sum(),
            bucket_limits=high.tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def layout(self, categories: dict[str, dict[str, list[str]]]) -> None:
        """Arrange TensorBoard's tab of custom scalars: category -> title of a chart -> patterns of its scalars."""
        if self.folder is not None:
            charts = {
                name: {title: ["Multiline", tags] for title, tags in items.items()}
                for name, items in categories.items()
            }
            self.writer.add_custom_scalars(charts)

    def hparams(
        self, values: dict[str, Any], *, columns: dict[str, Any], first: Sequence[str], scores: Sequence[str]
    ) -> None:
        """Begin this run's row in TensorBoard's table of hyper-parameters.

        ``columns`` are all hyper-parameters, each with a value of its type, and ``first`` those that the table begins
        with; ``scores`` are the scalars whose last values it shows. ``SummaryWriter.add_hparams`` would make a run of
        its own for this.
        """
        if self.folder is not None:
            from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
            from torch.utils.tensorboard.summary import hparams

            head, _, _ = hparams(columns, dict.fromkeys(scores, 0.0))
            plugin = head.value[0].metadata.plugin_data
            content = HParamsPluginData.FromString(plugin.content)
            for column in content.experiment.hparam_infos:
                column.differs = column.name in first  # TensorBoard shows the columns that differ before the others
            plugin.content = content.SerializeToString()
            _, start, _ = hparams(values, {})
            for summary in (head, start):
                self.writer.file_writer.add_summary(summary)

    def finished(self) -> None:
        """End the row that :meth:`hparams` began."""
        if self.folder is not None:
            from torch.utils.tensorboard.summary import hparams

            self.writer.file_writer.add_summary(hparams({}, {})[2])

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

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(20),
                TimeRemainingColumn(),
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
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait until a new event file sorts after those in ``folder``.

    TensorBoard reads them in the order of their names, which begin with the second of their making, and purges only
    what it has read before.
    """
    seconds = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    ahead = max((int(second) for second in seconds if second.isdigit()), default=0) + 1 - time.time()
    if ahead > MOST_WAITING:
        warnings.warn(
            f"{folder} has files of a clock that is {math.ceil(ahead)} seconds ahead of this machine's: "
            "TensorBoard may show steps twice; metrics.jsonl does not",
            stacklevel=2,
        )
    elif ahead > 0:
        time.sleep(ahead + 0.01)


MOST_WAITING = 5.0
"""Seconds that a new event file waits for its name at most."""


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
