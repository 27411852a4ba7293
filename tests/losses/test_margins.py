"""Margin-offsets: the formulas in plain Python, and every edge case."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from segkit.errors import InputError
from segkit.losses import margin_offsets

COUNTS = [500_000, 40_000, 7_000, 900]


def by_hand(counts, tau, upsilon):
    """Algorithm 1, class by class, in Python floats."""
    total = sum(counts)
    rho_k0, rho_0k = [], []
    for n in counts:
        p = n / total
        rho = tau * math.sqrt(total - n) / n
        mu = p * math.sqrt(n) / (upsilon * (total - n) - p * math.sqrt(total - n))
        rho_0k.append(rho)
        rho_k0.append(mu * rho)
    return torch.tensor(rho_k0), torch.tensor(rho_0k)


@pytest.mark.parametrize(("tau", "upsilon"), [(10.0, 1.0), (1.0, 0.5), (20.0, 2.0)])
def test_equals_the_formula(tau, upsilon):
    counts = [500_000, 40_000, 7_000, 3_000]
    offsets = margin_offsets(counts, tau=tau, upsilon=upsilon)
    rho_k0, rho_0k = by_hand(counts, tau, upsilon)
    torch.testing.assert_close(offsets.rho_0k, rho_0k)
    torch.testing.assert_close(offsets.rho_k0, rho_k0)
    assert offsets.rho_0k.dtype == offsets.rho_k0.dtype == torch.float32
    assert bool((offsets.rho_0k.diff() > 0).all())  # the rarer the class, the larger its margin


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_counts_of_any_kind(kind):
    counts = [700, 40, 30]
    torch.testing.assert_close(margin_offsets(kind(counts)).rho_0k, by_hand(counts, 10.0, 1.0)[1])


def test_counts_beyond_32_bits():
    """Cityscapes has 5.5e9 pixels: no product of counts may overflow."""
    counts = [4_000_000_000, 1_500_000_000, 6_000_000]
    torch.testing.assert_close(margin_offsets(counts, rho_max=1e9).rho_0k, by_hand(counts, 10.0, 1.0)[1])


def test_scale_mean_keeps_proportions():
    paper = margin_offsets(COUNTS, rho_max=1e9)
    free = margin_offsets(COUNTS, scale="mean", mean_margin=1.5, rho_max=1e9)
    assert free.rho_0k.mean().item() == pytest.approx(1.5, rel=1e-6)
    torch.testing.assert_close(free.rho_0k / free.rho_0k[0], paper.rho_0k / paper.rho_0k[0])
    ten_times = margin_offsets([10 * n for n in COUNTS], scale="mean", mean_margin=1.5, rho_max=1e9)
    torch.testing.assert_close(ten_times.rho_0k, free.rho_0k)  # does not depend on the amount of data


def test_scale_mean_counts_only_classes_that_occur():
    offsets = margin_offsets([*COUNTS, 0], scale="mean", mean_margin=1.0, absent="zero", rho_max=1e9)
    assert offsets.rho_0k[:4].mean().item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("options", [{"scale": "mean", "mean_margin": 0.0}, {"tau": 0.0}])
def test_no_margins(options):
    offsets = margin_offsets(COUNTS, **options)
    assert offsets.rho_0k.tolist() == offsets.rho_k0.tolist() == [0.0] * 4


def test_absent_class_takes_the_largest_margin_and_is_named():
    with pytest.warns(UserWarning, match=r"no training pixel is of class tram.*loss.absent=max"):
        offsets = margin_offsets([900, 800, 0], class_names=["road", "car", "tram"])
    assert offsets.rho_0k[2] == offsets.rho_0k[:2].max() > 0
    assert offsets.rho_k0[2] == 0
    assert bool(torch.isfinite(offsets.rho_0k).all())


def test_absent_class_zero():
    assert margin_offsets([900, 800, 0], absent="zero").rho_0k[2] == 0


def test_absent_class_error():
    with pytest.raises(InputError, match="no training pixel is of class tram; mend the label table"):
        margin_offsets([900, 800, 0], class_names=["road", "car", "tram"], absent="error")


def test_default_cap_is_ten_medians_and_names_the_class():
    counts = [500_000, 400_000, 300_000, 12]
    with pytest.warns(UserWarning, match=r"very few training pixels are of class bell.*loss.rho_max"):
        offsets = margin_offsets(counts, class_names=["road", "car", "sky", "bell"])
    rho = by_hand(counts, 10.0, 1.0)[1]
    assert offsets.rho_0k[3].item() == pytest.approx(10 * rho.double().quantile(0.5).item(), rel=1e-5)
    torch.testing.assert_close(offsets.rho_0k[:3], rho[:3])


def test_cap_by_hand():
    with pytest.warns(UserWarning, match=r"capped at 0.05 logits"):
        offsets = margin_offsets(COUNTS, rho_max=0.05)
    assert offsets.rho_0k.max().item() == pytest.approx(0.05)


@pytest.mark.parametrize("no_cap", ["none", math.inf])
def test_no_cap_is_algorithm_1(no_cap, recwarn):
    counts = [500_000, 400_000, 300_000, 12]
    offsets = margin_offsets(counts, rho_max=no_cap)
    rho_k0, rho_0k = by_hand(counts, 10.0, 1.0)
    torch.testing.assert_close(offsets.rho_0k, rho_0k)
    torch.testing.assert_close(offsets.rho_k0, rho_k0)
    assert offsets.rho_0k[3] > 100 * offsets.rho_0k[2]
    assert not recwarn.list


def test_class_with_every_pixel_has_no_margin():
    offsets = margin_offsets([700, 0, 0], absent="zero")
    assert offsets.rho_0k.tolist() == offsets.rho_k0.tolist() == [0.0, 0.0, 0.0]


def test_upsilon_too_small_names_class_and_least_value():
    counts = [10_000, 4]
    least = (10_000 / 10_004) / math.sqrt(4)
    with pytest.raises(InputError, match=rf"too small for road.*greater than {least:.6g}; set loss.upsilon"):
        margin_offsets(counts, upsilon=0.4, class_names=["road", "bell"])
    offsets = margin_offsets(counts, upsilon=least * 1.001, rho_max=1e9)
    assert bool((offsets.rho_k0 > 0).all())


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ([5], {}, "K = 1 class but a loss needs at least 2"),
        ([5, -1], {}, "must not be negative"),
        ([0, 0], {}, "at least one pixel"),
        ([0.5, 0.5], {}, "must be integer pixel counts"),
        ([[1, 2]], {}, "must be integer pixel counts"),
        ([5, 5], {"class_names": ["one"]}, "got 1 class names for 2 counts"),
        ([5, 5], {"tau": -1.0}, "tau must be a finite number at least 0, got -1.0; set loss.tau"),
        ([5, 5], {"tau": math.nan}, "tau must be a finite number"),
        ([5, 5], {"tau": 10**400}, "tau must be a finite number at least 0, got 1000"),
        ([5, 5], {"upsilon": 0.0}, "upsilon must be a finite number greater than 0"),
        ([5, 5], {"scale": "log"}, "scale must be one of tau, mean, got 'log'; set loss.scale"),
        ([5, 5], {"absent": "skip"}, "absent must be one of max, zero, error"),
        ([5, 5], {"rho_max": -2.0}, "rho_max must be a finite number"),
        ([5, 5], {"rho_max": math.nan}, "rho_max must be a finite number"),
        ([5, 5], {"rho_max": "maybe"}, r"rho_max is 'maybe', but must be a number of logits, none \(no cap\), or null"),
        ([5, 5], {"scale": "mean"}, "scale = mean needs the mean margin in logits; set loss.mean_margin"),
        ([5, 5], {"mean_margin": 1.0}, "mean_margin = 1.0 has no effect with scale = tau"),
        (
            [5, 5],
            {"scale": "mean", "mean_margin": 1.0, "tau": 5.0},
            "tau = 5 has no effect with scale = mean",
        ),
    ],
)
def test_bad_input(counts, options, message):
    with pytest.raises(InputError, match=message):
        margin_offsets(counts, **options)
