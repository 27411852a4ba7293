"""Learning rates by name, each step by step against the scheduler of torch that has the same name."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import lr_scheduler

from segkit.config.compose import compose
from segkit.config.schema import LrSchedule
from segkit.errors import InputError
from segkit.run.build import check_parts
from segkit.run.plan import plan_phase
from segkit.run.splits import open_phases
from segkit.training.schedules import lr_factor

TORCH = {
    "poly": lambda optimizer, n: lr_scheduler.PolynomialLR(optimizer, total_iters=n, power=0.9),
    "cosine": lambda optimizer, n: lr_scheduler.CosineAnnealingLR(optimizer, T_max=n),
    "constant": lambda optimizer, n: lr_scheduler.ConstantLR(optimizer, factor=1.0),
    "step": lambda optimizer, n: lr_scheduler.MultiStepLR(optimizer, [math.ceil(2 * n / 3), math.ceil(8 * n / 9)]),
    "one_cycle": lambda optimizer, n: lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=n),
}


def torch_rates(name: str, num_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = TORCH[name](optimizer, num_steps)
    rates = []
    for step in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < num_steps - 1:
            scheduler.step()
    return rates


def test_every_name_has_a_reference():
    assert TORCH.keys() == {item.value for item in LrSchedule}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 9, 40])
def test_a_step_has_the_rate_that_torch_arrives_at(name, num_steps):
    ours = [lr_factor(step, num_steps=num_steps, schedule=name) for step in range(num_steps)]
    assert ours == pytest.approx(torch_rates(name, num_steps), abs=1e-12)


@pytest.mark.parametrize("name", ["poly", "cosine", "constant", "step"])
def test_a_linear_warm_up_comes_before(name):
    ours = [lr_factor(step, num_steps=25, warmup_steps=5, schedule=name) for step in range(25)]
    assert ours[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert ours[5:] == pytest.approx(torch_rates(name, 20), abs=1e-12)


@pytest.mark.parametrize("name", TORCH)
def test_no_step_beyond_the_last_has_a_negative_rate(name):
    assert 0 <= lr_factor(31, num_steps=20, schedule=name) <= 1


def test_a_warm_up_longer_than_the_phase_is_refused():
    fifty = ["schedule=single", "schedule.train.epochs=null", "schedule.train.steps=50"]
    config = compose([*fifty, "schedule.train.warmup_steps=51"])
    with pytest.raises(InputError, match=r"train.warmup_steps is 51, but the phase has 50 steps: set .*steps=5,"):
        check_parts(config, open_phases(config))  # before labels are counted
    assert plan_phase(compose([*fifty, "schedule.train.warmup_steps=50", "limit_steps=3"]), "train", 100).num_steps == 3
    with pytest.raises(InputError, match="warmup_steps is 9, but one_cycle has a rise of its own"):
        compose([*fifty, "schedule.train.lr_schedule=one_cycle", "schedule.train.warmup_steps=9"])


def test_a_phase_without_an_end_is_refused():
    config = compose(["schedule=single", "schedule.train.epochs=1e9"])
    with pytest.raises(
        InputError, match=r"schedule\.train\.epochs=1000000000\.0 makes more than 1000000000 steps: set"
    ):
        plan_phase(config, "train", 100)


def test_a_small_folder_is_not_evaluated_most_of_the_time():
    """Twenty times a phase, however few its images; what is asked for stays as it is, and so do other recipes."""
    config = compose(["dataset=folder"])
    assert [plan_phase(config, "train", number).num_evaluations for number in (1, 12, 5000)] == [20, 20, 20]
    config = compose(["dataset=folder", "evaluation.every_epochs=1"])
    assert plan_phase(config, "train", 12).num_evaluations == 60
    assert compose(["dataset=camvid"]).evaluation.every_epochs == 1
