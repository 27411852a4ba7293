"""A sweep on this machine: the shared phase is trained once, a failed job does not hide, the rest goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from segkit import launch
from segkit.config.compose import check_overrides, compose
from segkit.config.schema import plain
from segkit.errors import InputError
from segkit.files import held
from segkit.guard import explain
from segkit.launch import check_job, passed_on
from segkit.runtime import tidied_up_when_ended
from segkit.sweeps import jobs
from segkit.sweeps.jobs import Job, LocalSweep

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
SMALL = [
    "debug=smoke",
    "limit_steps=2",
    "batch_size=2",
    "dataset.reader.num_images=6",
    "dataset.reader.size=[64,64]",
    "dataset.crop=[64,64]",
    "evaluation.max_images=2",
    "device=cpu",
    "model=coplenet",
    "model.feature_channels=[4,8,16,32,64]",
    "model.num_groups=2",
]


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A sweep with the option ``own`` of a folder that is given by ``--config-dir``."""
    option = folder / "configs" / "loss" / "own.yaml"
    option.parent.mkdir(parents=True, exist_ok=True)
    option.write_text("defaults:\n  - margin_calibration\n")
    fixed = [*SMALL, "loss=own", f"hydra.sweep.dir={folder}/sweep", f"cache_dir={folder}/cache"]
    command = [sys.executable, str(TRAIN), "--config-dir", str(folder / "configs"), "-m", *fixed, *arguments]
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


def test_a_sweep_that_is_refused_leaves_nothing(tmp_path):
    done = sweep(tmp_path, "loss.upsilon=1,2", "init_from=/nowhere")
    assert done.returncode == 2
    assert "init_from is /nowhere, but there is no such file or folder" in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["configs"]


def test_jobs_are_told_where_options_lie(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "-cd", "mine", "hydra.searchpath=[file:///there]", "seed=1,2"])
    sweep = LocalSweep(Path("sweep"), jobs=1, options=passed_on())
    command = sweep._command(Job(0, ["seed=1"], "there"))
    assert command[3:] == ["--config-dir=mine", "hydra.searchpath=[file:///there]", "seed=1", 'hydra.run.dir="there"']
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=1,2"])
    assert passed_on() == []
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "--config-name", "mine", "seed=1,2"])
    with pytest.raises(InputError, match=r"--config-name and .* are of one run, .* below --config-dir"):
        passed_on()


def test_one_sweep_at_a_time_runs_in_a_folder(tmp_path, monkeypatch):
    """A second search in it would take the trials of the first for interrupted ones, and end both."""
    monkeypatch.setattr(launch, "_sweeps", [LocalSweep(tmp_path / "sweep", jobs=1)])
    monkeypatch.setattr(LocalSweep, "finish", lambda self: 3)
    message = rf"^process {os.getpid()} on .* runs a sweep in .*/sweep: wait for it, or set another hydra\.sweep\.dir$"
    with (
        held(tmp_path / "sweep", doing="runs a sweep in", key="hydra.sweep.dir"),
        pytest.raises(InputError, match=message),
    ):
        launch.finish_sweep()
    with pytest.raises(SystemExit, match=r"^3$"):
        launch.finish_sweep()


def test_jobs_must_be_positive(tmp_path):
    done = sweep(tmp_path, "sweep.jobs=0", "loss.tau=1,2")
    assert done.returncode == 2
    assert "sweep.jobs is 0, but must be at least 1" in done.stderr


def test_a_job_is_named_by_what_differs_and_the_cores_are_shared_by_the_jobs_there_are(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(jobs, "num_cores", lambda: 8)
    monkeypatch.setattr(LocalSweep, "_command", lambda self, job: ["true"])
    sweep = LocalSweep(tmp_path, jobs=4, workers=2)
    for seed in "01":
        sweep.add([*SMALL, f"seed={seed}"], tmp_path / seed, compose([*SMALL, "sweep.jobs=4", f"seed={seed}"]))
    assert sweep.finish() == 1
    shared, first, *_ = capsys.readouterr().out.splitlines()
    assert shared == "2 jobs at a time share 8 cores: each has 4 threads to compute and 1 worker to load"
    assert first.startswith("job 0: seed=0 started")


def test_a_table_shows_overrides_as_they_are_written():
    sweep = LocalSweep(Path("a [bold]"), jobs=1)
    sweep.jobs = [Job(0, ["name=car [rare]"], "0"), Job(1, ["name=tool [/x]\x1b[2J"], "1", "finished", 0.5)]
    sweep._waiting = [(job.overrides, Path(job.folder)) for job in sweep.jobs]
    text = sweep.table()
    assert "name=car [rare]" in text
    assert r"name=tool [/x]\x1b[2J" in text
    assert "2 jobs in a [bold]" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=glob(*)"], r"'seed=glob\(\*\)' has no values"),
        (["loss=glob(zzz*)"], r"'loss=glob\(zzz\*\)' has no values"),
        (["seed=range(3,3)"], r"'seed=range\(3,3\)' has no values"),
        (["seed=range(1,4,0)"], r"'seed=range\(1,4,0\)' has no values"),
        (["seed=range(1000000000)"], "the sweep has 1001 jobs or more, but at most 1000"),
        (["seed=range(0,30)", "loss.tau=range(0,40)"], "the sweep has 1200 jobs or more, but at most 1000"),
    ],
)
def test_a_grid_of_no_or_endless_jobs_is_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        check_overrides(["-m", *overrides])
    check_overrides(["-m", "seed=range(0,25)", "loss.tau=range(0,40)"])
    check_overrides(["-m", "loss=glob(cross*)"])


def test_an_interval_is_no_grid():
    sentence, code = explain(HydraException("BasicSweeper does not support sweep type : INTERVAL_SWEEP"))
    assert code == 2
    assert "write values with commas, or search" in sentence


@pytest.mark.parametrize(
    ("other", "folder", "message"),
    [
        (["seed=0"], "1", r"job 1 of the sweep would train the same as job 0 \(seed=0\): give every value once"),
        (["seed=1"], "0", "0 is the folder of two jobs: let hydra.sweep.subdir contain"),
        (["seed=1"], "../1", r"sweep/\.\./1, the folder of a job, is not within sweep, .*: set hydra.sweep.subdir to"),
        (["seed=1", "sweep.jobs=1"], "1", "sweep has several values, but one holds for all jobs"),
        (["seed=1", "workers=1"], "1", "workers has several values, but jobs share them with sweep.jobs=2"),
    ],
)
def test_jobs_that_cannot_stand_beside_each_other(other, folder, message):
    sweep = LocalSweep(Path("sweep"), jobs=2)
    common = ["sweep.jobs=2", "workers=0"]
    sweep.add(["seed=0"], Path("sweep/0"), compose([*common, "seed=0"]))
    with pytest.raises(InputError, match=message):
        sweep.add(other, Path("sweep", folder), compose([*common, *other]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("init_from=nowhere", "init_from is nowhere, but there is no such file or folder"),
        ("device=cuda:99", "device is 'cuda:99', but"),
        ("sync_batchnorm=true", "sync_batchnorm=true shares statistics between processes, but there is one"),
        ("dataset.crop=[65000,65000]", "a batch of 8 crops of 65000x65000 takes at least"),
        (
            "overfit_batches=100000",
            "overfit_batches is 100000, but phase pretrain has 700 steps: set overfit_batches lo",
        ),
    ],
)
def test_what_a_later_job_lacks_is_seen_before_the_first_starts(override, message):
    with pytest.raises(InputError, match=message):
        check_job(compose([override]))


def test_a_job_within_a_run_is_refused_before_the_first_starts(tmp_path):
    for name in ("config.yaml", "provenance.json"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"0, within the run .*: name a folder outside of it"):
        check_job(compose([]), tmp_path / "0")


def test_a_job_in_the_folder_of_another_is_refused_before_the_first_starts(tmp_path):
    """As in a grid whose values were given in another order: it would fail after hours of its neighbours."""
    (tmp_path / "train" / "checkpoints").mkdir(parents=True)
    (tmp_path / "train" / "checkpoints" / "last.pt").touch()
    settings = [*SMALL, "precision=fp32", "channels_last=false"]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain(compose([*settings, "seed=1"])))))
    with pytest.raises(InputError, match=r"holds a run of another configuration; these keys differ: seed \(1 there, 0"):
        check_job(compose([*settings, "seed=0"]), tmp_path)
    check_job(compose([*SMALL, "seed=1"]), tmp_path)


def shell_jobs(monkeypatch, folder, *commands):
    """A sweep whose jobs, all at a time, run the ``commands`` of a shell in their folders."""
    monkeypatch.setattr(LocalSweep, "_command", lambda self, job: ["sh", "-c", f"cd {job.folder}; {job.overrides[0]}"])
    sweep = LocalSweep(folder, jobs=len(commands))
    sweep.share(None)
    sweep._waiting = [([command], folder / str(number)) for number, command in enumerate(commands)]
    return sweep


def test_jobs_beside_one_that_was_interrupted_are_judged_as_well(monkeypatch, tmp_path):
    finished = """sleep 0.5; echo '{"mean_iou": 0.25}' > results.json"""
    assert (
        shell_jobs(monkeypatch, tmp_path, "exit 75", finished, "sleep 0.5; echo error: no data; exit 2").finish() == 75
    )
    found = [(job["state"], job["mean_iou"], job["error"]) for job in json.loads((tmp_path / "sweep.json").read_text())]
    assert found == [("interrupted", None, ""), ("finished", 0.25, None), ("failed", None, "error: no data")]


def test_no_job_starts_where_its_state_cannot_be_noted(monkeypatch, tmp_path):
    (tmp_path / "sweep.json").mkdir()
    with pytest.raises(OSError, match=r"sweep\.json"):
        shell_jobs(monkeypatch, tmp_path, "touch started").finish()
    assert [item.name for item in tmp_path.iterdir()] == ["sweep.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_sweep_alone_stops_it_with_its_jobs(monkeypatch, tmp_path, number, request):
    """Ctrl-C in a terminal is for all of them, but schedulers and containers tell the first process only."""
    monkeypatch.setattr(LocalSweep, "_watch", lambda self: signal.raise_signal(number))
    before = signal.getsignal(number)
    request.addfinalizer(lambda: signal.signal(number, before))
    # tests that run under nohup ignore it, and so would the sweep
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sweep = shell_jobs(monkeypatch, tmp_path, "exec sleep 60")
    sweep._waiting.append((["never"], tmp_path / "1"))
    with tidied_up_when_ended():
        assert sweep.finish() == 75
    states = [job["state"] for job in json.loads((tmp_path / "sweep.json").read_text())]
    assert states == ["interrupted", "waiting"]


@pytest.mark.parametrize("code", [130, 143])
def test_a_job_that_was_stopped_before_it_had_a_state_was_interrupted(monkeypatch, tmp_path, code):
    assert shell_jobs(monkeypatch, tmp_path, f"exit {code}").finish() == 75


def test_a_job_is_said_to_have_failed_of_what_it_wrote_itself_this_time(monkeypatch, tmp_path):
    """A process that the system ends for its memory leaves no word, and the log those of its last start."""
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "log.txt").write_text("error: of the last start\n")
    sweep = shell_jobs(monkeypatch, tmp_path, "echo at work; kill -9 $$", "echo error: set hydra.run.dir; exit 2")
    assert sweep.finish() == 1
    assert [job.error for job in sweep.jobs] == ["at work", "error: set hydra.sweep.dir"]
