"""What training starts from: a stranger's weights, a new head, frozen parts, learning rates by name."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from segkit.config.compose import compose, config_dir
from segkit.errors import InputError
from segkit.files import digest_of
from segkit.models import COPLENet, Segmenter
from segkit.run import pipeline
from segkit.run.build import build_optimizer
from segkit.run.saved import open_run
from segkit.run.splits import open_phases
from segkit.run.start import check_origin, early_margins, initial_model
from segkit.training import checkpoint
from segkit.training.optim import freeze

SMALL = (
    "dataset.reader.num_images=6",
    "dataset.reader.size=[64,64]",
    "dataset.crop=[32,32]",
    "batch_size=2",
    "loss=cross_entropy",
    "schedule=single",
    "evaluation.every_epochs=null",
    "evaluation.max_images=2",
    "evaluation.pictures=0",
    "limit_steps=4",
    "workers=0",
    "device=cpu",
    "determinism=strict",
    "model=coplenet",
    "model.norm=batch",
    "model.feature_channels=[4,8,16,32,64]",
)
FREEZE = "freeze=[in_conv,'down?']"


@pytest.fixture
def train(tmp_path):
    """train(NAME, overrides...) runs in tmp_path/NAME and returns that folder."""

    def run(name, *overrides, stop=None):
        config = compose([*SMALL, f"cache_dir={tmp_path}/cache", *overrides])
        pipeline.run(config, tmp_path / name, open_phases(config), stop=stop)
        return tmp_path / name

    return run


@pytest.fixture
def foreign(tmp_path):
    """A file of weights as another project would write it: another number of classes, a wrapper, an entry more."""
    torch.manual_seed(7)
    net = COPLENet(3, 5, feature_channels=(4, 8, 16, 32, 64), norm="batch")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state | {"module.auxiliary.weight": torch.ones(3)}}, tmp_path / "foreign.pt")
    return tmp_path / "foreign.pt", net.state_dict()


def state_of(folder, entry="model"):
    return checkpoint.load(folder / "checkpoints" / "last.pt")[entry]


def test_the_head_of_a_foreign_file_starts_anew(foreign, capsys, train):
    path, theirs = foreign
    head = ["out_conv.weight", "out_conv.bias"]
    folder = train("run", f"init_from={path}", "head=reset", "optimizer.lr=0.0")
    ours = state_of(folder)
    still = [name for name in theirs if name not in head and "running" not in name and "tracked" not in name]
    assert len(still) > 50
    assert all(torch.equal(ours[name], theirs[name]) for name in still)
    assert ours["out_conv.weight"].shape[0] == 8
    report = json.loads((folder / "initial_weights.json").read_text())
    assert report == {
        "loaded": [name for name in theirs if name not in head],
        "reset": head,
        "left_out": [*head, "auxiliary.weight"],
    }
    shown = capsys.readouterr().out
    assert f"weights loaded: {len(theirs) - 2} (in_conv" in shown
    assert "weights reset: 2 (out_conv.weight, out_conv.bias)\n" in shown
    assert "weights left out: 3 (out_conv.weight, out_conv.bias, auxiliary.weight)\n" in shown


def test_frozen_parts_stay_bitwise_through_steps_average_and_resume(foreign, train, tmp_path, capsys):
    path, theirs = foreign
    options = (
        "dataset.val_split=train",
        f"init_from={path}",
        "head=reset",
        FREEZE,
        "ema_decay=0.5",
        "checkpoint_every=1",
        "optimizer.lr=0.1",
    )
    steps = iter([False, True])
    with pytest.raises(Exception, match="stopped at step 2"):
        train("run", *options, stop=lambda: next(steps))
    assert capsys.readouterr().out.count("warning: training and validation are both on split train of synthetic") == 1
    stopped = open_run(tmp_path / "run").model()  # a run can be evaluated before its end
    assert stopped.digest == digest_of(tmp_path / "run" / "checkpoints" / "last.pt")
    folder = train("run", *options)
    frozen = [name for name in theirs if name.split(".")[0] in ("in_conv", "down1", "down2", "down3", "down4")]
    assert any(name.endswith("running_var") for name in frozen)
    for entry in ("model", "ema"):
        ours = state_of(folder, entry)
        assert all(torch.equal(ours[name], theirs[name]) for name in frozen), entry
        trained = [name for name in theirs if name not in frozen and not name.startswith("out_conv")]
        assert not any(torch.equal(ours[name], theirs[name]) for name in trained if theirs[name].ndim)
    assert json.loads((folder / "initial_weights.json").read_text())["frozen"] == [
        name for name in frozen if name.endswith(("weight", "bias"))
    ]
    expected, found = state_of(train("whole", *options)), state_of(folder)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_norm_without_parameters_is_frozen_by_its_name():
    net = nn.Sequential()
    net.add_module("encoder", nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Dropout(0.5)))
    net.add_module("head", nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1)))
    model = Segmenter(net)
    freeze(model, ["encoder"])
    model.train()
    assert [module.training for module in (net.encoder[1], net.encoder[2], net.head[0])] == [False, True, True]
    model.eval()
    assert not any(module.training for module in model.modules())


def test_learning_rates_by_name(tmp_path):
    config = compose([*SMALL, "optimizer.lr=0.2", "lr_factors={in_conv:0.5,down2.*.bias:3.0}", "freeze=out_conv"])
    model, report = initial_model(config, list("abcdefgh"), torch.device("cpu"))
    groups = build_optimizer(config, model, None).param_groups
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rate)
    for name, parameter in model.net.named_parameters():
        factor = 3.0 if name.startswith("down2.") and name.endswith(".bias") else 0.5 if name[:7] == "in_conv" else 1.0
        expected = None if name.startswith("out_conv") else pytest.approx(0.2 * factor)
        assert rate.get(id(parameter)) == expected, name
    names = [name for name, _ in model.net.named_parameters()]
    assert {kind: set(found) for kind, found in report.items()} == {
        "frozen": {"out_conv.weight", "out_conv.bias"},
        "lr x 0.5": {name for name in names if name.startswith("in_conv")},
        "lr x 3.0": {name for name in names if name.startswith("down2.") and name.endswith(".bias")},
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["head=reset"], r"head=reset replaces the last layer of init_from, but that is null: set init_from=PATH"),
        (
            ["freeze=encoder"],
            r"freeze=encoder fits no parameter of the model, whose parts are in_conv, .*out_conv: n",
        ),
        (["freeze='*'"], r"freeze=\['\*'\] leaves no parameter to train: name a part of the model"),
        (["freeze=3"], r"freeze is 3, but takes names of parts of the model: set freeze=encoder or a list of such"),
        (["freeze=[[in_conv]]"], r"freeze is \[\['in_conv'\]\], but takes names of parts"),
        (
            ["lr_factors={in_conv:0}"],
            r"lr_factors.in_conv is 0, but must be .* a positive number \(1e-30 to 1e30\): set freeze=in_conv",
        ),
        (["+lr_factors={a b:2}"], r"lr_factors.a b is 2, but must be a part of .*: set freeze=PART to keep"),
        (["lr_factors={sky:2}"], r"lr_factors.sky=2 fits no parameter of the model"),
        (
            ["lr_factors={in_conv:0.1,*.bias:2}"],
            r"lr_factors.in_conv=0.1 and lr_factors.\*.bias=2 both fit the parameter in_conv.*bias, which one at m",
        ),
        (
            ["lr_factors={in_conv:0.1}", "freeze=[down1,in_conv]"],
            r"freeze=in_conv and lr_factors.in_conv=0.1 both fit the parameter in_conv",
        ),
        (["init_from=FOREIGN"], r"foreign.pt holds the weights of another model .*1 unknown, 2 of another shape"),
        (
            ["init_from=FOREIGN", "head=reset", "model.feature_channels=[8,16,32,64,128]"],
            r"holds the weights of another model .*of another shape",
        ),
    ],
)
def test_bad_starts_are_refused_before_the_first_step(options, message, foreign, train, tmp_path):
    with pytest.raises(InputError, match=message):
        train("run", *(option.replace("FOREIGN", str(foreign[0])) for option in options))
    assert not (tmp_path / "run" / "train" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["dataset=folder", "loss=margin_calibration"], True),
        (["dataset=folder", "loss=margin_calibration", "schedule=pretrain_finetune"], False),
        (["dataset=folder", "loss=margin_calibration", "init_from=a"], False),
        (["dataset=folder", "loss=margin_calibration", "model.weights=a"], False),
        (["dataset=cityscapes_coarse"], True),  # for a phase before another; a recipe of its own would reach the others
        *((["dataset=" + name], False) for name in ("camvid", "cityscapes", "folder", "synthetic", "voc")),
        *(([f"experiment={path.stem}"], False) for path in (config_dir() / "experiment").glob("*.yaml")),
    ],
)
def test_the_papers_form_without_a_trained_model_is_noticed(options, said):
    assert ("add schedule=pretrain_finetune" in (early_margins(compose(options)) or "")) is said


@pytest.mark.filterwarnings("ignore:very few training pixels:UserWarning")
@pytest.mark.filterwarnings("ignore:no training pixel:UserWarning")
def test_the_papers_form_without_a_trained_model_is_said(train, capsys):
    train("early", "loss=margin_calibration", "limit_steps=1")
    assert capsys.readouterr().out.count("warning: loss.form=paper wants a model that cross-entropy has trained") == 1


def test_the_encoder_has_one_factor():
    config = compose(
        ["model=deeplabv3plus_tiny", "schedule=single", "encoder_lr_factor=0.5", "freeze=encoder.model.stem"]
    )
    with pytest.raises(InputError, match=r"freeze=encoder.model.stem and encoder_lr_factor=0.5 both fit the parameter"):
        initial_model(config, list("abcdefgh"), torch.device("cpu"))


def test_a_run_with_damaged_label_counts_is_no_start(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "label_counts.json").write_text("{}")
    with pytest.raises(InputError, match=r"label_counts\.json has not a number of pixels and images for each of up to"):
        check_origin(tmp_path, ("a", "b"))
