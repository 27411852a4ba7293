"""What a configuration can reach: every attribute of every module that targets lie in, tried one by one."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import segkit
from segkit.config.compose import compose
from segkit.config.schema import FACTS, check_targets
from segkit.config.targets import GROUPS, check_allowed, instantiate, locate, trust
from segkit.errors import InputError

MODULES = sorted(
    {info.name for info in pkgutil.walk_packages(segkit.__path__, "segkit.")}
    | {"segkit", "torch.optim", "torch.optim.swa_utils", "segmentation_models_pytorch", "albumentations"}
)


KEYS = {group: "augment.x" if group == "augment" else group for group in sorted(GROUPS)}


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_only_what_is_listed_can_be_reached(group):
    """Whatever attribute of an importable module is named: it is listed, or it is refused before it is imported."""
    tried = allowed = 0
    for module in MODULES:
        for name in dir(importlib.import_module(module)):
            target = f"{module}.{name}"
            tried += 1
            try:
                check_allowed({"_target_": target}, key=KEYS[group])
            except InputError:
                continue
            allowed += 1
            assert target in GROUPS[group].permitted
            found = locate(target, key=KEYS[group])
            assert f"{found.__module__}.{found.__qualname__}" == f"{GROUPS[group].permitted[target]}.{name}"
    assert tried > 2000
    assert allowed == len(GROUPS[group].permitted)


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_every_listed_target_is_there_and_takes_what_the_pipeline_passes(group):
    import inspect

    for target in GROUPS[group].permitted:
        parameters = inspect.signature(locate(target, key=KEYS[group])).parameters
        assert set(FACTS[group]) & set(parameters) or group in ("loss", "augment"), target


def test_an_object_that_was_exchanged_is_refused(monkeypatch):
    """The identity of what a name leads to is compared, not the spelling."""
    import os

    from segkit import losses

    monkeypatch.setattr(losses, "DiceLoss", os.system)
    with pytest.raises(InputError, match=r"loss\._target_ names 'segkit\.losses\.DiceLoss', which is <built-in"):
        locate("segkit.losses.DiceLoss", key="loss")


def test_an_outer_node_is_bound_before_an_inner_one_is_built(monkeypatch):
    from segkit import losses

    built = []
    monkeypatch.setattr(losses.DiceLoss, "__init__", lambda self, **options: built.append(options))
    node = {
        "_target_": "segkit.losses.SumLoss",
        "typo": 1,
        "terms": {"a": {"weight": 1.0, "loss": {"_target_": "segkit.losses.DiceLoss"}}},
    }
    with pytest.raises(InputError, match=r"loss\.typo is not an argument of segkit\.losses\.SumLoss"):
        instantiate(node, key="loss")
    assert built == []


def test_a_result_of_another_type_is_refused(monkeypatch, tmp_path):
    (tmp_path / "of_another_type.py").write_text("def thing(num_classes):\n    return num_classes\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="but must be one of"):
        instantiate({"_target_": "of_another_type.thing"}, {"num_classes": 3}, key="model")
    monkeypatch.setattr("segkit.config.targets._trusted", set())
    trust(["of_another_type"])
    with pytest.raises(InputError, match=r"model\._target_ is 'of_another_type\.thing', which makes a int, no Module"):
        instantiate({"_target_": "of_another_type.thing"}, {"num_classes": 3}, key="model")
    with pytest.raises(InputError, match="takes names of packages"):
        trust(["os.path"])


def test_arguments_of_another_option_are_taken_away_by_deleting_it(monkeypatch, tmp_path):
    (tmp_path / "lean.py").write_text("def net(num_classes):\n    return num_classes\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("segkit.config.targets._trusted", set())
    own = ["trust=[lean]", "+model={_target_:lean.net}"]
    with pytest.raises(InputError, match=r"model\.encoder .* lean\.net, which takes none: remove .*, or add ~model"):
        check_targets(compose(own))
    check_targets(compose([*own, "~model"]))


def test_what_a_trusted_package_merely_imports_is_refused(monkeypatch, tmp_path):
    (tmp_path / "borrowed.py").write_text("from os import system\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("segkit.config.targets._trusted", set())
    trust(["borrowed"])
    with pytest.raises(InputError, match=r"model\._target_ names 'borrowed\.system', which is <built-in function sys"):
        instantiate({"_target_": "borrowed.system"}, key="model")


@pytest.mark.parametrize(
    ("group", "node", "message"),
    [
        ("optimizer", {"_target_": "torch.optim.AdamW", "lr": "1e-4f"}, r"optimizer\.lr is '1e-4f', but must be a num"),
        ("optimizer", {"_target_": "torch.optim.AdamW", "lr": True}, r"optimizer\.lr is True, but must be a number"),
        ("optimizer", {"_target_": "torch.optim.AdamW", "lr": 10**400}, r"optimizer\.lr is 10+, but must be a number"),
        ("optimizer", {"_target_": "torch.optim.AdamW", "lr": float("nan")}, r"optimizer\.lr is nan, but must be a nu"),
        ("optimizer", {"_target_": "torch.optim.AdamW", "lr": -1}, r"refuses its arguments \(Invalid learning rate: -"),
        ("optimizer", {"_target_": "torch.optim.AdamW", "betas": [2, 3]}, r"Invalid beta.*correct optimizer\.betas="),
        (
            "optimizer",
            {"_target_": "torch.optim.AdamW", "betas": [0.9]},
            r"optimizer\.betas is \[0\.9\], but must be a",
        ),
        ("optimizer", {"_target_": "torch.optim.SGD", "lr": 1.0, "nesterov": True}, "Nesterov momentum requires"),
        (
            "optimizer",
            {"_target_": "torch.optim.SGD", "fused": True, "foreach": True},
            r"refuses its arg.*optimizer\.fo",
        ),
        ("optimizer", {"_target_": "torch.optim.SGD", "params": [1]}, r"optimizer\.params is \[1\], but that is what"),
        (
            "model",
            {"_target_": "segkit.models.COPLENet", "num_classes": 7},
            r"run itself tells .*: remove model\.num_cl",
        ),
        ("loss", {"_target_": "segkit.losses.DiceLoss", "smooth": "much"}, r"loss\.smooth is 'much', but must be a nu"),
        ("loss", {"_target_": "segkit.losses.FocalLoss", "compile_tiles": "maybe"}, "must be true or false or null"),
        ("loss", {"_target_": "segkit.losses.DiceLoss", "diagnostics": "maybe"}, r"loss\.diagnostics is 'maybe', but"),
        (
            "model",
            {"_target_": "segkit.models.COPLENet", "feature_channels": 3},
            r"must be a list of values, each a wh",
        ),
    ],
)
def test_values_are_typed(group, node, message):
    import torch

    facts = {"params": [torch.zeros(1)], "num_classes": 3}
    with pytest.raises(InputError, match=message):
        instantiate(node, facts, key=group)
