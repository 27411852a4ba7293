"""Diagnostics against loops over pixels, and the theory that they rest on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segkit.bilinear import spans
from segkit.errors import InputError
from segkit.losses import (
    LAMBDA_EDGES,
    epsilon,
    margin_offsets,
    margin_ratios,
    margin_sums,
    summarise,
)
from segkit.losses.diagnostics import rho_margin_loss

RHO_K0, RHO_0K = torch.tensor([0.0, 0.5, 2.0, 0.0]), torch.tensor([3.0, 1.0, 0.0, 0.5])


def example(size=(2, 9, 10), low=None):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(size[0], 4, *(low or size[1:]), generator=generator, dtype=torch.float64)
    target = torch.randint(4, size, generator=generator)
    target[torch.rand(size, generator=generator) < 0.2] = 255
    return logits, target


def phi(margin, rho):
    return min(1.0, max(0.0, 1 - margin / rho)) if rho > 0 else float(margin <= 0)


def by_loop(logits, target):
    """The sums, pixel by pixel and class by class."""
    sums = {key: [0.0] * 4 for key in ("pixels", "margin", "loss_k0", "loss_0k", "loss_k0_fixed", "loss_0k_fixed")}
    sums |= {"inside_k0": [0.0] * 4, "inside_0k": [0.0] * 4}
    sums["histogram"] = [[0.0] * (len(LAMBDA_EDGES) - 1) for _ in range(4)]
    for s, y in zip(logits.movedim(1, -1).reshape(-1, 4).tolist(), target.flatten().tolist(), strict=True):
        for k in range(4) if y != 255 else ():
            lam = s[k] - max(s[j] for j in range(4) if j != k)
            if k == y:
                sums["pixels"][k] += 1
                sums["margin"][k] += lam
                sums["histogram"][k][sum(lam > edge for edge in LAMBDA_EDGES[1:-1])] += 1
                sums["loss_k0"][k] += phi(lam, float(RHO_K0[k]))
                sums["loss_k0_fixed"][k] += phi(lam, 1.0)
                sums["inside_k0"][k] += lam < RHO_K0[k]
            else:
                sums["loss_0k"][k] += phi(-lam, float(RHO_0K[k]))
                sums["loss_0k_fixed"][k] += phi(-lam, 1.0)
                sums["inside_0k"][k] += -lam < RHO_0K[k]
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in sums.items()}


def test_sums_are_those_of_a_loop():
    logits, target = example()
    found = margin_sums(logits, target, rho_k0=RHO_K0, rho_0k=RHO_0K, stride=1)
    torch.testing.assert_close(found, by_loop(logits, target))


def test_bins_of_lambda_show_what_is_wrong():
    """0 is an edge, a tie counts as wrong, and what lies outside is in the outer bins."""
    target = torch.zeros(1, 1, 4, dtype=torch.int64)
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 0, 0] = torch.tensor([0.0, 0.01, 1e6, -1e6])
    histogram = margin_sums(logits, target, stride=1)["histogram"]
    assert histogram[1].sum() == 0
    assert histogram[0].nonzero().flatten().tolist() == [0, 29, 30, 59]
    assert LAMBDA_EDGES[30] == 0


def test_rho_margin_loss():
    margin = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])
    assert rho_margin_loss(margin, torch.tensor(1.0)).tolist() == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert rho_margin_loss(margin, torch.tensor(0.0)).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_low_resolution_logits_are_interpolated_at_the_chosen_pixels(stride):
    logits, target = example((2, 21, 18), low=(6, 5))
    full = F.interpolate(logits, size=(21, 18), mode="bilinear", align_corners=False)
    options = {"rho_k0": RHO_K0, "rho_0k": RHO_0K, "stride": stride}
    torch.testing.assert_close(margin_sums(logits, target, **options), margin_sums(full, target, **options))
    offset = stride // 2
    chosen = slice(offset, None, stride)
    torch.testing.assert_close(
        margin_sums(full, target, **options),
        margin_sums(full[:, :, chosen, chosen], target[:, chosen, chosen], **{**options, "stride": 1}),
    )


def test_bound_is_below_the_iou_and_reaches_it_without_margins():
    logits, target = example((2, 30, 30))
    logits = logits.scatter_add(1, target.clamp(max=3)[:, None], torch.full_like(logits[:, :1], 3.0))
    valid = target != 255
    predicted = logits.argmax(1)
    iou = torch.stack(
        [
            ((predicted == k) & (target == k)).sum() / (((predicted == k) | (target == k)) & valid).sum()
            for k in range(4)
        ]
    ).double()
    found = summarise(margin_sums(logits, target, rho_k0=RHO_K0, rho_0k=RHO_0K, stride=1))
    assert bool((found["iou_bound"] <= iou + 1e-6).all())
    assert bool((found["iou_bound_fixed"] < iou).all())
    torch.testing.assert_close(found["mean_iou_bound"], found["iou_bound"].mean())
    without = summarise(margin_sums(logits, target, stride=1))
    torch.testing.assert_close(without["iou_bound"], iou, rtol=1e-6, atol=1e-6)


def test_batches_are_added_before_dividing():
    logits, target = example()
    target[0] = torch.where(target[0] == 255, 255, 1)  # unlike shares in the two halves
    whole = margin_sums(logits, target, stride=1)
    parts = [margin_sums(logits[i : i + 1], target[i : i + 1], stride=1) for i in range(2)]
    torch.testing.assert_close({key: parts[0][key] + parts[1][key] for key in whole}, whole)


def test_summary_of_a_loop_with_the_counts_of_the_data_set():
    logits, target = example()
    sums = by_loop(logits, target)
    counts = [50, 30, 15, 5]
    found = summarise(sums, class_pixels=counts)
    for k in range(4):
        p, n = counts[k] / 100, float(sums["pixels"][k])
        rest = float(sums["pixels"].sum()) - n
        bound = (p - p * float(sums["loss_k0"][k]) / n) / (p + (1 - p) * float(sums["loss_0k"][k]) / rest)
        assert float(found["iou_bound"][k]) == pytest.approx(bound)
        assert float(found["mean_margin"][k]) == pytest.approx(float(sums["margin"][k]) / n)
        assert float(found["inside_0k"][k]) == pytest.approx(float(sums["inside_0k"][k]) / rest)
    with pytest.raises(InputError, match=r"class_pixels has \(3,\) entries for sums of 4 classes"):
        summarise(sums, class_pixels=[1, 2, 3])


def test_class_without_pixels_is_nan_and_left_out_of_the_mean():
    logits, target = example()
    target[target == 2] = 0
    found = summarise(margin_sums(logits, target, stride=1))
    assert found["iou_bound"].isnan().tolist() == [False, False, True, False]
    assert bool(torch.isfinite(found["mean_iou_bound"]))


# the theory


@pytest.mark.parametrize("upsilon", [0.5, 1.0, 2.0])
def test_the_offsets_minimise_epsilon_at_their_sum(upsilon):
    """Corollary 1: no other split of the same sum of margins does better, whatever the complexity is."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = rng.integers(1_000, 1_000_000, size=rng.integers(2, 12))
        ratios = margin_ratios(counts, upsilon=upsilon)
        for complexity in (0.01, 1.0, 30.0):
            d = np.sqrt(counts.sum() - counts) / counts
            rho = d * 4 * len(counts) * complexity * rng.uniform(1.5, 30)
            best = epsilon(counts, rho_0k=rho, ratios=ratios, complexity=complexity)
            assert np.isfinite(best)
            for spread in (1e-3, 0.1, 1.0):
                other = rho * np.exp(spread * rng.standard_normal(len(counts)))
                other *= rho.sum() / other.sum()
                assert epsilon(counts, rho_0k=other, ratios=ratios, complexity=complexity) > best


def test_offsets_are_proportional_to_d_and_have_the_ratios():
    counts = [500_000, 40_000, 7_000, 3_000]
    offsets = margin_offsets(counts, upsilon=0.7)
    d = np.sqrt(sum(counts) - np.array(counts)) / counts
    np.testing.assert_allclose(offsets.rho_0k.numpy(), 10.0 * d, rtol=1e-6)
    ratios = (offsets.rho_k0 / offsets.rho_0k).numpy()
    np.testing.assert_allclose(ratios, margin_ratios(counts, upsilon=0.7), rtol=1e-6)


def test_epsilon_is_the_formula_and_inf_below_its_reach():
    counts, rho, mu, c = [900, 100], [2.0, 3.0], [0.1, 0.2], 0.5
    value = 0.0
    for n, r, m in zip(counts, rho, mu, strict=True):
        value += ((1000 - n) ** 0.5 + n**0.5 / m) / (n * r / (4 * 2 * c) - (1000 - n) ** 0.5) / 2
    assert epsilon(counts, rho_0k=rho, ratios=mu, complexity=c) == pytest.approx(value)
    assert epsilon(counts, rho_0k=[1e-3, 3.0], ratios=mu, complexity=c) == float("inf")
    with pytest.raises(InputError, match="pixels of every class"):
        epsilon([0, 5], rho_0k=rho, ratios=mu, complexity=c)
    with pytest.raises(InputError, match="complexity must be a finite number greater than 0"):
        epsilon(counts, rho_0k=rho, ratios=mu, complexity=0.0)


@pytest.mark.parametrize(("num_in", "num_out"), [(4, 16), (5, 19), (7, 3), (1, 6), (6, 6), (128, 512)])
def test_matrices_of_an_axis_are_torch(num_in, num_out):
    x = torch.randn(1, 1, num_in, 3, dtype=torch.float64)
    expected = F.interpolate(x, size=(num_out, 3), mode="bilinear", align_corners=False)
    for size in (4, num_out):
        parts = spans(num_in, num_out, size)
        assert [i for p in parts for i in range(p.out.start, p.out.stop)] == list(range(num_out))
        found = torch.cat([p.matrix @ x[0, 0, p.first : p.last] for p in parts])
        torch.testing.assert_close(found, expected[0, 0], rtol=1e-12, atol=1e-14)
    assert len(parts) == 1
