"""Elementary functions beside those of numpy in float64, over all magnitudes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from segkit.losses import elementary

MAGNITUDES = np.concatenate([[0.0], np.logspace(-44, 37, 4000), np.linspace(1e-3, 60, 4000)])
FUNCTIONS = {
    "log1p": (elementary.log1p, np.log1p, MAGNITUDES),
    "softplus": (elementary.softplus, lambda x: np.logaddexp(0, x), np.concatenate([MAGNITUDES, -MAGNITUDES])),
    "expm1": (elementary.expm1, np.expm1, -MAGNITUDES),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_those_of_numpy(name, dtype):
    """To four units of the last place, or of the smallest normal number; softplus of x < 0 to |x| more, as of exp2."""
    function, reference, values = FUNCTIONS[name]
    x = torch.from_numpy(values).to(dtype)
    wanted = torch.from_numpy(reference(x.double().numpy()))
    found = function(x)
    assert found.dtype is dtype
    units = (found.double() - wanted).abs() / (wanted.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny)
    most = 4 + (-x.double()).clamp(0, 700) * (name == "softplus")
    assert bool((units <= most).all()), (x[units > most], found[units > most], wanted[units > most])


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("log1p", [0.0, float("nan")], [0.0, float("nan")]),
        (
            "softplus",
            [float("-inf"), float("inf"), float("nan"), -1e30, 1e30],
            [0, float("inf"), float("nan"), 0, 1e30],
        ),
        ("expm1", [float("-inf"), 0.0, float("nan")], [-1.0, 0.0, float("nan")]),
    ],
)
def test_ends(name, given, wanted):
    function = FUNCTIONS[name][0]
    torch.testing.assert_close(function(torch.tensor(given)), torch.tensor(wanted), equal_nan=True, rtol=0, atol=0)
