"""A run on five bands of 16 bits, taken along in each format: `predict` gives its classes from each file."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from segkit.commands import export, predict
from segkit.config.compose import compose
from segkit.run import pipeline
from segkit.run.splits import open_phases

SIZE = (41, 53)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    for split, number in (("train", 4), ("val", 2)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for name in range(number):
            label = rng.integers(0, 2, SIZE, np.uint8)
            image = rng.integers(0, 20000, (*SIZE, 5)) + 40000 * label[..., None].astype(int)
            pages = imagecodecs.tiff_encode(image.astype(np.uint16).transpose(2, 0, 1))
            (folder / "images" / split / f"{name}.tif").write_bytes(pages)
            Image.fromarray(label).save(folder / "labels" / split / f"{name}.png")
    (folder / "classes.yaml").write_text("names: [ground, tool]\n")
    keys = "dataset=folder", "dataset.in_channels=5", "dataset.dtype=uint16", "dataset.color_jitter=0"
    keys += "dataset.mean=[0.4,0.4,0.4,0.4,0.4]", "dataset.std=[0.3,0.3,0.3,0.3,0.3]", "dataset.crop=[32,32]"
    keys += "model=coplenet", "model.feature_channels=[4,8,16,32,64]", "model.num_groups=2", "loss=cross_entropy"
    keys += "workers=0", "batch_size=2", "limit_steps=12", "device=cpu", "precision=fp32", "optimizer.lr=3e-3"
    config = compose([*keys, f"dataset.root={folder}", f"cache_dir={folder}/cache"])
    pipeline.run(config, folder / "run", open_phases(config))
    return folder / "run"


def predicted(model, output, run, *options):
    with pytest.raises(SystemExit, match=r"^0$"):
        predict.run([str(model), "--input", f"{run.parent}/images/val", "--output", str(output), *options])
    return np.stack([np.array(Image.open(path)) for path in sorted((output / "labels").glob("*.png"))])


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["model.onnx", "classes.pt2", "model.safetensors", "hub"])
def test_a_file_gives_the_classes_of_the_run(run, tmp_path, name, capsys):
    formats = {"onnx": "onnx", "pt2": "torch_export", "safetensors": "safetensors", "hub": "hub"}
    options = ["--classes"] if name.startswith("classes") else []
    own = predicted(run, tmp_path / "own", run, "--device", "cpu")
    assert own.shape == (2, *SIZE)
    assert set(np.unique(own)) == {0, 1}
    export.run([str(run), "--format", formats[name.split(".")[-1]], "--output", str(tmp_path / name), *options])
    assert "100.000 % of the pixels" in capsys.readouterr().out
    options = ["--trust", "torch_export"] if name.endswith("pt2") else []
    found = predicted(tmp_path / name, tmp_path / "out", run, "--device", "cpu", *options)
    assert (found == own).mean() > 0.999
    if name == "hub":
        assert "5 channels of uint16" in (tmp_path / name / "README.md").read_text()
