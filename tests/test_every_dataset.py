"""Every data set from its official layout to trained weights: draw a sample, check it, train two epochs."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from segkit.check.check import check
from segkit.check.report import as_text, to_json
from segkit.config.compose import compose
from segkit.run.splits import open_phases
from segkit.synthetic.sample_maker import WRITERS, make_sample

# Small enough for two cores; what is read, mapped, resized and counted is that of the real configuration.
SMALL = [
    "model=coplenet",
    "model.feature_channels=[4,8,16,32,64]",
    "model.num_groups=2",
    "dataset.crop=[48,64]",
    "dataset.eval_resize={short_side:null,size:[48,64]}",
    "dataset.recipe.epochs=2",
    "dataset.recipe.finetune_epochs=2",
    "dataset.recipe.batch_size=2",
    "dataset.recipe.evaluate_every=1",
    "evaluation.pictures=1",
    "workers=0",
    "device=cpu",
]


@pytest.fixture(scope="module", params=sorted(WRITERS))
def sample(request, tmp_path_factory):
    """The configuration of a run on a sample of one data set, with the phases that the data set's recipe has."""
    folder = tmp_path_factory.mktemp("sample")
    return small_config(request.param, make_sample(request.param, folder / "data", num_images=4, scale=0.1), folder)


@pytest.fixture
def config(sample, tmp_path):
    """A copy of it with a cache of its own."""
    return replace(copy.deepcopy(sample), cache_dir=str(tmp_path / "cache"))


def small_config(name, root, tmp_path):
    return compose([f"dataset={name}", f"dataset.root={root}", f"cache_dir={tmp_path / 'cache'}", *SMALL])


def test_every_real_data_set_is_here():
    names = {"voc", "cityscapes", "ade20k", "cocostuff10k", "bdd100k", "mapillary", "robotic_instrument", "camvid"}
    assert names | {"cityscapes_coarse", "folder"} == set(WRITERS)


def test_check_finds_no_error(config):
    report = check(config)
    content = to_json(report)
    errors = [item["text"] for item in content["findings"] if item["level"] == "error"]
    assert errors == []
    for split in content["splits"]:
        assert split["num_checked"] == split["num_images"] > 0
        assert split["num_broken"] == 0
        assert all(row["pixels"] > 0 for row in split["classes"].values())
    measured = content["rehearsal"]
    assert [phase["name"] for phase in measured["phases"]] == list(config.schedule)
    assert measured["estimated_seconds"] > 0
    assert math.isfinite(measured["estimated_seconds"])
    assert measured["peak_memory"] > 2**20
    assert as_text(content).splitlines()[-1].startswith("verdict: ")


@pytest.mark.filterwarnings("ignore:very few training pixels:UserWarning")  # of a class, in four small images
def test_two_epochs_of_training(config, tmp_path):
    from segkit.run import pipeline

    phases = open_phases(config)
    score = pipeline.run(config, tmp_path / "run", phases)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    num_classes = next(iter(phases.values())).train.num_classes
    assert results["mean_iou"] == score
    assert 0 <= score <= 1
    assert len(results["classes"]) == num_classes
    last = next(reversed(phases.values()))
    assert results["num_images"] == len(last.val)
    for name, splits in phases.items():
        rows = [json.loads(line) for line in (tmp_path / "run" / name / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if row["split"] == "train"]
        assert losses
        assert np.isfinite(losses).all()
        steps = 2 * max(1, len(splits.train) // 2)
        assert rows[-1]["step"] == steps
        assert [row["step"] for row in rows if row["split"] == "val"] == [steps // 2, steps]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "folder"),
    [("camvid", "CamVid"), ("ade20k", "samples/ade20k"), ("cocostuff10k", "samples/cocostuff10k"),
     ("cityscapes", "samples/cityscapes"), ("robotic_instrument", "samples/endovis2017")],
)  # fmt: skip
def test_check_of_real_files(name, folder, shared_data, tmp_path):
    """What little there is of the real data sets holds nothing that cannot be read or that no table knows."""
    config = small_config(name, shared_data / folder, tmp_path)
    content = to_json(check(config, sample=10, rehearses=name == "camvid"))
    assert content["splits"]  # of some data sets there are files of one split only
    for split in content["splits"]:
        assert split["num_broken"] == 0
        assert all(row["train"] is not None for row in split["raw_values"])
        assert sum(row["pixels"] for row in split["raw_values"]) > 0
    if name == "camvid":
        assert content["verdict"] == "ok", content["findings"]
        assert content["rehearsal"]["phases"][0]["num_steps"] == 2 * (367 // 2)
