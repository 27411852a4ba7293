"""Windows, flips and scales: exact where a model allows it, and equal to a plain full-size implementation."""

from __future__ import annotations

import json
import math
import weakref
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from segkit.errors import InputError
from segkit.evaluation import Inference, views, whole_image
from segkit.evaluation import views as resample
from segkit.evaluation.inference import ADE20K_SCALES
from segkit.evaluation.views import starts


def random_images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(shape[0], 3, shape[1] // 4 + 1, shape[2] // 4 + 1, generator=generator) * 255
    return F.interpolate(coarse, size=shape[1:], mode="bicubic").clamp(0, 255).round().to(torch.uint8)


class Patches(nn.Module):
    """Logits at ``stride`` from patches of stride x stride pixels that do not overlap: no context."""

    def __init__(self, num_classes=5, stride=1, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, num_classes, stride, stride)

    def forward(self, images):
        return 8 * self.conv(images.to(self.conv.weight.dtype) / 255 - 0.5)


class Context(nn.Module):
    """Logits at stride 8 that depend on a neighbourhood, on its borders and on left and right."""

    def __init__(self, num_classes=4, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(3, 8, 5, stride=4, padding=2)
        self.second = nn.Conv2d(8, num_classes, 5, stride=2, padding=2)

    def forward(self, images):
        hidden = self.first(images.to(self.first.weight.dtype) / 255 - 0.5)
        return 10 * self.second(hidden.relu())


def probabilities(inference, model, images, size):
    with torch.no_grad():
        return torch.cat([band for _, band in inference.probabilities(model, images, size)], dim=2)


def predictions(predict, model, images, size):
    with torch.no_grad():
        return predict(model, images, size)


@pytest.mark.parametrize("stride", [1, 8])
@pytest.mark.parametrize("blending", ["gaussian", "uniform"])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.75])
def test_windows_equal_the_whole_image_for_a_model_without_context(stride, blending, overlap):
    model = Patches(stride=stride).double()
    images = random_images(2, 160, 224)
    sliding = Inference(window=(64, 96), overlap=overlap, blending=blending, tiles_per_batch=3)
    expected = probabilities(Inference(), model, images, (160, 224))
    torch.testing.assert_close(probabilities(sliding, model, images, (160, 224)), expected)
    whole = predictions(whole_image, model, images, (160, 224))
    slid = predictions(sliding, model, images, (160, 224))
    assert (whole == slid).float().mean() > 0.9999
    assert torch.equal(expected.argmax(1), whole.long())


def test_windows_equal_the_whole_image_of_any_size_for_a_1x1_model():
    model = Patches()
    for size in ((100, 90), (31, 97), (20, 20), (65, 33)):
        images = random_images(1, *size)
        expected = probabilities(Inference(), model, images, size)
        slid = probabilities(Inference(window=(32, 64)), model, images, size)
        torch.testing.assert_close(slid, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, (64, 64)])
def test_flip_of_a_flip_equivariant_model_equals_plain(window):
    model = Patches()
    images = random_images(2, 100, 90)
    plain = Inference(window=window)
    flipped = Inference(window=window, flip=True)
    expected = probabilities(plain, model, images, (100, 90))
    torch.testing.assert_close(probabilities(flipped, model, images, (100, 90)), expected, rtol=1e-2, atol=3e-4)


def test_flip_averages_the_two_orientations():
    model = Context()
    images = random_images(1, 64, 96)
    with torch.no_grad():
        straight = F.interpolate(model(images), size=(64, 96), mode="bilinear").softmax(1)
        mirrored = F.interpolate(model(images.flip(-1)), size=(64, 96), mode="bilinear").softmax(1).flip(-1)
    assert (straight - mirrored).abs().max() > 0.1
    averaged = probabilities(Inference(flip=True), model, images, (64, 96))
    torch.testing.assert_close(averaged, (straight + mirrored) / 2)


def plain_protocol(model, images, size, *, window, overlap, gaussian, flip, scales, multiple=32):
    """The same protocol with every map at full size, in float64 after the model."""
    total, num_views = 0, 0
    for scale in scales:
        scaled = [round(side * scale) for side in images.shape[-2:]]
        padded = [-(-side // multiple) * multiple for side in scaled]
        for mirror in (False, True) if flip else (False,):
            source = images.flip(-1) if mirror else images
            source = F.interpolate(source.float(), size=scaled, mode="bilinear").round()
            source = F.pad(source, (0, padded[1] - scaled[1], 0, padded[0] - scaled[0]), mode="replicate")
            tile = [min(window[axis], padded[axis]) for axis in (0, 1)]
            logits, weights = 0, 0
            for top in starts(padded[0], tile[0], overlap=overlap, multiple=multiple):
                for left in starts(padded[1], tile[1], overlap=overlap, multiple=multiple):
                    part = model(source[..., top : top + tile[0], left : left + tile[1]]).double()
                    y, x = (
                        ((torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5) * 8 * gaussian for n in part.shape[-2:]
                    )
                    weight = torch.exp(-0.5 * (y[:, None] ** 2 + x[None, :] ** 2))
                    stride = tile[0] // part.shape[2]
                    low = [side // stride for side in padded]
                    place = (
                        left // stride,
                        low[1] - (left + tile[1]) // stride,
                        top // stride,
                        low[0] - (top + tile[0]) // stride,
                    )
                    logits = logits + F.pad(part * weight, place)
                    weights = weights + F.pad(weight, place)
            blended = logits / weights
            # Value of the map at the centre of every label pixel, by two bilinear weights each way.
            full = interpolate_at(blended, [side / stride for side in scaled], size)
            total = total + (full.flip(-1) if mirror else full).softmax(1)
            num_views += 1
    return total / num_views


def interpolate_at(maps, extent, size):
    for axis in (2, 3):
        n, length = maps.shape[axis], size[axis - 2]
        position = ((torch.arange(length) + 0.5).double() * extent[axis - 2] / length - 0.5).clamp(0, n - 1)
        hat = (1 - (position[:, None] - torch.arange(n)[None, :]).abs()).clamp(min=0)
        maps = torch.einsum("yh,nkhw->nkyw" if axis == 2 else "yw,nkhw->nkhy", hat, maps)
    return maps


@pytest.mark.parametrize(
    ("image_size", "size", "options"),
    [
        ((96, 160), (96, 160), {"scales": (1.0,), "flip": False}),
        ((96, 160), (96, 160), {"scales": (0.5, 1.0, 1.75), "flip": True}),
        ((75, 131), (150, 200), {"scales": (0.75, 1.25), "flip": True}),
        ((40, 131), (40, 131), {"scales": (0.5, 1.5), "flip": True, "overlap": 0.25, "blending": "uniform"}),
        ((230, 40), (230, 40), {"scales": (0.5, 1.0), "flip": True, "overlap": 0.75}),
        ((230, 40), (31, 77), {"scales": (1.0, 1.5), "flip": True, "overlap": 0.0}),
    ],
)
@pytest.mark.parametrize("band_elements", [1, 4000, 1 << 22])
@pytest.mark.parametrize("halved", [False, True])
def test_windows_flips_and_scales_equal_the_plain_protocol(
    image_size, size, options, band_elements, halved, monkeypatch
):
    monkeypatch.setattr(resample, "BAND_ELEMENTS", band_elements)
    monkeypatch.setattr(views, "worth_halving", lambda *_, **__: halved)
    model = Context()
    images = random_images(2, *image_size)
    inference = Inference(window=(64, 96), tiles_per_batch=2, **options)
    with torch.no_grad():
        expected = plain_protocol(
            model,
            images,
            size,
            window=(64, 96),
            overlap=inference.overlap,
            gaussian=inference.blending == "gaussian",
            flip=inference.flip,
            scales=inference.scales,
        )
    found = probabilities(inference, model, images, size)
    torch.testing.assert_close(found, expected.float(), rtol=5e-3 if halved else 1e-3, atol=1e-4)
    best = predictions(inference, model, images, size).long()
    top = expected.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 2e-3
    assert clear.float().mean() > 0.95
    assert torch.equal(best[clear], expected.argmax(1)[clear])


def test_maps_at_stride_1_are_summed_up_and_give_the_same():
    model = Patches(stride=1)
    images = random_images(1, 64, 96)
    inference = Inference(scales=(0.5, 1.0, 1.3, 1.7, 2.0), flip=True)
    expected = plain_protocol(
        model, images, (64, 96), window=(999936, 999936), overlap=0, gaussian=False, flip=True, scales=inference.scales
    )
    found = probabilities(inference, model, images, (64, 96))
    torch.testing.assert_close(found, expected.float().detach(), rtol=2e-3, atol=1e-3)


def test_a_single_scale_other_than_1_without_a_window():
    model = Context()
    images = random_images(1, 70, 90)
    expected = plain_protocol(
        model, images, (70, 90), window=(9984, 9984), overlap=0, gaussian=False, flip=False, scales=(1.3,)
    )
    found = probabilities(Inference(scales=(1.3,)), model, images, (70, 90))
    torch.testing.assert_close(found, expected.float().detach(), rtol=1e-3, atol=1e-4)


def test_more_than_256_classes():
    model = Patches(num_classes=300)
    with torch.no_grad():
        model.conv.bias[280] += 100
    found = predictions(Inference(), model, random_images(1, 32, 32), (32, 32))
    assert found.unique().tolist() == [280]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_starts_cover_the_axis_with_the_overlap(overlap):
    for length in range(64, 1000, 32):
        found = starts(length, 64, overlap=overlap, multiple=32)
        assert found[0] == 0
        assert found[-1] == length - 64
        steps = [b - a for a, b in pairwise(found)]
        assert all(0 < step <= max(32, 64 * (1 - overlap)) for step in steps), (length, found)
        assert all(start % 32 == 0 for start in found)


def test_settings_describe_themselves_and_are_checked():
    described = Inference(window=(512, 1024), flip=True, scales=ADE20K_SCALES).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["window"] == [512, 1024]
    assert Inference().describe() == {"scales": [1.0], "flip": False, "window": None}
    for message, options in (
        (r"blending is 'hat'; allowed are gaussian, uniform", {"blending": "hat"}),
        (r"overlap is 1\.0; it must be at least 0 and less than 1", {"overlap": 1.0}),
        (r"scales are \[\]; give one or more different factors", {"scales": ()}),
        (r"scales are \[1\.0, -1\.0\]; give", {"scales": (1.0, -1.0)}),
        (r"scales are \[nan\]; give one or more different factors from 0\.01 to 16", {"scales": (float("nan"),)}),
        (r"scales are \[1e-09\]; give", {"scales": (1e-9,)}),
        (r"scales are \[0.5, 1.0, 0.5\]; give one or more different", {"scales": (0.5, 1.0, 0.5)}),
        (r"scales are \[100\.0\]; give", {"scales": (100.0,)}),
        (r"window is \[500, 512\]; .* multiples of 32, such as \[512, 512\]", {"window": (500, 512)}),
        (r"tiles_per_batch is 0 and multiple 32", {"tiles_per_batch": 0}),
    ):
        with pytest.raises(InputError, match=message):
            Inference(**options)


def test_a_stride_that_does_not_divide_the_window_is_named():
    class Odd(nn.Module):
        def forward(self, images):
            return torch.zeros(len(images), 2, 13, 13)

    message = r"logits of 13x13 for a window of 64x64, which is no whole stride; choose another window"
    with pytest.raises(InputError, match=message):
        predictions(Inference(window=(64, 64)), Odd(), random_images(1, 128, 128), (128, 128))


class LiveMemory(TorchDispatchMode):
    """Adds up the storages that operators return, and takes them off when the last tensor on them is gone."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._holders = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor)
        return result

    def _hold(self, tensor):
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer not in self._holders:
            self._holders[pointer] = 0
            self.live += size
            self.peak = max(self.peak, self.live)
        self._holders[pointer] += 1
        weakref.finalize(tensor, self._release, pointer, size)

    def _release(self, pointer, size):
        self._holders[pointer] -= 1
        if self._holders[pointer] == 0:
            del self._holders[pointer]
            self.live -= size


def peak_memory(run):
    memory = LiveMemory()
    with torch.no_grad(), memory:
        run()
    return memory.peak


def test_the_memory_meter_counts_live_tensors():
    def run():
        first = torch.zeros(1000)  # 4000 bytes
        second = first + 1
        view = second[10:]
        del first, second
        third = view * 2 + 1  # two more, of 3960 bytes: 4000 + 2 x 3960
        return third

    assert peak_memory(run) == 4000 + 2 * 3960


EVERYTHING = Inference(window=(192, 192), flip=True, scales=ADE20K_SCALES)


def features_of_a_resnet(num_classes):
    """1x1 convolutions with 64 maps at stride 2 and 256 at stride 4, where the logits are as well."""
    first, second, last = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 256, 1), nn.Conv2d(256, num_classes, 1)

    def model(images):
        hidden = first(F.avg_pool2d(images.float(), 2)).relu()
        return last(second(F.avg_pool2d(hidden, 2)).relu())

    return model


@pytest.mark.parametrize("num_classes", [19, pytest.param(150, marks=pytest.mark.nightly)])
def test_windows_flips_and_six_scales_need_at_most_half_again_the_memory_of_one_whole_image(num_classes, monkeypatch):
    # A 1024x2048 image with windows of 768x768 and its bands, at a quarter of the size: every map is a 16th.
    monkeypatch.setattr(resample, "BAND_ELEMENTS", resample.BAND_ELEMENTS // 16)
    model = features_of_a_resnet(num_classes)
    images = torch.zeros(1, 3, 256, 512, dtype=torch.uint8)
    whole = peak_memory(lambda: whole_image(model, images, (256, 512)))
    assert whole > 4 * (2 * 64 * 128 * 256 + 256 * 64 * 128), "bytes: three feature maps of one pass"
    assert peak_memory(lambda: EVERYTHING(model, images, (256, 512))) <= 1.5 * whole


def test_windows_hold_one_row_of_them_however_tall_the_image(monkeypatch):
    band_elements = 1 << 18
    monkeypatch.setattr(resample, "BAND_ELEMENTS", band_elements)
    num_classes, width, side, stride, scales = 256, 128, 96, 4, (0.5, 1.0, 1.5)
    model = Patches(num_classes=num_classes, stride=stride)
    inference = Inference(window=(side, side), overlap=0.25, flip=True, scales=scales)
    # Bytes of one row of windows of all six views, in single precision, as that is little beside the image.
    held = 4 * 2 * num_classes * sum((side // stride) * (width * scale / stride) for scale in scales)
    peaks = []
    for height in (448, 896):
        images = torch.zeros(1, 3, height, width, dtype=torch.uint8)
        peak = peak_memory(lambda images=images: inference(model, images, images.shape[-2:]))
        peaks.append(peak - 4 * height * width)  # the mirrored image and the predictions
        assert held < peaks[-1] < 1.4 * held + 5 * 4 * band_elements, height
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize(("tile", "overlap"), [(64, "0.5"), (320, "0.8"), (640, "0.9"), (800, "0.56"), (640, "0.33")])
def test_windows_are_as_few_as_the_overlap_allows(tile, overlap):
    step = max(32, int(tile * (1 - Fraction(overlap))) // 32 * 32)
    length = 20 * tile
    found = starts(length, tile, overlap=float(overlap), multiple=32)
    assert len(found) == 1 + math.ceil((length - tile) / step)
