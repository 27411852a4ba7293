"""The rehearsal of ``segkit check``: what it trains, measures and estimates."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from segkit import memory, runtime
from segkit.check import check, rehearsal
from segkit.check.findings import Finding, Report
from segkit.check.report import as_text, to_json
from segkit.config.compose import compose
from segkit.errors import InputError
from segkit.run import auto_batch, pipeline
from segkit.run.batches import PhaseBatches
from segkit.run.plan import plan_phase
from segkit.run.splits import open_phases

OUT_OF_MEMORY = (
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["GPU", "machine"])
@pytest.mark.parametrize(
    ("fitting", "advice"),
    [
        ("mixed", "too little: set grad_checkpointing=mixed (the cheapest with which its steps fit, measured), or acc"),
        ("none", "too little: no further grad_checkpointing makes its steps fit: set accumulate=2"),
    ],
)
def test_too_little_memory_gives_advice_that_was_measured(monkeypatch, arguments, error, fitting, advice):
    def fail(*args, **options):
        raise error

    def measure(config, *args):
        return {2: 2 * 2**20, 4: 4 * 2**20} if config.grad_checkpointing == fitting else {2: 2**60, 4: 2**61}

    monkeypatch.setattr(rehearsal, "rehearse", fail)
    monkeypatch.setattr(auto_batch, "measure_alone", measure)
    report = check.check(compose(arguments))
    (text,) = [finding.text for finding in report.findings if finding.level == "error"]
    assert re.search(r"this machine has \d+ GiB of memory, " + re.escape(advice), text)


def test_what_a_gpu_lacks_is_its_own_memory(monkeypatch, arguments):
    monkeypatch.setattr(runtime, "resolve_device", torch.device)
    monkeypatch.setattr(memory, "total", lambda device=None: (16 if device is None else 80) * memory.GIB)
    monkeypatch.setattr(auto_batch, "cheapest_policy", lambda *_: "light")
    text = check._failure(OUT_OF_MEMORY[0], compose([*arguments, "device=cuda"]), {})
    assert text.startswith("the run would fail: this GPU has 80 GiB of memory, too little: set grad_checkpointing=")


def test_what_keeps_a_run_from_its_first_step_is_said(arguments, monkeypatch):
    def refuse(*args, **options):
        raise InputError("the labels have one class")

    monkeypatch.setattr(pipeline, "prepare_phase", refuse)
    report = check.check(compose([*arguments, "loss=cross_entropy"]))
    assert "the run would fail: the labels have one class" in [finding.text for finding in report.findings]
    report.findings[:] = [Finding("error", "the labels have one class")]  # of the audit: it is said once
    check.rehearse(report)
    assert len(report.findings) == 1


def test_a_sample_is_rehearsed_in_whole_batches(arguments, monkeypatch):
    """With --sample 1, batches of one image made a batch norm fail, and took less memory than the run."""
    sizes = []
    monkeypatch.setattr(rehearsal, "rehearse", lambda _, phases, **rest: sizes.append(len(phases["train"].train)))
    for batch_size in (1, 3, 8):
        check.check(compose([*arguments, "loss=cross_entropy", f"batch_size={batch_size}"]), sample=1)
    assert sizes == [1, 3, 4]


def test_too_few_steps_to_profile_are_said_though_none_is_profiled(arguments):
    report = check.check(compose([*arguments, "loss=cross_entropy", "profile_steps=200"]))
    assert any(finding.text.startswith("the run would fail: profile_steps is 200") for finding in report.findings)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("the loss is nan for a; the batch and the state before it are in /t/segkit-check-1/run/train/failure-1 (`seg"
         "kit replay` repeats the step): lower optimizer.lr, or look at these images",
         "the loss is nan for a: lower optimizer.lr, or look at these images"),
        ("/a.png is damaged: unpack it; step 2 of phase train had no batch, see /t/segkit-check-1/run/failure-1 (`seg"
         "kit replay` reads it again), and the state before it is saved", "/a.png is damaged: unpack it"),
        ("/a.png is damaged; mend it", "/a.png is damaged; mend it"),
    ],
)  # fmt: skip
def test_no_folder_is_named_that_is_gone_with_the_rehearsal(arguments, text, told):
    assert check._failure(InputError(text), compose(arguments), {}) == f"the run would fail: {told}"


def test_shortening_keeps_what_decides_about_memory_and_speed(arguments, tmp_path):
    config = compose([*arguments, "evaluation.max_images=1", "profile_steps=5"])
    short = rehearsal.shorten(config, device=torch.device("cpu"), cache_dir=tmp_path)
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(short, f.name)}
    assert changed == {"evaluation", "limit_steps", "cache_dir", "log_every", "profile_steps"}
    assert short.evaluation.max_images == 1
    assert short.evaluation.batch_size == config.evaluation.batch_size
    assert rehearsal.shorten(config, device=torch.device("cuda"), cache_dir=tmp_path).limit_steps == 12
    for tracker, rehearsed in (("wandb", "tensorboard"), ("mlflow", "tensorboard"), ("none", "none")):
        config = compose([*arguments, f"tracker={tracker}"])
        assert rehearsal.shorten(config, device=torch.device("cpu"), cache_dir=tmp_path).tracker.value == rehearsed


def test_steps_and_evaluations_are_those_of_the_pipeline(arguments, tmp_path):
    from segkit.run import pipeline

    overrides = ["schedule.train.epochs=1.5", "evaluation.every_epochs=0.5"]
    config = compose([*arguments, "loss=cross_entropy", *overrides])
    phases = open_phases(config)
    plan = plan_phase(config, "train", len(phases["train"].train))
    pipeline.run(config, tmp_path / "run", phases)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == plan.num_steps == 3
    assert sum(row["split"] == "val" for row in rows) == plan.num_evaluations == 3


def test_counts_of_evaluations(arguments):
    def count(num_steps, num_samples, *overrides):
        steps = ["schedule.train.epochs=null", f"schedule.train.steps={num_steps}"]
        return plan_phase(compose([*arguments, *steps, *overrides]), "train", num_samples).num_evaluations

    assert count(100, 20, "evaluation.every_epochs=null") == 1
    assert count(100, 20, "evaluation.every_epochs=null", "evaluation.every_steps=30") == 4
    assert count(100, 20, "evaluation.every_epochs=null", "evaluation.every_steps=25") == 4
    assert count(100, 20) == 10


def test_cost_is_the_slower_of_model_and_loader_plus_evaluations(arguments, tmp_path):
    config = compose([*arguments, "schedule.train.epochs=null", "schedule.train.steps=10", "evaluation.every_epochs=5"])
    folder = tmp_path / "train"
    folder.mkdir()
    rows = [(9.0, 0.0), (9.0, 0.0), (4.0, 0.5), (2.0, 0.0), (0.5, 0.75)]  # images/s, share of waiting; two warm up
    lines = [json.dumps({"images_per_second": speed, "data_wait_share": wait}) for speed, wait in rows]
    (folder / "timing.jsonl").write_text("\n".join(lines) + "\n")
    # batches of 2: 0.25 s, 1 s and 1 s without waiting; 8 images are 4 steps an epoch, 10 steps one evaluation
    fast = rehearsal.cost(config, "train", tmp_path, (8, 6), 8, loading=100.0, evaluating=3.0)
    assert fast.step_seconds == pytest.approx(1.0)
    assert fast.images_per_second == pytest.approx(2.0)
    assert fast.num_evaluations == 1
    assert fast.seconds == pytest.approx(10 * 1.0 + 6 / 3.0)
    slow = rehearsal.cost(config, "train", tmp_path, (8, 6), 8, loading=0.5, evaluating=3.0)
    assert slow.seconds == pytest.approx(10 * 4.0 + 6 / 3.0)
    assert slow.step_seconds == fast.step_seconds


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_alone_is_timed(arguments, tmp_path, workers, monkeypatch):
    config = compose([*arguments, "loss=cross_entropy", f"workers={workers}"])
    seen = []
    original = PhaseBatches.training

    def batches(self, start):
        for batch in original(self, start):
            seen.append(len(batch.names))
            yield batch

    phases = open_phases(config)
    monkeypatch.setattr(rehearsal, "evaluation_speed", lambda *rest: 1.0)
    measured = []

    def speed(*rest):
        monkeypatch.setattr(PhaseBatches, "training", batches)
        measured.append(original_speed(*rest))
        return measured[0]

    original_speed = rehearsal.loader_speed
    monkeypatch.setattr(rehearsal, "loader_speed", speed)
    rehearsal.rehearse(config, phases, sizes={"train": (4, 2)})
    assert seen == [2] * 3 * max(1, workers)
    assert 0 < measured[0] < 1e6


def judged(arguments, **figures):
    measured = {
        "is_gpu": True, "num_cores": 16, "peak_reserved": 10, "memory_limit": 100, "batch_size": 2,
        "loader_images_per_second": 100.0, "phases": [type("Cost", (), {"step_seconds": 0.1})], **figures,
    }  # fmt: skip
    report = Report(compose(arguments))
    report.rehearsal = type("Measured", (), measured)
    check._judge(report, {})
    return [finding.text for finding in report.findings]


def test_figures_of_a_gpu_are_judged(arguments):
    assert judged(arguments) == []
    assert "takes 95% of the GPU's memory: set grad_check" in judged(arguments, peak_reserved=95)[0]
    assert "0 workers load 4.0 images/s, but the model takes 20.0" in judged(arguments, loader_images_per_second=4.0)[0]
    assert judged(arguments, loader_images_per_second=4.0, is_gpu=False) == []


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory of a process is measured under Linux")
def test_peak_memory_is_that_of_the_rehearsal_and_not_of_what_came_before(arguments):
    config = compose([*arguments, "loss=cross_entropy", "schedule=single"])
    phases = open_phases(config)
    before = memory.held()
    np.ones(2**31, np.uint8)  # what an audit may have held; freed again
    assert memory.peak() >= before + 2**30
    measured = rehearsal.rehearse(config, phases, sizes={"train": (4, 2)})
    assert 50 * 2**20 < measured.peak_memory < min(before + 2**30, measured.memory_limit)
    assert measured.peak_reserved == 0


def test_memory_that_cannot_be_measured_is_said(arguments, monkeypatch):
    monkeypatch.setattr(rehearsal.memory, "can_measure", lambda device: False)
    report = check.check(compose([*arguments, "loss=cross_entropy"]))
    assert report.rehearsal.peak_memory is None
    assert "peak memory    not measured on this system" in as_text(to_json(report))


def test_counts_are_shared_with_training_but_phases_are_not(arguments, tmp_path):
    config = compose(arguments)
    (tmp_path / "here").mkdir()
    cache = rehearsal.cache_beside(config, tmp_path / "here")
    (cache / "label_counts" / "x.json").write_text("{}")
    assert (Path(config.cache_dir) / "label_counts" / "x.json").is_file()
    assert not (cache / "phases").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rehearsal_on_a_gpu(arguments):
    report = check.check(compose([*arguments, "device=cuda", "loss=cross_entropy"]))
    assert report.rehearsal.is_gpu
    assert 0 < report.rehearsal.peak_memory <= report.rehearsal.peak_reserved < report.rehearsal.memory_limit
