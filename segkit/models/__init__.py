"""Networks. Each maps normalised images (N, C, H, W), H and W arbitrary, to logits at its own stride.

segmentation_models_pytorch and timm are imported when a function that needs them is called, not before.
"""

from segkit.models.coplenet import COPLENet
from segkit.models.deeplabv3plus import deeplabv3plus
from segkit.models.grad_checkpoint import enable_grad_checkpointing
from segkit.models.segmenter import Segmenter, normalisation
from segkit.models.smp_model import smp_model

__all__ = [
    "COPLENet",
    "Segmenter",
    "deeplabv3plus",
    "enable_grad_checkpointing",
    "normalisation",
    "smp_model",
]
