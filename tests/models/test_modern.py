"""Transformers as encoders, with random weights: images of any size, and what fixed sizes are given instead."""

from __future__ import annotations

import pytest
import torch

from segkit.errors import InputError
from segkit.models import smp_model
from segkit.models.any_size import Windowed


@pytest.mark.parametrize(
    ("arch", "encoder"),
    [
        ("DPT", "tu-vit_small_patch16_dinov3"),
        ("UPerNet", "tu-swin_tiny_patch4_window7_224"),
        ("Segformer", "mit_b0"),
    ],
)
def test_images_of_any_size_train_and_are_evaluated(arch, encoder):
    torch.manual_seed(0)
    net = smp_model(arch, encoder, 3, encoder_weights="none")
    loss = net(torch.randn(2, 3, 64, 70)).square().mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert sum(float(item.grad.abs().sum()) > 0 for item in net.parameters() if item.grad is not None) > 20
    image = torch.randn(1, 3, 70, 91)
    with torch.no_grad():
        logits = net.eval()(image)
        other = net(torch.cat([image[..., :90], image[..., 90:] + 3], -1))
    stride = 70 / logits.shape[-2]
    assert logits.shape[:2] == (1, 3)
    assert logits.shape[-1] == pytest.approx(91 / stride, abs=1)
    assert (logits != other).any()  # the last column of the image counts


def test_a_fixed_size_is_served_window_by_window():
    """Each window's logits are those of the network without the mixin on that window alone."""
    torch.manual_seed(0)
    net = smp_model("FPN", "tu-maxvit_pico_rw_256", 3, encoder_weights="none").eval().double()
    assert isinstance(net, Windowed)
    image = torch.randn(1, 3, 256, 300, dtype=torch.float64)
    right = torch.zeros(1, 3, 256, 256, dtype=torch.float64)
    right[..., :44] = image[..., 256:]
    alone = type(net).__mro__[2].forward
    with torch.no_grad():
        logits = net(image)
        assert logits.shape == (1, 3, 64, 75)
        torch.testing.assert_close(logits[..., :64], alone(net, image[..., :256]))
        torch.testing.assert_close(logits[..., 64:], alone(net, right)[..., :11])


def test_patches_that_the_decoder_cannot_take_are_refused():
    with pytest.raises(InputError, match="whose patches are 14 pixels wide, but DPT needs a power of two"):
        smp_model("DPT", "tu-vit_small_patch14_dinov2", 3, encoder_weights="none")
