"""Whole runs, small ones: phases, initial weights, resuming by configuration, profiling."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import segkit
from segkit.config.compose import compose
from segkit.errors import InputError
from segkit.evaluation.per_image import PerImageCounts
from segkit.run import pipeline
from segkit.run.batches import PhaseBatches
from segkit.run.saved import open_run
from segkit.run.splits import open_phases
from segkit.run.start import REPORT, check_origin
from segkit.run.validation import Validation
from segkit.synthetic.sample_maker import make_sample
from segkit.training import checkpoint
from segkit.training.sinks import TensorBoard

SMALL = (
    "dataset.reader.num_images=6",
    "dataset.reader.size=[64,64]",
    "dataset.crop=[32,32]",
    "batch_size=2",
    "loss=cross_entropy",
    "evaluation.every_epochs=null",
    "evaluation.max_images=2",
    "evaluation.pictures=0",
    "limit_steps=2",
    "workers=0",
    "device=cpu",
    "determinism=strict",
    "model=coplenet",
    "model.feature_channels=[4,8,16,32,64]",
    "model.num_groups=2",
)


@pytest.fixture
def train(tmp_path):
    """train(NAME, overrides...) runs in tmp_path/NAME and returns that folder."""

    def run(name: str, *overrides: str) -> Path:
        one_phase = [] if any(item.startswith("schedule=") for item in overrides) else ["schedule=single"]
        config = compose([*SMALL, *one_phase, f"cache_dir={tmp_path}/cache", *overrides])
        pipeline.run(config, tmp_path / name, open_phases(config))
        return tmp_path / name

    return run


def weights(folder: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "checkpoints" / f"{which}.pt")["model"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_starts_from_the_weights_of_another(train):
    first = train("first")
    still = ("optimizer.lr=0.0", "seed=1")  # another seed would draw other weights
    from_run = train("from_run", *still, f"init_from={first}")
    from_file = train("from_file", *still, f"init_from={first}/checkpoints/last.pt")
    assert equal(weights(from_run), weights(first))
    assert equal(weights(from_file), weights(first))
    assert not equal(weights(train("from_scratch", *still)), weights(first))


def test_a_run_goes_on_without_the_weights_that_it_began_with(train, tmp_path):
    start = tmp_path / "start.pt"
    shutil.copy(train("first") / "checkpoints" / "last.pt", start)
    options = [*SMALL, "schedule=single", f"cache_dir={tmp_path}/cache", f"init_from={start}", "freeze=in_conv"]
    segkit.train(options, folder=tmp_path / "run")
    begun = (tmp_path / "run" / REPORT).read_text()
    start.unlink()
    (tmp_path / "run" / "train" / "results.json").unlink()
    assert segkit.train(options, folder=tmp_path / "run")["step"] == 2
    assert (tmp_path / "run" / REPORT).read_text() == begun
    with pytest.raises(InputError, match=r"init_from is .*start\.pt, but there is no such file"):
        segkit.train(options, folder=tmp_path / "another")


def test_a_run_of_other_classes_is_no_start(train):
    first = train("first")
    counts = json.loads((first / "label_counts.json").read_text())
    names = list(counts["classes"])
    swapped = {name: counts["classes"][name] for name in (names[1], names[0], *names[2:])}
    (first / "label_counts.json").resolve().write_text(json.dumps(counts | {"classes": swapped}))
    with pytest.raises(
        InputError, match=rf"other classes than the run of init_from=.*class 0 is '{names[0]}'.*last\.pt"
    ):
        train("second", f"init_from={first}")
    train("third", f"init_from={first}/checkpoints/last.pt")
    with pytest.raises(InputError, match=r"set head=reset to train the last layer anew$"):  # no file would fit
        check_origin(first, [*names, "another"])


def test_weights_of_another_model_are_refused(train):
    first = train("first")
    message = (
        r"holds the weights of another model \(0 entries missing, 0 unknown, \d+ of another shape; first: .*model="
    )
    with pytest.raises(InputError, match=message):
        train("second", f"init_from={first}", "model.feature_channels=[8,16,32,64,128]")
    with pytest.raises(InputError, match=r"init_from is .*nowhere.pt, but there is no such file"):
        train("third", f"init_from={first}/nowhere.pt")


def test_a_finished_run_is_not_repeated(train, capsys):
    folder = train("run", "schedule=pretrain_finetune")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".yaml"}
    capsys.readouterr()
    train("run", "schedule=pretrain_finetune")
    assert "phase pretrain: finished already" in capsys.readouterr().out
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"provenance.json"}  # the list of starts


def test_another_configuration_in_the_same_folder_is_refused(train):
    train("run")
    with pytest.raises(InputError, match=r"keys differ: seed \(0 there, 1 now\), optimizer.lr|optimizer.lr .*, seed"):
        train("run", "seed=1", "optimizer.lr=0.5")
    with pytest.raises(InputError, match=r"a run of another configuration; these keys differ: .*schedule\.train "):
        train("run", "schedule=pretrain_finetune")  # none of whose phases has begun
    with pytest.raises(InputError, match="holds a run already: set resume=true"):
        train("run", "resume=false")
    with pytest.raises(InputError, match=r"these keys cannot change within a run: seed \(0 there, 1 now\)"):
        train("run", "seed=1", "ignore_config_change=true")
    train("other", "workers=1")
    train("other", "workers=0", "checkpoint_every=1")  # these may change


def test_the_cache_gives_what_training_gives(train, capsys):
    phases = ("schedule=pretrain_finetune", "schedule.finetune.lr=0.01")
    first = train("first", *phases)
    other = train("other", *phases, "loss=dice")
    assert "phase pretrain: taken from the cache" in capsys.readouterr().out
    fresh = train("fresh", *phases, "loss=dice", f"cache_dir={first.parent}/cache2")
    assert "taken from the cache" not in capsys.readouterr().out
    assert equal(weights(other / "pretrain"), weights(first / "pretrain"))
    assert equal(weights(other), weights(fresh))
    assert not equal(weights(other), weights(first))
    for name in ("metrics.jsonl", "results.json"):
        assert (other / name).read_bytes() == (fresh / name).read_bytes()


def test_coarse_labels_then_fine_ones_then_the_loss(tmp_path):
    root = make_sample("cityscapes_coarse", tmp_path / "data", num_images=4, scale=0.05)
    small = [item for item in SMALL if not item.startswith(("dataset", "loss"))]
    config = compose(
        [
            *small,
            "dataset=cityscapes",
            "schedule=coarse_pretrain_finetune",
            *(f"{dataset}.root={root}" for dataset in ("dataset", "schedule.coarse.dataset")),
            *(f"{dataset}.crop=[32,32]" for dataset in ("dataset", "schedule.coarse.dataset")),
            f"cache_dir={tmp_path}/cache",
        ]
    )
    folder = tmp_path / "run"
    pipeline.run(config, folder, open_phases(config))
    phases = ("coarse", "pretrain", "finetune")
    assert [json.loads(line)["phase"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [
        phase for phase in phases for _ in range(2)
    ]
    counts = {phase: json.loads((folder / phase / "label_counts.json").read_text()) for phase in phases}
    assert counts["pretrain"] == counts["finetune"]
    assert counts["coarse"]["ignored_pixels"] > counts["pretrain"]["ignored_pixels"]
    results = {phase: json.loads((folder / phase / "results.json").read_text()) for phase in phases}
    assert results["coarse"]["training"]["loss"]["_target_"] == "segkit.losses.cross_entropy"
    assert results["finetune"]["training"]["loss"]["_target_"] == "segkit.losses.margin_calibration"
    assert results["coarse"]["protocol"]["dataset"] == "cityscapes_coarse"
    assert results["coarse"]["num_images"] == results["finetune"]["num_images"] == 2


@pytest.mark.parametrize(("overrides", "message"), [
    (["dataset.crop=[60000,60000]", "batch_size=1024"], r"a batch of 1024 crops of 60000x60000 takes at least"),
    (["dataset.eval_resize.short_side=1000000", "max_pixels=1000000000000"], r"an image of 1000000x1000000 takes"),
    (["optimizer.eps=0"], r"optimizer\.eps is 0, which as a number of 32 bits is 0\.0, so steps would give NaN"),
    (["~optimizer", "+optimizer={_target_:torch.optim.ASGD,lr:0.1,alpha:1e20}"], r"ASGD cannot compute a step"),
    (["+optimizer.maximize=true"], r"optimizer\.maximize is true, but a loss is to get small: leave it out"),
    (["schedule.train.lr=1e-320"], r"schedule\.train\.lr is 1e-320, which as .*: set another schedule\.train\.lr"),
    (["optimizer.weight_decay=1e300"], r"optimizer\.weight_decay is 1e\+300, which as a number of 32 bits is inf"),
    (["loss=margin_calibration", "loss.tau=1e300"], r"tau must be a finite number at least 0, got 1e\+300"),
    (["init_from=."], r"init_from is \., no run folder, as it has no checkpoints: give one, or a file of weights"),
    (["init_from=''"], r"init_from is empty: set init_from=PATH, or init_from=null"),
])  # fmt: skip
def test_what_would_fail_in_the_first_steps_is_refused_before_them(train, overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        train("run", *overrides)
    assert not (tmp_path / "run").exists()


def test_logits_that_are_not_finite_after_a_step_name_what_mends_it(train, tmp_path):
    """The loss of the step is finite, and the weights after it are too, but for the largest numbers of 32 bits."""
    message = r"after step 1 of phase train the logits of the model are not finite \(inf or nan\): lower optimizer\.lr "
    with pytest.raises(InputError, match=message + r"\(schedule\.train\.lr where that is set\)"):
        train("run", "optimizer.lr=1e30", "limit_steps=1")
    assert all(value.isfinite().all() for value in weights(tmp_path / "run" / "train").values())


def test_a_folder_that_is_deleted_while_it_trains_can_be_mended(train, monkeypatch):
    real = Validation.__call__

    def delete(self, model, step):
        shutil.rmtree(self.tracker.folder.parent)
        self.tracker.folder.mkdir(parents=True)
        return real(self, model, step)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "__call__", delete)
        with pytest.raises(InputError, match=r"run lost its config.yaml and provenance.json while it was trained in"):
            train("run")
    folder = train("run")
    assert open_run(folder).config.batch_size == 2


def test_curves_are_closed_where_a_run_ends_before_its_first_step(train, monkeypatch):
    def broken(batches, num):
        raise InputError("an image is broken")

    closed = []
    monkeypatch.setattr(PhaseBatches, "first_crops", broken)
    monkeypatch.setattr(TensorBoard, "close", lambda sink: closed.append(sink))
    with pytest.raises(InputError, match="an image is broken"):
        train("run")
    assert len(closed) == 1


def test_a_class_without_training_pixels_is_said(train, capsys):
    train("run", "dataset.reader.num_images=2", "limit_steps=1")
    assert "warning: no training pixel of phase train is of class sign: mend the label" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variable", "named"), [(None, r"[\w+]+"), ("", "the empty CXX"), ("/no/g++ -O1", r"/no/g\+\+ -O1")]
)
def test_compile_without_a_compiler_is_refused(train, tmp_path, monkeypatch, variable, named):
    """Another than that in CXX does not help: torch does not look for it."""
    if variable is None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", variable)
    with pytest.raises(
        InputError, match=rf"compile=true needs a compiler of C\+\+, but {named} is not in PATH: install"
    ):
        train("run", "compile=true")
    assert not (tmp_path / "run").exists()


def test_profile_writes_a_table_and_a_trace(train, capsys):
    folder = train("run", "debug=profile", "profile_steps=2", "limit_steps=4", "batch_size=4", "accumulate=2")
    printed = capsys.readouterr().out
    assert "median of 2 steps" in printed
    for part in ("waiting for data", "moving data", "forward", "loss", "backward", "optimizer"):
        assert part in printed
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "backward" and event.get("ph") == "X" for event in events) == 4  # 2 parts a step
    with pytest.raises(InputError, match="profile_steps is 2, and 2 more warm up, but phase train has only 3 steps"):
        train("short", "debug=profile", "profile_steps=2", "limit_steps=3")
    assert not (folder.parent / "short").exists(), "refused before the run was recorded"


def test_an_unwritable_cache_is_named_before_anything_else(train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache_dir is .*file/cache, where nothing can be written"):
        train("run", f"cache_dir={tmp_path}/file/cache")
    assert not (tmp_path / "run").exists()


def test_the_running_iou_starts_from_the_phase_before(train):
    folder = train("a", "schedule=pretrain_finetune", "loss=iou_margin", "limit_steps=1")
    (running,) = checkpoint.load(folder / "checkpoints" / "last.pt")["loss"].values()
    confusion = PerImageCounts.load(folder / "pretrain" / "per_image.npz").total()
    hits, union = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    start = torch.tensor([[0.125] * 8, [0.125] * 8]).double()
    start[:, union > 0] = torch.from_numpy(np.stack([hits, union])[:, union > 0] / confusion.sum())
    assert float((running - start).abs().max()) <= 0.02  # one step moves it by 2 % of a share
    assert float((running - 0.125).abs().max()) > 0.05


@pytest.mark.parametrize("number", pipeline.STOP_SIGNALS)
def test_a_signal_that_comes_by_two_ways_is_one_request_and_a_later_one_acts(monkeypatch, request, number):
    came = []
    before = signal.signal(number, lambda *_: came.append(number))
    request.addfinalizer(lambda: signal.signal(number, before))
    with pipeline._stopping(None) as asked:
        assert not asked()
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert asked()
        assert not came
        monkeypatch.setattr(pipeline, "SAME_SIGNAL", -1)
        signal.raise_signal(number)
        assert came == [number]
