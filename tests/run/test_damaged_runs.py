"""Damaged files of one's own run: a sentence with a cure that keeps the weights; and a score that does not exist."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from segkit.commands import compare, evaluate
from segkit.config.compose import compose as compose_config
from segkit.errors import InputError
from segkit.files import read_config_text
from segkit.report.runs import find_runs
from segkit.run import pipeline
from segkit.run.saved import open_run
from segkit.run.splits import open_phases
from segkit.synthetic.sample_maker import make_sample
from segkit.training import checkpoint

SMALL = (
    "schedule=single",
    "schedule.train.epochs=null",
    "schedule.train.steps=2",
    "dataset.crop=[32,32]",
    "batch_size=2",
    "loss=cross_entropy",
    "evaluation.every_epochs=null",
    "evaluation.pictures=0",
    "workers=0",
    "device=cpu",
    "log_every=1",
    "model=coplenet",
    "model.feature_channels=[4,8,16,32,64]",
    "model.num_groups=2",
)
PAINTED = ("dataset.reader.num_images=4", "dataset.reader.size=[64,64]")


def train(path: Path, *overrides: str) -> float:
    config = compose_config([*SMALL, f"cache_dir={path}.cache", *(overrides or PAINTED)])
    return pipeline.run(config, path, open_phases(config))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))


@pytest.mark.parametrize("content", ["", '{"a', "[]", "3"])
@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("config.yaml", "delete it to go on with the configuration of this command"),
        ("provenance.json", "delete it to go on; the checkpoints stay"),
        ("files.json.gz", "delete it to go on without the comparison"),
        ("train/results.json", "delete it, and the same command evaluates the last checkpoint"),
    ],
)
def test_a_damaged_file_is_named_with_a_cure(run, name, cure, content):
    (run / name).write_text(content)
    with pytest.raises(InputError, match=rf"{Path(name).name}.*{cure}") as caught:
        train(run)
    assert len(str(caught.value).splitlines()) == 1


def test_a_pipe_in_place_of_a_file_is_not_waited_for(run):
    (run / "files.json.gz").unlink()
    os.mkfifo(run / "files.json.gz")
    with pytest.raises(InputError, match=r"files\.json\.gz is a pipe .*delete it to go on without the comparison"):
        train(run)


def test_curves_that_are_whole_are_not_replaced_by_torn_ones(run):
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "train/metrics.jsonl").write_bytes(whole[: len(whole) // 2])
    train(run)
    assert (run / "metrics.jsonl").read_bytes() == whole


def test_a_file_system_without_links_is_refused_before_the_first_step(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EPERM, "Operation not permitted", str(arguments[1]))

    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(InputError, match=r"no links can be made in .*set hydra\.run\.dir to another file system"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_other_checkpoint_is_named_where_one_is_gone(run):
    (run / "checkpoints/last.pt").unlink()
    with pytest.raises(InputError, match=r"last\.pt is not there: .*give --checkpoint best, or name another run"):
        open_run(run).model()
    assert open_run(run).model("best")


@pytest.mark.filterwarnings("ignore:.*checksums.json is lost or damaged")
@pytest.mark.parametrize("entry", [{"optimizer": [1]}, {"optimizer": {}}, {"progress": {"step": "x"}}])
def test_a_state_of_another_type_is_named(run, entry):
    last = run / "train/checkpoints/last.pt"
    torch.save({**torch.load(last, weights_only=True), **entry}, last)
    for name in ("train/results.json", "train/checkpoints/checksums.json"):
        (run / name).unlink()
    with pytest.raises(
        InputError, match=r"last\.pt holds weights, but no state to go on from .* init_from=.*last\.pt$"
    ):
        train(run)


def test_a_configuration_that_is_parsed_once_is_each_readers_own(run):
    first, again = (read_config_text(run / "config.yaml") for _ in range(2))
    first["model"].clear()
    assert again["model"] == read_config_text(run / "config.yaml")["model"] != {}


def test_a_configuration_that_was_cut_off_is_no_other_configuration(run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text[: text.index("\noptimizer:")])
    cut = r"config\.yaml has no optimizer, as if it were cut off: "
    with pytest.raises(InputError, match=cut + "copy it again, or delete it to go on"):
        train(run)
    with pytest.raises(InputError, match=cut + r"copy the config\.yaml that segkit wrote"):
        open_run(run)


@pytest.mark.parametrize("name", ["config.yaml", "provenance.json", "train/results.json"])
def test_the_cure_works(run, name):
    before = (run / "train/results.json").read_text()
    weights = (run / "train/checkpoints/last.pt").read_bytes()
    (run / name).unlink()
    train(run)
    assert json.loads((run / "train/results.json").read_text())["mean_iou"] == json.loads(before)["mean_iou"]
    assert (run / "train/checkpoints/last.pt").read_bytes() == weights


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_lost_checksums_do_not_cost_the_weights(run, content):
    """The archive has checksums of its own; a flipped bit shows by them."""
    folder = run / "train" / "checkpoints"
    (run / "train/results.json").unlink()
    path = folder / "checksums.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.warns(UserWarning, match=r"checksums\.json is lost or damaged: it is written anew for last\.pt"):
        train(run)
    assert (run / "train/results.json").is_file()
    path.write_text("")
    for name in ("last.pt", "previous.pt"):
        if (folder / name).exists():
            flipped = bytearray((folder / name).read_bytes())
            flipped[len(flipped) // 2] ^= 1
            (folder / name).write_bytes(flipped)
    with (
        pytest.warns(UserWarning, match=r"written anew for best\.pt"),
        pytest.raises(InputError, match=r"but best\.pt is: start from its weights .* init_from=.*best\.pt"),
    ):
        checkpoint.find_last(folder)


@pytest.mark.parametrize("content", ["{", "{}"])
def test_damaged_label_counts_are_written_anew(run, content):
    path = run / "train" / "label_counts.json"
    whole = path.read_bytes()
    path.write_text(content)
    with pytest.raises(InputError, match="run the command that trained the run once more, which writes it anew"):
        open_run(run).label_counts()
    train(run)
    assert path.read_bytes() == whole


def test_what_compare_cannot_read_is_mended_by_the_command_that_trained_the_run(run):
    for name in ("train/label_counts.json", "metrics.jsonl"):
        whole = (run / name).read_text()
        (run / name).write_text(whole[:-9])
        with pytest.raises(InputError, match=r": give the command that trained the run again, which mends the file"):
            find_runs([run])
        train(run)
        assert (run / name).read_text() == whole
    results = run / "train/results.json"
    score = json.loads(results.read_text())
    results.write_text(json.dumps(score | {"protocol": 3}))
    with pytest.raises(InputError, match=r"or delete PHASE/results\.json in it and give the command that trained it"):
        find_runs([run])
    with pytest.raises(InputError, match="protocol that is not of keys and values, the file is damaged: delete it"):
        train(run)
    results.unlink()
    train(run)
    assert find_runs([run])[0][0].results["mean_iou"] == score["mean_iou"]


@pytest.mark.parametrize("name", ["results.json", "train/results.json", "train/metrics.jsonl", "per_image.npz"])
def test_a_folder_in_the_way_is_refused_before_the_first_step(tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(InputError, match=rf"{Path(name).name} is no file, and so in the way"):
        train(tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_disk_without_room_is_refused_before_the_first_step(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30, 1000))
    with pytest.raises(InputError, match=r"is on a disk with 0 MiB left, but the checkpoints of a phase need up to"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_split_without_a_valid_pixel_has_no_score(tmp_path, monkeypatch, capsys):
    """mean_iou is null, in the results, for compare and for evaluate."""
    root = make_sample("camvid", tmp_path / "data", num_images=4, scale=0.2)
    for path in (root / "valannot").iterdir():
        cv2.imwrite(str(path), np.full_like(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), 11))
    run = tmp_path / "run"
    assert math.isnan(train(run, "dataset=camvid", f"dataset.root={root}"))
    results = json.loads((run / "results.json").read_text())
    assert results["mean_iou"] is None
    assert results["num_classes_averaged"] == 0
    assert results["best"]["mean_iou"] is None
    monkeypatch.chdir(tmp_path)
    compare.run([str(run), "--output", "report.html", "--markdown", "table.md", "--csv", "t.csv", "--latex", "t.tex"])
    assert "0.00" not in (tmp_path / "table.md").read_text()
    evaluate.run([str(run), "--workers", "0", "--device", "cpu"])
    assert "nan" not in capsys.readouterr().out
