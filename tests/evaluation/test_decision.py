"""A bias per class: the sample is unbiased, the tuned score never falls, and a constructed bias is found."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segkit.errors import InputError
from segkit.evaluation import decision, evaluate, metrics
from segkit.evaluation.decision import (
    BiasedModel,
    LogitSample,
    bias_from_json,
    collect_logits,
    tune_bias,
    weighted_mean_iou,
)


class Batch(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor
    names: list[str]
    indices: list[int]


def skewed_sample(seed=0, num=4000, num_classes=5, weights=None):
    """Noisy logits of pixels with very unequal classes; the rare ones are scored too low."""
    rng = np.random.default_rng(seed)
    share = 0.6 ** np.arange(num_classes)
    target = rng.choice(num_classes, num, p=share / share.sum())
    logits = rng.normal(0, 1.5, (num, num_classes)).astype(np.float32)
    logits[np.arange(num), target] += 5
    logits -= 2 * np.arange(num_classes)
    weights = np.ones(num) if weights is None else weights
    return LogitSample(logits, target, weights, 3)


def mean_iou_by_matrix(sample, bias):
    num_classes = sample.logits.shape[1]
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (sample.target, (sample.logits + bias).argmax(1)), sample.weights)
    tp, rows, columns = np.diag(counts), counts.sum(1), counts.sum(0)
    return np.mean([tp[k] / (rows[k] + columns[k] - tp[k]) for k in range(num_classes) if rows[k] + columns[k]])


def test_the_objective_is_the_weighted_mean_iou():
    sample = skewed_sample(weights=np.random.default_rng(1).uniform(0.5, 2, 4000))
    for bias in (np.zeros(5), np.arange(5.0)):
        assert weighted_mean_iou(sample, bias) == pytest.approx(mean_iou_by_matrix(sample, bias))


@pytest.mark.parametrize("k", range(5))
def test_one_pass_gives_the_objective_of_every_candidate(k):
    sample = skewed_sample(num=500, weights=np.random.default_rng(1).uniform(0.5, 2, 500))
    shifts = np.linspace(-6, 6, 41).astype(np.float32)
    bias = np.array([0.3, -0.2, 0.1, 1.0, 0.0], np.float32)
    sample.target[sample.target == 4] = 3  # without target pixels a class counts where it is predicted
    found = decision._objective_of_candidates(sample, sample.logits + bias, k, shifts)
    for shift, value in zip(shifts, found, strict=True):
        assert value == pytest.approx(mean_iou_by_matrix(sample, bias + shift * (np.arange(5) == k)), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_tuned_score_never_falls_and_carries_over(seed):
    tuned, other = skewed_sample(seed), skewed_sample(seed + 100)
    result = tune_bias(tuned)
    assert result.mean_iou_before == pytest.approx(mean_iou_by_matrix(tuned, 0))
    assert result.mean_iou_after == pytest.approx(mean_iou_by_matrix(tuned, result.bias))
    # The logits of class k are 2 k too low: most of that comes back.
    assert result.mean_iou_after > result.mean_iou_before + 0.3
    assert mean_iou_by_matrix(other, result.bias) > mean_iou_by_matrix(other, 0) + 0.3


def test_nothing_is_changed_where_nothing_can_be_gained():
    target = np.arange(100) % 4
    perfect = LogitSample(np.eye(4, dtype=np.float32)[target] * 9, target, np.ones(100), 1)
    result = tune_bias(perfect)
    assert result.mean_iou_before == result.mean_iou_after == 1
    assert (result.bias == 0).all()


@pytest.mark.parametrize("shift", [2, 4, 12])
def test_classes_without_target_pixels_keep_the_bias_zero_and_take_no_pixel_from_others(shift):
    sample = skewed_sample()
    kept = sample.target != 4
    sample = LogitSample(sample.logits[kept], sample.target[kept], sample.weights[kept], 3)
    sample.logits[:, 4] += shift
    result = tune_bias(sample)
    before, after = ((sample.logits + bias).argmax(1) == 4 for bias in (0, result.bias))
    assert result.bias[4] == 0
    assert not (after & ~before).any()
    assert result.mean_iou_after == pytest.approx(mean_iou_by_matrix(sample, result.bias))
    assert result.mean_iou_after > result.mean_iou_before


class Fixed(nn.Module):
    """Gives stored logits, whatever the images."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits[: len(images)]


def test_collected_logits_are_those_of_the_enlarged_map_and_the_weights_make_the_counts_fair():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 8, generator=generator)
    labels = torch.zeros(2, 24, 32, dtype=torch.uint8)
    labels[:, 4:8, 4:6] = 1
    labels[:, 10:13, 20:26] = 255
    labels[1, 10:, :3] = 2
    model = Fixed(logits).train()
    batch = Batch(torch.zeros(2, 3, 24, 32, dtype=torch.uint8), labels, ["a", "b"], [0, 1])
    sample = collect_logits(model, [batch], num_classes=3, pixels_per_image=30000)
    assert model.training
    assert sample.logits.shape == (60000, 3)
    assert sample.num_images == 2
    full = F.interpolate(logits, size=(24, 32), mode="bilinear").permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    distance = np.abs(sample.logits[::97, None] - full[None]).sum(-1)
    nearest = distance.argmin(1)
    assert distance.min(1).max() < 1e-4
    np.testing.assert_array_equal(sample.target[::97], labels.reshape(-1).numpy()[nearest])
    true = np.bincount(labels.reshape(-1), minlength=256)[:3]
    estimated = np.bincount(sample.target, sample.weights, 3)
    np.testing.assert_allclose(estimated, true, rtol=0.06)
    assert (sample.target == 1).mean() > 0.15, "a class of 16 pixels is well represented"

    counts = np.zeros((3, 3), np.int64)
    flat = labels.reshape(-1).numpy()
    np.add.at(counts, (flat[flat < 3], full.argmax(1)[flat < 3]), 1)
    assert weighted_mean_iou(sample, np.zeros(3)) == pytest.approx(metrics.mean_iou(counts), abs=0.02)
    again = collect_logits(model, [batch], num_classes=3, pixels_per_image=30000)
    np.testing.assert_array_equal(again.logits, sample.logits)


def test_a_tuned_model_scores_higher_on_its_images():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(4, 20, 20, generator=generator) < 0.1).to(torch.uint8)
    logits = torch.randn(4, 2, 20, 20, generator=generator)
    logits.scatter_add_(1, labels[:, None].long(), torch.full((4, 1, 20, 20), 2.0))
    logits[:, 1] -= 3
    model = Fixed(logits)
    batch = Batch(torch.zeros(4, 3, 20, 20, dtype=torch.uint8), labels, list("abcd"), [0, 1, 2, 3])
    result = tune_bias(collect_logits(model, [batch], num_classes=2))
    before, after = (
        metrics.mean_iou(evaluate(one, [batch], num_classes=2).counts)
        for one in (model, BiasedModel(model, result.bias))
    )
    assert after > before + 0.05

    stored = json.loads(json.dumps(result.to_json(["rest", "thing"])))
    np.testing.assert_array_equal(bias_from_json(stored["bias"], ["rest", "thing"]), result.bias)
    np.testing.assert_array_equal(bias_from_json(stored["bias"], ["thing", "rest"]), result.bias[::-1])
    with pytest.raises(InputError, match="the stored bias is none of this run's classes: fit it again"):
        bias_from_json(stored["bias"], ["rest", "other"])
    for value in ("a", "1", float("nan"), None, True, [1], 1e300):
        with pytest.raises(InputError, match="the stored bias holds no numbers: fit it again"):
            bias_from_json({"rest": value, "thing": 1}, ["rest", "thing"])
    with pytest.raises(InputError, match="the bias has 3 classes and the model 2"):
        evaluate(BiasedModel(model, np.zeros(3)), [batch], num_classes=2)


def test_nothing_to_fit_on():
    void = Batch(torch.zeros(1, 3, 4, 4).byte(), torch.full((1, 4, 4), 255).byte(), ["a"], [0])
    with pytest.raises(InputError, match=r"no labelled pixel to fit a decision on: check dataset\.root"):
        collect_logits(Fixed(torch.zeros(1, 2, 4, 4)), [void], num_classes=2)
    with pytest.raises(InputError, match="the model has 2 classes, the data set 3"):
        collect_logits(Fixed(torch.zeros(1, 2, 4, 4)), [void], num_classes=3)
    wrong = void._replace(labels=torch.full((1, 4, 4), 7).byte())
    with pytest.raises(InputError, match=r"label value 7 is no class 0\.\.1 and not 255"):
        collect_logits(Fixed(torch.zeros(1, 2, 4, 4)), [wrong], num_classes=2)
