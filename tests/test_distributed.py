"""Two processes of torchrun against one: the same numbers, one folder, one voice, and an end when one dies.

The processes, those of torchrun and its ranks too, fork from one that has the imports behind it (see scripts/soak.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import soak  # noqa: E402

from segkit.training import checkpoint  # noqa: E402

SMALL = (
    "dataset.reader.num_images=8",
    "dataset.reader.size=[64,64]",
    "dataset.crop=[32,32]",
    "batch_size=4",
    "loss=cross_entropy",
    "schedule=single",
    "schedule.train.epochs=null",
    "evaluation.every_epochs=null",
    "evaluation.max_images=5",
    "evaluation.pictures=0",
    "log_every=1",
    "workers=0",
    "device=cpu",
    "model=coplenet",  # group norm: the statistics of batch norm would depend on how a batch is shared out
    "model.feature_channels=[4,8,16,32,64]",
    "model.num_groups=2",
    "model.dropout=[0,0,0,0,0]",
)
TORCHRUN = ("--standalone", "--nproc-per-node=2")
STARTED: list = []
pytestmark = pytest.mark.slow


def start(folder: Path, *overrides: str, ranks: int = 2, torchrun: tuple[str, ...] = ()):
    """Start what ``train.py`` does in ``folder``, under torchrun (or, with one rank, without it), as a process."""
    folder.mkdir(exist_ok=True)
    options = (*TORCHRUN, *torchrun) if ranks > 1 else ()
    arguments = [*SMALL, f"cache_dir={folder}/cache", *overrides]
    process = soak.start(arguments, folder / "log", torchrun=options, folder=folder)
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def _nothing_stays_behind():
    """End what a failed test has left running."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.is_alive():
            process.terminate()  # torchrun then ends its ranks
            process.join(60)


def ended(process, seconds: float) -> int:
    """The exit code of a process that ends within ``seconds``."""
    process.join(seconds)
    assert process.exitcode is not None
    return process.exitcode


def finish(folder: Path, *overrides: str, **options) -> str:
    process = start(folder, *overrides, **options)
    assert ended(process, 240) == 0, (folder / "log").read_text()
    return (folder / "log").read_text()


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks_train_what_one_trains(tmp_path):
    """SGD, as Adam divides rounding errors by themselves where a gradient is zero."""
    options = ("optimizer=sgd", "optimizer.lr=0.002", "schedule.train.steps=8", "accumulate=2", "hydra.run.dir=run")
    options += ("determinism=strict",)  # the fastest kernels round otherwise
    finish(tmp_path / "one", *options, ranks=1)
    finish(tmp_path / "two", *options)
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    states = [checkpoint.load(run / "checkpoints" / "last.pt")["model"] for run in (one, two)]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-6)
    losses = [[record["loss"] for record in records(run) if record["split"] == "train"] for run in (one, two)]
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.nightly
def test_one_folder_one_voice_and_every_image_once(tmp_path):
    """Five images for two ranks; a learning rate of zero, so that the weights are the same to the last bit."""
    options = ("schedule.train.steps=2", "optimizer.lr=0.0")
    finish(tmp_path / "one", *options, "hydra.run.dir=run", ranks=1)
    log = finish(tmp_path / "two", *options)
    (run,) = (tmp_path / "two" / "outputs" / "synthetic" / "coplenet-cross_entropy").iterdir()
    for text in ("train step 1/2", "train step 2: mean IoU", "run folder:", "mean over 8 classes"):
        assert log.count(text) == 1, log
    results = [json.loads((path / "results.json").read_text()) for path in (tmp_path / "one" / "run", run)]
    assert results[0] == results[1]
    assert results[0]["num_images"] == 5
    assert json.loads((run / "provenance.json").read_text())["world_size"] == 2


def test_a_mistake_is_said_once(tmp_path):
    """By the command itself, which no test forks."""
    command = [sys.executable, "-m", "torch.distributed.run", *TORCHRUN, str(ROOT / "train.py"), *SMALL]
    options = ("batch_size=3", "schedule.train.steps=2", f"hydra.run.dir={tmp_path}/run", f"cache_dir={tmp_path}/cache")
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode != 0
    log = done.stdout + done.stderr
    assert log.count("error: a batch of 3 images cannot be shared out equally to 2 processes") == 1, log


def ranks_of(process) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def wait_for_steps(folder: Path, process, number: int) -> None:
    metrics = folder / "run" / "train" / "metrics.jsonl"
    end = time.monotonic() + 240
    while process.is_alive() and time.monotonic() < end:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= number:
            return
        time.sleep(0.01)
    pytest.fail((folder / "log").read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_rank_ends_the_others_within_a_minute(tmp_path):
    process = start(tmp_path / "a", "schedule.train.steps=100000", "hydra.run.dir=run")
    wait_for_steps(tmp_path / "a", process, 3)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert ended(process, 60) != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert "SIGKILL" in (tmp_path / "a" / "log").read_text()


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_restarted_group_goes_on_from_its_checkpoint(tmp_path):
    options = ("optimizer=sgd", "schedule.train.steps=60", "checkpoint_every=1", "hydra.run.dir=run")
    process = start(tmp_path / "a", *options, torchrun=("--max-restarts=1",))
    wait_for_steps(tmp_path / "a", process, 5)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    log = tmp_path / "a" / "log"
    assert ended(process, 240) == 0, log.read_text()
    assert "phase train: going on from step" in log.read_text()
    assert [record["step"] for record in records(tmp_path / "a" / "run") if record["split"] == "train"] == [
        *range(1, 61)
    ]


@pytest.mark.nightly
def test_an_exception_of_one_rank_shows_its_traceback(tmp_path):
    """Rank 1 alone meets a defect in the loss; its traceback is there, and rank 0 says that it lost a peer."""
    script = tmp_path / "defect.py"
    script.write_text(
        "import os, sys\n"
        "from segkit.training import trainer\n"
        "step = trainer.train_step\n"
        "def broken(*arguments, **options):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise KeyError('a defect of rank 1')\n"
        "    return step(*arguments, **options)\n"
        "trainer.train_step = broken\n"
        "from segkit.launch import main\n"
        "main()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    options = [*SMALL, "schedule.train.steps=3", f"cache_dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode != 0
    assert "KeyError: 'a defect of rank 1'" in done.stderr
    assert "Traceback" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_to_torchrun_saves_once_and_says_so_once(tmp_path):
    options = ("optimizer=sgd", "limit_steps=100000", "hydra.run.dir=run")
    process = start(tmp_path / "a", *options, "schedule.train.steps=100000")
    wait_for_steps(tmp_path / "a", process, 3)
    process.terminate()
    assert ended(process, 60) != 0
    log = (tmp_path / "a" / "log").read_text()
    assert log.count("stopped at step") == 1, log
    step = checkpoint.load_last(tmp_path / "a" / "run" / "train" / "checkpoints")["progress"]["step"]
    assert f"stopped at step {step} of phase train; the state is saved" in log
