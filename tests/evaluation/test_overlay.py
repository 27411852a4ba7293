"""Pictures of predictions."""

from __future__ import annotations

import numpy as np
from PIL import Image

from segkit.evaluation.overlay import legend, overlay, overlay_with_legend, palette_image, side_by_side

PALETTE = np.array([[0, 0, 0], [250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)
CLASSES = ["background", "road", "tree", "a very long name of a class"]


def two_areas(shape=(60, 80)):
    labels = np.zeros(shape, np.uint8)
    labels[:, 20:] = 1
    labels[:10, 20:] = 2
    return labels


def test_palette_image_keeps_indices_and_shows_colours(tmp_path):
    labels = two_areas()
    palette_image(labels, PALETTE).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), labels)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), PALETTE[labels])


def test_overlay_mixes_and_draws_lines_between_classes():
    image = np.full((60, 80, 3), 100, np.uint8)
    labels = two_areas()
    shown = overlay(image, labels, PALETTE)
    assert shown[30, 5].tolist() == [50, 50, 50]
    assert shown[30, 50].tolist() == [175, 50, 50]
    assert shown[30, 20].tolist() == [255, 255, 255]
    assert shown[10, 50].tolist() == [255, 255, 255]


def colours_of(picture):
    return {tuple(c) for c in picture.reshape(-1, 3).tolist()}


def test_legend_shows_the_classes_that_occur_by_area():
    column = legend(two_areas(), CLASSES, PALETTE, height=120)
    assert column.shape[0] == 120
    found = colours_of(column)
    assert {(250, 0, 0), (0, 250, 0)} <= found
    assert (0, 0, 250) not in found
    first_red = np.argwhere((column == [250, 0, 0]).all(-1))[:, 0].min()
    first_green = np.argwhere((column == [0, 250, 0]).all(-1))[:, 0].min()
    assert first_red < first_green  # road is larger than tree


def test_legend_of_a_low_image_says_how_many_found_no_room():
    labels = np.arange(4, dtype=np.uint8).reshape(2, 2)
    full, low = (legend(labels, CLASSES, PALETTE, height=height) for height in (200, 34))
    assert len(colours_of(full) & {tuple(c) for c in PALETTE.tolist()}) == 4
    assert low.shape[0] == 34
    assert len(colours_of(low) & {(250, 0, 0), (0, 250, 0), (0, 0, 250)}) == 0
    assert legend(labels, CLASSES, PALETTE, height=3).shape[0] == 3


def test_a_legend_has_the_letters_of_other_languages_than_english():
    labels = np.zeros((40, 40), np.uint8)
    columns = [legend(labels, [name], PALETTE, height=40)[:, :60] for name in ("ß", "é", "路", "я")]
    assert len({column.tobytes() for column in columns}) == len(columns)


def test_side_by_side_holds_image_and_each_prediction():
    image = np.full((60, 80, 3), 100, np.uint8)
    other = np.full((60, 80), 3, np.uint8)
    shown = side_by_side(image, [("CE", two_areas()), ("margin\udcff", other)], CLASSES, PALETTE)
    assert shown.shape[1] > 3 * 80
    assert {(100, 100, 100), (50, 50, 175), (175, 50, 50)} <= colours_of(shown)
    assert overlay_with_legend(image, other, CLASSES, PALETTE).shape[0] == 60
