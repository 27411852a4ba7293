"""``segkit check`` as a user calls it: what it finds, what it writes, and how it ends."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from segkit.check import check, rehearsal
from segkit.check.report import MOST_ROWS, as_text, shown_bytes, shown_time, to_json
from segkit.config.compose import compose
from segkit.errors import InputError
from segkit.synthetic.sample_maker import make_sample


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


def test_whole_data_and_a_rehearsal_end_with_0(call, arguments, tmp_path):
    code, out, _ = call(*arguments, "--json", tmp_path / "report.json", "loss=cross_entropy")
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


def test_all_problems_are_collected_and_the_rest_is_rehearsed(call, arguments, root, tmp_path):
    damage(root)
    code, out, _ = call(*arguments, "--json", tmp_path / "report.json")
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


def test_a_missing_split_is_one_of_the_findings(call, arguments, root):
    (root / "val.txt").unlink()
    code, out, _ = call(*arguments)
    assert code == 1
    assert f"error: camvid lacks its list file {root / 'val.txt'}" in out
    assert "note: no step was tried, because a split could not be opened" in out
    assert "4 images, but 367" in out  # the training split was looked at all the same


def test_nothing_usable(call, arguments, root):
    for path in (root / "valannot").iterdir():
        path.write_bytes(b"")
    code, out, _ = call(*arguments)
    assert code == 1
    assert "note: no step was tried, because a split has no usable pair of image and label" in out


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--sample", "0"], "--sample: '0' is no whole number from 1"),
        (["--json", "/no/such/folder/report.json"], "/no/such/folder is no folder: make it"),
        (["dataset.cropp=[8,8]"], "there is no key dataset.cropp: did you mean dataset.crop"),
        (["loss.tau=1", "+loss.typo=2"], "loss.typo is not an argument of segkit.losses.margin_calibration"),
    ],
)
def test_mistakes_in_the_command_end_with_2(call, arguments, extra, sentence):
    code, out, err = call(*arguments, "--skip-step", *extra)
    assert (code, out) == (2, "")
    assert sentence in err


def test_sample_and_options_between_overrides(call, arguments, root, tmp_path):
    code, out, _ = call(arguments[0], "--sample", 2, "--skip-step", *arguments[1:], "--json", tmp_path / "r.json")
    assert code == 0
    content = json.loads((tmp_path / "r.json").read_text())
    assert [split["num_checked"] for split in content["splits"]] == [2, 2]
    assert content["rehearsal"] is None
    assert "2 random samples of each split" in out
    assert "note: no step was tried, because of --skip-step" in out


def test_a_run_that_would_fail_is_a_finding(call, arguments):
    code, out, _ = call(*arguments, "model.num_groups=3")
    assert code == 1
    assert "error: the run would fail: model.num_groups is 3, but must divide 2" in out
    assert "11 of 11" in out


def test_a_defect_is_a_finding_with_its_traceback(monkeypatch, call, arguments):
    def fail(*args, **options):
        raise ZeroDivisionError("by zero\nand more")

    monkeypatch.setattr(rehearsal, "rehearse", fail)
    code, out, err = call(*arguments)
    assert code == 1
    assert "error: the run would fail with ZeroDivisionError (by zero)" in out
    assert "Traceback" in err


def test_validation_on_the_training_split_and_early_margins_are_warnings(arguments):
    overrides = [*arguments, "dataset.val_split=train", "loss=margin_calibration"]
    report = check.check(compose(overrides), rehearses=False)
    warned = [finding.text for finding in report.findings if finding.level == "warning"]
    assert any("both on split train" in text for text in warned)
    assert any("loss.form=paper wants a model that cross-entropy has trained" in text for text in warned)
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
    warmup = "schedule.train.warmup_steps=100"  # of 120, but the part alone would have 60
    report = check.check(compose([*arguments, "loss.absent=error", warmup]), sample=1)
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
