"""TensorBoard's files as TensorBoard reads them."""

from __future__ import annotations

import time

import numpy as np
import pytest
from small_trainer import build, make_batches, records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from segkit.errors import Interrupted
from segkit.training import checkpoint
from segkit.training.sinks import Row
from segkit.training.tracking import Tracker


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    return found


def hparams_of(found):
    """The three parts of a row of the table of hyper-parameters; None for one that is not there."""
    by_tag = found.PluginTagToContent(metadata.PLUGIN_NAME)
    parse = {
        metadata.EXPERIMENT_TAG: metadata.parse_experiment_plugin_data,
        metadata.SESSION_START_INFO_TAG: metadata.parse_session_start_info_plugin_data,
        metadata.SESSION_END_INFO_TAG: metadata.parse_session_end_info_plugin_data,
    }
    return [function(by_tag[tag]) if tag in by_tag else None for tag, function in parse.items()]


def train(folder, *, killed_at=None, **numbers):
    """A run with a checkpoint every 4 steps; without one of the step that it is killed at."""
    steps = iter(range(1, 100))
    trainer = build(
        folder,
        stop=lambda: next(steps) == killed_at,
        **{"evaluate_every": 4, "log_every": 2, "checkpoint_every": 4, **numbers},
    )

    def validate(model, step):
        trainer.tracker.scalars(step, {"val/mean_iou": step / 100})
        return {"mean_iou": step / 100}

    save, trainer.validate = trainer.save, validate
    trainer.save = lambda must=False: None if trainer.progress.step == killed_at else save(must=must)
    last = checkpoint.find_last(folder / "checkpoints")
    if last is None:
        trainer.tracker.truncate(0, step=0)
    else:
        trainer.restore(checkpoint.load(last))
    try:
        trainer.fit(make_batches)
    finally:
        trainer.tracker.close()


@pytest.mark.parametrize("killed_at", [3, 4, 5, 7])
def test_a_resumed_run_shows_every_step_once(tmp_path, killed_at):
    """Killed before the first checkpoint, or after one whose evaluation is shown already."""
    train(tmp_path / "a")
    with pytest.raises(Interrupted):
        train(tmp_path / "b", killed_at=killed_at)
    train(tmp_path / "b")
    whole, resumed = events(tmp_path / "a"), events(tmp_path / "b")
    tags = {"curves/loss", "train/lr", "train/grad_norm", "val/mean_iou"}
    assert tags <= set(whole.Tags()["scalars"])
    steps = [[event.step for event in found.Scalars("speed/images_per_second")] for found in (whole, resumed)]
    assert steps[0] == steps[1]
    for tag in tags:
        one, other = ([(event.step, event.value) for event in found.Scalars(tag)] for found in (whole, resumed))
        assert one == other, tag


class Clock:
    """A clock that stands still but for sleeping."""

    def __init__(self, monkeypatch):
        self.now = 1_700_000_000.25
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.now += seconds


def show_steps(folder, steps, **options):
    """A process that shows ``steps``, going on from a checkpoint of the first of them."""
    tracker = Tracker(folder, phase="train", num_steps=9, **options)
    tracker.truncate(0, step=steps[0])
    for step in steps:
        tracker.scalars(step, {"curves/loss": float(step)})
    tracker.close()


def test_a_writer_of_the_same_second_purges_the_one_before(tmp_path, monkeypatch):
    """TensorBoard orders the files by name: the second, then the host, the process and a number as text."""
    clock = Clock(monkeypatch)
    show_steps(tmp_path, range(1, 8))
    (first,) = tmp_path.rglob("events*")
    first = first.rename(first.with_name(f"events.out.tfevents.{int(clock.now)}.zzz.9.9"))
    show_steps(tmp_path, range(4, 10))
    (second,) = set(tmp_path.rglob("events*")) - {first}
    assert second.name > first.name
    assert [event.step for event in events(tmp_path).Scalars("curves/loss")] == list(range(1, 10))


def test_a_writer_whose_clock_is_far_behind_says_so_and_does_not_wait(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    show_steps(tmp_path, range(1, 8))
    clock.now -= 3600
    begun = clock.now
    with pytest.warns(UserWarning, match="a clock that is 3601 seconds ahead of this machine's"):
        show_steps(tmp_path, range(4, 10))
    assert clock.now == begun


def test_phases_stand_on_one_axis_and_resume_on_it(tmp_path):
    """metrics.jsonl counts the steps of its phase, the curves those of the run; both lose what is trained again."""

    def process(steps, size):
        tracker = Tracker(tmp_path, phase="finetune", num_steps=9, offset=100)
        tracker.truncate(size, step=steps[0] - 1)
        sizes = []
        for step in steps:
            tracker.training(step, {"loss": float(step), "lr": 0.1})
            sizes.append(tracker.size())
        tracker.text("margins", "a text")
        tracker.close()
        return sizes

    sizes = process(range(1, 6), 0)
    process(range(4, 8), sizes[2])
    found = events(tmp_path)
    for tag in ("curves/loss", "train/lr"):
        assert [event.step for event in found.Scalars(tag)] == list(range(101, 108))
    assert [event.value for event in found.Scalars("curves/loss")] == list(range(1, 8))
    assert found.Tensors("margins/text_summary")[0].step == 100
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 8))


def test_histogram_of_counts(tmp_path):
    tracker = Tracker(tmp_path, phase="train", num_steps=1)
    edges = np.array([-4.0, -1.0, 0.0, 1.0, 4.0])
    tracker.histogram(3, "lambda", np.array([0, 2, 5, 0]), edges)
    tracker.histogram(3, "empty", np.zeros(4), edges)
    tracker.close()
    found = events(tmp_path)
    assert found.Tags()["histograms"] == ["lambda"]
    (event,) = found.Histograms("lambda")
    shown = event.histogram_value
    assert (event.step, shown.num, shown.min, shown.max) == (3, 7, -1.0, 1.0)
    assert (list(shown.bucket), list(shown.bucket_limit)) == ([2, 5], [0.0, 1.0])


def test_hyper_parameters_are_of_the_run_itself(tmp_path):
    tracker = Tracker(tmp_path, phase="train", num_steps=1)
    columns = {"loss": "", "lr": 0.0, "tau": 0.0}
    row = Row({"loss": "dice", "lr": 0.1}, columns, ["tau"], ["curves/mean_iou"])
    tracker.describe(row)
    tracker.close()
    found = events(tmp_path)
    experiment, start, end = hparams_of(found)
    assert {item.name: item.type for item in experiment.hparam_infos} == {"loss": 1, "lr": 3, "tau": 3}
    assert [item.name for item in experiment.hparam_infos if item.differs] == ["tau"]
    assert [item.name.tag for item in experiment.metric_infos] == ["curves/mean_iou"]
    assert start.hparams["loss"].string_value == "dice"
    assert start.hparams["lr"].number_value == 0.1
    assert set(start.hparams) == {"loss", "lr"}
    assert end is None
    assert [path.parent for path in tmp_path.rglob("events*")] == [tmp_path]

    tracker = Tracker(tmp_path, phase="train", num_steps=1)
    tracker.finished()
    tracker.close()
    assert hparams_of(events(tmp_path))[2].status == 1  # success


def test_a_rank_that_does_not_write_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = Tracker(None, phase="train", num_steps=1)
    tracker.describe(Row({}, {}, [], []))
    tracker.text("a", "b")
    tracker.histogram(0, "a", np.ones(2), np.arange(3))
    tracker.finished()
    tracker.close()
    assert list(tmp_path.iterdir()) == []
