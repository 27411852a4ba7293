"""Stops and damage that ``scripts/soak.py --cases`` tries: each case returns whether what is promised was held."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from soak import SMALL, group_members, hashes, start, wait_until_gone

SLOW_EVALUATION = ("dataset.reader.num_images=40", "evaluation.every_steps=1", "evaluation.max_images=40", "workers=2")
SLOW_COUNTING = ("dataset.reader.num_images=400", "dataset.reader.size=[128,128]", "workers=2")
SAVED = 75
"""The exit code of a run that was told to stop and has saved its state."""


def arguments(folder: Path, *options: str) -> list[str]:
    return [*SMALL, "workers=1", *options, f"hydra.run.dir={folder}", f"cache_dir={folder.with_suffix('.cache')}"]


def finish(folder: Path, *options: str) -> int | None:
    """Run to the end; the exit code."""
    process = start(arguments(folder, *options), folder.with_suffix(".log"))
    process.join()
    return process.exitcode


def wait_for(path: Path, *, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} has not come"
        time.sleep(0.005)


def stopped(folder: Path, options: tuple[str, ...], wait: Callable[[], None], number: int, *, group: bool) -> bool:
    """Send signal ``number`` after ``wait()``: the exit code is 75 and nothing is left; the same command then ends."""
    process = start(arguments(folder, *options), folder.with_suffix(".log"))
    assert process.pid is not None
    wait()
    (os.killpg if group else os.kill)(process.pid, number)
    process.join()
    return process.exitcode == SAVED and wait_until_gone(process.pid, 10) and finish(folder, *options) == 0


def two_processes(folder: Path, chance: random.Random, whole: dict[str, str]) -> bool:
    """The second process in a run folder is refused, and the first one's files are those of a run alone."""
    first = start(arguments(folder), folder.with_suffix(".log"))
    wait_for(folder / ".running.lock")
    time.sleep(chance.uniform(0, 1))
    second = finish(folder)
    first.join()
    return first.exitcode == 0 and second == 2 and hashes(folder) == whole


def terminated_in_evaluation(folder: Path, chance: random.Random, whole: dict[str, str]) -> bool:
    """SIGTERM to the whole group while most of the time goes into evaluations with workers."""

    def wait() -> None:
        wait_for(folder / "pretrain" / "metrics.jsonl")
        time.sleep(chance.uniform(0, 1))

    return stopped(folder, SLOW_EVALUATION, wait, signal.SIGTERM, group=True)


def terminated_in_counting(folder: Path, chance: random.Random, whole: dict[str, str]) -> bool:
    """SIGTERM to the whole group while its workers count labels."""

    def wait() -> None:
        wait_for(folder / ".running.lock")
        time.sleep(chance.uniform(0.3, 1.5))
        assert not (folder / "config.yaml").exists(), "the labels were counted too fast"

    return stopped(folder, SLOW_COUNTING, wait, signal.SIGTERM, group=True)


def hung_up(folder: Path, chance: random.Random, whole: dict[str, str]) -> bool:
    """SIGHUP in training, as of a closed terminal; the resumed run equals one that was left alone."""

    def wait() -> None:
        wait_for(folder / "pretrain" / "metrics.jsonl")
        time.sleep(chance.uniform(0, 0.3))

    return stopped(folder, (), wait, signal.SIGHUP, group=False) and hashes(folder) == whole


def agent_killed(folder: Path, chance: random.Random, whole: dict[str, str]) -> bool:
    """SIGKILL to torchrun's own process: its two ranks are gone within 10 s."""
    train = str(Path(__file__).resolve().parent.parent / "train.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", train]
    options = arguments(folder, "schedule=single", "schedule.train.epochs=null", "schedule.train.steps=100000")
    options = [item for item in options if not item.startswith(("schedule.pre", "schedule.fine", "schedule=pre"))]
    with open(folder.with_suffix(".log"), "ab") as log:
        agent = subprocess.Popen([*torchrun, *options], stdout=log, stderr=log, start_new_session=True)
        wait_for(folder / "train" / "metrics.jsonl", seconds=180)
        ranks = [pid for pid in group_members(agent.pid) if pid != agent.pid]
        ranks += [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]
        agent.kill()
        agent.wait()
    end = time.monotonic() + 10
    while any(_alive(pid) for pid in ranks):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return len(ranks) >= 2


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def killed_in_counting(folder: Path, chance: random.Random, whole: dict[str, str]) -> bool:
    """SIGKILL to the main process while its workers count labels: they are gone within 10 s."""
    process = start(arguments(folder, *SLOW_COUNTING), folder.with_suffix(".log"))
    assert process.pid is not None
    wait_for(folder / ".running.lock")
    time.sleep(chance.uniform(0.3, 1.5))
    assert not (folder / "config.yaml").exists(), "the labels were counted too fast"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return wait_until_gone(process.pid, 10)


def flipped_bit(folder: Path, chance: random.Random, whole: dict[str, str]) -> bool:
    """One bit of the finished last.pt: evaluating it is refused, and so is a run that starts from it."""
    if finish(folder) != 0:
        return False
    path = (folder / "checkpoints" / "last.pt").resolve()
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    evaluate = [sys.executable, "-m", "segkit.cli", "evaluate", str(folder), "--device", "cpu"]
    done = subprocess.run(evaluate, capture_output=True, text=True)
    refused = done.returncode == 2 and "is damaged" in done.stderr
    return refused and finish(folder.with_name(folder.name + "-next"), f"init_from={folder}") == 2


CASES = {
    "two-processes": two_processes,
    "terminated-in-evaluation": terminated_in_evaluation,
    "terminated-in-counting": terminated_in_counting,
    "hung-up": hung_up,
    "agent-killed": agent_killed,
    "killed-in-counting": killed_in_counting,
    "flipped-bit": flipped_bit,
}


def try_cases(folder: Path, *, times: int, seed: int) -> bool:
    """Try every case ``times`` times and print how often it held; True if it always did."""
    chance = random.Random(seed)
    reference = folder / "reference"
    assert finish(reference) == 0, reference.with_suffix(".log").read_text()[-3000:]
    whole, held_all = hashes(reference), True
    for name, case in CASES.items():
        held = 0
        for number in range(times):
            run = folder / f"{name}-{number}"
            held += case(run, chance, whole)
            if held <= number:
                print(f"  {name} {number}: not held, see {run.with_suffix('.log')}", flush=True)
        print(f"{name}: tried {times}, held {held}", flush=True)
        held_all &= held == times
    return held_all
