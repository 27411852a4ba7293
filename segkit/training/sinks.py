"""Where the curves of a phase are shown beside metrics.jsonl: TensorBoard, Weights & Biases or MLflow.

TensorBoard is told at which step a run goes on, and hides what was shown from there on. The others cannot take anything
back, so they show no step of a scalar or picture that an earlier process has shown; what they lack of the records in
metrics.jsonl is shown when they are opened.
"""

from __future__ import annotations

import math
import os
import re
import time
import uuid
import warnings
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from segkit.errors import InputError, unreachable
from segkit.files import read_json, write_json

SERVICES = ("wandb", "mlflow")
"""Sinks that take nothing back"""


class Row(NamedTuple):
    """Hyper-parameters, and how a table of runs shows them: all its ``columns``, each with a value of its type, those
    that come ``first``, and the scalars whose last values stand beside them."""

    values: dict[str, Any]
    columns: dict[str, Any]
    first: Sequence[str]
    scores: Sequence[str]


class Sink:
    """What a tracker tells; each sink shows what it can. ``step`` counts over all phases of the run."""

    remembers = False
    """Whether it knows what it has shown"""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Show numbers by their tags."""

    def picture(self, step: int, tag: str, pixels: Any) -> None:
        """Show an RGB picture, uint8 (H, W, 3)."""

    def histogram(self, step: int, tag: str, counts: Any, edges: Any) -> None:
        """Show ``counts`` (B,) of the bins between ``edges`` (B + 1,), numpy arrays."""

    def text(self, step: int, tag: str, text: str) -> None:
        """Show a text in Markdown."""

    def describe(self, row: Row) -> None:
        """Begin the run's row in a table of runs."""

    def finished(self, *, is_last: bool) -> None:
        """Note that the phase was trained to its end, and whether it is the run's last."""

    def close(self) -> None:
        """Write what is pending."""


def check_tracker(kind: str) -> None:
    """Raise InputError if the package of the tracker ``kind`` is not installed, or where it writes is not there.

    MLflow itself would try for minutes.
    """
    found = find_spec(kind) if kind in SERVICES else None
    if kind in SERVICES and (found is None or found.origin is None):  # None: a folder that wandb has left
        raise InputError(f"tracker={kind} needs a package that is not installed: pip install 'segkit[{kind}]'")
    place, reason = os.environ.get("MLFLOW_TRACKING_URI", "") if kind == "mlflow" else "", None
    if place.startswith(("http://", "https://")):
        scheme, _, rest = place.partition("://")
        place = f"{scheme}://{rest.partition('/')[0].rpartition('@')[2]}"  # without a password
        reason = unreachable(place)
    elif place.startswith("sqlite:///"):
        folder = Path(place.removeprefix("sqlite:///")).absolute().parent
        reason = None if os.access(folder, os.W_OK) else f"{folder} is no folder that can be written"
    if reason:
        raise InputError(
            f"MLFLOW_TRACKING_URI is {place}, which cannot be reached ({reason}): correct it, or set "
            "tracker=tensorboard"
        )


def open_sink(kind: str, folder: Path, *, phase: str, run: Path, purge_step: int | None) -> Sink:
    """Return the sink ``kind`` of the phase in ``folder``, which goes on at ``purge_step``; None for a new one."""
    if kind == "tensorboard":
        return TensorBoard(folder, purge_step=purge_step)
    return Sink() if kind == "none" else {"wandb": WandB, "mlflow": MLflow}[kind](run, phase)


# -- TensorBoard ---------------------------------------------------------------------------------------------------

EVENTS = "events.out.tfevents.*"
MOST_WAITING = 5.0
"""Seconds that a new event file waits for its name at most."""


class TensorBoard(Sink):
    """Event files in the folder of the phase."""

    def __init__(self, folder: Path, *, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _wait_for_a_later_name(folder)
        self.writer: Any = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=30)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, tag: str, pixels: Any) -> None:
        self.writer.add_image(tag, pixels, step, dataformats="HWC")

    def histogram(self, step: int, tag: str, counts: Any, edges: Any) -> None:
        low, high = edges[:-1], edges[1:]
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

    def text(self, step: int, tag: str, text: str) -> None:
        self.writer.add_text(tag, text, step)

    def describe(self, row: Row) -> None:
        """Begin the row; ``SummaryWriter.add_hparams`` would make a run of its own for it."""
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import hparams

        head, _, _ = hparams(row.columns, dict.fromkeys(row.scores, 0.0))
        plugin = head.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(plugin.content)
        for column in content.experiment.hparam_infos:
            column.differs = column.name in row.first  # TensorBoard shows the columns that differ before the others
        plugin.content = content.SerializeToString()
        for summary in (head, hparams(row.values, {})[1]):
            self.writer.file_writer.add_summary(summary)

    def finished(self, *, is_last: bool) -> None:
        """End the row that :meth:`describe` began."""
        from torch.utils.tensorboard.summary import hparams

        if is_last:
            self.writer.file_writer.add_summary(hparams({}, {})[2])

    def close(self) -> None:
        self.writer.close()


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait until a new event file sorts after those in ``folder``.

    TensorBoard reads them in the order of their names, which begin with the second of their making, and purges only
    what it has read before.
    """
    seconds = [path.name.split(".")[3] for path in folder.glob(EVENTS)]
    ahead = max((int(second) for second in seconds if second.isdigit()), default=0) + 1 - time.time()
    if ahead > MOST_WAITING:
        warnings.warn(
            f"{folder} has files of a clock that is {math.ceil(ahead)} seconds ahead of this machine's: "
            "TensorBoard may show steps twice; metrics.jsonl does not",
            stacklevel=2,
        )
    elif ahead > 0:
        time.sleep(ahead + 0.01)


# -- sinks that take nothing back ----------------------------------------------------------------------------------


def has_shown(kind: str, run: Path, phase: str) -> bool:
    """True if the sink ``kind`` shows the finished ``phase`` of ``run`` to its end, or knows nothing of that."""
    return kind not in SERVICES or _remembered(kind, run, phase).get("finished") is True


def _remembered(kind: str, run: Path, phase: str) -> dict[str, Any]:
    """The content of the file of a phase (:class:`_Remembering`); empty if there is none."""
    path, cure = memory_of(kind, run, phase), "delete it, and a new run is shown"
    content = read_json(path, cure=cure) if path.is_file() else {}
    shown = content.get("shown", {})
    if not (
        isinstance(content.get("id"), str | None)
        and isinstance(shown, dict)
        and all(isinstance(step, int) for step in shown.values())
    ):
        raise InputError(f"{path} does not say which run of {kind} is its own, and what that shows: {cure}")
    return content


def memory_of(kind: str, run: Path, phase: str) -> Path:
    """The file in which a sink keeps what it shows of a phase."""
    return run / f"{kind}-{phase}.json"


class _Remembering(Sink):
    """Keeps in a file of the run folder which run of the service is its own, and the last step shown of each tag."""

    remembers = True

    def __init__(self, kind: str, run: Path, phase: str) -> None:
        self.path, self.name = memory_of(kind, run, phase), f"{run.resolve().name}/{phase}"
        content = _remembered(kind, run, phase)
        self.id: str | None = content.get("id")
        self.shown: dict[str, int] = content.get("shown", {})
        self.is_finished = False

    def new(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """Return what of ``values`` no process has shown at ``step`` or later."""
        return {tag: value for tag, value in values.items() if self.shown.get(tag, -1) < step}

    def note(self, step: int, tags: Iterable[str]) -> None:
        """Note on the disk that ``tags`` are shown at ``step``."""
        self.shown |= dict.fromkeys(tags, step)
        self.write(self.shown)

    def write(self, shown: dict[str, int]) -> None:
        """Write the file."""
        write_json(self.path, {"id": self.id, "shown": shown, "finished": self.is_finished})

    def finished(self, *, is_last: bool) -> None:
        self.is_finished = True


WANDB_FLUSH = 20.0
"""Seconds after which W&B has what it was told on the disk (15), so that a kill of all its processes loses it not."""


class WandB(_Remembering):
    """A run of Weights & Biases; the package reads WANDB_MODE and the like."""

    def __init__(self, run: Path, phase: str) -> None:
        wandb: Any = import_module("wandb")
        super().__init__("wandb", run, phase)
        self.id = self.id or uuid.uuid4().hex
        project, settings = os.environ.get("WANDB_PROJECT") or "segkit", wandb.Settings(console="off", silent=True)
        facts = {"project": project, "name": self.name, "group": str(run), "dir": run}
        facts |= {"reinit": "create_new"}  # beside one that is open in a notebook, in place of writing into that
        self.run: Any = wandb.init(id=self.id, resume="allow", settings=settings, **facts)
        self.run.define_metric("*", step_metric="step")
        self.image, self.bins, self.html = wandb.Image, wandb.Histogram, wandb.Html
        self.markdown: Any = import_module("markdown").markdown  # TensorBoard's own
        self.write(self.shown)
        self.before, self.since = dict(self.shown), time.monotonic()

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        if new := self.new(step, values):
            self.run.log({"step": step, **new})
            self.note(step, new)

    def note(self, step: int, tags: Iterable[str]) -> None:
        """Note what is shown; on the disk stands what is older than W&B keeps in memory."""
        self.shown |= dict.fromkeys(tags, step)
        if time.monotonic() - self.since > WANDB_FLUSH:
            self.write(self.before)
            self.before, self.since = dict(self.shown), time.monotonic()

    def picture(self, step: int, tag: str, pixels: Any) -> None:
        self.scalars(step, {tag: self.image(pixels)})

    def histogram(self, step: int, tag: str, counts: Any, edges: Any) -> None:
        self.scalars(step, {tag: self.bins(np_histogram=(counts, edges))})

    def text(self, step: int, tag: str, text: str) -> None:
        self.scalars(step, {tag: self.html(self.markdown(text, extensions=["tables"]))})

    def describe(self, row: Row) -> None:
        self.run.config.update(row.values, allow_val_change=True)

    def close(self) -> None:
        self.run.finish()
        self.write(self.shown)


MLFLOW_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3"
"""Within a quarter of a minute; a server that is gone for longer shall not hold up the training."""


class MLflow(_Remembering):
    """A run of MLflow; the package reads MLFLOW_TRACKING_URI."""

    def __init__(self, run: Path, phase: str) -> None:
        super().__init__("mlflow", run, phase)
        os.environ.setdefault(*MLFLOW_RETRIES)
        self.mlflow: Any = import_module("mlflow")
        self.client = self.mlflow.MlflowClient()
        if self.id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "segkit"
            known = self.client.get_experiment_by_name(name)
            experiment = self.client.create_experiment(name) if known is None else known.experiment_id
            self.id = self.client.create_run(experiment, run_name=self.name).info.run_id
            self.write(self.shown)
        self.client.update_run(self.id, status="RUNNING")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        metric, now, new = self.mlflow.entities.Metric, int(1000 * time.time()), self.new(step, values)
        metrics = [metric(_mlflow_name(tag), value, now, step) for tag, value in new.items()]
        for at in range(0, len(metrics), 1000):  # it takes no more in one call
            self.client.log_batch(self.id, metrics=metrics[at : at + 1000])
        if new:
            self.note(step, new)

    def picture(self, step: int, tag: str, pixels: Any) -> None:
        self.client.log_image(self.id, pixels, f"{_mlflow_name(tag)}/{step:08d}.png")

    def text(self, step: int, tag: str, text: str) -> None:
        self.client.log_text(self.id, text, f"{_mlflow_name(tag)}.md")

    def describe(self, row: Row) -> None:
        for name, value in self.new(0, row.values).items():
            self.client.log_param(self.id, name, value)
        self.note(0, row.values)

    def close(self) -> None:
        self.client.set_terminated(self.id, "FINISHED" if self.is_finished else "KILLED")
        self.write(self.shown)


def _mlflow_name(tag: str) -> str:
    """Return ``tag`` with other letters than MLflow takes written as their numbers, and dots and slashes that name no
    place of their own, as in a path."""
    return re.sub(r"[^\w\-. /]|\.(?=\.)|(?<![^/])\.(?![^/])|(?<![^/])/|/$", lambda letter: f"_{ord(letter[0]):x}_", tag)
