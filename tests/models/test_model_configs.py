"""Every YAML of the group ``model``: complete, and a network comes of it."""

from __future__ import annotations

import inspect

import pytest
import torch
import yaml

from segkit.config.compose import config_dir
from segkit.config.targets import instantiate, locate
from segkit.runtime import without_memory

FACTS = {"num_classes": 7, "in_channels": 3}
FILES = sorted(config_dir().glob("model/**/*.yaml"))
STRIDES = {"coplenet": 1, "dpt_dinov3": 1} | dict.fromkeys(
    ("smp", "deeplabv3plus", "deeplabv3plus_lite", "deeplabv3plus_tiny", "segformer"), 4
)


def test_the_group() -> None:
    assert {path.stem for path in FILES} == set(STRIDES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_lists_all_arguments(path) -> None:
    """Hydra refuses a misspelt key only where the file names every right one; the data set gives the facts."""
    node = yaml.safe_load(path.read_text(encoding="utf-8"))
    parameters = set(inspect.signature(locate(node.pop("_target_"), key="model")).parameters)
    assert set(node) == parameters - {"num_classes", "in_channels"}
    assert node.get("mean") is node.get("std") is None, "model.encoder=... would keep the values of another encoder"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_builds(path) -> None:
    node = yaml.safe_load(path.read_text(encoding="utf-8"))
    if node.get("encoder_weights") == "imagenet" and path.stem != "deeplabv3plus_lite":
        node["encoder_weights"] = "none"  # no download in a test
    net = instantiate(node, FACTS, key="model").eval()
    with torch.no_grad():
        logits = net(torch.zeros(1, 3, 64, 96))
    stride = STRIDES[path.stem]
    assert logits.shape == (1, 7, 64 // stride, 96 // stride)
    assert len(net.input_mean) == len(net.input_std) == 3
    node |= dict.fromkeys(node.keys() & {"encoder_weights"}, "none")
    with without_memory():  # as a saved run is opened first
        outline = instantiate(node, FACTS, key="model").state_dict()
    assert {name: value.shape for name, value in outline.items()} == {
        name: value.shape for name, value in net.state_dict().items()
    }
    assert all(value.is_meta for name, value in outline.items() if value.dim() > 1)
