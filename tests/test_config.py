"""The schema, the shipped YAML files, and the way from a node to an object."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from segkit.config.compose import config_dir, to_config
from segkit.config.schema import FACTS, Config, PhaseConfig, check_targets, plain
from segkit.config.targets import bind, check_allowed, instantiate, locate
from segkit.errors import InputError
from segkit.run.build import check_parts
from segkit.run.splits import open_phases

GROUPS = ("dataset", "model", "loss", "optimizer", "schedule", "experiment", "debug", "sweep", "augment")
FILES = sorted(path for path in config_dir().rglob("*.yaml"))
OPTIONS = [(path.parent.name, path.stem) for path in FILES if path.parent.name in GROUPS]


def composed(*overrides: str) -> Config:
    return copy.deepcopy(_composed(overrides))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> Config:
    ConfigStore.instance().store(name="segkit_schema", node=Config, provider="segkit")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return to_config(compose("train", overrides=list(overrides)))


def test_every_file_belongs_to_a_group():
    assert len(OPTIONS) == len(FILES) - 1  # all but train.yaml
    assert {group for group, _ in OPTIONS} >= {"dataset", "model", "loss", "optimizer", "schedule", "debug", "sweep"}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_binds(group, option):
    check_targets(composed(f"{group}={option}"))


@pytest.mark.parametrize("option", [name for group, name in OPTIONS if group in ("loss", "model", "dataset")])
def test_every_leaf_lists_all_arguments(option):
    """So that Hydra refuses a misspelt argument without importing the target."""
    import inspect

    group = next(group for group, name in OPTIONS if name == option and group in ("loss", "model", "dataset"))
    config = composed(f"{group}={option}")
    node = {"loss": config.loss, "model": config.model, "dataset": config.dataset.reader}[group]
    facts = {name for facts in FACTS.values() for name in facts}
    parameters = inspect.signature(
        locate(node["_target_"], key="reader" if group == "dataset" else group)
    ).parameters.values()
    wanted = {item.name for item in parameters if item.kind is not inspect.Parameter.VAR_KEYWORD} - facts
    assert wanted <= set(node), f"{group}/{option}.yaml leaves out {wanted - set(node)}"


def test_a_mistake_in_the_data_set_of_a_phase_names_its_own_key():
    key = "schedule.train.dataset"
    chosen = ["schedule=single", f"+dataset@{key}=synthetic"]
    with pytest.raises(InputError, match=rf"^{key}.crop is \[3, 4\].*: set {key}.crop="):
        composed(*chosen, f"{key}.crop=[3,4]")
    with pytest.raises(InputError, match=rf"^{key}.resize makes images of"):
        composed(*chosen, f"{key}.resize.short_side=100000")
    with pytest.raises(InputError, match=rf"allowed are .* \({key}.train_split, {key}.val_split\)"):
        open_phases(composed(*chosen, f"{key}.train_split=x"))


def test_a_loss_names_the_key_at_which_it_stands():
    key = "schedule.pretrain.loss"
    config = composed(
        "schedule=pretrain_finetune", f"loss@{key}=cross_entropy_dice", f"{key}.terms.dice.loss.smooth=-1"
    )
    with pytest.raises(InputError, match=rf"smooth must be a finite .*; set {key}.terms.dice.loss.smooth$"):
        check_parts(config, open_phases(config))


def test_cityscapes_composes_with_the_recipe_of_the_paper():
    config = composed("dataset=cityscapes", "loss=margin_calibration")
    assert config.dataset.crop == [800, 800]
    assert config.optimizer["_target_"] == "torch.optim.AdamW"
    assert config.optimizer["lr"] == 1e-4
    assert list(config.schedule) == ["pretrain", "finetune"]
    assert config.phase_loss("pretrain")["_target_"] == "segkit.losses.cross_entropy"
    assert config.phase_loss("finetune")["_target_"] == "segkit.losses.margin_calibration"
    assert config.model["encoder"] == "se_resnext50_32x4d"
    assert config.model["output_stride"] == 8


def test_phases_keep_the_order_of_their_file():
    config = composed("dataset=cityscapes", "schedule=coarse_pretrain_finetune")
    assert list(config.schedule) == ["coarse", "pretrain", "finetune"]
    assert config.phase_dataset("coarse").name == "cityscapes_coarse"
    assert config.phase_dataset("finetune").name == "cityscapes"


def test_the_command_line_wins_over_the_recipe():
    assert list(composed("dataset=cityscapes", "schedule=single").schedule) == ["train"]
    config = composed("dataset=cityscapes", "schedule.finetune.epochs=3", "batch_size=5")
    assert config.schedule["finetune"].epochs == 3
    assert config.batch_size == 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.crop=[4,4]"], r"dataset.crop is \[4, 4\].*at least 8.*set dataset.crop"),
        (["dataset.crop=[64]"], r"dataset.crop is \[64\]"),
        (["dataset.crop=[1000000000,64]"], r"dataset.crop is .* and below 65536"),
        (["dataset.scale=[1e308,1e308]"], "0 < least <= most <= 100"),
        (["batch_size=9223372036854775807"], "batch_size is 9223372036854775807, but must be at most 65536"),
        (["workers=1000000"], "workers is 1000000, but must be at most 1000"),
        (["dataset.scale=[2.0,1.0]"], "0 < least <= most"),
        (["dataset.flip=1.5"], "dataset.flip is 1.5, but is a probability"),
        (["dataset.color_jitter=-1"], "dataset.color_jitter is -1.0, but is a probability"),
        (["dataset.resize.size=[3]"], r"dataset.resize.size is \[3\], but must be \[height, width\]"),
        (["batch_size=5", "accumulate=2"], "batch_size is 5 and accumulate 2.*set batch_size=6"),
        (["batch_size=0"], "batch_size is 0, but must be at least 1"),
        (["schedule=single", "schedule.train.steps=5"], "schedule.train has epochs=.* and steps=5"),
        (
            ["schedule=single", "schedule.train.epochs=null"],
            "phase train of the schedule has neither epochs nor steps: set schedule.train.epochs=",
        ),
        (
            ["+loss@schedule.trin.loss=dice"],
            r"phase trin .*, or correct its name \(the others are pretrain, finetune\)",
        ),
        (["loss.tau=${dataset}"], r"loss.tau is DatasetConfig\(name='synthetic', \.\.\.\), but must be a number"),
        (["seed=${dataset}"], r"seed: While dereferencing interpolation '\$\{dataset\}': Value '\{\.\.\.\}' of type"),
        (["schedule=single", "schedule.train.epochs=-1"], "schedule.train.epochs is -1.0, but must be positive"),
        (
            ["schedule=single", "schedule.train.epochs=1e308"],
            r"epochs is 1e\+308, but must be positive and at most 100",
        ),
        (
            ["schedule.pretrain.epochs=null", "schedule.pretrain.steps=2000000000"],
            "pretrain.steps is 2000000000, but must be at most 1000000000",
        ),
        (["evaluation.every_epochs=1e308"], r"every_epochs is 1e\+308, but must be positive, at most 1000000000, or"),
        (["device=gpu"], "device is 'gpu', but must be auto, cpu, cuda, cuda:N or mps: set device=auto"),
        (["ema_decay=1.0"], "ema_decay is 1.0.*set ema_decay=0.999"),
        (["clip_norm=0"], "clip_norm is 0.0, but must be positive or null"),
        (["clip_norm=1e-50"], r"clip_norm is 1e-50, but must be positive or null \(1e-30 to 1e30\): set clip_norm=1.0"),
        (["evaluation.every_steps=5"], "at most one of the two: set evaluation.every_epochs=null"),
        (["dataset=voc", "dataset.resize.size=[3,3]"], "takes at most one of the two: set dataset.resize.short_side"),
        (["encoder_lr_factor=0"], "encoder_lr_factor is 0.0"),
        (["encoder_lr_factor=inf"], r"encoder_lr_factor is inf, but must be positive \(1e-30 to 1e30\)"),
        (["lr_factors={encoder:1e-50}"], "lr_factors.encoder is 1e-50, but must be a part of the model and a positive"),
        (["schedule.pretrain.lr=inf"], r"schedule.pretrain.lr is inf, but must be at most 1e\+30"),
        (
            ["dataset.mean=[0.5,0.5,0.5]", "dataset.std=[1,1,1e-46]"],
            r"1e-46\], but 3 .* and positive deviations \(1e-30 or more\): set both",
        ),
        (["seed=-1"], "seed is -1"),
        (["seed=9223372036854775808"], "seed is 9223372036854775808, but must be a whole number of at most 64 bits"),
        (["schedule.pretrain.loss='${oc.env:PATH}'"], "schedule.pretrain.loss is '.*', but must be a mapping"),
        (
            ["dataset.eval_resize=${seed}"],
            "dataset.eval_resize is 0, but has keys of its own: set dataset.eval_resize.s",
        ),
        (
            ["schedule.pretrain=${seed}"],
            "schedule.pretrain is 0, but has keys of its own: set schedule.pretrain.epochs",
        ),
        (["lr_factors=0"], "lr_factors is 0, but gives factors by parts"),
        (["freeze=false"], "freeze is False, but takes names of parts"),
        (["freeze='a b'"], r"freeze is \['a b'\], but takes names of parts"),
        (["model._target_=os.system"], r"model._target_ is 'os.system', but must be one of segkit.models.COPLENet"),
        (["loss._target_=segkit.losses.__builtins__"], "loss._target_ is"),
    ],
)
def test_contradictions_name_the_key(overrides, message):
    with pytest.raises(InputError, match=message):
        composed(*overrides)


@pytest.mark.parametrize("name", ["pictures", "evaluations", "checkpoints", "wandb", "a/b"])
def test_a_phase_has_no_name_that_a_run_folder_has_already(name):
    with pytest.raises(InputError, match=f"a phase named '{name}', but a name is of letters, .*: rename the phase"):
        replace(composed(), schedule={name: PhaseConfig(steps=1)})


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml")))
def test_any_schedule_goes_with_any_experiment(experiment):
    """The phases are those of the schedule, with the lengths and learning rates of the experiment's recipe."""
    phases = {
        "single": ["train"],
        "pretrain_finetune": ["pretrain", "finetune"],
        "coarse_pretrain_finetune": ["coarse", "pretrain", "finetune"],
    }
    assert phases.keys() == {path.stem for path in (config_dir() / "schedule").glob("*.yaml")}
    for schedule, names in phases.items():
        config = composed(f"experiment={experiment}", f"schedule={schedule}", "augment=none")
        assert (config.dataset.scale, config.dataset.flip, config.dataset.color_jitter) == ([1.0, 1.0], 0.0, 0.0)
        recipe = config.dataset.recipe
        assert list(config.schedule) == names
        first, last = config.schedule[names[0]], config.schedule[names[-1]]
        assert first.warmup_steps == recipe.warmup_steps
        assert (last.epochs, last.lr) == (
            (recipe.finetune_epochs, recipe.finetune_lr) if len(names) > 1 else (recipe.epochs, None)
        )
        if first.dataset is not None:
            assert first.epochs == first.dataset.recipe.epochs < recipe.epochs
        check_targets(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+loss.tua=3"], r"loss.tua is not an argument of segkit.losses.margin_calibration.*tau"),
        (["optimizer.lr=-1"], "optimizer.lr is -1, but must be at least 0: set optimizer.lr="),
        (["optimizer=sgd", "optimizer.momentum=-1"], "optimizer.momentum is -1, but must be at least 0"),
        (["+optimizer.capturable=true"], r"optimizer.capturable is True, but is for programs that record a step"),
        (["optimizer.betas=[0.9,1]"], r"optimizer.betas is \[0.9, 1\], but each must be from 0 to below 1: set optim"),
        (["loss.scale=log"], "loss.scale is 'log', but must be tau or mean: set loss.scale="),
        (["model=coplenet", "model.norm=layer"], "model.norm is 'layer', but must be batch or group: set model.norm="),
    ],
)
def test_arguments_that_a_target_does_not_take(overrides, message):
    with pytest.raises(InputError, match=message):
        check_targets(composed(*overrides))


def test_missing_argument():
    node = {"_target_": "segkit.data.readers.camvid.read"}
    with pytest.raises(
        InputError, match=r"reader.split is needed by segkit.data.readers.camvid.read: set reader.split"
    ):
        bind(node, {"root": "x"}, key="reader")


@pytest.mark.parametrize("target", ["segkit.nowhere.thing", "segkit.losses.Nothing", "segkit.losses.DiceLos"])
def test_targets_that_do_not_exist(target):
    with pytest.raises(InputError, match=r"loss\._target_ is .*, but must be one of segkit\.losses\.CrossEntropyLoss"):
        locate(target, key="loss")


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "subprocess.run"},
        {"_target_": "segkit.losses.SumLoss", "terms": {"a": {"loss": {"_target_": "builtins.eval"}}}},
        {"_target_": "segkit.models.deeplabv3plus"},
        {"_target_": 3},
        {},
    ],
)
def test_targets_that_are_not_permitted(node):
    with pytest.raises(InputError, match=r"_target_ is .*, but must be one of"):
        check_allowed(node, key="loss")


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "segkit.losses.SumLoss", "terms": {"a": {"_target_": "segkit.losses.DiceLoss"}}},
        {"_target_": "segkit.losses.DiceLoss", "smooth": {"_target_": "segkit.losses.DiceLoss"}},
        {"_target_": "segkit.losses.DiceLoss", "smooth": [[{"_target_": "segkit.losses.DiceLoss"}]]},
    ],
)
def test_a_target_where_none_has_its_place(node):
    with pytest.raises(InputError, match="holds a _target_, but takes plain values only"):
        check_allowed(node, key="loss")


def test_facts_go_where_they_are_asked_for():
    function, arguments = bind(
        {"_target_": "segkit.losses.cross_entropy", "weighting": "inverse", "class_pixels": None, "diagnostics": True},
        {"class_pixels": [1, 2], "num_classes": 2, "ignore_index": 255},
        key="loss",
    )
    assert function.__name__ == "cross_entropy"
    assert arguments == {"weighting": "inverse", "class_pixels": [1, 2], "ignore_index": 255}


def test_instantiate_builds_what_is_nested_first():
    optimizer = instantiate(
        {"_target_": "torch.optim.SGD", "lr": 0.5}, {"params": [__import__("torch").zeros(1)]}, key="optimizer"
    )
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_plain_turns_enums_into_values():
    value = plain(composed("precision=bf16", "determinism=strict"))
    assert value["precision"] == "bf16"
    assert value["determinism"] == "strict"
    assert isinstance(value["schedule"], dict)


def test_what_a_run_tells_its_reader_is_no_option():
    with pytest.raises(InputError, match=r"dataset\.reader\.split is 'train', but that is what the run itself tells"):
        check_targets(composed("+dataset.reader.split=train"))
