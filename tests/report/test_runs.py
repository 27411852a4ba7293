"""Reading run folders: what is there, and one sentence for each way in which a folder can be wrong."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from segkit.errors import InputError
from segkit.report.comparison import compare
from segkit.report.runs import find_runs, read_run


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def real(run, name):
    """The file behind a link, so that tests can write to it."""
    return (run / name).resolve()


def test_a_run_is_read(make_run):
    run = make_run("a", "schedule=pretrain_finetune", seed=3, margins=True, num_pictures=2)
    record = read_run(run)
    assert (record.phase, record.seed) == ("finetune", 3)
    assert record.loss["_target_"] == "segkit.losses.margin_calibration"
    assert record.classes[:2] == ("road", "sidewalk")
    assert {line["phase"] for line in record.metrics} == {"pretrain", "finetune"}
    assert list(record.pictures) == ["val_0000", "val_0001"]
    assert record.margins["rho_0k"][0] == pytest.approx(0.01)
    assert record.notes == ()


def test_a_phase_is_a_run_of_its_own(make_run):
    run = make_run("a", "schedule=pretrain_finetune")
    record = read_run(run / "pretrain")
    assert record.phase == "pretrain"
    assert record.loss["_target_"] == "segkit.losses.cross_entropy"
    assert list(record.config["schedule"]) == ["pretrain"]
    assert {line["phase"] for line in record.metrics} == {"pretrain"}
    both = compare([run / "pretrain", run])
    assert [group.name for group in both.groups] == ["cross-entropy", "margin calibration (paper), τ=10, υ=1"]


def test_a_phase_is_read_from_within_its_folder(make_run, monkeypatch):
    monkeypatch.chdir(make_run("a", "schedule=pretrain_finetune") / "pretrain")
    (record,), _ = find_runs(["."])
    assert record.phase == "pretrain"


def test_a_run_named_twice_counts_once(make_run):
    run = make_run("a")
    assert len(find_runs([run, run, run / "finetune"])[0]) == 1


def test_a_sweep_is_its_finished_runs_in_order(make_run, tmp_path):
    for job in (10, 2, 0):
        make_run(f"sweep/{job}", f"loss.tau={job + 1}.0")
    real(tmp_path / "sweep" / "10", "results.json").unlink()
    (tmp_path / "sweep" / "11").mkdir()
    (tmp_path / "sweep" / ".submitit").mkdir()
    found, notes = find_runs([tmp_path / "sweep"])
    assert [run.path.name for run in found] == ["0", "2"]
    assert notes == [
        f"left out: {tmp_path}/sweep/10 has no results.json, its run is not finished",
        f"left out: {tmp_path}/sweep/11 has no config.yaml, its run did not start",
    ]


def test_a_sweep_says_why_a_job_failed(make_run, tmp_path):
    make_run("sweep/0")
    (tmp_path / "sweep" / "1").mkdir()
    jobs = [{"folder": "sweep/0", "state": "finished"}]
    jobs += [{"folder": "sweep/1", "state": "failed", "error": "error: no memory"}]
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(jobs))
    _, notes = find_runs([tmp_path / "sweep"])
    assert notes == [f"left out: {tmp_path}/sweep/1 has no config.yaml, its run failed: no memory"]
    (tmp_path / "sweep" / "sweep.json").write_text("{torn")
    assert find_runs([tmp_path / "sweep"])[1][0].endswith("its run did not start")


def test_an_evaluation_of_weights_that_are_gone_is_refused(make_run):
    """The training went on: last.pt is another file than the one that was evaluated."""
    run = make_run("a")
    for place in ("evaluations", "checkpoints"):
        (run / place).mkdir(exist_ok=True)
    (run / "checkpoints" / "last.pt").write_bytes(b"weights")
    results = json.loads((run / "results.json").read_text())
    results |= {"checkpoint": "last", "digest": hashlib.sha256(b"weights").hexdigest()}
    (run / "evaluations" / "val-last.json").write_text(json.dumps(results))
    shutil.copy(run / "per_image.npz", run / "evaluations" / "val-last.npz")
    ((record,), _) = find_runs([run], evaluation="val-last")
    assert not record.is_outdated()
    (run / "checkpoints" / "last.pt").write_bytes(b"other weights")
    with pytest.raises(
        InputError, match=r"evaluation 'val-last' of .*a is of weights that it has not any more.* again"
    ):
        find_runs([run], evaluation="val-last")
    (run / "checkpoints" / "last.pt").unlink()  # a folder that was copied without its weights
    assert find_runs([run], evaluation="val-last")


def test_another_evaluation_of_a_run(make_run):
    run, flipped = make_run("a", num_pictures=1), make_run("flipped", skill=0.9, protocol={"inference": "flip"})
    folder = run / "evaluations"
    folder.mkdir()
    shutil.copy(flipped / "results.json", folder / "val-last-flip.json")
    shutil.copy(flipped / "per_image.npz", folder / "val-last-flip.npz")
    ((record,), notes) = find_runs([run], evaluation="val-last-flip")
    assert record.results["mean_iou"] == read_run(flipped).results["mean_iou"]
    assert record.per_image.total().sum() == 30 * 20_000
    assert record.pictures == {}  # they show other predictions than these scores
    assert notes == [f"the pictures in {run} are of the evaluation after training and not shown for val-last-flip"]
    for part in ("json", "npz"):
        (folder / f"val-last-flip.{part}").rename(folder / f"val-last-flip-0a1b2c3d.{part}")
    ((record,), _) = find_runs([run], evaluation="val-last-flip")  # the hash may be left out
    assert record.results["mean_iou"] == read_run(flipped).results["mean_iou"]
    (folder / "val-last-flip-ffffffff.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"several evaluations 'val-last-flip'.*val-last-flip-0a1b2c3d, val-last-flip-f"
    ):
        find_runs([run], evaluation="val-last-flip")
    with pytest.raises(
        InputError, match=r"no mean_iou .*: delete it, and evaluate the run again with `segkit evaluate"
    ):
        find_runs([run], evaluation="val-last-flip-ffffffff")
    (folder / "val-last-flip-ffffffff.json").unlink()
    with pytest.raises(InputError, match=r"a has no evaluation 'val-last', it has"):
        find_runs([run], evaluation="val-last")
    with pytest.raises(InputError, match=r"a has no evaluation 'test', it has val-last-flip-0a1b2c3d: make it with"):
        find_runs([run], evaluation="test")
    with pytest.raises(InputError, match=r"has no evaluation 'x', it has none: make it with `segkit evaluate "):
        find_runs([flipped], evaluation="x")
    with pytest.raises(InputError, match=r"has no evaluation '../results'"):
        find_runs([run], evaluation="../results")
    with pytest.raises(InputError, match=rf"make it with `segkit evaluate .*/a --phase {record.phase}`"):
        find_runs([run / record.phase], evaluation="x")


# -- bad input -----------------------------------------------------------------------------------------------------


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match=r"gone is not a folder: name run folders such as"):
        find_runs([tmp_path / "gone"])


def test_an_empty_folder(tmp_path):
    nothing = r"is neither a run .*, a finished phase of one, nor a sweep \(no sub-folder has one\)"
    with pytest.raises(InputError, match=nothing):
        find_runs([tmp_path])


def test_a_sweep_without_a_finished_run(make_run, tmp_path):
    real(make_run("sweep/0"), "results.json").unlink()
    with pytest.raises(InputError, match=r"no run of the sweep .*sweep is finished: wait for one"):
        find_runs([tmp_path / "sweep"])


def test_a_half_written_run(make_run):
    run = make_run("a")
    real(run, "results.json").unlink()
    with pytest.raises(InputError, match=r"a has no results.json, its run is not finished: go on with it, or leave it"):
        find_runs([run])


@pytest.mark.parametrize("name", ["results.json", "label_counts.json", "provenance.json"])
def test_a_torn_json_file(make_run, name):
    run = make_run("a")
    file = real(run, name)
    file.write_text(file.read_text()[:40])
    with pytest.raises(
        InputError, match=rf"{name} cannot be read \(.*\): (evaluate|give the command that trained) the"
    ):
        find_runs([run])


def test_json_that_is_no_object(make_run):
    run = make_run("a")
    real(run, "results.json").write_text("[1]")
    with pytest.raises(InputError, match=r"results.json holds no JSON object: evaluate the run again with"):
        find_runs([run])


def test_results_of_another_version(make_run):
    run = make_run("a")
    edit(real(run, "results.json"), lambda results: (results.pop("protocol"), results.pop("num_images")))
    with pytest.raises(
        InputError,
        match=r"has no num_images and no protocol, it was written by another version .* with --evaluation",
    ):
        find_runs([run])


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.update(iou=1.7),
        lambda row: row.update(iou="0.5"),
        lambda row: row.update(target_pixels=None),
        lambda row: row.pop("precision"),
    ],
)
def test_a_score_that_is_none(make_run, change):
    run = make_run("a")
    edit(real(run, "results.json"), lambda results: change(results["classes"]["sky"]))
    with pytest.raises(InputError, match=r"lacks a score, or holds one that is no number from 0 to 1, it is damaged"):
        find_runs([run])


def test_numbers_of_classes_that_are_none(make_run):
    run = make_run("a", margins=True, num_pictures=1)
    edit(real(run, "margins.json"), lambda margins: margins["rho_0k"].__setitem__(0, 10**400))
    with pytest.raises(InputError, match=r"margins.json has not one rho_0k and one rho_k0 per class"):
        find_runs([run])
    index = real(run, "pictures") / "index.json"
    edit(index, lambda pictures: pictures["palette"].__setitem__(0, [10**30, 0, 0]))
    with pytest.raises(InputError, match=r"index.json is no index of pictures .* delete the folder"):
        find_runs([run])
    metrics = real(run, "metrics.jsonl")
    text = metrics.read_text()
    metrics.write_text(text.replace('"step": 10,', f'"step": {10**400},', 1))
    index.unlink()
    with pytest.raises(InputError, match=r"line 1 of .*metrics.jsonl is no record of a phase"):
        find_runs([run])
    metrics.write_text(text)
    edit(real(run, "results.json"), lambda results: results.update(best={"step": 3}))
    with pytest.raises(InputError, match=r"has a best score or absent classes that are none"):
        find_runs([run])
    edit(real(run, "results.json"), lambda results: results["classes"]["sky"].update(target_pixels="many"))
    with pytest.raises(InputError, match=r"lacks a score, or holds one that is no number"):
        find_runs([run])


def test_a_protocol_without_keys(make_run):
    run = make_run("a")
    edit(real(run, "results.json"), lambda results: results.update(protocol="whole"))
    with pytest.raises(InputError, match=r"has a protocol that is not of keys and values, the file is damaged"):
        find_runs([run])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("loss: [", r"config.yaml cannot be read \(.*\): copy the config.yaml that segkit wrote"),
        ("seed: 0\nmodel: {}\ndataset: {}", r"config.yaml has no loss, as if it were cut off: copy the config.yaml"),
        ("- 1", r"config.yaml holds no configuration: copy the config.yaml that segkit wrote"),
        ("{seed: 0, model: {}, dataset: {}, loss: {}, optimizer: {}, schedule: {}}", r"has no phases in schedule"),
        ("{model: {}, dataset: {}, loss: {}, optimizer: {}, schedule: {train: {}}}", r"has no loss._target_, it was"),
    ],
)
def test_a_configuration_of_another_version(make_run, content, message):
    run = make_run("a")
    (run / "config.yaml").write_text(content)
    with pytest.raises(InputError, match=message):
        find_runs([run])


def test_a_saved_configuration_cannot_read_the_environment(make_run, monkeypatch):
    monkeypatch.setenv("SECRET", "letmein")
    run = make_run("a")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("device: auto", "device: ${oc.env:SECRET}"))
    with pytest.raises(InputError, match=r"config.yaml has '\$\{' in line .*, but a saved config") as e:
        read_run(run)
    assert "letmein" not in str(e.value)


def test_a_torn_line_of_metrics(make_run):
    run = make_run("a", "schedule=single")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[:-20])
    with pytest.raises(InputError, match=r"line 24 of .*metrics.jsonl is no record of a phase: give the command"):
        find_runs([run])


def test_counts_of_another_evaluation(make_run):
    run, other = make_run("a"), make_run("b", skill=0.6)
    shutil.copy(real(other, "per_image.npz"), real(run, "per_image.npz"))
    with pytest.raises(
        InputError, match=r"results.json \(mean IoU .* are not of one evaluation: evaluate the run again"
    ):
        find_runs([run])


def test_a_broken_count_file(make_run):
    run = make_run("a")
    real(run, "per_image.npz").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"per_image.npz is not a per-image count file"):
        find_runs([run])


def test_label_counts_and_margins_need_one_number_per_class(make_run):
    run = make_run("a", margins=True)
    edit(real(run, "margins.json"), lambda margins: margins["rho_0k"].pop())
    with pytest.raises(InputError, match=r"margins.json has not one rho_0k and one rho_k0 per class"):
        find_runs([run])
    edit(real(run, "label_counts.json"), lambda counts: counts.update(classes=["road", "sky"]))
    with pytest.raises(InputError, match=r"label_counts.json has not a number of pixels per class: give the command"):
        find_runs([run])


@pytest.mark.parametrize(
    ("name", "purpose"),
    [
        ("per_image.npz", "intervals, tests and confusion matrix"),
        ("metrics.jsonl", "curves"),
        ("label_counts.json", "label distribution"),
        ("provenance.json", "origin"),
    ],
)
def test_a_missing_file_is_said(make_run, name, purpose):
    run = make_run("a")
    (run / name).unlink()
    assert find_runs([run])[1] == [f"{run} has no {name}: no {purpose} for it"]


def test_curves_without_a_line_are_said(make_run):
    run = make_run("a")
    (run / "metrics.jsonl").write_text("")
    assert find_runs([run])[1] == [f"{run}/metrics.jsonl has no line of pretrain, finetune: no curves for it"]


def test_a_broken_index_of_pictures(make_run):
    run = make_run("a", num_pictures=1)
    for text in ('{"pictures": 3}', '{"palette": [], "pictures": []}'):
        real(run, "pictures").joinpath("index.json").write_text(text)
        with pytest.raises(InputError, match=r"index.json is no index of pictures .* delete the folder"):
            find_runs([run])


# -- runs that do not belong together ------------------------------------------------------------------------------


def test_other_data_sets(make_run):
    one, other = make_run("a"), make_run("b", protocol={"dataset": "camvid"}, classes=("Sky", "Road"))
    message = (
        r"dataset is 'synthetic' in .*a and 'camvid' in .*b; the classes are 8 \(road, sidewalk, building, "
        r"vegetation, ...\) in .*a and 2 \(Sky, Road\) in .*b. Compare runs of one protocol.* --allow-mixed-protocols"
    )
    with pytest.raises(InputError, match=message):
        compare([one, other])
    mixed = compare([one, other], allow_mixed_protocols=True)
    assert len(mixed.mixed) == 2
    assert mixed.table.titles == ("pixel acc.", "mIoU", *mixed.runs[0].classes, "Sky", "Road")
    assert mixed.table.caption.startswith(f"Not evaluated alike: {mixed.mixed[0]}; {mixed.mixed[1]}. In percent.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": {"resize": {"short_side": 400}}}, r"resize is None in .*a and not given in .*b"),
        ({"protocol": {"inference": "flip"}}, r"inference is 'whole image' in .*a and 'flip' in .*b"),
        ({"protocol": {"extra": 1}}, r"extra is not given in .*a and 1 in .*b"),
        ({"num_images": 12}, r"number of images is 30 in .*a and 12 in .*b"),
    ],
)
def test_other_protocols(make_run, options, message):
    with pytest.raises(InputError, match=f"not evaluated alike: .*{message}"):
        compare([make_run("a"), make_run("b", **options)])


def test_other_images(make_run):
    one, other = make_run("a"), make_run("b")
    from dataclasses import replace

    from segkit.evaluation.per_image import PerImageCounts

    counts = PerImageCounts.load(other / "per_image.npz")
    renamed = replace(counts, names=tuple(f"test_{i}" for i in range(30)))
    real(other, "per_image.npz").write_bytes(renamed.to_bytes())
    with pytest.raises(InputError, match=r"the images of .*a and of .*b have different names"):
        compare([one, other])
