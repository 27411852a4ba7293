"""What TensorBoard shows, against the records and against plain arithmetic."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata

from segkit.config.compose import compose, config_dir
from segkit.config.targets import LOSS_OPTIONS
from segkit.data.loader import Batch
from segkit.evaluation import evaluate
from segkit.losses import CrossEntropyLoss, IouMarginLoss, MarginCalibrationLoss, margin_sums
from segkit.run import charts
from segkit.run.batches import PhaseBatches
from segkit.run.splits import open_phases
from segkit.training import distributed

NOT_SHOWN = {"_target_", "defaults", "terms", "compile_tiles", *LOSS_OPTIONS}
RHO = {"rho_k0": torch.tensor([0.1, 0.0, 0.2]), "rho_0k": torch.tensor([0.5, 1.0, 2.0])}


@pytest.mark.parametrize("path", sorted((config_dir() / "loss").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_argument_of_a_loss_is_a_hyper_parameter(path):
    node = OmegaConf.to_container(OmegaConf.load(path))
    for key, value in node.items():
        if key not in NOT_SHOWN:
            assert key in charts.HPARAMS
            value = math.inf if (key, value) == ("rho_max", "none") else value
            assert value is None or isinstance(value, str) == isinstance(charts.HPARAMS[key], str), key


def test_hyper_parameters_of_a_run():
    config = compose(["loss.tau=3", "model.encoder=tu-regnetx_002", "seed=7", "schedule=pretrain_finetune"])
    found = charts.hparams(config, "finetune", lr=0.5, num_steps=20)
    expected = {"loss": "margin calibration (paper)", "tau": 3.0, "upsilon": 1.0, "seed": 7, "lr": 0.5, "steps": 20}
    assert expected.items() <= found.items()
    assert found["model"] == "deeplabv3plus tu-regnetx_002"
    assert found["optimizer"] == "AdamW"
    assert found["schedule"] == "pretrain finetune"
    assert set(found) | set(charts.FIRST_HPARAMS) <= set(charts.HPARAMS)
    assert "clip_norm" not in found
    assert "rho_max" not in found
    uncapped = compose(["loss=margin_calibration_uncapped", "schedule=single"])
    assert charts.hparams(uncapped, "train", lr=0.5, num_steps=20)["rho_max"] == math.inf
    config = compose(["loss=cross_entropy_dice", "schedule=single"])
    assert charts.hparams(config, "train", lr=0.5, num_steps=20)["loss"] == "cross-entropy + dice"
    own = {"_target_": "mine.Focal", "alpha": [0.2, 0.8], "scale": 2.0, "gamma": 2, "steps": 3, "terms": 2}
    config = dataclasses.replace(config, loss=own, model={"_target_": "mine.net", "encoder": 50})
    found = charts.hparams(config, "train", lr=0.5, num_steps=20)
    assert (found["model"], found["loss"], found["gamma"], found["steps"]) == ("net", "focal", 2, 20)
    assert not found.keys() & {"alpha", "scale"}  # whose columns hold one number, and a text


def test_a_running_iou_is_shown_with_its_margins():
    loss = IouMarginLoss(num_classes=2, a=0.5)
    loss.start_from([[6, 2], [0, 2]])
    assert charts.running_iou(loss, ["road", "sky"]) == pytest.approx(
        {
            "running_iou/road": 0.75,
            "running_iou/sky": 0.5,
            "iou_margins/road": 0.5 * math.log(4 / 3),
            "iou_margins/sky": 0.5 * math.log(2),
        }
    )
    assert charts.running_iou(CrossEntropyLoss(), ["road", "sky"]) == {}


def test_errors_are_what_the_union_lacks():
    counts = np.array([[5, 1, 0], [2, 8, 0], [0, 0, 0]])
    found = charts.error_shares(counts, ["a", "b", "c"])
    assert found["union_false_positive/a"] == 2 / 8
    assert found["union_false_negative/a"] == 1 / 8
    assert found["union_false_positive/b"] == 1 / 11
    assert found["union_false_negative/b"] == 2 / 11
    assert np.isnan(found["union_false_positive/c"])


def test_an_observed_evaluation_sums_over_all_its_images():
    """The same predictions as without, and the margins of all images at the labels' size."""
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 3, 4, stride=4)
    observer = charts.LossObserver(MarginCalibrationLoss(**RHO))
    images = torch.randint(0, 256, (3, 3, 32, 24), dtype=torch.uint8)
    labels = torch.randint(0, 3, (3, 64, 48), dtype=torch.uint8)
    labels[1, :9] = 255
    batches = [
        Batch(images[:2], labels[:2], ["a", "b"], [0, 1]),
        Batch(images[2:], labels[2:], ["c"], [2]),
    ]

    def model(images):
        return net(images.float() / 255)

    model.training, model.eval, model.train = False, lambda: None, lambda mode: None
    plain = evaluate(model, batches, num_classes=3)
    observed = charts.ObservedEvaluation(observer)
    watched = evaluate(model, observed.batches(batches), num_classes=3, predict=observed.predict)
    assert np.array_equal(plain.counts, watched.counts)
    with torch.no_grad():
        expected = margin_sums(model(images), labels.long(), **RHO)
    assert observed.sums.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(observed.sums[name].clone(), value, rtol=1e-5, atol=1e-5)
    assert observer.take() == {}  # an evaluation is no training


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:very few training pixels:UserWarning")
@pytest.mark.filterwarnings("ignore:no training pixel:UserWarning")
def test_what_a_run_shows(tmp_path):
    """A score of a class is a chart of its own, one line a run; the bound stands at the steps of the mean IoU."""
    from segkit.run import pipeline

    small = ["debug=smoke", "limit_steps=4", "batch_size=2", "dataset.crop=[64,64]", "device=cpu"]
    small += ["model=deeplabv3plus_tiny", "dataset.reader.num_images=6", "dataset.reader.size=[64,64]", "log_every=2"]
    config = compose(
        [*small, "schedule=single", "loss.diagnostics=true", "evaluation.every_steps=2", f"cache_dir={tmp_path}/cache"]
    )
    pipeline.run(config, tmp_path / "run", open_phases(config))
    found = EventAccumulator(str(tmp_path / "run" / "train"))
    found.Reload()
    scalars = found.Tags()["scalars"]
    scored = "iou", "recall", "union_false_negative", "margins_inside_0k", "margins_mean_margin"
    assert {f"{score}/{label}" for score in scored for label in ("sky", "road")} <= set(scalars)
    assert "custom_scalars__config__" not in found.Tags()["tensors"]  # its charts mix the classes of all runs
    score, bound, fixed = (found.Scalars(f"curves/mean_iou{suffix}") for suffix in ("", "_bound", "_bound_fixed"))
    assert [event.step for event in score] == [event.step for event in bound] == [2, 4]
    assert all(lower.value <= upper.value for lower, upper in zip(fixed, bound, strict=True))
    assert {"lambda", "lambda_of_class/road"} <= set(found.Tags()["histograms"])
    assert "val/image_label_prediction" in found.Tags()["images"]
    text = found.Tensors("margins/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| class | share of the pixels | rho_0k, logits | rho_k0, logits |" in text
    assert text.count("\n") == 1 + sum(tag.startswith("iou/") for tag in scalars)
    sections = list(dict.fromkeys(tag.split("/")[0] for tag in sorted(scalars)))
    assert sections[:2] == ["curves", "iou"]  # the two that TensorBoard opens
    assert all(len(found.Scalars(tag)) > 1 for tag in scalars)  # a chart of one point shows nothing
    contents = found.PluginTagToContent(hparams_metadata.PLUGIN_NAME)
    start = hparams_metadata.parse_session_start_info_plugin_data(contents[hparams_metadata.SESSION_START_INFO_TAG])
    assert start.hparams["tau"].number_value == 10.0
    assert hparams_metadata.SESSION_END_INFO_TAG in contents


def test_pictures_come_from_all_over_the_split():
    def spread(wanted, *, images, most=None, fixed=None):
        config = SimpleNamespace(evaluation=SimpleNamespace(max_images=most))
        batches = PhaseBatches.__new__(PhaseBatches)
        vars(batches).update(config=config, splits=SimpleNamespace(train=range(7), val=range(images)), fixed=fixed)
        return sorted(batches.spread(wanted))

    assert spread(4, images=100) == [0, 25, 50, 75]
    assert spread(4, images=3) == [0, 1, 2]
    assert spread(0, images=3) == []
    assert spread(2, images=100, most=10) == [0, 5]
    assert spread(2, images=100, fixed=[SimpleNamespace(names=["a", "b"])]) == [0, 1]


def test_repeated_batches_have_other_numbers_on_every_rank(monkeypatch):
    """An evaluation gathers images by their numbers, and each of two ranks repeats its own."""
    batches = PhaseBatches.__new__(PhaseBatches)
    vars(batches).update(fixed=[Batch(torch.zeros(2), torch.zeros(2), ["a", "b"], [7, 3])] * 2)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found += [number for batch in batches.evaluation() for number in batch.indices]
    assert sorted(found) == list(range(8))
    assert sorted(batches.spread(4)) == [0, 2, 4, 6]
