"""Any architecture and encoder by name; DeepLabV3+; where encoder weights come from."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segkit.config.compose import compose
from segkit.errors import InputError
from segkit.models import deeplabv3plus, smp_model
from segkit.models import weights as encoder_weights
from segkit.run.splits import check_hub

SMALL = "tu-regnetx_002"


def test_import_is_light() -> None:
    """The names are there without the libraries behind them, whose import takes seconds."""
    code = "import sys, segkit.models; print([m for m in ('timm', 'segmentation_models_pytorch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(("output_stride", "encoder"), [(8, "resnet18"), (16, "resnet18"), (8, SMALL), (16, SMALL)])
def test_deeplabv3plus_strides(output_stride: int, encoder: str) -> None:
    net = deeplabv3plus(encoder, 5, output_stride=output_stride, encoder_weights="none", decoder_channels=16).eval()
    with torch.no_grad():
        assert net.encoder(torch.zeros(1, 3, 64, 96))[-1].shape[-2:] == (64 // output_stride, 96 // output_stride)
        assert net(torch.zeros(1, 3, 64, 96)).shape == (1, 5, 16, 24)
        assert net(torch.zeros(1, 3, 61, 91)).shape == (1, 5, 16, 23)


def test_logits_of_odd_sizes_are_those_of_the_padded_image() -> None:
    """Multiples of the decoder's stride that are none of the encoder's: exactly the padded image's logits, cropped."""
    net = deeplabv3plus(SMALL, 4, encoder_weights="none", output_stride=16, decoder_channels=16).eval()
    images = torch.randn(1, 3, 72, 88)
    with torch.no_grad():
        expected = net(F.pad(images, (0, 8, 0, 8)))[..., :18, :22]
        torch.testing.assert_close(net(images), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "arch", ["Unet", "linknet", "FPN", "PSPNet", "DeepLabV3", "Segformer", "MAnet", "PAN", "UPerNet", "UnetPlusPlus"]
)
def test_architectures(arch: str) -> None:
    net = smp_model(arch, "resnet18", 3, encoder_weights="none").eval()
    with torch.no_grad():
        height, width = net(torch.zeros(1, 3, 64, 96)).shape[-2:]
        odd = net(torch.zeros(1, 3, 51, 83)).shape[-2:]
    stride = 64 // height
    assert (height * stride, width * stride) == (64, 96)
    assert odd == (-(-51 // stride), -(-83 // stride))


def test_options_reach_the_architecture() -> None:
    net = smp_model("FPN", "resnet18", 3, encoder_weights="none", options={"decoder_segmentation_channels": 32})
    assert net.segmentation_head[0].in_channels == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Unett", "resnet18"), r"model\.arch is 'Unett', but .* no such architecture \(nearest: Unet, .*all: Unet, "),
        (("Unet", "resnet81"), r"model\.encoder is 'resnet81', .* no such encoder \(nearest: resnet18"),
        (("Unet", "tu-regnetx_02"), r"model\.encoder is 'tu-regnetx_02', .*\(nearest: tu-regnetx_0"),
        (
            ("Unet", "tu-regnetx_002.v9"),
            r"no weights 'v9' of regnetx_002, only pycls_in1k: set model\.enc.*=tu-regnetx_002$",
        ),
        (("Unet", "regnetx_002"), r"a name of timm: write it with its prefix, model\.encoder=tu-regnetx_002"),
        (
            ("DeepLabV3", "vgg11"),
            r"DeepLabV3 cannot be built on the encoder vgg11 \('VGG' models do not support dil.*choose",
        ),
        (("Unet", "timm-efficientnet-b0"), r"cannot be built on the encoder timm-efficientnet-b0 \(.*deprecated"),
    ],
)
def test_bad_names(arguments: tuple[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        smp_model(*arguments, 3, encoder_weights="none")


@pytest.mark.parametrize("key", ["decoder_chanels", "upsampling", "classes"])
def test_unknown_option(key: str) -> None:
    with pytest.raises(InputError, match=rf"model\.options\.{key} is not an option of FPN, which has encoder_depth"):
        smp_model("FPN", "resnet18", 3, encoder_weights="none", options={key: 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_stride": 32}, r"model\.output_stride is 32, but DeepLabV3\+ has 8 or 16"),
        ({"atrous_rates": (6, 12)}, r"model\.atrous_rates is \[6, 12\], but the pyramid has three branches"),
        ({"mean": (0.5,)}, r"model\.mean is \[0\.5\]"),
        ({"dropout": 7.0}, r"model\.dropout is 7\.0, but is a share from 0 to 1: set model\.dropout=0\.5"),
        ({"decoder_channels": 10**6}, r"model\.decoder_channels is 1000000, but must be from 1 to 16384"),
    ],
)
def test_bad_arguments_of_deeplabv3plus(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        deeplabv3plus("resnet18", 3, encoder_weights="none", **changes)


def test_whole_weights(tmp_path: Path) -> None:
    """The weights of a whole model load, and the encoder's own are not looked for."""
    source = deeplabv3plus(SMALL, 3, encoder_weights="none", decoder_channels=16)
    torch.save({"model": source.state_dict()}, tmp_path / "best.pt")
    net = deeplabv3plus(SMALL, 3, weights=tmp_path / "best.pt", decoder_channels=16)
    for key, value in net.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])
    with pytest.raises(InputError, match=r"weights are of another model: 2 of another shape \(segmentation_head"):
        deeplabv3plus(SMALL, 4, weights=tmp_path / "best.pt", decoder_channels=16)


@pytest.mark.parametrize("encoder", ["resnet18", SMALL])
@pytest.mark.parametrize("kind", ["encoder", "whole model", "with a classifier"])
def test_encoder_weights_from_a_file(tmp_path: Path, encoder: str, kind: str) -> None:
    source = deeplabv3plus(encoder, 3, encoder_weights="none", decoder_channels=16)
    state = source.encoder.state_dict()
    if kind == "whole model":
        state = source.state_dict()
    elif kind == "with a classifier":  # as timm and torchvision store it: without SMP's own name in front
        state = {key.removeprefix("model."): value for key, value in state.items()}
        state["fc.weight"] = torch.zeros(10, 4)
    torch.save(state, tmp_path / "encoder.pt")
    net = deeplabv3plus(encoder, 7, encoder_weights=tmp_path / "encoder.pt", decoder_channels=16)
    for key, value in net.encoder.state_dict().items():
        assert torch.equal(value, source.encoder.state_dict()[key]), key


def test_encoder_weights_of_another_encoder(tmp_path: Path) -> None:
    source = deeplabv3plus(SMALL, 3, encoder_weights="none", decoder_channels=16)
    torch.save(source.encoder.state_dict(), tmp_path / "encoder.pt")
    message = r"model\.encoder_weights: .*encoder\.pt does not fit the encoder: \d+ missing \(conv1\.weight, "
    with pytest.raises(InputError, match=message):
        deeplabv3plus("resnet18", 3, encoder_weights=tmp_path / "encoder.pt")


@pytest.mark.parametrize(("encoder", "repository"), [("resnet18", "smp-hub/resnet18"), (SMALL, "timm/regnetx_002")])
def test_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoder: str, repository: str) -> None:
    """Without a connection: one sentence, at once."""
    import huggingface_hub

    def no_connection(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr("urllib.request.urlopen", no_connection)
    message = (
        rf"ImageNet weights of the encoder {encoder} are not in the cache .* download from .*{re.escape(repository)}.* "
        r"failed \(no route to host\).*model\.encoder_weights=none .*model\.encoder_weights=PATH"
    )
    begin = time.perf_counter()
    with pytest.raises(InputError, match=message) as caught:
        deeplabv3plus(encoder, 3)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - begin < 20


@pytest.mark.parametrize(
    ("overrides", "cached", "refused"),
    [
        (["model=smp"], False, True),
        (["model=smp"], True, False),  # perhaps this one: looked for when the model is built
        (["model=smp", "model.weights=whole.pt"], False, False),
        (["model=smp", "model.encoder_weights=none"], False, False),
        (["model=deeplabv3plus_lite"], False, False),
        (["model=coplenet"], False, False),
    ],
)
def test_the_hub_is_asked_early_only_for_weights_that_are_wanted(monkeypatch, tmp_path, overrides, cached, refused):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if cached:
        (tmp_path / "models--owner--name").mkdir()
    message = r"encoder resnet34 are not in the cache .* failed \(the hub is set to offline\): connect once"
    with pytest.raises(InputError, match=message) if refused else contextlib.nullcontext():
        check_hub(compose(overrides))


def test_failing_download(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def gone(*_: object, **__: object) -> None:
        raise RuntimeError("404 Client Error\nmore lines")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", gone)
    monkeypatch.setattr(encoder_weights, "unreachable", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=r"failed \(404 Client Error\): connect once"):
        deeplabv3plus("resnet18", 3)


@pytest.mark.parametrize("encoder", ["resnet18", "tu-regnetx_002", "tu-resnet18"])
def test_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoder: str) -> None:
    """A file of the hub's form (the classifier included, timm's own names) ends up in the encoder."""
    from safetensors.torch import save_file

    if encoder.startswith("tu-"):
        import timm

        torch.manual_seed(3)
        stored = timm.create_model(encoder.removeprefix("tu-"), pretrained=False).state_dict()
        first = next(iter(stored))
    else:
        stored = smp_model("FPN", encoder, 2, encoder_weights="none").encoder.state_dict()
        stored |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
        first = "conv1.weight"
    path = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in stored.items()}, path)
    monkeypatch.setattr(encoder_weights, "_fetch", lambda *_, **__: str(path))
    net = deeplabv3plus(encoder, 2, decoder_channels=16, output_stride=16)
    assert torch.equal(next(iter(net.encoder.parameters())), stored[first])
    values = {value.sum().item() for value in stored.values() if value.dim() == 4}
    ours = [value.sum().item() for value in net.encoder.state_dict().values() if value.dim() == 4]
    assert len(ours) > 10
    assert set(ours) <= values


def test_encoder_without_imagenet_weights() -> None:
    with pytest.raises(InputError, match=r"has no such weights"):
        encoder_weights.load_encoder_weights(nn.Identity(), "tu-resnet10_nothing", "imagenet")
