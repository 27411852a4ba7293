"""What may change between two starts of one run, and what is compared before it goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from segkit.cli import verb_function
from segkit.config.compose import compose
from segkit.config.schema import Config, plain
from segkit.data import open_dataset
from segkit.errors import InputError
from segkit.losses import CrossEntropyLoss, MarginCalibrationLoss
from segkit.run import pipeline
from segkit.run.changes import check_changes, differing_keys, takes_effect
from segkit.run.folder import RunFolder
from segkit.run.phase import Phase, prepare_phase, write_margins
from segkit.run.splits import open_phases
from segkit.run.validation import Validation
from segkit.synthetic.sample_maker import make_sample
from segkit.training import checkpoint

SMALL = (
    "schedule=single",
    "schedule.train.epochs=null",
    "schedule.train.steps=2",
    "dataset.crop=[32,32]",
    "batch_size=2",
    "loss=cross_entropy",
    "evaluation.every_epochs=null",
    "evaluation.max_images=2",
    "evaluation.pictures=0",
    "workers=0",
    "device=cpu",
    "determinism=strict",
    "model=coplenet",
    "model.feature_channels=[4,8,16,32,64]",
    "model.num_groups=2",
)
PAINTED = ("dataset.reader.num_images=6", "dataset.reader.size=[64,64]")


@pytest.fixture
def train(tmp_path):
    """train(NAME, overrides...) runs in tmp_path/NAME and returns that folder."""

    def run(name: str, *overrides: str, data: tuple[str, ...] = PAINTED) -> Path:
        config = compose([*SMALL, *data, f"cache_dir={tmp_path}/cache", *overrides])
        pipeline.run(config, tmp_path / name, open_phases(config))
        return tmp_path / name

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "checkpoints" / "last.pt")["model"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_is_extended(train, capsys):
    folder = train("run", "schedule.train.poly_power=0")
    before = weights(folder)
    longer = ("schedule.train.poly_power=0", "schedule.train.steps=4", "ignore_config_change=true")
    train("run", *longer)
    assert "changed: schedule.train.steps is 4 from here on, and was 2" in capsys.readouterr().out
    assert not equal(weights(folder), before)
    at_once = train("at_once", "schedule.train.poly_power=0", "schedule.train.steps=4")
    assert equal(weights(folder), weights(at_once))
    assert json.loads((folder / "results.json").read_text())["step"] == 4
    starts = json.loads((folder / "provenance.json").read_text())["starts"]
    assert [start["changes"] for start in starts] == [{}, {"schedule.train.steps": [2, 4]}]
    with pytest.raises(InputError, match=r"has trained 4 steps already, more than the 3 it has now"):
        train("run", *longer, "schedule.train.steps=3")


def test_a_new_learning_rate_takes_effect(train):
    """With the rate 0 from the third step on, the weights stay as they are."""
    constant = "schedule.train.poly_power=0"
    folder = train("run", constant)
    before = weights(folder)
    after = weights(train("run", constant, "schedule.train.steps=4", "optimizer.lr=0.0", "ignore_config_change=true"))
    parameters = [name for name, value in before.items() if value.is_floating_point() and "running" not in name]
    assert all(torch.equal(after[name], before[name]) for name in parameters)
    train("run", constant, "schedule.train.steps=6", "ignore_config_change=true")
    assert not equal(weights(folder), before)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=1", "seed"),
        ("batch_size=3", "batch_size"),
        ("model.num_groups=4", r"model\.num_groups"),
        ("optimizer=sgd", r"optimizer\._target_"),
        ("+optimizer.amsgrad=true", r"optimizer\.amsgrad"),
        ("ema_decay=0.9", "ema_decay"),
        ("dataset.crop=[40,40]", r"dataset\.crop"),
    ],
)
def test_keys_that_cannot_change_are_named(train, override, key):
    train("run")
    with pytest.raises(InputError, match=rf"these keys cannot change within a run: {key} \("):
        train("run", override, "ignore_config_change=true")


def test_a_run_goes_on_in_fp16(train):
    train("run", "determinism=none", "precision=fp32")
    longer = ("schedule.train.steps=4", "ignore_config_change=true")
    folder = train("run", "determinism=none", "precision=fp16", *longer)
    assert checkpoint.load(folder / "checkpoints" / "last.pt")["scaler"]


def test_which_keys_take_effect():
    assert takes_effect("optimizer.weight_decay")
    assert takes_effect("schedule.finetune.loss.tau")
    assert not takes_effect("schedule.finetune.dataset.crop")
    assert differing_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 3}}) == {"a.c": (2, None), "a.d": (None, 3)}


@pytest.mark.parametrize(("kind", "effective"), [("RMSprop", False), ("SGD", True)])
def test_a_momentum_from_nothing_needs_an_optimizer_that_begins_one(tmp_path, kind, effective):
    own = ["optimizer=sgd", "~optimizer.nesterov", f"optimizer._target_=torch.optim.{kind}"]
    own.append("ignore_config_change=true")
    before = plain(compose([*own, "optimizer.momentum=0"]))
    with (
        contextlib.nullcontext() if effective else pytest.raises(InputError, match=r"optimizer.momentum \(0 there, 0.9")
    ):
        assert check_changes(tmp_path, before, compose([*own, "optimizer.momentum=0.9"])) == {
            "optimizer.momentum": (0, 0.9)
        }


def test_a_key_of_a_recipe_is_no_change(tmp_path):
    """What reads it stands in the configuration with its value; an older version may not have had it."""
    config = compose(["dataset=folder", "dataset.root=/data"])
    before = plain(config)
    del before["dataset"]["recipe"]["evaluate_every"]
    assert check_changes(tmp_path, before, config) == {}
    before["evaluation"]["every_epochs"] = 1.0
    with pytest.raises(InputError, match=r"these keys differ: evaluation.every_epochs \(1.0 there, 3.0 now\)\. Give"):
        check_changes(tmp_path, before, config)


def test_changed_data_are_refused_with_their_number(train, tmp_path):
    root = make_sample("camvid", tmp_path / "data", num_images=6, scale=0.2)
    data = ("dataset=camvid", f"dataset.root={root}")
    train("run", data=data)
    train("run", data=data)
    label = sorted((root / "trainannot").iterdir())[0]
    label.write_bytes(label.read_bytes() + b"\0")
    message = rf"data of phase train, train are not those .* 1 samples changed, 0 came and 0 went.*{label.stem}"
    with pytest.raises(InputError, match=message):
        train("run", data=data)
    train("run", "ignore_config_change=true", data=data)


def test_labels_of_another_meaning_are_refused(tmp_path, train):
    """Also where changed files are allowed: a run has trained for the classes that it began with."""
    root = make_sample("folder", tmp_path / "data", num_images=4, scale=0.1)
    data = ("dataset=folder", f"dataset.root={root}")
    train("run", data=data)
    table = root / "classes.yaml"
    text = table.read_text()
    first, second = yaml.safe_load(text)["names"][:2]
    for changed in (text.replace(first, "other"), text.replace(first, "?").replace(second, first).replace("?", second)):
        assert changed != text
        table.write_text(changed)
        for more in (), ("ignore_config_change=true", "optimizer.lr=1e-3"):
            with pytest.raises(
                InputError, match=r"labels of phase train, train have another meaning than when the run"
            ):
                train("run", *more, data=data)


def test_images_that_were_trained_on_are_said_where_the_data_are_split_anew(tmp_path, train, capsys, monkeypatch):
    root = make_sample("folder", tmp_path / "data", num_images=6, scale=0.1)
    for kind in ("images", "labels"):
        for path in sorted((root / kind).rglob("*.*")):
            path.rename(root / kind / f"{path.parent.name}_{path.name}")
        for split in ("train", "val"):
            (root / kind / split).rmdir()
    run = train("run", data=("dataset=folder", f"dataset.root={root}", "dataset.reader.val_fraction=0.5"))
    verb_function("evaluate")([str(run), "--workers", "0", "--device", "cpu"])
    assert "trained on" not in capsys.readouterr().err
    for sample in open_dataset("folder", root=root, split="val", val_fraction=0.5).samples:
        sample.image.unlink()
        sample.labels[0].unlink()
    seen = open_dataset("folder", root=root, split="val", val_fraction=0.5).samples
    verb_function("evaluate")([str(run), "--workers", "0", "--device", "cpu"])
    said = f"warning: {len(seen)} of the {len(seen)} images, {seen[0].name} for one, were trained on"
    assert said in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr("segkit.run.changes.MOST_BYTES", 9)
    with pytest.raises(InputError, match=r"files\.json\.gz cannot be read \(it holds more than 9 bytes\): delete it"):
        verb_function("evaluate")([str(run), "--workers", "0", "--device", "cpu"])


def test_a_validation_split_without_labels_is_refused_and_images_of_both_splits_are_said(tmp_path, train, capsys):
    root = make_sample("folder", tmp_path / "data", num_images=4, scale=0.1)
    data = ("dataset=folder", f"dataset.root={root}")
    seen, new = (sorted((root / "images" / split).iterdir())[0] for split in ("train", "val"))
    (root / "images" / "test").mkdir()
    (root / "images" / "test" / seen.name).write_bytes(seen.read_bytes())
    with pytest.raises(InputError, match=r"split 'test' of folder has no labels; use a labelled split"):
        train("run", "dataset.val_split=test", data=data)
    (root / "both.txt").write_text(f"train/{seen.name}\nval/{new.name}\n")
    run = train("run", "dataset.val_split=both", data=data)
    said = f"warning: 1 of the 2 images of split both are in train as well, {seen} for one, so that the scores are too"
    assert said in " ".join(capsys.readouterr().out.split())
    with pytest.raises(InputError, match=r"split 'test' of folder has no labels"):
        verb_function("evaluate")([str(run), "--split", "test", "--device", "cpu"])


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (np.full((38, 51), 77, np.uint8), r"label .*\.png has values .*: 77 \(1938 pixels\); allowed are"),
        (np.zeros((51, 38), np.uint8), r"image .* is 51x38 but its label .* is 38x51; both must have the same size"),
    ],
)
def test_a_bad_label_is_refused_before_the_first_step(split, mask, sentence, tmp_path, train):
    root = make_sample("folder", tmp_path / "data", num_images=6, scale=0.1)
    last = sorted((root / "labels" / split).iterdir())[-1]
    Image.fromarray(mask).save(last)
    data = ("dataset=folder", f"dataset.root={root}")
    with pytest.raises(InputError, match=sentence):
        train("run", "evaluation.max_images=null", data=data)
    assert not list((tmp_path / "run").rglob("*.pt"))
    if split == "val":
        train("run", data=data)  # which evaluates on the two before it


def test_copied_data_are_said(train, tmp_path, capsys):
    root = make_sample("camvid", tmp_path / "data", num_images=6, scale=0.2)
    data = ("dataset=camvid", f"dataset.root={root}")
    train("run", data=data)
    root = root.rename(tmp_path / "elsewhere")
    for path in root.rglob("*.png"):
        os.utime(path, (1, 1))
    train("run", data=("dataset=camvid", f"dataset.root={root}"))
    assert "the files of phase train, train were copied since the run was started" in capsys.readouterr().out


def test_labels_written_again_in_the_same_size_are_refused(train, tmp_path):
    root = make_sample("camvid", tmp_path / "data", num_images=6, scale=0.2)
    data = ("dataset=camvid", f"dataset.root={root}")
    train("run", data=data)
    for path in (root / "trainannot").iterdir():
        os.utime(path, (1, 1))
    with pytest.raises(InputError, match=r"data of phase train, train are not those .* [56] samples changed"):
        train("run", data=data)


def test_a_run_that_has_trained_nothing_is_started_again(train, tmp_path):
    """Its config.yaml does not stand in the way."""
    folder = train("run")
    for path in sorted((folder / "train").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    train("run", "seed=1")
    assert "seed: 1" in (folder / "config.yaml").read_text()


def test_a_copy_that_follows_links_goes_on_without_what_the_sentence_names(train, tmp_path):
    """As scp -r and zip make it."""
    shutil.copytree(train("run"), tmp_path / "copy")
    named = ["checkpoints", "label_counts.json", "per_image.npz", "results.json"]
    with pytest.raises(InputError, match=rf"{', '.join(named)} in .*copy must be links to the last phase, and are non"):
        train("copy")
    for name in named:
        (tmp_path / "copy" / name).rename(tmp_path / name)
    assert (train("copy") / "checkpoints").is_symlink()


def test_a_mistake_leaves_no_folder(train, tmp_path):
    with pytest.raises(InputError, match="tau must be a finite number"):
        train("run", "loss=margin_calibration", "loss.tau=-1")
    assert not (tmp_path / "run").exists()


HOLD = """
import sys
from pathlib import Path
from segkit.run.folder import RunFolder
with RunFolder(Path(sys.argv[1]), None).held():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_a_dead_one_is_not_waited_for(tmp_path):
    path = tmp_path / "run"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    folder = RunFolder(path, None)
    with pytest.raises(InputError, match=rf"process {first.pid} on .* trains in"), folder.held():
        pass
    first.kill()
    first.communicate()
    assert path.is_dir()
    with folder.held():
        pass
    assert not path.exists()  # nothing was left in it


def test_a_flipped_bit_is_noticed_wherever_a_checkpoint_is_loaded(train):
    folder = train("run")
    for name in ("last", "best"):
        path = folder / "checkpoints" / f"{name}.pt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}\.pt is damaged, its content does not match checksums\.json"):
            checkpoint.load(path)
    with pytest.raises(InputError, match="is damaged"):
        train("other", f"init_from={folder}")
    (folder / "checkpoints" / "checksums.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged"):
        checkpoint.load(folder / "checkpoints" / "last.pt")
    (folder / "checkpoints" / "checksums.json").unlink()
    with pytest.raises(InputError, match=r"last\.pt is damaged, its content does not match the checksums within it"):
        checkpoint.load(folder / "checkpoints" / "last.pt")


def test_weights_of_a_phase_are_needed_until_the_next_one_has_its_own(tmp_path, monkeypatch):
    """Who needs room deletes the checkpoints of the phases before. What is refused opens no finished phase again."""
    steps = [f"schedule.{name}.{key}" for name in ("pretrain", "finetune") for key in ("epochs=null", "steps=1")]
    two = ["schedule=pretrain_finetune", *steps, *(item for item in SMALL if not item.startswith("schedule"))]
    config = compose([*two, *PAINTED, f"cache_dir={tmp_path}/cache"])

    def train() -> float:
        return pipeline.run(config, tmp_path / "run", open_phases(config))

    before = train()
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "run/pretrain/checkpoints")
    assert train() == before
    (tmp_path / "run/finetune/results.json").unlink()
    assert train() == before
    shutil.rmtree(tmp_path / "run/finetune")
    with pytest.raises(InputError, match=r"last\.pt, from which the next phase starts, is gone: copy it back, or"):
        train()
    monkeypatch.setattr(pipeline, "prepare_phase", prepared_but("finetune"))
    config = replace(config, ignore_config_change=True)
    config.schedule["pretrain"].steps = 2
    with pytest.raises(InputError, match="finetune is refused"):
        train()
    assert (tmp_path / "run/pretrain/results.json").is_file()


def prepared_but(refused: str) -> Callable[..., Phase]:
    """prepare_phase, which refuses the phase ``refused``."""

    def prepare(config: Config, name: str, **others: Any) -> Phase:
        if name == refused:
            raise InputError(f"{name} is refused")
        return prepare_phase(config, name, **others)

    return prepare


def test_links_at_the_top_lead_to_the_last_phase_that_there_is_now(tmp_path):
    """A start that ended before its first checkpoint leaves links to a phase that another schedule may not have."""
    for schedule, last in (("single", "train"), ("pretrain_finetune", "finetune")):
        RunFolder(tmp_path, compose([f"schedule={schedule}"])).link_last_phase()
        assert (tmp_path / "checkpoints").resolve() == (tmp_path / last / "checkpoints").resolve()


def test_margins_of_a_start_with_another_loss_do_not_stay(tmp_path):
    rho = torch.tensor([0.5, 1.0])
    write_margins(tmp_path, MarginCalibrationLoss(rho_k0=rho, rho_0k=rho), {}, ["a", "b"])
    assert json.loads((tmp_path / "margins.json").read_text())["rho_0k"] == [0.5, 1.0]
    write_margins(tmp_path, CrossEntropyLoss(), {}, ["a", "b"])
    assert not (tmp_path / "margins.json").exists()


def test_pictures_of_an_earlier_end_do_not_stay(tmp_path):
    """A run that goes on may store fewer, or none; a report would take the old ones for what it predicts now."""
    (tmp_path / "pictures").mkdir()
    for name in ("pictures.png", "pictures/index.json"):
        (tmp_path / name).touch()
    validation = Validation.__new__(Validation)
    validation.last = SimpleNamespace(per_image=SimpleNamespace(to_bytes=lambda: b"counts"), pictures=[])
    validation.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["per_image.npz"]
