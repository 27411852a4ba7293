"""A sweep on this machine: the shared phase is trained once, a failed job does not hide, the rest goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from segkit.sweeps.jobs import Job, LocalSweep

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
SMALL = [
    "debug=smoke",
    "limit_steps=2",
    "batch_size=2",
    "dataset.crop=[64,64]",
    "evaluation.max_images=2",
    "device=cpu",
    "model=coplenet",
    "model.feature_channels=[4,8,16,32,64]",
    "model.num_groups=2",
]


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    fixed = [*SMALL, f"hydra.sweep.dir={folder}/sweep", f"cache_dir={folder}/cache"]
    command = [sys.executable, str(TRAIN), "-m", *fixed, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("goes_on", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_a_sweep_with_a_job_that_fails(tmp_path, goes_on):
    done = sweep(tmp_path, "loss.upsilon=1e-9,2.0")
    assert done.returncode == 1
    status = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [job["state"] for job in status] == ["failed", "finished"]
    assert "upsilon = 1e-09 is too small" in status[0]["error"]
    assert "1 of 2 jobs did not finish" in done.stderr
    results = json.loads((tmp_path / "sweep" / "1" / "results.json").read_text())
    assert status[1]["mean_iou"] == results["mean_iou"]

    if not goes_on:
        return
    again = sweep(tmp_path, "loss.upsilon=1e-9,2.0")  # in the same folders: nothing is trained twice
    assert again.returncode == 1
    states = [job["state"] for job in json.loads((tmp_path / "sweep" / "sweep.json").read_text())]
    assert states == ["failed", "finished"]
    assert "phase pretrain: finished already" in (tmp_path / "sweep" / "1" / "log.txt").read_text()


def test_jobs_must_be_positive(tmp_path):
    done = sweep(tmp_path, "sweep.jobs=0", "loss.tau=1,2")
    assert done.returncode == 2
    assert "sweep.jobs is 0, but must be at least 1" in done.stderr


def test_a_table_shows_overrides_as_they_are_written():
    sweep = LocalSweep(Path("a [bold]"), jobs=1)
    sweep.jobs = [Job(0, ["name=car [rare]"], "0"), Job(1, ["name=tool [/x]\x1b[2J"], "1", "finished", 0.5)]
    text = sweep.table()
    assert "name=car [rare]" in text
    assert r"name=tool [/x]\x1b[2J" in text
    assert "2 jobs in a [bold]" in text
