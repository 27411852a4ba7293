"""Sinks beside TensorBoard: what each shows after a resume, without a network, with the packages themselves."""

from __future__ import annotations

import json
import struct
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from unittest.mock import MagicMock

import numpy as np
import pytest

from segkit.errors import InputError
from segkit.training import sinks
from segkit.training.tracking import Tracker

PICTURE = np.zeros((4, 6, 3), np.uint8)


def train(folder, steps, *, kind, is_finished=False):
    """A process that goes on from a checkpoint at the step before ``steps``, the second phase of a run."""
    run = folder.parent / "metrics.jsonl"
    tracker = Tracker(folder, phase="train", run_metrics=run, num_steps=9, offset=100, kind=kind)
    tracker.truncate(10**6 if steps[0] > 1 else 0, step=steps[0] - 1)
    if steps[0] == 1:
        row = sinks.Row({"lr": 0.1, "loss": "dice"}, {"lr": 0.0, "loss": "", "tau": 0.0}, [], [])
        tracker.describe(row)
        tracker.text("margins", "| class | rho_0k |\n|---|---|\n| \\*sky\\* | 2 |")
    for step in steps:
        tracker.training(step, {"loss": float(step), "lr": 0.5 / step})
        if step % 2 == 0:
            classes = {"traffic (sign)": {"iou": 0.5}, "absent": {"iou": None}}
            tracker.evaluation(step, {"mean_iou": step / 10, "classes": classes})
            tracker.pictures(step, "val/pictures", PICTURE)
            tracker.histogram(step, "lambda", np.array([0, 2, 1]), np.array([-1.0, 0.0, 1.0, 2.0]))
    if is_finished:
        tracker.finished()
    tracker.close()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run" / "train").mkdir(parents=True)
    return tmp_path / "run" / "train"


class Fake(sinks.Sink):
    """Notes what it is told; fails at a step."""

    def __init__(self, fails_at=None):
        self.told, self.fails_at = [], fails_at

    def scalars(self, step, values):
        if step == self.fails_at:
            raise ConnectionError("no route to host")
        self.told += [(step, tag, value) for tag, value in values.items()]

    def picture(self, step, tag, pixels):
        self.told.append((step, tag, pixels.shape))

    def describe(self, row):
        self.told.append(("row", row.values))

    def close(self):
        self.told.append("closed")


TWO_STEPS = [
    (101, "curves/loss", 1.0),
    (101, "train/lr", 0.5),
    (102, "curves/loss", 2.0),
    (102, "train/lr", 0.25),
    (102, "curves/mean_iou", 0.2),
    (102, "iou/traffic (sign)", 0.5),
]


def test_a_sink_is_told_everything(folder, monkeypatch):
    fake, asked = Fake(), []
    monkeypatch.setattr(sinks, "open_sink", lambda kind, place, **options: asked.append((kind, place, options)) or fake)
    train(folder, range(1, 3), kind="tensorboard")
    assert asked == [("tensorboard", folder, {"phase": "train", "run": folder.parent, "purge_step": None})]
    assert fake.told == [
        ("row", {"lr": 0.1, "loss": "dice"}),
        *TWO_STEPS,
        (102, "val/pictures", (4, 6, 3)),
        "closed",
    ]


def test_a_sink_that_fails_does_not_end_the_run(folder, monkeypatch, recwarn):
    fake = Fake(fails_at=103)
    monkeypatch.setattr(sinks, "open_sink", lambda *_, **__: fake)
    train(folder, range(1, 9), kind="mlflow")
    (warning,) = recwarn
    assert "tracker=mlflow failed (no route to host): from here on the curves of phase train" in str(warning.message)
    assert {entry[0] for entry in fake.told if isinstance(entry[0], int)} == {101, 102}
    assert fake.told.count("closed") == 1
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 12


def test_a_service_is_shown_what_it_lacks_of_the_records(folder, monkeypatch):
    """As those of a phase from the cache, which another run has trained; once, and with its scores."""
    train(folder, range(1, 3), kind="none")
    fake = Fake()
    fake.remembers = True
    monkeypatch.setattr(sinks, "open_sink", lambda *_, **__: fake)
    run = folder.parent
    tracker = Tracker(folder, phase="train", run_metrics=run / "metrics.jsonl", num_steps=2, offset=100, kind="mlflow")
    tracker.show_finished(is_last=False)
    assert fake.told == [*TWO_STEPS, "closed"]
    (run / "mlflow-train.json").write_text('{"id": "a", "shown": {}, "finished": true}')
    tracker.show_finished(is_last=False)
    assert fake.told.count("closed") == 1


@pytest.mark.filterwarnings("ignore:.*has lost")
def test_wandb_is_told_again_what_a_kill_may_have_lost(folder, monkeypatch):
    """It keeps some seconds of what it is told in memory; and a run of the user's own beside it stays as it is."""
    told, asked = [], []
    package = MagicMock()
    package.init = lambda **options: asked.append(options) or MagicMock(log=told.append)
    monkeypatch.setitem(sys.modules, "wandb", package)
    killed = sinks.WandB(folder.parent, "train")
    killed.scalars(1, {"a": 1.0})
    monkeypatch.setattr(sinks, "WANDB_FLUSH", -1)
    killed.scalars(2, {"a": 2.0})
    killed.scalars(3, {"a": 3.0})
    again = sinks.WandB(folder.parent, "train")
    for step in (1, 2, 3, 4):
        again.scalars(step, {"a": float(step)})
    again.close()
    sinks.WandB(folder.parent, "train").scalars(4, {"a": 4.0})
    assert [row["step"] for row in told] == [1, 2, 3, 3, 4]
    assert {(options["id"], options["reinit"]) for options in asked} == {(again.id, "create_new")}
    train(folder, range(1, 5), kind="none")
    killed.path.write_text('{"id": "a", "shown": {"curves/loss": 101}}')
    train(folder, range(5, 7), kind="wandb")
    assert [row["step"] for row in told if "curves/loss" in row] == [102, 103, 104, 105, 106]


@pytest.mark.parametrize("content", ["{", "[]", '{"id": 3}', '{"shown": [1]}', '{"shown": {"a": "b"}}'])
def test_a_damaged_file_of_what_is_shown_is_named(folder, content):
    (folder.parent / "mlflow-train.json").write_text(content)
    tracker = Tracker(folder, phase="train", run_metrics=folder.parent / "metrics.jsonl", num_steps=1, kind="mlflow")
    with pytest.raises(InputError, match=r"mlflow-train\.json .*: delete it, and a new run is shown"):
        tracker.show_finished(is_last=True)


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("iou/traffic (sign)", "iou/traffic _28_sign_29_"),
        ("iou/etc.", "iou/etc."),
        ("iou/../a..b", "iou/_2e_./a_2e_.b"),
        ("iou/.", "iou/_2e_"),
        ("iou/./a", "iou/_2e_/a"),
        ("iou//a/", "iou/_2f_a_2f_"),
        ("/a", "_2f_a"),
        ("iou/pré .a", "iou/pré .a"),
    ],
)
def test_a_name_that_mlflow_takes(tag, name):
    assert sinks._mlflow_name(tag) == name
    if find_spec("mlflow"):
        import_module("mlflow.utils.validation")._validate_metric_name(name)


def test_a_sink_that_cannot_be_opened_is_refused_at_the_start(folder, monkeypatch):
    asked = []

    def no_login(*_, **__):
        raise RuntimeError("\nno API key.\nUsage: log in" if not asked else "1 validation error for X\nmode\n  not 'x'")

    monkeypatch.setattr(sinks, "open_sink", no_login)
    tracker = Tracker(folder, phase="train", num_steps=1, kind="wandb")
    with pytest.raises(InputError, match=r"tracker=wandb cannot be opened \(no API key\): .* or set tracker=none"):
        tracker.open()
    asked.append(folder.joinpath("wandb-train.json").write_text("{}"))
    message = r"\(mode not 'x'\): mend that, delete .*/wandb-train.json for a new run there, or set"
    with pytest.raises(InputError, match=message):
        tracker.open()


def test_a_missing_package_is_refused_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "modules", {name: item for name, item in sys.modules.items() if name != "wandb"})
    (tmp_path / "wandb").mkdir()  # what wandb leaves in the folder that it ran in
    with pytest.raises(InputError, match=r"tracker=wandb needs a package .*: pip install 'segkit\[wandb\]'"):
        sinks.check_tracker("wandb")
    sinks.check_tracker("none")
    sinks.check_tracker("tensorboard")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "http://me:secret@127.0.0.1:9",
            r"URI is http://127\.0\.0\.1:9, which cannot be reached \(.*refused\): ",
        ),
        ("http://[::1", r"URI is http://\[::1, which cannot be reached"),
        ("http://host:port/x", r"URI is http://host:port, which cannot be reached"),
        ("sqlite:////nowhere/mlflow.db", r"URI is sqlite:.*\(/nowhere is no folder that can be written\): correct it"),
    ],
)
def test_a_place_of_mlflow_that_is_not_there_is_refused_at_once(monkeypatch, place, message):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    with pytest.raises(InputError, match=message) as caught:
        sinks.check_tracker("mlflow")
    assert "secret" not in str(caught.value)
    sinks.check_tracker("tensorboard")


def test_none_writes_metrics_alone(folder):
    train(folder, range(1, 5), kind="none")
    assert {path.name for path in folder.rglob("*")} == {"metrics.jsonl"}
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6


EXPECTED = {
    "curves/loss": [(100 + step, float(step)) for step in range(1, 9)],
    "train/lr": [(100 + step, 0.5 / step) for step in range(1, 9)],
    "curves/mean_iou": [(100 + step, step / 10) for step in (2, 4, 6, 8)],
}
"""After a process that was killed at step 5, and one that went on from the checkpoint of step 3."""


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore", "error:tracker")  # those of the package, and not ours
def test_mlflow_shows_every_step_once(folder, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_ARTIFACTS_DESTINATION", str(tmp_path / "artifacts"))
    monkeypatch.chdir(tmp_path)
    train(folder, range(1, 6), kind="mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("segkit").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "KILLED"
    train(folder, range(4, 9), kind="mlflow", is_finished=True)
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run/train")
    assert run.data.params == {"lr": "0.1", "loss": "dice"}
    for tag, expected in EXPECTED.items():
        assert [(item.step, item.value) for item in client.get_metric_history(run.info.run_id, tag)] == expected, tag
    assert len(client.get_metric_history(run.info.run_id, "iou/traffic _28_sign_29_")) == 4
    pictures = [item.path for item in client.list_artifacts(run.info.run_id, "val/pictures")]
    assert pictures == [f"val/pictures/00000{step}.png" for step in (102, 104, 106, 108)]


def log_records(content):
    """The records of a file in the log format of LevelDB: blocks of 32 KiB with pieces of a header and data each."""
    at, record, block = 7, b"", 2**15  # seven bytes say what file it is
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block  # a block's end without room for a header is empty
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@pytest.mark.filterwarnings("ignore", "error:tracker")  # those of the package, and not ours
def test_wandb_shows_every_step_once(folder, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (range(1, 6), range(4, 9)):
        train(folder, steps, kind="wandb")
        wandb.teardown()  # as the end of a process
        time.sleep(1.01)  # the package names a folder by the second
    found, ids, config = {}, set(), {}
    for path in sorted(folder.parent.glob("wandb/offline-run-*/*.wandb")):
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            items = [
                (item.nested_key[0] if item.nested_key else item.key, item.value_json) for item in record.history.item
            ]
            row = {tag: json.loads(value) for tag, value in items}
            for tag, value in row.items():
                found.setdefault(tag, []).append((row["step"], value))
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
    assert ids == {json.loads((folder.parent / "wandb-train.json").read_text())["id"]}
    assert (config["lr"], config["loss"]) == (0.1, "dice")
    for tag, expected in EXPECTED.items():
        assert found[tag] == expected, tag
    (path,) = folder.parent.glob("wandb/offline-run-*/files/media/html/margins_*.html")
    assert [step for step, _ in found["margins"]] == [100]
    assert "<td>*sky*</td>\n<td>2</td>" in path.read_text()
    for tag in ("val/pictures", "lambda", "iou/traffic (sign)"):
        assert [step for step, _ in found[tag]] == [102, 104, 106, 108], tag
