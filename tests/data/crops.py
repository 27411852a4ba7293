"""Training crops of whole pairs, cut and finished in one go."""


def apply(transform, image, label, window):
    """The crop of ``window``; the image may have been decoded at 1/``window.shrink`` of its size."""
    shrink = 1 if image.shape[:2] == label.shape else window.shrink
    return transform.finish(window.cut(image, shrink), window.cut(label), window)


def drawn_crop(transform, image, label, rng):
    return apply(transform, image, label, transform.draw(label.shape, rng))
