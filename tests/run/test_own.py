"""A reader, model or loss of one's own that does not give what it should is refused before the first step."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from segkit.config import targets
from segkit.config.compose import compose
from segkit.config.targets import instantiate
from segkit.data.labels import table_from_dict
from segkit.data.samples import Sample, SampleSet
from segkit.errors import InputError
from segkit.evaluation.decision import BiasedModel
from segkit.guard import explain
from segkit.losses import SumLoss
from segkit.models import Segmenter
from segkit.run.build import build_optimizer, segmenter
from segkit.run.own import try_loss, try_model
from segkit.run.splits import open_phases

CPU = torch.device("cpu")
TABLE = {
    "name": "own",
    "classes": ["a", "b", "c"],
    "palette": [[0, 0, 0]] * 3,
    "raw_to_train": {0: 255, 1: 0, 2: 1, 3: 2},
}
DATASET = SimpleNamespace(
    crop=[16, 20], in_channels=3, eval_resize={}, reader={"_target_": "own.read"}, mean=None, std=None,
    dtype=SimpleNamespace(divisor=255.0), check_statistics=lambda: None,
)  # fmt: skip
CONFIG = SimpleNamespace(
    model={"_target_": "own.net"}, optimizer={"_target_": "torch.optim.SGD", "lr": 0.1}, images=DATASET,
    phase_dataset=lambda _: DATASET, phase_loss=lambda _: {"_target_": "own.Loss"}, schedule={"late": None},
    encoder_lr_factor=1.0, lr_factors={}, batch_size=8, accumulate=1,
)  # fmt: skip


def image(sample):
    return np.full((9, 13, 3), 7, np.uint8)


def label(sample):
    return np.ones((9, 13), np.int64)


def samples(**changes):
    given = {"table": table_from_dict(TABLE), "load_image": image, "load_label": label, **changes}
    found = given.pop("samples", [Sample("first", Path("first.png"), (Path("label.png"),))])
    return SampleSet(found, name="own", split="val", **given)


class Loss(nn.Module):
    """``give``: from logits and labels to the value."""

    def __init__(self, give, **parts):
        super().__init__()
        self.give = give
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, logits, target):
        return self.give(logits, target)


class Net(nn.Module):
    """``give``: from the network and its logits to the output."""

    def __init__(self, give, channels=3):
        super().__init__()
        self.give, self.head = give, nn.Conv2d(3, channels, 1)

    def forward(self, images):
        return self.give(self, self.head(images))


def spoiled(logits):
    """A sum whose gradient needs what was overwritten."""
    power = logits.exp()
    total = power.sum()
    power.add_(1)
    return total


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda logits, target: None, "the loss own.Loss of phase late gives NoneType, but must give one real number"),
        (lambda logits, target: 1.0, "gives float, but"),
        (lambda logits, target: (logits.mean(), {}), "gives tuple, but"),
        (lambda logits, target: logits.mean((1, 2, 3)), r"gives torch.float32 of shape \(2,\), but"),
        (lambda logits, target: logits.mean()[None], r"gives torch.float32 of shape \(1,\), but"),
        (lambda logits, target: logits.detach().mean(), r"of shape \(\) without a gradient, but"),
        (lambda logits, target: logits.argmax(), r"gives torch.int64 of shape \(\) without a gradient"),
        (
            lambda logits, target: {}["a"],
            r"\(2, 3, 4, 5\) and labels \(2, 16, 20\), fails \(KeyError: 'a' in test_own.py",
        ),
        (
            lambda logits, target: nn.functional.cross_entropy(logits, target),
            r"fails \(.*size.* in test_own.py, line \d+\)",
        ),
        (
            lambda logits, target: logits.sum() + target.fill_(0).sum(),
            "the loss own.Loss of phase late changes the labels",
        ),
        (
            lambda logits, target: spoiled(logits),
            r"the gradient of the loss own.Loss .* fails \(RuntimeError: one of the var",
        ),
    ],
)
def test_a_loss_gives_one_number_with_a_gradient(give, message):
    with pytest.raises(InputError, match=message):
        try_loss(Loss(give), CONFIG, "late", samples(), CPU)


def test_a_loss_without_faults_is_left_as_it_is():
    class Counting(Loss):
        def forward(self, logits, target):
            self.seen += 1
            return logits.square().mean()

    loss = Counting(None, seen=nn.Buffer(torch.zeros(())))
    try_loss(SumLoss(terms={"own": {"loss": loss, "weight": 2.0}}), CONFIG, "late", samples(), CPU)
    assert loss.seen == 0
    summed = Loss(lambda logits, target: logits.mean(), pixel_decomposable=True)  # training gives it a denominator
    with pytest.raises(InputError, match=r"fails \(AttributeError: 'Loss' object has no attribute 'denominator'\)"):
        try_loss(summed, CONFIG, "late", samples(), CPU)
    weighted = Loss(lambda logits, target: logits.mean(), weight=nn.Parameter(torch.ones(())))
    with pytest.raises(InputError, match="has a parameter weight, which no optimizer trains: make it a buffer"):
        try_loss(weighted, CONFIG, "late", samples(), CPU)


@pytest.mark.parametrize(
    ("give", "channels", "message"),
    [
        (
            lambda net, logits: logits,
            4,
            r"own.net, in evaluation .* \(1, 3, 9, 13\), gives torch.float32 \(1, 4, 9, 13\), but",
        ),
        (lambda net, logits: logits, 2, r"must give floating-point logits \(1, 3, h, w\): mend it"),
        (lambda net, logits: logits if net.training else (logits, logits), 3, "evaluation .* gives tuple, but"),
        (
            lambda net, logits: (logits, logits) if net.training else logits,
            3,
            r"own\.net, in training mode for images \(2, 3, 16, 20\), gives tuple, but .* \(2, 3, h, w\): mend it",
        ),
        (
            lambda net, logits: {}["a"] if net.training else logits,
            3,
            r"in training .* fails \(KeyError: 'a' in test_own",
        ),
        (lambda net, logits: {"out": logits}, 3, "gives dict, but"),
        (lambda net, logits: logits.mean((2, 3)), 3, r"gives torch.float32 \(1, 3\), but"),
        (lambda net, logits: logits.long(), 3, "gives torch.int64"),
        (lambda net, logits: logits.reshape(1, 3, 16, 20), 3, r"fails \(RuntimeError: .* in test_own.py, line \d+\)"),
    ],
)
def test_a_model_gives_logits_in_both_modes(give, channels, message):
    """Else it would fail in the first step or evaluation, or count classes that are none."""
    with pytest.raises(InputError, match=message):
        try_model(Segmenter(Net(give, channels)), CONFIG, "late", samples(), CPU)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (2, 3, 16, 20),
            r"in evaluation mode for images \(1, 3, 9, 13\), fails \(Runt.*: set another dataset\.eval_res",
        ),
        (
            (1, 3, 9, 13),
            r"in training mode for images \(2, 3, 16, 20\), fails \(Runt.*: set another dataset\.crop, or ch",
        ),
        (None, None),
    ],
)
def test_a_model_of_segkit_is_tried_without_values(shape, message):
    """It computes only to find the reason why it takes no such images."""
    devices = []

    def give(net, logits):
        devices.append(logits.device.type)
        return logits.reshape(shape) if message else logits

    model = Segmenter(Net(give))
    config = SimpleNamespace(**vars(CONFIG) | {"model": {"_target_": "segkit.models.smp_model", "encoder": "tu-x"}})
    if message is None:
        try_model(model, config, "late", samples(), CPU)
        assert devices == ["meta", "meta"]
        config.schedule = {"early": None, "late": None}  # on the same data
        try_model(model, config, "late", samples(), CPU)
        assert devices == ["meta", "meta"]
        return
    with pytest.raises(InputError, match=message) as refused:
        try_model(model, config, "late", samples(), CPU)
    assert str(refused.value).startswith("segkit.models.smp_model on tu-x, in ")
    assert devices.count("cpu") == 1
    images = torch.zeros(2, 3, 5, 7)
    with pytest.raises(RuntimeError) as failed:
        BiasedModel(model, np.zeros(3, np.float32))(images)
    assert explain(failed.value)[0].startswith("the model cannot compute images of (2, 3, 5, 7) (RuntimeError: shape")


def test_a_model_that_can_be_trained_is_in_training_mode_afterwards(monkeypatch):
    model = Segmenter(Net(lambda net, logits: nn.functional.dropout(net.norm(logits), training=net.training)))
    model.net.norm = nn.BatchNorm2d(3)
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    try_model(model, CONFIG, "late", samples(), CPU)
    assert all(part.training for part in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match=r"the model own\.net has no parameter to train"):
        build_optimizer(CONFIG, model.requires_grad_(False), None)
    for net, message in (
        (nn.Sequential(nn.LazyConv2d(3, 1)), "own.net has no size yet for its parameter 0.weight"),
        (Loss(None, input_mean=0.5), "input_mean and input_std are 0.5 and"),
    ):
        monkeypatch.setattr("segkit.run.build.locate", lambda *_, **__: Net)
        monkeypatch.setattr("segkit.run.build.instantiate", lambda *_, net=net, **__: net)
        with pytest.raises(InputError, match=message):
            segmenter({"_target_": "own.net"}, 3, DATASET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_label": lambda _: None}, "load_label gives a NoneType for first of own, no array: mend the reader"),
        ({"load_label": lambda _: [[1]]}, "load_label gives a list for first"),
        (
            {"load_label": lambda _: np.ones((9, 13))},
            r"gives float64 of the shape \(9, 13\) for first of own, but must",
        ),
        ({"load_label": lambda _: np.ones((9, 13), bool)}, "load_label gives bool"),
        ({"load_label": lambda _: np.ones((9, 13, 3), np.uint8)}, r"gives uint8 of the shape \(9, 13, 3\)"),
        ({"load_label": lambda _: np.ones((0, 0), np.uint8)}, r"gives uint8 of the shape \(0, 0\)"),
        ({"load_image": lambda _: None}, "load_image gives a NoneType for first of own, no array"),
        ({"load_image": lambda _: np.ones((9, 13, 3))}, r"an array of float64 of the shape \[9, 13, 3\]"),
        ({"load_image": lambda _: {}["a"]}, r"load_image fails for first of own \(KeyError: 'a' in test_own.py, line"),
        ({"load_label": partial(np.load, allow_pickle=3)}, r"load_label fails for first of own \(TypeError: "),
    ],
)
def test_a_reader_gives_images_and_labels(changes, message):
    with pytest.raises(InputError, match=message):
        samples(**changes)[0]


def test_what_a_reader_makes_is_checked(monkeypatch):
    one = Sample("first", Path("first.png"), (Path("label.png"),))
    for changes, message in (
        ({"table": TABLE}, "the table of own is a dict, but must be a LabelTable: .*table_from_dict makes one"),
        ({"samples": ["first.png"]}, "'first.png' of split 'val' of own must be a Sample of"),
        ({"samples": [replace(one, image="first.png")]}, "image='first.png'.* must be a Sample of"),
        ({"samples": [replace(one, labels=Path("label.png"))]}, "must be a Sample of .* a tuple of Paths of labels"),
        ({"samples": [replace(one, name=1)]}, r"must be a Sample of a name \(str\)"),
    ):
        with pytest.raises(InputError, match=message):
            samples(**changes)
    for change, message in (
        ({"palette": [[0.5, 0, 0]] * 3}, "or no whole number"),
        ({"palette": None}, "a label table lacks palette: it has name, classes, raw_to_train"),
    ):
        with pytest.raises(InputError, match=message):
            table_from_dict({key: value for key, value in {**TABLE, **change}.items() if value is not None})
    other = samples(table=table_from_dict({**TABLE, "classes": ["b", "a", "c"]}))
    monkeypatch.setattr("segkit.run.splits.open_split", lambda _, split: {"train": samples(), "val": other}[split])
    with pytest.raises(
        InputError, match=r"own has other classes, or another order, in val \(b, a, c\) than in val \(a, b, c\)"
    ):
        open_phases(compose(["schedule=single"]))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:", r"loss._target_ names 'own_broken.f', whose import fails \(SyntaxError: .*own_broken.py, line 1"),
        ("raise SystemExit(3)", r"whose import fails \(SystemExit: 3 in own_broken.py, line 1\): mend it"),
        ("1 / 0", r"fails \(ZeroDivisionError: division by zero in own_broken.py, line 1\)"),
        ("import no_such_package", "cannot be imported .No module named 'no_such_package'"),
        (
            "def f(): return {}['a']",
            r"own_broken.f fails \(KeyError: 'a' in own_broken.py, line 1\): mend it, or what loss",
        ),
        ("def f(): raise RuntimeError('x')", "own_broken.f fails .RuntimeError: x in own_broken.py"),
        ("from segkit.errors import InputError\ndef f(): raise InputError('own words')", "^own words$"),
    ],
)
def test_a_package_that_fails_is_named_with_the_line(tmp_path, monkeypatch, code, message):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(targets, "_trusted", {"own_broken"})
    (tmp_path / "own_broken.py").write_text(code)
    try:
        with pytest.raises(InputError, match=message):
            instantiate({"_target_": "own_broken.f"}, key="loss")
    finally:
        sys.modules.pop("own_broken", None)


def test_code_of_ones_own_that_fails_late_is_named_with_the_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_late.py").write_text("def f(error): raise error")
    import own_late

    for error, trusted, expected in (
        (ValueError("x"), {"own_late"}, ("code of your own fails (ValueError: x in own_late.py, line 1): mend it", 2)),
        (ValueError("x"), set(), (None, 1)),
        (OSError("gone"), {"own_late"}, ("code of your own fails (OSError: gone in own_late.py, line 1): mend it", 2)),
    ):
        monkeypatch.setattr(targets, "_trusted", trusted)
        with pytest.raises(type(error)) as caught:
            own_late.f(error)
        assert explain(caught.value) == expected
