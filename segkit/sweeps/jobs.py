"""Many runs from one command line: ``python train.py -m loss.tau=1,5,10``.

Every job of a sweep on this machine is a process of its own with its own run folder, ``sweep.jobs`` of them at a time.
A job that fails does not stop the others. ``sweep.json`` and a table at the end show every job's state and score; the
same command with the same ``hydra.sweep.dir`` goes on where an interrupted sweep stopped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from segkit.config.compose import quoted
from segkit.config.schema import Config
from segkit.errors import InputError, Interrupted
from segkit.files import read_json, write_json
from segkit.progress import show
from segkit.runtime import num_cores

LOG = "log.txt"
CHILD = "SEGKIT_JOB_OF_SWEEP"
"""Variable of the environment of a sweep's jobs, which end with it."""
INTERRUPTED = {Interrupted.exit_code, *(code for number in (1, 2, 15) for code in (128 + number, -number))}
"""How a job ends for SIGHUP, SIGINT or SIGTERM: later, or sooner than it has a state to save."""


def of_sweep(text: str) -> str:
    """Return advice for one run with the key that names the folders of all jobs."""
    return text.replace("hydra.run.dir", "hydra.sweep.dir")


@dataclass
class Job:
    """One run of a sweep. ``state``: waiting, running, finished, failed, interrupted, or pruned by a search."""

    number: int
    overrides: list[str]
    folder: str
    state: str = "running"
    mean_iou: float | None = None
    seconds: float | None = None
    error: str | None = None


class LocalSweep:
    """Runs the jobs of one sweep on this machine, ``jobs`` at a time, which share its cores and the ``workers``.

    ``options``: what stands before the overrides of each job, such as ``--config-dir``.
    """

    def __init__(self, folder: Path, *, jobs: int, workers: int = 0, options: Sequence[str] = ()) -> None:
        self.folder, self.limit, self.workers, self.options = folder, jobs, workers, list(options)
        self.jobs: list[Job] = []
        self._running: dict[int, tuple[subprocess.Popen, float, int]] = {}
        """Process, time of its start, and bytes of its log before that, by number."""
        self._waiting: list[tuple[list[str], Path]] = []
        self._configs: list[Config] = []
        self._stopping = self._told = False
        """Whether the sweep is to end with the running jobs, and whether a signal to this process said so"""

    def add(self, overrides: Sequence[str], folder: Path, config: Config) -> None:
        """Note a job; it starts with :meth:`finish`, once all jobs are known to be possible.

        InputError if it would do what another does, write where another does or outside of the sweep's folder, or
        shares the machine otherwise.
        """
        number = len(self._waiting)
        if type(self) is not LocalSweep or (self._configs and config.sweep != self._configs[0].sweep):
            raise InputError("sweep has several values, but one holds for all jobs: give each of its keys one value")
        if self.limit > 1 and self._configs and config.workers != self._configs[0].workers:
            raise InputError(
                f"workers has several values, but jobs share them with sweep.jobs={self.limit}: set sweep.jobs=1, or "
                "give workers one value"
            )
        if config in self._configs:
            raise InputError(
                f"job {number} of the sweep would train the same as job {self._configs.index(config)} "
                f"({', '.join(overrides)}): give every value once"
            )
        if str(folder) in (str(other) for _, other in self._waiting):
            raise InputError(f"{folder} is the folder of two jobs: let hydra.sweep.subdir contain ${{hydra:job.num}}")
        if Path(os.path.abspath(self.folder)) not in Path(os.path.abspath(folder)).parents:
            raise InputError(
                f"{folder}, the folder of a job, is not within {self.folder}, that of the sweep: set "
                "hydra.sweep.subdir to a path without .. or / at its beginning, such as '${hydra:job.num}'"
            )
        self._configs.append(config)
        self._waiting.append((list(overrides), folder))

    def extremes(self) -> Iterator[list[str]]:
        """Overrides of jobs that must be possible before the first one starts, beside those that :meth:`add` got."""
        yield from ()

    def share(self, most: int | None) -> None:
        """Divide cores and workers among the jobs that run at a time; there are at ``most`` that many (None: any)."""
        self.limit = min(self.limit, most or self.limit)
        cores = num_cores()
        self.threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // self.limit))
        self.workers = max(min(self.workers, 1), self.workers // self.limit)
        if self.limit > 1:
            threads = f"{self.threads} thread{'s' * (self.threads != '1')}"
            workers = f"{self.workers} worker{'s' * (self.workers != 1)}"
            show(
                f"{self.limit} jobs at a time share {cores} cores: each has {threads} to compute and {workers} to load"
            )

    def _wait_for_slot(self) -> None:
        while len(self._running) >= self.limit:
            self._collect()

    def _command(self, job: Job) -> list[str]:
        share = [f"workers={self.workers}"] * (self.limit > 1)
        overrides = [*job.overrides, *share, f"hydra.run.dir={quoted(job.folder)}"]
        return [sys.executable, "-m", "segkit.launch", *self.options, *overrides]

    def _start(self, job: Job) -> None:
        folder = Path(job.folder)
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, CHILD: "1"}
        if self.limit > 1:
            environment["OMP_NUM_THREADS"] = self.threads
        with open(folder / LOG, "ab") as log:
            size = log.tell()
            process = subprocess.Popen(self._command(job), stdout=log, stderr=subprocess.STDOUT, env=environment)
        job.state = "running"
        self._running[job.number] = (process, time.monotonic(), size)
        show(f"job {job.number}: {self._label(job)} started, log in {folder / LOG}")
        self._note()

    def finish(self) -> int:
        """Run all jobs and show their table; returns the exit code of the sweep.

        If it or one of its jobs is interrupted, it ends once the running ones have saved their state.
        """
        try:
            self._run()
            while self._running:
                self._collect()
        except Interrupted:
            self._stopping = True
        except (KeyboardInterrupt, SystemExit):  # SIGTERM and SIGHUP
            self._stopping = self._told = True
            show("interrupted: waiting for the running jobs to save their state", error=True)
            for process, _, _ in self._running.values():
                process.terminate()  # it knows already if the signal was for all
        for process, _, _ in self._running.values():
            process.wait()
        self._note_ends(list(self._running))  # also if none is: a kill may have come before the last note
        print(self.table())
        if self._stopping:
            show(f"interrupted: run the same command with hydra.sweep.dir={self.folder} to go on", error=True)
            return Interrupted.exit_code
        failed = [job for job in self.jobs if job.state not in ("finished", "pruned")]
        if failed:
            show(f"error: {len(failed)} of {len(self.jobs)} jobs did not finish; see their {LOG}", error=True)
        return 1 if failed else 0

    def _run(self) -> None:
        """Start all jobs."""
        if self._waiting:
            self.share(len(self._waiting))
        for overrides, folder in self._waiting:
            self.jobs.append(Job(len(self.jobs), overrides, str(folder), "waiting"))
        self._note()  # what cannot be written is known before the first job starts
        for job in self.jobs:
            self._wait_for_slot()
            self._start(job)

    def _collect(self) -> None:
        """Wait until a job ends, and note how. Raises Interrupted if it was interrupted."""
        while not (
            ended := [number for number, (process, _, _) in self._running.items() if process.poll() is not None]
        ):
            self._watch()
            time.sleep(0.2)
        self._note_ends(ended)
        if any(self.jobs[number].state == "interrupted" for number in ended):
            raise Interrupted("a job was interrupted")

    def _note_ends(self, numbers: list[int]) -> None:
        """Note how the jobs ``numbers`` have ended."""
        for number in numbers:
            process, start, size = self._running.pop(number)
            job = self.jobs[number]
            job.seconds = round(time.monotonic() - start, 1)
            said = (Path(job.folder) / LOG).read_bytes()[size:].decode(errors="replace")
            self._judge(job, process.returncode, said)
            score = f"mean IoU {job.mean_iou:.4f}" if job.mean_iou is not None else job.error or "no class scored"
            show(f"job {number}: {self._label(job)} {job.state}: {score}")
        self._note()

    def _watch(self) -> None:
        """Look at the running jobs; called several times a second."""

    def _judge(self, job: Job, code: int, said: str) -> None:
        """Note the state and the score, or the error, of a job that ended with ``code``; ``said`` is its log."""
        results = Path(job.folder) / "results.json"
        if code == 0 and results.is_file():
            job.state = "finished"
            job.mean_iou = read_json(results).get("mean_iou")
            return
        job.state = "interrupted" if self._told or code in INTERRUPTED else "failed"
        lines = said.strip().splitlines()
        error = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
        job.error = of_sweep(error)

    def _label(self, job: Job) -> str:
        """The overrides in which the jobs differ."""
        common = set.intersection(*(set(overrides) for overrides, _ in self._waiting))
        return ", ".join(item for item in job.overrides if item not in common) or "as configured"

    def _note(self) -> None:
        write_json(self.folder / "sweep.json", [asdict(job) for job in self.jobs])

    def table(self) -> str:
        """Every job with its state and score, the best first."""
        from segkit.report.tables import percent, screen_table

        order = sorted(self.jobs, key=lambda job: (job.mean_iou is None, -(job.mean_iou or 0.0), job.number))
        rows = [
            [str(job.number), self._label(job), job.state, percent(job.mean_iou), f"{job.seconds or 0:.0f}"]
            for job in order
        ]
        head = ["job", "overrides", "state", "mean IoU %", "seconds"]
        title = f"{len(self.jobs)} jobs in {self.folder}"
        return screen_table(head, rows, title=title, left=["overrides", "state"])
