"""Window-first scale-crop-flip and colour jitter, against slow references."""

from __future__ import annotations

import colorsys
import random

import cv2
import numpy as np
import pytest
from crops import apply, drawn_crop

from segkit.data.transforms import PAD_COLOUR, EvalTransform, Span, TrainTransform, Window, target_size
from segkit.errors import InputError

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (60, 90, 3), dtype=np.uint8)
LABEL = RNG.integers(0, 19, (60, 90), dtype=np.uint8)


def blobs(height, width, *, seed=0, num=5, sigma=12.0):
    """A label of large smooth regions."""
    field = np.random.default_rng(seed).normal(size=(height, width)).astype(np.float32)
    field = cv2.GaussianBlur(field, (0, 0), sigma)
    return np.digitize(field, np.quantile(field, np.linspace(0, 1, num + 1)[1:-1])).astype(np.uint8)


def bilinear(image, window):
    """Slow float64 reference: sample at pixel centres of the window, clamped to it as it is cut out first."""
    part = image[window.rows.start : window.rows.stop, window.columns.start : window.columns.stop].astype(np.float64)
    out = np.empty((window.rows.length, window.columns.length, part.shape[2]))
    for y in range(window.rows.length):
        v = np.clip((y + 0.5) * part.shape[0] / window.rows.length - 0.5, 0, part.shape[0] - 1)
        for x in range(window.columns.length):
            u = np.clip((x + 0.5) * part.shape[1] / window.columns.length - 0.5, 0, part.shape[1] - 1)
            y0, x0 = int(v), int(u)
            y1, x1 = min(y0 + 1, part.shape[0] - 1), min(x0 + 1, part.shape[1] - 1)
            fy, fx = v - y0, u - x0
            top = part[y0, x0] * (1 - fx) + part[y0, x1] * fx
            out[y, x] = top * (1 - fy) + (part[y1, x0] * (1 - fx) + part[y1, x1] * fx) * fy
    return out


def nearest(label, window):
    rows = [
        window.rows.start + int((y + 0.5) * (window.rows.stop - window.rows.start) / window.rows.length)
        for y in range(window.rows.length)
    ]
    columns = [
        window.columns.start + int((x + 0.5) * (window.columns.stop - window.columns.start) / window.columns.length)
        for x in range(window.columns.length)
    ]
    return label[np.ix_(rows, columns)]


@pytest.mark.parametrize("scale", [0.55, 0.8, 1.0, 1.3, 2.0])
def test_window_equals_sampling_at_pixel_centres(scale):
    transform = TrainTransform(crop=(24, 32), scale=(scale, scale))
    for seed in range(4):
        window = transform.draw(LABEL.shape, np.random.default_rng(seed))
        image, label = apply(transform, IMAGE, LABEL, window)
        assert image.shape == (24, 32, 3)
        assert np.abs(image - bilinear(IMAGE, window)).max() <= 1.0  # OpenCV rounds its weights
        np.testing.assert_array_equal(label, nearest(LABEL, window))


def test_window_first_equals_resizing_the_whole_image_and_cropping():
    """Where the crop's edges fall on whole source pixels (scale 2, even offsets) both are the same picture."""
    transform = TrainTransform(crop=(24, 32), scale=(2, 2))
    whole = cv2.resize(IMAGE, (180, 120), interpolation=cv2.INTER_LINEAR)
    for seed in range(5):
        window = transform.draw(LABEL.shape, np.random.default_rng(seed))
        image, label = apply(transform, IMAGE, LABEL, window)
        rows = slice(2 * window.rows.start, 2 * window.rows.start + 24)
        columns = slice(2 * window.columns.start, 2 * window.columns.start + 32)
        inner = (slice(1, -1), slice(1, -1))  # the outermost pixels see neighbours outside the window
        np.testing.assert_array_equal(image[inner], whole[rows, columns][inner])
        np.testing.assert_array_equal(label, LABEL.repeat(2, 0).repeat(2, 1)[rows, columns])


def test_without_scale_the_crop_is_a_copy():
    transform = TrainTransform(crop=(20, 30), flip=0.5)
    flipped = 0
    for seed in range(20):
        window = transform.draw(LABEL.shape, np.random.default_rng(seed))
        image, label = drawn_crop(transform, IMAGE, LABEL, np.random.default_rng(seed))
        rows, columns = (
            slice(window.rows.start, window.rows.start + 20),
            slice(window.columns.start, window.columns.start + 30),
        )
        step = -1 if window.flip else 1
        flipped += window.flip
        np.testing.assert_array_equal(image, IMAGE[rows, columns][:, ::step])
        np.testing.assert_array_equal(label, LABEL[rows, columns][:, ::step])
        assert image.flags.c_contiguous
        assert not np.shares_memory(image, IMAGE)
    assert 3 < flipped < 17


@pytest.mark.parametrize("resize", [None, {"short_side": 45}, {"size": [80, 50]}])
def test_image_and_label_stay_aligned(resize):
    """A label painted as an image: away from edges the crop of the image must be the paint of the crop's label."""
    label = blobs(120, 160)
    image = np.dstack([label * 20, 255 - label * 20, label * 5 + 50]).astype(np.uint8)
    transform = TrainTransform(crop=(64, 64), resize=resize, scale=(0.5, 2.0), flip=0.5)
    checked = 0
    for seed in range(25):
        crop, train = drawn_crop(transform, image, label, np.random.default_rng(seed))
        valid = train != 255
        paint = np.dstack([train * 20, 255 - train * 20, train * 5 + 50]).astype(np.uint8)
        same = cv2.erode(train, np.ones((5, 5))) == cv2.dilate(train, np.ones((5, 5)))
        inside = same & valid
        checked += inside.sum()
        assert (crop[inside] == paint[inside]).all(1).mean() > 0.98  # corners thinner than a pixel may differ
    assert checked > 10_000


@pytest.mark.parametrize("scale", [0.6, 0.75, 1.4])
def test_no_shift_between_image_and_label(scale):
    """Edges at every column: on average the label's edge lies where the image's does, to 0.05 pixels."""
    transform = TrainTransform(crop=(8, 64), scale=(scale, scale))
    shifts = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        label = np.zeros((40, 150), np.uint8)
        label[:, rng.integers(50, 100) :] = 1
        image, train = drawn_crop(transform, np.repeat(label[..., None] * 200, 3, 2), label, rng)
        if train.min() != train.max():
            shifts.append((train.sum() - image[..., 0].sum() / 200) / 8 * (1 if train[0, -1] else -1))
    assert len(shifts) > 100
    assert abs(np.mean(shifts)) < 0.05


def test_scale_and_place_cover_their_ranges():
    transform = TrainTransform(crop=(16, 16), scale=(0.5, 2.0))
    windows = [transform.draw((64, 96), np.random.default_rng(seed)) for seed in range(600)]
    scales = np.array([w.columns.length / (w.columns.stop - w.columns.start) for w in windows])
    assert 0.49 < scales.min() < 0.53
    assert 1.85 < scales.max() < 2.05
    assert abs(scales.mean() - 1.25) < 0.05  # uniform
    assert min(w.rows.start for w in windows) == 0
    assert max(w.rows.stop for w in windows) == 64
    assert max(w.columns.stop for w in windows) == 96
    assert all(0 <= w.columns.start < w.columns.stop <= 96 and 0 <= w.rows.start < w.rows.stop <= 64 for w in windows)


def test_padding():
    transform = TrainTransform(crop=(100, 40), scale=(0.5, 0.5))
    places = set()
    for seed in range(20):
        window = transform.draw(LABEL.shape, np.random.default_rng(seed))
        image, label = apply(transform, IMAGE, LABEL, window)
        assert (window.rows.length, window.columns.length) == (30, 40)
        rows = slice(window.rows.pad, window.rows.pad + 30)
        np.testing.assert_array_equal(label[rows], nearest(LABEL, window))
        outside = np.ones(100, bool)
        outside[rows] = False
        assert (label[outside] == 255).all()
        assert (image[outside] == PAD_COLOUR).all()
        places.add(window.rows.pad)
    assert len(places) > 10


def fixed(**changes):
    values = {"rows": Span(0, 60, 60, 0), "columns": Span(0, 90, 90, 0), "flip": False, "jitter": None, "shrink": 1}
    return Window(**{**values, **changes})


def jittered(image, *, brightness, contrast, saturation, hue, order):
    """Slow float64 reference of the four steps, each rounded to bytes as the pipeline does."""

    def grey(pixels):
        return pixels @ np.array([0.299, 0.587, 0.114])

    def turn(pixels):
        flat = [colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in pixels.reshape(-1, 3)]
        rgb = [colorsys.hsv_to_rgb((h + hue) % 1, s, v) for h, s, v in flat]
        return np.array(rgb).reshape(pixels.shape) * 255

    steps = [
        lambda p: p * brightness,
        lambda p: p * contrast + grey(p).mean() * (1 - contrast),
        lambda p: p * saturation + grey(p)[..., None] * (1 - saturation),
        turn,
    ]
    pixels = image.astype(np.float64)
    for step in order:
        pixels = np.clip(np.rint(steps[step](pixels)), 0, 255)
    return pixels


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_color_jitter_equals_its_definition(order):
    smooth = cv2.resize(RNG.integers(40, 200, (6, 9, 3), dtype=np.uint8), (90, 60))
    jitter = {"brightness": 1.2, "contrast": 0.8, "saturation": 1.25, "hue": 0.04, "order": order}
    transform = TrainTransform(crop=(60, 90), color_jitter=1.0)
    image, label = apply(transform, smooth, LABEL, fixed(jitter=jitter))
    difference = np.abs(image - jittered(smooth, **jitter))
    assert difference.mean() < 1.5  # the hue is turned in steps of 2 degrees of 8-bit HSV
    assert difference.max() <= 12
    assert np.abs(image.astype(int) - smooth).mean() > 5
    np.testing.assert_array_equal(label, LABEL)


def test_jitter_comes_with_its_probability():
    transform = TrainTransform(crop=(60, 90), color_jitter=0.3)
    on = [transform.draw((60, 90), np.random.default_rng(s)).jitter is not None for s in range(1000)]
    assert 0.25 < np.mean(on) < 0.35


def test_a_crop_is_a_pure_function_of_the_generator():
    transform = TrainTransform(crop=(32, 32), scale=(0.5, 2.0), flip=0.5, color_jitter=0.8)
    first = [drawn_crop(transform, IMAGE, LABEL, np.random.default_rng(seed)) for seed in range(8)]
    np.random.seed(1)  # noqa: NPY002 - the point is that the global generators do not matter ...
    random.seed(1)
    before = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    order = [5, 1, 7, 0, 3, 2, 6, 4]
    again = {seed: drawn_crop(transform, IMAGE, LABEL, np.random.default_rng(seed)) for seed in order}
    for seed, (image, label) in enumerate(first):
        np.testing.assert_array_equal(image, again[seed][0])
        np.testing.assert_array_equal(label, again[seed][1])
    assert len({image.tobytes() for image, _ in first}) == 8
    np.testing.assert_array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002 - ... and are not moved
    assert before[1] == random.getstate()


def test_the_number_of_draws_never_changes():
    states = set()
    for options in ({}, {"flip": 1.0, "color_jitter": 1.0}, {"scale": (0.5, 2.0), "resize": {"short_side": 30}}):
        for size in ((60, 90), (7, 300)):
            rng = np.random.default_rng(3)
            TrainTransform(crop=(32, 32), **options).draw(size, rng)
            states.add(rng.random())
    assert len(states) == 1


@pytest.mark.parametrize("shrink", [2, 4])
def test_shrunk_image_is_cut_where_the_label_is(shrink):
    """An image decoded at 1/2 or 1/4 gives, away from edges, the same crop as the whole image."""
    label = blobs(241, 322, sigma=12.0 * shrink)
    image = np.repeat((label * 30)[..., None], 3, 2)
    rows, columns = -(-241 // shrink), -(-322 // shrink)
    padded = np.pad(image, ((0, rows * shrink - 241), (0, columns * shrink - 322), (0, 0)), mode="edge")
    small = padded.reshape(rows, shrink, columns, shrink, 3).mean((1, 3)).round().astype(np.uint8)
    transform = TrainTransform(crop=(40, 40), scale=(0.7 / shrink, 1.0 / shrink))
    for seed in range(20):
        window = transform.draw(label.shape, np.random.default_rng(seed))
        assert window.shrink == shrink
        crop, train = apply(transform, small, label, window)
        same = cv2.erode(train, np.ones((5, 5))) == cv2.dilate(train, np.ones((5, 5)))
        assert same.sum() > 50
        assert (crop[same][:, 0] == train[same] * 30).mean() > 0.98


def test_shrink_never_goes_below_the_target():
    for scale, shrink in ((1.0, 1), (0.51, 1), (0.5, 2), (0.26, 2), (0.25, 4), (0.1, 4)):
        window = TrainTransform(crop=(16, 16), scale=(scale, scale)).draw((400, 600), np.random.default_rng(0))
        assert window.shrink == shrink


@pytest.mark.parametrize(
    ("resize", "size", "expected"),
    [
        (None, (30, 40), (30, 40)),
        ({"short_side": 15}, (30, 40), (15, 20)),
        ({"short_side": 15}, (41, 30), (20, 15)),
        ({"short_side": 60, "size": None}, (30, 40), (60, 80)),
        ({"short_side": None, "size": [720, 1280]}, (30, 40), (720, 1280)),
        ({"short_side": 1}, (1, 1000), (1, 1000)),
    ],
)
def test_target_size(resize, size, expected):
    assert target_size(size, resize) == expected


@pytest.mark.parametrize("resize", [{"short_side": 60000}, {"size": [60000, 60000]}])
def test_a_resize_beyond_the_limit_is_refused_before_it_takes_memory(resize):
    with pytest.raises(InputError, match="40x40 is resized to 60000x60000, more than 200000000 pixels"):
        target_size((40, 40), resize)


def test_eval_transform():
    image, label = EvalTransform()(IMAGE, LABEL)
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(label, LABEL)
    image, label = EvalTransform(resize={"short_side": 30})(IMAGE, LABEL)
    assert image.shape == (30, 45, 3)
    assert label.shape == (60, 90)
    image, label = EvalTransform(resize={"size": [30, 30]}, labels="resized")(IMAGE, LABEL)
    assert image.shape == (30, 30, 3)
    np.testing.assert_array_equal(label, nearest(LABEL, fixed(rows=Span(0, 60, 30, 0), columns=Span(0, 90, 30, 0))))
