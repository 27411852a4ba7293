"""The advice line of ``segkit compare``, from made-up counts in both directions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from segkit.evaluation import metrics
from segkit.report.comparison import Comparison

NAMES = ("road", "sky", "pole", "sign")


def advice(*counts):
    """The advice for a baseline of one run for each of the matrices ``counts``, rows = target."""
    runs = tuple(SimpleNamespace(results=metrics.summary(np.array(matrix), NAMES)) for matrix in counts)
    group = SimpleNamespace(name="cross-entropy", runs=runs)
    return Comparison((group,), group, (), ()).advice


MISSED = [[900, 0, 0, 0], [0, 500, 0, 0], [30, 0, 20, 0], [10, 0, 0, 15]]
OVERDONE = [[900, 0, 30, 10], [0, 500, 0, 0], [0, 0, 20, 0], [0, 0, 0, 15]]


def test_rare_classes_that_are_missed():
    assert advice(MISSED) == (
        "advice: the baseline, cross-entropy, has recall below precision for 2 of the 2 rarest classes (sign, pole): "
        "larger margins rho_0k are the wrong direction; try --decision miou"
    )


def test_rare_classes_that_are_predicted_too_often():
    found = advice(OVERDONE)
    assert "recall above precision for 2 of the 2 rarest classes (sign, pole): predicted too often, and" in found
    assert found.endswith("and larger margins rho_0k may pay")


def test_a_class_that_is_never_predicted_is_missed():
    never = [[900, 0, 0, 0], [0, 500, 0, 0], [50, 0, 0, 0], [0, 0, 0, 25]]
    assert "below precision for 1 of the 2 rarest classes (pole)" in advice(never)


def test_a_class_without_labels_is_not_rare_but_absent():
    absent = [[900, 0, 0, 0], [0, 500, 0, 0], [0, 0, 0, 0], [50, 0, 0, 25]]
    assert "below precision for the rarest class (sign): larger" in advice(absent)


def test_it_is_a_mean_over_runs():
    slightly_overdone = [[900, 0, 1, 1], [0, 500, 0, 0], [0, 0, 20, 0], [0, 0, 0, 15]]
    assert "below precision for 2 of the 2" in advice(MISSED, slightly_overdone)


@pytest.mark.parametrize(
    "counts",
    [np.diag([900, 500, 50, 25]), [[900, 0, 30, 0], [0, 500, 0, 0], [0, 0, 20, 0], [10, 0, 0, 15]]],
    ids=["perfect", "one each way"],
)
def test_no_advice_where_they_do_not_agree(counts):
    assert advice(counts) is None
