"""The largest batch that fits: the line through two measurements, and a run that uses it and goes on with it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from segkit import errors, memory
from segkit.config import targets
from segkit.config.compose import compose
from segkit.models import Segmenter
from segkit.run import auto_batch, pipeline
from segkit.run.splits import open_phases

MIB = 2**20
SMALL = (
    "auto_batch=true",
    "schedule=single",
    "loss=cross_entropy",
    "dataset.reader.num_images=23",
    "dataset.reader.size=[96,96]",
    "dataset.crop=[96,96]",
    "limit_steps=2",
    "evaluation.max_images=2",
    "evaluation.pictures=0",
    "workers=0",
    "device=cpu",
    "model=coplenet",
    "model.feature_channels=[8,16,32,64,128]",
)


@pytest.mark.parametrize(
    ("peaks", "budget", "images"),
    [
        ({2: 300, 4: 400}, 1000, 16),  # 200 + 50 n
        ({2: 300, 4: 400}, 1049, 16),
        ({2: 300, 4: 400}, 1050, 17),
        ({2: 300, 4: 400}, 300, 2),
        ({2: 300, 4: 400}, 100, 0),
    ],
)
def test_the_line_through_two_measurements(peaks, budget, images):
    assert auto_batch.images_that_fit(peaks, budget) == images


def test_a_step_is_measured_as_it_is(tmp_path, monkeypatch):
    """Two more images take more memory, by at least their own activations; the user's script is not run again.

    The model may be of a package that the user trusts.
    """
    net = "def net(num_classes, **options):\n    return COPLENet(3, num_classes, **options)\n"
    (tmp_path / "own_net.py").write_text(f"from segkit.models import COPLENet\n\n\n{net}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(targets, "_trusted", set())
    (tmp_path / "script.py").write_text("raise SystemExit('run by the process that measures')\n")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "script.py"), raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    config = compose(
        ["precision=fp32", *SMALL, "dataset.crop=[256,256]", "trust=[own_net]", "model._target_=own_net.net"]
    )
    phases = open_phases(config)
    peaks = auto_batch.measure_alone(config, "train", phases["train"].train.classes, torch.device("cpu"))
    one_level = 2 * 8 * 256 * 256 * 4  # two images, eight channels of the first convolution, float32
    assert peaks[4] - peaks[2] > 4 * one_level


def run(folder: Path, *overrides: str, stop=None) -> None:
    config = compose([*SMALL, f"cache_dir={folder.parent}/cache", *overrides])
    pipeline.run(config, folder, open_phases(config), stop=stop)


def test_a_run_takes_the_largest_batch_and_goes_on_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(auto_batch, "measure_alone", lambda *arguments: {2: 300 * MIB, 4: 400 * MIB})
    monkeypatch.setattr(memory, "held", lambda device: 0)
    monkeypatch.setattr(memory, "available", lambda device: 600 * MIB)  # 85 % of it: 510, 6 images
    run(tmp_path / "run", "accumulate=2")
    assert "auto_batch: batch_size=12 instead of 8" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "results.json").read_text())["training"]["batch_size"] == 12
    noted = json.loads((tmp_path / "run" / "provenance.json").read_text())["auto_batch"]
    assert (noted["batch_size"], noted["asked"], noted["phases"]["train"]["images_at_once"]) == (12, 8, 6)
    monkeypatch.setattr(memory, "available", lambda device: 400 * MIB)  # less than before: the run keeps its batch
    (tmp_path / "run" / "train" / "results.json").unlink()
    run(tmp_path / "run", "accumulate=2")
    assert "auto_batch: batch_size=12, as before" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "train")  # a start that came to nothing: its config.yaml alone is left
    run(tmp_path / "run", "accumulate=2")
    assert "auto_batch: batch_size=4 instead of 8" in capsys.readouterr().out


def test_no_batch_is_larger_than_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(auto_batch, "measure_alone", lambda *arguments: {2: 300, 4: 301})
    run(tmp_path / "run")
    assert "batch_size=23 instead of 8" in capsys.readouterr().out


def test_a_signal_that_ends_the_measuring_process_as_well_is_no_lack_of_memory(tmp_path, monkeypatch):
    def ended(config, name, classes, device):
        raise auto_batch._does_not_fit(config, name, device, MemoryError("the system ended the process that tried"))

    monkeypatch.setattr(auto_batch, "measure_alone", ended)
    with pytest.raises(errors.Interrupted, match="stopped while auto_batch measured memory"):
        run(tmp_path / "run", stop=lambda: True)


@pytest.mark.parametrize(
    ("part", "message"), [("model", r"in evaluation mode .* fails \(Run"), ("loss", "the loss .* fai")]
)
def test_a_model_or_a_loss_that_fails_is_refused_before_anything_is_measured(tmp_path, monkeypatch, part, message):
    class Fails(torch.nn.Module):
        def forward(self, *arguments):
            raise RuntimeError("not of this size")

    made = Segmenter(Fails()) if part == "model" else Fails()
    monkeypatch.setattr(auto_batch, f"build_{part}", lambda *_, **__: made)
    monkeypatch.setattr(auto_batch, "measure_alone", lambda *_: pytest.fail("measured"))
    config = compose([*SMALL[:-2], "model=deeplabv3plus_tiny"])
    with pytest.raises(errors.InputError, match=message):
        auto_batch.choose_batch(config, begun=None, phases=open_phases(config), device=torch.device("cpu"))
    (tmp_path / "run" / "config.yaml").mkdir(parents=True)
    with pytest.raises(errors.InputError, match="is no file"):
        run(tmp_path / "run")


def test_probes_that_do_not_fit_say_what_helps(monkeypatch):
    def greedy(*arguments, **options):
        torch.empty(2**56)

    monkeypatch.setattr(auto_batch, "train_step", greedy)
    config = compose([*SMALL])
    with pytest.raises(
        errors.OutOfMemory, match=r"while auto_batch tried 2 to 4 images at once.*grad_checkpointing=light"
    ):
        auto_batch.measure(config, "train", ("a", "b"), torch.device("cpu"))


PEAKS = {False: 300, "light": 200, "mixed": 120, True: 100}


@pytest.mark.parametrize(
    ("now", "budget", "policy"),
    [(False, 850, "light"), (False, 700, "mixed"), ("light", 850, "mixed"), ("mixed", 450, "true"), (False, 300, None)],
)
def test_the_cheapest_policy_that_fits(monkeypatch, now, budget, policy):
    """Bytes an image are those of PEAKS, and 4 of 8 images are taken at once."""
    peaks = {name: {2: 2 * size, 4: 4 * size} for name, size in PEAKS.items()}
    monkeypatch.setattr(auto_batch, "measure_alone", lambda config, *rest: peaks[config.grad_checkpointing])
    monkeypatch.setattr(auto_batch, "_budget", lambda device: budget)
    config = compose([*SMALL, "batch_size=8", "accumulate=2", f"grad_checkpointing={str(now).lower()}"])
    assert auto_batch.cheapest_policy(config, open_phases(config), torch.device("cpu")) == policy


def test_a_smaller_batch_than_was_asked_for_names_the_policy_with_which_it_fits(monkeypatch, tmp_path, capsys):
    peaks = {False: {2: 300 * MIB, 4: 400 * MIB}, "light": {2: 200 * MIB, 4: 250 * MIB}}
    monkeypatch.setattr(auto_batch, "measure_alone", lambda config, *rest: peaks[config.grad_checkpointing])
    monkeypatch.setattr(memory, "held", lambda device: 0)
    monkeypatch.setattr(memory, "available", lambda device: 600 * MIB)  # 85 % of it: 510, 6 images, or 14
    run(tmp_path / "run")
    assert "batch_size=6 instead of 8" in (text := capsys.readouterr().out)
    assert "8 fit with grad_checkpointing=light" in text
