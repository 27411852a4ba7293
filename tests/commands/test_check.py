"""``segkit check`` as a user calls it: what it finds, what it writes, and how it ends."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segkit.check import check, rehearsal
from segkit.check.findings import Report
from segkit.check.report import MOST_ROWS, as_text, shown_bytes, shown_time, to_json
from segkit.commands import check as command
from segkit.config.compose import compose
from segkit.errors import InputError
from segkit.guard import guarded
from segkit.run import auto_batch
from segkit.run.batches import PhaseBatches
from segkit.run.plan import plan_phase
from segkit.run.splits import open_phases
from segkit.synthetic.sample_maker import make_sample

TINY = [
    "model=coplenet",
    "model.feature_channels=[4,8,16,32,64]",
    "model.num_groups=2",
    "dataset.crop=[32,32]",
    "dataset.eval_resize={short_side:null,size:[32,48]}",
    "batch_size=2",
    "evaluation.pictures=1",
    "workers=0",
    "device=cpu",
]


@pytest.fixture
def root(tmp_path):
    return make_sample("camvid", tmp_path / "CamVid", num_images=4, scale=0.1)


@pytest.fixture
def arguments(root, tmp_path):
    return ["dataset=camvid", f"dataset.root={root}", f"cache_dir={tmp_path / 'cache'}", *TINY]


def call(monkeypatch, capsys, *arguments):
    """The command line: (exit code, stdout, stderr)."""
    argv = [*map(str, arguments)]
    code = 0
    try:
        guarded(lambda: command.run(argv))
    except SystemExit as end:
        code = end.code or 0
    out, err = capsys.readouterr()
    return code, out, err


def damage(root):
    """One problem of every kind."""
    whole = (root / "train" / "train_00000.png").read_bytes()
    (root / "train" / "train_00000.png").write_bytes(whole[:500])
    label = np.array(Image.open(root / "trainannot" / "train_00001.png"))
    label[0, :5] = 99
    Image.fromarray(label).save(root / "trainannot" / "train_00001.png")
    (root / "trainannot" / "train_00002.png").unlink()
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(root / "valannot" / "val_00001.png")
    (root / "train" / "train_00003.png").write_bytes((root / "val" / "val_00000.png").read_bytes())


# -- the command -----------------------------------------------------------------------------------------------------


def test_whole_data_and_a_rehearsal_end_with_0(monkeypatch, capsys, arguments, tmp_path):
    code, out, _ = call(monkeypatch, capsys, *arguments, "--json", tmp_path / "report.json", "loss=cross_entropy")
    assert code == 0
    assert out.rstrip().splitlines()[-1] == "verdict: 2 warnings"
    assert "split train of camvid has only 4 images, but 367 are published" in out
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["verdict"] == "warnings"
    assert content["loss"]["_target_"] == "segkit.losses.cross_entropy"
    assert [split["split"] for split in content["splits"]] == ["train", "val"]
    assert content["splits"][0]["num_published"] == 367
    raw = {row["value"]: row for row in content["splits"][0]["raw_values"]}
    assert raw[11]["train"] == 255
    assert raw[0]["pixels"] == content["splits"][0]["classes"]["Sky"]["pixels"] > 0
    measured = content["rehearsal"]
    assert measured["num_steps"] == 3
    assert measured["batch_size"] == 2
    (phase,) = measured["phases"]
    assert phase["num_steps"] == 60 * 2  # 60 epochs of 4 images by 2
    assert phase["num_evaluations"] == 60
    assert phase["num_evaluated_images"] == 2
    assert phase["seconds"] >= phase["num_steps"] * phase["step_seconds"]
    assert measured["estimated_seconds"] == phase["seconds"]


def test_all_problems_are_collected_and_the_rest_is_rehearsed(monkeypatch, capsys, arguments, root, tmp_path):
    damage(root)
    code, out, _ = call(monkeypatch, capsys, *arguments, "--json", tmp_path / "report.json")
    assert code == 1
    content = json.loads((tmp_path / "report.json").read_text())
    errors = [item["text"] for item in content["findings"] if item["level"] == "error"]
    for part in (
        "lists label",
        "train_00000.png is damaged",
        "5 pixels of the raw value 99",
        "val_00001.png is 48x36 but its label",
        "1 of 2 images of split val are in train as well",
    ):
        assert sum(part in text for text in errors) == 1, part
        assert part in out
    assert len(errors) == 5
    assert content["rehearsal"] is not None
    notes = [item["text"] for item in content["findings"] if item["level"] == "note"]
    assert "the steps were tried on unbroken pairs of split train only" in notes
    levels = [item["level"] for item in content["findings"]]
    assert levels == sorted(levels, key=["error", "warning", "note"].index)
    assert "verdict: 5 errors" in out


def test_a_missing_split_is_one_of_the_findings(monkeypatch, capsys, arguments, root):
    (root / "val.txt").unlink()
    code, out, _ = call(monkeypatch, capsys, *arguments)
    assert code == 1
    assert f"error: camvid lacks its list file {root / 'val.txt'}" in out
    assert "note: no step was tried, because a split could not be opened" in out
    assert "4 images, but 367" in out  # the training split was looked at all the same


def test_nothing_usable(monkeypatch, capsys, arguments, root):
    for path in (root / "valannot").iterdir():
        path.write_bytes(b"")
    code, out, _ = call(monkeypatch, capsys, *arguments)
    assert code == 1
    assert "note: no step was tried, because a split has no usable pair of image and label" in out


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--sample", "0"], "--sample is 0, but must be at least 1"),
        (["--json", "/no/such/folder/report.json"], "/no/such/folder is no folder: make it"),
        (["dataset.cropp=[8,8]"], "there is no key dataset.cropp: did you mean dataset.crop"),
        (["loss.tau=1", "+loss.typo=2"], "loss.typo is not an argument of segkit.losses.margin_calibration"),
    ],
)
def test_mistakes_in_the_command_end_with_2(monkeypatch, capsys, arguments, extra, sentence):
    code, out, err = call(monkeypatch, capsys, *arguments, "--skip-step", *extra)
    assert (code, out) == (2, "")
    assert sentence in err


def test_sample_and_options_between_overrides(monkeypatch, capsys, arguments, root, tmp_path):
    code, out, _ = call(
        monkeypatch, capsys, arguments[0], "--sample", 2, "--skip-step", *arguments[1:], "--json", tmp_path / "r.json"
    )
    assert code == 0
    content = json.loads((tmp_path / "r.json").read_text())
    assert [split["num_checked"] for split in content["splits"]] == [2, 2]
    assert content["rehearsal"] is None
    assert "2 random samples of each split" in out
    assert "note: no step was tried, because of --skip-step" in out


def test_a_run_that_would_fail_is_a_finding(monkeypatch, capsys, arguments):
    code, out, _ = call(monkeypatch, capsys, *arguments, "model.num_groups=3")
    assert code == 1
    assert "error: the run would fail: model.num_groups is 3, but must divide 2" in out
    assert "11 of 11" in out


def test_a_defect_is_a_finding_with_its_traceback(monkeypatch, capsys, arguments):
    def fail(*args, **options):
        raise ZeroDivisionError("by zero\nand more")

    monkeypatch.setattr(rehearsal, "rehearse", fail)
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == 1
    assert "error: the run would fail with ZeroDivisionError (by zero)" in out
    assert "Traceback" in err


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


def test_validation_on_the_training_split_is_a_warning(arguments):
    report = check.check(compose([*arguments, "dataset.val_split=train"]), rehearses=False)
    assert any("both on split train" in finding.text for finding in report.findings)
    assert len(to_json(report)["splits"]) == 1


def test_a_warning_of_the_loss_is_a_finding_and_in_a_part_a_note(arguments, root):
    for path in (root / "trainannot").iterdir():
        pixels = np.array(Image.open(path))
        pixels[pixels == 8] = 11
        Image.fromarray(pixels).save(path)
    config = compose(arguments)
    levels = {
        sample: {f.level for f in check.check(config, sample=sample).findings if "loss.absent=max" in f.text}
        for sample in (None, 3)
    }
    assert levels == {None: {"warning"}, 3: {"note"}}


def test_a_part_is_not_blamed_for_classes_that_it_lacks(arguments):
    report = check.check(compose([*arguments, "loss.absent=error"]), sample=1)
    assert [finding.text for finding in report.findings if finding.level == "error"] == []
    assert report.rehearsal is not None


def test_several_phases_are_all_rehearsed(arguments):
    config = compose([*arguments, "schedule=pretrain_finetune", "limit_steps=2"])
    report = check.check(config)
    assert [phase.name for phase in report.rehearsal.phases] == ["pretrain", "finetune"]
    assert [phase.num_steps for phase in report.rehearsal.phases] == [2, 2]
    assert len(report.data) == 1


def test_nothing_is_left_but_label_counts(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    check.check(compose(arguments))
    assert list((tmp_path / "temporary").iterdir()) == []
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.parent.name for path in kept} == {"label_counts"}


# -- text ------------------------------------------------------------------------------------------------------------


def test_every_finding_is_in_the_text(arguments, root):
    damage(root)
    content = to_json(check.check(compose(arguments), rehearses=False))
    text = as_text(content)
    for item in content["findings"]:
        assert f"{item['level']}: {item['text']}" in text
    assert "unknown" in text


def test_many_raw_values_are_shortened(tmp_path):
    root = make_sample("ade20k", tmp_path / "ade20k", num_images=2, scale=0.1)
    config = compose(["dataset=ade20k", f"dataset.root={root}", "workers=0"])
    content = to_json(check.check(config, rehearses=False))
    assert len(content["splits"][0]["raw_values"]) == 151
    lines = as_text(content).splitlines()
    assert "the 12 rarest of 151" in "\n".join(lines)
    assert len(lines) < MOST_ROWS + 40


def test_a_report_without_problems_says_ok():
    content = {"splits": [], "rehearsal": None, "findings": [], "verdict": "ok"}
    assert as_text(content) == "verdict: ok"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5.4, "5 s"), (600, "10 min"), (3 * 3600 + 20 * 60, "3 h 20 min"), (50 * 3600, "2 d 2 h")],
)
def test_shown_time(seconds, text):
    assert shown_time(seconds) == text


def test_shown_bytes():
    assert shown_bytes(3 * 2**29) == "1.50 GiB"
    assert shown_bytes(5 * 2**20) == "5 MiB"


# -- the rehearsal ---------------------------------------------------------------------------------------------------


def test_shortening_keeps_what_decides_about_memory_and_speed(arguments, tmp_path):
    config = compose([*arguments, "evaluation.max_images=1", "profile_steps=5"])
    short = rehearsal.shorten(config, device=torch.device("cpu"), cache_dir=tmp_path)
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(short, f.name)}
    assert changed == {"evaluation", "limit_steps", "cache_dir", "log_every", "profile_steps"}
    assert short.evaluation.max_images == 1
    assert short.evaluation.batch_size == config.evaluation.batch_size
    assert rehearsal.shorten(config, device=torch.device("cuda"), cache_dir=tmp_path).limit_steps == 12


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


BEFORE_A_REHEARSAL = """
import json, sys
import numpy as np
from segkit.check import rehearsal
from segkit.config.compose import compose
from segkit.run.splits import open_phases

config = compose(sys.argv[2:])
phases = open_phases(config)
np.ones(int(sys.argv[1]), np.uint8)  # what an audit may have held; freed again
print(json.dumps(rehearsal.rehearse(config, phases, sizes={"train": (4, 2)}).to_json()))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory of a process is measured under Linux")
def test_peak_memory_is_that_of_the_rehearsal_and_not_of_what_came_before(arguments):
    peaks = []
    for held_before in (0, 2**31):
        command = [sys.executable, "-c", BEFORE_A_REHEARSAL, str(held_before), *arguments, "loss=cross_entropy"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        measured = json.loads(done.stdout.splitlines()[-1])
        peaks.append(measured["peak_memory"])
        assert 50 * 2**20 < measured["peak_memory"] < measured["memory_limit"]
        assert measured["peak_reserved"] == 0
    assert peaks[1] < peaks[0] + 2**29


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


def test_input_errors_of_the_configuration_are_raised(arguments):
    with pytest.raises(InputError, match=r"loss\.typo is not an argument"):
        check.check(compose([*arguments, "+loss.typo=1"]))


def test_class_names_show_as_they_are_written(arguments):
    content = to_json(check.check(compose(arguments), rehearses=False))
    split = content["splits"][0]
    names = ["car [rare]", "tool [/x]", "red\x1b[31m"]
    split["classes"] = dict(zip([*names, *list(split["classes"])[3:]], split["classes"].values(), strict=True))
    text = as_text({**content, "splits": [split], "findings": [], "dataset": "d [/x]"})
    assert all(name in text for name in ("car [rare]", "tool [/x]", r"red\x1b[31m", "d [/x]"))
    assert "\x1b" not in text
