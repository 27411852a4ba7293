"""A stranger's run folders: none acts, and each gets one sentence from every verb that reads it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import CORPUS
from corpus_cases import COMPARE, DECISION, HUB, MODEL, REPLAY

import segkit
from segkit.commands import compare as compare_verb
from segkit.commands import decision, export, replay
from segkit.config.compose import compose
from segkit.errors import InputError
from segkit.files import digest_of
from segkit.guard import explain
from segkit.report.card import card
from segkit.run import pipeline
from segkit.run.saved import open_run
from segkit.run.splits import open_phases

pytestmark = [
    pytest.mark.filterwarnings("ignore:very few training pixels:UserWarning"),  # of the few images of the whole run
    pytest.mark.filterwarnings("ignore:no training pixel:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]

SECRET = "an-environment-value"
TRACE = Path("/tmp/segkit-hostile-file")
"""What the acting members of the corpus would write."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run folder with everything that a run can have."""
    folder = tmp_path_factory.mktemp("whole")
    config = compose(
        [
            "schedule=single",
            "schedule.train.epochs=null",
            "schedule.train.steps=2",
            "dataset.crop=[32,32]",
            "dataset.reader.num_images=4",
            "dataset.reader.size=[64,64]",
            "batch_size=2",
            "loss=margin_calibration",
            "loss.rho_max=100",
            "evaluation.every_epochs=null",
            "evaluation.pictures=2",
            "workers=0",
            "device=cpu",
            "log_every=1",
            "model=coplenet",
            "model.feature_channels=[4,8,16,32,64]",
            "model.num_groups=2",
            f"cache_dir={folder}/cache",
        ]
    )
    pipeline.run(config, folder / "run", open_phases(config))
    run = open_run(folder / "run")
    bias = dict.fromkeys(run.label_counts()["classes"], 0.5)
    content = {
        "digest": digest_of(run.checkpoint()),
        "classes": list(bias),
        "fitted_on": {"dataset": "synthetic", "split": "train", "holdout": 0.0, "num_images": 0, "images": {}},
        "bias": {"bias": bias},
        "miou": {"rule": {}},
    }
    (folder / "run" / decision.FILE).write_text(json.dumps(content | {"sha256": decision.checksum(content)}))
    failed = {"phase": "train", "step": 1, "rank": 0, "error": "x", "names": ["a"], "findings": None}
    (folder / "run" / "bundle").mkdir()
    (folder / "run" / "bundle" / "error.json").write_text(json.dumps(failed))
    batch = {"images": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "names": ["a", "b"], "indices": [0, 1]}
    torch.save({**batch, "labels": torch.ones(2, 32, 32, dtype=torch.uint8)}, folder / "run" / "bundle" / "batch.pt")
    export.run([str(folder / "run"), "--format", "hub", "--root", str(folder / "nowhere")])
    return folder / "run"


@pytest.fixture(autouse=True)
def _nothing_acts(monkeypatch):
    """No network, no file of the corpus, and a value in the environment that must not come out."""
    monkeypatch.setenv("SECRET", SECRET)
    TRACE.unlink(missing_ok=True)

    def connect(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "create_connection", connect)
    yield
    assert not TRACE.exists()


def load_model(run: Path, output: Path) -> None:
    saved = open_run(run)
    saved.model()
    saved.label_counts()


def read_decision(run: Path, output: Path) -> None:
    saved = open_run(run)
    decision.decision_of(saved, "bias", checkpoint="last", digest=digest_of(saved.checkpoint()))


def compare(run: Path, output: Path) -> None:
    compare_verb.run([str(run), "--output", str(output), "--samples", "100"])


def replay_bundle(run: Path, output: Path) -> None:
    """Of a folder beside the run, which is made of it: config.json may be YAML as well."""
    bundle = output.parent.parent / f"{output.parent.name}-bundle"
    shutil.copytree(run / "bundle", bundle)
    for name, copy in {"config.yaml": "config.json", "checkpoints/last.pt": "state.pt"}.items():
        if (run / name).is_file():
            shutil.copy(run / name, bundle / copy)
    (bundle / "label_counts.json").symlink_to((run / "label_counts.json").resolve())
    replay.run([str(bundle), "--json", "--device", "cpu"])


def use_export(run: Path, output: Path) -> None:
    segkit.predict([np.zeros((40, 50, 3), np.uint8)], run / "hub", device="cpu")


READERS = {
    MODEL: load_model,
    DECISION: read_decision,
    COMPARE: compare,
    REPLAY: replay_bundle,
    HUB: use_export,
}


def listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("case", CORPUS, ids=[case.name for case in CORPUS])
def test_a_strangers_folder_gets_one_sentence(whole, tmp_path, monkeypatch, capsys, case):
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    case.harm(run)
    monkeypatch.chdir(tmp_path)
    before = listed(tmp_path)
    for reader in case.readers:
        message = case.message if reader != REPLAY else re.sub(r"config\\?\.yaml", "config", case.message)
        with pytest.raises(InputError, match=message) as caught:
            READERS[reader](run, tmp_path / "report.html")
        sentence, code = explain(caught.value)
        assert code == 2
        assert sentence == str(caught.value)
        assert 20 < len(sentence) < 2000
        assert len(sentence.splitlines()) == 1
        for word in (SECRET, "weights_only", "Traceback", "allow_pickle"):
            assert word not in sentence
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    assert listed(tmp_path) == before  # nothing is written, not even the report


def test_the_whole_folder_passes_every_reader(whole, tmp_path, capsys):
    """Else the corpus would be refused for a reason of its own. Figures for the record are printed."""
    for reader in READERS.values():
        reader(whole, tmp_path / "report.html")
    assert (tmp_path / "report.html").is_file()
    assert len(CORPUS) >= 40
    assert len({case.name for case in CORPUS}) == len(CORPUS)
    with capsys.disabled():
        print(f"\nhostile corpus: {len(CORPUS)} members, {sum(len(case.readers) for case in CORPUS)} readings")


def test_a_card_shows_the_names_of_a_stranger_as_they_are_written(whole, tmp_path):
    """ANSI codes, Markdown, HTML and a formula of YAML in class and data set names: escaped, and nothing else."""
    facts = json.loads((whole / "hub" / "config.json").read_text())
    plain = card(facts)
    names = ["\x1b[2Jroad", "<script>alert(1)</script>", "[x](http://example.org)", "a|b\n# c", "`${oc.env:SECRET}`"]
    facts["classes"][: len(names)] = names
    facts["dataset"] = "---\n{{ 7 * 7 }} <img src=x>"
    text = card(facts)
    assert len(text.splitlines()) == len(plain.splitlines())  # no name begins a line, a row or a section of its own
    for harm in ("\x1b", "<script", "<img", "[x](", "`$", "49", SECRET):
        assert harm not in text
    assert r"\\x1b\[2Jroad" in text
    assert r"a\|b\\n\# c" in text


def test_weights_that_are_not_finite_are_said_once(whole, tmp_path):
    import torch

    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    path = run / "checkpoints" / "last.pt"
    state = torch.load(path, weights_only=True)
    names = list(state["model"])[:2]
    for name in names:
        state["model"][name].fill_(float("nan"))
    torch.save(state, path)
    (run / "checkpoints" / "checksums.json").unlink()
    with pytest.warns(
        UserWarning, match=rf"last\.pt has values that are not finite in 2 of .* first {names[0]}"
    ) as said:
        open_run(run).model()
    assert len(said) == 1


def test_weights_of_a_stranger(tmp_path):
    """``model.weights=`` of a foreign file: no advice to load whatever it holds, no archive that fills the memory."""
    import pickle

    import torch
    from corpus_cases import Code, bomb

    from segkit.models.weights import read_state

    for name, content, message in (
        ("code.pt", pickle.dumps({"a": Code()}), "cannot be read as weights"),
        ("bomb.pt", bomb("archive/data.pkl"), "but says that it holds"),
        ("text.pt", b"text", "cannot be read as weights"),
        ("text.safetensors", b"text", "cannot be read as weights"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            read_state(tmp_path / name, key="model.weights")
        assert "weights_only" not in str(caught.value)
        assert "trust" not in str(caught.value)
    value = torch.zeros(2, 2)
    for odd in (value.to("meta"), value.to(torch.complex64), value.to(torch.float8_e5m2)):
        torch.save({"a": value, "b": odd}, tmp_path / "odd.pt")
        with pytest.raises(InputError, match=r"whose b is no dense tensor of real numbers"):
            read_state(tmp_path / "odd.pt", key="model.weights")
    torch.save({"a": Code()}, tmp_path / "archive.pt")
    with pytest.raises(InputError, match="holds more than tensors") as caught:
        read_state(tmp_path / "archive.pt", key="model.weights")
    assert "weights_only" not in str(caught.value)


def test_graphs_of_a_stranger(tmp_path):
    """An ONNX file whose weights lie elsewhere, and one with an operator that there is not."""
    from onnx import TensorProto, helper, save

    from segkit.models.exported import runner

    value = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    elsewhere = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    elsewhere.external_data.add(key="location", value="/etc/passwd")
    path = tmp_path / "model.onnx"
    for node, tensors in (
        (helper.make_node("Add", ["images", "w"], ["y"]), [elsewhere]),
        (helper.make_node("Relu", ["images"], ["y"], domain="evil"), []),
    ):
        graph = helper.make_graph([node], "g", [value], [out], tensors)
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
        with pytest.raises(InputError, match=r"model\.onnx cannot be loaded \(") as caught:
            runner(path)
        assert len(str(caught.value).splitlines()) == 1


def test_a_link_beside_a_file_of_the_run_is_not_followed(tmp_path):
    from segkit.files import write_json

    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "results.json.tmp").symlink_to(victim)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_json(tmp_path / "results.json", {"a": 1})
    assert victim.read_text() == "mine"
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 1}
