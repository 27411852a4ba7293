"""--decision in evaluate, predict, submit and export, on one small run that held images out of training."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from segkit import predict as predict_arrays
from segkit.commands import decision, evaluate, export, predict, submit
from segkit.commands.decision import checksum
from segkit.config.compose import compose
from segkit.errors import InputError
from segkit.report.card import card as render
from segkit.run.portable import scores_of
from segkit.run.saved import SavedRun, open_run
from segkit.run.splits import is_held_out, open_phases, open_split

NUM_IMAGES = 8
HELD = [f"train_{number:04d}" for number in range(NUM_IMAGES) if is_held_out(f"train_{number:04d}", 0.3)]
QUICK = ["--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from segkit.run import pipeline

    folder = tmp_path_factory.mktemp("decision")
    config = compose(
        [
            "dataset=synthetic",
            f"dataset.reader.num_images={NUM_IMAGES}",
            "dataset.reader.size=[67,75]",  # no stride divides them
            "dataset.holdout=0.3",
            "model=deeplabv3plus_tiny",
            "model.encoder=tu-test_resnet",
            "debug=smoke",
            "schedule=single",
            "limit_steps=6",
            "dataset.crop=[64,64]",
            "device=cpu",
            "precision=fp32",  # also where the default is another one
            "optimizer.lr=3e-3",
            "loss=cross_entropy",
            f"cache_dir={folder / 'cache'}",
        ]
    )
    splits = open_phases(config)
    pipeline.run(config, folder / "run", splits)
    for number, size in enumerate(((67, 75), (96, 64), (65, 121))):
        picture = Image.fromarray(splits["train"].val.image(number)).resize(size[::-1])
        (folder / "pictures").mkdir(exist_ok=True)
        picture.save(folder / "pictures" / f"{number}.png")
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run without a decision."""
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@pytest.fixture
def call(capsys):
    def calling(verb, *arguments):
        verb.run([*map(str, arguments)])
        return capsys.readouterr().out

    return calling


def labels(folder):
    found = {}
    for path in sorted((folder / "labels").glob("*.png")):
        with Image.open(path) as image:
            found[path.stem] = np.asarray(image)
    return found


def predicted(call, run, output, *options):
    with pytest.raises(SystemExit) as stopped:
        call(
            predict, run, "--input", output.parent.parent / "pictures", "--output", output, "--device", "cpu", *options
        )
    assert stopped.value.code == 0
    return labels(output)


def evaluations(run):
    return {path.stem: json.loads(path.read_text()) for path in (run / "evaluations").glob("*.json")}


def test_fitted_once_on_what_is_never_scored(run, call, tmp_path, monkeypatch):
    opened = []
    for verb, options in (
        (predict, ["--input", tmp_path, "--output", tmp_path / "out"]),
        (export, []),
    ):
        if verb is predict:
            Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
        with pytest.raises(InputError, match=r"decision\.json is not there, .*: fit it with `segkit evaluate .* miou`"):
            call(verb, run, "--decision", "miou", *options)
    with pytest.raises(InputError, match="there is no submission format 'synthetic'"):
        call(submit, run, "--decision", "miou", "--output", tmp_path / "all.zip", "--split", "val")
    with monkeypatch.context() as patch:
        patch.setattr(decision, "open_split", lambda *given: opened.append(given[1]) or open_split(*given))
        out = call(evaluate, run, *QUICK, "--decision", "miou")
    assert opened == ["holdout"]
    assert f"fitted on {len(HELD)} images of the split holdout" in out
    stored = json.loads((run / "decision.json").read_text())
    assert sorted(stored["fitted_on"]["images"]) == HELD
    assert stored["fitted_on"]["holdout"] == 0.3
    for name in ("bias", "miou"):
        assert stored[name]["mean_iou_after"] >= stored[name]["mean_iou_before"]
    assert "fitted on" not in call(evaluate, run, *QUICK, "--decision", "bias")
    call(evaluate, run, *QUICK)
    found = {result["protocol"]["decision"]: result for result in evaluations(run).values()}
    assert sorted(found) == ["argmax", "bias", "miou"]
    assert "decision_fitted_on" not in found["argmax"]["protocol"]
    on = found["miou"]["protocol"]["decision_fitted_on"]
    assert (on["split"], on["dataset"], on["num_images"]) == ("holdout", "synthetic", len(HELD))
    assert "images" not in on
    assert found["miou"]["classes"] != found["argmax"]["classes"]
    assert "fitted on" in call(evaluate, run, *QUICK, "--decision", "miou", "--refit", "--split", "train")
    with monkeypatch.context() as patch:
        patch.setattr(SavedRun, "model", lambda *_: pytest.fail("the model is read before"))
        for refit in ([], ["--refit"]):
            with pytest.raises(
                InputError, match=r"are in the split holdout \(first: train_\d+\), .*score another --spl"
            ):
                call(evaluate, run, *QUICK, "--decision", "miou", "--split", "holdout", *refit)
    call(evaluate, run, *QUICK, "--split", "holdout")
    with pytest.raises(InputError, match="--refit is given without a decision to fit: add --decision"):
        call(evaluate, run, *QUICK, "--refit")
    change(run / "decision.json", stored, "is damaged, or of another version", fitted_on=None)
    flipped = {name: value + 2**-10 for name, value in stored["bias"]["bias"].items()}
    change(run / "decision.json", stored, "is damaged", signed=False, bias=stored["bias"] | {"bias": flipped})
    change(
        run / "decision.json", stored, "for 8 classes that are not those of the run", classes=stored["classes"][::-1]
    )
    change(run / "decision.json", stored, "was fitted for another checkpoint than .*--refit", digest="0" * 64)
    change(run / "decision.json", stored, r"decision\.json: the stored decision is none of", miou={"rule": {}})
    (run / "decision.json").unlink()
    (run / "decision.json").mkdir()
    for refit, message in (([], "must be a file: fit the decision again with .*--refit"), (["--refit"], "remove it")):
        with pytest.raises(InputError, match=rf"decision\.json is a folder, .*{message}"):
            call(evaluate, run, *QUICK, "--decision", "miou", *refit)


def change(path, stored, message, *, signed=True, **changes):
    """The stored decision with changes is refused."""
    content = stored | changes
    path.write_text(json.dumps(content | {"sha256": checksum(content)} if signed else content))
    with pytest.raises(InputError, match=message):
        evaluate.run([str(path.parent), *QUICK, "--decision", "miou"])


def test_training_images_where_none_were_held_out(run, call):
    text = (run / "config.yaml").read_text()
    assert "holdout: 0.3" in text
    (run / "config.yaml").write_text(text.replace("holdout: 0.3", "holdout: 0.0"))
    assert f"fitted on {NUM_IMAGES} images of the split train" in call(evaluate, run, *QUICK, "--decision", "bias")
    with pytest.raises(InputError, match=rf"{NUM_IMAGES} of them are in the split train \(first: train_0000\)"):
        call(evaluate, run, *QUICK, "--decision", "bias", "--split", "train")
    with pytest.raises(InputError, match=r"dataset\.holdout is 0: train with dataset\.holdout=0\.1"):
        call(evaluate, run, *QUICK, "--split", "holdout")


@pytest.mark.nightly
def test_an_exported_graph_decides_as_the_run_does(run, finished, call, tmp_path):
    pytest.importorskip("onnxruntime")
    shutil.copytree(finished.parent / "pictures", tmp_path / "pictures")
    place = tmp_path / "predictions"
    call(evaluate, run, *QUICK, "--decision", "miou")
    file = tmp_path / "miou.onnx"
    out = call(export, run, "--decision", "miou", "--output", file)
    assert "100.000 % of the pixels get the class of the evaluation in fp32" in out
    plain = predicted(call, run, place / "plain")
    own = predicted(call, run, place / "own", "--decision", "miou")
    graph = predicted(call, file, place / "graph")
    assert sorted(own) == ["0", "1", "2"]
    assert any((own[name] != plain[name]).any() for name in own)
    for name in own:
        assert own[name].shape == graph[name].shape
        assert (own[name] == graph[name]).mean() >= 0.999
    several = predicted(call, run, place / "several", "--decision", "miou", "--side-by-side", file, "--tta", "")
    assert all((several[name] == own[name]).all() for name in own)
    with_scores = predicted(call, run, place / "scores", "--decision", "miou", "--probabilities")
    assert all((with_scores[name] == own[name]).all() for name in own)
    with np.load(place / "scores" / "probabilities" / "0.npz") as stored:
        np.testing.assert_allclose(stored["probabilities"].astype(float).sum(0), 1, atol=5e-3)
    arguments = (predict, file, "--input", tmp_path / "pictures", "--output", place / "no")
    for option in (["--tta", "flip"], ["--slide", "64x64"], ["--probabilities"]):
        with pytest.raises(InputError, match=f"miou and no probabilities, which does not go with {option[0]}"):
            call(*arguments, *option)
    with pytest.raises(InputError, match="was exported with --decision miou, which cannot be changed"):
        call(*arguments, "--decision", "bias")


@pytest.mark.parametrize(
    "decision",
    ["miou", pytest.param("argmax", marks=pytest.mark.nightly), pytest.param("bias", marks=pytest.mark.nightly)],
)
def test_a_folder_of_weights_predicts_as_its_run_does(run, finished, call, tmp_path, decision):
    """Also the one file, and the graph that gives classes; the images have sizes that no stride divides."""
    shutil.copytree(finished.parent / "pictures", tmp_path / "pictures")
    place, folder = tmp_path / "predictions", tmp_path / "hub"
    call(evaluate, run, *QUICK, "--decision", decision)
    options = ["--decision", decision]
    own = predicted(call, run, place / "own", *options)
    for format, output in (("hub", folder), ("safetensors", tmp_path / "one.safetensors")):
        out = call(export, run, *options, "--format", format, "--output", output)
        assert re.search(r"checked on 4 images of val: (100|99\.9\d+)\.?\d* % of the pixels get the class of the", out)
        found = predicted(call, output, place / format)
        for name in own:
            assert (own[name] == found[name]).mean() == 1.0
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    facts = json.loads((folder / "config.json").read_text())
    score = facts["scores"][0]
    low, high = score["interval"]
    assert low <= score["mean_iou"] <= high
    assert score["protocol"]["decision"] == facts["decision"] == decision
    for path in (run / "evaluations").glob("*.json"):  # as if the training had gone on since
        path.write_text(json.dumps(json.loads(path.read_text()) | {"digest": "0" * 64}))
    said = {key: facts[key] for key in ("decision", "decision_fitted_on") if key in facts}
    again = scores_of(open_run(run), checkpoint="last", decision=said)
    assert [one["protocol"] for one in again] == [score["protocol"]] * (decision == "argmax")
    assert str(finished) not in json.dumps(facts)
    card = (folder / "README.md").read_text()
    assert f"| {100 * score['mean_iou']:.2f} | {100 * low:.2f} to {100 * high:.2f} |" in card
    assert "epochs, at most 6 steps, learning rate by poly, loss cross\\_entropy" in card
    facts["training"]["phases"][0] |= {"dataset": "coarse", "lr": 0.5}
    assert re.search(r"on the split \w+ of coarse: .*, learning rate 0\.5 by poly, loss", render(facts))
    assert ("Fitted on" in card) == (decision != "argmax")
    assert predict_arrays([np.zeros((33, 50, 3), np.uint8)], folder, device="cpu")[0].shape == (33, 50)
    arguments = (predict, folder, "--input", tmp_path / "pictures", "--output", place / "no")
    with pytest.raises(InputError, match="is the export of one checkpoint, which --checkpoint cannot change: leave"):
        call(*arguments, "--checkpoint", "best")
    with pytest.raises(InputError, match="is the export of one phase, which --phase cannot change"):
        call(*arguments, "--phase", "train")
    if decision != "argmax":
        return
    with pytest.raises(InputError, match="was exported with --decision argmax, which cannot be changed"):
        call(*arguments, "--decision", "bias")
    (folder / "model.safetensors.4711.tmp").write_bytes(b"of an export that was killed")
    call(export, run, "--format", "hub", "--output", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else than an export: give another folder"):
        call(export, run, "--format", "hub", "--output", folder)
    with pytest.raises(InputError, match="--classes is for a graph, not for --format hub: leave it out"):
        call(export, run, "--format", "hub", "--classes")


@pytest.mark.nightly
def test_a_program_is_run_for_who_trusts_it(run, finished, call, tmp_path):
    """A graph of torch.export that gives the classes of a decision, as ONNX does."""
    shutil.copytree(finished.parent / "pictures", tmp_path / "pictures")
    place, file = tmp_path / "predictions", tmp_path / "model.pt2"
    call(evaluate, run, *QUICK, "--decision", "miou")
    own = predicted(call, run, place / "own", "--decision", "miou")
    call(export, run, "--decision", "miou", "--format", "torch_export", "--classes", "--output", file)
    with pytest.raises(InputError, match=r"model\.pt2 is a program, .*: add --trust torch_export if"):
        call(predict, file, "--input", tmp_path / "pictures", "--output", place / "graph", "--device", "cpu")
    graph = predicted(call, file, place / "graph", "--trust", "torch_export")
    assert all((own[name] == graph[name]).mean() >= 0.999 for name in own)
    arguments = (predict, file, "--trust", "torch_export", "--input", tmp_path / "pictures", "--output", place / "no")
    with pytest.raises(InputError, match="gives classes and no probabilities, which does not go with --tta"):
        call(*arguments, "--tta", "flip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol", "cityscapes"], "names the class '.*', which is none of .*: give --protocol standard, or"),
        (["--slide", "0x32", "--decision", "miou"], r"window is \[0, 32\]"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_read(run, call, monkeypatch, options, message):
    monkeypatch.setattr(SavedRun, "model", None)
    with pytest.raises(InputError, match=message):
        call(evaluate, run, *QUICK, *options)


def test_evaluations_do_not_overwrite_each_other(run, call, tmp_path):
    """Every option that changes a score changes the name; the score of the training stays what it was."""
    trained = (run / "results.json").read_text()
    ways = [
        [],
        ["--max-images", "1"],
        ["--precision", "bf16"],
        ["--slide", "32x32"],
        ["--slide", "32x32", "--overlap", "0.1"],
        ["--tta", "ms", "--scales", "1,1.5"],
        ["--tta", "flip"],
        ["--boundary"],
        ["--checkpoint", "best"],
    ]
    for number, options in enumerate(ways, 1):
        call(evaluate, run, *QUICK, *options)
        assert len(evaluations(run)) == number, options
    call(evaluate, run, *QUICK)
    assert len(evaluations(run)) == len(ways)
    assert (run / "results.json").read_text() == trained
    assert not (run / "checkpoints" / "results.json").exists()
    (full,) = (result for name, result in evaluations(run).items() if name.startswith("val-last-") and plain(result))
    assert full["num_images"] == NUM_IMAGES
    with pytest.raises(InputError, match=r"a file of the run .*, which stays as it is: name another file"):
        call(evaluate, run, *QUICK, "--output", run / "results.json")


def plain(result):
    """True for a result of the protocol of the training."""
    protocol = result["protocol"]
    whole = protocol["window"] is None and protocol["max_images"] is None and protocol["scales"] == [1.0]
    return (
        whole
        and not protocol["flip"]
        and protocol["precision"] == "fp32"
        and not {"benchmark"} & {*protocol}
        and ("boundary" not in result)
        and result["checkpoint"] == "last"
    )


def test_other_classes_are_refused(run, finished, call, tmp_path, monkeypatch):
    counts = json.loads((run / "label_counts.json").read_text())
    names = list(counts["classes"])
    swapped = {name: counts["classes"][name] for name in (names[1], names[0], *names[2:])}
    (run / "label_counts.json").resolve().write_text(json.dumps(counts | {"classes": swapped}))
    for verb, options in (
        (evaluate, QUICK),
        (export, []),
        (submit, ["--split", "val", "--output", tmp_path / "a.zip"]),
    ):
        with pytest.raises(InputError, match=f"other classes than the run .*class 0 is '{names[0]}' instead of"):
            call(verb, run, *options)
    monkeypatch.setattr(SavedRun, "model", lambda *_: pytest.fail("a model is read before"))
    beside = ["--input", finished.parent / "pictures", "--output", tmp_path / "out", "--side-by-side", finished]
    with pytest.raises(InputError, match=rf"run predicts other classes .*class 0 is '{names[0]}' .*: name two runs of"):
        call(predict, run, *beside)
