"""``segkit replay``: from a run that fails to what the failed step looks like from the inside."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch

from segkit.commands import replay
from segkit.config.compose import compose
from segkit.data import bands
from segkit.errors import InputError, NonFiniteLoss
from segkit.run import pipeline
from segkit.run.splits import open_phases
from segkit.synthetic.sample_maker import make_sample
from segkit.training import trainer
from segkit.training.step import train_step

SMALL = (
    "dataset.crop=[32,32]",
    "batch_size=2",
    "loss=cross_entropy_dice",
    "schedule=single",
    "limit_steps=6",
    "evaluation.pictures=0",
    "workers=0",
    "device=cpu",
    "model=coplenet",
    "model.feature_channels=[4,8,16,32,64]",
    "model.num_groups=2",
)
SYNTHETIC = ("dataset.reader.num_images=6", "dataset.reader.size=[64,64]")


def train(folder: Path, *overrides: str) -> None:
    config = compose([*SMALL, f"cache_dir={folder}/../cache", *overrides])
    pipeline.run(config, folder, open_phases(config))


@pytest.fixture
def replayed(monkeypatch, capsys):
    def run(*arguments: str) -> str:
        argv = [*map(str, arguments)]
        capsys.readouterr()
        replay.run(argv)
        return capsys.readouterr().out

    return run


def test_a_diverged_run(tmp_path, replayed):
    with pytest.raises(NonFiniteLoss, match=r"segkit replay"):
        train(tmp_path / "run", *SYNTHETIC, "optimizer=sgd", "optimizer.lr=1e30")
    (bundle,) = (tmp_path / "run" / "train").glob("failure-*")
    noted = json.loads((bundle / "error.json").read_text())
    found = json.loads(replayed(bundle, "--json"))
    assert found == noted["findings"]
    assert found["first_non_finite_module"] is not None
    assert found["logits"]["not_finite"] > 0
    assert set(found["terms"]) == {"cross_entropy", "dice"}
    text = replayed(bundle)
    assert f"first module with a non-finite output: {found['first_non_finite_module']}" in text
    assert f"step {noted['step'] + 1}" in text
    assert all(name in text for name in noted["names"])
    for name in ("config.json", "label_counts.json"):
        content = (bundle / name).read_text()
        (bundle / name).write_text(content[: len(content) // 2])
        with pytest.raises(InputError, match=rf"{name} cannot be read .*: the bundle is damaged; copy it again"):
            replayed(bundle)
        (bundle / name).write_text(content)
    flipped = bytearray((bundle / "batch.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    for content, why in ((flipped, "is damaged, its content does not match"), (flipped[:99], "cannot be read as")):
        (bundle / "batch.pt").write_bytes(content)
        with pytest.raises(InputError, match=rf"batch\.pt {why} .*: (it is .*; )?copy it again"):
            replayed(bundle)
    for name in ("state.pt", "label_counts.json", "config.json"):
        (bundle / name).unlink()
        with pytest.raises(InputError, match=rf"has no {name}: the bundle is damaged; copy it again"):
            replayed(bundle)


def test_a_loss_that_follows_the_training_is_as_it_was(tmp_path, replayed, monkeypatch):
    def failing(*arguments, **options):
        if next(steps) == 3:
            raise NonFiniteLoss("the loss is nan")
        return train_step(*arguments, **options)

    steps = itertools.count()
    monkeypatch.setattr(trainer, "train_step", failing)
    with pytest.raises(NonFiniteLoss):
        train(tmp_path / "run", *SYNTHETIC, "loss=iou_margin", "loss.momentum=0.5")
    (bundle,) = (tmp_path / "run" / "train").glob("failure-*")
    assert json.loads(replayed(bundle, "--json")) == json.loads((bundle / "error.json").read_text())["findings"]
    state = torch.load(bundle / "state.pt")
    torch.save({**state, "loss": {}}, bundle / "state.pt")
    with pytest.raises(InputError, match=r"state\.pt lacks what the loss had followed: the bundle is damaged"):
        replayed(bundle)


def test_a_file_that_could_not_be_read_and_now_can(tmp_path, replayed, monkeypatch):
    root = make_sample("folder", tmp_path / "data", num_images=4, scale=0.2)
    broken = sorted((root / "images" / "train").iterdir())[1]
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    read = bands.read_header  # else it is refused before the first step
    monkeypatch.setattr(bands, "read_header", lambda path, kind: (read(path, kind)[0], True))
    with pytest.raises(InputError, match=rf"{broken.name}.*had no batch, see .*failure-\d+.*state before it is saved"):
        train(tmp_path / "run", "dataset=folder", f"dataset.root={root}", "dataset.sampler=class_balanced")
    (bundle,) = (tmp_path / "run" / "train").glob("failure-*")
    noted = json.loads((bundle / "error.json").read_text())
    assert broken.stem in " ".join(noted["names"])
    with pytest.raises(InputError, match=broken.name):
        replayed(bundle)
    broken.write_bytes(content)
    noted["names"][0] = "another"
    (tmp_path / "changed").mkdir()
    for name, text in (("error", json.dumps(noted)), ("config", None), ("label_counts", None)):
        (tmp_path / "changed" / f"{name}.json").write_text(text or (bundle / f"{name}.json").read_text())
    with pytest.raises(
        InputError, match=r"the data have changed: the samples of this step are .* now, but were another"
    ):
        replayed(tmp_path / "changed")
    (tmp_path / "changed" / "batch.pt").mkdir()
    with pytest.raises(InputError, match=r"has no batch\.pt: the bundle is damaged"):
        replayed(tmp_path / "changed")
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps({**config, "cache_dir": str(tmp_path / "theirs")}))
    shown = []
    monkeypatch.setattr(replay, "show", lambda text, **_: shown.append(text))
    found = json.loads(replayed(bundle, "--json"))
    assert shown == ["note: no batch could be read, so no weights were kept: those of a new model are used"]
    assert found["logits"]["not_finite"] == 0
    assert found["gradient_norm"] > 0
    assert not (tmp_path / "theirs").exists()


def test_what_is_no_bundle(tmp_path, replayed):
    with pytest.raises(InputError, match=r"is no failure bundle, it has no error.json"):
        replayed(tmp_path)


@pytest.mark.parametrize("key", ["images", "labels"])
@pytest.mark.parametrize(
    "odd",
    [
        lambda value: value.to_sparse(),
        lambda value: value.to("meta"),
        lambda value: torch.zeros(1, dtype=torch.uint8).expand(value.shape),
    ],
)
def test_a_batch_whose_values_are_not_in_the_file_is_refused(tmp_path, key, odd):
    """A few bytes can stand for terabytes; others have no values at all."""
    batch = {"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "labels": torch.zeros(2, 8, 8, dtype=torch.uint8)}
    batch |= {"names": ["a", "b"], "indices": [0, 1]}
    torch.save(batch, tmp_path / "batch.pt")
    kind = compose([]).images
    assert replay.stored_batch(tmp_path, kind).images.shape == (2, 3, 8, 8)
    with warnings.catch_warnings(action="ignore"):
        torch.save(batch | {key: odd(batch[key])}, tmp_path / "batch.pt")
        with pytest.raises(InputError, match=r"batch\.pt holds no images \(N, 3, H, W\) of uint8 and labels"):
            replay.stored_batch(tmp_path, kind)
