"""The door for Python: the same numbers as the command, twice in one process, mistakes as exceptions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import segkit
from segkit.errors import InputError

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
SMALL = [
    "schedule=single",
    "loss=cross_entropy",
    "model=deeplabv3plus_tiny",
    "dataset.reader.num_images=6",
    "dataset.reader.size=[64,64]",
    "dataset.crop=[64,64]",
    "batch_size=2",
    "limit_steps=2",
    "evaluation.max_images=2",
    "evaluation.pictures=0",
    "workers=0",
    "device=cpu",
    "determinism=strict",
]


@pytest.mark.slow
def test_the_same_numbers_as_the_command_twice_in_one_process(tmp_path):
    small = [*SMALL, f"cache_dir={tmp_path}/cache"]
    results = [segkit.train(small, folder=tmp_path / name) for name in ("first", "second")]
    command = [sys.executable, str(TRAIN), *small, f"hydra.run.dir={tmp_path}/command"]
    subprocess.run(command, check=True, capture_output=True)
    expected = json.loads((tmp_path / "command" / "results.json").read_text())
    for result, name in zip(results, ("first", "second"), strict=True):
        assert result == {**expected, "folder": str(tmp_path / name)}
        assert (tmp_path / name / "metrics.jsonl").read_bytes() == (tmp_path / "command/metrics.jsonl").read_bytes()


def test_the_function_stays_one_whatever_is_imported():
    """A module of the name would take its place as soon as something imports it."""
    from segkit import cli

    for verb in cli.VERBS:
        cli.verb_function(verb)
    assert callable(segkit.train)


def test_a_mistake_is_an_exception(tmp_path):
    with pytest.raises(InputError, match="seed is -1"):
        segkit.train(["seed=-1"], folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_code_of_ones_own_is_trusted_on_the_command_line_only(tmp_path, monkeypatch):
    """A loss and its option from a folder that is not segkit's; a saved run cannot bring its own trust."""
    from segkit.commands import evaluate
    from segkit.run.saved import open_run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("segkit.config.targets._trusted", set())
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_losses.py").write_text(
        "from segkit.losses import CrossEntropyLoss\n\n\nclass Own(CrossEntropyLoss):\n"
        "    def __init__(self, *, ignore_index: int = 255, strength: float = 1.0):\n"
        "        super().__init__(ignore_index=ignore_index)\n"
    )
    (tmp_path / "mine" / "loss").mkdir(parents=True)
    (tmp_path / "mine" / "loss" / "own.yaml").write_text("_target_: own_losses.Own\nstrength: 1.0\n")
    own = [item for item in SMALL if not item.startswith("loss=")] + ["loss=own", f"cache_dir={tmp_path}/cache"]
    with pytest.raises(InputError, match=r"loss\._target_ is 'own_losses\.Own', but must be one of"):
        segkit.train(own, folder="run", config_dirs=["mine"])
    segkit.train([*own, "trust=[own_losses]"], folder="run", config_dirs=["mine"])
    assert "own_losses" in (tmp_path / "run" / "config.yaml").read_text()
    monkeypatch.setattr("segkit.config.targets._trusted", set())
    with pytest.raises(InputError, match=r"loss\._target_ is 'own_losses\.Own', but must be one of"):
        open_run("run")
    evaluate.run(["run", "--trust", "own_losses", "--device", "cpu", "--max-images", "1"])
    with pytest.raises(InputError, match=r"trust has 'own/losses', but takes names of packages"):
        evaluate.parser().parse_args(["run", "--trust", "own/losses"])
