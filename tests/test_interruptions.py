"""Runs as processes: killed at random moments, asked to stop, out of disk, without their loading processes.

The processes fork from one that has the imports behind it (see scripts/soak.py) and do what ``python train.py`` does.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import soak  # noqa: E402

from segkit.errors import InputError, Interrupted  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def arguments(folder: Path, *overrides: str, cache: Path | None = None) -> list[str]:
    return [*soak.SMALL, f"hydra.run.dir={folder}", f"cache_dir={cache or folder.with_suffix('.cache')}", *overrides]


def finish(folder: Path, *overrides: str) -> str:
    """Run to the end; returns the output."""
    log = folder.with_suffix(".log")
    process = soak.start(arguments(folder, *overrides), log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    return log.read_text()


def wait_for(folder: Path, pattern: str, process, lines: int = 0) -> None:
    """Wait until a file that matches ``pattern`` is there, with more than ``lines`` lines."""
    end = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < end:
        if any(path.read_bytes().count(b"\n") > lines for path in folder.glob(pattern)):
            return
        time.sleep(0.002)
    pytest.fail(f"{pattern} did not come: {folder.with_suffix('.log').read_text()}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """uninterrupted(options...) -> (hashes, seconds) of a run that nothing happened to."""
    soak.warm_up()

    @functools.cache
    def run(*options: str) -> tuple[dict[str, str], float]:
        begun = time.monotonic()
        folder = tmp_path_factory.mktemp("whole") / "run"
        finish(folder, *options)
        return soak.hashes(folder), time.monotonic() - begun

    return run


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.nightly if "4 workers" in name else ()) for name in soak.VARIANTS]
)
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, uninterrupted, variant):
    options = soak.VARIANTS[variant]
    expected, duration = uninterrupted(*options)
    kills = soak.kill_and_resume(
        [*soak.SMALL, *options], tmp_path / "run", chance=random.Random(len(variant)), duration=duration / 3, most=1
    )
    assert list(kills)
    assert soak.hashes(tmp_path / "run") == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_its_own_code(tmp_path, uninterrupted, number):
    process = soak.start(arguments(tmp_path / "run", "checkpoint_every=null", "workers=1"), tmp_path / "run.log")
    wait_for(tmp_path / "run", "pretrain/timing.jsonl", process)
    os.kill(process.pid, number)
    process.join()
    log = (tmp_path / "run.log").read_text()
    assert process.exitcode == Interrupted.exit_code, log
    assert "\nstopped " in log
    assert "the state is saved: run the same command with the same hydra.run.dir to go on" in log
    assert "Traceback" not in log
    assert soak.wait_until_gone(process.pid)
    if number == signal.SIGTERM:
        assert "going on from step" in finish(tmp_path / "run", "checkpoint_every=null", "workers=0")
        assert soak.hashes(tmp_path / "run") == uninterrupted("workers=1")[0]


def test_a_signal_to_all_processes_of_the_run_is_the_same(tmp_path):
    """Schedulers of clusters tell every process; the loading ones then end at once."""
    process = soak.start(arguments(tmp_path / "run", "workers=2"), tmp_path / "run.log")
    wait_for(tmp_path / "run", "pretrain/timing.jsonl", process)
    os.killpg(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == Interrupted.exit_code, (tmp_path / "run.log").read_text()


def test_a_killed_loading_process_ends_in_a_sentence(tmp_path):
    options = ("workers=2", "schedule.pretrain.steps=100000", "limit_steps=100000")
    process = soak.start(arguments(tmp_path / "run", *options), tmp_path / "run.log")
    wait_for(tmp_path / "run", "pretrain/timing.jsonl", process)
    children = [pid for pid in soak.group_members(process.pid) if pid != process.pid]
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    process.join()
    log = (tmp_path / "run.log").read_text()
    assert process.exitcode == InputError.exit_code, log
    assert "error: a loading process died" in log
    assert "the state before it is saved" in log
    assert (tmp_path / "run/pretrain/checkpoints/last.pt").is_file()
    assert list((tmp_path / "run/pretrain").glob("failure-*/error.json"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one phase and a half; call it to make room for more."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a file system can be mounted by root only")

    mount("size=20m")
    yield folder, lambda: mount("remount,size=80m")
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_one_interval_at_most(small_disk, tmp_path, uninterrupted):
    """Checkpoints fail, training goes on and says so; with room again the run ends as if nothing had happened."""
    disk, make_room = small_disk
    log = tmp_path / "run.log"
    overrides = [*soak.SMALL, f"hydra.run.dir={disk}/run", f"cache_dir={tmp_path}/cache", "workers=0"]
    process = soak.start(overrides, log)
    process.join()
    assert process.exitcode == InputError.exit_code, log.read_text()
    assert "warning: the checkpoint" in log.read_text()
    assert "error: the checkpoint" in log.read_text()
    assert "No space left on device" in log.read_text()
    assert "free some space or choose another hydra.run.dir" in log.read_text()
    make_room()
    process = soak.start(overrides, log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert soak.hashes(disk / "run") == uninterrupted("workers=1")[0]


def test_two_runs_at_once_train_a_common_phase_once(tmp_path):
    names = ("one", "two")
    runs = [
        soak.start(
            arguments(tmp_path / name, "workers=0", f"schedule.finetune.lr={lr}", cache=tmp_path / "cache"),
            tmp_path / f"{name}.log",
        )
        for name, lr in zip(names, (0.001, 0.002), strict=True)
    ]
    for process in runs:
        process.join()
    logs = [(tmp_path / f"{name}.log").read_text() for name in names]
    assert [process.exitcode for process in runs] == [0, 0], logs
    assert sum("phase pretrain: taken from the cache" in log for log in logs) == 1, logs
    assert sum("pretrain step" in log for log in logs) == 1, logs
    last = [(tmp_path / name / "pretrain/checkpoints/last.pt").read_bytes() for name in names]
    assert last[0] == last[1]
    scores = [json.loads((tmp_path / name / "pretrain/results.json").read_text()) for name in names]
    assert scores[0] == scores[1]
