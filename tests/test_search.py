"""A search: what it draws, prunes and remembers, with jobs that only write what a run would write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna")

from segkit import launch  # noqa: E402
from segkit.config.compose import compose  # noqa: E402
from segkit.errors import InputError, Interrupted  # noqa: E402
from segkit.sweeps import search  # noqa: E402
from segkit.sweeps.search import Search, distribution, is_of_sweep, leaves, written  # noqa: E402

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
SPACE = ["~sweep.space.loss.upsilon"]

# A run whose mean IoU is largest at tau = 30: one evaluation a step, then results.json. It reacts to SIGTERM as a run
# does, fails where the test says so, and writes down that it has begun.
JOB = """
import json, math, signal, sys, time
from pathlib import Path
values = dict(item.split("=", 1) for item in sys.argv[1:] if "=" in item)
folder = Path(values["hydra.run.dir"])
tau = float(values["loss.tau"])
with open(folder / "starts", "a") as file:
    file.write("x")
signal.signal(signal.SIGTERM, lambda *rest: sys.exit(75))
if tau > float(values.get("fail_above", "inf")):
    sys.exit("error: tau is too large")
score = math.exp(-abs(math.log(tau / 30)))
slow = tau < float(values.get("slow_below", "0"))
for step in (1, 2):
    for phase, mean_iou in (("pretrain", 0.9), ("finetune", score * step / 2)):
        record = {"phase": phase, "step": step, "split": "val", "mean_iou": mean_iou}
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\\n")
    if slow:
        time.sleep(60)
(folder / "results.json").write_text(json.dumps({"mean_iou": score}))
"""


class Fake(Search):
    """A search with :data:`JOB` in place of training; ``extra`` are further values for it."""

    extra: tuple[str, ...] = ()

    def _command(self, job):
        return [sys.executable, "-S", "-c", JOB, *job.overrides, *self.extra, f"hydra.run.dir={job.folder}"]


def fake(folder, *overrides, extra=(), base=("model=deeplabv3plus_tiny",)):
    config = compose([*base, "sweep=search", *SPACE, *overrides])
    made = Fake(folder, config=config, overrides=[*base, "sweep=search", *SPACE, *overrides])
    made.extra = extra
    return made


def status(folder):
    return json.loads((folder / "sweep.json").read_text())


def tau_of(job):
    return float(job["overrides"][-1].removeprefix("loss.tau="))


def test_a_search_in_two_starts_is_the_one_in_a_single_start(tmp_path, capsys):
    """Nothing finished is run again, and the proposals do not depend on how often the search was started."""
    patient = "sweep.prune_after=null"
    assert fake(tmp_path / "a", "sweep.trials=12", patient).finish() == 0
    assert fake(tmp_path / "b", "sweep.trials=5", patient).finish() == 0
    capsys.readouterr()
    assert fake(tmp_path / "b", "sweep.trials=12", patient).finish() == 0
    jobs = status(tmp_path / "a")
    assert [job["overrides"] for job in jobs] == [job["overrides"] for job in status(tmp_path / "b")]
    assert len({tau_of(job) for job in jobs}) == 12
    assert all(1 <= tau_of(job) <= 1000 for job in jobs)
    assert all(job["overrides"][0] == "model=deeplabv3plus_tiny" for job in jobs)
    assert not any("sweep" in item for job in jobs for item in job["overrides"])
    assert {path.read_text() for path in tmp_path.glob("*/*/starts")} == {"x"}
    shown = capsys.readouterr().out
    best = max(jobs, key=lambda job: job["mean_iou"])
    assert "best of 12 finished trials, by the mean IoU on split val" in shown
    assert f"python train.py model=deeplabv3plus_tiny loss.tau={tau_of(best)}" in shown
    assert "12 jobs in " in shown
    assert fake(tmp_path / "b", "sweep.trials=12", patient).finish() == 0  # nothing is left to do: the table again
    assert "best of 12 finished trials" in capsys.readouterr().out


def test_a_failed_trial_is_told_and_does_not_stop_the_search(tmp_path, capsys):
    assert (
        fake(tmp_path, "sweep.trials=6", "sweep.jobs=2", "sweep.prune_after=null", extra=["fail_above=50"]).finish()
        == 1
    )
    jobs = status(tmp_path)
    assert [job["state"] for job in jobs] == ["failed" if tau_of(job) > 50 else "finished" for job in jobs]
    assert {job["state"] for job in jobs} == {"failed", "finished"}
    assert "of 6 jobs did not finish" in capsys.readouterr().err
    assert next(job for job in jobs if job["state"] == "failed")["error"] == "error: tau is too large"


def test_a_poor_trial_is_stopped_and_marked(tmp_path, monkeypatch):
    """Trials far below the median of the finished ones would take a minute, but end at their first evaluation."""
    taus = iter([30.0, 20.0, 40.0, 1.5, 35.0])
    monkeypatch.setattr(search, "suggest", lambda trial, key, found: trial.suggest_float(key, t := next(taus), t))
    begun = time.monotonic()
    made = fake(tmp_path, "sweep.trials=5", "sweep.prune_after=3", extra=["slow_below=2"])
    assert made.finish() == 0
    assert time.monotonic() - begun < 30
    jobs = status(tmp_path)
    assert [job["state"] for job in jobs] == ["finished", "finished", "finished", "pruned", "finished"]
    assert jobs[3]["mean_iou"] == pytest.approx(0.05 / 2)
    states = [trial.state.name for trial in made.study.trials]
    assert states == ["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]
    assert made.study.trials[0].intermediate_values == {1: 0.5, 2: 1.0}  # of the last phase only
    again = fake(tmp_path, "sweep.trials=5", "sweep.prune_after=3")
    assert again.finish() == 0
    assert (tmp_path / "3" / "starts").read_text() == "x"


def test_no_pruning_on_demand(tmp_path):
    assert isinstance(fake(tmp_path, "sweep.prune_after=null").study.pruner, optuna.pruners.NopPruner)


def test_an_interrupted_trial_goes_on_in_its_folder(tmp_path, capsys):
    made = fake(tmp_path, "sweep.trials=2", extra=["slow_below=2000"])

    def interrupt():
        if (tmp_path / "0" / "metrics.jsonl").is_file():
            made._running[0][0].terminate()  # as the signal to the process group does
            time.sleep(0.1)

    made._watch = interrupt
    assert made.finish() == Interrupted.exit_code
    assert f"run the same command with hydra.sweep.dir={tmp_path} to go on" in capsys.readouterr().err
    (before,) = status(tmp_path)
    assert before["state"] == "interrupted"
    assert fake(tmp_path, "sweep.trials=2").finish() == 0
    first, second = status(tmp_path)
    assert first["overrides"] == before["overrides"]
    assert (first["state"], second["state"]) == ("finished", "finished")
    assert [(tmp_path / name / "starts").read_text() for name in "01"] == ["xx", "x"]


def test_no_trial_starts_after_the_hours(tmp_path):
    made = fake(tmp_path, "sweep.trials=null", "sweep.hours=1e-9")
    assert made.finish() == 0
    assert made.jobs == []


def test_another_search_in_the_same_folder_is_refused(tmp_path):
    fake(tmp_path, "sweep.space.loss.tau.high=3")  # one that was refused before it began is none
    fake(tmp_path, "sweep.trials=1").finish()
    with pytest.raises(
        InputError, match=r"holds a search with other space .* give the same ones, or another hydra.sweep"
    ):
        fake(tmp_path, "sweep.trials=1", "sweep.space.loss.tau.high=5")
    with pytest.raises(InputError, match="holds a search with other overrides"):
        fake(tmp_path, base=("model=deeplabv3plus_tiny", "seed=1"))
    fake(tmp_path, "sweep.trials=9", "sweep.jobs=2")  # more of the same


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["~sweep.space.loss"], r"sweep.space is empty, but a search needs a key to vary: \+sweep.space.loss.tau="),
        (["sweep.trials=null"], "sweep.trials and sweep.hours are null, .* set sweep.trials=20"),
        (["sweep.trials=0"], "sweep.trials is 0, but must be at least 1"),
        (["sweep.hours=0"], "sweep.hours is 0.0, but must be positive or null"),
        (["sweep.prune_after=0"], "sweep.prune_after is 0, but must be at least 1"),
        (["sweep.space.loss.tau.low=2000"], r"loss.tau has low=2000 and high=1000.0, but needs .* low < high: set"),
        (["sweep.space.loss.tau.low=a"], "loss.tau has low=a and high=1000.0, but needs numbers with low < high"),
        (["sweep.space.loss.tau.high=inf"], "loss.tau has low=1.0 and high=inf, but needs numbers with low < high"),
        (["sweep.space.loss.tau.low=true"], "loss.tau has low=True and high=1000.0, but needs numbers"),
        (["sweep.space.loss.tau.log=maybe"], "loss.tau.log is 'maybe', but must be true or false"),
        (["sweep.space.loss.tau.low=0"], "loss.tau has low=0, but log: true needs a positive one"),
        (["+sweep.space.loss.tua={low:1,high:2}"], "space.loss.tua names no key .*: did you mean tau"),
        (["+sweep.space.foo.bar={low:1,high:2}"], "space.foo.bar names no key of this configuration"),
        (
            ["+sweep.space.optimizer={low:1,high:2}"],
            "space.optimizer names a group of keys, but must name one: _target_",
        ),
        (["+sweep.space.seed=3"], r"sweep.space.seed is 3, but must be one of \{low: 1"),
        (["+sweep.space.loss.tau.step=3"], "loss.tau has 'step', but is one of .*: remove sweep.space.loss.tau.step"),
        (["+sweep.space.loss.tau.choices=[1]"], "choices are a list of plain values and stand alone: write '~sweep.sp"),
        (["+sweep.space.seed={choices:[]}"], "choices are a list of plain values"),
    ],
    ids=str,
)
def test_a_mistake_is_answered_with_a_sentence(tmp_path, overrides, message):
    with pytest.raises(InputError, match=message):
        Search(tmp_path, config=compose(["sweep=search", *overrides]), overrides=[])


def test_a_kill_within_a_line_of_the_study_or_before_the_last_note_loses_nothing(tmp_path):
    assert fake(tmp_path, "sweep.trials=2").finish() == 0
    study, jobs = (tmp_path / search.STUDY).read_bytes(), status(tmp_path)
    (tmp_path / search.STUDY).write_bytes(study[:-20])
    (tmp_path / "sweep.json").write_text("[]")
    for _ in range(2):
        assert fake(tmp_path, "sweep.trials=2").finish() == 0
        assert [job["overrides"] for job in status(tmp_path)] == [job["overrides"] for job in jobs]
    assert [(tmp_path / name / "starts").read_text() for name in "01"] == ["x", "xx"]
    (tmp_path / "sweep.json").write_text("[]")
    assert fake(tmp_path, "sweep.trials=2").finish() == 0
    assert [job["state"] for job in status(tmp_path)] == ["finished", "finished"]


@pytest.mark.parametrize("kept", [1, 20])
def test_a_kill_within_the_first_line_of_the_study_is_no_other_programs(tmp_path, kept):
    fake(tmp_path)
    study = tmp_path / search.STUDY
    study.write_bytes(study.read_bytes()[:kept])
    fake(tmp_path)
    assert study.read_bytes().startswith(search.FIRST)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"job":', '"jab":'),
        ('"number":0', '"number":1'),
        ('"folder":"', '"folder":1,"error":"'),
        ('"overrides":[', '"overrides":5,"more":['),
    ],
)
def test_a_study_that_another_program_wrote_is_refused(tmp_path, old, new):
    fake(tmp_path, "sweep.trials=1").finish()
    study = (tmp_path / search.STUDY).read_text()
    assert old in study
    (tmp_path / search.STUDY).write_text(study.replace(old, new))
    with pytest.raises(InputError, match=r"study.journal cannot be read as a search|holds a search with other"):
        fake(tmp_path, "sweep.trials=2")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_study_that_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / search.STUDY)
    with pytest.raises(InputError, match=r"study.journal is no file: remove it, or set another hydra.sweep.dir$"):
        fake(tmp_path)


@pytest.mark.parametrize("content", ["garbage", '{"a": 1}', "[1]", b"\xff\x00"])
def test_a_damaged_study_is_answered_with_a_sentence(tmp_path, content):
    (tmp_path / search.STUDY).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"study.journal cannot be read as a search .* or set another hydra.sweep.dir"):
        fake(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["sweep.space.loss.tau.low=-5", "sweep.space.loss.tau.log=false"],
            "may come to loss.tau=-5.0: tau must be .* at least 0, got -5.0; set loss.tau; narrow sweep.space",
        ),
        (["+sweep.space.batch_size={low:1,high:1000000}"], "may come to batch_size=1000000: batch_size is 1000000"),
        (["+sweep.space.optimizer.lr={choices:[0.1,fast]}"], "may come to optimizer.lr=fast: optimizer.lr is 'fast'"),
        (["+sweep.space.precision={choices:[fp32,fp8]}"], "may come to precision=fp8: .*fp8"),
    ],
    ids=str,
)
def test_values_that_no_trial_could_take_are_refused_before_the_first(tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(launch, "_sweeps", [fake(tmp_path, "sweep.trials=1", *overrides)])
    with pytest.raises(InputError, match=message):
        launch.finish_sweep()
    assert not (tmp_path / "0").exists()


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"a search needs optuna: pip install 'segkit\[search\]'"):
        fake(tmp_path)


def test_distributions():
    kinds = optuna.distributions
    assert distribution("k", {"low": 1, "high": 9}, 4) == kinds.IntDistribution(1, 9)
    assert distribution("k", {"low": 1, "high": 9, "log": True}, 4.0) == kinds.FloatDistribution(1.0, 9.0, log=True)
    assert distribution("k", {"choices": ["a", None]}, "a") == kinds.CategoricalDistribution(["a", None])
    trial = optuna.trial.FixedTrial({"k": 0.99996})
    assert search.suggest(trial, "k", kinds.FloatDistribution(0.9, 0.99998)) == 0.99998  # not 1
    assert leaves({"a": {"b": {"low": 1}}, "c": {"choices": [1]}}) == {"a.b": {"low": 1}, "c": {"choices": [1]}}


def test_overrides_are_written_as_hydra_reads_them():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    values = [1, 2.5, 1e-5, True, None, "paper", "a/b.c", "true", "1", "it's, {so}", ""]
    parsed = OverridesParser.create().parse_overrides([written(("key", value)) for value in values])
    assert [override.value() for override in parsed] == values
    assert written(("key", "paper")) == "key=paper"


def test_overrides_of_the_sweep_are_left_out():
    assert [is_of_sweep(item) for item in ("sweep=search", "+sweep.space.a={low:1}", "~sweep.space.a")] == [True] * 3
    assert [is_of_sweep(item) for item in ("sweeper=1", "loss.sweep=1", "debug=smoke")] == [False] * 3


def run(*arguments):
    return subprocess.run([sys.executable, str(TRAIN), *arguments], capture_output=True, text=True)


def test_a_search_without_multirun_says_so():
    done = run("sweep=search")
    assert done.returncode == 2
    assert done.stderr == (
        "error: a search is a sweep on this machine, in jobs of its own: add -m, and leave out hydra/launcher and "
        "hydra/sweeper\n"
    )


@pytest.mark.slow
@pytest.mark.nightly
def test_a_search_of_a_real_run(tmp_path):
    small = ["debug=smoke", "limit_steps=2", "batch_size=2", "dataset.crop=[64,64]", "evaluation.max_images=2"]
    small += ["dataset.reader.num_images=6", "dataset.reader.size=[64,64]"]
    small += ["device=cpu", "schedule=single", "model=deeplabv3plus_tiny", f"cache_dir={tmp_path}/cache"]
    done = run("-m", "sweep=search", "sweep.trials=1", *small, f"hydra.sweep.dir={tmp_path}/sweep")
    assert done.returncode == 0, done.stderr
    (job,) = status(tmp_path / "sweep")
    results = json.loads((tmp_path / "sweep" / "0" / "results.json").read_text())
    assert (job["state"], job["mean_iou"]) == ("finished", results["mean_iou"])
    values = dict(item.split("=") for item in job["overrides"])
    assert results["training"]["loss"]["tau"] == float(values["loss.tau"])
    assert results["training"]["loss"]["upsilon"] == float(values["loss.upsilon"])
    assert "best of 1 finished trials" in done.stdout
